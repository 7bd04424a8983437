# SPDX-License-Identifier: Apache-2.0
"""Key/value caches behind one small protocol.

A `Cache` is a list of layers. A model calls ``cache.update(k, v, layer_idx, cache_position)`` and attends
over what comes back. Keys and values are [batch, kv_heads, length, head_dim].

Positions are counted on the host: growing, cropping and asking for the length never wait for a device.
Only a step that is compiled or captured passes `cache_position`; then a static layer writes by that tensor
and hands back its whole buffer, and `Cache.advance` moves the host's count afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache_layers import (
    UNBOUNDED,
    CacheLayer,
    DynamicLayer,
    DynamicSlidingLayer,
    StaticLayer,
)

__all__ = [
    "Cache",
    "CacheLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingLayer",
    "EncoderDecoderCache",
    "StaticCache",
    "StaticLayer",
    "layer_windows",
]


class Cache:
    """The caches of a model's layers.

    Args:
        layers: One layer object for each attention layer; None to make them as the model comes to them.
        make: Makes the layer of an index that `layers` does not have yet.
    """

    def __init__(
        self, layers: Iterable[CacheLayer] | None = None, *, make: Callable[[int], CacheLayer] | None = None
    ) -> None:
        self.layers: list[CacheLayer] = list(layers or ())
        self._make = make

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_position: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's new keys and values; return all that its new queries may look at.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            layer_idx: Which layer.
            cache_position: [new] positions, only for compiled steps over a static cache.

        Returns:
            Keys and values, [batch, kv_heads, as `get_mask_sizes` said, head_dim].
        """
        if layer_idx >= len(self.layers):
            self._grow(layer_idx)
        return self.layers[layer_idx].update(key_states, value_states, cache_position)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens a layer has seen.

        Args:
            layer_idx: Which layer.
        """
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_mask_sizes(
        self, query_length: int, layer_idx: int = 0, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update of a layer hands back, and the position of the first.

        Args:
            query_length: How many new tokens there will be.
            layer_idx: Which layer.
            cache_position: What `update` will be given.
        """
        if layer_idx >= len(self.layers):
            self._grow(layer_idx)
        return self.layers[layer_idx].get_mask_sizes(query_length, cache_position)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return how many tokens fit, or -1 where there is no bound.

        Args:
            layer_idx: Which layer; None for the least of all.
        """
        layers = self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]
        bounds = [n for n in (layer.get_max_length() for layer in layers) if n != UNBOUNDED]
        return min(bounds, default=UNBOUNDED)

    @property
    def max_cache_len(self) -> int:
        """How many tokens fit, or -1 where there is no bound."""
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while the cache is empty."""
        return next((layer.keys.shape[0] for layer in self.layers if layer.keys is not None), -1)

    @property
    def is_compileable(self) -> bool:
        """Whether every layer can be written by a position tensor, at a fixed address."""
        return bool(self.layers) and all(layer.is_compileable for layer in self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers keep only a window."""
        return [layer.is_sliding for layer in self.layers]

    def advance(self, tokens: int) -> None:
        """Count tokens that a compiled step wrote by `cache_position`.

        Args:
            tokens: How many.
        """
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                layer.advance(tokens)

    def crop(self, length: int) -> None:
        """Keep the first tokens of every row.

        Args:
            length: Tokens to keep; negative to take so many away from the end.
        """
        if length < 0:
            length = max(self.get_seq_length() + length, 0)
        for layer in self.layers:
            layer.crop(length)

    def reset(self) -> None:
        """Forget everything. A static cache keeps its buffers."""
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue from another one.

        Args:
            beam_idx: [batch] row to take for each row.
        """
        self.batch_select_indices(beam_idx)

    def copy_rows(self, rows: torch.Tensor, sources: torch.Tensor, newest: int) -> None:
        """Let some rows go on from others that differ from them in their newest tokens only.

        Beams of a prompt soon stem from one another, so this copies a few tokens where `reorder_cache`
        copies all.

        Args:
            rows: [changed] which rows.
            sources: [changed] which row to take for each.
            newest: How many tokens at the end may differ.
        """
        for layer in self.layers:
            layer.copy_rows(rows, sources, newest)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows.

        Args:
            indices: [rows] which to keep, in which order.
        """
        for layer in self.layers:
            layer.map_batch(lambda buffer: buffer.index_select(0, indices.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, its copies next to each other.

        Args:
            repeats: How often.
        """
        for layer in self.layers:
            layer.map_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def early_initialization(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Allocate the static layers now, before a compiled step sees them.

        Args:
            batch_size: Rows.
            num_heads: Key/value heads.
            head_dim: Width of a head.
            dtype: Dtype of keys and values.
            device: Where.
        """
        for layer in self.layers:
            if isinstance(layer, StaticLayer):
                layer.allocate(batch_size, num_heads, head_dim, dtype, device)

    def to_legacy_cache(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Return one (keys, values) pair for each layer, as older code expects."""
        return tuple(self[index] for index in range(len(self.layers)))

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Iterable[torch.Tensor]] | None = None) -> Any:
        """Make a growing cache from one (keys, values) pair for each layer.

        Args:
            past_key_values: [batch, kv_heads, length, head_dim] each; None for an empty cache.
        """
        cache = DynamicCache()
        for index, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, index)
        return cache

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        layer = self.layers[layer_idx]
        if layer.keys is None or layer.values is None:
            raise IndexError(f"Layer {layer_idx} of this cache is empty")
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self[index] for index in range(len(self.layers)))

    def __bool__(self) -> bool:
        # A cache is an object to fill, not a collection: an empty one is still a cache.
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers)} layers, {self.get_seq_length()} tokens)"

    def _grow(self, layer_idx: int) -> None:
        if self._make is None:
            raise GenerationError(
                "This cache was made for a model with fewer layers",
                where="past_key_values",
                expected=f"more than {layer_idx} layers",
                found=len(self.layers),
                mend="Make it from this model's config.",
            )
        while len(self.layers) <= layer_idx:
            self.layers.append(self._make(len(self.layers)))


class DynamicCache(Cache):
    """Grows with the sequence; layers with a sliding window keep only what it needs.

    Args:
        config: The model's config, which says which layers slide; None for none of them.
        margin: How many tokens `crop` must be able to take away from sliding layers.
    """

    def __init__(self, config: Any = None, *, margin: int = 0) -> None:
        windows = layer_windows(config) if config is not None else []
        super().__init__([_dynamic(window, margin) for window in windows], make=_full)


class StaticCache(Cache):
    """Room for a fixed number of tokens, allocated at the first update: for compiled steps.

    Sliding layers get full length too, so that positions stay addresses; the model's mask narrows them.

    Args:
        config: The model's config, which says how many layers there are.
        max_cache_len: How many tokens fit in a row.
    """

    def __init__(self, config: Any, max_cache_len: int) -> None:
        super().__init__([StaticLayer(max_cache_len) for _ in layer_windows(config)])


class EncoderDecoderCache(Cache):
    """A decoder's own cache and that of its cross-attention, which is filled once from the encoder.

    A cross-attention layer asks ``is_updated.get(layer_idx)``; if not, it computes its keys and values
    from the encoder's output, updates `cross_attention_cache` and sets it.

    Args:
        self_attention_cache: Of the decoder's own tokens.
        cross_attention_cache: Of the encoder's tokens.
    """

    def __init__(self, self_attention_cache: Cache, cross_attention_cache: Cache) -> None:
        super().__init__()
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        filled = range(len(cross_attention_cache))
        self.is_updated: dict[int, bool] = {i: cross_attention_cache.get_seq_length(i) > 0 for i in filled}
        # Everything that is asked of a decoder's cache means its own tokens.
        self.layers = self_attention_cache.layers
        self._make = self_attention_cache._make

    def reset(self) -> None:
        """Forget everything, the encoder's part included."""
        self.self_attention_cache.reset()
        # Dropped even where it is static: its length is the next encoder's.
        self.cross_attention_cache.reset()
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of both parts.

        Args:
            indices: [rows] which to keep, in which order.
        """
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of both parts, its copies next to each other.

        Args:
            repeats: How often.
        """
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Iterable[torch.Tensor]] | None = None) -> Any:
        """Make a growing cache from (keys, values, cross keys, cross values) of each layer.

        Args:
            past_key_values: [batch, kv_heads, length, head_dim] each; None for an empty cache.
        """
        rows = [tuple(row) for row in past_key_values or ()]
        cross = [row[2:] for row in rows if len(row) == 4]
        return cls(Cache.from_legacy_cache([row[:2] for row in rows]), Cache.from_legacy_cache(cross))

    def __getitem__(self, layer_idx: int) -> tuple[torch.Tensor, ...]:
        own = super().__getitem__(layer_idx)
        if self.is_updated.get(layer_idx):
            return own + self.cross_attention_cache[layer_idx]
        return own


def layer_windows(config: Any) -> list[int | None]:
    """Return each decoder layer's sliding window, or None where it sees everything.

    Args:
        config: A model's config: `layer_types` and `sliding_window`, or `sliding_window` alone for all.

    Raises:
        NotYetError: a kind of layer that no cache here serves.
    """
    text = getattr(config, "get_text_config", None)
    config = text(decoder=True) if callable(text) else config
    count = next((n for n in (getattr(config, name, None) for name in _COUNTS) if n is not None), None)
    if callable(getattr(config, "window", None)):
        return [config.window(layer) for layer in range(count or 0)]
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = window is not None and getattr(config, "use_sliding_window", True)
        return [window if slides else None] * (count or 0)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise NotYetError(f"There is no cache for layers of type {unknown[0]!r} yet", where="layer_types")
    return [window if kind == "sliding_attention" else None for kind in types[: count or len(types)]]


_COUNTS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "num_layers")


def _dynamic(window: int | None, margin: int) -> CacheLayer:
    return DynamicLayer() if window is None else DynamicSlidingLayer(window, margin)


def _full(layer_idx: int) -> CacheLayer:
    return DynamicLayer()
