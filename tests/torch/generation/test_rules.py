# SPDX-License-Identifier: Apache-2.0
"""Each rule on scores against the slow numpy version and against transformers' class of the same name."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError
from pretrained.testing import reference
from pretrained.torch.generation import logits, warpers
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.rules import build_criteria, build_processors
from pretrained.torch.generation.settings import Lengths

VOCAB, ROWS, LENGTH = 23, 4, 9
INF = math.inf


def make(seed=0, rows=ROWS, length=LENGTH):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (rows, length), generator=gen)
    scores = torch.randn(rows, VOCAB, generator=gen) * 3
    scores[0, 5] = -INF
    return ids, scores


SOURCE = torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(5))
BIAS = {(3,): -1.5, (2,): 4.0, (1, 4): 2.0, (6, 0): -INF, (1, 2, 3, 4): 9.0}

# Class in both libraries, its arguments, the slow version, its arguments.
CASES = [
    ("MinLengthLogitsProcessor", (10, [2, 4]), reference.min_length, (10, [2, 4])),
    ("MinLengthLogitsProcessor", (9, 2), reference.min_length, (9, [2])),
    ("MinNewTokensLengthLogitsProcessor", (7, 3, 2), reference.min_length, (10, [2])),
    ("RepetitionPenaltyLogitsProcessor", (1.7,), reference.repetition, (1.7,)),
    ("RepetitionPenaltyLogitsProcessor", (0.6, 4), reference.repetition, (0.6, 4)),
    (
        "RepetitionPenaltyLogitsProcessor",
        (1.7, torch.tensor([0, 3, 5, 8])),
        reference.repetition,
        (1.7, [0, 3, 5, 8]),
    ),
    ("EncoderRepetitionPenaltyLogitsProcessor", (1.4, SOURCE), lambda i, s: encoder_repetition(s, 1.4), ()),
    ("NoRepeatNGramLogitsProcessor", (1,), reference.no_repeated_ngram, (1,)),
    ("NoRepeatNGramLogitsProcessor", (2,), reference.no_repeated_ngram, (2,)),
    ("NoRepeatNGramLogitsProcessor", (3,), reference.no_repeated_ngram, (3,)),
    ("NoRepeatNGramLogitsProcessor", (30,), reference.no_repeated_ngram, (30,)),
    (
        "EncoderNoRepeatNGramLogitsProcessor",
        (2, SOURCE),
        reference.no_repeated_ngram,
        (2, SOURCE.numpy()),
    ),
    ("SequenceBiasLogitsProcessor", (BIAS,), reference.biased_sequences, (BIAS,)),
    (
        "NoBadWordsLogitsProcessor",
        ([[3], [1, 4], [6, 0], [2]], 2),
        reference.biased_sequences,
        ({(3,): -INF, (1, 4): -INF, (6, 0): -INF},),
    ),
    ("ForcedEOSTokenLogitsProcessor", (10, [2, 3]), reference.forced_last, (10, [2, 3])),
    ("ForcedEOSTokenLogitsProcessor", (12, 2), reference.forced_last, (12, [2])),
    ("ForcedBOSTokenLogitsProcessor", (2,), reference.forced_first, (2,)),
    (
        "ExponentialDecayLengthPenalty",
        ((2, 1.3), [2, 5], 4),
        reference.decaying_length,
        (2, 1.3, [2, 5], 4),
    ),
    ("ExponentialDecayLengthPenalty", ((9, 1.3), 2, 4), reference.decaying_length, (9, 1.3, [2], 4)),
    ("LogitNormalization", (), reference.log_normalised, ()),
    ("SuppressTokensLogitsProcessor", ([1, 4],), lambda i, s: reference.without(s, [1, 4]), ()),
    ("SuppressTokensAtBeginLogitsProcessor", ([1, 4], 9), reference.suppressed_at_begin, ([1, 4], 9)),
    ("SuppressTokensAtBeginLogitsProcessor", ([1, 4], 8), reference.suppressed_at_begin, ([1, 4], 8)),
    ("TemperatureLogitsWarper", (0.7,), lambda i, s: s / 0.7, ()),
    ("TopKLogitsWarper", (5,), reference.top_k, (5,)),
    ("TopKLogitsWarper", (99,), reference.top_k, (VOCAB,)),
    ("TopPLogitsWarper", (0.8,), reference.top_p, (0.8,)),
    ("TopPLogitsWarper", (0.01, -INF, 3), reference.top_p, (0.01, 3)),
    ("TopHLogitsWarper", (0.4,), reference.top_h, (0.4,)),
    ("MinPLogitsWarper", (0.1,), reference.min_p, (0.1,)),
    ("MinPLogitsWarper", (0.99, -INF, 4), reference.min_p, (0.99, 4)),
    ("TypicalLogitsWarper", (0.6,), reference.typical, (0.6,)),
    ("TypicalLogitsWarper", (0.2, -INF, 5), reference.typical, (0.2, 5)),
    ("EpsilonLogitsWarper", (0.05,), reference.epsilon, (0.05,)),
    ("EpsilonLogitsWarper", (0.9, -INF, 3), reference.epsilon, (0.9, 3)),
    ("EtaLogitsWarper", (0.3,), reference.eta, (0.3,)),
]


def encoder_repetition(scores, penalty):
    return reference.repetition(SOURCE.numpy().repeat(2, 0), scores, 1 / penalty)


class Ours:
    def __getattr__(self, name):
        return getattr(logits, name, None) or getattr(warpers, name)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "args", "slow", "slow_args"), CASES)
def test_rule_equals_reference_and_transformers(name, args, slow, slow_args, seed):
    ids, scores = make(seed)
    before_ids, before_scores = ids.clone(), scores.clone()
    ours = getattr(Ours(), name)(*args)(ids, scores)
    with np.errstate(invalid="ignore"):
        expected = slow(ids.numpy(), scores.numpy().astype(np.float64), *slow_args)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(ours, getattr(oracle, name)(*args)(ids, scores.clone()), rtol=1e-6, atol=1e-6)
    assert torch.equal(ids, before_ids) and torch.equal(scores, before_scores)


def test_forced_first_token():
    ids, scores = make(length=1)
    ours = logits.ForcedBOSTokenLogitsProcessor(3)(ids, scores)
    np.testing.assert_array_equal(ours.numpy(), reference.forced_first(ids.numpy(), scores.numpy(), 3))
    assert torch.equal(ours, oracle.ForcedBOSTokenLogitsProcessor(3)(ids, scores))


def test_rules_after_a_prompt_shorter_than_they_look_back():
    ids, scores = make(length=1)
    for build in (lambda m: m.NoRepeatNGramLogitsProcessor(3), lambda m: m.SequenceBiasLogitsProcessor(BIAS)):
        assert torch.equal(build(Ours())(ids, scores), build(oracle)(ids, scores))


def test_invalid_values_become_finite():
    ids, scores = make()
    scores[1, 2], scores[2, 3] = math.nan, INF
    ours = logits.InfNanRemoveLogitsProcessor()(ids, scores)
    np.testing.assert_array_equal(ours.numpy(), reference.finite(ids.numpy(), scores.numpy()))
    assert torch.equal(ours, oracle.InfNanRemoveLogitsProcessor()(ids, scores))


def test_ids_that_the_head_has_no_score_for_are_left_out():
    ids, scores = make()
    ids[:, 3] = VOCAB + 4
    ours = logits.RepetitionPenaltyLogitsProcessor(1.7)(ids, scores)
    np.testing.assert_allclose(
        ours.numpy(), reference.repetition(ids.numpy(), scores.numpy(), 1.7), rtol=1e-6
    )
    assert torch.equal(ours, oracle.RepetitionPenaltyLogitsProcessor(1.7)(ids, scores))
    banned = logits.NoRepeatNGramLogitsProcessor(1)(ids, scores)
    assert torch.equal(banned, oracle.NoRepeatNGramLogitsProcessor(1)(ids, scores))
    assert torch.equal(
        logits.SuppressTokensLogitsProcessor([1, VOCAB + 2])(ids, scores)[:, 2:], scores[:, 2:]
    )


def allowed(row, ids):
    return [row, 5] if int(ids[-1]) % 2 else [1, 2, 3]


@pytest.mark.parametrize("beams", [1, 2])
def test_prefix_constraint(beams):
    ids, scores = make()
    scores[:2, [0, 1, 2, 3, 5]] = -INF
    ours = logits.PrefixConstrainedLogitsProcessor(allowed, beams)(ids, scores)
    expected = reference.constrained_prefix(ids.numpy(), scores.numpy(), allowed, beams)
    np.testing.assert_array_equal(ours.numpy(), expected)
    assert torch.equal(ours, oracle.PrefixConstrainedLogitsProcessor(allowed, beams)(ids, scores))


def test_prefix_constraint_that_allows_nothing_names_the_row():
    ids, scores = make()
    rule = logits.PrefixConstrainedLogitsProcessor(lambda row, _: [] if row == 2 else [1])
    with pytest.raises(GenerationError, match=r"allows no token for row 2 .*Let it return at least one"):
        rule(ids, scores)


def test_a_bias_outside_the_vocabulary_is_named():
    ids, scores = make()
    with pytest.raises(GenerationError, match=r"expected ids below 23, found \[40, 50\]"):
        logits.SequenceBiasLogitsProcessor({(40, 1): 1.0, (50,): 2.0, (3,): 1.0})(ids, scores)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: logits.RepetitionPenaltyLogitsProcessor(0.0), "penalty cannot be 0.0"),
        (lambda: logits.NoRepeatNGramLogitsProcessor(0), "ngram_size cannot be 0"),
        (lambda: logits.MinLengthLogitsProcessor(-1, 2), "min_length cannot be -1"),
        (lambda: logits.SuppressTokensLogitsProcessor([-1]), "whole numbers of 0 or more"),
        (lambda: logits.SequenceBiasLogitsProcessor({}), "needs sequences of token ids"),
        (
            lambda: warpers.TemperatureLogitsWarper(0.0),
            "temperature cannot be 0.0: expected a number above 0",
        ),
        (lambda: warpers.TopKLogitsWarper(0), "top_k cannot be 0"),
        (lambda: warpers.TopPLogitsWarper(1.5), "top_p cannot be 1.5"),
        (lambda: warpers.TopPLogitsWarper(0.5, min_tokens_to_keep=0), "min_tokens_to_keep cannot be 0"),
        (lambda: warpers.TopHLogitsWarper(0.0), "top_h cannot be 0.0"),
        (lambda: warpers.MinPLogitsWarper(-0.1), "min_p cannot be -0.1"),
        (lambda: warpers.TypicalLogitsWarper(1.0), "typical_p cannot be 1.0"),
        (lambda: warpers.EpsilonLogitsWarper(0.0), "epsilon_cutoff cannot be 0.0"),
        (lambda: warpers.EtaLogitsWarper(1.0), "eta_cutoff cannot be 1.0"),
        (lambda: logits.LogitsProcessor()(None, None), "must define __call__"),
    ],
)
def test_a_rule_that_cannot_work_says_so(build, text):
    with pytest.raises((GenerationError, NotImplementedError), match=text):
        build()


def test_a_list_passes_extra_arguments_to_rules_that_take_them():
    ids, scores = make()
    rules = logits.LogitsProcessorList([lambda i, s, cur_len: s + cur_len, lambda i, s: s * 2])
    assert torch.equal(rules(ids, scores, cur_len=3, other=1), (scores + 3) * 2)


# -- from a config to its rules ------------------------------------------------------------------

EVERYTHING = {
    "sequence_bias": [[[3], -1.0]],
    "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[4]],
    "min_length": 5,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [2, 1.1],
    "suppress_tokens": [6],
    "begin_suppress_tokens": [7],
    "do_sample": True,
    "temperature": 0.7,
    "top_h": 0.9,
    "top_k": 10,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "renormalize_logits": True,
    "eos_token_id": 2,
}
ORDER = [
    "SequenceBiasLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor", "PrefixConstrainedLogitsProcessor", "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "Own", "TemperatureLogitsWarper",
    "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "LogitNormalization",
]  # fmt: skip


class Own(logits.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


def names(rules):
    return [type(rule).__name__ for rule in rules]


def test_order_of_all_rules():
    inputs = GenerationInputs(SOURCE, encoder_input_ids=SOURCE)
    config = GenerationConfig(**EVERYTHING)
    rules = build_processors(
        config, Lengths(30, 18, 5, 0), inputs, user=[Own()], prefix_allowed_tokens_fn=allowed
    )
    assert names(rules) == ORDER


def test_a_users_rule_of_the_same_class_takes_the_place_of_the_configs(caplog):
    own = warpers.TemperatureLogitsWarper(0.3)
    penalty = logits.RepetitionPenaltyLogitsProcessor(2.0)
    config = GenerationConfig(repetition_penalty=1.3, suppress_tokens=[1])
    rules = build_processors(config, Lengths(30, 18, 0, 0), GenerationInputs(SOURCE), user=[penalty, own])
    assert rules == [penalty, rules[1], own]
    assert names(rules)[1] == "SuppressTokensLogitsProcessor"
    assert "RepetitionPenaltyLogitsProcessor takes the place of the one" in caplog.text


def test_rules_that_lack_what_they_need_say_so():
    lengths, inputs = Lengths(30, 18, 0, 0), GenerationInputs(SOURCE)
    with pytest.raises(GenerationError, match="encoder_no_repeat_ngram_size looks at the ids of the input"):
        build_processors(GenerationConfig(encoder_no_repeat_ngram_size=2), lengths, inputs)
    with pytest.raises(GenerationError, match="makes the end likelier, and there is none"):
        build_processors(GenerationConfig(exponential_decay_length_penalty=(1, 1.1)), lengths, inputs)
    with pytest.raises(GenerationError, match=r"stop_strings are looked for in text.*Pass tokenizer="):
        build_criteria(GenerationConfig(stop_strings="x"), lengths)
