# SPDX-License-Identifier: Apache-2.0
"""The decoding step of the T5 family: the decoder of `models/t5.py` for one new token of each row.

Shapes: B rows, H heads, K channels of a head, S tokens seen (or the encoder's), D hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrained.torch.cache import Cache, EncoderDecoderCache
from pretrained.torch.inputs import embed_tokens
from pretrained.torch.masks import additive, padding_mask
from pretrained.torch.steps.common import Products, attend_once, is_stock, make_norm

_MODULES = frozenset({"nn"} | {f"models.{name}" for name in ("t5", "t5_layers", "t5_stacks", "mt5", "umt5")})
_FIRST_POSITIONS = 256


class T5Step:
    """One new token of each row of a T5-like decoder.

    Args:
        model: A `T5ForConditionalGeneration`.
        rows: Rows.
        cache: Filled by the encoder's output and the first tokens.
        products: Makes the products.
        encoder_mask: [B, S] with 0 for the encoder's padding, or None.
    """

    @staticmethod
    def fits(model: Any, cache: Cache) -> bool:
        """Whether the step computes what the model's forward would.

        Args:
            model: A `T5ForConditionalGeneration`.
            cache: What it would be given.
        """
        config = model.config
        return (
            config.attn_implementation in (None, "sdpa")
            and not config.output_attentions
            and not config.output_hidden_states
            and isinstance(cache, EncoderDecoderCache)
            and len(cache.is_updated) == len(model.decoder.block)
            and all(cache.is_updated.values())
            # float16 is clipped between the layers, and may have a wider `wo`.
            and model.lm_head.weight.dtype in (torch.float32, torch.bfloat16)
            and is_stock(model, _MODULES)
        )

    def __init__(
        self,
        model: Any,
        rows: int,
        cache: EncoderDecoderCache,
        products: Products,
        encoder_mask: torch.Tensor | None = None,
    ) -> None:
        decoder = model.decoder
        self._rows, self._cache = rows, cache
        self._embedding = decoder.embed_tokens
        self._blocks = [_Block(block, rows, products) for block in decoder.block]
        self._scale = model.model_dim**-0.5 if model.config.scale_decoder_outputs else 1.0
        self._head = products(model.lm_head)
        self._norm = make_norm(decoder.final_layer_norm, rows, self._head)
        self._encoder_mask = None
        if encoder_mask is not None:
            allowed = padding_mask(encoder_mask, kv_length=encoder_mask.shape[-1])
            self._encoder_mask = _as_numbers(allowed, model.lm_head.weight.dtype)

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [B, 1, vocab]. See `DecodeStep`."""
        x = embed_tokens(self._embedding, tokens[:, None], None).view(self._rows, -1)
        hidden = None
        if mask is not None:
            hidden = _as_numbers(mask[:, None, None, : position + 1].bool(), x.dtype)
        bias = None
        for index, block in enumerate(self._blocks):
            if block.has_bias:
                bias = block.bias(position)
                bias = bias if hidden is None else bias + hidden
            x = block(x, bias, self._encoder_mask, self._cache, index)
        x = self._norm(x)
        return self._head(x if self._scale == 1.0 else x * self._scale)[:, None]


def _as_numbers(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn booleans into numbers to add, once and not in every layer."""
    if mask is None or mask.dtype != torch.bool:
        return additive(mask, dtype)
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)


class _Block:
    """One block: self-attention, cross-attention, feed-forward."""

    def __init__(self, block: Any, rows: int, products: Products) -> None:
        own, cross, feed = block.layer
        attention, across, dense = own.SelfAttention, cross.EncDecAttention, feed.DenseReluDense
        self._rows, self._width = rows, attention.head_dim
        self._attention = attention
        self.has_bias = attention.relative_attention_bias is not None
        self._biases: torch.Tensor | None = None
        self._in = products(attention.q, attention.k, attention.v)
        self._norm = make_norm(own.layer_norm, rows, self._in)
        self._out = products(attention.o)
        self._cross_in, self._cross_out = products(across.q), products(across.o)
        self._cross_norm = make_norm(cross.layer_norm, rows, self._cross_in)
        self._gated = hasattr(dense, "wi_0")
        self._up = products(dense.wi_0, dense.wi_1) if self._gated else products(dense.wi)
        self._feed_norm = make_norm(feed.layer_norm, rows, self._up)
        self._down, self._act = products(dense.wo), dense.act

    def bias(self, position: int) -> torch.Tensor:
        """Return what relative positions add to the scores of a query, [1, H, 1, position + 1].

        Args:
            position: Of the query.
        """
        if self._biases is None or position >= self._biases.shape[-1]:
            count = max(_FIRST_POSITIONS, 2 * (position + 1))
            self._biases = self._attention.position_bias(count - 1, 1, count).contiguous()
        # Those of the last query; an earlier one's are the nearest of them.
        return self._biases[..., self._biases.shape[-1] - 1 - position :]

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        encoder_mask: torch.Tensor | None,
        cache: EncoderDecoderCache,
        index: int,
    ) -> torch.Tensor:
        rows, width = self._rows, self._width
        q, k, v = self._in(self._norm(x)).view(rows, 3, -1, width).transpose(0, 1).unsqueeze(3).unbind(0)
        k, v = cache.update(k, v, index)
        x = x + self._out(attend_once(q, k, v, bias, 1.0).reshape(rows, -1))
        k, v = cache.cross_attention_cache[index]
        # Beams of one text look at it as if they were more queries of one row.
        q = self._cross_in(self._cross_norm(x)).view(k.shape[0], -1, k.shape[1], width).transpose(1, 2)
        out = attend_once(q, k, v, encoder_mask, 1.0)
        x = x + self._cross_out(out.transpose(1, 2).reshape(rows, -1))
        wide = self._up(self._feed_norm(x))
        if self._gated:
            gate, up = wide.chunk(2, dim=-1)
            wide = self._act(gate) * up
        else:
            wide = self._act(wide)
        return x + self._down(wide)
