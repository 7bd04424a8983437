# SPDX-License-Identifier: Apache-2.0
"""Tokens, scores and returned values equal transformers' on tiny random models, whatever is asked for."""

import pytest
import torch
import transformers

from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.generation import mixin
from pretrained.torch.generation.logits import LogitsProcessor
from pretrained.torch.generation.stopping import MaxLengthCriteria
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.generation import ENDS, SIZES, T5_SIZES, build, left_padded, prompt


@pytest.fixture(scope="module")
def llama():
    return build(LlamaForCausalLM, LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def mistral():
    return build(MistralForCausalLM, MistralForCausalLM.config_class(**SIZES, sliding_window=6))


@pytest.fixture(scope="module")
def t5():
    return build(T5ForConditionalGeneration, T5Config(**T5_SIZES))


@pytest.fixture(scope="module")
def gpt2():
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return build(GPT2LMHeadModel, GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def same(pair, *args, seed=0, **kwargs):
    """Generate with both, seeded alike, and compare the tokens; return ours."""
    ours, theirs = pair
    torch.manual_seed(seed)
    expected = theirs.generate(*args, **kwargs)
    torch.manual_seed(seed)
    found = ours.generate(*args, **kwargs)
    assert found.dtype == torch.int64 and torch.equal(found, expected), (found, expected)
    return found


SETTINGS = {
    "greedy": {"max_new_tokens": 20},
    "max_length": {"max_length": 20},
    "ends": {"max_new_tokens": 30, "eos_token_id": ENDS},
    "no end": {"max_new_tokens": 12, "eos_token_id": None},
    "min new": {"max_new_tokens": 20, "min_new_tokens": 6, "eos_token_id": ENDS},
    "min length": {"max_new_tokens": 20, "min_length": 14, "eos_token_id": ENDS},
    "other padding": {"max_new_tokens": 30, "eos_token_id": ENDS, "pad_token_id": 5},
    "penalties": {"max_new_tokens": 20, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bans": {
        "max_new_tokens": 20,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [8, 9],
        "begin_suppress_tokens": [10, 11],
        "sequence_bias": [[[12], 3.0], [[12, 13], 8.0]],
    },
    "forced": {"max_new_tokens": 12, "forced_bos_token_id": 4, "forced_eos_token_id": 2},
    "decay": {"max_new_tokens": 30, "exponential_decay_length_penalty": (3, 1.6)},
    "encoder": {
        "max_new_tokens": 20,
        "encoder_repetition_penalty": 1.5,
        "encoder_no_repeat_ngram_size": 2,
    },
    "sample": {"do_sample": True, "max_new_tokens": 20},
    "sample, all filters": {
        "do_sample": True,
        "max_new_tokens": 20,
        "temperature": 1.4,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.95,
        "epsilon_cutoff": 0.001,
        "eta_cutoff": 0.001,
        "renormalize_logits": True,
    },
    "sample, top_k off": {"do_sample": True, "max_new_tokens": 20, "top_k": None, "temperature": 2.0},
    "several": {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 3, "eos_token_id": ENDS},
    "prefix": {
        "max_new_tokens": 12,
        "prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 61, 3 + row, 20],
    },
    "no cache": {"max_new_tokens": 12, "use_cache": False},
    "static": {"max_new_tokens": 12, "cache_implementation": "static"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_llama(llama, settings):
    same(llama, prompt(), **settings)
    same(llama, prompt(rows=1), seed=1, **settings)
    ids, mask = left_padded()
    same(llama, ids, attention_mask=mask, seed=2, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_t5(t5, settings):
    settings = dict(settings)
    if "prefix_allowed_tokens_fn" in settings:
        settings["prefix_allowed_tokens_fn"] = lambda row, ids: [len(ids) % 61, 3 + row, 20]
    same(t5, prompt(), **settings)
    ids = prompt()
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    same(t5, ids, attention_mask=mask, seed=1, **settings)


@pytest.mark.parametrize("name", ["greedy", "ends", "sample, all filters", "no cache"])
def test_sliding_windows(mistral, name):
    same(mistral, prompt(length=9), **SETTINGS[name])
    ids, mask = left_padded(length=9)
    same(mistral, ids, attention_mask=mask, **SETTINGS[name])


def test_default_length_is_20_new_tokens(llama):
    assert llama[0].generate(prompt(), eos_token_id=None).shape == (3, 28)


def test_padding_is_found_without_a_mask(llama):
    ids, mask = left_padded()
    found = same(llama, ids, max_new_tokens=10)
    assert torch.equal(found, llama[0].generate(ids, attention_mask=mask, max_new_tokens=10))


def test_left_padding_changes_nothing(llama):
    ids, mask = left_padded()
    batch = llama[0].generate(ids, attention_mask=mask, max_new_tokens=15, eos_token_id=None)
    for row in range(3):
        alone = llama[0].generate(ids[row : row + 1, 2 * row :], max_new_tokens=15, eos_token_id=None)
        assert torch.equal(batch[row, 2 * row :], alone[0])


def test_embeddings_as_prompt(llama):
    ids = prompt()
    embeds = llama[0].get_input_embeddings()(ids)
    found = same(llama, inputs_embeds=embeds, max_new_tokens=9)
    plain = llama[0].generate(ids, max_new_tokens=9)
    assert torch.equal(found, plain[:, 8:])
    assert torch.equal(same(llama, ids, inputs_embeds=embeds, max_new_tokens=9), plain)
    assert same(llama, inputs_embeds=embeds, max_length=12, eos_token_id=None).shape == (3, 4)
    without_cache = llama[0].generate(inputs_embeds=embeds, max_new_tokens=9, use_cache=False)
    assert torch.equal(without_cache, found)


def test_encoder_outputs_and_embeddings(t5):
    ids = prompt()
    plain = same(t5, ids, max_new_tokens=9)
    embeds = t5[0].get_input_embeddings()(ids)
    assert torch.equal(same(t5, inputs_embeds=embeds, max_new_tokens=9), plain)
    for form in (lambda out: out, lambda out: out.to_tuple()):
        outputs = form(t5[0].get_encoder()(ids, return_dict=True))
        assert torch.equal(t5[0].generate(encoder_outputs=outputs, max_new_tokens=9), plain)


def test_decoder_prompts(t5):
    ids = prompt()
    start = torch.tensor([[0, 5], [0, 6], [0, 7]])
    assert torch.equal(same(t5, ids, decoder_input_ids=start, max_new_tokens=9)[:, :2], start)
    found = same(t5, ids, decoder_input_ids=start[:, 1:], max_new_tokens=9)
    assert torch.equal(found[:, :2], start)
    same(t5, ids, decoder_start_token_id=9, max_new_tokens=9)


def test_nothing_but_a_beginning(llama):
    assert same(llama, max_new_tokens=5)[0, 0] == 1


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config, 64)])
def test_going_on_from_a_cache(llama, kind):
    model = llama[0]
    cache = kind(model.config)
    ids = prompt()
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    assert cache.get_seq_length() == 12
    longer = torch.cat([first, prompt(length=3, seed=4)], dim=1)
    plain = model.generate(longer, max_new_tokens=6, eos_token_id=None)
    whole = model.generate(longer, past_key_values=cache, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(whole, plain)
    # The cache holds all but the newest token, so that is the only one to pass, with a mask over all.
    new = torch.cat([whole[:, -1:], prompt(length=2, seed=5)], dim=1)
    mask = torch.ones(3, cache.get_seq_length() + 3, dtype=torch.int64)
    only_new = model.generate(
        new, attention_mask=mask, past_key_values=cache, max_new_tokens=4, eos_token_id=None
    )
    expected = model.generate(torch.cat([whole, new[:, 1:]], 1), max_new_tokens=4, eos_token_id=None)
    assert torch.equal(only_new, expected[:, -7:])


def test_going_on_with_padding(llama):
    model = llama[0]
    ids, mask = left_padded()
    cache = DynamicCache(model.config)
    first = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, eos_token_id=None
    )
    longer = torch.cat([first, prompt(length=3, seed=4)], dim=1)
    wide = torch.cat([mask, torch.ones(3, 8, dtype=mask.dtype)], dim=1)
    plain = model.generate(longer, attention_mask=wide, max_new_tokens=6, eos_token_id=None)
    found = model.generate(
        longer, attention_mask=wide, past_key_values=cache, max_new_tokens=6, eos_token_id=None
    )
    assert torch.equal(found, plain)


def test_a_prompt_in_pieces(llama):
    ids, mask = left_padded(length=11)
    whole = llama[0].generate(ids, attention_mask=mask, max_new_tokens=7)
    for size in (1, 3, 11, 50):
        pieces = llama[0].generate(ids, attention_mask=mask, max_new_tokens=7, prefill_chunk_size=size)
        assert torch.equal(pieces, whole)


def assert_same_values(ours, theirs):
    assert ours is not None and theirs is not None
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
        return
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_values(a, b)


EXTRAS = {
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("name", ["greedy", "ends", "sample, all filters", "several", "no cache"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_everything_that_can_be_returned(family, name, request):
    ours, theirs = request.getfixturevalue(family)
    settings = {**SETTINGS[name], **EXTRAS, "max_new_tokens": 6}
    torch.manual_seed(0)
    expected = theirs.generate(prompt(), **settings)
    torch.manual_seed(0)
    found = ours.generate(prompt(), **settings)
    assert type(found).__name__ == type(expected).__name__
    fields = set(expected.keys()) - {"past_key_values"}
    assert fields == set(found.keys()) - {"past_key_values"}
    for field in fields:
        assert_same_values(found[field], expected[field])
    if name != "no cache":
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for normalize in (False, True):
        args = {"normalize_logits": normalize}
        mine = ours.compute_transition_scores(found.sequences, found.scores, **args)
        torch.testing.assert_close(
            mine,
            theirs.compute_transition_scores(expected.sequences, expected.scores, **args),
            rtol=2e-4,
            atol=2e-4,
        )


def test_transition_scores_of_beams(llama):
    theirs = llama[1]
    out = theirs.generate(
        prompt(),
        num_beams=3,
        max_new_tokens=8,
        eos_token_id=ENDS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for normalize in (False, True):
        args = (out.sequences, out.scores, out.beam_indices, normalize)
        mine = llama[0].compute_transition_scores(*args)
        torch.testing.assert_close(mine, theirs.compute_transition_scores(*args))


@pytest.mark.parametrize("name", ["greedy", "ends", "several", "no cache", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_looking_one_step_behind_changes_nothing(family, name, request, monkeypatch):
    ours = request.getfixturevalue(family)[0]
    settings = {**SETTINGS[name], **EXTRAS}
    outputs = []
    for behind in (False, True):
        monkeypatch.setattr(mixin, "_may_look_behind", lambda *_, behind=behind: behind)
        torch.manual_seed(0)
        outputs.append(ours.generate(prompt(), **settings))
    at_once, behind = outputs
    assert torch.equal(at_once.sequences, behind.sequences)
    assert len(at_once.scores) == len(behind.scores) == len(behind.logits)
    if name != "no cache":
        assert at_once.past_key_values.get_seq_length() == behind.past_key_values.get_seq_length()


def test_looking_one_step_behind_finds_nan_too(llama, monkeypatch):
    monkeypatch.setattr(mixin, "_may_look_behind", lambda *_: True)
    rule = [lambda ids, scores: scores * (float("nan") if ids.shape[1] == 10 else 1.0)]
    with pytest.raises(GenerationError, match=r"step 2, row 0"):
        llama[0].generate(prompt(), logits_processor=rule, max_new_tokens=9, eos_token_id=None)


def test_users_rules_and_criteria(llama):
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -float("inf")
            return scores

    def three_of_a_kind(input_ids, scores, **kwargs):
        return (input_ids[:, -3:] % 4 == 0).all(-1)

    class Oracle(transformers.LogitsProcessor):
        __call__ = Even.__call__

    class Rule(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return three_of_a_kind(input_ids, scores)

    settings = {"max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}
    expected = llama[1].generate(
        prompt(),
        logits_processor=transformers.LogitsProcessorList([Oracle()]),
        stopping_criteria=transformers.StoppingCriteriaList([Rule()]),
        **settings,
    )
    found = llama[0].generate(
        prompt(), logits_processor=[Even()], stopping_criteria=[three_of_a_kind], **settings
    )
    assert torch.equal(found.sequences, expected.sequences)
    assert all(logits.isfinite().all() for logits in found.logits)


@pytest.mark.parametrize("new", [3, 40])
def test_a_users_length_counts_whether_shorter_or_longer(llama, new, caplog):
    ids, mask = left_padded()
    settings = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    expected = llama[1].generate(ids, stopping_criteria=[transformers.MaxLengthCriteria(8 + new)], **settings)
    for more in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        rule = MaxLengthCriteria(8 + new)
        found = llama[0].generate(ids, stopping_criteria=[rule], **settings, **more)
        assert torch.equal(found, expected) and found.shape[1] == 8 + new
    assert "Your MaxLengthCriteria takes the place" in caplog.text


def test_rules_and_criteria_of_transformers_can_be_passed(llama):
    rules = [transformers.RepetitionPenaltyLogitsProcessor(1.3), transformers.TemperatureLogitsWarper(0.5)]
    criteria = [transformers.EosTokenCriteria(30), transformers.MaxTimeCriteria(60.0)]
    lists = {
        "logits_processor": transformers.LogitsProcessorList(rules),
        "stopping_criteria": transformers.StoppingCriteriaList(criteria),
    }
    same(llama, prompt(), max_new_tokens=20, **lists)


def test_config_objects_and_their_precedence(llama):
    ours, theirs = llama
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 9}
    torch.manual_seed(0)
    expected = theirs.generate(prompt(), transformers.GenerationConfig(**settings))
    torch.manual_seed(0)
    found = ours.generate(prompt(), GenerationConfig(**settings))
    assert torch.equal(found, expected)
    own = ours.generation_config
    ours.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0)
    try:
        assert ours.generate(prompt()).shape[1] == 11
        assert ours.generate(prompt(), GenerationConfig(max_new_tokens=4)).shape[1] == 12
        assert ours.generate(prompt(), GenerationConfig(max_new_tokens=4), max_new_tokens=5).shape[1] == 13
        assert ours.generate(prompt(), use_model_defaults=False).shape[1] == 28
        assert ours.generation_config.to_diff_dict() == {
            "max_new_tokens": 3,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
    finally:
        ours.generation_config = own


def test_a_generator_of_ones_own(llama):
    state = torch.random.get_rng_state()
    a, b, c = (
        llama[0].generate(
            prompt(), do_sample=True, temperature=3.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), state)
