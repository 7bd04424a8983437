# SPDX-License-Identifier: Apache-2.0
"""BERT in PyTorch: the stack of `bert_stack` under the heads of `bert_heads`, and BERT's own two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrained.arch import bert as arch
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.losses import token_loss
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models import bert_heads
from pretrained.torch.models.bert_stack import BertStack
from pretrained.torch.nn import activation
from pretrained.torch.outputs import ModelOutput, NextSentencePredictorOutput, Tensors, finish


class BertPredictionHeadTransform(nn.Module):
    """The layer between the stack and the vocabulary."""

    def __init__(self, config: arch.BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [B, T, D]."""
        return self.LayerNorm(self.transform_act_fn(self.dense(x)))


class BertLMPredictionHead(nn.Module):
    """From the stack's output to the vocabulary; `bias` and the decoder's bias are one tensor."""

    def __init__(self, config: arch.BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into [B, T, V]."""
        return self.decoder(self.transform(x))


class BertHeads(nn.Module):
    """The heads of pretraining under their common name, those that a class has."""

    def __init__(self, config: arch.BertConfig, *, predicts: bool, relates: bool) -> None:
        super().__init__()
        if predicts:
            self.predictions = BertLMPredictionHead(config)
        if relates:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertPreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.BertConfig
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    # Files of models without a pooler serve classes that have one, and the report says so.
    _optional_weights = ("pooler",)
    _input_embedding = "embeddings.word_embeddings"
    _position_embedding = "embeddings.position_embeddings"
    _output_embedding = "cls.predictions.decoder"


class BertModel(BertStack, BertPreTrainedModel):
    """The stack without a head."""


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """Output of pretraining: both heads' logits, [B, T, V] and [B, 2]."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


class _BertLanguageHead:
    """Where BERT keeps its language-model head."""

    _base_class = BertModel
    _head_path = "cls.predictions"

    def add_head(self, config: arch.BertConfig) -> None:
        """Build `cls`."""
        self.cls = BertHeads(config, predicts=True, relates=False)

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into logits [B, T, V]."""
        return self.cls.predictions(hidden_states)


class BertForPreTraining(_BertLanguageHead, bert_heads.LanguageHead, BertPreTrainedModel):
    """The stack with both heads of its pretraining."""

    _pools = True

    def add_head(self, config: arch.BertConfig) -> None:
        """Build `cls`."""
        self.cls = BertHeads(config, predicts=True, relates=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Fill in masked tokens, and tell whether the second sentence follows the first.

        Args:
            input_ids: As for `BertModel.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            labels: [B, T] ids of the masked tokens, -100 to leave out.
            next_sentence_label: [B], 0 where the second sentence follows and 1 where it is random. With
                both kinds of labels the loss is the sum of both losses.
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
        logits, relation = self.predict(out.last_hidden_state), self.cls.seq_relationship(out.pooler_output)
        losses = [
            token_loss(scores, wanted)
            for scores, wanted in ((logits, labels), (relation, next_sentence_label))
            if wanted is not None
        ]
        loss = torch.stack(losses).sum() if losses else None
        result = BertForPreTrainingOutput(loss, logits, relation, out.hidden_states, out.attentions)
        return finish(result, as_dict)


class BertLMHeadModel(_BertLanguageHead, bert_heads.CausalLM, BertPreTrainedModel, GenerationMixin):
    """BERT as a decoder with a language-model head."""


class BertForMaskedLM(_BertLanguageHead, bert_heads.MaskedLM, BertPreTrainedModel):
    """The stack with a head that fills in masked tokens."""


class BertForNextSentencePrediction(bert_heads.Head, BertPreTrainedModel):
    """The stack with a head that tells whether the second sentence follows the first."""

    _base_class = BertModel
    _pools = True

    def add_head(self, config: arch.BertConfig) -> None:
        """Build `cls`."""
        self.cls = BertHeads(config, predicts=False, relates=True)

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
        """Score each row as a continuation (index 0) and as a random pair (index 1).

        Args:
            input_ids: As for `BertModel.forward`, like all that are not named here.
            attention_mask: As there.
            token_type_ids: As there; 1 in the second sentence.
            position_ids: As there.
            inputs_embeds: As there.
            labels: [B], 0 where the second sentence follows and 1 where it is random.
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
        logits = self.cls.seq_relationship(out.pooler_output)
        loss = None if labels is None else self.loss_by(token_loss)(logits, labels)
        result = NextSentencePredictorOutput(loss, logits, out.hidden_states, out.attentions)
        return finish(result, as_dict)


class BertForSequenceClassification(bert_heads.SequenceClassification, BertPreTrainedModel):
    """The stack with a classifier on each row."""

    _base_class = BertModel


class BertForMultipleChoice(bert_heads.MultipleChoice, BertPreTrainedModel):
    """The stack with a head that scores each of several continuations."""

    _base_class = BertModel


class BertForTokenClassification(bert_heads.TokenClassification, BertPreTrainedModel):
    """The stack with a classifier on every token."""

    _base_class = BertModel


class BertForQuestionAnswering(bert_heads.QuestionAnswering, BertPreTrainedModel):
    """The stack with a classifier for both ends of an answer in the text."""

    _base_class = BertModel
