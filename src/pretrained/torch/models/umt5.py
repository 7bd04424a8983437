# SPDX-License-Identifier: Apache-2.0
"""UMT5: mT5 with relative position biases in every block.

The facts in which it differs are on its config (`pretrained.arch.t5`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.t5 import UMT5Config
from pretrained.torch.models import t5


class UMT5PreTrainedModel(t5.T5PreTrainedModel):
    """What all classes of the family share."""

    config_class = UMT5Config


class UMT5Model(UMT5PreTrainedModel, t5.T5Model):
    """Encoder and decoder without a head."""


class UMT5ForConditionalGeneration(UMT5PreTrainedModel, t5.T5ForConditionalGeneration):
    """Encoder and decoder with a language-model head."""


class UMT5EncoderModel(UMT5PreTrainedModel, t5.T5EncoderModel):
    """The encoder alone, for embeddings of texts."""


class UMT5ForSequenceClassification(UMT5PreTrainedModel, t5.T5ForSequenceClassification):
    """Encoder and decoder with a classifier on the decoder's last end-of-sequence token."""

    _base_class = UMT5Model


class UMT5ForTokenClassification(UMT5PreTrainedModel, t5.T5ForTokenClassification):
    """The encoder with a classifier on every token."""

    _base_class = UMT5EncoderModel


class UMT5ForQuestionAnswering(UMT5PreTrainedModel, t5.T5ForQuestionAnswering):
    """Encoder and decoder with a classifier for both ends of an answer in the text."""
