# SPDX-License-Identifier: Apache-2.0
"""The losses that models compute when they are given labels; -100 marks a label to leave out."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError

IGNORED = -100


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each position's logits against its label, in float32.

    Args:
        logits: [..., classes].
        labels: [...], class indices or -100.
        num_items_in_batch: Labels in the whole accumulated batch, to divide the sum by; None for the
            mean over this call's labels.

    Raises:
        ArgumentError: a label is none of the classes (on a CPU; elsewhere the device says so).
    """
    logits = logits.float().reshape(-1, logits.shape[-1])
    if num_items_in_batch is None:
        return _cross_entropy(logits, labels)
    return _cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def causal_lm_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each position's logits against the next token.

    Args:
        logits: [batch, length, vocab].
        labels: [batch, length], the input ids or -100.
        num_items_in_batch: As for `token_loss`.
    """
    # The labels move rather than the logits: slicing those would copy the largest tensor there is.
    labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    return token_loss(logits, labels, num_items_in_batch=num_items_in_batch)


def sequence_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    """Loss of a sequence classifier, by `config.problem_type`.

    Args:
        logits: [batch, labels].
        labels: [batch] class indices, [batch] or [batch, labels] numbers (regression), or [batch,
            labels] zeros and ones (multi-label).
        config: Its `problem_type`, or where that is None `num_labels` and the labels' dtype, decide.

    Raises:
        ArgumentError: an unknown problem_type, or a label that is none of the classes.
    """
    kind = config.problem_type
    if kind is None:
        whole = labels.dtype in (torch.int32, torch.int64)
        kind = "single_label_classification" if whole else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else kind
    labels = labels.to(logits.device)
    if kind == "regression":
        if config.num_labels == 1:
            return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        return F.mse_loss(logits, labels.to(logits.dtype))
    if kind == "single_label_classification":
        return _cross_entropy(logits.view(-1, config.num_labels), labels)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    raise ArgumentError(
        f"Unknown problem_type {kind!r}",
        where="config.problem_type",
        expected="regression, single_label_classification or multi_label_classification",
    )


def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
) -> torch.Tensor:
    """Mean of the cross-entropies of both ends of the span; positions past the text do not count.

    Args:
        start_logits: [batch, length].
        end_logits: [batch, length].
        start_positions: [batch] or [batch, 1].
        end_positions: [batch] or [batch, 1].
    """
    length = start_logits.shape[1]
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        target = positions.squeeze(-1) if positions.dim() > 1 else positions
        target = target.to(logits.device).long().clamp(0, length)
        losses.append(F.cross_entropy(logits, target, ignore_index=length))
    return (losses[0] + losses[1]) / 2


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Return the cross-entropy of [rows, classes] logits, naming a label that is none (on a CPU)."""
    labels = labels.reshape(-1).to(logits.device).long()
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
    try:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
    except IndexError as error:
        # Only now: looking first would cost every step, and on a GPU a wait.
        wrong = labels[((labels < 0) | (labels >= logits.shape[-1])) & (labels != IGNORED)]
        raise ArgumentError(
            "A label is none of the classes",
            where="labels",
            expected=f"0 to {logits.shape[-1] - 1}, or {IGNORED} to leave one out",
            found=int(wrong[0]),
        ) from error
