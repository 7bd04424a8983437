# SPDX-License-Identifier: Apache-2.0
"""RoBERTa in PyTorch: BERT's stack with positions that skip padding, and heads of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch import roberta as arch
from pretrained.torch.cache import Cache
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models import bert_heads
from pretrained.torch.models.bert_layers import (
    BertEmbeddings,
    BertEncoder,
    BertLayer,
    check_length,
)
from pretrained.torch.models.bert_stack import BertStack


class RobertaEmbeddings(BertEmbeddings):
    """BERT's embeddings, with positions counted from `padding_idx + 1` and padding at `padding_idx`."""

    def __init__(self, config: arch.RobertaConfig) -> None:
        super().__init__(config)
        assert config.pad_token_id is not None  # The config checks it.
        self.padding_idx = config.pad_token_id
        # Its padding row takes no part in training.
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings, config.hidden_size, padding_idx=self.padding_idx
        )

    def positions(
        self,
        embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the [1 or B, T] positions of new tokens, padding tokens not counted.

        As in fairseq's `make_positions`. Where only embeddings are known nothing counts as padding, and
        neither does what a cache holds.

        Args:
            embeds: [B, T, D] token embeddings.
            input_ids: [B, T], or None where only embeddings are known.
            cache: What came before.
            cache_position: [T] slots of a static cache.

        Raises:
            ArgumentError: there are more tokens than positions.
        """
        length, first = embeds.shape[1], 0 if cache is None else cache.get_seq_length()
        before: torch.Tensor | int = first if cache_position is None else cache_position[0]
        if input_ids is None:
            counted = torch.arange(1, length + 1, device=embeds.device)[None] + before
        else:
            real = input_ids.ne(self.padding_idx).long()
            counted = (real.cumsum(1) + before) * real
        most = self.position_embeddings.num_embeddings - self.padding_idx - 1
        if cache_position is None and first + length > most:
            # Only here are the numbers looked at, for it waits for the device: padding may make it fit.
            check_length(int(counted.max()), most)
        return counted + self.padding_idx


class RobertaLayer(BertLayer):
    """One block."""


class RobertaEncoder(BertEncoder):
    """The blocks."""

    layer_class = RobertaLayer


class RobertaLMHead(nn.Module):
    """From the stack's output to the vocabulary; `bias` and the decoder's bias are one tensor."""

    def __init__(self, config: arch.RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into [B, T, V]; the activation is GELU, whatever the stack's is."""
        return self.decoder(self.layer_norm(F.gelu(self.dense(x))))


class RobertaClassificationHead(nn.Module):
    """Two layers on the first token."""

    def __init__(self, config: arch.RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into logits [B, N]."""
        first = self.dense(self.dropout(x[:, 0]))
        return self.out_proj(self.dropout(torch.tanh(first)))


class RobertaPreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.RobertaConfig
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    # Files of models without a pooler serve classes that have one, and the report says so.
    _optional_weights = ("pooler",)
    _input_embedding = "embeddings.word_embeddings"
    _position_embedding = "embeddings.position_embeddings"
    _output_embedding = "lm_head.decoder"


class RobertaModel(BertStack, RobertaPreTrainedModel):
    """The stack without a head."""

    embeddings_class = RobertaEmbeddings
    encoder_class = RobertaEncoder


class _RobertaLanguageHead:
    """Where RoBERTa keeps its language-model head."""

    _base_class = RobertaModel
    _head_path = "lm_head"

    def add_head(self, config: arch.RobertaConfig) -> None:
        """Build `lm_head`."""
        self.lm_head = RobertaLMHead(config)

    def predict(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into logits [B, T, V]."""
        return self.lm_head(hidden_states)


class RobertaForCausalLM(_RobertaLanguageHead, bert_heads.CausalLM, RobertaPreTrainedModel, GenerationMixin):
    """RoBERTa as a decoder with a language-model head."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of one forward, with RoBERTa's positions where rows are padded.

        Args:
            input_ids: [rows, length] all tokens so far.
            **kwargs: As for `GenerationMixin.prepare_inputs_for_generation`.
        """
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        mask, positions = prepared.get("attention_mask"), prepared.get("position_ids")
        if mask is not None and positions is not None and kwargs.get("position_ids") is None:
            # The general rule counts from 0; these embeddings have padding at padding_idx and text above.
            counted = mask.long().cumsum(-1) * mask.ne(0)
            prepared["position_ids"] = counted[:, -positions.shape[1] :] + self.config.pad_token_id
        return prepared


class RobertaForMaskedLM(_RobertaLanguageHead, bert_heads.MaskedLM, RobertaPreTrainedModel):
    """The stack with a head that fills in masked tokens."""


class RobertaForSequenceClassification(bert_heads.SequenceClassification, RobertaPreTrainedModel):
    """The stack with a classifier on each row."""

    _base_class = RobertaModel
    _pools = False

    def add_head(self, config: arch.RobertaConfig) -> None:
        """Build `classifier`."""
        self.classifier = RobertaClassificationHead(config)

    def classify(self, out: Any) -> torch.Tensor:
        """Turn the stack's output into logits [B, N]."""
        return self.classifier(out.last_hidden_state)


class RobertaForMultipleChoice(bert_heads.MultipleChoice, RobertaPreTrainedModel):
    """The stack with a head that scores each of several continuations."""

    _base_class = RobertaModel

    def add_head(self, config: arch.RobertaConfig) -> None:
        """Build `dropout`, which `classifier_dropout` does not concern here, and `classifier`."""
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)


class RobertaForTokenClassification(bert_heads.TokenClassification, RobertaPreTrainedModel):
    """The stack with a classifier on every token."""

    _base_class = RobertaModel


class RobertaForQuestionAnswering(bert_heads.QuestionAnswering, RobertaPreTrainedModel):
    """The stack with a classifier for both ends of an answer in the text."""

    _base_class = RobertaModel
