# SPDX-License-Identifier: Apache-2.0
"""`PrefixCache`: beginnings that many prompts share, such as a system prompt, are run once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.cache import Cache, DynamicCache, DynamicLayer, DynamicSlidingLayer, layer_windows
from pretrained.torch.cache_layers import UNLIMITED, CacheLayer, nbytes_of
from pretrained.torch.generation.checks import check_ids, vocabulary
from pretrained.torch.generation.settings import parameters
from pretrained.torch.generation.turns import prompt_of, refuse_encoder


@dataclass(frozen=True)
class _Entry:
    """A beginning: [length] tokens, and each layer's keys and values, [1, kv_heads, length, head_dim]."""

    ids: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return nbytes_of(tensor for pair in self.layers for tensor in pair)


class PrefixCache:
    """Beginnings of prompts, found by their tokens, with keys and values that requests share.

    A request is given views of what is stored; they are copied when its own first token is written behind
    them, and what is stored never changes. Of a beginning that a prompt shares only in part, that part is
    used. Windows are kept whole here, so that any part can be.

    Args:
        model: A decoder with `generate`.
        max_bytes: How much memory may be held; what was used longest ago goes first.

    Attributes:
        reused: How many slots of each row the last `start` filled, padding included.

    Raises:
        GenerationError: an encoder-decoder, or a bound below 1.
    """

    def __init__(self, model: Any, max_bytes: int = 1 << 30) -> None:
        refuse_encoder(model, "A PrefixCache")
        if max_bytes < 1:
            raise GenerationError("max_bytes must be 1 or more", where="max_bytes", found=max_bytes)
        self._model = model
        self.max_bytes = max_bytes
        self.reused = 0
        self._windows = layer_windows(model.config)
        # Least recently used first.
        self._entries: OrderedDict[tuple[int, ...], _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._entries.clear()

    @torch.no_grad()
    def add(self, input_ids: torch.Tensor) -> int:
        """Run a beginning, unless it is held already, and keep its keys and values.

        Args:
            input_ids: [1, length], not padded.

        Returns:
            How many tokens were run: none, or those that no other beginning has.

        Raises:
            GenerationError: ids that cannot be, several rows, or more than `max_bytes`.
        """
        ids = check_ids(input_ids, vocabulary(self._model), "input_ids")
        if ids.shape[0] != 1:
            raise GenerationError(
                "A beginning is one row", where="input_ids", expected="[1, length]", found=list(ids.shape)
            )
        key = tuple(ids[0].tolist())
        with self._lock:
            held = self._entries.get(key)
            if held is not None:
                self._entries.move_to_end(key)
                return 0
        cache = self._begin(ids, None, ids.shape[1], UNLIMITED)
        begun = 0 if cache is None else cache.get_seq_length()
        if cache is None:
            cache = DynamicCache(config=self._model.config, margin=UNLIMITED)
        more = {"logits_to_keep": 1} if "logits_to_keep" in parameters(type(self._model).forward) else {}
        device = self._model.get_input_embeddings().weight.device
        self._model(ids[:, begun:].to(device), past_key_values=cache, use_cache=True, **more)
        # Cloned: buffers have room to spare, and states may be views of larger ones.
        layers = tuple((layer.keys.clone(), layer.values.clone()) for layer in cache.layers)  # type: ignore[union-attr]
        self._keep(key, _Entry(ids[0].cpu(), layers))
        return ids.shape[1] - begun

    def start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Cache | None:
        """Return a cache that holds the beginning of prompts as far as it is known, or None.

        Rows padded on the left share a beginning too: theirs is moved behind the padding.

        Args:
            input_ids: [batch, length] the prompts.
            attention_mask: [batch, length] with 0 for padding; None for none.

        Returns:
            To be passed to `model.generate` with the same prompts, as `past_key_values`.
        """
        cache = self._begin(input_ids, attention_mask, input_ids.shape[1] - 1, 0)
        self.reused = 0 if cache is None else cache.get_seq_length()
        return cache

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as `model.generate` does, from the longest beginning that is known.

        Args:
            inputs: [batch, length] the whole prompts.
            **kwargs: Arguments of `model.generate`, except `past_key_values` and `cache_implementation`.

        Raises:
            GenerationError: as `model.generate`.
        """
        ids = prompt_of(inputs, kwargs, "A PrefixCache")
        return self._model.generate(
            ids, past_key_values=self.start(ids, kwargs.get("attention_mask")), **kwargs
        )

    def _hides_tokens(self, rows: torch.Tensor) -> bool:
        """Whether `generate` would take some of these tokens for padding, without a mask that says so."""
        config = getattr(self._model, "generation_config", None)
        pad = getattr(config, "pad_token_id", None)
        ends = getattr(config, "eos_token_id", None)
        ends = [ends] if isinstance(ends, int) else ends or []
        return pad is not None and pad not in ends and bool((rows == pad).any())

    def _keep(self, key: tuple[int, ...], entry: _Entry) -> None:
        if entry.nbytes > self.max_bytes:
            raise GenerationError(
                "The beginning takes more memory than the cache may hold",
                where="max_bytes",
                expected=f"{entry.nbytes} or more",
                found=self.max_bytes,
                mend="Raise max_bytes, or keep a shorter beginning.",
            )
        with self._lock:
            self._entries[key] = entry
            while self.nbytes > self.max_bytes:
                self._entries.popitem(last=False)

    def _begin(
        self, ids: torch.Tensor, mask: torch.Tensor | None, most: int, margin: int
    ) -> DynamicCache | None:
        """Return a cache of at most `most` slots of each row, from the beginning that fills most of them."""
        rows = ids.cpu()
        padding = [0] * rows.shape[0]
        if mask is None and self._hides_tokens(rows):
            return None
        if mask is not None and bool((mask == 0).any()):
            seen = mask.cpu() != 0
            padding = seen.int().argmax(dim=1).tolist()
            if not all(bool(seen[row, pad:].all()) for row, pad in enumerate(padding)):
                # Holes, or padding on the right: positions would not be those of a beginning.
                return None
        best, slots = None, 0
        with self._lock:
            for key, entry in self._entries.items():
                found = min(pad + _shared(entry.ids, rows[row, pad:]) for row, pad in enumerate(padding))
                if min(found, most) > slots and any(pad < found for pad in padding):
                    best, slots = key, min(found, most)
            if best is None:
                return None
            self._entries.move_to_end(best)
            entry = self._entries[best]
        cache = DynamicCache()
        for (keys, values), window in zip(entry.layers, self._windows, strict=True):
            layer: CacheLayer = DynamicLayer() if window is None else DynamicSlidingLayer(window, margin)
            layer.resume(_rows(keys, padding, slots), _rows(values, padding, slots))
            cache.layers.append(layer)
        return cache


def _shared(stored: torch.Tensor, row: torch.Tensor) -> int:
    """Return how many tokens two rows have in common, counted from the beginning."""
    length = min(stored.shape[0], row.shape[0])
    return int((stored[:length] == row[:length]).long().cumprod(0).sum())


def _rows(states: torch.Tensor, padding: list[int], slots: int) -> torch.Tensor:
    """Return [1, heads, length, width] for all rows: a view, or where rows are padded, moved behind it."""
    if not any(padding):
        return states[:, :, :slots].expand(len(padding), -1, -1, -1)
    moved = states.new_zeros((len(padding), states.shape[1], slots, states.shape[3]))
    for row, pad in enumerate(padding):
        if pad < slots:
            moved[row, :, pad:] = states[0, :, : slots - pad]
    return moved
