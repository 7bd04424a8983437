# SPDX-License-Identifier: Apache-2.0
"""Written-out decoding steps: they say what the forward says, and give way where they may not stand in."""

import pytest
import torch
from torch import nn

import pretrained
from pretrained.torch.generation import loop
from pretrained.torch.steps import common
from support.oracle import transformers_twin

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "one key head for each": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "positions that depend on the length": (
        "LlamaForCausalLM",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 10},
    ),
    "scaled positions": ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "sliding": ("MistralForCausalLM", {"sliding_window": 5}),
    "some sliding": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "normed heads": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "layers without positions": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
}
T5 = {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": None}
CASES |= {
    "t5": ("T5ForConditionalGeneration", T5),
    "t5 v1.1": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "a table in each layer": ("UMT5ForConditionalGeneration", T5),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 scaled by layer": ("GPT2LMHeadModel", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
}


def make(name="llama", dtype=torch.float32):
    kind, more = CASES[name]
    cls = getattr(pretrained, kind)
    torch.manual_seed(0)
    llama = not {"d_model", "n_embd"} & set(more)
    model = cls(cls.config_class(**({**SIZES, **more} if llama else more))).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.to(dtype)


@pytest.fixture
def taken(monkeypatch):
    """Count the steps that stand in for forwards."""
    calls = []
    run = loop.run_step
    monkeypatch.setattr(loop, "run_step", lambda *args: calls.append(1) or run(*args))
    return calls


def inputs(rows, padded):
    torch.manual_seed(1)
    ids = torch.randint(3, 61, (rows, 8))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


ALL = {"max_new_tokens": 14, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("rows", "padded"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_forwards(name, rows, padded, copies, taken, monkeypatch):
    model, given = make(name), inputs(rows, padded)
    found = model.generate(**given, weight_copies=copies, **ALL)
    assert len(taken) == 13
    monkeypatch.setattr(type(model), "_decode_step", None)
    right = model.generate(**given, **ALL)
    assert len(taken) == 13
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(right.logits), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.sequences, right.sequences)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_bfloat16_is_as_near_to_float32_as_the_forward(name, rows, taken, monkeypatch):
    model, given = make(name, torch.bfloat16), inputs(rows, False)
    wide = make(name, torch.bfloat16).float()
    # The same tokens for all three.
    tokens = wide.generate(**given, max_new_tokens=14)[:, -14:]
    start = 1 if model.config.is_encoder_decoder else 8

    def follow(ids, scores):
        forced = torch.full_like(scores, -1e9)
        return forced.scatter(1, tokens[:, ids.shape[1] - start, None], 0.0)

    def logits(model):
        return torch.stack(model.generate(**given, **ALL, logits_processor=[follow]).logits)

    right, fast = logits(wide), logits(model)
    assert len(taken) > 13
    monkeypatch.setattr(type(model), "_decode_step", None)
    slow = logits(model)
    assert (fast - right).norm() < 1.1 * (slow - right).norm()


def test_a_static_cache_serves_too(taken):
    model, given = make(), inputs(2, True)
    assert torch.equal(
        model.generate(**given, max_new_tokens=9, cache_implementation="static"),
        model.generate(**given, max_new_tokens=9),
    )
    assert len(taken) == 16


def test_a_decoder_prompt_may_be_padded(taken, monkeypatch):
    model, given = make("t5"), inputs(3, True)
    prompt = inputs(3, True)
    given |= {f"decoder_{name}": value for name, value in prompt.items()}
    found = model.generate(**given, **ALL)
    monkeypatch.setattr(type(model), "_decode_step", None)
    right = model.generate(**given, **ALL)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(right.logits), rtol=1e-4, atol=1e-4)
    assert len(taken) == 13


def test_given_positions_are_obeyed(taken, monkeypatch):
    model, given = make(), inputs(1, False)
    given["position_ids"] = torch.arange(5, 13)[None]
    found = model.generate(**given, **ALL)
    monkeypatch.setattr(type(model), "_decode_step", None)
    right = model.generate(**given, **ALL)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(right.logits), rtol=1e-4, atol=1e-4)
    assert len(taken) == 13


def test_the_returned_cache_can_be_trained_through(taken):
    model = make()
    out = model.generate(**inputs(1, False), max_new_tokens=80, return_dict_in_generate=True)
    assert taken
    model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


def test_scores_may_be_written_into(taken):
    def rule(ids, scores):
        scores[:, 3] = 1e9
        return scores

    out = make().generate(**inputs(1, False), max_new_tokens=5, logits_processor=[rule])
    assert taken and out[0, 8:].tolist() == [3] * 5


# -- where the forward must run -------------------------------------------------------------------


class MyAttention(nn.Linear):
    pass


def _hook(model, monkeypatch):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def _instance_forward(model, monkeypatch):
    mlp = model.model.layers[0].mlp
    mlp.forward = mlp.forward


def _class_forward(model, monkeypatch):
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: x)


def _other_class(model, monkeypatch):
    model.model.layers[0].self_attn.o_proj.__class__ = MyAttention


def _eager(model, monkeypatch):
    model.set_attn_implementation("eager")


def _train(model, monkeypatch):
    model.train()


def _compiled(model, monkeypatch):
    model.model.layers[0].compile(backend="eager")


def _parametrized(model, monkeypatch):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.o_proj)


def _mixed(model, monkeypatch):
    model.model.norm.double()


def _hidden(model, monkeypatch):
    model.config.output_hidden_states = True


CHANGES = [_hook, _instance_forward, _class_forward, _other_class, _eager, _train, _compiled, _parametrized]


@pytest.mark.parametrize("change", [*CHANGES, _hidden])
def test_the_forward_runs_where_it_may_do_more(change, taken, monkeypatch):
    model = make()
    change(model, monkeypatch)
    model.generate(**inputs(1, False), max_new_tokens=4)
    assert not taken


def test_it_runs_where_dtypes_are_mixed():
    model = make()
    with torch.no_grad():
        assert common.is_stock(model, frozenset({"nn", "models.llama"}))
        _mixed(model, None)
        assert not common.is_stock(model, frozenset({"nn", "models.llama"}))


@pytest.mark.parametrize("settings", [{"output_attentions": True}, {"output_hidden_states": True}])
def test_it_runs_where_more_than_logits_is_wanted(settings, taken):
    out = make().generate(**inputs(1, False), max_new_tokens=4, return_dict_in_generate=True, **settings)
    assert not taken and (out.attentions or out.hidden_states)


def test_it_runs_under_autocast_and_under_a_watching_mode(taken):
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**inputs(1, False), max_new_tokens=4)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        model.generate(**inputs(1, False), max_new_tokens=4)
    assert not taken


def test_a_subclass_that_changes_nothing_is_fast_and_one_that_does_is_obeyed(taken):
    class Mine(pretrained.LlamaForCausalLM):
        pass

    class Doubled(pretrained.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    for cls, steps in ((Mine, 3), (Doubled, 0)):
        taken.clear()
        cls(make().config).eval().generate(**inputs(1, False), max_new_tokens=4)
        assert len(taken) == steps


# -- windows of speculative decoding -------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if not {"d_model", "n_embd"} & set(CASES[name][1])])
def test_windows_say_what_the_forward_says(name, padded, taken):
    model, given = make(name), inputs(2, padded)
    settings = {"max_new_tokens": 16, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "no_repeat_ngram_size": 6}
    ours = model.generate(**given, **settings)
    assert len(taken) > 1
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    taken.clear()
    theirs = model.generate(**given, **settings)
    hook.remove()
    assert not taken and torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=2e-4, rtol=1e-4)


def test_windows_share_the_copies_of_steps(monkeypatch):
    monkeypatch.setitem(CASES, "wide", ("LlamaForCausalLM", {"vocab_size": 1100}))
    model = make("wide", dtype=torch.bfloat16)
    seen = []
    for more in ({}, {"prompt_lookup_num_tokens": 2}, {}):
        model.generate(**inputs(1, False), max_new_tokens=6, weight_copies=True, **more)
        seen.append({key: entry.stored for key, entry in model.__dict__["_weight_copies"]._entries.items()})
    assert seen[0] and all(found.keys() == seen[0].keys() for found in seen)
    assert all(found[key] is stored for found in seen for key, stored in seen[0].items())


@pytest.mark.realweights
@pytest.mark.parametrize("copies", [False, True])
def test_tokens_of_trained_weights_equal_transformers(smollm2_gguf, copies, taken):
    model = pretrained.AutoModelForCausalLM.from_pretrained(smollm2_gguf)
    tokenizer = pretrained.AutoTokenizer.from_pretrained(smollm2_gguf, padding_side="left")
    texts = ["The three primary colours are", "Once upon a time there was a king who"]
    twin = transformers_twin(model)
    for batch in (texts[:1], texts):
        given = dict(tokenizer(batch, padding=True, return_tensors="pt"))
        expected = twin.generate(**given, max_new_tokens=32, do_sample=False)
        assert torch.equal(model.generate(**given, max_new_tokens=32, weight_copies=copies), expected)
    assert taken
