# SPDX-License-Identifier: Apache-2.0
"""What the heads of encoders return from the stack's output, their logits and the labels.

Shapes: B batch, T tokens, D hidden, V vocabulary, C choices, N labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ConfigError
from pretrained.torch.losses import question_answering_loss, sequence_classification_loss, token_loss
from pretrained.torch.outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


def masked_lm_output(
    model: Any, out: Any, logits: torch.Tensor, labels: torch.Tensor | None
) -> MaskedLMOutput:
    """Return a masked language model's output.

    Args:
        model: The model, which says by what the loss is computed.
        out: The stack's output.
        logits: [B, T, V].
        labels: [B, T] ids of the masked tokens, -100 to leave out; None for no loss.
    """
    loss = None if labels is None else model.loss_by(token_loss)(logits, labels)
    return MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)


def sequence_classifier_output(
    model: Any, out: Any, logits: torch.Tensor, labels: torch.Tensor | None
) -> SequenceClassifierOutput:
    """Return a sequence classifier's output.

    Args:
        model: The model, which says by what the loss is computed; its config's `problem_type` has a say.
        out: The stack's output.
        logits: [B, N].
        labels: As `sequence_classification_loss` has it; None for no loss.
    """
    loss = None
    if labels is not None:
        loss = model.loss_by(sequence_classification_loss)(logits, labels, model.config)
    return SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions)


def token_classifier_output(
    model: Any, out: Any, logits: torch.Tensor, labels: torch.Tensor | None
) -> TokenClassifierOutput:
    """Return a token classifier's output.

    Args:
        model: The model, which says by what the loss is computed.
        out: The stack's output.
        logits: [B, T, N].
        labels: [B, T] classes, -100 to leave out; None for no loss.
    """
    loss = None if labels is None else model.loss_by(token_loss)(logits, labels)
    return TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions)


def question_answering_output(
    model: Any, out: Any, logits: torch.Tensor, starts: torch.Tensor | None, ends: torch.Tensor | None
) -> QuestionAnsweringModelOutput:
    """Return the output of extractive question answering.

    Args:
        model: The model, which says by what the loss is computed.
        out: The stack's output.
        logits: [B, T, 2], of both ends.
        starts: [B] index of the answer's first token; None for no loss.
        ends: [B] index of its last.
    """
    start, end = (part.contiguous() for part in logits.unbind(-1))
    loss = None
    if starts is not None and ends is not None:
        loss = model.loss_by(question_answering_loss)(start, end, starts, ends)
    return QuestionAnsweringModelOutput(loss, start, end, out.hidden_states, out.attentions)


def multiple_choice_output(
    model: Any, out: Any, logits: torch.Tensor, labels: torch.Tensor | None, choices: int
) -> MultipleChoiceModelOutput:
    """Return a multiple-choice model's output.

    Args:
        model: The model, which says by what the loss is computed.
        out: The stack's output, of B * C rows.
        logits: [B * C, 1].
        labels: [B] index of the right choice; None for no loss.
        choices: C.
    """
    logits = logits.view(-1, choices)
    loss = None if labels is None else model.loss_by(token_loss)(logits, labels)
    return MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions)


def flat_choices(**inputs: torch.Tensor | None) -> tuple[int, dict[str, torch.Tensor | None]]:
    """Make rows of choices: [B, C, ...] becomes [B * C, ...].

    Args:
        **inputs: By name; absent ones are None.

    Returns:
        C, and the inputs.
    """
    first = next(
        (value for value in (inputs["input_ids"], inputs["inputs_embeds"]) if value is not None), None
    )
    choices = 1 if first is None else first.shape[1]
    return choices, {name: None if value is None else value.flatten(0, 1) for name, value in inputs.items()}


def span_layer(config: PreTrainedConfig, hidden_size: int) -> nn.Linear:
    """Return the layer that scores both ends of an answer.

    Args:
        config: Its `num_labels` must be 2.
        hidden_size: D.

    Raises:
        ConfigError: it is not.
    """
    if config.num_labels != 2:
        raise ConfigError(
            "Question answering scores the two ends of an answer",
            where="num_labels",
            expected=2,
            found=config.num_labels,
            mend="Leave num_labels and id2label out of the config.",
        )
    return nn.Linear(hidden_size, config.num_labels)
