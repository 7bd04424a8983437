# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: the Llama block with biased queries, keys and values.

The facts in which it differs are on its config (`pretrained.arch.llama`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.llama import Qwen2Config
from pretrained.torch.models import llama


class Qwen2PreTrainedModel(llama.LlamaPreTrainedModel):
    """What all classes of the family share."""

    config_class = Qwen2Config


class Qwen2Model(Qwen2PreTrainedModel, llama.LlamaModel):
    """The decoder without a head."""


class Qwen2ForCausalLM(Qwen2PreTrainedModel, llama.LlamaForCausalLM):
    """The decoder with a language-model head."""

    _base_class = Qwen2Model


class Qwen2ForSequenceClassification(Qwen2PreTrainedModel, llama.LlamaForSequenceClassification):
    """The decoder with a classifier on each row's last token."""

    _base_class = Qwen2Model


class Qwen2ForTokenClassification(Qwen2PreTrainedModel, llama.LlamaForTokenClassification):
    """The decoder with a classifier on every token."""

    _base_class = Qwen2Model


class Qwen2ForQuestionAnswering(Qwen2PreTrainedModel, llama.LlamaForQuestionAnswering):
    """The decoder with a classifier for both ends of an answer."""

    base_model_prefix = "transformer"
    _base_class = Qwen2Model
