# SPDX-License-Identifier: Apache-2.0
"""mT5: T5 v1.1 with a multilingual vocabulary.

The facts in which it differs are on its config (`pretrained.arch.t5`); here are its names.
"""

from __future__ import annotations

from pretrained.arch.t5 import MT5Config
from pretrained.torch.models import t5


class MT5PreTrainedModel(t5.T5PreTrainedModel):
    """What all classes of the family share."""

    config_class = MT5Config


class MT5Model(MT5PreTrainedModel, t5.T5Model):
    """Encoder and decoder without a head."""


class MT5ForConditionalGeneration(MT5PreTrainedModel, t5.T5ForConditionalGeneration):
    """Encoder and decoder with a language-model head."""


class MT5EncoderModel(MT5PreTrainedModel, t5.T5EncoderModel):
    """The encoder alone, for embeddings of texts."""


class MT5ForSequenceClassification(MT5PreTrainedModel, t5.T5ForSequenceClassification):
    """Encoder and decoder with a classifier on the decoder's last end-of-sequence token."""

    _base_class = MT5Model


class MT5ForTokenClassification(MT5PreTrainedModel, t5.T5ForTokenClassification):
    """The encoder with a classifier on every token."""

    _base_class = MT5EncoderModel


class MT5ForQuestionAnswering(MT5PreTrainedModel, t5.T5ForQuestionAnswering):
    """Encoder and decoder with a classifier for both ends of an answer in the text."""
