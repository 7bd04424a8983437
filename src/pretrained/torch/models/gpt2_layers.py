# SPDX-License-Identifier: Apache-2.0
"""The leaves of GPT-2: feed-forward, attention of its own and to an encoder, the block.

Shapes: B batch, T new tokens, S cached and new tokens (or the encoder's), D hidden, H heads, K channels
of a head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pretrained.arch import gpt2 as arch
from pretrained.torch.attention import attend
from pretrained.torch.cache import Cache, EncoderDecoderCache
from pretrained.torch.nn import Conv1D, activation
from pretrained.torch.pruning import HeadParts


class GPT2MLP(nn.Module):
    """Feed-forward network."""

    def __init__(self, config: arch.GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.inner_size, config.n_embd)
        self.c_proj = _into_residual(Conv1D(config.n_embd, config.inner_size))
        self.act = activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network to [B, T, D]."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def _into_residual(layer: Conv1D) -> Conv1D:
    """Mark a layer whose output is added to the residual stream, which starts smaller."""
    layer.into_residual = True  # type: ignore[assignment]
    return layer


class _Attention(nn.Module):
    """What both kinds of attention share.

    Args:
        config: The model's configuration.
        layer_idx: Index of the block.
        num_heads: Heads, pruned ones not counted.
    """

    is_causal = True

    def __init__(self, config: arch.GPT2Config, layer_idx: int, num_heads: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.num_heads = config, layer_idx, num_heads
        self.head_dim = config.head_size
        self.split_size = num_heads * self.head_dim
        self.scaling = config.attention_scaling(layer_idx)
        self.c_proj = _into_residual(Conv1D(config.n_embd, self.split_size))
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, S, H * K] into [B, H, S, K]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _attend(
        self,
        q_BHTK: torch.Tensor,
        k_BHSK: torch.Tensor,
        v_BHSK: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = v_BHSK.dtype
        precision: AbstractContextManager[Any] = nullcontext()
        eager = output_attentions or self.config.attn_implementation == "eager"
        if eager and self.config.reorder_and_upcast_attn:
            # Scores in float32, whatever autocast says; the fused kernels add them up in float32 anyway.
            q_BHTK, k_BHSK, v_BHSK = q_BHTK.float(), k_BHSK.float(), v_BHSK.float()
            precision = torch.autocast(q_BHTK.device.type, enabled=False)
        with precision:
            out, weights = attend(
                self,
                self.config,
                q_BHTK,
                k_BHSK,
                v_BHSK,
                mask,
                scaling=self.scaling,
                dropout=self.config.attn_pdrop,
                is_causal=self.is_causal,
                output_attentions=output_attentions,
            )
        out = self.resid_dropout(self.c_proj(out.flatten(-2).to(dtype)))
        return out, None if weights is None else weights.to(dtype)


class GPT2Attention(_Attention):
    """Attention of the tokens among themselves."""

    def __init__(self, config: arch.GPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.heads_left(layer_idx))
        self.c_attn = Conv1D(3 * self.split_size, config.n_embd)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the cached and new ones it may see."""
        q_BHTK, k_BHSK, v_BHSK = map(self._heads, self.c_attn(hidden_BTD).split(self.split_size, dim=-1))
        if cache is not None:
            k_BHSK, v_BHSK = cache.update(k_BHSK, v_BHSK, self.layer_idx, cache_position)
        return self._attend(q_BHTK, k_BHSK, v_BHSK, mask, output_attentions)

    def head_parts(self) -> HeadParts:
        """Return the layers with a slice for each head; one makes queries, keys and values."""
        size = self.head_dim
        return HeadParts(
            (self.c_attn,),
            (),
            self.c_proj,
            size,
            self,
            lambda kept: {"num_heads": len(kept), "split_size": len(kept) * size},
            blocks=3,
        )


class GPT2CrossAttention(_Attention):
    """Attention of the tokens to an encoder's output, whose keys and values are computed once."""

    is_causal = False

    def __init__(self, config: arch.GPT2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.n_head)
        self.c_attn = Conv1D(2 * self.split_size, config.n_embd)
        self.q_attn = Conv1D(self.split_size, config.n_embd)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        encoder_BSD: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the encoder's tokens."""
        q_BHTK = self._heads(self.q_attn(hidden_BTD))
        kept = cache if isinstance(cache, EncoderDecoderCache) else None
        if kept is not None and kept.is_updated.get(self.layer_idx):
            k_BHSK, v_BHSK = kept.cross_attention_cache[self.layer_idx]
        else:
            k_BHSK, v_BHSK = map(self._heads, self.c_attn(encoder_BSD).split(self.split_size, dim=-1))
            if kept is not None:
                k_BHSK, v_BHSK = kept.cross_attention_cache.update(k_BHSK, v_BHSK, self.layer_idx)
                kept.is_updated[self.layer_idx] = True
        return self._attend(q_BHTK, k_BHSK, v_BHSK, mask, output_attentions)


class GPT2Block(nn.Module):
    """One block: attention, cross-attention where there is an encoder, feed-forward."""

    def __init__(self, config: arch.GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.crossattention: GPT2CrossAttention | None = None
        if config.add_cross_attention:
            self.crossattention = GPT2CrossAttention(config, layer_idx)
            self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        cache_position: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the block's output [B, T, D] and, if asked, the weights of both attentions."""
        attended, weights = self.attn(
            self.ln_1(hidden_states), mask, cache, cache_position, output_attentions
        )
        x, cross_weights = hidden_states + attended, None
        if encoder_hidden_states is not None and self.crossattention is not None:
            attended, cross_weights = self.crossattention(
                self.ln_cross_attn(x), encoder_hidden_states, encoder_mask, cache, output_attentions
            )
            x = x + attended
        return x + self.mlp(self.ln_2(x)), weights, cross_weights
