# SPDX-License-Identifier: Apache-2.0
"""The 4-bit matrix multiplication of torch's core for CUDA: its layout of weights, to and fro.

Torch packs tiles of 8 rows and 32, 64 or 128 columns, in an order that is documented nowhere. The order is
found by packing numbers that tell where they come from; before it is used, packing, unpacking and a product
are checked against each other on the device. Where anything differs the reference path stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

TILE_ROWS: Final = 8

Pack = Callable[[torch.Tensor], torch.Tensor]
"""From [rows, columns] integers 0..15, uint8, to the kernel's form, any integer dtype."""


def tile_columns(columns: int) -> int | None:
    """Return the width of the tiles that a matrix is packed in, or None where none divides it.

    Args:
        columns: Of the matrix.
    """
    return next((width for width in (128, 64, 32) if columns % width == 0), None)


@dataclass(frozen=True)
class TileLayout:
    """How numbers lie in a packed tile.

    Attributes:
        columns: Of a tile.
        places: [tile] int64: where each number of a tile, row by row, lies among the tile's half bytes.
    """

    columns: int
    places: torch.Tensor

    @staticmethod
    def find(pack: Pack, columns: int, device: torch.device) -> TileLayout | None:
        """Find a layout out by packing known numbers; None where it is not one of tiles.

        Args:
            pack: The packer.
            columns: Of a tile.
            device: Where to pack.
        """
        count = TILE_ROWS * columns
        index = torch.arange(count, device=device)
        found = torch.zeros(count, dtype=torch.int64, device=device)
        for shift in (0, 4, 8):
            digits = ((index >> shift) & 15).to(torch.uint8).view(TILE_ROWS, columns)
            packed = pack(digits).contiguous().view(torch.uint8).reshape(-1)
            if packed.numel() != count // 2:
                return None
            found += _half_bytes(packed).to(torch.int64) << shift
        places = torch.argsort(found)
        if not torch.equal(found[places], index):
            return None
        layout = TileLayout(columns, places)
        generator = torch.Generator().manual_seed(0)
        shape = (3 * TILE_ROWS, 2 * columns)
        numbers = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8).to(device)
        packed = pack(numbers).contiguous().view(torch.uint8).view(shape[0], -1)
        return layout if torch.equal(layout.unpack(packed).to(torch.uint8), numbers) else None

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the integers 0..15, int8 [rows, columns].

        Args:
            packed: uint8 [rows, columns / 2], whole tiles, as the packer orders them.
        """
        rows, columns = packed.shape[0], 2 * packed.shape[1]
        tiles = _half_bytes(packed.reshape(-1)).view(rows // TILE_ROWS, columns // self.columns, -1)
        numbers = tiles[..., self.places].view(*tiles.shape[:2], TILE_ROWS, self.columns)
        return numbers.transpose(1, 2).reshape(rows, columns)


def _half_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return the low and the high half of each byte, side by side, int8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(-1).to(torch.int8)


# -- the kernel ----------------------------------------------------------------------------------


def can_multiply(rows: int, columns: int, device: torch.device) -> bool:
    """Tell whether a device has the kernel for a shape.

    Args:
        rows: Of the weight.
        columns: Of the weight.
        device: Where it is.
    """
    width = tile_columns(columns)
    return device.type == "cuda" and rows % TILE_ROWS == 0 and width is not None and _layout(device, width)[1]


def pack(stored: torch.Tensor) -> torch.Tensor:
    """Return a weight in the kernel's layout, as many bytes in the same shape.

    Args:
        stored: uint8 [out, in / 2], the even column low.
    """
    columns = 2 * stored.shape[1]
    # Torch's packer wants the even column high.
    swapped = (stored >> 4) | (stored << 4)
    tiles = (tile_columns(columns) or 0) // 16
    return torch._convert_weight_to_int4pack(swapped.contiguous(), tiles).view(torch.uint8).view_as(stored)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: the integers 0..15, int8 [out, in].

    Args:
        packed: What `pack` returned, or whole tiles of its rows.
    """
    width = tile_columns(2 * packed.shape[1])
    assert width is not None
    layout = _layout(packed.device, width)[0]
    assert layout is not None
    return layout.unpack(packed)


def multiply(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """Return ``x @ weight.T``.

    Args:
        x: bfloat16 [rows, in].
        packed: What `pack` returned.
        group: Columns that share a scale.
        scales: bfloat16 [groups, out, 2]: scale, and the offset of the number that 8 stands for.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    width = tile_columns(columns) or 0
    tiles = packed.view(torch.int32).view(rows // TILE_ROWS, columns // width, 32, width // 32)
    return torch._weight_int4pack_mm(x.contiguous(), tiles, group, scales)


@cache
def _layout(device: torch.device, width: int) -> tuple[TileLayout | None, bool]:
    """Return the layout on a device, and whether its kernel gives right products."""

    def packer(numbers: torch.Tensor) -> torch.Tensor:
        return pack(numbers[:, ::2] | (numbers[:, 1::2] << 4))

    try:
        layout = TileLayout.find(packer, width, device)
        return layout, layout is not None and _is_right(device, width)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None, False


def _is_right(device: torch.device, width: int) -> bool:
    generator = torch.Generator().manual_seed(1)
    rows, columns, group = 16, 2 * width, 32
    numbers = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(columns // group, rows, 2, generator=generator).to(torch.bfloat16)
    x = torch.randn(3, columns, generator=generator).to(torch.bfloat16)
    grouped = numbers.float().sub_(8).view(rows, -1, group)
    scale, offset = scales.float().permute(2, 1, 0)[..., None]
    expected = x.float() @ (grouped * scale + offset).view(rows, columns).t()
    stored = (numbers[:, ::2] | (numbers[:, 1::2] << 4)).to(device)
    found = multiply(x.to(device), pack(stored), group, scales.to(device)).float().cpu()
    return bool((found - expected).norm() < 0.02 * expected.norm())
