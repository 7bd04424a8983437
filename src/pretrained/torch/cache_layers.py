# SPDX-License-Identifier: Apache-2.0
"""One attention layer's keys and values: growing, sliding or of fixed size.

Keys and values are [batch, kv_heads, length, head_dim]. See `pretrained.torch.cache`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch

from pretrained.errors import ArgumentError, GenerationError

UNBOUNDED = -1
"""What `get_max_length` says of a cache that grows."""

UNLIMITED = 1 << 62
"""A margin that keeps everything."""

_BUCKET = 64


def _round_up(length: int) -> int:
    return -(-length // _BUCKET) * _BUCKET


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many bytes of memory tensors keep alive, shared memory counted once.

    Args:
        tensors: Tensors or views of them.
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cannot_go_back(most: int, found: int) -> GenerationError:
    """Return the error for a crop of a sliding layer to tokens that it has let go of.

    Args:
        most: How many tokens could be cropped.
        found: How many were to be.
    """
    return GenerationError(
        "A sliding-window cache cannot go back that far",
        where="past_key_values",
        expected=f"at most {max(most, 0)} tokens cropped",
        found=found,
        mend="Make the cache with a larger margin, or start again from the prompt.",
    )


def refuse_gradients(keys: torch.Tensor, values: torch.Tensor, what: str, why: str) -> None:
    """Raise where autograd records what goes into a cache that it cannot follow.

    Args:
        keys: New keys.
        values: New values.
        what: The cache, for the message.
        why: What stands in the way.

    Raises:
        GenerationError: names the mend.
    """
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        raise GenerationError(
            f"{what} cannot be used where gradients are recorded, as {why}",
            where="past_key_values",
            mend="Use torch.no_grad(), or a DynamicCache.",
        )


class CacheLayer(ABC):
    """The keys and values of one attention layer: the first `length` slots from `start` of two buffers."""

    is_sliding = False
    is_compileable = False
    margin = UNLIMITED
    """How many tokens can be cropped away at least; only windows let go of any."""

    def __init__(self) -> None:
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._start = 0
        self._length = 0
        # False while the buffers are tensors that someone else may hold: never written in place.
        self._owned = False
        # Page-locked buffers, for layers on the CPU that an accelerator reads.
        self._pinned = False
        self._home: torch.device | None = None

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

    def can_crop(self, length: int) -> bool:
        """Whether `crop` can go back to `length` tokens."""
        return True

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while the layer is empty."""
        return -1 if self._keys is None else self._keys.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether there is memory for keys and values: since the first update, or an early allocation."""
        return self._keys is not None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layer holds, spare room included."""
        return nbytes_of(self._tensors())

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all buffers by a function of them that acts on the batch dimension."""
        self._map(function)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let each row continue from another one; `beam_idx` [batch] says which."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, in their order."""
        self.map_batch(lambda buffer: buffer.index_select(0, indices.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, its copies next to each other."""
        self.map_batch(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        """Move the layer to the CPU, until `prefetch`."""
        tensors = self._tensors()
        if tensors and tensors[0].device.type != "cpu":
            self._home = tensors[0].device
            self._map(lambda buffer: buffer.to("cpu"))

    def prefetch(self) -> None:
        """Move the layer back to where it was before `offload`."""
        if self._home is not None:
            home, self._home = self._home, None
            self._map(lambda buffer: buffer.to(home, non_blocking=True))

    def activate_past_recording(self) -> None:
        """Let go of nothing from now on, so that `crop` can go back as far."""
        self.margin = UNLIMITED

    def keep_margin(self, tokens: int) -> None:
        """From now on let at least so many tokens be cropped away again."""
        self.margin = max(self.margin, tokens)

    def _tensors(self) -> list[torch.Tensor]:
        return [] if self._keys is None or self._values is None else [self._keys, self._values]

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._keys is not None and self._values is not None:
            self._keys, self._values = function(self._keys), function(self._values)
            self._owned = not torch.is_grad_enabled()

    def copy_rows(self, rows: torch.Tensor, sources: torch.Tensor, newest: int) -> None:
        """Let some rows go on from others that differ from them in their newest tokens only.

        Args:
            rows: [changed] which rows.
            sources: [changed] which row to take for each.
            newest: How many tokens at the end may differ.
        """
        if not self.is_initialized:
            return
        keys, values = self._keys, self._values
        end = self._start + self._length
        if keys is None or values is None or not self._writable(end) or torch.is_grad_enabled():
            index = torch.arange(self.batch_size, device=rows.device)
            index[rows] = sources
            self.batch_select_indices(index)
            return
        count = min(newest, self._length)
        for buffer in (keys, values):
            tail = buffer.narrow(2, end - count, count)
            taken = tail.index_select(0, sources.to(buffer.device))
            tail.index_copy_(0, rows.to(buffer.device), taken)

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold tensors of someone else; they are copied before anything is written."""
        self._keys, self._values = keys, values
        self._start, self._length, self._owned = 0, keys.shape[2], False

    def resume(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Go on from all the keys and values of tokens that ran elsewhere.

        They are copied before anything is written, so that several caches can begin with the same ones.
        """
        self.adopt(keys, values)

    def _check(self, key_states: torch.Tensor) -> None:
        held = self.batch_size
        if held not in (-1, key_states.shape[0]):
            raise GenerationError(
                "This cache was filled with another batch size",
                where="past_key_values",
                expected=f"batch {held}",
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
            shape = (old.shape[0], old.shape[1], capacity, old.shape[3])
            # Never inference tensors: a cache may outlive the inference mode of the step that grows it.
            with torch.inference_mode(False):
                new = old.new_empty(shape, pin_memory=True) if self._pinned else old.new_empty(shape)
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


class WindowLayer(CacheLayer):
    """What layers with a sliding window share: they count what they have let go of.

    Args:
        sliding_window: How many tokens a query sees, itself included.
        margin: More tokens to keep, so that up to as many can be cropped away again.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, margin: int = 0) -> None:
        super().__init__()
        if sliding_window < 1:
            raise ArgumentError(
                "sliding_window must be 1 or more",
                found=sliding_window,
                mend="Leave it None for a layer that sees everything.",
            )
        self.sliding_window = sliding_window
        self.margin = margin
        self._seen = 0

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
        if not self.can_crop(length):
            raise cannot_go_back(self._length - self.sliding_window + 1, drop)
        self._length -= drop
        self._seen = length

    def can_crop(self, length: int) -> bool:
        """Whether what precedes the first `length` tokens in the window is still there."""
        drop = self._seen - length
        return drop <= 0 or self._length - drop >= min(length, self.sliding_window - 1)

    def reset(self) -> None:
        """Forget everything, memory included."""
        super().reset()
        self._seen = 0


class DynamicSlidingLayer(WindowLayer):
    """Keeps what a sliding window needs: the last ``sliding_window - 1`` tokens.

    Args:
        sliding_window: How many tokens a query sees, itself included.
        margin: More tokens to keep, so that up to as many can be cropped away again.
    """

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

    def resume(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Go on from all the keys and values of tokens that ran elsewhere; of them the window is kept."""
        kept = min(keys.shape[2], self.sliding_window - 1 + self.margin)
        self._seen = keys.shape[2]
        self.adopt(*(states.narrow(2, self._seen - kept, kept) for states in (keys, values)))

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
            raise ArgumentError(
                "max_cache_len must be 1 or more",
                found=max_cache_len,
                mend="Pass the prompt's length plus max_new_tokens.",
            )
        self.max_cache_len = max_cache_len

    def allocate(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Make the buffers, zeroed, as the first update would."""
        shape = (batch_size, num_heads, self.max_cache_len, head_dim)
        # Zeroed: a compiled step attends over the whole buffer, and 0 x NaN would be NaN behind the mask.
        self._keys = torch.zeros(shape, dtype=dtype, device=device, pin_memory=self._pinned)
        self._values = torch.zeros(shape, dtype=dtype, device=device, pin_memory=self._pinned)
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
        refuse_gradients(key_states, value_states, "A static cache", "it is written in place")
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
        self._map(function)
        if keys is not None and keys.shape == self._keys.shape:  # type: ignore[union-attr]
            self._keys, self._values = keys.copy_(self._keys), values.copy_(self._values)  # type: ignore[union-attr,arg-type]

    def reset(self) -> None:
        """Forget the tokens and keep the buffers, at their address."""
        self._length = 0
        if self._keys is not None and self._values is not None:
            self._keys.zero_()
            self._values.zero_()
