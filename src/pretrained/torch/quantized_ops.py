# SPDX-License-Identifier: Apache-2.0
"""Integers to numbers and back: packing, layouts, and the multiplication kernels of torch's core.

`pretrained.core.quantization` says what the stored forms mean.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional as F

from pretrained.core.ggml import BLOCK_TYPES
from pretrained.torch import quantized_cuda

# Rows of activations up to which the packed kernels win over dequantizing once and multiplying, by bits: they
# read the weights again for every few rows, and 4 bits take three times as long to dequantize.
KERNEL_ROWS = {8: 24, 4: 80}
CUDA_KERNEL_ROWS = 32

# Elements handled at a time, so that temporaries stay in the cache: 1 MiB of float32.
CHUNK = 1 << 18

# Elements of weights that a reference multiplication holds dequantized at a time.
_TILE = 1 << 22


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
    """Return the stored form of 4-bit weights in the layout of their device's kernel; as many bytes.

    Args:
        packed: uint8 [out, in / 2], rows in order.
    """
    if packed.device.type == "cuda":
        return quantized_cuda.pack(packed)
    block = kernel_block()
    assert block is not None
    result = torch.empty_like(packed, memory_format=torch.contiguous_format)
    step = max(1, CHUNK // (2 * packed.shape[1] * block)) * block
    for start in range(0, len(packed), step):
        kernel_bytes(unpack_nibbles(packed[start : start + step]).sub_(8), result, start)
    return result


def kernel_bytes(q: torch.Tensor, result: torch.Tensor, top: int, left: int = 0) -> None:
    """Write integers into a matrix that is in the layout of this CPU's kernel; undoes `from_kernel_layout`.

    Torch's own packer takes ten times as long, and 32 bits for each number.

    Args:
        q: int8 [rows, columns], -8..7: whole blocks, or all rows from `top` to the end; an even number of
            columns.
        result: uint8 [out, in / 2], changed in place.
        top: Row of the matrix at which `q` starts; a multiple of the block.
        left: Its column.
    """
    block = kernel_block()
    assert block is not None
    rows, columns = result.shape[0], 2 * result.shape[1]
    whole = min(len(q), (rows - top) // block * block)
    for part, height in ((q[:whole], block), (q[whole:], rows % block)):
        if not len(part):
            continue
        halves = part.view(-1, 2, height // 2, part.shape[1])
        if height != block:
            # The rows that fill no block: a byte holds two neighbours.
            halves = part.view(1, height // 2, 2, part.shape[1]).transpose(1, 2)
        # Modulo 256, -120 moves both halves from -8..7 to 0..15.
        pairs = (halves[:, 1] * 16).add_(halves[:, 0]).add_(-120).view(torch.int16)
        count, _, width = pairs.shape
        # Two columns move at a time; torch transposes matrices of whole words fast.
        turned = torch.empty(count, width, height // 2, dtype=torch.int16)
        for source, sink in zip(pairs, turned, strict=True):
            sink.copy_(source.t())
        target = result.as_strided(
            (count, width, 2, height // 2),
            (height * columns // 2, height, height // 2, 1),
            (top * columns + left * height) // 2,
        )
        target[:, :, 0].copy_(turned)
        target[:, :, 1].copy_(turned.bitwise_right_shift_(8))
        top += len(part)


def from_kernel_layout(packed: torch.Tensor) -> torch.Tensor:
    """Return the integers 0..15, int8 [out, in], of weights in the kernel's layout.

    Args:
        packed: What `to_kernel_layout` returned.
    """
    if packed.device.type == "cuda":
        return quantized_cuda.unpack(packed)
    block = kernel_block()
    assert block is not None
    return _from_kernel(packed, block)


def _from_kernel(packed: torch.Tensor, block: int) -> torch.Tensor:
    """Undo a layout in which a block's byte holds row r (low) and r + block / 2 (high) of one column.

    Rows that fill no block lie in one of their own, whose byte holds two neighbouring rows.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    result = torch.empty(rows, columns, dtype=torch.int8, device=packed.device)
    flat = packed.reshape(-1)
    full = rows // block * block
    for start, stop, height in ((0, full, block), (full, rows, rows - full)):
        if start == stop:
            continue
        count = (stop - start) // height
        source = flat[start * columns // 2 : stop * columns // 2].view(count, columns // 2, 2, height // 2)
        # Two columns move at a time, as in `kernel_bytes`.
        pairs = source[:, :, 1].to(torch.int16).bitwise_left_shift_(8).bitwise_or_(source[:, :, 0])
        turned = torch.empty(count, height // 2, columns // 2, dtype=torch.int16, device=packed.device)
        for before, after in zip(pairs, turned, strict=True):
            after.copy_(before.t())
        both = turned.view(torch.uint8).view(count, height // 2, columns)
        halves = result[start:stop].view(count, 2, height // 2, columns)
        if height != block:
            halves = result[start:stop].view(1, height // 2, 2, columns).transpose(1, 2)
        halves[:, 0].copy_(both & 15)
        halves[:, 1].copy_(both >> 4)
    return result


# -- GGML's blocks --------------------------------------------------------------------------------


def row_bytes(block_type: str, columns: int) -> int:
    """Return the bytes of a row of packed numbers.

    Args:
        block_type: GGML's name.
        columns: Numbers in a row, whole blocks.
    """
    kind = BLOCK_TYPES[block_type]
    return columns // kind.elements * kind.nbytes


def tiles(rows: int, columns: int, size: int = _TILE) -> list[slice]:
    """Cut a matrix into runs of rows that a multiplication dequantizes at a time.

    Args:
        rows: Its rows.
        columns: Its columns.
        size: Elements of a tile.
    """
    step = max(1, size // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def linear_by_tiles(x: torch.Tensor, leaf: Dense, size: int = _TILE) -> torch.Tensor:
    """Multiply with a weight that is dequantized tile by tile, in the dtype of `x`.

    Args:
        x: [rows, in].
        leaf: The layer.
        size: Elements of a tile.
    """
    cuts = tiles(leaf.out_features, leaf.in_features, size)
    parts = [F.linear(x, leaf.rows(part, x.dtype)) for part in cuts]
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
