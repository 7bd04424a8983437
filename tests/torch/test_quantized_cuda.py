# SPDX-License-Identifier: Apache-2.0
"""The layout of the 4-bit CUDA kernel, found out from any packer; what the kernel computes is in test_gpu."""

import pytest
import torch

from pretrained.torch.quantized_cuda import TileLayout, can_multiply, tile_columns

CPU = torch.device("cpu")


def shuffled(columns, *, swap_tiles=False):
    """A packer of tiles with an order of its own."""
    order = torch.randperm(8 * columns, generator=torch.Generator().manual_seed(columns))

    def pack(numbers):
        rows = len(numbers)
        tiles = numbers.view(rows // 8, 8, -1, columns).transpose(1, 2).reshape(rows // 8, -1, 8 * columns)
        if swap_tiles:
            tiles = tiles.flip(1)
        pairs = tiles[..., order].view(*tiles.shape[:2], -1, 2)
        return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous().view(torch.int32)

    return pack


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_a_layout_of_tiles_is_found_and_undone(columns):
    pack = shuffled(columns)
    layout = TileLayout.find(pack, columns, CPU)
    numbers = torch.randint(0, 16, (40, 3 * columns), dtype=torch.uint8)
    packed = pack(numbers).view(torch.uint8).view(40, -1)
    assert torch.equal(layout.unpack(packed).to(torch.uint8), numbers)
    assert torch.equal(layout.unpack(packed[8:24]).to(torch.uint8), numbers[8:24])


def test_a_layout_that_is_not_understood_is_not_used():
    assert TileLayout.find(shuffled(32, swap_tiles=True), 32, CPU) is None
    assert TileLayout.find(lambda numbers: numbers, 32, CPU) is None
    assert TileLayout.find(lambda numbers: numbers[:, ::2] * 0, 32, CPU) is None


def test_shapes_without_the_kernel():
    assert [tile_columns(n) for n in (256, 192, 96, 48)] == [128, 64, 32, None]
    assert not can_multiply(64, 64, CPU)
