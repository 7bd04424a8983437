# SPDX-License-Identifier: Apache-2.0
"""Rules for stopping against transformers' classes of the same names."""

import time

import pytest
import torch
from transformers.generation import stopping_criteria as oracle

from pretrained.errors import GenerationError
from pretrained.torch.generation import stopping
from support.toy import Toy

IDS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 2]])


@pytest.mark.parametrize("ends", [3, [3, 2], torch.tensor([6]), [9]], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_ends(ends, length):
    ids = IDS[:, :length]
    mine = stopping.EosTokenCriteria(ends)(ids, None)
    assert mine.dtype == torch.bool and torch.equal(mine, oracle.EosTokenCriteria(ends)(ids, None))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_lengths(length):
    mine = stopping.MaxLengthCriteria(length, max_position_embeddings=16)(IDS, None)
    assert torch.equal(mine, oracle.MaxLengthCriteria(length)(IDS, None))


@pytest.mark.parametrize("started", [0.0, 5.0])
def test_times(started):
    start = time.time() - started
    mine = stopping.MaxTimeCriteria(2.0, initial_timestamp=start)(IDS, None)
    assert torch.equal(mine, oracle.MaxTimeCriteria(2.0, initial_timestamp=start)(IDS, None))
    assert not stopping.MaxTimeCriteria(2.0)(IDS, None).any()


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_confidence(threshold, dtype):
    scores = (torch.zeros(3, 10), torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).to(dtype))
    mine = stopping.ConfidenceCriteria(threshold)(IDS, scores)
    theirs = oracle.ConfidenceCriteria(threshold)
    assert mine.tolist() == [theirs(IDS[row:], (None, scores[1][row:])) for row in range(3)]


def test_confidence_without_scores_says_what_to_pass():
    with pytest.raises(GenerationError, match=r"looks at scores, and none are kept.*output_scores=True"):
        Toy().generate(IDS[:1], stopping_criteria=[stopping.ConfidenceCriteria(0.5)], max_new_tokens=2)


def test_confidence_in_generate():
    """The toy is sure of every token alike: five above the others."""
    sure = float(torch.tensor([5.0] + [0.0] * 31).softmax(0)[0])
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    for threshold, new in ((sure - 0.01, 6), (sure + 0.01, 1)):
        rules = [stopping.ConfidenceCriteria(threshold)]
        output = Toy().generate(IDS[:1], stopping_criteria=rules, **settings)
        assert output.sequences.shape[1] == 3 + new


def test_any_rule_finishes_a_row():
    rules = [lambda ids, scores: ids[:, 0] == 4, lambda ids, scores: ids[:, -1] == 2]
    mine = stopping.StoppingCriteriaList(rules)(IDS, None)
    assert mine.tolist() == oracle.StoppingCriteriaList(rules)(IDS, None).tolist() == [False, True, True]
    assert stopping.StoppingCriteriaList()(IDS, None).tolist() == [False] * 3
    everything = stopping.StoppingCriteriaList([lambda ids, scores: True, *rules])
    assert everything(IDS, None).tolist() == [True] * 3
    assert everything.max_length is None
    assert stopping.StoppingCriteriaList([stopping.MaxLengthCriteria(7)]).max_length == 7
