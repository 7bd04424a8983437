# SPDX-License-Identifier: Apache-2.0
"""Caches that live longer than a call: conversations, and beginnings that requests share."""

import pytest
import torch

import pretrained
from pretrained import PrefixCache, TurnCache
from pretrained.errors import GenerationError
from pretrained.torch.cache import DynamicCache, QuantizedCache, StaticCache

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0}
FAMILIES = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Qwen2ForCausalLM": {
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "GPT2LMHeadModel": GPT2,
    "BertLMHeadModel": {**SIZES, "is_decoder": True},
    "RobertaForCausalLM": {**SIZES, "is_decoder": True},
}


def build(name):
    cls = getattr(pretrained, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**FAMILIES[name])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in FAMILIES}


@pytest.fixture
def lengths(models, monkeypatch):
    """How many tokens each forward of any model runs."""
    seen = []

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen.append(ids.shape[1])

    hooks = [model.register_forward_pre_hook(note, with_kwargs=True) for model in models.values()]
    yield seen
    for hook in hooks:
        hook.remove()


def tokens(length, seed=0, batch=1):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- turns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_turns_give_what_whole_conversations_give(models, name, batch):
    model, turns = models[name], TurnCache(models[name])
    text = tokens(9, batch=batch)
    for turn in range(4):
        held = turns.tokens
        out = turns.generate(text, max_new_tokens=5)
        assert torch.equal(out, model.generate(text, max_new_tokens=5, use_cache=False))
        assert turns.reused == held and turns.tokens == out.shape[1] - 1
        text = torch.cat([out, tokens(4, 10 + turn, batch)], 1)
        assert turns.shared(text) == turns.tokens


def test_only_what_is_new_is_run(models, lengths):
    turns = TurnCache(models["LlamaForCausalLM"])
    first = turns.generate(tokens(9), max_new_tokens=2)
    turns.generate(torch.cat([first, tokens(4, 1)], 1), max_new_tokens=2)
    assert lengths[0] == 9 and max(lengths[1:]) == 5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_conversation_that_was_edited_goes_back_to_what_is_shared(models, name):
    model, turns = models[name], TurnCache(models[name])
    out = turns.generate(tokens(12), max_new_tokens=6)
    edited = torch.cat([out[:, :14], tokens(5, 3)], 1)
    edited[0, 14] = (out[0, 14] + 1) % 58 + 3
    assert turns.shared(edited) == 14 < turns.tokens
    again = turns.generate(edited, max_new_tokens=6)
    assert torch.equal(again, model.generate(edited, max_new_tokens=6, use_cache=False))
    # A window has let go of what came before, so there the prompt is run from its beginning.
    assert turns.reused == (14 if name == "LlamaForCausalLM" else 0)
    same = turns.generate(edited, max_new_tokens=6)
    assert torch.equal(same, again)
    shorter = turns.generate(edited[:, :8], max_new_tokens=3)
    assert torch.equal(shorter, model.generate(edited[:, :8], max_new_tokens=3, use_cache=False))


def test_strict_turns_say_where_the_prompt_departs(models):
    turns = TurnCache(models["LlamaForCausalLM"], strict=True)
    out = turns.generate(tokens(6), max_new_tokens=4)
    other = out.clone()
    other[0, 3] = 3 if int(out[0, 3]) != 3 else 4
    with pytest.raises(
        GenerationError,
        match=r"does not extend the cache \(input_ids, position 3\).*the 9 tokens.*found 3.*reset\(\)",
    ):
        turns.generate(other, max_new_tokens=4)
    assert turns.tokens == 9, "nothing was lost"
    turns.generate(torch.cat([out, tokens(2)], 1), max_new_tokens=1)
    assert turns.reused == 9


def test_padded_turns(models):
    model = models["LlamaForCausalLM"]
    turns, text = TurnCache(model), tokens(8, batch=2)
    mask = torch.ones_like(text)
    text[1, :3], mask[1, :3] = 0, 0
    for turn in range(3):
        out = turns.generate(text, attention_mask=mask, max_new_tokens=4)
        plain = model.generate(text, attention_mask=mask, max_new_tokens=4, use_cache=False)
        assert torch.equal(out, plain) and (turns.reused > 0) == (turn > 0)
        text = torch.cat([out, tokens(3, turn, 2)], 1)
        mask = torch.cat([mask, mask.new_ones(2, 7)], 1)
    assert turns.shared(text, torch.ones_like(mask)) == 0


def test_what_ends_a_conversation(models):
    model = models["LlamaForCausalLM"]
    turns = TurnCache(model)
    turns.generate(tokens(6), max_new_tokens=3)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        turns.generate(tokens(6), max_new_tokens=3, stopping_criteria=[fail])
    assert turns.tokens == 0 and turns.cache.get_seq_length() == 0
    several = turns.generate(tokens(6), max_new_tokens=3, do_sample=True, num_return_sequences=3)
    assert several.shape[0] == 3 and turns.tokens == 0
    turns.generate(tokens(6), max_new_tokens=3)
    turns.generate(tokens(6, batch=2), max_new_tokens=3)
    assert turns.reused == 0 and turns.tokens == 8
    result = turns.generate(tokens(6, batch=2), max_new_tokens=3, return_dict_in_generate=True)
    assert result.past_key_values is turns.cache and turns.reused == 5
    turns.reset()
    assert turns.tokens == 0 and turns.cache.nbytes == 0


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_turns_on_other_caches(models, kind):
    model = models["LlamaForCausalLM"]
    cache = {
        "static": lambda: StaticCache(model.config, 80),
        "quantized": lambda: QuantizedCache("quanto", model.config, 8, residual_length=4),
        "offloaded": lambda: DynamicCache(config=model.config, offloading=True),
    }[kind]()
    turns, text = TurnCache(model, cache), tokens(9)
    for turn in range(3):
        out = turns.generate(text, max_new_tokens=5)
        if kind != "quantized":
            assert torch.equal(out, model.generate(text, max_new_tokens=5))
        text = torch.cat([out, tokens(4, turn)], 1)
    assert turns.reused == 9 + 5 + 9 - 1 and turns.cache is cache


def test_what_turns_refuse(models):
    model = models["LlamaForCausalLM"]
    filled = DynamicCache()
    filled.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(GenerationError, match=r"begins with an empty cache.*2 tokens"):
        TurnCache(model, filled)
    t5 = pretrained.T5ForConditionalGeneration(
        pretrained.T5Config(vocab_size=61, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    )
    for kind in (TurnCache, PrefixCache):
        with pytest.raises(GenerationError, match=r"is for decoders.*encoder_outputs"):
            kind(t5)
        for name, value in (("past_key_values", DynamicCache()), ("cache_implementation", "static")):
            with pytest.raises(GenerationError, match=f"cache of its own kind.*Leave {name} out"):
                kind(model).generate(tokens(3), **{name: value})
        with pytest.raises(GenerationError, match="must be a tensor of token ids"):
            kind(model).generate([[1, 2]])
        with pytest.raises(GenerationError, match="The prompt is given twice"):
            kind(model).generate(tokens(3), input_ids=tokens(3))


# -- prefixes ------------------------------------------------------------------------------------


def padded(prompts):
    width = max(prompt.shape[0] for prompt in prompts)
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[0] :], mask[row, width - prompt.shape[0] :] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_beginnings_change_no_token(models, name):
    model, prefixes = models[name], PrefixCache(models[name])
    system = tokens(11, 5)
    assert prefixes.add(system) == 11 and prefixes.add(system) == 0
    alone = torch.cat([system, tokens(4, 6)], 1)
    assert torch.equal(prefixes.generate(alone, max_new_tokens=6), model.generate(alone, max_new_tokens=6))
    assert prefixes.reused == 11
    batch = torch.cat([system.expand(3, -1), tokens(4, 7, 3)], 1)
    assert torch.equal(prefixes.generate(batch, max_new_tokens=6), model.generate(batch, max_new_tokens=6))
    part = torch.cat([system[:, :7], tokens(6, 8)], 1)
    part[0, 7] = (int(system[0, 7]) + 1) % 58 + 3
    assert torch.equal(prefixes.generate(part, max_new_tokens=6), model.generate(part, max_new_tokens=6))
    assert prefixes.reused == 7
    rows = [torch.cat([system[0], tokens(n, n)[0]]) for n in (2, 5, 3)]
    ids, mask = padded(rows)
    found = prefixes.generate(ids, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, max_new_tokens=6))
    assert prefixes.reused == 11
    whole = prefixes.generate(system, max_new_tokens=4)
    assert torch.equal(whole, model.generate(system, max_new_tokens=4)) and prefixes.reused == 10


def test_a_beginning_is_run_once_and_shared_until_written(models, lengths):
    model = models["LlamaForCausalLM"]
    prefixes = PrefixCache(model)
    prefixes.add(tokens(20))
    assert lengths == [20]
    stored = next(iter(prefixes._entries.values()))
    before = [keys.clone() for keys, _ in stored.layers]
    prompt = torch.cat([tokens(20), tokens(3, 1)], 1)
    first, second = prefixes.start(prompt), prefixes.start(prompt.expand(4, -1))
    for cache in (first, second):
        assert cache[0][0].data_ptr() == stored.layers[0][0].data_ptr(), "not copied yet"
    lengths.clear()
    model.generate(prompt, past_key_values=first, max_new_tokens=2)
    assert lengths[0] == 3 and max(lengths) == 3
    assert first[0][0].data_ptr() != stored.layers[0][0].data_ptr()
    assert all(torch.equal(a, keys) for a, (keys, _) in zip(before, stored.layers, strict=True))
    assert second.batch_size == 4 and second.nbytes == stored.nbytes
    assert prefixes.add(torch.cat([tokens(20), tokens(5, 2)], 1)) == 5, "the rest is all that runs"


def test_memory_is_bounded_and_the_oldest_goes_first(models):
    model = models["LlamaForCausalLM"]
    one = PrefixCache(model)
    one.add(tokens(10))
    prefixes = PrefixCache(model, max_bytes=2 * one.nbytes)
    assert one.nbytes == 2 * 2 * 10 * 16 * 4
    for seed in (1, 2):
        prefixes.add(tokens(10, seed))
    assert prefixes.start(torch.cat([tokens(10, 1), tokens(1)], 1)) is not None
    prefixes.add(tokens(10, 3))
    assert len(prefixes) == 2 and prefixes.nbytes == 2 * one.nbytes
    assert prefixes.start(torch.cat([tokens(10, 2), tokens(1)], 1)) is None and prefixes.reused == 0
    assert prefixes.start(torch.cat([tokens(10, 1), tokens(1)], 1)) is not None
    with pytest.raises(GenerationError, match=r"more memory than.*expected 7680 or more, found 5120.*Raise"):
        prefixes.add(tokens(30, 4))
    prefixes.clear()
    assert len(prefixes) == 0 and prefixes.nbytes == 0


def test_what_has_no_beginning_in_common_runs_as_ever(models):
    model = models["LlamaForCausalLM"]
    prefixes = PrefixCache(model)
    ids = tokens(6, 3)
    assert torch.equal(prefixes.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    prefixes.add(tokens(6, 3))
    right = torch.cat([tokens(6, 3), torch.zeros(1, 2, dtype=torch.int64)], 1)
    assert prefixes.start(right) is None, "without a mask, zeros are padding"
    assert prefixes.start(right, (right != 0).long()) is None
    for wrong, message in (
        (tokens(3, batch=2), "A beginning is one row"),
        (tokens(3) + 99, "outside the voc"),
    ):
        with pytest.raises(GenerationError, match=message):
            prefixes.add(wrong)
    with pytest.raises(GenerationError, match="max_bytes must be 1 or more"):
        PrefixCache(model, 0)


def test_beginnings_with_sampling_and_several_sequences(models):
    model = models["LlamaForCausalLM"]
    prefixes = PrefixCache(model)
    prefixes.add(tokens(8))
    prompt = torch.cat([tokens(8), tokens(2, 1)], 1)
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    found = prefixes.generate(prompt, **settings, generator=torch.Generator().manual_seed(0))
    plain = model.generate(prompt, **settings, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, plain)
