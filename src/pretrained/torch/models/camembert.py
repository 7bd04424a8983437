# SPDX-License-Identifier: Apache-2.0
"""CamemBERT in PyTorch: RoBERTa with another vocabulary, under names of its own."""

from __future__ import annotations

from pretrained.arch.roberta import CamembertConfig
from pretrained.torch.models import roberta


class CamembertPreTrainedModel(roberta.RobertaPreTrainedModel):
    """What all classes of the family share."""

    config_class = CamembertConfig


class CamembertModel(CamembertPreTrainedModel, roberta.RobertaModel):
    """The stack without a head."""


class CamembertForCausalLM(CamembertPreTrainedModel, roberta.RobertaForCausalLM):
    """The stack as a decoder with a language-model head."""

    _base_class = CamembertModel


class CamembertForMaskedLM(CamembertPreTrainedModel, roberta.RobertaForMaskedLM):
    """The stack with a head that fills in masked tokens."""

    _base_class = CamembertModel


class CamembertForSequenceClassification(CamembertPreTrainedModel, roberta.RobertaForSequenceClassification):
    """The stack with a classifier on each row."""

    _base_class = CamembertModel


class CamembertForMultipleChoice(CamembertPreTrainedModel, roberta.RobertaForMultipleChoice):
    """The stack with a head that scores each of several continuations."""

    _base_class = CamembertModel


class CamembertForTokenClassification(CamembertPreTrainedModel, roberta.RobertaForTokenClassification):
    """The stack with a classifier on every token."""

    _base_class = CamembertModel


class CamembertForQuestionAnswering(CamembertPreTrainedModel, roberta.RobertaForQuestionAnswering):
    """The stack with a classifier for both ends of an answer in the text."""

    _base_class = CamembertModel
