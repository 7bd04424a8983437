# SPDX-License-Identifier: Apache-2.0
"""Losses against transformers' and against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.loss import loss_utils as theirs

from pretrained.errors import ArgumentError
from pretrained.torch.losses import (
    causal_lm_loss,
    question_answering_loss,
    sequence_classification_loss,
    token_loss,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
COUNTS = pytest.mark.parametrize("count", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])


def random_logits(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def random_labels(high, *shape):
    labels = torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))
    labels.view(-1)[1] = -100
    return labels


def settings(num_labels, problem_type=None):
    return SimpleNamespace(num_labels=num_labels, problem_type=problem_type)


@DTYPES
@COUNTS
def test_causal_loss_is_transformers(dtype, count):
    logits, labels = random_logits(2, 5, 9, dtype=dtype), random_labels(9, 2, 5)
    expected = theirs.ForCausalLMLoss(logits, labels, 9, num_items_in_batch=count)
    found = causal_lm_loss(logits, labels, num_items_in_batch=count)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@DTYPES
@COUNTS
def test_masked_and_token_losses_are_transformers(dtype, count):
    logits, labels = random_logits(2, 5, 9, dtype=dtype), random_labels(9, 2, 5)
    found = token_loss(logits, labels, num_items_in_batch=count)
    torch.testing.assert_close(found, theirs.ForMaskedLMLoss(logits, labels, 9, num_items_in_batch=count))
    other = theirs.ForTokenClassification(logits, labels, settings(9), num_items_in_batch=count)
    torch.testing.assert_close(found, other)


def test_causal_loss_by_hand():
    # Uniform over four tokens but for a sure second step; the last position predicts nothing.
    logits = torch.zeros(1, 4, 4)
    logits[0, 1, 3] = 100.0
    labels = torch.tensor([[0, 1, 3, -100]])
    assert math.isclose(causal_lm_loss(logits, labels), math.log(4) / 2, rel_tol=1e-6)
    assert math.isclose(causal_lm_loss(logits, labels, num_items_in_batch=10), math.log(4) / 10, rel_tol=1e-6)


def test_causal_gradients_leave_out_what_is_ignored():
    logits = random_logits(1, 4, 5).requires_grad_()
    causal_lm_loss(logits, torch.tensor([[0, -100, 2, 3]])).backward()
    moved = logits.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        (settings(4), torch.tensor([0, 3, 2])),
        (settings(4, "single_label_classification"), torch.tensor([[0], [3], [2]])),
        (settings(4), torch.tensor([0, -100, 2])),
        (settings(4), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])),
        (settings(4, "multi_label_classification"), torch.rand(3, 4)),
        (settings(4, "regression"), torch.rand(3, 4)),
        (settings(1), torch.tensor([0.5, 1.5, -2.0])),
        (settings(1), torch.tensor([[0.5], [1.5], [-2.0]])),
        (settings(1, "multi_label_classification"), torch.tensor([[1.0], [0.0], [1.0]])),
    ],
    ids=lambda value: None if isinstance(value, SimpleNamespace) else f"{value.dtype}{list(value.shape)}",
)
def test_classification_loss_is_transformers(config, labels):
    logits = random_logits(3, config.num_labels)
    expected = theirs.ForSequenceClassificationLoss(labels, logits, settings(**vars(config)))
    torch.testing.assert_close(sequence_classification_loss(logits, labels, config), expected)


def test_classification_leaves_the_config_alone():
    # Transformers writes the first call's guess into the config, where it decides about all later ones.
    config = settings(4)
    sequence_classification_loss(random_logits(3, 4), torch.tensor([0, 1, 2]), config)
    assert config.problem_type is None
    sequence_classification_loss(random_logits(3, 4), torch.rand(3, 4), config)


def test_one_row_regresses_too():
    found = sequence_classification_loss(torch.tensor([[2.0]]), torch.tensor([5.0]), settings(1))
    assert found == 9.0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_narrow_whole_numbers_are_labels_too(dtype):
    labels = torch.tensor([0, 3, 2])
    logits = random_logits(3, 4)
    narrow = labels.to(dtype)
    assert token_loss(logits, narrow) == token_loss(logits, labels)
    config = settings(4, "single_label_classification")
    found = sequence_classification_loss(logits, narrow, config)
    assert found == sequence_classification_loss(logits, labels, config)
    ends = question_answering_loss(logits, logits, narrow, narrow)
    assert ends == question_answering_loss(logits, logits, labels, labels)


def test_whole_numbers_regress_where_asked():
    logits = torch.tensor([[1.0], [2.0]]).requires_grad_()
    loss = sequence_classification_loss(logits, torch.tensor([3, 2]), settings(1))
    assert loss == 2.0
    loss.backward()
    assert logits.grad.tolist() == [[-2.0], [0.0]]


def test_an_unknown_problem_type_is_refused():
    text = r"Unknown problem_type 'ranking' \(config.problem_type\): expected regression, single_label"
    with pytest.raises(ArgumentError, match=text):
        sequence_classification_loss(random_logits(3, 4), torch.tensor([0, 1, 2]), settings(4, "ranking"))


@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([0, 2, 5], [1, 3, 5]),
        ([0, 2, 6], [1, 99, 3]),  # beyond the text: left out
        ([[0], [2], [5]], [[1], [3], [5]]),
        ([-3, 2, 5], [1, 3, 5]),
    ],
)
def test_span_loss_is_transformers(starts, ends):
    start, end = random_logits(2, 3, 6)
    starts, ends = torch.tensor(starts), torch.tensor(ends)
    expected = theirs.ForQuestionAnsweringLoss(start, end, starts, ends)
    torch.testing.assert_close(question_answering_loss(start, end, starts, ends), expected)


def test_span_loss_by_hand():
    # Uniform over four tokens at one end; sure of the right token at the other.
    start, end = torch.zeros(1, 4), torch.tensor([[0.0, 100.0, 0.0, 0.0]])
    loss = question_answering_loss(start, end, torch.tensor([2]), torch.tensor([1]))
    assert math.isclose(loss, math.log(4) / 2, rel_tol=1e-6)
