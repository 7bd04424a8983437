# SPDX-License-Identifier: Apache-2.0
"""What moving weights to an accelerator needs of it: streams, events, pinned memory, copies that do not wait.

`Runtime` is all that `pretrained.torch.staging`, `pretrained.torch.ring` and `pretrained.torch.uploads` know
of a device, so that a test can stand in for one and finish every copy as late as it may.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait, on the host, until the work before it is done."""


class Runtime(Protocol):
    """One accelerator.

    Attributes:
        device: The accelerator.
    """

    device: torch.device

    def new_stream(self) -> Any:
        """Return a stream of its own."""

    def current_stream(self) -> Any:
        """Return the stream that the calling thread computes on."""

    def event(self, stream: Any) -> Event:
        """Return the point that a stream's work has reached; what is enqueued later is not part of it.

        Args:
            stream: The stream.
        """

    def wait(self, stream: Any, event: Event) -> None:
        """Let a stream's later work begin after an event. The host does not wait.

        Args:
            stream: The stream.
            event: The event.
        """

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return page-locked host memory, uint8.

        Args:
            nbytes: How much.
        """

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory of the device, uint8, for the calling thread's current stream.

        Args:
            nbytes: How much.
        """

    def hold(self, memory: torch.Tensor, stream: Any) -> None:
        """Keep memory that is dropped from being given out again before a stream's present work is done.

        Args:
            memory: Of the device.
            stream: A stream that uses it.
        """

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Enqueue a copy, with a cast where the dtypes differ. The host does not wait.

        Args:
            target: On the device.
            source: On the device, or page-locked.
            stream: Where to.
        """


class DeviceRuntime:
    """An accelerator whose torch module has streams and events: CUDA, ROCm, XPU.

    Args:
        device: The accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._torch: Any = torch.get_device_module(device)
        index = self._torch.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)

    def new_stream(self) -> Any:
        """Return a stream of its own."""
        return self._torch.Stream(device=self.device)

    def current_stream(self) -> Any:
        """Return the stream that the calling thread computes on."""
        return self._torch.current_stream(self.device)

    def event(self, stream: Any) -> Event:
        """Return the point that a stream's work has reached."""
        event = self._torch.Event()
        event.record(stream)
        return event  # type: ignore[no-any-return]

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream's later work begin after an event."""
        stream.wait_event(event)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return page-locked host memory, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return memory of the device, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def hold(self, memory: torch.Tensor, stream: Any) -> None:
        """Keep memory that is dropped until a stream's present work is done."""
        memory.record_stream(stream)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Enqueue a copy."""
        with self._torch.stream(stream):
            target.copy_(source, non_blocking=True)


def runtime_for(device: torch.device) -> Runtime | None:
    """Return the runtime of an accelerator, or None for a device without streams (CPU, MPS, meta).

    Args:
        device: Any device.
    """
    if device.type in ("cpu", "meta"):
        return None
    module = getattr(torch, device.type, None)
    needed = ("Stream", "Event", "current_stream", "stream", "current_device")
    return DeviceRuntime(device) if all(hasattr(module, name) for name in needed) else None
