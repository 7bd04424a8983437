# SPDX-License-Identifier: Apache-2.0
"""The decoding step of the Llama family: `models/llama.py` for one new token of each row.

Shapes: B rows, H query heads, G key-value heads, K channels of a head, S tokens seen, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pretrained.torch.cache import Cache
from pretrained.torch.inputs import embed_tokens
from pretrained.torch.steps.common import Products, attend_once, is_stock, make_norm

_MODULES = frozenset(
    {"nn"} | {f"models.{name}" for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3")}
)
_FIRST_POSITIONS = 512


class LlamaStep:
    """One new token of each row of a Llama-like decoder.

    Args:
        model: A `LlamaForCausalLM`.
        rows: Rows.
        cache: Filled by the prompt.
        products: Makes the products.
    """

    @staticmethod
    def fits(model: Any, cache: Cache) -> bool:
        """Whether the step computes what the model's forward would.

        Args:
            model: A `LlamaForCausalLM`.
            cache: What it would be given.
        """
        config = model.config
        # The step looks at all that a layer hands back, so a layer with a window must hand back no more.
        slides = [*cache.is_sliding, *(False for _ in model.model.windows)]
        narrow = all(slides[i] for i, window in enumerate(model.model.windows) if window is not None)
        return (
            config.attn_implementation in (None, "sdpa")
            and not config.output_attentions
            and not config.output_hidden_states
            and narrow
            and is_stock(model, _MODULES)
        )

    def __init__(self, model: Any, rows: int, cache: Cache, products: Products) -> None:
        body = model.model
        self.rows, self._cache = rows, cache
        self._embedding, self._rotary = body.embed_tokens, body.rotary_emb
        self._layers = [self._make(layer, rows, products) for layer in body.layers]
        self._windows = body.windows
        self._head = products(model.lm_head)
        self._norm = make_norm(body.norm, rows, self._head)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        table = body.rotary_emb.table
        # Frequencies that depend on the length are asked for at every step.
        self._keeps_tables = table.dynamic is None and table.long_inv_freq is None

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [B, 1, vocab]. See `DecodeStep`."""
        x = embed_tokens(self._embedding, tokens[:, None], None).view(self.rows, -1)
        rotary = self._rotation(x, position, positions)
        masks = self._masks(mask)
        for index, (layer, window) in enumerate(zip(self._layers, self._windows, strict=True)):
            x = layer(x, rotary, masks.get(window), self._cache, index)
        return self._head(self._norm(x))[:, None]

    def _make(self, layer: Any, rows: int, products: Products) -> _Layer:
        return _Layer(layer, rows, products)

    def _rotation(
        self, x: torch.Tensor, position: int, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines, [B or 1, 1, 2, K / 2]."""
        if not self._keeps_tables:
            where = torch.tensor([[position]]) if positions is None else positions
            return _signed(*self._rotary(x, where))
        last = position if positions is None else int(positions.max())
        if self._tables is None or last >= self._tables[0].shape[0]:
            count = max(_FIRST_POSITIONS, 2 * (last + 1))
            self._tables = _signed(*self._rotary(x, torch.arange(count)[None]))
        cos, sin = self._tables
        if positions is None:
            return cos[position : position + 1], sin[position : position + 1]
        where = positions.view(-1)
        return cos.index_select(0, where), sin.index_select(0, where)

    def _masks(self, mask: torch.Tensor | None) -> dict[int | None, torch.Tensor | None]:
        """Return which keys each kind of layer looks at, [B, 1, 1, S]."""
        if mask is None:
            # A growing cache hands a sliding layer just what its window holds.
            return {}
        masks: dict[int | None, torch.Tensor | None] = {}
        for index, window in enumerate(self._windows):
            if window not in masks:
                length, first = self._cache.get_mask_sizes(1, index)
                masks[window] = mask[:, None, None, first : first + length].bool()
        return masks


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From [B, 1, T, K] to [B * T, 1, 2, K / 2], with the sign of the half that a product takes."""
    cos, sin = (table.unflatten(-1, (2, -1)).flatten(0, 2)[:, None] for table in (cos, sin))
    return cos.contiguous(), torch.cat([-sin[:, :, :1], sin[:, :, 1:]], dim=2)


class _Layer:
    """One block."""

    new = 1

    def __init__(self, layer: Any, rows: int, products: Products) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._width, self._scaling = attention.head_dim, attention.scaling
        self._queries = attention.q_proj.out_features // self._width
        self._keys = attention.k_proj.out_features // self._width
        self._rotates = attention.rotates
        self._q_norm, self._k_norm = attention.q_norm, attention.k_norm
        self._in = products(attention.q_proj, attention.k_proj, attention.v_proj)
        self._norm = make_norm(layer.input_layernorm, rows, self._in)
        self._out = products(attention.o_proj)
        self._up = products(mlp.gate_proj, mlp.up_proj)
        self._mlp_norm = make_norm(layer.post_attention_layernorm, rows, self._up)
        self._down = products(mlp.down_proj)
        self._act = mlp.act_fn
        self._rows = rows

    def __call__(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache,
        index: int,
    ) -> torch.Tensor:
        rows, width, queries, keys = self._rows, self._width, self._queries, self._keys
        heads = self._in(self._norm(x)).view(rows, -1, width)
        qk, v = heads.split_with_sizes((queries + keys, keys), 1)
        if self._q_norm is not None:
            qk = torch.cat([self._q_norm(qk[:, :queries]), self._k_norm(qk[:, queries:])], dim=1)
        if self._rotates:
            cos, sin = rotary
            halves = qk.view(rows, queries + keys, 2, -1)
            qk = torch.addcmul(halves * cos, halves.flip(2), sin).view(rows, -1, width)
        q, k = qk.split_with_sizes((queries, keys), 1)
        k, v = cache.update(k.unsqueeze(2), v.unsqueeze(2), index)
        # The query heads of one key-value head, as if they were queries of one head.
        q = q.view(rows, keys, -1, width)
        x = x + self._out(attend_once(q, k, v, mask, self._scaling).reshape(rows, -1))
        gate, up = self._up(self._mlp_norm(x)).chunk(2, dim=1)
        return x + self._down(self._act(gate) * up)


class LlamaWindow(LlamaStep):
    """Several new tokens of each row at once: the window of speculative decoding. See `DecodeWindow`.

    Args:
        model: A `LlamaForCausalLM`.
        cache: Filled by the prompt.
        products: Makes the products.
    """

    def __init__(self, model: Any, cache: Cache, products: Products) -> None:
        # Products and norms of two rows or more are all made the same way.
        super().__init__(model, 2, cache, products)
        self._model_masks = model.model._masks

    def _make(self, layer: Any, rows: int, products: Products) -> _Layer:
        return _WindowLayer(layer, rows, products)

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [B, T, vocab]."""
        rows, new = tokens.shape
        x = embed_tokens(self._embedding, tokens, None)
        masks = self._model_masks(x, mask, self._cache, None, position)
        if positions is None:
            positions = torch.arange(position, position + new)[None]
        cos, sin = _signed(*self._rotary(x, positions))
        if cos.shape[0] != rows * new:
            cos, sin = cos.repeat(rows, 1, 1, 1), sin.repeat(rows, 1, 1, 1)
        x = x.reshape(rows * new, -1)
        for index, (layer, window) in enumerate(zip(self._layers, self._windows, strict=True)):
            layer.new = new
            x = layer(x, (cos, sin), masks[window], self._cache, index)
        return self._head(self._norm(x)).view(rows, new, -1)


class _WindowLayer(_Layer):
    """One block over several tokens of each row: `new` of them."""

    def __call__(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache,
        index: int,
    ) -> torch.Tensor:
        tokens, width, queries, keys = x.shape[0], self._width, self._queries, self._keys
        heads = self._in(self._norm(x)).view(tokens, -1, width)
        qk, v = heads.split_with_sizes((queries + keys, keys), 1)
        if self._q_norm is not None:
            qk = torch.cat([self._q_norm(qk[:, :queries]), self._k_norm(qk[:, queries:])], dim=1)
        if self._rotates:
            cos, sin = rotary
            halves = qk.view(tokens, queries + keys, 2, -1)
            qk = torch.addcmul(halves * cos, halves.flip(2), sin).view(tokens, -1, width)
        qk, v = (states.unflatten(0, (-1, self.new)).transpose(1, 2) for states in (qk, v))
        q, k = qk.split_with_sizes((queries, keys), 1)
        k, v = cache.update(k, v, index)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self._scaling, enable_gqa=queries != keys
        )
        x = x + self._out(out.transpose(1, 2).reshape(tokens, -1))
        gate, up = self._up(self._mlp_norm(x)).chunk(2, dim=1)
        return x + self._down(self._act(gate) * up)
