# SPDX-License-Identifier: Apache-2.0
"""A key/value cache in pages, for many rows of different lengths in one forward.

PagedAttention, Kwon et al. 2023, arXiv:2309.06180. The rows of a step lie one after the other in a batch of
one: every layer but attention treats tokens alone, so there is no padding. Keys and values go into pages,
[pages, kv_heads, page_size, head_dim] for each layer, and `PagedKeys` attends row by row.

Rows with one new token attend together, and nothing is gathered for them: the pages themselves are the batch
of the two matrix products, each page with the query of the row that holds it; softmax is taken over the
small scores, put in the order of the rows. This took a tenth of the time of fused attention over gathered,
padded keys on a CPU (32 rows of 60 to 400 tokens: 0.4 against 4 to 6 ms a layer). Pages that several rows
hold are multiplied with the queries of all of them at once. Rows with several new tokens, pieces of prompts,
go through the model's own attention implementation one by one.

Shapes: T new tokens, N rows with one new token, E pages, C rows that hold a page, J pages of the longest row,
P tokens in a page, H query heads, G key/value heads, R = H / G, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pretrained.torch.attention import OwnAttention, attend
from pretrained.torch.cache import Cache, layer_windows
from pretrained.torch.masks import causal_mask

# By another name, for classes with a method `float`.
_Number = float

# Implementations that compute plain attention, which this file computes as well.
_PLAIN = (None, "sdpa", "eager", "flash_attention_2")
# Share of the pages up to the last one in use, from which on unused ones are multiplied too instead of
# copying the used ones together.
_DENSE = 0.5


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one row.

    Attributes:
        start: Position of the first.
        count: How many.
        pages: The row's pages in order, with room for them.
    """

    start: int
    count: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Pages that are multiplied together.

    Attributes:
        pages: [E] which; None for the first `count` of all.
        count: E.
        holders: [E * C] row of the step that holds the page; N for none.
        slots: [E * C] ``row * J + page of the row``; N * J for none.
        visible: [E * C, 1, 1, P] tokens that the row's query may look at; None for all.
        each: C.
    """

    pages: torch.Tensor | None
    count: int
    holders: torch.Tensor
    slots: torch.Tensor
    visible: torch.Tensor | None
    each: int


@dataclass(frozen=True, slots=True)
class _Single:
    """How rows with one new token attend in layers of one window: passes over pages, and J."""

    passes: tuple[_Pass, ...]
    longest: int


class Step:
    """Where the tokens of one forward lie: worked out once, used by every layer.

    Args:
        pieces: The rows of the step; those with one new token come first.
        page_size: Tokens in a page.
        device: Where the first layer is; others get copies.
    """

    def __init__(self, pieces: Sequence[Piece], page_size: int, device: torch.device) -> None:
        self.pieces, self.page_size = pieces, page_size
        self.singles = sum(piece.count == 1 for piece in pieces)
        positions = [np.arange(piece.start, piece.start + piece.count) for piece in pieces]
        pages = [
            np.asarray(piece.pages, dtype=np.int64)[at // page_size]
            for piece, at in zip(pieces, positions, strict=True)
        ]
        every = np.concatenate(positions)
        self.positions = torch.from_numpy(every)[None].to(device)
        self._slots = torch.from_numpy(np.concatenate(pages) * page_size + every % page_size)
        self._kept: dict[Any, Any] = {}

    @property
    def tokens(self) -> int:
        """T."""
        return self._slots.shape[0]

    def slots(self, kv_heads: int, device: torch.device) -> torch.Tensor:
        """Return where each new token's keys go in [pages * kv_heads * page_size], as [T * kv_heads].

        Args:
            kv_heads: G.
            device: Where the layer is.
        """
        key = ("slots", kv_heads, device)
        if key not in self._kept:
            size = self.page_size
            pages, offsets = self._slots // size, self._slots % size
            heads = torch.arange(kv_heads)
            flat = (pages[:, None] * kv_heads + heads) * size + offsets[:, None]
            self._kept[key] = flat.reshape(-1).to(device)
        found: torch.Tensor = self._kept[key]
        return found

    def single(self, window: int | None, device: torch.device) -> _Single:
        """Return how the rows with one new token attend.

        Args:
            window: Tokens back that a query sees, itself included; None for all.
            device: Where the layer is.
        """
        key = ("single", window, device)
        if key not in self._kept:
            self._kept[key] = self._plan(window, device)
        found: _Single = self._kept[key]
        return found

    def chunk(
        self, index: int, window: int | None, device: torch.device
    ) -> tuple[int, torch.Tensor, torch.Tensor | None]:
        """Return how a row with several new tokens attends.

        Args:
            index: Of the piece.
            window: As for `single`.
            device: Where the layer is.

        Returns:
            The number of keys, the pages that hold them, and the mask.
        """
        key = ("chunk", index, window, device)
        if key not in self._kept:
            piece, size = self.pieces[index], self.page_size
            first = 0 if window is None else max(piece.start - window + 1, 0) // size
            end = piece.start + piece.count
            pages = torch.tensor(piece.pages[first : -(-end // size)], device=device)
            mask = causal_mask(
                query_length=piece.count,
                kv_length=end - first * size,
                kv_offset=first * size,
                query_positions=piece.start,
                attention_mask=None,
                window=window,
                device=device,
            )
            self._kept[key] = (end - first * size, pages, mask)
        found: tuple[int, torch.Tensor, torch.Tensor | None] = self._kept[key]
        return found

    def _plan(self, window: int | None, device: torch.device) -> _Single:
        size, rows = self.page_size, self.singles
        positions = np.array([piece.start for piece in self.pieces[:rows]])
        firsts = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0) // size
        counts = positions // size - firsts + 1
        longest = int(counts.max())
        owners = np.repeat(np.arange(rows), counts)
        # 0, 1, .. for the pages of each row, counted from the first that it looks at.
        order = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        pages = np.concatenate(
            [
                np.asarray(piece.pages[first : first + count], dtype=np.int64)
                for piece, first, count in zip(self.pieces[:rows], firsts, counts, strict=True)
            ]
        )
        at = (order + firsts[owners])[:, None] * size + np.arange(size)
        visible = at <= positions[owners, None]
        if window is not None:
            visible &= at > positions[owners, None] - window
        slots = owners * longest + order
        held = np.bincount(pages)
        shared = held[pages] > 1
        passes = []
        alone = ~shared
        if alone.any():
            passes.append(
                _alone(pages[alone], owners[alone], slots[alone], visible[alone], rows, longest, device)
            )
        if shared.any():
            passes.append(
                _shared(pages[shared], owners[shared], slots[shared], visible[shared], rows, longest, device)
            )
        return _Single(tuple(passes), longest)


def _alone(
    pages: np.ndarray,
    owners: np.ndarray,
    slots: np.ndarray,
    visible: np.ndarray,
    rows: int,
    longest: int,
    device: torch.device,
) -> _Pass:
    """Return the pass over pages that one row holds each."""
    end = int(pages.max()) + 1
    if len(pages) < _DENSE * end:
        return _pass(pages, owners, slots, visible, 1, device)
    every_owner, every_slot = np.full(end, rows), np.full(end, rows * longest)
    every_owner[pages], every_slot[pages] = owners, slots
    every_visible = np.ones((end, visible.shape[1]), dtype=bool)
    every_visible[pages] = visible
    return _pass(None, every_owner, every_slot, every_visible, 1, device)


def _shared(
    pages: np.ndarray,
    owners: np.ndarray,
    slots: np.ndarray,
    visible: np.ndarray,
    rows: int,
    longest: int,
    device: torch.device,
) -> _Pass:
    """Return the pass over pages that several rows hold."""
    order = np.argsort(pages, kind="stable")
    unique, index, counts = np.unique(pages[order], return_inverse=True, return_counts=True)
    each = int(counts.max())
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[index]
    every_owner = np.full((len(unique), each), rows)
    every_slot = np.full((len(unique), each), rows * longest)
    every_visible = np.ones((len(unique), each, visible.shape[1]), dtype=bool)
    every_owner[index, place] = owners[order]
    every_slot[index, place] = slots[order]
    every_visible[index, place] = visible[order]
    return _pass(
        unique,
        every_owner.reshape(-1),
        every_slot.reshape(-1),
        every_visible.reshape(-1, visible.shape[1]),
        each,
        device,
    )


def _pass(
    pages: np.ndarray | None,
    owners: np.ndarray,
    slots: np.ndarray,
    visible: np.ndarray,
    each: int,
    device: torch.device,
) -> _Pass:
    return _Pass(
        pages=None if pages is None else torch.from_numpy(pages).to(device),
        count=len(owners) // each,
        holders=torch.from_numpy(owners).to(device),
        slots=torch.from_numpy(slots).to(device),
        visible=None if visible.all() else torch.from_numpy(visible)[:, None, None, :].to(device),
        each=each,
    )


class PagedCache(Cache):
    """The pages of all layers.

    Before each forward `begin` says where its tokens lie. The model is then given a batch of one row, with
    `position_ids` and any attention mask of rank 4, which is not looked at.

    Args:
        config: The model's config, which says which layers slide.
        page_size: Tokens in a page.
    """

    def __init__(self, config: Any, page_size: int) -> None:
        super().__init__()
        self.page_size = page_size
        self._windows = layer_windows(config)
        self._pools: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pages = 0
        self._step: Step | None = None

    def begin(self, step: Step, pages: int) -> None:
        """Say where the tokens of the next forward lie.

        Args:
            step: Where.
            pages: How many pages there must be room for.
        """
        self._step = step
        self._pages = max(self._pages, pages)

    def clear(self, pages: Sequence[int]) -> None:
        """Put zeros into pages: what is no number in them would spread to rows that hold them next.

        Args:
            pages: Which.
        """
        for pools in self._pools.values():
            for pool in pools:
                pool[torch.tensor(pages, device=pool.device)] = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(pool.nbytes for pools in self._pools.values() for pool in pools)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Put a layer's new keys and values into their pages.

        Args:
            key_states: [1, G, T, K].
            value_states: [1, G, T, K].
            layer_idx: Which layer.
            cache_position: Not used.

        Returns:
            `PagedKeys` twice, for `attend`.
        """
        assert self._step is not None
        step, (keys, values) = self._step, self._room(key_states, value_states, layer_idx)
        slots = step.slots(key_states.shape[1], key_states.device)
        for pool, states in ((keys, key_states), (values, value_states)):
            rows = states[0].transpose(0, 1).reshape(-1, states.shape[3])
            pool.view(-1, states.shape[3]).index_copy_(0, slots, rows)
        window = self._windows[layer_idx] if layer_idx < len(self._windows) else None
        attending = PagedKeys(step, keys, values, key_states, value_states, window)
        return attending, attending

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are given, for each row has its own.

        Args:
            layer_idx: Which layer.
        """
        return 0

    def get_mask_sizes(
        self, query_length: int, layer_idx: int = 0, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return what suits a mask of the new tokens; it is not looked at.

        Args:
            query_length: New tokens.
            layer_idx: Which layer.
            cache_position: Not used.
        """
        return query_length, 0

    def reset(self) -> None:
        """Let go of all memory."""
        self._pools.clear()
        self._step = None

    def _room(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = self._pools.get(layer_idx)
        if held is not None and held[0].shape[0] >= self._pages:
            return held
        made = []
        for index, states in enumerate((key_states, value_states)):
            # Zeroed: a weight of 0 times what is no number would not be 0.
            pool = states.new_zeros((self._pages, states.shape[1], self.page_size, states.shape[3]))
            if held is not None:
                pool[: held[index].shape[0]] = held[index]
            made.append(pool)
        self._pools[layer_idx] = (made[0], made[1])
        return made[0], made[1]


class PagedKeys(OwnAttention):
    """The keys and values of one layer in one step, which know how to be attended to.

    Args:
        step: Where everything lies.
        keys: [pages, G, P, K].
        values: [pages, G, P, K].
        new_keys: [1, G, T, K], in the pages already.
        new_values: [1, G, T, K].
        window: Of the layer, or None.
    """

    def __init__(
        self,
        step: Step,
        keys: torch.Tensor,
        values: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        window: int | None,
    ) -> None:
        self._step, self._keys, self._values = step, keys, values
        self._new = new_keys, new_values
        self._window = window

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._keys.dtype

    def float(self) -> PagedKeys:
        """Return itself: keys are taken in the dtype of the queries."""
        return self

    def attend(self, module: Any, config: Any, query: torch.Tensor, *, scaling: _Number) -> torch.Tensor:
        """Attend from each new token to those of its row.

        Args:
            module: The calling layer.
            config: Names the implementation for pieces of prompts.
            query: [1, H, T, K].
            scaling: Factor on the scores.

        Returns:
            [1, T, H, K].
        """
        step = self._step
        singles = step.singles if config.attn_implementation in _PLAIN else 0
        parts = [self._single(query[0, :, :singles], scaling)[None]] if singles else []
        offset = singles
        for index in range(singles, len(step.pieces)):
            count = step.pieces[index].count
            part = query[:, :, offset : offset + count]
            parts.append(self._chunk(module, config, part, index, offset, scaling))
            offset += count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _chunk(
        self, module: Any, config: Any, query: torch.Tensor, index: int, offset: int, scaling: _Number
    ) -> torch.Tensor:
        """Attend with the model's own implementation, [1, H, t, K] to [1, t, H, K]."""
        piece = self._step.pieces[index]
        length, pages, mask = self._step.chunk(index, self._window, query.device)
        if piece.start == 0:
            keys, values = (new[:, :, offset : offset + piece.count] for new in self._new)
        else:
            keys, values = (
                pool.index_select(0, pages).transpose(0, 1).flatten(1, 2)[None, :, :length]
                for pool in (self._keys, self._values)
            )
        return attend(
            module,
            config,
            query,
            keys.to(query.dtype),
            values.to(query.dtype),
            mask,
            scaling=scaling,
            is_causal=True,
            sliding_window=self._window,
        )[0]

    def _single(self, query: torch.Tensor, scaling: _Number) -> torch.Tensor:
        """Attend from one token of each row, [H, N, K] to [N, H, K]."""
        heads, rows, width = query.shape
        plan = self._step.single(self._window, query.device)
        size, longest = self._step.page_size, plan.longest
        # One more row, for pages that no row holds.
        queries = query.new_zeros((rows + 1, heads * width))
        queries[:rows] = query.transpose(0, 1).reshape(rows, -1)
        scores = query.new_full((rows * longest + 1, heads * size), float("-inf"))
        for each in plan.passes:
            found = self._scores(queries.index_select(0, each.holders), each, heads)
            if each.visible is not None:
                found.masked_fill_(~each.visible, float("-inf"))
            scores.index_copy_(0, each.slots, found.reshape(-1, heads * size))
        whole = scores[:-1].view(rows, longest, heads, size).transpose(1, 2).reshape(rows, heads, -1)
        whole = torch.softmax(whole.float().mul_(scaling), dim=-1).to(query.dtype)
        weights = query.new_zeros((rows * longest + 1, heads * size))
        weights[:-1].view(rows, longest, heads, size).copy_(
            whole.view(rows, heads, longest, size).transpose(1, 2)
        )
        output = queries.new_zeros((rows + 1, heads * width), dtype=torch.float32)
        for each in plan.passes:
            part = self._weighted(weights.index_select(0, each.slots), each, heads)
            output.index_add_(0, each.holders, part.float())
        return output[:rows].view(rows, heads, width).to(query.dtype)

    def _scores(self, queries: torch.Tensor, each: _Pass, heads: int) -> torch.Tensor:
        """Multiply queries [E * C, H * K] with the keys of their pages, to [E * C, G, R, P]."""
        keys = _taken(self._keys, each, queries.dtype)
        groups, size, width = keys.shape[1:]
        queries = _by_page(queries, each, groups, width)
        scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
        return _by_holder(scores, each, groups, size)

    def _weighted(self, weights: torch.Tensor, each: _Pass, heads: int) -> torch.Tensor:
        """Add up the values of pages by weights [E * C, H * P], to [E * C, H * K]."""
        values = _taken(self._values, each, weights.dtype)
        groups, size, width = values.shape[1:]
        weights = _by_page(weights, each, groups, size)
        return _by_holder(torch.bmm(weights, values.flatten(0, 1)), each, groups, width).flatten(1)


def _taken(pool: torch.Tensor, each: _Pass, dtype: torch.dtype) -> torch.Tensor:
    taken = pool[: each.count] if each.pages is None else pool.index_select(0, each.pages)
    return taken.to(dtype)


def _by_page(rows: torch.Tensor, each: _Pass, groups: int, width: int) -> torch.Tensor:
    """Turn [E * C, G * R * width] into [E * G, C * R, width]."""
    split = rows.view(each.count, each.each, groups, -1, width).transpose(1, 2)
    return split.reshape(each.count * groups, -1, width)


def _by_holder(product: torch.Tensor, each: _Pass, groups: int, width: int) -> torch.Tensor:
    """Turn [E * G, C * R, width] into [E * C, G, R, width]."""
    split = product.view(each.count, groups, each.each, -1, width).transpose(1, 2)
    return split.reshape(each.count * each.each, groups, -1, width)
