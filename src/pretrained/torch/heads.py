# SPDX-License-Identifier: Apache-2.0
"""Heads that decoders share: classify a row by its last token, classify tokens, find an answer's span.

Each is a mixin: a class adds it before its family's base and names the headless class in `_base_class`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pretrained.errors import ArgumentError
from pretrained.torch.losses import question_answering_loss, sequence_classification_loss, token_loss
from pretrained.torch.outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
    finish,
)


def last_logits(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the positions that logits are wanted for.

    Args:
        hidden_states: [batch, length, hidden].
        logits_to_keep: How many last positions, their indices, or 0 for all.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]


def last_tokens(
    input_ids: torch.Tensor | None, pad_token_id: int | None, batch_size: int
) -> torch.Tensor | int:
    """Return the index of each row's last token that is no padding, on whichever side the padding is.

    Args:
        input_ids: [batch, length], or None where only embeddings are known.
        pad_token_id: Id of the padding; None where there is none.
        batch_size: Rows.

    Raises:
        ArgumentError: several rows and no padding token to tell their lengths by.
    """
    if pad_token_id is None and batch_size != 1:
        raise ArgumentError(
            "The last token of each row cannot be told without a padding token",
            where="config.pad_token_id",
            found=f"None, with {batch_size} rows",
            mend="Set model.config.pad_token_id = tokenizer.pad_token_id.",
        )
    if pad_token_id is None or input_ids is None:
        return -1
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions * (input_ids != pad_token_id)).argmax(-1)


class _Head:
    """A model with a headless one inside, under the name `base_model_prefix`."""

    _base_class: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.base_model_prefix, self._base_class(config))  # type: ignore[attr-defined]
        self.add_head(config)
        self.post_init()  # type: ignore[attr-defined]

    def add_head(self, config: Any) -> None:
        """Build the head's layers.

        Args:
            config: The model's configuration.
        """
        raise NotImplementedError

    def _run(self, return_dict: bool | None, **named: Any) -> tuple[Any, bool]:
        """Run the headless model; return its output and whether the caller wants an output object."""
        as_dict = self.config.use_return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        # By name: families differ in the order of their arguments.
        return self.base_model(**named, return_dict=True), as_dict  # type: ignore[attr-defined]


class ForSequenceClassification(_Head):
    """A linear classifier on the last token of each row."""

    def add_head(self, config: Any) -> None:
        """Build `score`, without a bias, as published."""
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Classify each row.

        Args:
            input_ids: [batch, length] token ids; or give `inputs_embeds`.
            attention_mask: As for the headless model.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: [batch] classes, or numbers, as `config.problem_type` has it.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
        """
        out, as_dict = self._run(
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        logits = self.score(out.last_hidden_state)
        rows = torch.arange(logits.shape[0], device=logits.device)
        pad = self.config.pad_token_id  # type: ignore[attr-defined]
        pooled = logits[rows, last_tokens(input_ids, pad, logits.shape[0])]
        loss = None
        if labels is not None:
            loss = self.loss_by(sequence_classification_loss)(pooled, labels, self.config)  # type: ignore[attr-defined]
        result = SequenceClassifierOutputWithPast(
            loss, pooled, out.past_key_values, out.hidden_states, out.attentions
        )
        return finish(result, as_dict)


class ForTokenClassification(_Head):
    """A linear classifier on every token, under the family's name for it."""

    _classifier: ClassVar[str] = "score"

    def add_head(self, config: Any) -> None:
        """Build `dropout` and the classifier."""
        self.num_labels = config.num_labels
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        # 0.1 where the config names no rate: the value of the published classes.
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        setattr(self, self._classifier, nn.Linear(config.hidden_size, config.num_labels))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Classify each token.

        Args:
            input_ids: [batch, length] token ids; or give `inputs_embeds`.
            attention_mask: As for the headless model.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: [batch, length] classes, -100 to leave out.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
        """
        out, as_dict = self._run(
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        logits = getattr(self, self._classifier)(self.dropout(out.last_hidden_state))
        loss = None if labels is None else self.loss_by(token_loss)(logits, labels)  # type: ignore[attr-defined]
        return finish(TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions), as_dict)


class ForQuestionAnswering(_Head):
    """A linear classifier for both ends of an answer in the text."""

    def add_head(self, config: Any) -> None:
        """Build `qa_outputs`."""
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Score each token as the first and as the last of the answer.

        Args:
            input_ids: [batch, length] token ids; or give `inputs_embeds`.
            attention_mask: As for the headless model.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            start_positions: [batch] index of the answer's first token.
            end_positions: [batch] index of its last.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
        """
        out, as_dict = self._run(
            return_dict,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        start, end = self.qa_outputs(out.last_hidden_state).unbind(-1)
        start, end = start.contiguous(), end.contiguous()
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_by(question_answering_loss)(  # type: ignore[attr-defined]
                start, end, start_positions, end_positions
            )
        result = QuestionAnsweringModelOutput(loss, start, end, out.hidden_states, out.attentions)
        return finish(result, as_dict)
