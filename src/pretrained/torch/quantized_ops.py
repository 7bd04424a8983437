# SPDX-License-Identifier: Apache-2.0
"""Numbers to integers and back: rounding, packing, and the multiplication kernels of torch's core.

`pretrained.core.quantization` says what the stored forms mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch.nn import functional as F

from pretrained.core.ggml import BLOCK_TYPES, dequantize
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import WeightsError

# Rows of activations up to which the packed kernels win over dequantizing once and multiplying: they
# read the weights again for every few rows.
KERNEL_ROWS = 32

# Elements handled at a time, so that temporaries stay in the cache: 1 MiB of float32.
CHUNK = 1 << 18

# Elements of weights that a reference multiplication holds dequantized at a time.
_TILE = 1 << 22


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized weight, in a form of `pretrained.core.integer_form`.

    Attributes:
        weight: [out, in] int8, or [out, in / 2] uint8.
        scale: [out] or [out, in / group]; bfloat16 where this library has rounded.
        zero: Offsets or zero points, [out, in / group]; None for symmetric forms.
        error: Root-mean-square error relative to the weight's root mean square.
        order: int32 [in], the input of each stored column; None where they are in order.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    error: float
    order: torch.Tensor | None = None

    def to(self, device: torch.device) -> Packed:
        """Return it on a device.

        Args:
            device: Where.
        """
        zero = None if self.zero is None else self.zero.to(device)
        order = None if self.order is None else self.order.to(device)
        return Packed(self.weight.to(device), self.scale.to(device), zero, self.error, order)

    def part(self, name: str) -> torch.Tensor:
        """Return one of its tensors by the name it has in a layer.

        Args:
            name: ``"weight"``, ``"weight_scale"``, ``"weight_zero"`` or ``"weight_order"``.
        """
        names = {"weight_scale": self.scale, "weight_zero": self.zero, "weight_order": self.order}
        tensor = self.weight if name == "weight" else names[name]
        assert tensor is not None
        return tensor


def quantize(
    weight: torch.Tensor, config: QuantizationConfig, *, key: str = "weight", transposed: bool = False
) -> Packed:
    """Quantize a matrix, a cache-sized piece at a time; nothing of its full size is made but the result.

    Args:
        weight: [out, in], or [in, out] where `transposed`; any floating dtype, with values.
        config: int8 or int4.
        key: Its name, for errors.
        transposed: Whether the matrix is stored the other way round.

    Raises:
        WeightsError: it has no values (meta), or infinities or NaN among them.
    """
    if weight.is_meta:
        raise WeightsError(
            "A weight without values cannot be quantized",
            where=key,
            found="a tensor on the meta device",
            mend="Load or initialise the weights first.",
        )
    matrix = weight.detach().t() if transposed else weight.detach()
    rows, columns = matrix.shape
    groups = 1 if config.bits == 8 else columns // (config.group_size or columns)
    packed_columns = columns * config.bits // 8
    device = matrix.device
    data = torch.empty(
        rows, packed_columns, dtype=torch.int8 if config.bits == 8 else torch.uint8, device=device
    )
    scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=device)
    zero = None if config.symmetric else torch.empty_like(scale)
    step = max(1, CHUNK // columns)
    lost = total = 0.0
    for start in range(0, rows, step):
        piece = matrix[start : start + step].to(torch.float32).contiguous()
        part = slice(start, start + len(piece))
        grouped = piece.reshape(len(piece), groups, -1)
        s, z, q = _round(grouped, config)
        if not math.isfinite(checked := float(s.sum())):
            raise _not_finite(piece, key, start, checked)
        back = q * s if z is None else (q * s).add_(z)
        lost += float(back.sub_(grouped).square_().sum())
        total += float(grouped.square().sum())
        scale[part] = s[..., 0]
        if zero is not None and z is not None:
            zero[part] = z[..., 0]
        q = q.reshape(len(piece), -1)
        data[part] = q.to(torch.int8) if config.bits == 8 else pack_nibbles(q.add_(8).to(torch.uint8))
    error = math.sqrt(lost / total) if total else 0.0
    return Packed(data, scale[:, 0].clone() if config.bits == 8 else scale, zero, error)


def _round(
    x: torch.Tensor, config: QuantizationConfig
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return scale, zero (or None) and integers of groups along the last axis, all float32.

    Scale and zero hold numbers that bfloat16 holds too, and the integers are rounded against those.
    """
    # Not aminmax: ten times slower than both on a CPU.
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = None
    if config.bits == 8:
        scale = torch.maximum(high, -low).div_(127)
        least, most = -127, 127
    elif config.symmetric:
        # The number of largest size becomes -8, as in GGML's Q4_0: all 16 values serve, and groups of
        # normal weights lose about an eighth less than with -7..7.
        scale = torch.where(high > -low, high, low).div_(-8)
        least, most = -8, 7
    else:
        zero = _bfloat16(low * (7 / 15) + high * (8 / 15))
        scale = torch.maximum((high - zero).div_(7), (zero - low).div_(8))
        least, most = -8, 7
    scale = _bfloat16(scale)
    # Groups of zeros, and numbers so small that their scale vanishes.
    scale[scale == 0] = 1.0
    q = x / scale if zero is None else (x - zero).div_(scale)
    return scale, zero, q.round_().clamp_(least, most)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _not_finite(piece: torch.Tensor, key: str, start: int, found: float) -> WeightsError:
    bad = (~piece.isfinite()).nonzero()
    where = f"{key}, output {start + int(bad[0, 0])}, input {int(bad[0, 1])}" if len(bad) else key
    return WeightsError(
        "A weight that is to be quantized has values that are no finite numbers",
        where=where,
        found=float(piece[tuple(bad[0])]) if len(bad) else found,
        mend="The checkpoint is damaged, or overflowed in training; skip the layer with skip_modules to load "
        "it as it is.",
    )


# -- four bits ------------------------------------------------------------------------------------


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """Pack [rows, columns] integers 0..15 two to a byte, the even column low.

    Args:
        q: uint8, contiguous, an even number of columns.
    """
    # Read as 16 bits, a pair is `even + 256 odd` (every platform of torch is little-endian).
    pairs = q.view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the integers 0..15 of packed bytes as int8, [rows, columns].

    Args:
        packed: uint8 [rows, columns / 2].
    """
    pairs = packed.to(torch.int16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.int8)


@cache
def kernel_block() -> int | None:
    """Return how many rows the 4-bit kernel of this CPU interleaves, or None where it cannot be used.

    Torch's layout depends on the vector unit and is documented nowhere, so it is recognised by packing
    numbers that are known and finding them again; a layout that is not recognised is not used.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (144, 32), dtype=torch.uint8, generator=generator)
    try:
        packed = _kernel_pack(q)
        torch.ops.aten._weight_int4pack_mm_for_cpu(
            torch.ones(1, 32, dtype=torch.bfloat16), packed, 32, torch.ones(1, 144, 2, dtype=torch.bfloat16)
        )
    except (RuntimeError, AttributeError):
        return None
    for block in (64, 32):
        if torch.equal(_from_kernel(packed, block), q.view(torch.int8)):
            return block
    return None


def _kernel_pack(q: torch.Tensor) -> torch.Tensor:
    return torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)


def to_kernel_layout(packed: torch.Tensor) -> torch.Tensor:
    """Return the stored form of 4-bit weights in the layout of this CPU's kernel; as many bytes.

    Args:
        packed: uint8 [out, in / 2], rows in order.
    """
    block = kernel_block()
    assert block is not None
    result = torch.empty_like(packed, memory_format=torch.contiguous_format)
    # Blocks of rows are independent, and the packer wants 32 bits for each number.
    step = max(1, CHUNK // (2 * packed.shape[1] * block)) * block
    for start in range(0, len(packed), step):
        rows = packed[start : start + step]
        result[start : start + step] = _kernel_pack(unpack_nibbles(rows)).view_as(rows)
    return result


def from_kernel_layout(packed: torch.Tensor) -> torch.Tensor:
    """Return the integers 0..15, int8 [out, in], of weights in the kernel's layout.

    Args:
        packed: What `to_kernel_layout` returned.
    """
    block = kernel_block()
    assert block is not None
    return _from_kernel(packed, block)


def _from_kernel(packed: torch.Tensor, block: int) -> torch.Tensor:
    """Undo a layout in which a block's byte holds row r (low) and r + block / 2 (high) of one column.

    Rows that fill no block lie in one of their own, whose byte holds two neighbouring rows.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    result = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    full = rows // block * block
    flat = packed.reshape(-1)
    if full:
        halves = result[:full].view(full // block, 2, block // 2, columns)
        source = flat[: full * columns // 2].view(full // block, columns, block // 2).transpose(1, 2)
        halves[:, 0] = source & 15
        halves[:, 1] = source >> 4
    if full < rows:
        pairs = result[full:].view((rows - full) // 2, 2, columns)
        source = flat[full * columns // 2 :].view(columns, (rows - full) // 2).t()
        pairs[:, 0] = source & 15
        pairs[:, 1] = source >> 4
    return result


# -- GGML's blocks --------------------------------------------------------------------------------


def dequantize_blocks(rows: torch.Tensor, block_type: str, columns: int) -> torch.Tensor:
    """Return packed rows as float32, bit-equal to GGML's reference.

    Args:
        rows: uint8 [n, bytes of a row]; on any device, decoded on the CPU.
        block_type: GGML's name, ``"q4_1"``.
        columns: Numbers in a row.
    """
    raw = np.ascontiguousarray(rows.detach().cpu().numpy())
    values = dequantize(raw.reshape(-1).data, block_type, (len(raw), columns))
    return torch.from_numpy(values).to(rows.device)


def row_bytes(block_type: str, columns: int) -> int:
    """Return the bytes of a row of packed numbers.

    Args:
        block_type: GGML's name.
        columns: Numbers in a row, whole blocks.
    """
    kind = BLOCK_TYPES[block_type]
    return columns // kind.elements * kind.nbytes


def tiles(rows: int, columns: int) -> list[slice]:
    """Cut a matrix into runs of rows that a multiplication dequantizes at a time.

    Args:
        rows: Its rows.
        columns: Its columns.
    """
    step = max(1, _TILE // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def linear_by_tiles(x: torch.Tensor, leaf: Dense) -> torch.Tensor:
    """Multiply with a weight that is dequantized tile by tile, in the dtype of `x`.

    Args:
        x: [rows, in].
        leaf: The layer.
    """
    parts = [F.linear(x, leaf.rows(part, x.dtype)) for part in tiles(leaf.out_features, leaf.in_features)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Dense:
    """What the multiplications need of a quantized layer.

    Attributes:
        in_features: Columns of the weight.
        out_features: Its rows.
    """

    in_features: int
    out_features: int

    def rows(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, dequantized.

        Args:
            part: Which.
            dtype: As what.
        """
        raise NotImplementedError

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` by the best way there is.

        Args:
            x: [rows, in].
        """
        raise NotImplementedError


class QuantizedMatmul(torch.autograd.Function):
    """``x @ weight.T`` whose gradient dequantizes again rather than keep a weight of full size."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, leaf: Dense) -> torch.Tensor:
        """Multiply.

        Args:
            ctx: Torch's.
            x: [rows, in].
            leaf: The layer.
        """
        ctx.leaf = leaf  # type: ignore[attr-defined]
        return leaf.multiply(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of `x`; the weight is fixed.

        Args:
            ctx: Torch's.
            *grads: [rows, out].
        """
        leaf: Dense = ctx.leaf  # type: ignore[attr-defined]
        grad = grads[0]
        result = grad.new_zeros(len(grad), leaf.in_features)
        for part in tiles(leaf.out_features, leaf.in_features):
            result += grad[:, part] @ leaf.rows(part, grad.dtype)
        return result, None
