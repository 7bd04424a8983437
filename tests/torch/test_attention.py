# SPDX-License-Identifier: Apache-2.0
"""Every attention implementation against a slow softmax, and how one is chosen."""

import importlib.machinery
import json
import math
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch.llama import LlamaConfig
from pretrained.errors import ArgumentError, MissingDependencyError
from pretrained.testing.battery import Case, assert_close
from pretrained.torch.attention import (
    ALL_ATTENTION_FUNCTIONS,
    AttentionInterface,
    attend,
    check_attn_implementation,
    eager_attention,
    flash_attention_2,
    sdpa_attention,
)
from pretrained.torch.models.bert import BertModel
from pretrained.torch.models.gpt2 import GPT2Model
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.t5 import T5Model
from support.cases import CASES, TINY_LLAMA

BATCH, HEADS, QUERIES, WIDTH = 2, 4, 5, 8
FUNCTIONS = {"eager": eager_attention, "sdpa": sdpa_attention}


def states(kv_heads=HEADS, queries=QUERIES, keys=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((HEADS, queries), (kv_heads, keys or queries), (kv_heads, keys or queries))
    return [torch.randn(BATCH, *shape, WIDTH, generator=generator).to(dtype) for shape in shapes]


def slow_attention(query, key, value, allowed, bias=None, *, scaling):
    """One row, head and query at a time, in float64; a query that may look nowhere gives zeros."""
    query, key, value = (x.double().numpy() for x in (query, key, value))
    out = np.zeros((BATCH, query.shape[2], HEADS, WIDTH))
    for row, head, q in np.ndindex(BATCH, HEADS, query.shape[2]):
        shared = head * key.shape[1] // HEADS
        seen = [k for k in range(key.shape[2]) if allowed(row, q, k)]
        scores = [scaling * float(query[row, head, q] @ key[row, shared, k]) for k in seen]
        added = [0.0 if bias is None else float(bias[row, head, q, k]) for k in seen]
        powers = [math.exp(score + more) for score, more in zip(scores, added, strict=True)]
        for power, k in zip(powers, seen, strict=True):
            out[row, q, head] += power / sum(powers) * value[row, shared, k]
    return torch.from_numpy(out)


def everything(row, query, key):
    return True


def boolean_mask():
    mask = torch.rand(BATCH, 1, QUERIES, QUERIES, generator=torch.Generator().manual_seed(4)) > 0.4
    return mask | torch.eye(QUERIES, dtype=torch.bool)


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_output_is_a_slow_softmax(name, kind, kv_heads):
    q, k, v = states(kv_heads)
    mask, bias, allowed = None, None, everything
    if kind == "causal":
        allowed = lambda row, query, key: key <= query  # noqa: E731
    if kind == "boolean":
        mask = boolean_mask()
        allowed = lambda row, query, key: bool(mask[row, 0, query, key])  # noqa: E731
    if kind == "additive":
        mask = bias = torch.randn(BATCH, HEADS, QUERIES, QUERIES, generator=torch.Generator().manual_seed(5))
    out, _ = FUNCTIONS[name](nn.Module(), q, k, v, mask, scaling=0.3, is_causal=kind == "causal")
    assert out.shape == (BATCH, QUERIES, HEADS, WIDTH)
    assert_close(out, slow_attention(q, k, v, allowed, bias, scaling=0.3), name)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("queries", [1, 3])
def test_causal_without_a_mask_ends_where_the_cached_keys_end(name, queries):
    q, k, v = states(2, queries, keys=7)
    out, _ = FUNCTIONS[name](nn.Module(), q, k, v, None, scaling=0.3, is_causal=True)
    expected = slow_attention(q, k, v, lambda row, q, k: k <= q + 7 - queries, scaling=0.3)
    assert_close(out, expected, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_same_everywhere(name):
    q, k, v = (x.requires_grad_() for x in states(2))
    mask = boolean_mask()
    out, _ = FUNCTIONS[name](nn.Module(), q, k, v, mask, scaling=0.3)
    slow_k, slow_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ slow_k.mT * 0.3).masked_fill(~mask, -math.inf)
    expected = (scores.softmax(-1) @ slow_v).transpose(1, 2)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_that_sees_nothing_stays_finite(name, additive, dtype):
    # Scores far below zero: with float16's most negative number they would add up to -inf.
    q, k, v = ((x * 9).requires_grad_() for x in states(2, dtype=dtype))
    mask = torch.ones(BATCH, 1, 1, QUERIES, dtype=torch.bool)
    mask[0] = False
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    out, _ = FUNCTIONS[name](nn.Module(), q, k, v, mask, scaling=1.0)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("cls", [LlamaModel, GPT2Model, BertModel, T5Model], ids=lambda cls: cls.__name__)
def test_a_model_survives_a_row_of_padding(cls, name, dtype):
    case = next(case for case in CASES if case.model_class is cls)
    model = case.build(dtype)
    model.set_attn_implementation(name)
    inputs = case.inputs(model.config, "left")
    # With gradients, as below: without them torch may pick a kernel that rounds in another way.
    expected = model(**inputs)[0]
    inputs["attention_mask"][0] = 0
    out = model(**inputs)[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out[1:], expected[1:])
    out.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_weights_sum_to_one_and_only_eager_has_them():
    q, k, v = states(2)
    _, weights = eager_attention(nn.Module(), q, k, v, None, scaling=0.3, is_causal=True)
    assert weights.shape == (BATCH, HEADS, QUERIES, QUERIES)
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, QUERIES))
    assert torch.equal(weights, weights.tril())
    assert sdpa_attention(nn.Module(), q, k, v, None, scaling=0.3)[1] is None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dropout_acts_in_training_alone(name):
    q, k, v = states()
    plain = FUNCTIONS[name](nn.Module().eval(), q, k, v, None, scaling=0.3)[0]
    assert torch.equal(FUNCTIONS[name](nn.Module().eval(), q, k, v, None, scaling=0.3, dropout=0.5)[0], plain)
    torch.manual_seed(0)
    dropped = FUNCTIONS[name](nn.Module().train(), q, k, v, None, scaling=0.3, dropout=0.5)[0]
    assert not torch.allclose(dropped, plain)


# -- choosing ------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    """Registers functions for one test."""
    before = dict(AttentionInterface._registered)
    yield AttentionInterface.register
    AttentionInterface._registered.clear()
    AttentionInterface._registered.update(before)


class Recorder:
    """A function with the ecosystem's calling convention that writes down its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        self.calls.append({"module": module, "dropout": dropout, "scaling": scaling, **kwargs})
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        causal = attention_mask is None and kwargs["is_causal"] and query.shape[2] > 1
        out = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), torch.zeros(1)


# How many attentions each forward runs: T5 has one for each layer of the encoder and two in the decoder.
ATTENTIONS = {
    LlamaModel: lambda config: config.num_hidden_layers,
    GPT2Model: lambda config: config.num_hidden_layers,
    BertModel: lambda config: config.num_hidden_layers,
    T5Model: lambda config: config.num_layers + 2 * config.num_decoder_layers,
}


@pytest.mark.parametrize("cls", ATTENTIONS, ids=lambda cls: cls.__name__)
def test_a_registered_function_serves_every_layer(cls, registered):
    case = next(case for case in CASES if case.model_class is cls)
    recorder = Recorder()
    registered("recorder", recorder)
    model = case.build()
    inputs = case.inputs(model.config, "left")
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.set_attn_implementation("recorder")
        found = model(**inputs)[0]
    assert len({id(call["module"]) for call in recorder.calls}) == len(recorder.calls)
    assert len(recorder.calls) == ATTENTIONS[cls](model.config)
    assert_close(found, expected, str(case))


def test_a_registered_function_drops_nothing_outside_training(registered):
    recorder = Recorder()
    registered("recorder", recorder)
    config = {**TINY_LLAMA, "attention_dropout": 0.25, "attn_implementation": "recorder"}
    model = Case(LlamaModel, config).build()
    ids = torch.tensor([[5, 6, 7]])
    model(ids)
    model.train()(ids)
    assert [call["dropout"] for call in recorder.calls] == [0.0, 0.0, 0.25, 0.25]
    assert [call["scaling"] for call in recorder.calls] == [8**-0.5] * 4
    assert all(call["is_causal"] is True and call["sliding_window"] is None for call in recorder.calls)


def test_a_registered_function_is_asked_for_its_own_weights(registered):
    registered("recorder", Recorder())
    model = Case(LlamaModel, {**TINY_LLAMA, "attn_implementation": "recorder"}).build()
    out = model(torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert [tuple(weights.shape) for weights in out.attentions] == [(1,), (1,)]
    assert model(torch.tensor([[5, 6, 7]])).attentions is None


def test_the_registry_reads_like_a_mapping(registered):
    assert list(ALL_ATTENTION_FUNCTIONS)[:3] == ["eager", "sdpa", "flash_attention_2"]
    size = len(ALL_ATTENTION_FUNCTIONS)
    registered("mine", eager_attention)
    assert "mine" in ALL_ATTENTION_FUNCTIONS and len(ALL_ATTENTION_FUNCTIONS) == size + 1
    assert ALL_ATTENTION_FUNCTIONS["mine"] is eager_attention


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("spda", r"Did you mean 'sdpa'\?"),
        ("qqq", r"Register your own with AttentionInterface\.register\(name, function\)"),
        ({"": "sdpa"}, "Register your own"),
    ],
)
def test_an_unknown_name_is_refused(name, mend):
    text = r"Unknown attention implementation .* \(attn_implementation\): expected eager, sdpa, .*" + mend
    with pytest.raises(ArgumentError, match=text):
        check_attn_implementation(name)
    with pytest.raises(ArgumentError, match=text):
        LlamaModel(LlamaConfig(**TINY_LLAMA, attn_implementation=name))
    with pytest.raises(ValueError, match=text):
        Case(LlamaModel, TINY_LLAMA).build().set_attn_implementation(name)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_attention_needs_its_package():
    text = r"flash_attention_2 needs the package flash_attn .*Install flash-attn, or use .*'sdpa'"
    with pytest.raises(MissingDependencyError, match=text):
        LlamaModel.from_config(LlamaConfig(**TINY_LLAMA), attn_implementation="flash_attention_2")


def test_attention_weights_do_not_depend_on_the_implementation():
    case = Case(LlamaModel, TINY_LLAMA)
    model = case.build()
    inputs = case.inputs(model.config, "left")
    with torch.no_grad():
        fused = model(**inputs, output_attentions=True)
        model.set_attn_implementation("eager")
        eager = model(**inputs, output_attentions=True)
    assert len(fused.attentions) == 2
    for one, other in zip(fused.attentions, eager.attentions, strict=True):
        assert torch.equal(one, other)


def test_switching_a_live_model():
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), mock.patch.dict(AttentionInterface._registered, eager=Recorder(), sdpa=Recorder()):
        for name in ("sdpa", "eager", "sdpa"):
            model.set_attn_implementation(name)
            assert model.config.attn_implementation == name
            model(ids)
        eager, sdpa = (AttentionInterface._registered[name] for name in ("eager", "sdpa"))
        assert len(eager.calls) == 2 and len(sdpa.calls) == 4


def test_the_choice_is_never_saved(tmp_path):
    model = Case(LlamaForCausalLM, {**TINY_LLAMA, "attn_implementation": "eager"}).build()
    model.save_pretrained(tmp_path / "a")
    assert "attn" not in " ".join(json.loads((tmp_path / "a" / "config.json").read_text()))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert again.config.attn_implementation is None
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager")
    assert again.config.attn_implementation == again.model.config.attn_implementation == "eager"
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


# -- flash_attn, as its documentation describes it -----------------------------------------------


class FlashStandIn:
    """`flash_attn.flash_attn_func` by its documented semantics, on torch's kernels.

    Tensors are [batch, length, heads, width]; heads are shared where keys have fewer; `causal` and
    `window_size` (keys to the left and right, -1 for all) are aligned to the bottom right corner.
    """

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **kwargs
    ):
        assert not kwargs and {q.dtype, k.dtype, v.dtype} <= {torch.float16, torch.bfloat16}
        self.calls.append((causal, window_size))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        positions = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
        distance = torch.arange(k.shape[2])[None] - positions[:, None]
        left, right = window_size[0], 0 if causal else window_size[1]
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            allowed &= distance >= -left
        if right >= 0:
            allowed &= distance <= right
        out = F.scaled_dot_product_attention(
            q, k, v, allowed, dropout_p=dropout_p, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)


@pytest.fixture
def flash(monkeypatch):
    stand_in = FlashStandIn()
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_func = stand_in.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return stand_in


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (3, 7)])
def test_flash_attention_sees_what_it_should(flash, queries, keys, window):
    q, k, v = states(2, queries, keys, torch.bfloat16)
    out, weights = flash_attention_2(
        nn.Module(), q, k, v, None, scaling=0.3, is_causal=True, sliding_window=window
    )

    def allowed(row, q, k):
        back = q + keys - queries - k
        return 0 <= back < (window or keys)

    assert flash.calls and weights is None
    expected = slow_attention(q, k, v, allowed, scaling=0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)


def test_flash_attention_of_an_encoder_looks_both_ways(flash):
    q, k, v = states(dtype=torch.bfloat16)
    out, _ = flash_attention_2(nn.Module(), q, k, v, None, scaling=0.3)
    expected = slow_attention(q, k, v, everything, scaling=0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=0)
    assert flash.calls == [(False, (-1, -1))]


def test_flash_attention_leaves_masks_to_torch(flash):
    q, k, v = states(2, dtype=torch.bfloat16)
    out, _ = flash_attention_2(nn.Module(), q, k, v, boolean_mask(), scaling=0.3)
    assert not flash.calls
    assert torch.equal(out, sdpa_attention(nn.Module(), q, k, v, boolean_mask(), scaling=0.3)[0])


def test_flash_attention_computes_in_sixteen_bits(flash):
    q, k, v = states()
    text = r"16 bits only .*expected float16 or bfloat16, found torch.float32. Load with dtype=torch.bfloat16"
    with pytest.raises(ArgumentError, match=text):
        flash_attention_2(nn.Module(), q, k, v, None, scaling=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention_2(nn.Module(), q, k, v, None, scaling=0.3)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    "case",
    [Case(LlamaForCausalLM, TINY_LLAMA), Case(MistralForCausalLM, {**TINY_LLAMA, "sliding_window": 4})],
    ids=str,
)
def test_models_with_flash_attention_equal_those_with_sdpa(flash, case, padding):
    model = case.build(torch.bfloat16)
    inputs = case.inputs(model.config, padding)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("flash_attention_2")
        found = model(**inputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        parts, cache = [], None
        for piece in (slice(0, 4), slice(4, 5), slice(5, 8), *(slice(i, i + 1) for i in range(8, 11))):
            seen = None if mask is None else mask[:, : piece.stop]
            out = model(ids[:, piece], attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert flash.calls or padding != "none"
    for logits in (found.logits, torch.cat(parts, 1)):
        difference = (logits - expected)[visible].float().norm() / expected[visible].float().norm()
        assert difference < 1e-2


def test_attend_follows_the_config():
    config = LlamaConfig(**TINY_LLAMA)
    q, k, v = states(2)
    out, weights = attend(nn.Module(), config, q, k, v, None, scaling=0.3, is_causal=True)
    assert weights is None
    eager, weights = attend(
        nn.Module(), config, q, k, v, None, scaling=0.3, is_causal=True, output_attentions=True
    )
    assert weights.shape == (BATCH, HEADS, QUERIES, QUERIES)
    assert_close(eager, out, "eager against sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True, "by head"])
def test_one_query_of_grouped_heads_equals_eager(dtype, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8).to(dtype) for heads, n in ((6, 1), (2, 5), (2, 5)))
    mask = None
    if masked:
        mask = torch.rand(2, 6 if masked == "by head" else 1, 1, 5) > 0.4
        mask[..., 0] = True
    module = torch.nn.Module().eval()
    found, _ = sdpa_attention(module, q, k, v, mask, scaling=0.3, is_causal=True)
    right, _ = eager_attention(module, q.float(), k.float(), v.float(), mask, scaling=0.3, is_causal=True)
    assert found.shape == (2, 1, 6, 8)
    torch.testing.assert_close(
        found.float(), right, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
    )
