# SPDX-License-Identifier: Apache-2.0
"""Layers on GGML's blocks, of random numbers."""

import torch

from pretrained.core.ggml import BLOCK_TYPES
from pretrained.torch.quantized_blocks import GgufLinear

# First bytes of the float16 numbers of a block.
HALVES = {"q4_0": [0], "q5_0": [0], "q4_1": [0, 2], "q4_k": [0, 2], "q8_0": [0]}


def packed_rows(name, rows, columns, seed=0):
    """Random blocks with scales of a weight's usual size."""
    kind = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(
        0, 256, (rows, columns // kind.elements * kind.nbytes), dtype=torch.uint8, generator=generator
    )
    cut = found.view(-1, kind.nbytes)
    for place in HALVES.get(name, []):
        scales = torch.randn(len(cut), 1, generator=generator).mul_(0.01).half()
        cut[:, place : place + 2] = scales.view(torch.uint8)
    return found


def leaf_of(name, rows=80, columns=512, dtype=torch.bfloat16, order=None):
    leaf = GgufLinear(columns, rows, name, bias=False, dtype=dtype)
    leaf.weight.data = packed_rows(name, rows, columns)
    if order is not None:
        leaf.lies_in_order(order)
    return leaf
