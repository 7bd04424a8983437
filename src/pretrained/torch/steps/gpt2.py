# SPDX-License-Identifier: Apache-2.0
"""The decoding step of GPT-2: `models/gpt2.py` for one new token of each row.

Shapes: B rows, H heads, K channels of a head, S tokens seen, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pretrained.torch.cache import Cache
from pretrained.torch.inputs import embed_tokens
from pretrained.torch.steps.common import Products, attend_once, is_stock

_MODULES = frozenset({"nn", "models.gpt2", "models.gpt2_layers"})


class GPT2Step:
    """One new token of each row of a GPT-2.

    Args:
        model: A `GPT2LMHeadModel`.
        rows: Rows.
        cache: Filled by the prompt.
        products: Makes the products.
    """

    @staticmethod
    def fits(model: Any, cache: Cache) -> bool:
        """Whether the step computes what the model's forward would.

        Args:
            model: A `GPT2LMHeadModel`.
            cache: What it would be given.
        """
        config = model.config
        return (
            config.attn_implementation in (None, "sdpa")
            and not config.output_attentions
            and not config.output_hidden_states
            and not config.add_cross_attention
            and is_stock(model, _MODULES)
        )

    def __init__(self, model: Any, rows: int, cache: Cache, products: Products) -> None:
        body = model.transformer
        self._rows, self._cache = rows, cache
        self._embedding, self._positions = body.wte, body.wpe.weight.detach()
        self._blocks = [_Block(block, rows, products) for block in body.h]
        self._norm = _layer_norm(body.ln_f)
        self._head = products(model.lm_head)

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [B, 1, vocab]. See `DecodeStep`."""
        x = embed_tokens(self._embedding, tokens[:, None], None).view(self._rows, -1)
        if positions is None:
            x = x + self._positions[position : position + 1]
        else:
            x = x + F.embedding(positions[:, 0], self._positions)
        allowed = None if mask is None else mask[:, None, None, : position + 1].bool()
        for index, block in enumerate(self._blocks):
            x = block(x, allowed, self._cache, index)
        return self._head(self._norm(x))[:, None]


def _layer_norm(norm: Any) -> Any:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class _Block:
    """One block."""

    def __init__(self, block: Any, rows: int, products: Products) -> None:
        attention = block.attn
        self._rows, self._width, self._scaling = rows, attention.head_dim, attention.scaling
        self._norm, self._mlp_norm = _layer_norm(block.ln_1), _layer_norm(block.ln_2)
        self._in = products.transposed(attention.c_attn)
        self._out = products.transposed(attention.c_proj)
        self._up, self._down = products.transposed(block.mlp.c_fc), products.transposed(block.mlp.c_proj)
        self._act = block.mlp.act

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache, index: int) -> torch.Tensor:
        rows, width = self._rows, self._width
        q, k, v = self._in(self._norm(x)).view(rows, 3, -1, width).transpose(0, 1).unsqueeze(3).unbind(0)
        k, v = cache.update(k, v, index)
        x = x + self._out(attend_once(q, k, v, mask, self._scaling).reshape(rows, -1))
        return x + self._down(self._act(self._up(self._mlp_norm(x))))
