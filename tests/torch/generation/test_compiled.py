# SPDX-License-Identifier: Apache-2.0
"""Compiled and captured steps: the tokens of the plain ones, few compilations, clear refusals."""

import random

import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import GenerationError, MissingDependencyError, NotYetError
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.generation import compiled
from pretrained.torch.generation.compiled import bucket, check_compiler
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.smollm3 import SmolLM3ForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.cases import TINY_LLAMA
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5

# The layers are traced and looked up as ever, but no code is made of them: a hundred times faster.
TRACED = {"compile_config": {"backend": "eager"}}
LONG = {**TINY_LLAMA, "max_position_embeddings": 1024, "eos_token_id": None}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(cls=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    settings = {GPT2LMHeadModel: TINY_GPT2, T5ForConditionalGeneration: TINY_T5}.get(cls, LONG)
    return cls(cls.config_class(**{**settings, **config})).eval()


def prompt(length=5, rows=1, seed=0):
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LlamaForCausalLM, {}),
        (LlamaForCausalLM, {"num_key_value_heads": 1, "attention_bias": True}),
        (MistralForCausalLM, {"sliding_window": 4}),
        (SmolLM3ForCausalLM, {"num_hidden_layers": 4, "pad_token_id": 0}),
        (GPT2LMHeadModel, {"eos_token_id": None}),
    ],
)
def test_tokens_are_those_of_plain_steps(cls, config):
    model = build(cls, **config)
    want = model.generate(prompt(), max_new_tokens=12)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, **TRACED), want)
    # One graph for all layers; two where layers are of two kinds.
    assert graphs() == (2 if cls is SmolLM3ForCausalLM else 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_code_gives_the_tokens_of_plain_steps():
    model = build()
    want = model.generate(prompt(), max_new_tokens=12)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, compile=True), want)
    assert graphs() == 1


def test_padded_rows_and_samples():
    model = build()
    ids, mask = prompt(6, rows=2), torch.ones(2, 6, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 0, 0
    for settings in ({}, {"do_sample": True}):
        found = [
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=9,
                generator=torch.Generator().manual_seed(1),
                **settings,
                **how,
            )
            for how in ({}, TRACED)
        ]
        assert torch.equal(*found)
    assert graphs() == 1


def test_fifty_prompts_compile_once_for_each_bucket():
    model, lengths = build(), random.Random(0)
    seen = set()
    for index in range(50):
        length = lengths.randint(1, 400)
        model.generate(prompt(length, seed=index), max_new_tokens=3, **TRACED)
        seen.add(bucket(length + 3))
        assert graphs() == len(seen)
    assert len(seen) == 3


def test_many_buckets_and_batches_stay_compiled():
    # Torch gives up after eight variants of the same code; every bucket has code of its own.
    model = build(num_hidden_layers=1)
    for rows in range(1, 12):
        model.generate(prompt(4, rows=rows), max_new_tokens=3, **TRACED)
    assert graphs() == 11


def test_buckets():
    assert [bucket(n) for n in (1, 128, 129, 256, 1000)] == [128, 128, 256, 256, 1024]


def test_changed_weights_count():
    model = build()
    model.generate(prompt(), max_new_tokens=4, **TRACED)
    torch.manual_seed(1)
    model.model.layers[1].mlp.up_proj.weight.data.normal_()
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(48, 32, bias=False)
    want = model.generate(prompt(), max_new_tokens=12)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, **TRACED), want)


def test_nothing_stays_on_the_model():
    model = build()
    before, modules = set(vars(model)), list(model.modules())
    model.generate(prompt(), max_new_tokens=4, **TRACED)
    assert set(vars(model)) == before and list(model.modules()) == modules
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]


def test_a_static_cache_of_the_user_is_continued():
    model = build()
    whole = model.generate(prompt(), max_new_tokens=12)
    cache = StaticCache(model.config, 40)
    begun = model.generate(prompt(), max_new_tokens=6, past_key_values=cache, **TRACED)
    assert torch.equal(model.generate(begun, max_new_tokens=6, past_key_values=cache, **TRACED), whole)
    assert cache.get_seq_length() == 16


def test_disable_compile_wins_over_a_config():
    model = build()
    model.generate(prompt(), max_new_tokens=4, disable_compile=True, **TRACED)
    assert graphs() == 0


def test_what_cannot_be_compiled_is_refused_before_the_first_forward(monkeypatch):
    model = build()
    forwards = []
    monkeypatch.setattr(type(model), "forward", _counted(type(model).forward, forwards))
    for settings, words in (
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"past_key_values": DynamicCache()}, "static cache"),
        ({"cache_implementation": "dynamic"}, "cache_implementation"),
        ({"use_cache": False}, "use_cache"),
    ):
        with pytest.raises(GenerationError, match=words):
            model.generate(prompt(), max_new_tokens=4, **TRACED, **settings)
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    with pytest.raises(GenerationError, match=r"hooks.*model\.layers\.0\.mlp"):
        model.generate(prompt(), max_new_tokens=4, **TRACED)
    handle.remove()
    assert not forwards
    with pytest.raises(NotYetError, match="encoder"):
        build(T5ForConditionalGeneration).generate(prompt(), max_new_tokens=4, **TRACED)


def _counted(forward, calls):
    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    counted.__wrapped__ = forward
    return counted


def test_quantized_models_are_refused():
    from pretrained.torch.quantize_model import quantize_model

    model = build()
    quantize_model(model, QuantizationConfig(quant_method="int8"))
    with pytest.raises(NotYetError, match="Quantized"):
        model.generate(prompt(), max_new_tokens=4, **TRACED)


def test_a_model_that_prepares_its_own_inputs_is_refused():
    class Own(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return super().prepare_inputs_for_generation(input_ids, **kwargs)

    with pytest.raises(GenerationError, match="prepares its own inputs"):
        build(Own).generate(prompt(), max_new_tokens=4, **TRACED)


def test_without_a_compiler_the_mend_is_named():
    model = build()
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with absent, pytest.raises(MissingDependencyError, match=r"C\+\+ compiler(?s:.*)g\+\+"):
        model.generate(prompt(), max_new_tokens=4, compile=True)
    # Other backends need none.
    model.generate(prompt(), max_new_tokens=4, **TRACED)


def test_without_pythons_headers_the_mend_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(MissingDependencyError, match="python3-dev"):
        check_compiler()


@pytest.mark.parametrize("padded", [False, True])
def test_captured_steps_read_what_lies_at_the_same_place(monkeypatch, padded):
    """Without a GPU: what was captured is run again, on the very tensors that it was captured with."""
    runs = []

    def capture(run):
        run()
        # Set up a second time, then captured.
        run()
        runs.append(run)
        held = run.__self__._held
        places = {name: value.data_ptr() for name, value in held.items() if isinstance(value, torch.Tensor)}

        def replay():
            now = {name: held[name].data_ptr() for name in places}
            assert now == places
            run()

        return replay

    monkeypatch.setattr(compiled, "capture", capture)
    monkeypatch.setattr(compiled, "CompiledDecoder", compiled.CapturedDecoder)
    model = build()
    ids, mask = prompt(6, rows=2), torch.ones(2, 6, dtype=torch.int64)
    if padded:
        ids[1, :3], mask[1, :3] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 9, "output_scores": True}
    want = model.generate(ids, return_dict_in_generate=True, **settings)
    got = model.generate(ids, return_dict_in_generate=True, **settings, **TRACED)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.scores, want.scores, strict=True))
    assert len(runs) == 1
