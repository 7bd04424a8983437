# SPDX-License-Identifier: Apache-2.0
"""Every rule on scores of every kind: the same numbers as transformers' class, in the same signature."""

import dataclasses
import inspect
import math

import pytest
import torch
import transformers
from transformers.generation import (
    configuration_utils,
    logits_process,
    stopping_criteria,
    streamers,
    watermarking,
)

import pretrained
from pretrained.core.generation_config import GenerationConfig
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.rules import _merge, build_processors
from pretrained.torch.generation.settings import Lengths
from support.rules import CASES, EVERYTHING, SOURCE, make

INF = math.inf


def few_values(ids, scores):
    """Ties everywhere, at the edge of every filter too."""
    return ids, scores.round()


def all_the_same(ids, scores):
    return ids, torch.zeros_like(scores)


def mostly_impossible(ids, scores):
    """A row with two tokens left, one with a single one."""
    scores[1, 2:] = -INF
    scores[2, :-1] = -INF
    return ids, scores


def padded(ids, scores):
    ids[0, :4] = 0
    ids[1, :8] = 0
    return ids, scores


def one_token(ids, scores):
    return ids[:, :1], scores


def nothing_yet(ids, scores):
    return ids[:, :0], scores


def beams(ids, scores):
    """Two prompts, two rows that go on from each: rows of a prompt begin alike."""
    return torch.cat([ids[:2].repeat_interleave(2, 0)[:, :6], ids[:, 6:]], 1), scores


def far_apart(ids, scores):
    return ids, scores * 40


KINDS = [few_values, all_the_same, mostly_impossible, padded, one_token, nothing_yet, beams, far_apart]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_rule_on_scores_of_a_kind(kind, dtype):
    for name, args, _, _ in CASES:
        ids, scores = kind(*make(3))
        scores = scores.to(dtype)
        before = scores.clone()
        expected = getattr(logits_process, name)(*args)(ids, scores.clone())
        found = getattr(pretrained, name)(*args)(ids, scores)
        assert found.dtype == dtype and torch.equal(scores, before), (name, args)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=f"{name} {args}")


# -- signatures --------------------------------------------------------------------------------------

ROOMS = (logits_process, stopping_criteria, streamers, watermarking, configuration_utils)
SHARED = [
    name
    for name in pretrained.__all__
    # Settings of batching and compiling are not those of transformers; their own tests compare them.
    if name not in ("ContinuousBatchingConfig", "CompileConfig")
    and any(getattr(getattr(room, name, None), "__module__", "") == room.__name__ for room in ROOMS)
]


def parameters(cls):
    return [p for p in inspect.signature(cls).parameters.values() if p.name != "self"]


def test_most_rules_are_shared():
    assert len(SHARED) > 45


@pytest.mark.parametrize("name", SHARED)
def test_signatures_are_those_of_transformers(name):
    theirs = next(getattr(room, name) for room in ROOMS if hasattr(room, name))
    ours = getattr(pretrained, name)
    shared = len(parameters(theirs))
    same, more = parameters(ours)[:shared], parameters(ours)[shared:]
    assert [(p.name, p.kind) for p in same] == [(p.name, p.kind) for p in parameters(theirs)]
    assert all(p.kind is p.KEYWORD_ONLY for p in more)
    for own, other in zip(same, parameters(theirs), strict=True):
        # Rules here follow the scores to their device, and a default may stand where there was none.
        if own.name != "device" and other.default is not other.empty:
            assert own.default == other.default, own.name


@pytest.mark.parametrize(
    "name",
    [
        "GenerateDecoderOnlyOutput", "GenerateEncoderDecoderOutput", "GenerateBeamDecoderOnlyOutput",
        "GenerateBeamEncoderDecoderOutput",
    ],
)  # fmt: skip
def test_outputs_have_the_fields_of_transformers_in_their_order(name):
    theirs = getattr(transformers.generation, name)
    names = [field.name for field in dataclasses.fields(getattr(pretrained, name))]
    assert names == [field.name for field in dataclasses.fields(theirs)]


@pytest.mark.parametrize("kind", ["DecoderOnly", "EncoderDecoder"])
def test_old_names_of_outputs(kind):
    for strategies, name in (
        ("GreedySearch Sample ContrastiveSearch", "Generate"),
        ("BeamSearch BeamSample", "GenerateBeam"),
    ):
        for strategy in strategies.split():
            assert getattr(pretrained, f"{strategy}{kind}Output") is getattr(
                pretrained, f"{name}{kind}Output"
            )


# -- merging the user's rules, and the order --------------------------------------------------------------


class Own:
    """The same class for both libraries."""

    def __call__(self, input_ids, scores, **kwargs):
        return scores


def merged(ours, users):
    """What transformers makes of rules built by a config and a user's."""
    return transformers.GenerationMixin._merge_criteria_processor_list(None, ours, users)


@pytest.mark.parametrize(
    "users",
    [
        "", "own", "repetition", "own repetition own", "repetition repetition", "suppress own repetition",
        "again again", "repetition again again",
    ],
)  # fmt: skip
def test_a_users_rules_are_merged_as_in_transformers(users):
    again = Own()
    pieces = {
        "own": Own,
        "again": lambda: again,
        "repetition": lambda: pretrained.RepetitionPenaltyLogitsProcessor(2.0),
        "suppress": lambda: pretrained.SuppressTokensLogitsProcessor([3]),
    }
    mine = [pretrained.SuppressTokensLogitsProcessor([1]), pretrained.RepetitionPenaltyLogitsProcessor(1.3)]
    given = [pieces[name]() for name in users.split()]
    expected = merged(transformers.LogitsProcessorList(mine), given)
    assert _merge(mine, given) == list(expected)


ORDERS = [(missing, 1, 2) for missing in EVERYTHING]
ORDERS += [(None, beams, ends) for beams in (1, 3) for ends in (2, [2, 3, 5], None)]


@pytest.mark.parametrize(("missing", "beams", "ends"), ORDERS, ids=str)
def test_the_order_of_rules_is_that_of_transformers(missing, beams, ends):
    """With all of them, and with each one left out; filters keep as many tokens as there."""
    missing = "eos_token_id" if ends is None else missing
    settings = {name: value for name, value in EVERYTHING.items() if name != missing}
    settings["num_beams"] = beams
    if missing == "eos_token_id":
        del settings["exponential_decay_length_penalty"]
    else:
        settings["eos_token_id"] = ends
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=1)
    )
    # Elsewhere their defaults are filled in before.
    theirs = transformers.GenerationConfig(
        **{"top_k": 50, **settings}, max_length=30, decoder_start_token_id=0
    )
    model._prepare_special_tokens(theirs, device="cpu")
    expected = model._get_logits_processor(
        theirs,
        input_ids_seq_length=SOURCE.shape[1],
        encoder_input_ids=SOURCE,
        prefix_allowed_tokens_fn=lambda row, ids: [1],
        logits_processor=[Own()],
        device="cpu",
    )
    found = build_processors(
        GenerationConfig(**settings),
        Lengths(30, 18, settings.get("min_length", 0), settings.get("min_new_tokens", 0)),
        GenerationInputs(SOURCE, encoder_input_ids=SOURCE),
        user=[Own()],
        prefix_allowed_tokens_fn=lambda row, ids: [1],
        vocab_size=8,
    )
    for ours, other in zip(found, expected, strict=True):
        assert type(ours).__name__ == type(other).__name__
        assert getattr(ours, "min_tokens_to_keep", 1) == getattr(other, "min_tokens_to_keep", 1), ours
