# SPDX-License-Identifier: Apache-2.0
"""From floats to int8 and int4, a cache-sized tile at a time.

`pretrained.core.quantization` says what the stored forms mean. A tile is cast, rounded, packed and measured
while it is in the cache, in buffers that serve again, so that the matrix is read from memory once and
nothing of its full size is made but the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import WeightsError
from pretrained.torch.quantized_ops import kernel_block, kernel_bytes, pack_nibbles

# Elements handled at a time: a MiB of float32. Smaller tiles spend more on calling operators than they save.
TILE = 1 << 18


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized weight, in a form of `pretrained.core.integer_form`.

    Attributes:
        weight: [out, in] int8, or [out, in / 2] uint8.
        scale: [out] or [out, in / group]; bfloat16 where this library has rounded.
        zero: Offsets or zero points, [out, in / group]; None for symmetric forms.
        error: Root-mean-square error relative to the weight's root mean square.
        order: int32 [in], the input of each stored column; None where they are in order.
        kernel_scales: bfloat16 [in / group, out, 2], scale and zero side by side, where `weight` is in the
            layout of this CPU's 4-bit kernel; `scale` and `zero` are views of it. None for the stored form.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    error: float
    order: torch.Tensor | None = None
    kernel_scales: torch.Tensor | None = None

    def to(self, device: torch.device) -> Packed:
        """Return it on a device.

        Args:
            device: Where; only the stored form goes elsewhere than the CPU.
        """
        if device == self.weight.device:
            return self
        assert self.kernel_scales is None
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
    weight: torch.Tensor,
    config: QuantizationConfig,
    *,
    key: str = "weight",
    transposed: bool = False,
    for_kernel: bool = False,
) -> Packed:
    """Quantize a matrix.

    Args:
        weight: [out, in], or [in, out] where `transposed`; any floating dtype, with values.
        config: int8 or int4.
        key: Its name, for errors.
        transposed: Whether the matrix is stored the other way round.
        for_kernel: Whether 4-bit weights come in the layout of this CPU's kernel; `kernel_block` has found
            one, and the rows divide by 16.

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
    with torch.no_grad():
        return _quantize(weight.t() if transposed else weight, config, key, for_kernel)


def _quantize(matrix: torch.Tensor, config: QuantizationConfig, key: str, for_kernel: bool) -> Packed:
    rows, columns = matrix.shape
    group = columns if config.bits == 8 else config.group_size or columns
    height, width = _tile_shape(rows, columns, group, for_kernel)
    device = matrix.device
    kind = torch.int8 if config.bits == 8 else torch.uint8
    data = torch.empty(rows, columns * config.bits // 8, dtype=kind, device=device)
    # Scales and zeros by group first, as the kernel has them; the stored form is a copy at the end.
    scales = torch.zeros(columns // group, rows, 2, dtype=torch.bfloat16, device=device)
    buffers = torch.empty(2, height * width, dtype=torch.float32, device=device)
    lost = total = 0.0
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            piece = matrix[top : top + height, left : left + width]
            shape = (len(piece), piece.shape[1] // group, group)
            x = buffers[0, : piece.numel()].view(shape)
            x.view(piece.shape).copy_(piece)
            scale, zero, q = _round(x, config, out=buffers[1, : piece.numel()].view(shape))
            total += (squares := _squares(x.view(piece.shape)))
            if not math.isfinite(squares):
                _check_finite(piece, scale, key, (top, left))
            x.addcmul_(q, scale, value=-1)
            part = scales[left // group : left // group + shape[1], top : top + shape[0]]
            part[..., 0] = scale[..., 0].t()
            if zero is not None:
                x.sub_(zero)
                part[..., 1] = zero[..., 0].t()
            lost += _squares(x.view(piece.shape))
            integers = q.view(piece.shape).to(torch.int8)
            if for_kernel:
                kernel_bytes(integers, data, top, left)
            elif config.bits == 8:
                data[top : top + height] = integers
            else:
                data[top : top + height] = pack_nibbles(integers.add_(8).view(torch.uint8))
    error = math.sqrt(lost / total) if total else 0.0
    scale = scales[..., 0].t()
    zero = None if config.symmetric else scales[..., 1].t()
    if for_kernel:
        return Packed(data, scale, zero, error, kernel_scales=scales)
    scale = scale[:, 0].clone() if config.bits == 8 else scale.contiguous()
    return Packed(data, scale, zero if zero is None else zero.contiguous(), error)


def _squares(x: torch.Tensor) -> float:
    # A norm for each row: one sum over a whole tile would lose digits that a report shows.
    return float(torch.linalg.vector_norm(x, dim=1).square_().sum())


def _tile_shape(rows: int, columns: int, group: int, for_kernel: bool) -> tuple[int, int]:
    """Return rows and columns of a tile: whole groups, and for the kernel whole blocks of rows."""
    block = (kernel_block() or 1) if for_kernel else 1
    width = min(columns, max(TILE // block // group, 1) * group)
    return min(rows, max(TILE // width // block, 1) * block), width


def _round(
    x: torch.Tensor, config: QuantizationConfig, *, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return scale, zero (or None) and integers of groups along the last axis, all float32.

    Scale and zero hold numbers that bfloat16 holds too, and the integers are rounded against those.

    Args:
        x: [rows, groups, group].
        config: The scheme.
        out: Becomes the integers.
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
        low = -low
        scale = torch.maximum(high, low).div_(8).copysign_(low - high)
        least, most = -8, 7
    else:
        zero = _bfloat16(low * (7 / 15) + high * (8 / 15))
        scale = torch.maximum((high - zero).div_(7), (zero - low).div_(8))
        least, most = -8, 7
    scale = _bfloat16(scale)
    # Groups of zeros, and numbers so small that their scale vanishes.
    scale.masked_fill_(scale == 0, 1.0)
    if zero is None:
        torch.div(x, scale, out=out)
    else:
        torch.sub(x, zero, out=out).div_(scale)
    return scale, zero, out.round_().clamp_(least, most)


def _bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _check_finite(piece: torch.Tensor, scale: torch.Tensor, key: str, corner: tuple[int, int]) -> None:
    """Raise if a tile whose squares are not finite has such values itself, or scales."""
    bad = (~piece.isfinite()).nonzero()
    if not len(bad) and scale.isfinite().all():
        return
    place = key
    if len(bad):
        place = f"{key}, output {corner[0] + int(bad[0, 0])}, input {corner[1] + int(bad[0, 1])}"
    raise WeightsError(
        "A weight that is to be quantized has values that are no finite numbers",
        where=place,
        found=float(piece[tuple(bad[0])]) if len(bad) else "numbers too large for a scale",
        mend="The checkpoint is damaged, or overflowed in training; skip the layer with skip_modules to load "
        "it as it is.",
    )
