# SPDX-License-Identifier: Apache-2.0
"""The layers of the T5 family: relative positions, attention, feed-forward networks, blocks.

Shapes: B batch, T new tokens, S keys (cached and new ones, or the encoder's), D hidden (`d_model`),
H heads, K channels of a head (`d_kv`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pretrained.arch import t5 as arch
from pretrained.torch.attention import attend
from pretrained.torch.cache import Cache, EncoderDecoderCache
from pretrained.torch.nn import RMSNorm, activation
from pretrained.torch.pruning import HeadParts

# -- pure functions ------------------------------------------------------------------------------


def relative_position_bucket(
    relative_position: torch.Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """Return which entry of the bias table each relative position uses (Raffel et al. 2020, section 2.1).

    Half of the buckets of a direction hold one distance each, the other half ever more, growing
    logarithmically up to `max_distance`; what is farther shares the last one.

    Args:
        relative_position: Position of the key minus that of the query, any shape of whole numbers.
        bidirectional: Keys after the query have buckets of their own (an encoder); otherwise they share
            the one of distance 0, for a decoder never looks at them.
        num_buckets: Size of the table.
        max_distance: First distance that shares the last bucket.
    """
    if bidirectional:
        num_buckets //= 2
        after = (relative_position > 0).long() * num_buckets
        distance = relative_position.abs()
    else:
        after = torch.zeros_like(relative_position)
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    # In this order and in float32, as published: elsewhere a distance at an edge changes its bucket.
    octaves = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return after + torch.where(distance < exact, distance, far)


def add_mask(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return position biases [1, H, T, S] with what is hidden pushed down, ready to add to scores.

    Args:
        bias: Position biases.
        mask: Boolean (True: may look) or additive, [B or 1, 1 or H, 1 or T, S]; None to hide nothing.
    """
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask.to(bias.dtype)


def keep_finite(x: torch.Tensor) -> torch.Tensor:
    """Clip float16 activations that overflowed, a little below the largest number; others pass.

    Args:
        x: Activations of any shape.
    """
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest).to(x.dtype)
    return x.clamp(min=-limit, max=limit)


def linear(inputs: int, outputs: int, std: float, *, bias: bool = False) -> nn.Linear:
    """Return a stock layer that carries the standard deviation it is initialised with.

    Args:
        inputs: Size of the last axis that comes in.
        outputs: Size of the last axis that goes out.
        std: Standard deviation, before `initializer_factor`.
        bias: Whether it has a bias, initialised to 0.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.initial_std = std  # type: ignore[assignment]
    return layer


# -- layers --------------------------------------------------------------------------------------


class T5LayerNorm(RMSNorm):
    """RMSNorm whose result has the dtype of its scale.

    In a float16 model the residual stream is float32 from the first `wo` on, which stays float32.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; the mean square is computed in float32."""
        mean_square = hidden_states.float().square().mean(-1, keepdim=True)
        x = hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)
        return self.weight * x.to(self.weight.dtype)


class T5DenseActDense(nn.Module):
    """The feed-forward network of v1.0."""

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__()
        self.wi = linear(config.d_model, config.d_ff, config.d_model**-0.5)
        self.wo = linear(config.d_ff, config.d_model, config.d_ff**-0.5)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = activation(str(config.dense_act_fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network to [B, T, D]."""
        return _project_out(self.wo, self.dropout(self.act(self.wi(x))))


class T5DenseGatedActDense(nn.Module):
    """The gated feed-forward network of v1.1 (GEGLU, Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__()
        self.wi_0 = linear(config.d_model, config.d_ff, config.d_model**-0.5)
        self.wi_1 = linear(config.d_model, config.d_ff, config.d_model**-0.5)
        self.wo = linear(config.d_ff, config.d_model, config.d_ff**-0.5)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.act = activation(str(config.dense_act_fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network to [B, T, D]."""
        return _project_out(self.wo, self.dropout(self.act(self.wi_0(x)) * self.wi_1(x)))


def _project_out(wo: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    # float16 overflows here in the larger models, so `wo` may be wider than the rest. A weight of whole
    # numbers or 8-bit floats belongs to a quantized layer, which knows what it takes.
    dtype = getattr(wo.weight, "dtype", x.dtype)
    return wo(x.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else x)


class T5Attention(nn.Module):
    """What self- and cross-attention share: the projections, and scores that are not scaled."""

    def __init__(self, config: arch.T5Config, layer_idx: int, num_heads: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.d_kv
        inner = num_heads * config.d_kv
        # The missing scale of the scores is in the initial queries (Mesh TensorFlow's attention).
        self.q = linear(config.d_model, inner, (config.d_model * config.d_kv) ** -0.5)
        self.k = linear(config.d_model, inner, config.d_model**-0.5)
        self.v = linear(config.d_model, inner, config.d_model**-0.5)
        self.o = linear(inner, config.d_model, inner**-0.5)

    def heads(self, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Project [B, T, D] to [B, H, T, K].

        Args:
            projection: `q`, `k` or `v`.
            x: What is projected.
        """
        return projection(x).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def mix(
        self,
        x: torch.Tensor,
        k_BHSK: torch.Tensor,
        v_BHSK: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from [B, T, D] to keys and values; return [B, T, D] and the weights, if asked."""
        out, weights = attend(
            self,
            self.config,
            self.heads(self.q, x),
            k_BHSK,
            v_BHSK,
            mask,
            scaling=1.0,
            dropout=self.config.dropout_rate,
            output_attentions=output_attentions,
        )
        return self.o(out.reshape(*x.shape[:-1], -1)), weights


class T5SelfAttention(T5Attention):
    """Attention among a stack's own tokens, by content and relative position.

    Args:
        config: The model's configuration.
        layer_idx: Index of the block.
        bidirectional: Whether tokens look at those after them, as an encoder's do.
    """

    def __init__(self, config: arch.T5Config, layer_idx: int, *, bidirectional: bool) -> None:
        heads = config.encoder_heads_left(layer_idx) if bidirectional else config.num_heads
        super().__init__(config, layer_idx, heads)
        self.bidirectional = bidirectional
        self.heads_gone = tuple(config.pruned_heads.get(layer_idx, ())) if bidirectional else ()
        self.relative_attention_bias: nn.Embedding | None = None
        if config.has_position_bias(layer_idx):
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )
            self.relative_attention_bias.initial_std = config.d_model**-0.5  # type: ignore[assignment]

    def position_bias(
        self, last_position: int | torch.Tensor, query_length: int, kv_length: int
    ) -> torch.Tensor:
        """Return what relative positions add to the scores, [1, H, T, S].

        Args:
            last_position: Position of the last query; the others come right before it, and keys are at 0 to
                S - 1. A tensor of no axes where it is known on the device only.
            query_length: T.
            kv_length: S.
        """
        assert self.relative_attention_bias is not None
        # Along each diagonal all entries are the same, so that the table is asked T + S - 1 times and not
        # T x S times; each query's row is a window of the answers.
        steps = torch.arange(query_length + kv_length - 1, device=self.relative_attention_bias.weight.device)
        buckets = relative_position_bucket(
            steps - last_position,
            bidirectional=self.bidirectional,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        diagonals_HL = self.relative_attention_bias(buckets).t().contiguous()
        return diagonals_HL.unfold(-1, kv_length, 1).flip(1)[None]

    def forward(
        self,
        x: torch.Tensor,
        biased_mask: torch.Tensor,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the cached and new ones it may see."""
        k, v = self.heads(self.k, x), self.heads(self.v, x)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, cache_position)
        return self.mix(x, k, v, self._own_heads(biased_mask), output_attentions)

    def _own_heads(self, biased_mask: torch.Tensor) -> torch.Tensor:
        """Return the biases of the heads that are left; the table, which layers share, has them all."""
        if not self.heads_gone:
            return biased_mask
        kept = (head for head in range(biased_mask.shape[1]) if head not in self.heads_gone)
        return torch.cat([biased_mask[:, head : head + 1] for head in kept], dim=1)

    def head_parts(self) -> HeadParts:
        """Return the layers with a slice for each head."""
        every = range(self.config.num_heads)
        return HeadParts(
            (self.q,),
            (self.k, self.v),
            self.o,
            self.head_dim,
            self,
            lambda kept: {"heads_gone": tuple(head for head in every if head not in kept)},
        )


class T5CrossAttention(T5Attention):
    """Attention from the decoder to the encoder's output, whose keys and values are computed once."""

    def __init__(self, config: arch.T5Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.num_heads)

    def forward(
        self,
        x: torch.Tensor,
        encoder_states: torch.Tensor,
        mask: torch.Tensor | None,
        cache: EncoderDecoderCache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the encoder's."""
        if cache is not None and cache.is_updated.get(self.layer_idx):
            k, v = cache.cross_attention_cache[self.layer_idx]
        else:
            k, v = self.heads(self.k, encoder_states), self.heads(self.v, encoder_states)
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        if k.shape[0] == x.shape[0]:
            return self.mix(x, k, v, mask, output_attentions)
        # Beams of one text look at it as if they were more tokens of one row.
        out, weights = self.mix(x.reshape(k.shape[0], -1, x.shape[-1]), k, v, mask, output_attentions)
        if weights is not None:
            weights = weights.unflatten(2, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)
        return out.view_as(x), weights


class T5LayerSelfAttention(nn.Module):
    """Self-attention, normalised before and added after."""

    def __init__(self, config: arch.T5Config, layer_idx: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.SelfAttention = T5SelfAttention(config, layer_idx, bidirectional=bidirectional)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [B, T, D] and the weights, if asked; `args` are those of `T5SelfAttention.forward`."""
        attended, weights = self.SelfAttention(self.layer_norm(x), *args)
        return x + self.dropout(attended), weights


class T5LayerCrossAttention(nn.Module):
    """Cross-attention, normalised before and added after."""

    def __init__(self, config: arch.T5Config, layer_idx: int) -> None:
        super().__init__()
        self.EncDecAttention = T5CrossAttention(config, layer_idx)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return [B, T, D] and the weights, if asked; `args` are those of `T5CrossAttention.forward`."""
        attended, weights = self.EncDecAttention(self.layer_norm(x), *args)
        return x + self.dropout(attended), weights


class T5LayerFF(nn.Module):
    """The feed-forward network, normalised before and added after."""

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__()
        network = T5DenseGatedActDense if config.is_gated_act else T5DenseActDense
        self.DenseReluDense = network(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, D]."""
        return x + self.dropout(self.DenseReluDense(self.layer_norm(x)))


class T5Block(nn.Module):
    """One block: self-attention, in a decoder cross-attention, and the feed-forward network.

    Args:
        config: The model's configuration.
        layer_idx: Index of the block in its stack.
        is_decoder: Which of the two stacks it is in.
    """

    def __init__(self, config: arch.T5Config, layer_idx: int, *, is_decoder: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [T5LayerSelfAttention(config, layer_idx, bidirectional=not is_decoder)]
        if is_decoder:
            layers.append(T5LayerCrossAttention(config, layer_idx))
        self.layer = nn.ModuleList([*layers, T5LayerFF(config)])

    def forward(
        self,
        x: torch.Tensor,
        biased_mask: torch.Tensor,
        output_attentions: bool,
        cache: EncoderDecoderCache | None = None,
        cache_position: torch.Tensor | None = None,
        encoder_states: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the block's output [B, T, D] and, if asked, its self- and cross-attention weights."""
        x, weights = self.layer[0](x, biased_mask, cache, cache_position, output_attentions)
        x, cross_weights = keep_finite(x), None
        if encoder_states is not None:
            x, cross_weights = self.layer[1](x, encoder_states, encoder_mask, cache, output_attentions)
            x = keep_finite(x)
        return keep_finite(self.layer[-1](x)), weights, cross_weights
