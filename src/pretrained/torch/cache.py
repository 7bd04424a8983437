# SPDX-License-Identifier: Apache-2.0
"""Key/value caches behind one small protocol.

A `Cache` is a list of layers. A model calls ``cache.update(k, v, layer_idx, cache_position)`` and attends
over what comes back. Keys and values are [batch, kv_heads, length, head_dim].

Positions are counted on the host: growing, cropping and asking for the length never wait for a device.
Only a step that is compiled or captured passes `cache_position`; then a static layer writes by that tensor
and hands back its whole buffer, and `Cache.advance` moves the host's count afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from pretrained.errors import ArgumentError, GenerationError, NotYetError, UnknownArgumentError
from pretrained.torch.cache_layers import (
    UNBOUNDED,
    CacheLayer,
    DynamicLayer,
    DynamicSlidingLayer,
    StaticLayer,
    nbytes_of,
)
from pretrained.torch.cache_offload import OffloadedLayer, Transfers
from pretrained.torch.cache_quantized import QuantizedLayer, check_quantization, default_group, wrong_group
from pretrained.torch.cache_static_window import StaticSlidingWindowLayer

__all__ = [
    "Cache",
    "CacheLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingLayer",
    "EncoderDecoderCache",
    "OffloadedLayer",
    "QuantizedCache",
    "QuantizedLayer",
    "SlidingWindowCache",
    "StaticCache",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "as_cache",
    "layer_windows",
]


class Cache:
    """The caches of a model's layers.

    Args:
        layers: One layer object for each attention layer; None to make them as the model comes to them.
        layer_class_to_replicate: The class of layers that `layers` does not have yet.
        offloading: Layers live on the CPU, and come to the device that computes one ahead of their turn.
        offload_only_non_sliding: Leave layers with a window on the device: they are small.
        make: Makes the layer of an index that `layers` does not have yet, instead of a class.
    """

    def __init__(
        self,
        layers: Iterable[CacheLayer] | None = None,
        layer_class_to_replicate: Callable[[], CacheLayer] | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        *,
        make: Callable[[int], CacheLayer] | None = None,
    ) -> None:
        if layer_class_to_replicate is not None:
            kind = layer_class_to_replicate
            make = lambda _: kind()  # noqa: E731
        self.offloading = offloading
        self._only_non_sliding = offload_only_non_sliding
        self._transfers = Transfers() if offloading else None
        self.layers: list[CacheLayer] = [self._placed(layer) for layer in layers or ()]
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
        if self.offloading:
            self.prefetch(layer_idx, self._only_non_sliding)
            self.prefetch(layer_idx + 1, self._only_non_sliding)
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
        return next((layer.batch_size for layer in self.layers if layer.batch_size >= 0), -1)

    @property
    def max_batch_size(self) -> int:
        """The same, under its older name."""
        return self.batch_size

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """Return what `get_max_length` does, under its older name.

        Args:
            layer_idx: Which layer; None for the least of all.
        """
        return self.get_max_length(layer_idx)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, spare room included, memory that layers share counted once."""
        return nbytes_of(tensor for layer in self.layers for tensor in layer._tensors())

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has memory for keys and values."""
        return bool(self.layers) and all(layer.is_initialized for layer in self.layers)

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

    def can_crop(self, length: int) -> bool:
        """Whether `crop` can go back: layers with a window may have let go of what it would need.

        Args:
            length: Tokens to keep; negative to take so many away from the end.
        """
        if length < 0:
            length = max(self.get_seq_length() + length, 0)
        return all(layer.can_crop(length) for layer in self.layers)

    def activate_past_recording(self) -> None:
        """Let go of nothing from now on, so that `crop` can go back as far, windows or not."""
        for layer in self.layers:
            layer.activate_past_recording()

    def keep_margin(self, tokens: int) -> None:
        """From now on let at least so many tokens be cropped away again, windows or not.

        Args:
            tokens: How many.
        """
        for layer in self.layers:
            layer.keep_margin(tokens)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to bring an offloaded layer to the device that computes.

        Args:
            layer_idx: Which layer; behind the last one comes the first.
            only_non_sliding: Leave layers with a window alone.
        """
        layer = self.layers[layer_idx % len(self.layers)]
        if not (only_non_sliding and layer.is_sliding):
            layer.prefetch()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move a layer to the CPU.

        Args:
            layer_idx: Which layer.
            only_non_sliding: Leave layers with a window alone.
        """
        layer = self.layers[layer_idx % len(self.layers)]
        if not (only_non_sliding and layer.is_sliding):
            layer.offload()

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
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, its copies next to each other.

        Args:
            repeats: How often.
        """
        for layer in self.layers:
            layer.batch_repeat_interleave(repeats)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate the layers of fixed size now, before a compiled step sees them.

        Args:
            batch_size: Rows.
            num_heads: Key/value heads; a sequence to say it for each layer.
            head_dim: Width of a head; a sequence to say it for each layer.
            dtype: Dtype of keys and values.
            device: Where they will be computed with.
        """
        for index, layer in enumerate(self.layers):
            if hasattr(layer, "allocate"):
                heads = num_heads if isinstance(num_heads, int) else num_heads[index]
                width = head_dim if isinstance(head_dim, int) else head_dim[index]
                layer.allocate(batch_size, heads, width, dtype, device)

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
            self.layers.append(self._placed(self._make(len(self.layers))))

    def _placed(self, layer: CacheLayer) -> CacheLayer:
        if self._transfers is None or (self._only_non_sliding and layer.is_sliding):
            return layer
        return OffloadedLayer(layer, self._transfers)


class DynamicCache(Cache):
    """Grows with the sequence; layers with a sliding window keep only what it needs.

    Args:
        ddp_cache_data: (keys, values) of each layer, [batch, kv_heads, length, head_dim], to begin with; a
            config is taken here too.
        config: The model's config, which says which layers slide; None for none of them.
        offloading: Layers live on the CPU, and come to the device that computes one ahead of their turn.
        offload_only_non_sliding: Leave layers with a window on the device.
        margin: How many tokens `crop` must be able to take away from sliding layers.
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[Iterable[torch.Tensor | None]] | Any = None,
        config: Any = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        *,
        margin: int = 0,
    ) -> None:
        if config is None and ddp_cache_data is not None and not isinstance(ddp_cache_data, Iterable):
            ddp_cache_data, config = None, ddp_cache_data
        windows = layer_windows(config) if config is not None else []
        super().__init__(
            [_dynamic(window, margin) for window in windows],
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
            make=_full,
        )
        for index, row in enumerate(ddp_cache_data or ()):
            keys, values = tuple(row)[:2]
            if keys is not None and values is not None:
                self.update(keys, values, index)


class StaticCache(Cache):
    """Room for a fixed number of tokens, allocated at the first update: for compiled steps.

    Sliding layers get full length too, so that positions stay addresses; the model's mask narrows them. In
    a `SlidingWindowCache` they are as small as their window.

    Args:
        config: The model's config, which says how many layers there are.
        max_cache_len: How many tokens fit in a row.
        offloading: Layers live on the CPU, and come to the device that computes one ahead of their turn.
        offload_only_non_sliding: Accepted for compatibility; layers have full length here, all of them.
        **kwargs: Of older code: `max_batch_size`, `dtype` and `device`, to allocate at once.

    Raises:
        ArgumentError: `max_cache_len` is missing or below 1, or these do not suffice to allocate.
        UnknownArgumentError: an argument that nothing takes.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        **kwargs: Any,
    ) -> None:
        length = _needed_length(max_cache_len)
        layers = [StaticLayer(length) for _ in layer_windows(config)]
        super().__init__(layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        _allocate_now(self, config, kwargs)


class SlidingWindowCache(Cache):
    """Memory of fixed size in which sliding layers are as small as their window; others have full length.

    Args:
        config: The model's config, which says which layers slide.
        max_cache_len: How many tokens fit in the layers that do not slide.
        offloading: As for `StaticCache`.
        offload_only_non_sliding: Leave layers with a window on the device.
        margin: How many tokens `crop` must be able to take away from sliding layers.
        **kwargs: As for `StaticCache`.

    Raises:
        ArgumentError: as for `StaticCache`.
        UnknownArgumentError: an argument that nothing takes.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        *,
        margin: int = 0,
        **kwargs: Any,
    ) -> None:
        length = _needed_length(max_cache_len)
        layers: list[CacheLayer] = [
            StaticLayer(length) if window is None else StaticSlidingWindowLayer(length, window, margin)
            for window in layer_windows(config)
        ]
        super().__init__(layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        _allocate_now(self, config, kwargs)


class QuantizedCache(Cache):
    """Grows with the sequence, all but the newest tokens in 8, 4 or 2 bits: see `QuantizedLayer`.

    Args:
        backend: ``"quanto"`` or ``"hqq"``: whose meaning the axes have. Neither library is used.
        config: The model's config.
        nbits: Bits of a value: 2, 4 or 8; None for 4.
        axis_key: Where groups of keys lie. For quanto 0 is along a token's channels, -1 along tokens; for
            hqq 1 and 0. None for channels.
        axis_value: Where groups of values lie; None as above.
        q_group_size: Values that share a scale; None for 64, or the next smaller divisor of a head.
        residual_length: How many tokens stay as they are at most; None for 128.
        margin: How many tokens `crop` must be able to take away from sliding layers.

    Raises:
        ArgumentError: one of them cannot work; names it and the mend.
        GenerationError: a group that does not divide the heads' width.
    """

    def __init__(
        self,
        backend: str = "quanto",
        config: Any = None,
        nbits: int | None = None,
        axis_key: int | None = None,
        axis_value: int | None = None,
        q_group_size: int | None = None,
        residual_length: int | None = None,
        *,
        margin: int = 0,
    ) -> None:
        nbits, length = 4 if nbits is None else nbits, 128 if residual_length is None else residual_length
        channels = 1 if backend == "hqq" else 0
        key_axis = channels if axis_key is None else axis_key
        value_axis = channels if axis_value is None else axis_value
        check_quantization(
            backend, nbits, key_axis, value_axis, 64 if q_group_size is None else q_group_size, length
        )
        width = None if config is None else _head_width(config)
        group = q_group_size or default_group(width, nbits)
        if width is not None and (not group or (q_group_size and width % group)):
            raise wrong_group(group, width, nbits)

        def make(window: int | None) -> QuantizedLayer:
            return QuantizedLayer(
                nbits,
                key_axis,
                value_axis,
                group,
                length,
                backend=backend,
                sliding_window=window,
                margin=margin,
            )

        windows = layer_windows(config) if config is not None else []
        super().__init__([make(window) for window in windows], make=lambda _: make(None))


class EncoderDecoderCache(Cache):
    """A decoder's own cache and that of its cross-attention, which is filled once from the encoder.

    A cross-attention layer asks ``is_updated.get(layer_idx)``; if not, it computes its keys and values
    from the encoder's output, updates `cross_attention_cache` and sets it.

    Args:
        *caches: Of the decoder's own tokens, then of the encoder's; or one iterable with (keys, values,
            cross keys, cross values) of each layer.
    """

    def __init__(self, *caches: Cache) -> None:
        super().__init__()
        self_attention_cache, cross_attention_cache = _pair(caches)
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        filled = range(len(cross_attention_cache))
        self.is_updated: dict[int, bool] = {i: cross_attention_cache.get_seq_length(i) > 0 for i in filled}
        # Everything that is asked of a decoder's cache means its own tokens.
        self.layers = self_attention_cache.layers
        self._make = self_attention_cache._make
        self.offloading = self_attention_cache.offloading
        self._only_non_sliding = self_attention_cache._only_non_sliding
        self._transfers = self_attention_cache._transfers

    @property
    def nbytes(self) -> int:
        """Bytes of memory that both parts hold."""
        return self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes

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


def as_cache(past_key_values: Any) -> Any:
    """Return a cache for what a caller passed: older code passes tuples.

    Args:
        past_key_values: A cache, (keys, values) or (keys, values, cross keys, cross values) of each layer,
            or None.
    """
    if not isinstance(past_key_values, tuple | list):
        return past_key_values
    rows = [tuple(row) for row in past_key_values]
    kind = EncoderDecoderCache if rows and len(rows[0]) == 4 else Cache
    return kind.from_legacy_cache(rows)


def _pair(caches: tuple[Any, ...]) -> tuple[Cache, Cache]:
    if len(caches) == 1 and not isinstance(caches[0], Cache):
        whole = EncoderDecoderCache.from_legacy_cache(caches[0])
        return whole.self_attention_cache, whole.cross_attention_cache
    if len(caches) != 2 or not all(isinstance(cache, Cache) for cache in caches):
        raise ArgumentError(
            "An EncoderDecoderCache is made of two caches",
            where="EncoderDecoderCache",
            expected="a Cache for the decoder's tokens and one for the encoder's",
            found=", ".join(type(cache).__name__ for cache in caches) or "nothing",
        )
    return caches[0], caches[1]


def _needed_length(max_cache_len: int | None) -> int:
    if max_cache_len is None:
        raise ArgumentError(
            "A cache of fixed size needs its length",
            where="max_cache_len",
            mend="Pass the prompt's length plus max_new_tokens.",
        )
    return max_cache_len


def _allocate_now(cache: Cache, config: Any, kwargs: dict[str, Any]) -> None:
    """Obey the arguments with which older code allocated a static cache at once."""
    batch, dtype, device = (kwargs.pop(name, None) for name in ("max_batch_size", "dtype", "device"))
    if kwargs:
        name = next(iter(kwargs))
        raise UnknownArgumentError(f"{type(cache).__name__} has no argument {name!r}", where=name)
    if batch is None:
        # Where and as what is seen at the first update.
        return
    heads, width = _key_value_heads(config), _head_width(config)
    if heads is None or width is None:
        raise ArgumentError(
            "The config does not say how wide keys are, so nothing can be allocated before the first update",
            where="max_batch_size",
            mend="Leave it out, or call cache.early_initialization(...).",
        )
    dtype = getattr(config, "dtype", None) if dtype is None else dtype
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    cache.early_initialization(batch, heads, width, dtype, device or "cpu")


def _first(config: Any, names: Iterable[str]) -> int | None:
    text = getattr(config, "get_text_config", None)
    config = text(decoder=True) if callable(text) else config
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def _head_width(config: Any) -> int | None:
    """Return the channels of a key's head, or None where a config does not say."""
    stated = _first(config, ("head_size", "head_dim", "d_kv"))
    hidden = _first(config, ("hidden_size", "n_embd", "d_model", "dim"))
    heads = _first(config, ("num_attention_heads", "n_head", "num_heads", "n_heads"))
    return stated or (hidden // heads if hidden and heads else None)


def _key_value_heads(config: Any) -> int | None:
    names = ("kv_heads", "num_key_value_heads", "num_attention_heads", "n_head", "num_heads", "n_heads")
    return _first(config, names)
