# SPDX-License-Identifier: Apache-2.0
"""A sliding window's keys and values in a buffer of fixed size.

Keys and values are [batch, kv_heads, length, head_dim]. See `pretrained.torch.cache`.
"""

from __future__ import annotations

import torch

from pretrained.errors import ArgumentError, GenerationError
from pretrained.torch.cache_layers import UNBOUNDED, WindowLayer, refuse_gradients

_SPARE = 64
"""Slots behind the window, so that it moves to the front of its buffer only once in so many steps."""


class StaticSlidingWindowLayer(WindowLayer):
    """Room for a sliding window, allocated once: memory does not depend on how long the text becomes.

    Slots are no positions here, so that a compiled step cannot write it by `cache_position`; `StaticLayer`
    gives sliding layers full length for that.

    Args:
        max_cache_len: How many tokens there will be; a buffer is never larger than that.
        sliding_window: How many tokens a query sees, itself included.
        margin: More tokens to keep, so that at least as many can be cropped away again.
    """

    def __init__(self, max_cache_len: int, sliding_window: int, margin: int = 0) -> None:
        super().__init__(sliding_window, margin)
        if max_cache_len < 1:
            raise ArgumentError("max_cache_len must be 1 or more", found=max_cache_len)
        self.max_cache_len = max_cache_len
        self._capacity = self._needed_capacity()

    def allocate(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Make the buffers, as the first update would."""
        shape = (batch_size, num_heads, self._capacity, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device, pin_memory=self._pinned)
        self._values = torch.zeros(shape, dtype=dtype, device=device, pin_memory=self._pinned)
        self._start, self._length, self._owned = 0, 0, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return those that the new queries may look at.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: Refused: slots are no positions here.

        Returns:
            Keys and values, [batch, kv_heads, min(old, sliding_window - 1) + new, head_dim]. They are
            views that the next update may overwrite.

        Raises:
            GenerationError: they do not fit, another batch size than before, or gradients are recorded.
        """
        if cache_position is not None:
            raise GenerationError(
                "A sliding window of fixed size cannot be written by positions",
                where="cache_position",
                mend="Use a StaticCache, whose sliding layers have full length.",
            )
        if self._keys is None:
            batch, heads, _, width = key_states.shape
            self.allocate(batch, heads, width, key_states.dtype, key_states.device)
        self._check(key_states)
        self._check_room(key_states.shape[2])
        refuse_gradients(key_states, value_states, "A static cache", "it is written in place")
        new, kept = key_states.shape[2], min(self._seen, self.sliding_window - 1)
        if not self._writable(self._start + self._length + new):
            self._shift(min(self._length, kept + self.margin))
        if self._writable(self._start + self._length + new):
            self._write(key_states, value_states)
            self._seen += new
            first = self._start + self._length - kept - new
            return self._keys.narrow(2, first, kept + new), self._values.narrow(2, first, kept + new)  # type: ignore[union-attr]
        return self._pass_through(key_states, value_states, kept)

    def get_max_length(self) -> int:
        """Return how many tokens fit, or `UNBOUNDED` where the whole window does."""
        return UNBOUNDED if self._covers else self.max_cache_len

    def activate_past_recording(self) -> None:
        """Keep as much as `max_cache_len` says."""
        self.keep_margin(self.max_cache_len)

    def keep_margin(self, tokens: int) -> None:
        """From now on let at least so many tokens be cropped away again; the buffers grow for that."""
        self.margin = max(self.margin, tokens)
        needed = self._needed_capacity()
        if needed > self._capacity:
            self._capacity = needed
            if self._keys is not None:
                self._move(needed, self._length)

    def reset(self) -> None:
        """Forget the tokens and keep the buffers, at their address."""
        self._start = self._length = self._seen = 0

    def _needed_capacity(self) -> int:
        return min(self.max_cache_len, self.sliding_window - 1 + self.margin + _SPARE)

    @property
    def _covers(self) -> bool:
        return self._capacity >= self.sliding_window

    def _check_room(self, new: int) -> None:
        if not self._covers and self._seen + new > self.max_cache_len:
            raise GenerationError(
                "The static cache is full",
                where="past_key_values",
                expected=f"at most {self.max_cache_len} tokens",
                found=f"{self._seen + new} ({self._seen} held and {new} new)",
                mend=f"Make it with max_cache_len={self.sliding_window}, enough for the window, or more.",
            )

    def _shift(self, keep: int) -> None:
        """Bring the last `keep` tokens to the front of the buffers."""
        assert self._keys is not None and self._values is not None
        if not self._writable(0):
            self._move(self._capacity, keep)
            return
        first = self._start + self._length - keep
        for buffer in (self._keys, self._values):
            # Cloned: the two places may overlap.
            buffer.narrow(2, 0, keep).copy_(buffer.narrow(2, first, keep).clone())
        self._start, self._length = 0, keep

    def _pass_through(
        self, key_states: torch.Tensor, value_states: torch.Tensor, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a piece that is longer than the buffers: hand it on with what is held, and keep its end."""
        assert self._keys is not None and self._values is not None
        first, shown = self._start + self._length - kept, []
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            shown.append(torch.cat([buffer.narrow(2, first, kept), states], dim=2))
        total = shown[0].shape[2]
        keep = min(total, self.sliding_window - 1 + self.margin, self._capacity)
        for buffer, states in zip((self._keys, self._values), shown, strict=True):
            buffer.narrow(2, 0, keep).copy_(states.narrow(2, total - keep, keep))
        self._start, self._length = 0, keep
        self._seen += key_states.shape[2]
        return shown[0], shown[1]
