# SPDX-License-Identifier: Apache-2.0
"""Key/value caches behind one small protocol.

A `Cache` is a list of layers. A model calls ``cache.update(k, v, layer_idx, cache_position)`` and attends
over what comes back. Keys and values are [batch, kv_heads, length, head_dim].

Positions are counted on the host: growing, cropping and asking for the length never wait for a device.
Only a step that is compiled or captured passes `cache_position`; then a static layer writes by that tensor
and hands back its whole buffer, and `Cache.advance` moves the host's count afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from pretrained.errors import ArgumentError, GenerationError, NotYetError

UNBOUNDED = -1
"""What `get_max_length` says of a cache that grows."""

_BUCKET = 64


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


class CacheLayer(ABC):
    """The keys and values of one attention layer: the first `length` slots from `start` of two buffers."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._start = 0
        self._length = 0
        # False while the buffers are tensors that someone else may hold: never written in place.
        self._owned = False

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, [batch, kv_heads, length, head_dim]; None before the first update."""
        return None if self._keys is None else self._keys.narrow(2, self._start, self._length)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, [batch, kv_heads, length, head_dim]; None before the first update."""
        return None if self._values is None else self._values.narrow(2, self._start, self._length)

    @abstractmethod
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return all that the new queries may look at."""

    def get_seq_length(self) -> int:
        """Return how many tokens have gone through, those let go of included."""
        return self._length

    def get_max_length(self) -> int:
        """Return how many tokens fit, or `UNBOUNDED`."""
        return UNBOUNDED

    def get_mask_sizes(
        self, query_length: int, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update hands back, and the position of the first of them."""
        return self._length + query_length, 0

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self._length = min(self._length, length)

    def reset(self) -> None:
        """Forget everything, memory included."""
        self._keys = self._values = None
        self._start = self._length = 0
        self._owned = False

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace both buffers by a function of them that acts on the batch dimension."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = function(self._keys), function(self._values)
            self._owned = not torch.is_grad_enabled()

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold tensors of someone else; they are copied before anything is written."""
        self._keys, self._values = keys, values
        self._start, self._length, self._owned = 0, keys.shape[2], False

    def _check(self, key_states: torch.Tensor) -> None:
        if self._keys is not None and key_states.shape[0] != self._keys.shape[0]:
            raise GenerationError(
                "This cache was filled with another batch size",
                where="past_key_values",
                expected=f"batch {self._keys.shape[0]}",
                found=f"batch {key_states.shape[0]}",
                mend="Use cache.batch_repeat_interleave(n), cache.batch_select_indices(rows) or a new cache.",
            )

    def _writable(self, end: int) -> bool:
        """Whether slots up to `end` can be written in place."""
        keys = self._keys
        if keys is None or not self._owned or end > keys.shape[2]:
            return False
        # Tensors made under inference mode can be written only under it.
        return not keys.is_inference() or torch.is_inference_mode_enabled()

    def _move(self, capacity: int, keep: int) -> None:
        """Move the last `keep` tokens to the front of new buffers."""
        keys, values, end = self._keys, self._values, self._start + self._length
        assert keys is not None and values is not None
        moved = []
        for old in (keys, values):
            new = old.new_empty((old.shape[0], old.shape[1], capacity, old.shape[3]))
            new.narrow(2, 0, keep).copy_(old.narrow(2, end - keep, keep))
            moved.append(new)
        self._keys, self._values = moved
        self._start, self._length, self._owned = 0, keep, True

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        assert self._keys is not None and self._values is not None
        new, end = key_states.shape[2], self._start + self._length
        self._keys.narrow(2, end, new).copy_(key_states)
        self._values.narrow(2, end, new).copy_(value_states)
        self._length += new

    def _concatenate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Add by concatenation, which autograd can follow."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        self.adopt(torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2))


class DynamicLayer(CacheLayer):
    """Grows as tokens come.

    The first keys and values are held as they are, so a forward without a second step costs nothing.
    Later ones go into a buffer that grows by a quarter at a time; what is handed back are views of it.
    Where autograd records, everything is concatenated instead.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return all of them.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: Not needed: new tokens always follow the old ones.

        Returns:
            Keys and values, [batch, kv_heads, old + new, head_dim]. Later updates leave them unchanged.

        Raises:
            GenerationError: another batch size than before.
        """
        if self._keys is None:
            self.adopt(key_states, value_states)
            return key_states, value_states
        self._check(key_states)
        if torch.is_grad_enabled():
            self._concatenate(key_states, value_states)
        else:
            needed = self._length + key_states.shape[2]
            if not self._writable(needed):
                self._move(_round_up(needed + needed // 4 + _BUCKET), self._length)
            self._write(key_states, value_states)
        return self._keys.narrow(2, 0, self._length), self._values.narrow(2, 0, self._length)  # type: ignore[union-attr]


class DynamicSlidingLayer(CacheLayer):
    """Keeps what a sliding window needs: the last ``sliding_window - 1`` tokens.

    Args:
        sliding_window: How many tokens a query sees, itself included.
        margin: More tokens to keep, so that up to as many can be cropped away again.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, margin: int = 0) -> None:
        super().__init__()
        if sliding_window < 1:
            raise ArgumentError("sliding_window must be 1 or more", found=sliding_window)
        self.sliding_window = sliding_window
        self.margin = margin
        self._seen = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return those that the new queries may look at.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: Not needed: new tokens always follow the old ones.

        Returns:
            Keys and values, [batch, kv_heads, min(old, sliding_window - 1) + new, head_dim].

        Raises:
            GenerationError: another batch size than before.
        """
        self._check(key_states)
        new = key_states.shape[2]
        shown = min(self._seen, self.sliding_window - 1) + new
        if self._keys is None:
            self.adopt(key_states, value_states)
        elif torch.is_grad_enabled():
            self._concatenate(key_states, value_states)
        else:
            if not self._writable(self._start + self._length + new):
                self._move(_round_up(self._length + new + self.sliding_window), self._length)
            self._write(key_states, value_states)
        self._seen += new
        end = self._start + self._length
        keys = self._keys.narrow(2, end - shown, shown)  # type: ignore[union-attr]
        values = self._values.narrow(2, end - shown, shown)  # type: ignore[union-attr]
        self._forget()
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens have gone through, those let go of included."""
        return self._seen

    def get_mask_sizes(
        self, query_length: int, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update hands back, and the position of the first of them."""
        kept = min(self._seen, self.sliding_window - 1)
        return kept + query_length, self._seen - kept

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, if what precedes them in the window is still there.

        Args:
            length: Tokens to keep, counted from the first one ever seen.

        Raises:
            GenerationError: tokens that the window would need were let go of.
        """
        drop = self._seen - length
        if drop <= 0:
            return
        needed = min(length, self.sliding_window - 1)
        if self._length - drop < needed:
            raise GenerationError(
                "A sliding-window cache cannot go back that far",
                where="past_key_values",
                expected=f"at most {max(self._length - self.sliding_window + 1, 0)} tokens cropped",
                found=drop,
                mend="Make the cache with a larger margin, or start again from the prompt.",
            )
        self._length -= drop
        self._seen = length

    def reset(self) -> None:
        """Forget everything, memory included."""
        super().reset()
        self._seen = 0

    def _forget(self) -> None:
        kept = min(self._length, self.sliding_window - 1 + self.margin)
        if not self._owned and kept < self._length and not torch.is_grad_enabled():
            # A view would keep a long prompt's keys alive.
            self._move(_round_up(kept + self.sliding_window), kept)
        self._start += self._length - kept
        self._length = kept


class StaticLayer(CacheLayer):
    """Room for a fixed number of tokens, allocated once.

    Args:
        max_cache_len: How many tokens fit.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        if max_cache_len < 1:
            raise ArgumentError("max_cache_len must be 1 or more", found=max_cache_len)
        self.max_cache_len = max_cache_len

    def allocate(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Make the buffers, zeroed, as the first update would."""
        shape = (batch_size, num_heads, self.max_cache_len, head_dim)
        # Zeroed: a compiled step attends over the whole buffer, and 0 x NaN would be NaN behind the mask.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._start, self._length, self._owned = 0, 0, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values into the buffer.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: [new] positions on the device, for a compiled step; `Cache.advance` must
                follow. None to write after what is there.

        Returns:
            Keys and values: those filled, [batch, kv_heads, old + new, head_dim]; with `cache_position`
            the whole buffer, [batch, kv_heads, max_cache_len, head_dim].

        Raises:
            GenerationError: they do not fit, or another batch size than before.
        """
        if self._keys is None:
            batch, heads, _, width = key_states.shape
            self.allocate(batch, heads, width, key_states.dtype, key_states.device)
        self._check(key_states)
        if cache_position is not None:
            self._keys.index_copy_(2, cache_position, key_states)  # type: ignore[union-attr]
            self._values.index_copy_(2, cache_position, value_states)  # type: ignore[union-attr]
            return self._keys, self._values  # type: ignore[return-value]
        needed = self._length + key_states.shape[2]
        if needed > self.max_cache_len:
            raise GenerationError(
                "The static cache is full",
                where="past_key_values",
                expected=f"at most {self.max_cache_len} tokens",
                found=f"{needed} ({self._length} held and {key_states.shape[2]} new)",
                mend=f"Make it with max_cache_len={_round_up(needed)} or more, or use a DynamicCache.",
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise GenerationError(
                "A static cache cannot be used where gradients are recorded, as it is written in place",
                where="past_key_values",
                mend="Use torch.no_grad(), or a DynamicCache.",
            )
        if not self._writable(needed):
            self._move(self.max_cache_len, self._length)
        self._write(key_states, value_states)
        return self._keys.narrow(2, 0, needed), self._values.narrow(2, 0, needed)  # type: ignore[union-attr]

    def advance(self, tokens: int) -> None:
        """Count tokens that were written by `cache_position`."""
        self._length += tokens

    def get_max_length(self) -> int:
        """Return how many tokens fit."""
        return self.max_cache_len

    def get_mask_sizes(
        self, query_length: int, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update hands back, and the position of the first of them."""
        return (self._length + query_length if cache_position is None else self.max_cache_len), 0

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace both buffers by a function of them, at their old address where the shape allows it."""
        keys, values = self._keys, self._values
        super().map_batch(function)
        if keys is not None and keys.shape == self._keys.shape:  # type: ignore[union-attr]
            self._keys, self._values = keys.copy_(self._keys), values.copy_(self._values)  # type: ignore[union-attr,arg-type]

    def reset(self) -> None:
        """Forget the tokens and keep the buffers, at their address."""
        self._length = 0
        if self._keys is not None and self._values is not None:
            self._keys.zero_()
            self._values.zero_()


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
