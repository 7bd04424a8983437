# SPDX-License-Identifier: Apache-2.0
"""GGML's blocks: decoded by torch, repacked for the 4-bit kernel, and as layers."""

import copy

import numpy as np
import pytest
import torch

from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE, dequantize
from pretrained.torch import blocks
from pretrained.torch.blocks import decode, kernel_form, kernel_packs, repack
from pretrained.torch.offload import release_clean
from pretrained.torch.quantized import QuantizedLinear
from pretrained.torch.quantized_ops import kernel_block
from support.packed import leaf_of, packed_rows

TYPES = [name for name in DEQUANTIZABLE if BLOCK_TYPES[name].elements > 1]
REPACKED = ["q4_0", "q4_1", "q4_k", "q8_0"]
needs_kernel = pytest.mark.skipif(kernel_block() is None, reason="this CPU's int4pack layout is not known")


def distance(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("tile", [512, 1 << 18])
def test_every_type_is_decoded_bit_for_bit(name, tile, monkeypatch):
    monkeypatch.setattr(blocks, "TILE", tile)
    raw = packed_rows(name, 12, 512)
    want = dequantize(raw.numpy().reshape(-1).data, name, (12, 512))
    got = decode(raw, name, 512).numpy()
    # The bits of NaN, from scales that are none, are nobody's promise.
    same = (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want))
    assert same.all()


@needs_kernel
@pytest.mark.parametrize("name", REPACKED)
@pytest.mark.parametrize("rows", [16, 80, 192])
def test_repacked_weights_are_within_the_bound(name, rows):
    raw, order = packed_rows(name, rows, 512), torch.randperm(rows)
    exact = decode(raw, name, 512)[order]
    found = torch.zeros(rows, 512, dtype=torch.float64)
    for packed in repack(raw, name, 512, order):
        part = QuantizedLinear(512, rows, kernel_form(), bias=False)
        part.fill(packed)
        scale, zero = packed.scale.double(), packed.zero.double()
        integers = part._integers(slice(None)).double().view(rows, -1, 32)
        found += (integers * scale[..., None] + zero[..., None]).view(rows, 512)
    assert kernel_packs(name) == len(repack(raw, name, 512, None))
    parts = blocks._SPLITTERS[name](blocks._blocks(raw[order], name))
    if name == "q8_0":
        bound = exact.abs().double() * 2**-8
    else:
        scale = parts.scale.double().abs()
        middle = 0 if parts.offset is None else (parts.offset + 8 * parts.scale).double().abs()
        bound = (2**-8 * (8 * scale + middle)).expand(parts.integers.shape).reshape(rows, 512)
    # float32 holds the reference itself to 24 bits.
    assert ((found - exact.double()).abs() <= bound * (1 + 1e-6) + 1e-9).all()
    assert distance(found, exact) < 0.003


@needs_kernel
@pytest.mark.parametrize("name", REPACKED)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_a_bfloat16_layer_uses_the_kernel(name, rows, is_ordered):
    order = torch.randperm(80) if is_ordered else None
    leaf = leaf_of(name, order=order)
    x = torch.randn(2, rows, 512).bfloat16()
    want = x.float() @ leaf.dequantized(torch.float32).t()
    state, dense = copy.deepcopy(leaf.state_dict()), leaf.dequantized()
    assert distance(leaf(x), want) < 0.006
    assert leaf.use_kernel_layout() and leaf.hidden_nbytes > 0
    out = leaf(x)
    assert out.dtype == torch.bfloat16 and distance(out, want) < 0.008
    # What is saved and dequantized stays the file's, bit for bit.
    assert torch.equal(leaf.state_dict()["weight"], state["weight"])
    assert torch.equal(leaf.dequantized(), dense)
    away = leaf_of(name, order=order)
    away.lay_out_at_call()
    assert torch.equal(away(x), out) and away.hidden_nbytes == 0
    leaf.load_state_dict(state)
    assert leaf.hidden_nbytes > 0 and torch.equal(leaf(x), out)


@needs_kernel
def test_who_decides_about_the_kernel():
    assert not leaf_of("q4_1", dtype=torch.float32).use_kernel_layout()
    leaf = leaf_of("q4_1", dtype=torch.float32)
    leaf.computes_in = torch.bfloat16
    assert leaf.use_kernel_layout()
    x = torch.randn(3, 512)
    assert leaf(x).dtype == torch.float32
    exact = leaf_of("q4_1", dtype=torch.bfloat16)
    exact.computes_in = torch.float32
    assert not exact.use_kernel_layout()
    want = x.bfloat16().float() @ exact.dequantized(torch.float32).t()
    assert torch.equal(exact(x.bfloat16()), want.bfloat16())
    assert not leaf_of("q6_k").use_kernel_layout()
    assert not leaf_of("q4_0", rows=24).use_kernel_layout()


@pytest.mark.parametrize("name", ["q4_0", "q5_0"])
def test_float32_layers_multiply_with_the_files_values(name):
    leaf = leaf_of(name, dtype=torch.float32)
    assert not leaf.use_kernel_layout()
    for rows in (1, 40):
        x = torch.randn(rows, 512)
        assert distance(leaf(x), x.double() @ leaf.dequantized().double().t()) < 1e-6


@needs_kernel
def test_gradients_flow_through_a_repacked_layer():
    leaf = leaf_of("q4_1")
    leaf.use_kernel_layout()
    x = torch.randn(3, 512, dtype=torch.bfloat16, requires_grad=True)
    leaf(x).sum().backward()
    assert distance(x.grad, leaf.dequantized(torch.float32).sum(0).expand(3, -1)) < 0.02


def test_pages_of_a_file_are_given_back_and_other_memory_is_not(tmp_path):
    values = torch.arange(1 << 14, dtype=torch.int32)
    file = tmp_path / "numbers"
    file.write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=len(values), dtype=torch.int32)
    own = values.clone()
    for tensor in (mapped, own):
        release_clean(tensor)
        assert torch.equal(tensor, values)
    mapped[5] = -1
    release_clean(mapped)
    assert mapped[5] == -1
