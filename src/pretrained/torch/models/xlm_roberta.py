# SPDX-License-Identifier: Apache-2.0
"""XLM-RoBERTa in PyTorch: RoBERTa with another vocabulary, under names of its own."""

from __future__ import annotations

from pretrained.arch.roberta import XLMRobertaConfig
from pretrained.torch.models import roberta


class XLMRobertaPreTrainedModel(roberta.RobertaPreTrainedModel):
    """What all classes of the family share."""

    config_class = XLMRobertaConfig


class XLMRobertaModel(XLMRobertaPreTrainedModel, roberta.RobertaModel):
    """The stack without a head."""


class XLMRobertaForCausalLM(XLMRobertaPreTrainedModel, roberta.RobertaForCausalLM):
    """The stack as a decoder with a language-model head."""

    _base_class = XLMRobertaModel


class XLMRobertaForMaskedLM(XLMRobertaPreTrainedModel, roberta.RobertaForMaskedLM):
    """The stack with a head that fills in masked tokens."""

    _base_class = XLMRobertaModel


class XLMRobertaForSequenceClassification(
    XLMRobertaPreTrainedModel, roberta.RobertaForSequenceClassification
):
    """The stack with a classifier on each row."""

    _base_class = XLMRobertaModel


class XLMRobertaForMultipleChoice(XLMRobertaPreTrainedModel, roberta.RobertaForMultipleChoice):
    """The stack with a head that scores each of several continuations."""

    _base_class = XLMRobertaModel


class XLMRobertaForTokenClassification(XLMRobertaPreTrainedModel, roberta.RobertaForTokenClassification):
    """The stack with a classifier on every token."""

    _base_class = XLMRobertaModel


class XLMRobertaForQuestionAnswering(XLMRobertaPreTrainedModel, roberta.RobertaForQuestionAnswering):
    """The stack with a classifier for both ends of an answer in the text."""

    _base_class = XLMRobertaModel
