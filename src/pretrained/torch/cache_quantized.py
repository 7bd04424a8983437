# SPDX-License-Identifier: Apache-2.0
"""Keys and values in 8, 4 or 2 bits: group quantization, and the layer and cache that use it.

A group of values shares a scale and a least value (asymmetric rounding to nearest, as KIVI does, Liu et al.
2024, arXiv:2402.02750). Groups lie along the channels of one token, or along the tokens of one channel.
What is quantized stays as it is; only new tokens are, once there are enough of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrained.errors import ArgumentError, GenerationError
from pretrained.torch.cache_layers import (
    CacheLayer,
    DynamicLayer,
    cannot_go_back,
    refuse_gradients,
)

BITS = (2, 4, 8)
"""Widths that there are."""

_CHANNELS, _TOKENS = "channels", "tokens"

BACKENDS = {
    "quanto": {0: _CHANNELS, -1: _TOKENS},
    "hqq": {1: _CHANNELS, 0: _TOKENS},
}
"""What `axis_key` and `axis_value` mean under each name: groups along a token's channels, or along tokens."""


def quantize_groups(x: torch.Tensor, nbits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups of values to `nbits` bits.

    With ``low`` the least and ``high`` the largest value of a group, ``scale = (high - low) / (2^nbits - 1)``
    and ``q = round((x - low) / scale)``. Scale and low are kept in the dtype of `x`; q follows from what is
    kept. An error is at most half a scale, and what the dtype itself rounds.

    Args:
        x: Floating values.
        nbits: 2, 4 or 8.
        dim: The dimension that is a group; its size is a multiple of ``8 // nbits``.

    Returns:
        uint8 with ``8 // nbits`` values in a byte: along `dim` as many times shorter than `x`, the first
        part of a group in the low bits. Scale and low, with size 1 at `dim`.
    """
    levels = (1 << nbits) - 1
    low = x.amin(dim, keepdim=True)
    scale = ((x.amax(dim, keepdim=True).float() - low.float()) / levels).to(x.dtype)
    # A group of equal values has no scale; any does.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (x.float() - low.float()).div_(scale.float()).round_().clamp_(0, levels).to(torch.uint8)
    parts = q.chunk(8 // nbits, dim)
    packed = parts[0].clone() if len(parts) == 1 else parts[0]
    for index, part in enumerate(parts[1:], 1):
        packed = packed | (part << (index * nbits))
    return packed, scale, low


def dequantize_groups(
    packed: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, nbits: int, dim: int
) -> torch.Tensor:
    """Return the values that `quantize_groups` stands for, ``low + q * scale``, in the dtype of `scale`.

    Args:
        packed: As returned.
        scale: As returned.
        low: As returned.
        nbits: As given.
        dim: As given.
    """
    levels = (1 << nbits) - 1
    if nbits == 8:
        return torch.addcmul(low, packed.to(scale.dtype), scale)
    parts = [(packed >> (index * nbits)) & levels for index in range(8 // nbits)]
    return torch.addcmul(low, torch.cat(parts, dim).to(scale.dtype), scale)


class _Groups:
    """The quantized keys, or values, of a layer: [batch, heads, groups..., head_dim or within a group]."""

    def __init__(self, nbits: int, group: int, along: str) -> None:
        self.nbits, self.group, self.along = nbits, group, along
        self.parts: tuple[torch.Tensor, ...] = ()

    @property
    def unit(self) -> int:
        """Tokens that are quantized together."""
        return self.group if self.along == _TOKENS else 1

    @property
    def _dim(self) -> int:
        # [batch, heads, tokens, groups, group] or [batch, heads, blocks, group, head_dim].
        return 4 if self.along == _CHANNELS else 3

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.parts[0].shape[2] * self.unit if self.parts else 0

    def append(self, states: torch.Tensor) -> None:
        """Quantize [batch, heads, tokens, head_dim], tokens being a multiple of `unit`."""
        grouped = states.unflatten(self._dim - 1, (-1, self.group))
        new = quantize_groups(grouped, self.nbits, self._dim)
        if self.parts:
            new = tuple(torch.cat(pair, 2) for pair in zip(self.parts, new, strict=True))  # type: ignore[assignment]
        self.parts = new

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return tokens `start` to `end`, both multiples of `unit`: [batch, heads, tokens, head_dim]."""
        first, count = start // self.unit, (end - start) // self.unit
        packed, scale, low = (part.narrow(2, first, count) for part in self.parts)
        return dequantize_groups(packed, scale, low, self.nbits, self._dim).flatten(self._dim - 1, self._dim)

    def keep(self, start: int, end: int) -> None:
        """Keep tokens `start` to `end`, both multiples of `unit`, and the memory of no others."""
        first, count = start // self.unit, (end - start) // self.unit
        self.parts = tuple(part.narrow(2, first, count).clone() for part in self.parts) if count else ()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.parts = tuple(function(part) for part in self.parts)


class QuantizedLayer(CacheLayer):
    """Holds all but the newest tokens quantized.

    New tokens are kept as they are until there are `residual_length` of them; then they are quantized in one
    go, and never again. The first keys and values, those of a prompt, are handed back as they came, so only
    later tokens see rounded ones. At every update the whole is unpacked for as long as the layer computes.

    Args:
        nbits: Bits of a value: 2, 4 or 8.
        axis_key: Where groups of keys lie, see `BACKENDS`.
        axis_value: Where groups of values lie.
        q_group_size: Values that share a scale.
        residual_length: How many tokens stay as they are at most.
        backend: ``"quanto"`` or ``"hqq"``: whose meaning the axes have. Neither library is used.
        sliding_window: How many tokens a query sees, itself included; None for all.
        margin: More tokens to keep behind the window, so that up to as many can be cropped away again.

    Raises:
        ArgumentError: one of them cannot work; names it and the mend.
    """

    def __init__(
        self,
        nbits: int = 4,
        axis_key: int = 0,
        axis_value: int = 0,
        q_group_size: int = 64,
        residual_length: int = 128,
        *,
        backend: str = "quanto",
        sliding_window: int | None = None,
        margin: int = 0,
    ) -> None:
        super().__init__()
        check_quantization(backend, nbits, axis_key, axis_value, q_group_size, residual_length)
        self.nbits, self.q_group_size, self.residual_length = nbits, q_group_size, residual_length
        self.axis_key, self.axis_value, self.backend = axis_key, axis_value, backend
        axes = BACKENDS[backend]
        self._old_keys = _Groups(nbits, q_group_size, axes[axis_key])
        self._old_values = _Groups(nbits, q_group_size, axes[axis_value])
        self._unit = max(self._old_keys.unit, self._old_values.unit)
        self._recent = DynamicLayer()
        if sliding_window is not None and sliding_window < 1:
            raise ArgumentError("sliding_window must be 1 or more", found=sliding_window)
        self.sliding_window, self.margin = sliding_window, margin
        self.is_sliding = sliding_window is not None
        self._seen = 0

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, unpacked, [batch, kv_heads, length, head_dim]; None before the first update."""
        return self._read(self._held)[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, unpacked, [batch, kv_heads, length, head_dim]; None before the first update."""
        return self._read(self._held)[1] if self.is_initialized else None

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while the layer is empty."""
        return self._old_keys.parts[0].shape[0] if self._old_keys.parts else self._recent.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether anything is held."""
        return self.batch_size >= 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return those that the new queries may look at.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: Not needed: new tokens always follow the old ones.

        Returns:
            Keys and values, [batch, kv_heads, old + new, head_dim] (of the old ones only those in the
            window, where there is one): the old ones rounded, the new ones as they came.

        Raises:
            GenerationError: another batch size than before, a group that does not divide the heads' width,
                or gradients are recorded.
        """
        self._check(key_states)
        self._check_width(key_states.shape[3])
        refuse_gradients(key_states, value_states, "A quantized cache", "rounding has no gradient")
        kept = self._visible
        keys, values = key_states, value_states
        if kept:
            keys, values = self._read(kept, key_states, value_states)
        self._recent.update(key_states, value_states)
        self._seen += key_states.shape[2]
        if self._recent.get_seq_length() >= max(self.residual_length, self._unit):
            self._quantize_recent()
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens have gone through, those let go of included."""
        return self._seen

    def get_mask_sizes(
        self, query_length: int, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update hands back, and the position of the first of them."""
        return self._visible + query_length, self._seen - self._visible

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Tokens of a group that is cut are kept rounded.

        Args:
            length: Tokens to keep, counted from the first one ever seen.

        Raises:
            GenerationError: tokens that a window would need were let go of.
        """
        drop = self._seen - length
        if drop <= 0:
            return
        if not self.can_crop(length):
            assert self.sliding_window is not None
            raise cannot_go_back(self._held - self.sliding_window + 1, drop)
        recent, self._seen = self._recent.get_seq_length(), length
        if drop <= recent:
            self._recent.crop(recent - drop)
            return
        left = self._old_keys.length - (drop - recent)
        whole = left - left % self._unit
        both = (self._old_keys, self._old_values)
        self._recent.reset()
        if left > whole:
            rest = (groups.read(whole, whole + self._unit).narrow(2, 0, left - whole) for groups in both)
            self._recent.update(*rest)
        for groups in both:
            groups.keep(0, whole)

    def can_crop(self, length: int) -> bool:
        """Whether what precedes the first `length` tokens in the window is still there."""
        drop = self._seen - length
        if self.sliding_window is None or drop <= 0:
            return True
        return self._held - drop >= min(length, self.sliding_window - 1)

    def reset(self) -> None:
        """Forget everything, memory included."""
        self._old_keys.parts = self._old_values.parts = ()
        self._recent.reset()
        self._seen = 0

    @property
    def _held(self) -> int:
        return self._old_keys.length + self._recent.get_seq_length()

    @property
    def _visible(self) -> int:
        """How many of the tokens held the next query sees."""
        return self._seen if self.sliding_window is None else min(self._seen, self.sliding_window - 1)

    def _read(self, tokens: int, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the newest `tokens`, unpacked, and what is `new` behind them."""
        old, recent = self._old_keys.length, self._recent.get_seq_length()
        skip = self._held - tokens
        first = min(skip, old) // self._unit * self._unit
        found = []
        sides = zip((self._old_keys, self._old_values), (self._recent.keys, self._recent.values), strict=True)
        for index, (groups, newest) in enumerate(sides):
            pieces = [groups.read(first, old)] if old > first else []
            pieces += [newest] if newest is not None and recent else []
            pieces[0] = pieces[0].narrow(2, skip - first, pieces[0].shape[2] - (skip - first))
            found.append(torch.cat([*pieces, *new[index : index + 1]], dim=2))
        return found[0], found[1]

    def _quantize_recent(self) -> None:
        keys, values = self._recent.keys, self._recent.values
        assert keys is not None and values is not None
        ready = keys.shape[2] // self._unit * self._unit
        rest = [states.narrow(2, ready, keys.shape[2] - ready).clone() for states in (keys, values)]
        self._old_keys.append(keys.narrow(2, 0, ready))
        self._old_values.append(values.narrow(2, 0, ready))
        self._recent.reset()
        if rest[0].shape[2]:
            self._recent.update(*rest)
        if self.sliding_window is not None:
            spare = self._held - (self.sliding_window - 1 + self.margin)
            spare = min(max(spare, 0), self._old_keys.length) // self._unit * self._unit
            if spare:
                for groups in (self._old_keys, self._old_values):
                    groups.keep(spare, groups.length)

    def _tensors(self) -> list[torch.Tensor]:
        return [*self._old_keys.parts, *self._old_values.parts, *self._recent._tensors()]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._old_keys.map(function)
        self._old_values.map(function)
        self._recent._map(function)

    def _check_width(self, head_dim: int) -> None:
        along = (self._old_keys.along, self._old_values.along)
        if _CHANNELS in along and head_dim % self.q_group_size:
            raise wrong_group(self.q_group_size, head_dim, self.nbits)


def check_quantization(
    backend: Any, nbits: Any, axis_key: Any, axis_value: Any, q_group_size: Any, residual_length: Any
) -> None:
    """Raise where settings of a quantized cache cannot work.

    Args:
        backend: ``"quanto"`` or ``"hqq"``.
        nbits: 2, 4 or 8.
        axis_key: An axis that the backend knows.
        axis_value: An axis that the backend knows.
        q_group_size: A whole number, a multiple of the values in a byte.
        residual_length: A whole number of 1 or more.

    Raises:
        ArgumentError: names the setting and the mend.
    """
    if backend not in BACKENDS:
        raise ArgumentError(
            f"There is no quantized cache by the name {backend!r}",
            where="backend",
            expected=", ".join(map(repr, BACKENDS)),
            mend="Leave it out; neither library is needed, the names say only what the axes mean.",
        )
    if nbits not in BITS or isinstance(nbits, bool):
        raise ArgumentError(
            "nbits cannot be obeyed",
            where="nbits",
            expected="2, 4 or 8",
            found=nbits,
            mend="Take 4, or 8 where the text must stay closest to the unquantized one.",
        )
    for name, axis in (("axis_key", axis_key), ("axis_value", axis_value)):
        if axis not in BACKENDS[backend] or isinstance(axis, bool):
            meanings = " or ".join(f"{a} (groups along {along})" for a, along in BACKENDS[backend].items())
            raise ArgumentError(f"{name} cannot be obeyed", where=name, expected=meanings, found=axis)
    for name, value in (("q_group_size", q_group_size), ("residual_length", residual_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name} must be a whole number of 1 or more", where=name, found=value)
    if q_group_size % (8 // nbits):
        raise ArgumentError(
            "q_group_size does not fill whole bytes",
            where="q_group_size",
            expected=f"a multiple of {8 // nbits}, for {nbits} bits",
            found=q_group_size,
        )


def wrong_group(group: int, head_dim: int, nbits: int) -> GenerationError:
    """Return the error for groups that do not divide a head.

    Args:
        group: Values in a group.
        head_dim: Width of a head.
        nbits: Bits of a value.
    """
    best = default_group(head_dim, nbits)
    return GenerationError(
        "The groups of a quantized cache must divide the heads' width",
        where="q_group_size",
        expected=f"a divisor of {head_dim}",
        found=group,
        mend=f"Pass q_group_size={best}, or leave it out." if best else "Pass nbits=8.",
    )


def default_group(head_dim: int | None, nbits: int) -> int:
    """Return the group size where nobody chose one: 64, or the next smaller divisor of a head; 0 for none.

    Args:
        head_dim: Width of a head; None where it is not known.
        nbits: Bits of a value.
    """
    if head_dim is None:
        return 64
    sizes = (size for size in range(min(64, head_dim), 0, -1) if head_dim % size == 0)
    return next((size for size in sizes if size % (8 // nbits) == 0), 0)
