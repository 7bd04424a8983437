# SPDX-License-Identifier: Apache-2.0
"""The leaves against their formulas in float64 and against transformers."""

import math
import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.pytorch_utils import Conv1D as TheirConv1D

from pretrained.arch.llama import LlamaConfig
from pretrained.errors import ConfigError
from pretrained.testing.battery import Case
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.nn import ACTIVATIONS, Conv1D, RMSNorm, RotaryEmbedding, activation, rotate
from support.cases import LLAMA3, LONGROPE, TINY_LLAMA, YARN

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Half a unit in the last place of float32, relative.
HALF_ULP = 2.0**-24


# -- RMSNorm -------------------------------------------------------------------------------------


def norm_and_input(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(16, generator=generator) + 0.5)
    # Squares of these leave float16's range.
    return norm.to(dtype), (torch.randn(3, 5, 16, generator=generator) * 300).to(dtype)


@DTYPES
def test_rms_norm_is_its_formula(dtype):
    norm, x = norm_and_input(dtype)
    true = x.double()
    expected = norm.weight.double() * true / (true.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = norm(x)
    assert found.dtype == dtype
    # Two roundings to the dtype: of the normalised input and of the product.
    relative = 2 * torch.finfo(dtype).eps
    assert ((found.double() - expected).abs() <= relative * expected.abs()).all()


@DTYPES
def test_rms_norm_equals_transformers_bit_for_bit(dtype):
    norm, x = norm_and_input(dtype)
    theirs = LlamaRMSNorm(16, 1e-5).to(dtype)
    theirs.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), theirs(x))


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(4)(torch.zeros(2, 4)), torch.zeros(2, 4))
    assert repr(RMSNorm(4, 1e-3)) == "RMSNorm((4,), eps=0.001)"


# -- rotary positions ----------------------------------------------------------------------------

SCALINGS = {
    "default": {},
    "theta": {"rope_theta": 1e6},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "longrope": {"rope_scaling": LONGROPE},
}


def rope_config(name, length=4096):
    values = {**TINY_LLAMA, "max_position_embeddings": length, **SCALINGS[name]}
    return LlamaConfig(**values)


def true_frequencies(name, config, length):
    """The frequencies in float64, as plain as the papers write them."""
    size, scaling = config.head_dim, config.rope_scaling or {}
    base, factor = config.rope_theta, scaling.get("factor")
    plain = [base ** (-2 * i / size) for i in range(size // 2)]
    if name == "linear":
        return [f / factor for f in plain], 1.0
    if name == "dynamic" and length > config.max_position_embeddings:
        longer = factor * length / config.max_position_embeddings - (factor - 1)
        base = base * longer ** (size / (size - 2))
        return [base ** (-2 * i / size) for i in range(size // 2)], 1.0
    if name == "longrope":
        original = scaling["original_max_position_embeddings"]
        divisors = scaling["long_factor" if length > original else "short_factor"]
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return [f / d for f, d in zip(plain, divisors, strict=True)], attention
    if name == "llama3":
        original, out = scaling["original_max_position_embeddings"], []
        for f in plain:
            wavelength = 2 * math.pi / f
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if wavelength < original / high:
                out.append(f)
            elif wavelength > original / low:
                out.append(f / factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                out.append((1 - smooth) * f / factor + smooth * f)
        return out, 1.0
    if name == "yarn":
        original, out = scaling["original_max_position_embeddings"], []
        fast, slow = (size * math.log(original / (turns * 2 * math.pi), base) / 2 for turns in (32, 1))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), size - 1)
        for i, f in enumerate(plain):
            ramp = min(max((i - low) / (high - low), 0), 1)
            out.append(f / factor * ramp + f * (1 - ramp))
        return out, 0.1 * math.log(factor) + 1
    return plain, 1.0


@pytest.mark.parametrize("length", [1, 32, 33, 4096, 5000])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_right_up_to_the_last_position(name, length):
    config = rope_config(name)
    rotary = RotaryEmbedding(config.rope_table())
    positions = torch.arange(length)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    assert cos.shape == sin.shape == (1, 1, length, config.head_dim)
    frequencies, scale = true_frequencies(name, config, length)
    angles = np.arange(length)[:, None] * np.array(frequencies * 2)
    # The frequency and its product with the position are rounded; dynamic NTK takes a float32 power.
    roundings = 16 if name == "dynamic" and length > config.max_position_embeddings else 2
    allowed = torch.from_numpy(scale * (roundings * HALF_ULP * angles + 4 * HALF_ULP))
    for found, true in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        assert ((found[0, 0].double() - torch.from_numpy(scale * true)).abs() <= allowed).all()


def their_rotary(config):
    return LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize("positions", [[0, 1, 2], [31], [32], [4095, 4096], [6000], [5000], [3]])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers(name, positions):
    config = rope_config(name)
    ours, theirs = RotaryEmbedding(config.rope_table()), their_rotary(config)
    x, ids = torch.zeros(1), torch.tensor([positions])
    # Theirs computes frequencies in float32, which may be off by some units in the last place.
    tolerance = 2e-6 + 32 * HALF_ULP * max(positions)
    for one, other in zip(ours(x, ids), theirs(x, ids), strict=True):
        torch.testing.assert_close(one[:, 0], other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_long_call_leaves_no_trace(name):
    rotary = RotaryEmbedding(rope_config(name).rope_table())
    short, long = torch.tensor([[0, 1, 20]]), torch.tensor([[0, 1, 9000]])
    before = rotary(torch.zeros(1), short)
    assert not torch.equal(rotary(torch.zeros(1), long)[0][:, :, 1], before[0][:, :, 1])
    assert torch.equal(rotary(torch.zeros(1), short)[0], before[0])


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
    ids=["bf16", "half", "double", "back", "to_empty"],
)
def test_frequencies_survive_casts(name, cast):
    table = rope_config(name).rope_table()
    parent = nn.ModuleDict({"rotary": RotaryEmbedding(table), "layer": nn.Linear(2, 2)})
    rotary = cast(parent)["rotary"]
    assert rotary.inv_freq.dtype == torch.float32
    assert np.array_equal(rotary.inv_freq.numpy(), table.inv_freq)
    if table.long_inv_freq is not None:
        assert np.array_equal(rotary.long_inv_freq.numpy(), table.long_inv_freq)
    assert not parent.state_dict().keys() & {"rotary.inv_freq", "rotary.long_inv_freq"}


def test_rotary_dtype_follows_the_states_and_not_the_positions():
    rotary = RotaryEmbedding(rope_config("default").rope_table())
    cos, sin = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.arange(5, dtype=torch.int32)[None])
    assert cos.dtype == sin.dtype == torch.bfloat16


def test_rotate_is_a_complex_product():
    rotary = RotaryEmbedding(rope_config("default").rope_table())
    positions = torch.tensor([[0, 1, 7], [3, 4, 5]])
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    found = rotate(x, *rotary(x, positions))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    turned = pairs * torch.exp(1j * positions[:, None, :, None] * rotary.inv_freq)
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), -1))
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("name", ["default", "llama3", "longrope"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loading_narrow_is_loading_wide_and_casting(tmp_path, name, dtype):
    Case(LlamaForCausalLM, {**TINY_LLAMA, **SCALINGS[name]}).build().save_pretrained(tmp_path)
    narrow = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    cast = LlamaForCausalLM.from_pretrained(tmp_path).to(dtype)
    tensors = [dict([*model.named_parameters(), *model.named_buffers()]) for model in (narrow, cast)]
    assert tensors[0].keys() == tensors[1].keys() and "model.rotary_emb.inv_freq" in tensors[0]
    for key, tensor in tensors[0].items():
        assert tensor.dtype == tensors[1][key].dtype and torch.equal(tensor, tensors[1][key]), key
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(narrow(ids).logits, cast(ids).logits)


# -- Conv1D and activations ----------------------------------------------------------------------


def test_conv1d_is_transformers():
    ours, theirs = Conv1D(6, 4), TheirConv1D(6, 4)
    with torch.no_grad():
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), x @ ours.weight + ours.bias)
    assert ours.weight.shape == (4, 6) and repr(ours) == "Conv1D(nf=6, nx=4)"


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() & ACT2FN.keys()))
def test_activations_equal_transformers(name):
    x = torch.linspace(-15, 15, 3001)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), atol=2e-6, rtol=1e-6)


def test_activations_are_those_of_transformers():
    # Those two have weights of their own, which no model of these families holds.
    assert ACT2FN.keys() - ACTIVATIONS.keys() == {"prelu", "xielu"}
    assert ACTIVATIONS.keys() - ACT2FN.keys() == {"selu"}
    x = torch.tensor([-1.0, 0.0, 2.0])
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    expected = [scale * alpha * (math.exp(-1.0) - 1), 0.0, scale * 2.0]
    torch.testing.assert_close(activation("selu")(x), torch.tensor(expected))


@pytest.mark.parametrize(
    ("name", "mend"), [("silo", r"Did you mean 'silu'\?"), ("zzz", "expected gelu"), (None, "expected gelu")]
)
def test_an_unknown_activation_is_refused(name, mend):
    with pytest.raises(ConfigError, match=f"Unknown activation {re.escape(repr(name))}.*{mend}"):
        activation(name)
