# SPDX-License-Identifier: Apache-2.0
"""Rules of single families of models, against the slow numpy version and transformers' class."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError
from pretrained.testing import reference
from pretrained.torch.generation import model_rules
from support.toy import Toy

VOCAB = 29
NO_STAMPS, END = 18, 15
DTYPES = [torch.float32, torch.bfloat16]


def make(length, seed=0, rows=4):
    gen = torch.Generator().manual_seed(100 * seed + length)
    ids = torch.randint(0, VOCAB, (rows, length), generator=gen)
    scores = torch.randn(rows, VOCAB, generator=gen) * 2
    scores[0, 5] = -math.inf
    # A tie.
    scores[1, 4] = scores[1, 20]
    return ids, scores


def check(rule, theirs, slow, ids, scores, dtype):
    scores = scores.to(dtype)
    before = scores.clone()
    found = rule(ids, scores)
    expected = slow(ids.numpy(), scores.double().numpy())
    torch.testing.assert_close(found.double(), torch.from_numpy(expected))
    assert found.dtype == dtype and torch.equal(scores, before)
    if theirs is not None:
        assert torch.equal(found, theirs(ids, scores))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forced_tokens(dtype):
    pairs = [[3, 7], [5, 0], [6, None]]
    rule = model_rules.ForceTokensLogitsProcessor(pairs)
    assert rule.force_token_map == model_rules.ForceTokensLogitsProcessor({3: 7, 5: 0}).force_token_map
    for length in range(1, 8):
        check(rule, None, lambda i, s: reference.forced_tokens(i, s, {3: 7, 5: 0}), *make(length), dtype)


def test_forced_tokens_in_generate():
    ids = torch.tensor([[1, 1], [2, 3]])
    rule = model_rules.ForceTokensLogitsProcessor({3: 9})
    assert Toy().generate(ids, logits_processor=[rule], max_new_tokens=3)[:, 2:].tolist() == [
        [2, 9, 11],
        [5, 9, 14],
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alternating_codebooks(dtype):
    args = (4, 10, 8)
    rule, theirs = (m.AlternatingCodebooksLogitsProcessor(*args) for m in (model_rules, oracle))
    for length in range(4, 8):
        slow = lambda i, s: reference.alternating_codebooks(i, s, *args)  # noqa: E731
        check(rule, theirs, slow, *make(length), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", [3, [3, 8]])
def test_a_likely_end(ends, dtype):
    rule, theirs = (m.BarkEosPrioritizerLogitsProcessor(ends, 0.1) for m in (model_rules, oracle))
    listed = [ends] if isinstance(ends, int) else ends
    changed = 0
    for seed in range(6):
        ids, scores = make(5, seed)
        scores[2, 3] += 3
        check(rule, theirs, lambda i, s: reference.likely_end(i, s, listed, 0.1), ids, scores, dtype)
        changed += int((rule(ids, scores) != scores).any(-1).sum())
    assert 0 < changed < 24
    assert model_rules.BarkEosPrioritizerLogitsProcessor(3, None)(ids, scores) is scores


def test_guidance_in_one_batch():
    ids, scores = make(5)
    rule, theirs = (m.ClassifierFreeGuidanceLogitsProcessor(2.5) for m in (model_rules, oracle))
    scores[0, 5] = 0.0
    found = rule(ids[:2], scores)
    assert torch.equal(found, theirs(ids[:2], scores)) and found.shape == (2, VOCAB)
    given, free = scores.double().numpy()[:2], scores.double().numpy()[2:]
    np.testing.assert_allclose(found.numpy(), 2.5 * given - 1.5 * free, rtol=1e-4, atol=1e-5)
    with pytest.raises(GenerationError, match=r"with and without the prompt.*expected 8 rows, found 4"):
        rule(ids, scores)


def whisper(latest=3, joint=None, **more):
    config = SimpleNamespace(
        no_timestamps_token_id=NO_STAMPS,
        eos_token_id=END,
        bos_token_id=1,
        max_initial_timestamp_index=latest,
        **more,
    )
    return [m.WhisperTimeStampLogitsProcessor(config, 3, joint) for m in (model_rules, oracle)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("latest", [3, None])
def test_time_stamps(latest, joint, dtype):
    rule, theirs = whisper(latest, joint)
    for length in range(1, 9):
        for seed in range(4):
            ids, scores = make(length, seed, rows=8)
            # Many time stamps, text and stamps at the end in all combinations, none at all in a row.
            ids[:4, 3:] = NO_STAMPS + 1 + ids[:4, 3:] % 10
            ids[::2, -1:] %= END
            ids[1::4, -2:-1] %= END
            ids[7] %= END
            slow = lambda i, s: reference.time_stamps(i, s, NO_STAMPS, END, 3, latest, joint)  # noqa: E731
            check(rule, theirs, slow, ids, scores, dtype)


def test_time_stamps_take_their_settings_from_a_config():
    content = {
        "no_timestamps_token_id": NO_STAMPS,
        "eos_token_id": [END, END + 2],
        "max_initial_timestamp_index": 4,
    }
    rule = model_rules.WhisperTimeStampLogitsProcessor(GenerationConfig.from_dict(content), 2)
    assert (rule.eos_token_id, rule.timestamp_begin, rule.max_initial_timestamp_index) == (
        END,
        NO_STAMPS + 1,
        4,
    )
    assert rule._detect_timestamp_from_logprob
    rule.set_begin_index(5)
    ids, scores = make(5)
    assert not (rule(ids, scores)[:, : NO_STAMPS + 1] > -math.inf).any()
    off = whisper(_detect_timestamp_from_logprob=False)
    assert torch.equal(off[0](ids, scores), off[1](ids, scores))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: model_rules.AlternatingCodebooksLogitsProcessor(-1, 3, 3), "input_start_len cannot be -1"),
        (lambda: model_rules.BarkEosPrioritizerLogitsProcessor(2, 0.0), "min_eos_p cannot be 0.0"),
        (lambda: model_rules.BarkEosPrioritizerLogitsProcessor(-2, 0.1), "whole numbers of 0 or more"),
        (lambda: model_rules.ClassifierFreeGuidanceLogitsProcessor(1.0), "guidance_scale cannot be 1.0"),
        (lambda: model_rules.ForceTokensLogitsProcessor([[1, -4]]), "whole numbers of 0 or more"),
        (
            lambda: model_rules.WhisperTimeStampLogitsProcessor(GenerationConfig(), 1),
            "no field 'no_timestamps_token_id'",
        ),
    ],
)
def test_a_rule_that_cannot_work_says_so(build, text):
    with pytest.raises((GenerationError, AttributeError), match=text):
        build()
