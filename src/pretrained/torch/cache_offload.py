# SPDX-License-Identifier: Apache-2.0
"""Caches whose layers live on the CPU and come to the accelerator one ahead of the layer that computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.cache_layers import CacheLayer

Pair = tuple[torch.Tensor, torch.Tensor]


class Transfers:
    """Copies between the CPU and the device that computes; on CUDA on a stream of their own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def is_away(self, states: torch.Tensor) -> bool:
        """Whether tensors are computed elsewhere than on the CPU, where the cache lives.

        Args:
            states: New keys.
        """
        return states.device.type != "cpu"

    def to_host(self, *states: torch.Tensor) -> Pair:
        """Return new keys and values on the CPU.

        Args:
            *states: Keys and values on the device.
        """
        keys, values = (tensor.to("cpu") for tensor in states)
        return keys, values

    def fetch(self, pair: Pair, device: torch.device) -> tuple[Pair, Any]:
        """Begin to copy keys and values to a device.

        Args:
            pair: On the CPU.
            device: Where to.

        Returns:
            The copies, and what `wait` needs.
        """
        if device.type != "cuda":
            return (pair[0].to(device), pair[1].to(device)), None
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            copies = (pair[0].to(device, non_blocking=True), pair[1].to(device, non_blocking=True))
            return copies, stream.record_event()

    def wait(self, copies: Pair, event: Any) -> None:
        """Let the device go on only when copies are there; the host does not wait.

        Args:
            copies: As `fetch` returned them.
            event: What it returned beside them.
        """
        if event is None:
            return
        current = torch.cuda.current_stream(copies[0].device)
        current.wait_event(event)
        for tensor in copies:
            # The allocator must not hand their memory on while this stream still reads it.
            tensor.record_stream(current)


class OffloadedLayer(CacheLayer):
    """A layer that lives on the CPU, whatever device computes.

    Of what it holds, the part that the next queries see is copied to the device by `prefetch`, or at the
    update; the new keys and values go back alone. Where the CPU computes there is nothing to copy.

    Args:
        inner: The layer, on the CPU.
        transfers: How tensors are copied; layers of a cache share them.
    """

    def __init__(self, inner: CacheLayer, transfers: Transfers | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.is_sliding = inner.is_sliding
        self._transfers = transfers or Transfers()
        self._device: torch.device | None = None
        self._fetched: tuple[Pair, Any] | None = None

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys held, where they are computed with; None before the first update."""
        return self._near(self.inner.keys)

    @property
    def values(self) -> torch.Tensor | None:
        """The values held, where they are computed with; None before the first update."""
        return self._near(self.inner.values)

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while the layer is empty."""
        return self.inner.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether there is memory for keys and values."""
        return self.inner.is_initialized

    @property
    def nbytes(self) -> int:
        """Bytes of the CPU's memory that the layer holds."""
        return self.inner.nbytes

    def allocate(
        self, batch_size: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """Make the buffers of a static layer, on the CPU; `device` is where it will be computed with."""
        self._device = torch.device(device)
        self.inner._pinned = self._device.type == "cuda"
        if hasattr(self.inner, "allocate"):
            self.inner.allocate(batch_size, num_heads, head_dim, dtype, "cpu")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_position: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values; return those that the new queries may look at, on their device.

        Args:
            key_states: [batch, kv_heads, new, head_dim].
            value_states: [batch, kv_heads, new, head_dim].
            cache_position: Refused: there is no buffer on the device to write.

        Raises:
            GenerationError: `cache_position` is given, or what the layer itself raises.
        """
        if cache_position is not None:
            raise GenerationError(
                "An offloaded cache cannot be written by positions",
                where="cache_position",
                mend="Use a StaticCache that is not offloaded for compiled steps.",
            )
        if not self._transfers.is_away(key_states):
            return self.inner.update(key_states, value_states)
        self._device = key_states.device
        # Page-locked, so that the copies need not wait for the host.
        self.inner._pinned = key_states.is_cuda
        self.prefetch()
        fetched, self._fetched = self._fetched, None
        self.inner.update(*self._transfers.to_host(key_states, value_states))
        if fetched is None:
            return key_states, value_states
        copies, event = fetched
        self._transfers.wait(copies, event)
        return torch.cat([copies[0], key_states], dim=2), torch.cat([copies[1], value_states], dim=2)

    def prefetch(self) -> None:
        """Begin to copy what the next queries see to the device that computed last."""
        if self._fetched is not None or self._device is None:
            return
        visible = self.inner.get_mask_sizes(0)[0]
        keys, values = self.inner.keys, self.inner.values
        if keys is None or values is None or not visible:
            return
        first = keys.shape[2] - visible
        pair = (keys.narrow(2, first, visible), values.narrow(2, first, visible))
        self._fetched = self._transfers.fetch(pair, self._device)

    def offload(self) -> None:
        """Let go of the device's copy."""
        self._fetched = None

    def get_seq_length(self) -> int:
        """Return how many tokens have gone through, those let go of included."""
        return self.inner.get_seq_length()

    def get_max_length(self) -> int:
        """Return how many tokens fit, or `UNBOUNDED`."""
        return self.inner.get_max_length()

    def get_mask_sizes(
        self, query_length: int, cache_position: torch.Tensor | None = None
    ) -> tuple[int, int]:
        """Return how many keys the next update hands back, and the position of the first of them."""
        return self.inner.get_mask_sizes(query_length)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self._fetched = None
        self.inner.crop(length)

    def can_crop(self, length: int) -> bool:
        """Whether `crop` can go back to `length` tokens."""
        return self.inner.can_crop(length)

    def reset(self) -> None:
        """Forget everything; a static layer keeps its buffers."""
        self._fetched = None
        self.inner.reset()

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace all buffers by a function of them that acts on the batch dimension."""
        self._fetched = None
        self.inner.map_batch(function)

    def copy_rows(self, rows: torch.Tensor, sources: torch.Tensor, newest: int) -> None:
        """Let `rows` go on from `sources`, which differ from them in their `newest` tokens only."""
        self._fetched = None
        self.inner.copy_rows(rows.cpu(), sources.cpu(), newest)

    def activate_past_recording(self) -> None:
        """Let go of nothing from now on, so that `crop` can go back as far."""
        self.inner.activate_past_recording()

    def keep_margin(self, tokens: int) -> None:
        """From now on let at least so many tokens be cropped away again."""
        self.inner.keep_margin(tokens)

    def _tensors(self) -> list[torch.Tensor]:
        return self.inner._tensors()

    def _near(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor if tensor is None or self._device is None else tensor.to(self._device)
