# SPDX-License-Identifier: Apache-2.0
"""The leaves of BERT, which RoBERTa shares: embeddings, attention with its distances, blocks.

Shapes: B batch, T new tokens, S cached and new tokens (or the encoder's), D hidden, H heads, K channels of
a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from pretrained.arch.bert import RELATIVE_KEY_QUERY, BertConfig
from pretrained.errors import ArgumentError
from pretrained.torch.attention import attend
from pretrained.torch.cache import Cache, EncoderDecoderCache
from pretrained.torch.inputs import new_positions
from pretrained.torch.nn import activation
from pretrained.torch.pruning import HeadParts


class BertEmbeddings(nn.Module):
    """Sum of token, segment and (where positions are absolute) position embeddings, normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.adds_positions = not config.relative_positions

    def forward(
        self,
        embeds_BTD: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the first block reads, [B, T, D].

        Args:
            embeds_BTD: Token embeddings.
            token_type_ids: [B, T] segments; None for 0 everywhere.
            position_ids: [1 or B, T].
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        x = embeds_BTD + self.token_type_embeddings(token_type_ids)
        if self.adds_positions:
            x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))

    def positions(
        self,
        embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the [1 or B, T] positions of new tokens: counted from 0, on from a cache.

        Args:
            embeds: [B, T, D] token embeddings.
            input_ids: [B, T], or None where only embeddings are known.
            cache: What came before.
            cache_position: [T] slots of a static cache, which are positions too.

        Raises:
            ArgumentError: there are more tokens than positions.
        """
        first, position_ids = new_positions(embeds, cache, cache_position, None)
        check_length(first + embeds.shape[1], self.position_embeddings.num_embeddings)
        return position_ids


def check_length(length: int, most: int) -> None:
    """Raise where a sequence is longer than the table of positions.

    Args:
        length: Tokens, cached ones included.
        most: Tokens that there are positions for.

    Raises:
        ArgumentError: it is too long.
    """
    if length > most:
        raise ArgumentError(
            "The sequence is longer than the model has positions for",
            where="input_ids",
            expected=f"at most {most} tokens",
            found=f"{length} tokens",
            mend="Truncate the input (a tokenizer's truncation=True, max_length=...), or split it.",
        )


class BertSelfAttention(nn.Module):
    """Attention of the tokens among themselves, or of a decoder's tokens to an encoder's.

    Pruned heads are absent: the projections have rows for those that are left.
    """

    def __init__(self, config: BertConfig, layer_idx: int, *, cross: bool = False) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_attention_heads = config.num_attention_heads if cross else config.heads_left(layer_idx)
        self.attention_head_size = config.head_size
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.is_causal = config.is_decoder and not cross
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.distance_embedding: nn.Embedding | None = None
        if config.relative_positions and not cross:
            distances = 2 * config.max_position_embeddings - 1
            self.distance_embedding = nn.Embedding(distances, self.attention_head_size)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        distances: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the cached and new ones it may see; [B, T, H * K] and weights."""
        q_BHTK = self._heads(self.query(hidden_BTD))
        k_BHSK, v_BHSK = self._heads(self.key(hidden_BTD)), self._heads(self.value(hidden_BTD))
        if cache is not None:
            k_BHSK, v_BHSK = cache.update(k_BHSK, v_BHSK, self.layer_idx, cache_position)
        if distances is not None:
            mask = self._with_distances(q_BHTK, k_BHSK, mask, distances)
        return self._attend(q_BHTK, k_BHSK, v_BHSK, mask, output_attentions)

    def cross(
        self,
        hidden_BTD: torch.Tensor,
        encoder_BSD: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the encoder's, whose keys and values are computed once."""
        q_BHTK = self._heads(self.query(hidden_BTD))
        kept = cache if isinstance(cache, EncoderDecoderCache) else None
        if kept is not None and kept.is_updated.get(self.layer_idx):
            k_BHSK, v_BHSK = kept.cross_attention_cache[self.layer_idx]
        else:
            k_BHSK, v_BHSK = self._heads(self.key(encoder_BSD)), self._heads(self.value(encoder_BSD))
            if kept is not None:
                k_BHSK, v_BHSK = kept.cross_attention_cache.update(k_BHSK, v_BHSK, self.layer_idx)
                kept.is_updated[self.layer_idx] = True
        return self._attend(q_BHTK, k_BHSK, v_BHSK, mask, output_attentions)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, weights = attend(
            self,
            self.config,
            query,
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob,
            is_causal=self.is_causal,
            output_attentions=output_attentions,
        )
        return out.flatten(-2), weights

    def _with_distances(
        self,
        q_BHTK: torch.Tensor,
        k_BHSK: torch.Tensor,
        mask: torch.Tensor | None,
        distances_TS: torch.Tensor,
    ) -> torch.Tensor:
        """Return an additive mask that holds the scores of relative positions too.

        Shaw et al. 2018 (arXiv:1803.02155, equation 5) multiply queries with an embedding of the distance;
        Huang et al. 2020 (arXiv:2009.13658, method 4) add the same for keys.
        """
        assert self.distance_embedding is not None
        furthest = self.distance_embedding.num_embeddings // 2
        # Slots of a static cache that are still to be filled may lie beyond the table; they are masked.
        a_TSK = self.distance_embedding((distances_TS + furthest).clamp(0, 2 * furthest)).to(q_BHTK.dtype)
        scores = torch.einsum("bhtk,tsk->bhts", q_BHTK, a_TSK)
        if self.config.position_embedding_type == RELATIVE_KEY_QUERY:
            scores = scores + torch.einsum("bhsk,tsk->bhts", k_BHSK, a_TSK)
        if mask is None and self.is_causal:
            mask = distances_TS >= 0
        scores = scores * self.scaling
        if mask is None:
            return scores
        if mask.dtype == torch.bool:
            # Not added: the sum could leave float16, and a row without any key would have no numbers.
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores + mask


class BertSelfOutput(nn.Module):
    """What follows attention: a projection, added to the attention's input and normalised."""

    def __init__(self, config: BertConfig, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Project [B, T, H * K] (or the feed-forward's inner size) and add the [B, T, D] residual."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertOutput(BertSelfOutput):
    """What follows the feed-forward network's inner layer, the same way."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.intermediate_size)


class BertAttention(nn.Module):
    """Attention and what follows it, under the names of the checkpoints."""

    def __init__(self, config: BertConfig, layer_idx: int, *, cross: bool = False) -> None:
        super().__init__()
        self.self = BertSelfAttention(config, layer_idx, cross=cross)
        self.output = BertSelfOutput(config, self.self.all_head_size)

    def head_parts(self) -> HeadParts:
        """Return the layers with a slice for each head."""
        own, size = self.self, self.self.attention_head_size
        return HeadParts(
            (own.query,),
            (own.key, own.value),
            self.output.dense,
            size,
            own,
            lambda kept: {"num_attention_heads": len(kept), "all_head_size": len(kept) * size},
        )


class BertIntermediate(nn.Module):
    """Inner layer of the feed-forward network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to [B, T, D]."""
        return self.intermediate_act_fn(self.dense(x))


class BertLayer(nn.Module):
    """One block: attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, config: BertConfig, layer_idx: int) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.attention = BertAttention(config, layer_idx)
        self.crossattention = (
            BertAttention(config, layer_idx, cross=True) if config.add_cross_attention else None
        )
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        distances: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the block's output [B, T, D] and, if asked, the weights of both attentions."""
        attended, weights = self.attention.self(
            hidden_states, mask, distances, cache, cache_position, output_attentions
        )
        x, cross_weights = self.attention.output(attended, hidden_states), None
        if encoder_hidden_states is not None:
            assert self.crossattention is not None
            attended, cross_weights = self.crossattention.self.cross(
                x, encoder_hidden_states, encoder_mask, cache, output_attentions
            )
            x = self.crossattention.output(attended, x)
        return in_chunks(self._feed_forward, x, self.chunk_size), weights, cross_weights

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(x), x)


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, size: int) -> torch.Tensor:
    """Apply a function of single tokens to `size` tokens at a time, which bounds its memory.

    Args:
        function: From [B, any, D] to the same shape.
        x: [B, T, D].
        size: Tokens at a time; 0 for all.
    """
    if size == 0:
        return function(x)
    return torch.cat([function(part) for part in x.split(size, dim=1)], dim=1)


class BertEncoder(nn.Module):
    """The blocks."""

    layer_class: ClassVar[type[BertLayer]] = BertLayer

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """A layer on the first token, which stands for the row."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, T, D] into [B, D]."""
        return self.activation(self.dense(x[:, 0]))
