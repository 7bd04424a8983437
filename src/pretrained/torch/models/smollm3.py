# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: the Llama block, with layers that do without rotary positions.

The facts in which it differs are on its config (`pretrained.arch.llama`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.llama import SmolLM3Config
from pretrained.torch.models import llama


class SmolLM3PreTrainedModel(llama.LlamaPreTrainedModel):
    """What all classes of the family share."""

    config_class = SmolLM3Config


class SmolLM3Model(SmolLM3PreTrainedModel, llama.LlamaModel):
    """The decoder without a head."""


class SmolLM3ForCausalLM(SmolLM3PreTrainedModel, llama.LlamaForCausalLM):
    """The decoder with a language-model head."""

    _base_class = SmolLM3Model


class SmolLM3ForSequenceClassification(SmolLM3PreTrainedModel, llama.LlamaForSequenceClassification):
    """The decoder with a classifier on each row's last token."""

    _base_class = SmolLM3Model


class SmolLM3ForTokenClassification(SmolLM3PreTrainedModel, llama.LlamaForTokenClassification):
    """The decoder with a classifier on every token."""

    _base_class = SmolLM3Model


class SmolLM3ForQuestionAnswering(SmolLM3PreTrainedModel, llama.LlamaForQuestionAnswering):
    """The decoder with a classifier for both ends of an answer."""

    base_model_prefix = "transformer"
    _base_class = SmolLM3Model
