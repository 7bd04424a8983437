# SPDX-License-Identifier: Apache-2.0
"""GGML's blocks in torch: decoded for use, and repacked for the 4-bit kernel of a CPU.

`pretrained.core.ggml` says what the blocks hold and decodes all of them; here the usual ones are taken
apart by torch's operators, which are vectorised and run on all cores. Every type is a scale for a group,
times an integer, plus perhaps an offset, so one shape serves them: `Parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pretrained.core.ggml import BLOCK_TYPES, dequantize
from pretrained.core.integer_form import IntegerForm
from pretrained.torch.quantized_ops import kernel_block, kernel_bytes
from pretrained.torch.rounding import TILE, Packed

# What the kernel's groups divide by; see `IntegerForm`.
_GROUP = 32
_KERNEL_FORM = IntegerForm(bits=4, group_size=_GROUP, zero="offset")


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks taken apart; a weight is ``scale * integer + offset``, each operation rounded to float32.

    Attributes:
        integers: int8 [blocks, groups, group].
        scale: float32 [blocks, groups, 1].
        offset: As `scale`, or None.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None


def decode(rows: torch.Tensor, block_type: str, columns: int) -> torch.Tensor:
    """Return packed rows as float32, bit-equal to GGML's reference.

    Args:
        rows: uint8 [n, bytes of a row]; types without a decoder here are decoded on the CPU.
        block_type: GGML's name, ``"q4_1"``.
        columns: Numbers in a row.
    """
    split = _SPLITTERS.get(block_type)
    if split is None:
        raw = np.ascontiguousarray(rows.detach().cpu().numpy())
        decoded = dequantize(raw.reshape(-1).data, block_type, (len(raw), columns))
        return torch.from_numpy(decoded).to(rows.device)
    result = torch.empty(len(rows), columns, device=rows.device)
    step = max(1, TILE // columns)
    for start in range(0, len(rows), step):
        parts = split(_blocks(rows[start : start + step], block_type))
        values = result[start : start + step].view(parts.integers.shape)
        values.copy_(parts.integers).mul_(parts.scale)
        if parts.offset is not None:
            values.add_(parts.offset)
    return result


def kernel_packs(block_type: str) -> int:
    """Return how many 4-bit matrices hold a type's weights: 1, or 2 for Q8_0; 0 where none do.

    Types whose groups are shorter than the kernel's, or whose integers have 5 or 6 bits, are not worth it:
    two matrices would take nearly twice the file's memory.

    Args:
        block_type: GGML's name.
    """
    return {"q4_0": 1, "q4_1": 1, "q4_k": 1, "q8_0": 2}.get(block_type, 0)


def repack(rows: torch.Tensor, block_type: str, columns: int, order: torch.Tensor | None) -> list[Packed]:
    """Return weights as matrices for the 4-bit kernel, whose sum they are.

    Scales and offsets are rounded to bfloat16, so that a weight ``s * q + o`` is off by at most
    ``2**-8 * (8 * |s| + |o + 8 * s|)``, the offset being that of the middle of the integers; for Q8_0, whose
    two halves share one rounded scale, by ``2**-8 * |w|``.

    Args:
        rows: uint8 [out, bytes of a row], a number of rows that divides by 16.
        block_type: A type of which `kernel_packs` says that it can be.
        columns: Numbers in a row.
        order: Where in `rows` each of the matrix's lies; None where all are in order.
    """
    block, height = kernel_block(), len(rows)
    assert block is not None
    count = kernel_packs(block_type)
    data = [torch.empty(height, columns // 2, dtype=torch.uint8) for _ in range(count)]
    scales = [torch.empty(columns // _GROUP, height, 2, dtype=torch.bfloat16) for _ in range(count)]
    step = max(1, TILE // columns // block) * block
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        parts = _SPLITTERS[block_type](_blocks(rows[part if order is None else order[part]], block_type))
        for index, (q, scale, zero) in enumerate(_halves(parts) if count == 2 else [_centred(parts)]):
            kernel_bytes(q.view(-1, columns), data[index], start)
            scales[index][:, part, 0] = scale.view(-1, columns // _GROUP).t()
            scales[index][:, part, 1] = zero.view(-1, columns // _GROUP).t()
    return [
        Packed(d, s[..., 0].t(), s[..., 1].t(), 0.0, kernel_scales=s)
        for d, s in zip(data, scales, strict=True)
    ]


def kernel_form() -> IntegerForm:
    """Return the form of the matrices that `repack` makes."""
    return _KERNEL_FORM


def _centred(parts: Parts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return 4-bit integers -8..7, scale and offset."""
    if parts.offset is None:
        return parts.integers, parts.scale, torch.zeros_like(parts.scale)
    return parts.integers - 8, parts.scale, parts.offset + 8 * parts.scale


def _halves(parts: Parts) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return integers of 8 bits as two of 4: ``q = 16 * high + low``, `low` being 0..15."""
    scale = parts.scale.to(torch.bfloat16)
    low = (parts.integers & 15).sub_(8)
    return [(parts.integers >> 4, scale * 16, torch.zeros_like(scale)), (low, scale, scale * 8)]


# -- taking blocks apart --------------------------------------------------------------------------


def _blocks(rows: torch.Tensor, block_type: str) -> torch.Tensor:
    """Return rows as [blocks, bytes of a block]."""
    return rows.reshape(-1, BLOCK_TYPES[block_type].nbytes)


def _half(blocks: torch.Tensor, place: int) -> torch.Tensor:
    """Return a float16 number of each block as float32, [blocks, 1, 1].

    Args:
        blocks: uint8 [blocks, bytes].
        place: Its first byte; every type's lie at even ones.
    """
    return blocks.view(torch.float16)[:, place // 2, None, None].float()


def _unpack(field: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Return unsigned integers of 1, 2 or 4 bits, uint8 [blocks, all].

    Args:
        field: uint8 [blocks, size]. Each run of `width` bytes holds ``8 // bits`` runs of `width` integers:
            the lowest bits of all its bytes come first, then the next ones, ...
        bits: Bits an integer takes.
        width: Length of a run; a multiple of 16.
    """
    source = field.contiguous()
    count = 8 // bits
    levels = [source >> (bits * index) if index else source for index in range(count)]
    mask = (1 << bits) - 1
    parts = [level & mask if index < count - 1 else level for index, level in enumerate(levels)]
    # 16 bytes move as one number of the widest type there is.
    wide = [part.view(torch.complex128).view(len(field), -1, width // 16) for part in parts]
    return torch.stack(wide, dim=2).view(len(field), -1).view(torch.uint8)


def _q4_0(blocks: torch.Tensor) -> Parts:
    integers = _unpack(blocks[:, 2:], 4, 16).view(torch.int8).sub_(8)
    return Parts(integers[:, None], _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Parts:
    integers = _unpack(blocks[:, 4:], 4, 16).view(torch.int8)
    return Parts(integers[:, None], _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Parts:
    return Parts(blocks[:, 2:].view(torch.int8)[:, None], _half(blocks, 0))


def _six_bits(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 8 scales and 8 minima of six bits, [blocks, 8, 1], from 12 bytes.

    Groups 0-3 lie whole in the low bits of bytes 0-3 (scales) and 4-7 (minima); groups 4-7 have four bits in
    bytes 8-11 (low half: scale, high half: minimum) and their top two bits above those of groups 0-3.
    """
    first, second, rest = scales[:, :4], scales[:, 4:8], scales[:, 8:]
    scale = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minimum = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scale.float()[..., None], minimum.float()[..., None]


def _q4_k(blocks: torch.Tensor) -> Parts:
    scale, minimum = _six_bits(blocks[:, 4:16])
    integers = _unpack(blocks[:, 16:], 4, 32).view(torch.int8)
    return Parts(integers.view(-1, 8, 32), _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum))


def _q5_k(blocks: torch.Tensor) -> Parts:
    scale, minimum = _six_bits(blocks[:, 4:16])
    integers = _unpack(blocks[:, 48:], 4, 32)
    integers |= _unpack(blocks[:, 16:48], 1, 32) << 4
    integers = integers.view(torch.int8)
    return Parts(integers.view(-1, 8, 32), _half(blocks, 0) * scale, -(_half(blocks, 2) * minimum))


def _q6_k(blocks: torch.Tensor) -> Parts:
    integers = _unpack(blocks[:, :128], 4, 64)
    integers |= _unpack(blocks[:, 128:192], 2, 32) << 4
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()[..., None]
    return Parts(integers.view(torch.int8).sub_(32).view(-1, 16, 16), scale)


_SPLITTERS: dict[str, Callable[[torch.Tensor], Parts]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
