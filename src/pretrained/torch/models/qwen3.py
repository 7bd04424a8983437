# SPDX-License-Identifier: Apache-2.0
"""Qwen3: the Llama block with normalised queries and keys.

The facts in which it differs are on its config (`pretrained.arch.llama`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.llama import Qwen3Config
from pretrained.torch.models import llama


class Qwen3PreTrainedModel(llama.LlamaPreTrainedModel):
    """What all classes of the family share."""

    config_class = Qwen3Config


class Qwen3Model(Qwen3PreTrainedModel, llama.LlamaModel):
    """The decoder without a head."""


class Qwen3ForCausalLM(Qwen3PreTrainedModel, llama.LlamaForCausalLM):
    """The decoder with a language-model head."""

    _base_class = Qwen3Model


class Qwen3ForSequenceClassification(Qwen3PreTrainedModel, llama.LlamaForSequenceClassification):
    """The decoder with a classifier on each row's last token."""

    _base_class = Qwen3Model


class Qwen3ForTokenClassification(Qwen3PreTrainedModel, llama.LlamaForTokenClassification):
    """The decoder with a classifier on every token."""

    _base_class = Qwen3Model


class Qwen3ForQuestionAnswering(Qwen3PreTrainedModel, llama.LlamaForQuestionAnswering):
    """The decoder with a classifier for both ends of an answer."""

    base_model_prefix = "transformer"
    _base_class = Qwen3Model
