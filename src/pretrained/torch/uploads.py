# SPDX-License-Identifier: Apache-2.0
"""Weights on their way from files to accelerators while a load runs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.plan import LoadStep
from pretrained.core.reader import MappedFiles
from pretrained.torch.accelerator import Runtime, runtime_for
from pretrained.torch.staging import PIECE, Sending, Stager
from pretrained.torch.tensors import TORCH_DTYPES, Read

WINDOW: Final = 128 << 20
"""Bytes of files that may wait to be read. What asks for pages ahead of a load goes by what has been sent."""

_CAST: Final = ("float32", "bfloat16", "float16")


class Uploads:
    """Sends weights through page-locked memory, several at once: disk, host and device work side by side.

    Use it as a context manager around a load: its end waits until every weight is on its way, lets the
    device's computing stream wait for the last of them, and ends the threads.

    Args:
        files: The maps that weights are views of, whose pages are given back behind; None where there are
            none.
        runtimes: Gives the streams of a device; None for one that has none.
        piece: Bytes of a page-locked buffer.
    """

    def __init__(
        self,
        files: MappedFiles | None = None,
        *,
        runtimes: Callable[[torch.device], Runtime | None] = runtime_for,
        piece: int = PIECE,
    ) -> None:
        self._files, self._runtimes, self._piece = files, runtimes, piece
        self._stagers: dict[torch.device, Stager | None] = {}
        self._waiting: deque[tuple[Sending, int]] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stagers = [stager for stager in self._stagers.values() if stager is not None]
        try:
            while self._waiting:
                sending, _ = self._waiting.popleft()
                if error is not None:
                    sending.cancel()
                else:
                    sending.enqueued()
            for stager in stagers:
                stager.runtime.wait(stager.runtime.current_stream(), stager.event())
        except BaseException:
            for sending, _ in self._waiting:
                sending.cancel()
            raise
        finally:
            self._waiting.clear()
            self._stagers.clear()
            for stager in stagers:
                stager.close()

    def read(self, step: LoadStep, device: torch.device, read: Read) -> Any:
        """Read a weight for a device.

        Args:
            step: What to read.
            device: Where to.
            read: Reads it, onto the CPU if that is wanted. Whoever looks at values, to check or to quantize
                them, does it there, for on the device they arrive later.

        Returns:
            What `read` returns; on an accelerator its values are there at the end of the load.
        """
        if device.type == "cpu" or not _is_plain(step) or self._stager(device) is None:
            return read(step, device)
        values = read(replace(step, dtype=step.source.dtype), torch.device("cpu"))
        if not isinstance(values, torch.Tensor):
            return values.to(device)
        dtype = TORCH_DTYPES[step.dtype]
        sent = self.send(values, dtype, device, self._release(step.source, values))
        return values.to(device, dtype) if sent is None else sent

    def _release(self, info: TensorInfo, values: torch.Tensor) -> Callable[[int, int], None] | None:
        """Return what gives back the pages of a weight, where it is a view of its file."""
        if self._files is None or not values.numel() or not self._files.is_mapped(info.file):
            return None
        address = np.frombuffer(self._files.buffer(info), np.uint8).ctypes.data
        return partial(self._files.release, info) if values.data_ptr() == address else None

    def send(
        self,
        source: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        on_piece: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor | None:
        """Return a weight on a device, where its values will be at the end of the load.

        Args:
            source: On the CPU, contiguous; it must not change meanwhile.
            dtype: Of the weight. Casts are made on the side where fewer bytes cross.
            device: Where to.
            on_piece: Called, from another thread, with the first and last byte of each piece that was read.

        Returns:
            The weight, or None where the device has no streams or there is nothing to send.

        Raises:
            BaseException: what reading an earlier weight raised.
        """
        stager = self._stager(device)
        if stager is None or not source.numel():
            return None
        memory = stager.runtime.empty(source.numel() * dtype.itemsize)
        stager.runtime.hold(memory, stager.stream)
        target = memory.view(dtype)
        # The allocator may give out memory that work enqueued earlier still uses.
        after = [stager.runtime.event(stager.runtime.current_stream())]
        sending = stager.send(source.reshape(-1), target, after=after, on_piece=on_piece)
        with self._lock:
            self._waiting.append((sending, source.nbytes))
            self._nbytes += source.nbytes
        self._hold_back()
        return target.view(source.shape)

    def _stager(self, device: torch.device) -> Stager | None:
        with self._lock:
            if device not in self._stagers:
                runtime = self._runtimes(device)
                self._stagers[device] = None if runtime is None else Stager(runtime, piece=self._piece)
            return self._stagers[device]

    def _hold_back(self) -> None:
        while True:
            with self._lock:
                if self._nbytes <= WINDOW or not self._waiting:
                    return
                sending, nbytes = self._waiting.popleft()
                self._nbytes -= nbytes
            sending.enqueued()


def _is_plain(step: LoadStep) -> bool:
    """Tell whether a step is a copy of numbers as they lie in their file, or a cast between usual dtypes."""
    same = step.source.dtype == step.dtype
    cast = step.source.dtype in _CAST and step.dtype in _CAST
    return step.apply is None and step.source.strides is None and (same or cast)
