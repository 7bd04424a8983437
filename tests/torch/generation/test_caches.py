# SPDX-License-Identifier: Apache-2.0
"""`generate` with every kind of cache: logits of the uncached run, lifetimes, settings, refusals."""

import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch

import pretrained
from pretrained.errors import ArgumentError, GenerationError
from pretrained.torch.cache import (
    DynamicCache,
    EncoderDecoderCache,
    OffloadedLayer,
    QuantizedCache,
    SlidingWindowCache,
    StaticCache,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "Qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "GPT2": (
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0},
    ),
    "Bert": ("BertLMHeadModel", {**SIZES, "is_decoder": True}),
}
CACHES = {
    "dynamic": {},
    "dynamic_full": {},
    "static": {},
    "sliding_window": {},
    "offloaded": {},
    "offloaded_static": {},
    "quantized": {"cache_config": {"nbits": 8, "q_group_size": 8, "residual_length": 4}},
}


@pytest.fixture(scope="module")
def models():
    made = {}
    for family, (name, sizes) in FAMILIES.items():
        cls = getattr(pretrained, name)
        torch.manual_seed(0)
        made[family] = cls(cls.config_class(**sizes)).eval()
        for parameter in made[family].parameters():
            parameter.data.normal_(0, 0.15)
        made[family].generation_config.eos_token_id = None
    return made


def prompts(padded, batch=3):
    ids = torch.randint(3, 61, (batch, 9), generator=torch.Generator().manual_seed(2))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, inputs, tokens=None, **settings):
    """Generate 8 tokens, or run the given ones; return sequences, [rows, new, vocab] logits, cache."""
    if tokens is not None:
        order = iter(range(10**6))
        rows = tokens.shape[0]
        settings["prefix_allowed_tokens_fn"] = lambda row, ids: [int(tokens[next(order) % rows, len(ids)])]
    out = model.generate(
        **inputs, **settings, max_new_tokens=8, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_uncached_run(models, family, kind):
    model = models[family]
    for padded, chunk in itertools.product((False, True), (None, 4)):
        inputs = prompts(padded)
        tokens, expected, cache = run(model, inputs, use_cache=False)
        assert cache is None
        _, found, cache = run(
            model, inputs, tokens, cache_implementation=kind, prefill_chunk_size=chunk, **CACHES[kind]
        )
        # Rounding to 8 bits moves a logit by a few hundredths of the logits' own spread.
        bound = 0.05 * expected.std() if kind == "quantized" else 2e-5 * expected.abs().max()
        assert (found - expected).abs().max() <= bound, (padded, chunk)
        assert cache.get_seq_length() == tokens.shape[1] - 1
        alone = run(model, {name: value[:1] for name, value in prompts(False).items()}, **CACHES[kind],
                    cache_implementation=kind)[1]  # fmt: skip
        assert (alone - expected[:1]).abs().max() <= bound or padded


@pytest.mark.parametrize("nbits", [4, 2])
def test_fewer_bits_stay_within_their_bounds(models, nbits):
    for model in models.values():
        tokens, expected, _ = run(model, prompts(False), use_cache=False)
        settings = {"nbits": nbits, "q_group_size": 8, "residual_length": 4}
        found = run(model, prompts(False), tokens, cache_implementation="quantized", cache_config=settings)[1]
        error = (found - expected).abs().max() / expected.std()
        assert 0 < error <= {4: 0.6, 2: 3.0}[nbits]


KINDS = [
    ("dynamic", DynamicCache),
    ("offloaded", DynamicCache),
    ("static", StaticCache),
    ("offloaded_static", StaticCache),
    ("offloaded_hybrid", StaticCache),
    ("sliding_window", SlidingWindowCache),
    ("quantized", QuantizedCache),
    ("hybrid", DynamicCache),
    ("hybrid_chunked", DynamicCache),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_names_of_caches(models, name, kind):
    cache = run(models["Qwen2"], prompts(False), cache_implementation=name)[2]
    assert type(cache) is kind
    assert all(isinstance(layer, OffloadedLayer) for layer in cache.layers if not layer.is_sliding) == (
        name.startswith("offloaded")
    )


def test_settings_of_a_cache_may_be_an_object(models):
    for settings in (
        {"nbits": 2, "backend": "hqq", "axis_key": 0, "q_group_size": 4, "compute_dtype": torch.float32},
        SimpleNamespace(nbits=2, backend="hqq", axis_key=0, q_group_size=4, residual_length=None),
    ):
        cache = run(models["Llama"], prompts(False), cache_implementation="quantized", cache_config=settings)[
            2
        ]
        layer = cache.layers[0]
        assert (layer.nbits, layer.backend, layer.axis_key, layer.axis_value) == (2, "hqq", 0, 1)
        assert (layer.q_group_size, layer.residual_length) == (4, 128)
    static = run(
        models["Llama"], prompts(False), cache_implementation="static", cache_config={"max_cache_len": 50}
    )[2]
    assert static.get_max_length() == 50


WRONG = [
    (
        {"cache_implementation": "quantised"},
        GenerationError,
        "no cache_implementation.*Did you mean 'quantized'",
    ),
    ({"cache_config": {"nbits": 4}}, GenerationError, "no 'nbits'.*Set cache_implementation=\"quantized\""),
    (
        {"cache_implementation": "quantized", "cache_config": {"nbit": 4}},
        GenerationError,
        "no 'nbit'.*Did you mean 'nbits'",
    ),
    (
        {"cache_implementation": "quantized", "cache_config": {"nbits": 3}},
        ArgumentError,
        "2, 4 or 8, found 3",
    ),
    (
        {"cache_implementation": "quantized", "cache_config": {"q_group_size": 5, "nbits": 8}},
        GenerationError,
        "divisor of 8, found 5",
    ),
    ({"cache_implementation": "quantized", "cache_config": 4}, GenerationError, "wrong type.*a dict"),
    (
        {"cache_implementation": "static", "cache_config": {"max_cache_len": 0}},
        GenerationError,
        "max_cache_len must be a whole number",
    ),
    (
        {"cache_implementation": "static", "max_cache_len": 10, "max_new_tokens": 6},
        GenerationError,
        r"no room for the whole sequence \(max_cache_len\): expected max_cache_len=14 or more, found 10",
    ),
    ({"prefill_chunk_size": 0}, GenerationError, "prefill_chunk_size cannot be 0"),
    ({"past_key_values": 3}, GenerationError, "past_key_values has the wrong type"),
]


@pytest.mark.parametrize(("settings", "error", "message"), WRONG)
def test_what_cannot_work_is_refused_before_the_first_forward(models, settings, error, message, monkeypatch):
    model, calls = models["Llama"], []
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1))
    with pytest.raises(error, match=message):
        model.generate(**prompts(False), **settings)
    assert calls == []


def test_legacy_tuples_go_in_and_come_out(models):
    for family, model in models.items():
        ids = prompts(False)["input_ids"]
        plain = model.generate(ids, max_new_tokens=8)
        out = model.generate(
            ids, max_new_tokens=4, return_dict_in_generate=True, return_legacy_cache=True, eos_token_id=None
        )
        assert type(out.past_key_values) is tuple
        assert len(out.past_key_values[0]) == (4 if family == "T5" else 2)
        if family in ("Mistral", "Qwen2"):
            continue  # What a window let go of cannot be put back.
        more = {"decoder_input_ids": out.sequences} if family == "T5" else {}
        prompt = ids if family == "T5" else out.sequences
        again = model.generate(prompt, **more, past_key_values=out.past_key_values, max_new_tokens=4)
        assert torch.equal(again, plain)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert", "T5"])
def test_forwards_take_legacy_tuples(models, family):
    model, ids = models[family], prompts(False)["input_ids"]
    more = {"input_ids": ids} if family == "T5" else {}
    name = "decoder_input_ids" if family == "T5" else "input_ids"
    with torch.no_grad():
        whole = model(**more, **{name: ids}).logits
        first = model(**more, **{name: ids[:, :5]}, use_cache=True).past_key_values.to_legacy_cache()
        rest = model(**more, **{name: ids[:, 5:]}, past_key_values=first).logits
    assert torch.allclose(rest, whole[:, 5:], atol=1e-5)


# -- with strategies that go back, and that change rows ------------------------------------------

STRATEGIES = {
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "GPT2", "T5"])
def test_strategies_on_every_cache(models, family, kind, strategy):
    model, settings = models[family], {**STRATEGIES[strategy], "max_new_tokens": 14}
    inputs = prompts(True)
    # Repeated, so that there is something to look up.
    inputs = {name: value.repeat(1, 2) if family == "T5" else value for name, value in inputs.items()}
    expected = model.generate(**inputs, **settings)
    settings |= {"cache_implementation": kind, **CACHES[kind]}
    if (kind, strategy) == ("quantized", "prompt lookup"):
        with pytest.raises(GenerationError, match="drafts would change the text"):
            model.generate(**inputs, **settings)
        return
    found = model.generate(**inputs, **settings)
    if kind != "quantized":
        assert torch.equal(found, expected)
    else:
        assert found.shape == expected.shape and (found != expected).float().mean() < 0.5


# -- cross-attention -----------------------------------------------------------------------------


def count(module):
    calls = []
    return calls, module.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized", "offloaded"])
def test_cross_attention_is_computed_once(models, kind, own):
    model = models["T5"]
    modules = [
        m for name, m in model.named_modules() if name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    ]
    calls, hooks = zip(*(count(module) for module in modules), strict=True)
    given = {"past_key_values": DynamicCache()} if own else {"cache_implementation": kind}
    model.generate(**prompts(True), **given, max_new_tokens=7)
    for hook in hooks:
        hook.remove()
    assert [len(c) for c in calls] == [1] * 4


@pytest.mark.parametrize("name", ["BertLMHeadModel", "GPT2LMHeadModel"])
def test_cross_attention_of_a_decoder_alone_is_computed_once(name):
    cls = getattr(pretrained, name)
    sizes = next(sizes for model, sizes in FAMILIES.values() if model == name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes, add_cross_attention=True)).eval()
    ends = ("crossattention.self.key", "crossattention.c_attn")
    modules = [m for module, m in model.named_modules() if module.endswith(ends)]
    calls, _ = zip(*(count(module) for module in modules), strict=True)
    states = torch.randn(3, 5, 32)
    out = model.generate(
        **prompts(False), encoder_hidden_states=states, max_new_tokens=6, return_dict_in_generate=True
    )
    assert type(out.past_key_values) is EncoderDecoderCache and [len(c) for c in calls] == [1, 1]
    uncached = model.generate(
        **prompts(False), encoder_hidden_states=states, max_new_tokens=6, use_cache=False
    )
    assert torch.equal(out.sequences, uncached)


# -- lifetimes -----------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Weak references to all caches and layers that are made, with no garbage collector to help."""
    refs = []
    for kind in (pretrained.torch.cache.Cache, pretrained.torch.cache_layers.CacheLayer):
        before = kind.__init__

        def watched(self, *args, _before=before, **kwargs):
            refs.append(weakref.ref(self))
            _before(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", watched)
    gc.collect()
    gc.disable()
    yield refs
    gc.enable()


class Stream:
    def __init__(self, fail_at=None, error=ValueError):
        self.puts, self.fail_at, self.error = 0, fail_at, error

    def put(self, value):
        self.puts += 1
        if self.puts == self.fail_at:
            raise self.error("stop")

    def end(self):
        pass


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["Llama", "T5", "Qwen2"])
def test_no_cache_outlives_the_call(models, made, family, kind):
    model = models[family]
    settings = {"cache_implementation": kind, "max_new_tokens": 5, **CACHES[kind]}
    model.generate(**prompts(False), **settings)
    assert made and [ref() for ref in made if ref() is not None] == []
    model.generate(**prompts(False), **settings, streamer=Stream())
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            model.generate(**prompts(False), **settings, streamer=Stream(4, error))
        with pytest.raises(error):
            model.generate(**prompts(False), **settings, stopping_criteria=[Interrupt(error)])
    assert [ref() for ref in made if ref() is not None] == []
    out = model.generate(**prompts(False), **settings, return_dict_in_generate=True)
    assert any(ref() is not None for ref in made)
    del out
    assert [ref() for ref in made if ref() is not None] == []


class Interrupt:
    def __init__(self, error):
        self.error, self.left = error, 2

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if not self.left:
            raise self.error("stop")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)
