# SPDX-License-Identifier: Apache-2.0
"""Packed weights of several layers, multiplied as one."""

import copy
import io

import pytest
import torch
from torch import nn

from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.packed_products import Joined, packed_product
from pretrained.torch.quantize_model import quantize_model
from pretrained.torch.quantized_ops import kernel_block
from support.packed import leaf_of

pytestmark = pytest.mark.skipif(kernel_block() is None, reason="this CPU's int4pack layout is not known")


def int4_layers(outs=(128, 64, 64), columns=64, bias=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(columns, out, bias=bias, dtype=dtype) for out in outs)
    quantize_model(model, QuantizationConfig(quant_method="int4", group_size=32))
    return model


def separately(layers, x):
    return torch.cat([layer(x) for layer in layers], dim=-1)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_one_product_gives_the_bits_of_several(rows, dtype, bias):
    layers = int4_layers(bias=bias, dtype=dtype)
    x = torch.randn(rows, 64).to(dtype)
    want = separately(layers, x)
    product = packed_product(layers, rows)
    assert torch.equal(product(x), want)
    # The layers themselves go on from where their weights lie now.
    assert torch.equal(separately(layers, x), want)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q4_k", "q8_0"])
def test_blocks_of_a_gguf_file_are_joined_too(kind):
    layers = [leaf_of(kind, rows=rows, columns=256) for rows in (64, 128)]
    for layer in layers:
        assert layer.use_kernel_layout()
    x = torch.randn(1, 256).bfloat16()
    want = separately(layers, x)
    assert torch.equal(packed_product(layers, 1)(x), want)
    assert all(isinstance(part.joined, Joined) for layer in layers for part in layer.repacked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_integers_of_8_bits_are_multiplied_one_by_one(dtype, bias):
    layers = nn.ModuleList([nn.Linear(64, 48, bias=bias, dtype=dtype)])
    quantize_model(layers, QuantizationConfig(quant_method="int8"))
    x = torch.randn(1, 64).to(dtype)
    assert torch.equal(packed_product(layers, 1)(x), layers[0](x))
    layers[0].lay_out_at_call()
    assert packed_product(layers, 1) is None


def test_weights_move_once_and_are_not_held_twice():
    layers = int4_layers()
    packed_product(layers, 1)
    storage = layers[0].weight.untyped_storage()
    assert all(layer.weight.untyped_storage().data_ptr() == storage.data_ptr() for layer in layers)
    assert storage.nbytes() == sum(layer.weight.nbytes for layer in layers)
    scales = layers[0].kernel_scales.untyped_storage()
    assert all(layer.kernel_scales.untyped_storage().data_ptr() == scales.data_ptr() for layer in layers)
    before = layers[0].weight.data_ptr()
    packed_product(layers, 1)
    assert layers[0].weight.data_ptr() == before


def test_layers_that_change_are_joined_anew():
    layers, x = int4_layers(), torch.randn(1, 64).bfloat16()
    packed_product(layers, 1)
    other = int4_layers()
    with torch.no_grad():
        state = {
            f"{i}.{name}": value for i, layer in enumerate(other) for name, value in layer.stored().items()
        }
        state["1.weight"] = state["1.weight"].flip(0)
    layers.load_state_dict(state)
    assert layers[1].joined is None
    want = separately(layers, x)
    assert torch.equal(packed_product(layers, 1)(x), want)
    assert not torch.equal(want, separately(other, x))


def test_copies_and_pickles_have_memory_of_their_own():
    layers, x = int4_layers(), torch.randn(1, 64).bfloat16()
    product = packed_product(layers, 1)
    want = product(x)
    twin = copy.deepcopy(layers)
    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert other[0].joined is None
        other[0].weight.data.zero_()
        assert torch.equal(product(x), want)
        assert torch.equal(packed_product(other, 1)(x), separately(other, x))


def test_state_dicts_are_those_of_layers_that_were_never_joined():
    layers, alone = int4_layers(), int4_layers()
    packed_product(layers, 1)
    joined, want = layers.state_dict(), alone.state_dict()
    assert joined.keys() == want.keys()
    assert all(torch.equal(joined[key], want[key]) for key in want)


def test_what_cannot_be_joined_is_refused():
    plain = nn.Linear(64, 64, dtype=torch.bfloat16)
    layers = int4_layers()
    assert packed_product([plain], 1) is None
    assert packed_product([layers[0], plain], 1) is None
    # More rows than the kernel is used for.
    assert packed_product(layers, 200) is None
    # Rows that do not fill the kernel's blocks can only come last.
    narrow = int4_layers((16, 64))
    assert packed_product(list(narrow), 1) is None
    assert packed_product(list(narrow)[::-1], 1) is not None
    # Other groups.
    wide = int4_layers((64,))
    quantized = nn.ModuleList([nn.Linear(64, 64, dtype=torch.bfloat16)])
    quantize_model(quantized, QuantizationConfig(quant_method="int4", group_size=64))
    assert packed_product([wide[0], quantized[0]], 1) is None


def test_results_of_inference_mode_are_not_kept_in_weights():
    layers, x = int4_layers(), torch.randn(1, 64).bfloat16()
    with torch.inference_mode():
        packed_product(layers, 1)(x)
    assert not layers[0].weight.is_inference()
    assert not layers[0].kernel_scales.is_inference()
