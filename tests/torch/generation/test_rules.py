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
from support.rules import BIAS, CASES, EVERYTHING, INF, SOURCE, VOCAB, make


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

ORDER = [
    "SequenceBiasLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "PrefixConstrainedLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "Own", "TemperatureLogitsWarper",
    "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "WatermarkLogitsProcessor", "LogitNormalization",
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
        config,
        Lengths(30, 18, 5, 2),
        inputs,
        user=[Own()],
        prefix_allowed_tokens_fn=allowed,
        vocab_size=VOCAB,
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


# -- filters that sort only part of a large vocabulary ---------------------------------------------


def large(kind, rows=3, vocab=5000):
    gen = torch.Generator().manual_seed(2)
    scores = torch.randn(rows, vocab, generator=gen) * {"flat": 0.3, "plain": 3.0, "peaked": 8.0}.get(
        kind, 3.0
    )
    if kind == "few left":
        scores[scores < scores.topk(50).values[:, -1:]] = -INF
    if kind == "one row flat":
        scores[1] *= 0.05
    return torch.zeros(rows, 4, dtype=torch.int64), scores


@pytest.mark.parametrize("kind", ["flat", "plain", "peaked", "few left", "one row flat"])
@pytest.mark.parametrize("keep", [1, 3, 3000])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["TopPLogitsWarper", "TypicalLogitsWarper"])
def test_filters_on_a_large_vocabulary(name, share, keep, kind):
    ids, scores = large(kind)
    found = getattr(warpers, name)(share, -INF, keep)(ids, scores)
    expected = getattr(oracle, name)(share, -INF, keep)(ids, scores)
    if kind == "few left" and keep == 3000:
        # Which of the impossible tokens stay is of no account.
        return
    # Sums of thousands of float32 numbers leave the last token of such a share open.
    assert (found != expected).sum(-1).max() <= (1 if share > 0.99 else 0)


def test_filters_look_at_part_of_a_large_vocabulary_where_they_may():
    probs = large("peaked")[1].softmax(-1)
    assert 1 < warpers._count_likely(probs, 0.1, 1) < 1000
    assert warpers._count_likely(probs, 0.1, 1200) == 1200
    flat = large("flat")[1].softmax(-1)
    assert warpers._count_likely(flat, 0.1, 1) is None
    assert warpers._count_likely(probs[:, :100], 0.1, 1) is None
    assert warpers._count_likely(probs.to("meta"), 0.1, 1) is None
