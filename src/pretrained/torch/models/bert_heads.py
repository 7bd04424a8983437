# SPDX-License-Identifier: Apache-2.0
"""Heads that BERT and RoBERTa share.

Each class is a mixin: a family puts it before its base class and names the headless class in `_base_class`.
Shapes: B batch, T tokens, D hidden, V vocabulary, C choices, N labels.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from torch import nn

from pretrained.arch.bert import BertConfig, language_head_ties
from pretrained.errors import ArgumentError
from pretrained.torch.cache import Cache
from pretrained.torch.heads import last_logits
from pretrained.torch.losses import causal_lm_loss
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.bert_outputs import (
    flat_choices,
    masked_lm_output,
    multiple_choice_output,
    question_answering_output,
    sequence_classifier_output,
    span_layer,
    token_classifier_output,
)
from pretrained.torch.outputs import CausalLMOutputWithCrossAttentions, finish

logger = logging.getLogger(__name__)


class Head(PreTrainedModel):
    """A model with a headless one inside, under the name `base_model_prefix`."""

    _base_class: ClassVar[type[nn.Module]]
    _pools: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.build_base(config))
        self.add_head(config)
        self.post_init()

    def build_base(self, config: Any) -> nn.Module:
        """Return the headless model, with a pooler where the head reads one."""
        return self._base_class(config, add_pooling_layer=self._pools)

    def add_head(self, config: Any) -> None:
        """Build the head's layers."""
        raise NotImplementedError

    def run(self, *inputs: Any, return_dict: bool | None, **more: Any) -> tuple[Any, bool]:
        """Run the headless model; return its output and whether the caller wants an output object."""
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        return self.base_model(*inputs, **more, return_dict=True), as_dict


class LanguageHead(Head):
    """A head over the vocabulary, at `_head_path`, with a bias that its decoder shares."""

    _head_path: ClassVar[str]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the decoder, and with it the bias that it shares.

        Args:
            new_embeddings: The new decoder, with a bias.

        Raises:
            ArgumentError: it has none, or as for every model.
        """
        if getattr(new_embeddings, "bias", None) is None:
            raise ArgumentError(
                "This head's decoder has a bias",
                where="new_embeddings.bias",
                found=repr(new_embeddings)[:100],
            )
        super().set_output_embeddings(new_embeddings)
        self.get_submodule(self._head_path).bias = new_embeddings.bias

    def ties(self) -> dict[str, str]:
        """Return the ties; that of the bias does not depend on the config."""
        return language_head_ties(self._head_path, self.base_model_prefix, self.config.tie_word_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.get_submodule(self._head_path):
            nn.init.zeros_(module.get_parameter("bias"))

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into logits [B, T, V]."""
        raise NotImplementedError


class MaskedLM(LanguageHead):
    """The stack with a head that fills in masked tokens."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score the vocabulary at each token.

        Args:
            input_ids: As for `BertStack.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            encoder_hidden_states: As there.
            encoder_attention_mask: As there.
            labels: [B, T] ids of the masked tokens, -100 to leave out.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        out, as_dict = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return finish(masked_lm_output(self, out, self.predict(out.last_hidden_state), labels), as_dict)


class CausalLM(LanguageHead):
    """The stack as a decoder, with a head that predicts the next token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not config.is_decoder:
            logger.warning(
                "%s sees the tokens it is to predict, for config.is_decoder is False; pass is_decoder=True.",
                type(self).__name__,
            )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Score the vocabulary for the token after each token.

        Args:
            input_ids: As for `BertStack.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            encoder_hidden_states: As there.
            encoder_attention_mask: As there.
            labels: [B, T] ids to predict, each at the position before; -100 to leave out. With labels no
                cache is made.
            past_key_values: As there.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
            logits_to_keep: Last positions to compute logits for, or their indices; 0 for all.
            num_items_in_batch: Labels in the whole accumulated batch, to divide the loss by.
        """
        out, as_dict = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            use_cache if labels is None else False,
            output_attentions,
            output_hidden_states,
            return_dict=return_dict,
            cache_position=cache_position,
        )
        logits = self.predict(last_logits(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_by(causal_lm_loss)(logits, labels, num_items_in_batch=num_items_in_batch)
        result = CausalLMOutputWithCrossAttentions(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.cross_attentions
        )
        return finish(result, as_dict)


class Classifier(Head):
    """What the classifiers share: dropout and a linear layer."""

    classifier: nn.Module

    def add_head(self, config: BertConfig) -> None:
        """Build `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)


class SequenceClassification(Classifier):
    """The stack with a classifier on each row."""

    _pools = True

    def classify(self, out: Any) -> torch.Tensor:
        """Turn the stack's output into logits [B, N]."""
        return self.classifier(self.dropout(out.pooler_output))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each row.

        Args:
            input_ids: As for `BertStack.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            labels: [B] classes, or numbers, as `config.problem_type` has it.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        out, as_dict = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return finish(sequence_classifier_output(self, out, self.classify(out), labels), as_dict)


class TokenClassification(Classifier):
    """The stack with a classifier on every token."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each token.

        Args:
            input_ids: As for `BertStack.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            labels: [B, T] classes, -100 to leave out.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        out, as_dict = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.classifier(self.dropout(out.last_hidden_state))
        return finish(token_classifier_output(self, out, logits, labels), as_dict)


class QuestionAnswering(Head):
    """The stack with a classifier for both ends of an answer in the text."""

    def add_head(self, config: BertConfig) -> None:
        """Build `qa_outputs`."""
        self.qa_outputs = span_layer(config, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score each token as the first and as the last of the answer.

        Args:
            input_ids: As for `BertStack.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            start_positions: [B] index of the answer's first token.
            end_positions: [B] index of its last.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        out, as_dict = self.run(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.qa_outputs(out.last_hidden_state)
        return finish(question_answering_output(self, out, logits, start_positions, end_positions), as_dict)


class MultipleChoice(Head):
    """The stack with a head that scores each of several continuations."""

    _pools = True

    def add_head(self, config: BertConfig) -> None:
        """Build `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score each choice.

        Args:
            input_ids: [B, C, T]; as for `BertStack.forward` with an axis for the choices, like all that are
                not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there, [B, C, T, D].
            labels: [B] index of the right choice.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        choices, inputs = flat_choices(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        out, as_dict = self.run(
            **inputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        logits = self.classifier(self.dropout(out.pooler_output))
        return finish(multiple_choice_output(self, out, logits, labels, choices), as_dict)
