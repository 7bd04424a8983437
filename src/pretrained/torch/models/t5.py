# SPDX-License-Identifier: Apache-2.0
"""The T5 family in PyTorch: T5 v1.0 and v1.1 (FLAN, T0, byT5) and their heads; mT5 and UMT5 build on them.

The layers are in `t5_layers`, the stacks of them in `t5_stacks`. Shapes: B batch, T new tokens, S the
encoder's, D hidden (`d_model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from pretrained.arch import t5 as arch
from pretrained.errors import ArgumentError, ConfigError
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.losses import question_answering_loss, sequence_classification_loss, token_loss
from pretrained.torch.models.t5_layers import linear
from pretrained.torch.models.t5_stacks import T5Encoder, T5EncoderDecoder, T5PreTrainedModel, rest_of
from pretrained.torch.outputs import (
    Seq2SeqLMOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    TokenClassifierOutput,
    finish,
)
from pretrained.torch.steps.t5 import T5Step


class T5Model(T5EncoderDecoder):
    """Encoder and decoder without a head."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run encoder and decoder.

        Args:
            input_ids: [B, S] ids for the encoder; or give `inputs_embeds`, or `encoder_outputs`.
            attention_mask: [B, S] with 0 for padding, for the encoder and the decoder's look at it.
            decoder_input_ids: [B, T] ids for the decoder, which begin with the start token (padding);
                or give `decoder_inputs_embeds`.
            decoder_attention_mask: [B, cached and new tokens] with 0 for padding.
            encoder_outputs: What the encoder returned before (an output or a tuple), to save running it.
            past_key_values: The decoder's cache, extended in place.
            inputs_embeds: [B, S, D] instead of ids.
            decoder_inputs_embeds: [B, T, D] instead of ids.
            use_cache: Return a cache (a new one if none is given); None for the config's choice.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return each layer's input and the final output; None as above.
            return_dict: False for a plain tuple; None as above.
            cache_position: [T] slots of a static cache to write, each one on from the other, for compiled
                steps; None counts.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        out = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            cache_position,
        )
        return finish(out, as_dict)


class T5ForConditionalGeneration(T5EncoderDecoder, GenerationMixin):
    """Encoder and decoder with a language-model head."""

    _decode_step = T5Step
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        **T5EncoderDecoder._tied_weights_keys,
        "lm_head.weight": "shared.weight",
    }
    # Cross-attention takes fewer rows of the encoder than of the decoder.
    _beams_share_encoder = True

    def add_head(self, config: arch.T5Config) -> None:
        """Build `lm_head`.

        Args:
            config: The model's configuration.
        """
        self.model_dim = config.d_model
        self.lm_head = linear(config.d_model, config.vocab_size, 1.0)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Run encoder, decoder and head.

        Args:
            input_ids: As for `T5Model.forward`, like all that are not named here.
            attention_mask: As there.
            decoder_input_ids: As there; None with `labels` makes them of those.
            decoder_attention_mask: As there.
            encoder_outputs: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            decoder_inputs_embeds: As there.
            labels: [B, T] ids to predict, -100 to leave out.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
            num_items_in_batch: Labels in the whole accumulated batch, to divide the loss by.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        out = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            cache_position,
        )
        x = out.last_hidden_state
        assert x is not None
        if self.config.scale_decoder_outputs:
            x = x * self.model_dim**-0.5
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_by(token_loss)(logits, labels, num_items_in_batch=num_items_in_batch)
        return finish(Seq2SeqLMOutput(loss, logits, *rest_of(out)), as_dict)


class T5EncoderModel(T5PreTrainedModel):
    """The encoder alone, for embeddings of texts."""

    _tied_weights_keys: ClassVar[Mapping[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}
    # It is cut out of whole models, so what it leaves behind is no finding.
    _keys_to_ignore_on_load_unexpected = (r"^decoder\.", r"^lm_head\.")

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Encoder(config, self.shared)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the encoder.

        Args:
            input_ids: As for `T5Encoder.forward`, like all others.
            attention_mask: As there.
            inputs_embeds: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        return self.encoder(
            input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states, return_dict
        )


# -- heads for understanding ---------------------------------------------------------------------


class T5ClassificationHead(nn.Module):
    """Two dense layers on one vector of each row."""

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__()
        std = config.d_model**-0.5
        self.dense = linear(config.d_model, config.d_model, std, bias=True)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = linear(config.d_model, config.num_labels, std, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [B, labels] of [B, D]."""
        x = torch.tanh(self.dense(self.dropout(x)))
        return self.out_proj(self.dropout(x))


class T5ForSequenceClassification(T5PreTrainedModel):
    """Encoder and decoder with a classifier on the decoder's last end-of-sequence token."""

    _base_class: ClassVar[type[T5PreTrainedModel]] = T5Model
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "transformer.encoder.embed_tokens.weight": "transformer.shared.weight",
        "transformer.decoder.embed_tokens.weight": "transformer.shared.weight",
    }

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__(config)
        self.transformer = self._base_class(config)
        self.classification_head = T5ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each row.

        Args:
            input_ids: [B, S] ids, each row with an end-of-sequence token; needed even with embeddings,
                for they tell where that token is.
            attention_mask: As for `T5Model.forward`, like all that are not named here.
            decoder_input_ids: As there; None for `input_ids` shifted right.
            decoder_attention_mask: As there.
            encoder_outputs: As there.
            inputs_embeds: As there.
            decoder_inputs_embeds: As there.
            labels: [B] classes, or numbers, as `config.problem_type` has it.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.

        Raises:
            ArgumentError: no ids, or a row without an end-of-sequence token.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        if input_ids is None:
            raise ArgumentError(
                f"{type(self).__name__} finds the token to classify by its id",
                where="input_ids",
                found="None",
                mend="Pass input_ids; inputs_embeds and encoder_outputs may come with them.",
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(input_ids)
        ids = None if inputs_embeds is not None else input_ids
        out = self.transformer(
            ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            False if labels is not None else use_cache,
            output_attentions,
            output_hidden_states,
            True,
        )
        rows = torch.arange(input_ids.shape[0], device=input_ids.device)
        chosen = out.last_hidden_state[rows, last_eos(input_ids, self.config.eos_token_id)]
        logits = self.classification_head(chosen)
        loss = None
        if labels is not None:
            loss = self.loss_by(sequence_classification_loss)(logits, labels, self.config)
        return finish(Seq2SeqSequenceClassifierOutput(loss, logits, *rest_of(out)), as_dict)


def last_eos(input_ids: torch.Tensor, eos_token_id: int | list[int] | None) -> torch.Tensor:
    """Return the index [B] of each row's last end-of-sequence token.

    Args:
        input_ids: [B, S] ids.
        eos_token_id: The token, or several.

    Raises:
        ArgumentError: a row has none.
    """
    wanted = torch.tensor(eos_token_id if eos_token_id is not None else [], device=input_ids.device)
    is_eos = torch.isin(input_ids, wanted)
    # A compiled graph cannot look at values; there the first token stands in for what is missing.
    if not torch.compiler.is_compiling() and not bool(is_eos.any(1).all()):
        raise ArgumentError(
            "A row has no end-of-sequence token, which is the one that is classified",
            where="input_ids",
            expected=f"token {eos_token_id} in every row",
            found=f"none in row {int((~is_eos.any(1)).nonzero()[0])}",
            mend="Let the tokenizer add special tokens, and truncate before it does.",
        )
    return (torch.arange(input_ids.shape[1], device=input_ids.device) * is_eos).argmax(-1)


class T5ForTokenClassification(T5PreTrainedModel):
    """The encoder with a classifier on every token."""

    _base_class: ClassVar[type[T5PreTrainedModel]] = T5EncoderModel
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "transformer.encoder.embed_tokens.weight": "transformer.shared.weight"
    }
    _keys_to_ignore_on_load_unexpected = (r"^(transformer\.)?decoder\.", r"^lm_head\.")

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self._base_class(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = linear(config.d_model, config.num_labels, 1.0, bias=True)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each token.

        Args:
            input_ids: As for `T5Encoder.forward`, like all that are not named here.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: [B, T] classes, -100 to leave out.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        out = self.transformer(
            input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states, True
        )
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None if labels is None else self.loss_by(token_loss)(logits, labels)
        return finish(TokenClassifierOutput(loss, logits, out.hidden_states, out.attentions), as_dict)


class T5ForQuestionAnswering(T5EncoderDecoder):
    """Encoder and decoder with a classifier for both ends of an answer in the text."""

    # The stacks are not inside a headless model, so that the head's name has to say that it may be new.
    _optional_weights = ("qa_outputs",)

    def add_head(self, config: arch.T5Config) -> None:
        """Build `qa_outputs`.

        Args:
            config: The model's configuration.

        Raises:
            ConfigError: other than two labels.
        """
        if config.num_labels != 2:
            raise ConfigError(
                "An answer has two ends, so its classifier has two outputs",
                where="num_labels",
                expected="2",
                found=config.num_labels,
            )
        self.num_labels = config.num_labels
        self.qa_outputs = linear(config.d_model, config.num_labels, config.d_model**-0.5, bias=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score each of the decoder's tokens as the first and as the last of the answer.

        Args:
            input_ids: As for `T5Model.forward`, like all that are not named here.
            attention_mask: As there.
            decoder_input_ids: As there; None for `input_ids` shifted right.
            decoder_attention_mask: As there.
            encoder_outputs: As there.
            start_positions: [B] index of the answer's first token.
            end_positions: [B] index of its last.
            inputs_embeds: As there.
            decoder_inputs_embeds: As there.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        learns = start_positions is not None and end_positions is not None
        if decoder_input_ids is None and decoder_inputs_embeds is None and input_ids is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(input_ids)
        out = self._run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            None,
            inputs_embeds,
            decoder_inputs_embeds,
            False if learns else use_cache,
            output_attentions,
            output_hidden_states,
        )
        start, end = (part.contiguous() for part in self.qa_outputs(out.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_by(question_answering_loss)(start, end, start_positions, end_positions)
        return finish(Seq2SeqQuestionAnsweringModelOutput(loss, start, end, *rest_of(out)), as_dict)
