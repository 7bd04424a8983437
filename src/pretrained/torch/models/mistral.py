# SPDX-License-Identifier: Apache-2.0
"""Mistral: the Llama block with a sliding window.

The facts in which it differs are on its config (`pretrained.arch.llama`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.llama import MistralConfig
from pretrained.torch.models import llama


class MistralPreTrainedModel(llama.LlamaPreTrainedModel):
    """What all classes of the family share."""

    config_class = MistralConfig


class MistralModel(MistralPreTrainedModel, llama.LlamaModel):
    """The decoder without a head."""


class MistralForCausalLM(MistralPreTrainedModel, llama.LlamaForCausalLM):
    """The decoder with a language-model head."""

    _base_class = MistralModel


class MistralForSequenceClassification(MistralPreTrainedModel, llama.LlamaForSequenceClassification):
    """The decoder with a classifier on each row's last token."""

    _base_class = MistralModel


class MistralForTokenClassification(MistralPreTrainedModel, llama.LlamaForTokenClassification):
    """The decoder with a classifier on every token."""

    _base_class = MistralModel


class MistralForQuestionAnswering(MistralPreTrainedModel, llama.LlamaForQuestionAnswering):
    """The decoder with a classifier for both ends of an answer."""

    base_model_prefix = "model"
    _base_class = MistralModel
