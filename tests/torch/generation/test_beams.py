# SPDX-License-Identifier: Apache-2.0
"""Beam search and beam sampling: sequences, scores and beam indices equal transformers'."""

import functools

import pytest
import torch

import pretrained
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.errors import GenerationError
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.generation import hypotheses, mixin
from pretrained.torch.generation.stopping import StoppingCriteria
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.generation import ENDS, SIZES, T5_SIZES, build, left_padded, prompt
from support.oracle import transformers_twin


@pytest.fixture(scope="module")
def llama():
    return build(LlamaForCausalLM, LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def mistral():
    return build(MistralForCausalLM, MistralForCausalLM.config_class(**SIZES, sliding_window=6))


@pytest.fixture(scope="module")
def t5():
    return build(T5ForConditionalGeneration, T5Config(**T5_SIZES))


def same(pair, *args, seed=0, **kwargs):
    """Search with both, seeded alike; compare all that beams are; return ours."""
    kwargs = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True, **kwargs}
    ours, theirs = pair
    torch.manual_seed(seed)
    expected = theirs.generate(*args, **kwargs)
    torch.manual_seed(seed)
    found = ours.generate(*args, **kwargs)
    assert set(found.keys()) == set(expected.keys()) and type(found).__name__ == type(expected).__name__
    assert torch.equal(found.beam_indices, expected.beam_indices), (found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    start = found.sequences.shape[1] - found.beam_indices.shape[1]
    over = torch.nn.functional.pad(found.beam_indices < 0, (start, 0))
    # Transformers fills with the end token where the padding token is 0.
    pad = kwargs.get("pad_token_id", ours.config.pad_token_id)
    assert torch.equal(found.sequences, expected.sequences.masked_fill(over, pad))
    check_scores(ours, found, kwargs.get("length_penalty", 1.0))
    return found


def check_scores(model, found, length_penalty):
    """The scores of the tokens add up to the sequences' own."""
    parts = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    lengths = (found.beam_indices >= 0).sum(-1)
    torch.testing.assert_close(parts.sum(-1) / lengths**length_penalty, found.sequences_scores)


SETTINGS = {
    "plain": {"max_new_tokens": 20},
    "wide": {"max_new_tokens": 15, "num_beams": 8, "num_return_sequences": 5},
    "max_length": {"max_length": 17},
    "one end": {"max_new_tokens": 20, "eos_token_id": 7, "num_return_sequences": 3},
    "many ends": {"max_new_tokens": 20, "eos_token_id": ENDS, "num_return_sequences": 3},
    "no end": {"max_new_tokens": 12, "eos_token_id": None},
    "early": {"max_new_tokens": 20, "eos_token_id": ENDS, "early_stopping": True},
    "never": {"max_new_tokens": 20, "eos_token_id": ENDS, "early_stopping": "never"},
    "never, longer": {
        "max_new_tokens": 20, "eos_token_id": ENDS, "early_stopping": "never", "length_penalty": 2.0,
    },
    "shorter": {"max_new_tokens": 20, "eos_token_id": ENDS, "length_penalty": -1.0},
    "sums": {"max_new_tokens": 20, "eos_token_id": ENDS, "length_penalty": 0.0},
    "min new": {"max_new_tokens": 20, "min_new_tokens": 6, "eos_token_id": ENDS},
    "other padding": {"max_new_tokens": 20, "eos_token_id": ENDS, "pad_token_id": 5},
    "penalties": {"max_new_tokens": 20, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bans": {
        "max_new_tokens": 15,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [8, 9],
        "begin_suppress_tokens": [10, 11],
        "sequence_bias": [[[12], 3.0], [[12, 13], 8.0]],
    },
    "forced": {"max_new_tokens": 12, "forced_bos_token_id": 4, "forced_eos_token_id": 2},
    "decay": {"max_new_tokens": 20, "exponential_decay_length_penalty": (3, 1.6)},
    "encoder": {"max_new_tokens": 15, "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "prefix": {
        "max_new_tokens": 12,
        "prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 61, 3 + row, 20, int(ids[-1]) % 7 + 30],
    },
    "sample": {"max_new_tokens": 15, "do_sample": True, "eos_token_id": ENDS},
    "sample, filters": {
        "do_sample": True, "max_new_tokens": 15, "temperature": 1.4, "top_k": 30, "top_p": 0.9,
        "renormalize_logits": True, "num_return_sequences": 2,
    },
    "no cache": {"max_new_tokens": 10, "use_cache": False},
    "static": {"max_new_tokens": 12, "cache_implementation": "static"},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_llama(llama, settings):
    same(llama, prompt(rows=2), **settings)
    ids, mask = left_padded()
    same(llama, ids, attention_mask=mask, seed=2, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_t5(t5, settings):
    same(t5, prompt(rows=1), **settings)
    ids = prompt()
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    same(t5, ids, attention_mask=mask, seed=1, **settings)


@pytest.mark.parametrize("name", ["plain", "many ends", "sample", "no cache"])
def test_sliding_windows(mistral, name):
    same(mistral, prompt(length=9), **SETTINGS[name])
    ids, mask = left_padded(length=9)
    same(mistral, ids, attention_mask=mask, **SETTINGS[name])


FAMILIES = {
    "GPT2LMHeadModel": {
        "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "BertLMHeadModel": {
        **{name: value for name, value in SIZES.items() if name != "num_key_value_heads"}, "is_decoder": True,
    },
    "Qwen2ForCausalLM": {
        **SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    },
    "MT5ForConditionalGeneration": T5_SIZES,
    "UMT5ForConditionalGeneration": T5_SIZES,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    cls = getattr(pretrained, name)
    pair = build(cls, cls.config_class(**FAMILIES[name]))
    same(pair, prompt(), max_new_tokens=12)
    if "T5" not in name:
        ids, mask = left_padded()
        same(pair, ids, attention_mask=mask, max_new_tokens=12, eos_token_id=ENDS)
    same(pair, prompt(), max_new_tokens=12, cache_implementation="static", eos_token_id=ENDS)


def test_a_decoder_that_looks_at_an_encoder():
    cls = pretrained.GPT2LMHeadModel
    pair = build(cls, cls.config_class(**FAMILIES["GPT2LMHeadModel"], add_cross_attention=True))
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    given = {"encoder_hidden_states": states, "max_new_tokens": 8, "num_beams": 3, "eos_token_id": None}
    found = pair[0].generate(prompt(rows=2), **given)
    for row in range(2):
        alone = pair[0].generate(
            prompt(rows=2)[row:][:1], **{**given, "encoder_hidden_states": states[row:][:1]}
        )
        assert torch.equal(found[row], alone[0])
    other = pair[0].generate(prompt(rows=2), **{**given, "encoder_hidden_states": -states})
    assert not torch.equal(found, other)


# -- inputs and caches ---------------------------------------------------------------------------


def test_left_padding_changes_nothing(llama):
    ids, mask = left_padded()
    settings = {"max_new_tokens": 15, "num_beams": 4, "eos_token_id": ENDS}
    batch = llama[0].generate(ids, attention_mask=mask, **settings)
    for row in range(3):
        alone = llama[0].generate(ids[row : row + 1, 2 * row :], **settings)[0]
        padded = batch[row, 2 * row :]
        assert torch.equal(padded[: len(alone)], alone) and bool((padded[len(alone) :] == 0).all())


def test_embeddings_as_prompt(llama):
    ids = prompt()
    embeds = llama[0].get_input_embeddings()(ids)
    found = same(llama, inputs_embeds=embeds, max_new_tokens=9)
    plain = llama[0].generate(ids, max_new_tokens=9, num_beams=3)
    assert torch.equal(found.sequences, plain[:, 8:])
    again = llama[0].generate(inputs_embeds=embeds, max_new_tokens=9, num_beams=3, use_cache=False)
    assert torch.equal(again, found.sequences)


def test_encoder_outputs_and_decoder_prompts(t5):
    ids = prompt()
    start = torch.tensor([[0, 5], [0, 6], [0, 7]])
    found = same(t5, ids, decoder_input_ids=start, max_new_tokens=9).sequences
    assert torch.equal(found[:, :2], start)
    outputs = t5[0].get_encoder()(ids, return_dict=True)
    again = t5[0].generate(
        encoder_outputs=outputs, decoder_input_ids=start, max_new_tokens=9, num_beams=3, use_cache=False
    )
    assert torch.equal(again, found)


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config, 64)])
@pytest.mark.parametrize("spread", [False, True])
def test_going_on_from_a_cache(llama, kind, spread):
    model, ids = llama[0], prompt()
    plain = model.generate(ids, max_new_tokens=9, num_beams=3)
    cache = kind(model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    if spread:
        # As transformers wants it: a row for each beam.
        cache.batch_repeat_interleave(3)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=9, num_beams=3)
    assert torch.equal(found, plain)
    assert cache.batch_size == 9


def test_the_prompt_is_run_once_and_the_encoder_is_shared(t5, llama, monkeypatch):
    for model, name in ((t5[0], "decoder_input_ids"), (llama[0], "input_ids")):
        rows = []
        forward = type(model).forward

        @functools.wraps(forward)
        def spy(self, *args, rows=rows, forward=forward, name=name, **kwargs):
            rows.append(kwargs[name].shape[0])
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", spy)
        out = model.generate(
            prompt(), num_beams=4, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
        )
        # Later steps need not go through the forward.
        assert rows[0] == 3 and set(rows[1:]) <= {12}
        assert out.past_key_values.batch_size == 12
        if model is t5[0]:
            assert out.past_key_values.cross_attention_cache.batch_size == 3


class Hooked(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_class_that_prepares_its_own_inputs(llama, use_cache):
    hooked = Hooked(LlamaConfig(**SIZES)).eval()
    hooked.load_state_dict(llama[0].state_dict())
    ids, mask = left_padded()
    settings = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "use_cache": use_cache}
    assert torch.equal(hooked.generate(ids, **settings), llama[0].generate(ids, **settings))


# -- what comes back -----------------------------------------------------------------------------


def assert_same_values(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
        return
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_values(a, b)


EXTRAS = {"output_logits": True, "output_attentions": True, "output_hidden_states": True}


@pytest.mark.parametrize("name", ["plain", "many ends", "penalties", "sample", "no cache"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_everything_that_can_be_returned(family, name, request):
    pair = request.getfixturevalue(family)
    settings = {**SETTINGS[name], **EXTRAS, "max_new_tokens": 6, "num_beams": 3}
    found = same(pair, prompt(), **settings)
    torch.manual_seed(0)
    expected = pair[1].generate(prompt(), **settings, output_scores=True, return_dict_in_generate=True)
    for field in set(expected.keys()) - {"sequences", "past_key_values"}:
        assert_same_values(found[field], expected[field])
    if name != "no cache":
        # A search that has ended does not feed its last tokens.
        assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for normalize in (False, True):
        mine, peers = (
            model.compute_transition_scores(
                found.sequences, found.scores, found.beam_indices.long(), normalize_logits=normalize
            )
            for model in pair
        )
        torch.testing.assert_close(mine, peers)


def test_scores_are_returned_where_they_are_asked_for(llama):
    out = llama[0].generate(prompt(), num_beams=2, max_new_tokens=3, return_dict_in_generate=True)
    assert out.sequences_scores is None and out.scores is None and out.beam_indices is not None


@pytest.mark.parametrize("name", ["plain", "many ends", "early", "never", "sample", "forced", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_looking_one_step_behind_changes_nothing(family, name, request, monkeypatch):
    ours = request.getfixturevalue(family)[0]
    settings = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True, **SETTINGS[name]}
    outputs = []
    for behind in (False, True):
        monkeypatch.setattr(mixin, "_may_look_behind", lambda *_, behind=behind: behind)
        torch.manual_seed(0)
        outputs.append(ours.generate(prompt(), **settings))
    at_once, behind = outputs
    assert torch.equal(at_once.sequences, behind.sequences)
    assert torch.equal(at_once.beam_indices, behind.beam_indices)
    assert len(at_once.scores) == len(behind.scores)
    lengths = [out.past_key_values.get_seq_length() for out in outputs]
    assert lengths[0] == lengths[1]


# -- stopping ------------------------------------------------------------------------------------


class Says(StoppingCriteria):
    """Ends sequences whose last two tokens add up to a multiple of 5."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] + input_ids[:, -2]) % 5 == 0


class Scored(StoppingCriteria):
    """Notes how many steps' scores it is shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(len(scores))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_rules_for_stopping_look_at_whole_candidates(llama, t5):
    for pair in (llama, t5):
        same(pair, prompt(), stopping_criteria=[Says()], max_new_tokens=15, num_return_sequences=2)
        ours, theirs = Scored(), Scored()
        for model, rule in zip(pair, (ours, theirs), strict=True):
            model.generate(
                prompt(), num_beams=2, stopping_criteria=[rule], max_new_tokens=4,
                output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        assert ours.seen == theirs.seen


class Letters:
    def decode(self, ids):
        return "".join(chr(0x4E00 + token) for token in ids)


def test_stop_strings(llama):
    letters = Letters()
    settings = {"num_beams": 3, "max_new_tokens": 25, "num_return_sequences": 3, "eos_token_id": None}
    # Shorter ones win.
    settings["length_penalty"] = -1.0
    free = llama[0].generate(prompt(), **settings)
    stop = letters.decode(free[0, 10:12].tolist())
    found = llama[0].generate(
        prompt(), **settings, stop_strings=stop, tokenizer=letters, return_dict_in_generate=True
    )
    ended = (found.beam_indices >= 0).sum(-1) < 25
    assert bool(ended.any())
    for row in ended.nonzero().flatten().tolist():
        length = 8 + int((found.beam_indices[row] >= 0).sum())
        assert letters.decode(found.sequences[row, :length].tolist()).endswith(stop)
        # No id stands for what is not there.
        assert bool((found.sequences[row, length:] <= 0).all())


def test_time_is_up(llama):
    found = llama[0].generate(prompt(), num_beams=3, max_new_tokens=50, max_time=1e-9, eos_token_id=None)
    assert found.shape == (3, 9)


# -- bad input -----------------------------------------------------------------------------------


def test_scores_that_are_not_numbers(llama):
    def broken(ids, scores):
        if ids.shape[1] == 10:
            scores[3:5] = float("nan")
        return scores

    for settings in ({}, {"do_sample": True}):
        with pytest.raises(GenerationError, match=r"not numbers \(step 2, row 1\)"):
            llama[0].generate(prompt(), num_beams=3, logits_processor=[broken], max_new_tokens=6, **settings)


# -- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "places", "count"), [(2, 61, 8), (1, 8192, 8), (3, 5000, 6), (2, 49152 * 4, 16)]
)
def test_the_best_of_many(rows, places, count):
    scores = torch.randn(rows, places, generator=torch.Generator().manual_seed(rows))
    scores[:, -3:] += 2
    best, index = hypotheses.top(scores, count)
    expected, places_of = scores.topk(count)
    assert torch.equal(best, expected) and torch.equal(index, places_of)
    scores[0, 7] = float("nan")
    assert bool(hypotheses.top(scores, count)[0][0, 0].isnan())


# -- trained weights -----------------------------------------------------------------------------


@pytest.mark.realweights
@pytest.mark.slow
def test_a_trained_model(smollm2_gguf):
    model = pretrained.AutoModelForCausalLM.from_pretrained(smollm2_gguf)
    tokenizer = pretrained.AutoTokenizer.from_pretrained(smollm2_gguf, padding_side="left")
    pair = (model, transformers_twin(model))
    texts = ["The three primary colours are", "Monday, Tuesday,", "Once upon a time there was a"]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    end = {"eos_token_id": model.generation_config.eos_token_id or 2, "pad_token_id": 3}
    for settings in (
        {"num_beams": 4, "max_new_tokens": 16, "num_return_sequences": 2},
        {"num_beams": 2, "max_new_tokens": 12, "no_repeat_ngram_size": 2, "length_penalty": 2.0},
        {"num_beams": 3, "max_new_tokens": 8, "do_sample": True},
    ):
        same(pair, **batch, **end, **settings)
