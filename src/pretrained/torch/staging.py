# SPDX-License-Identifier: Apache-2.0
"""Copies from ordinary memory to an accelerator through a fixed ring of page-locked buffers.

A device copies by itself only from page-locked memory; from a file's pages or other memory the driver would
copy a piece at a time while the caller waits. Here threads copy pieces into buffers side by side (torch's
copies do not hold the interpreter's lock) and enqueue each on a stream of its own. A buffer is filled again
when the device has read it; only a thread of the ring waits for that.
"""

from __future__ import annotations

import math
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from pretrained.torch.accelerator import Event, Runtime

PIECE: Final = 8 << 20
BUFFERS: Final = 8
THREADS: Final = 4


@dataclass(slots=True)
class _Buffer:
    """A page-locked buffer and the last copy out of it."""

    memory: torch.Tensor
    read: Event | None = None


class Sending:
    """One tensor on its way.

    Args:
        pieces: How many copies it takes.
        on_staged: Called when the source has been read for the last time, from a thread of the ring.
    """

    def __init__(self, pieces: int, on_staged: Callable[[], None] | None = None) -> None:
        self._left, self._on_staged = pieces, on_staged
        self._lock, self._enqueued = threading.Lock(), threading.Event()
        self._error: BaseException | None = None
        self._event: Event | None = None
        self.is_cancelled = False

    def enqueued(self) -> Event:
        """Wait until all copies are enqueued, and return the event after the last.

        Raises:
            BaseException: what reading the source raised.
        """
        self._enqueued.wait()
        if self._error is not None:
            raise self._error
        assert self._event is not None
        return self._event

    @property
    def has_failed(self) -> bool:
        """Whether reading the source raised."""
        return self._error is not None

    def cancel(self) -> bool:
        """Give up what is not enqueued yet, and return when nothing more will be.

        Returns:
            Whether everything had been enqueued before.
        """
        was_done = self._enqueued.is_set()
        self.is_cancelled = True
        self._enqueued.wait()
        return was_done

    def finish_piece(self, error: BaseException | None, event: Callable[[], Event]) -> None:
        """Count a piece.

        Args:
            error: What went wrong with it.
            event: Makes the event after the last.
        """
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            is_last = self._left == 0
        if not is_last:
            return
        try:
            self._event = event()
            if self._on_staged is not None:
                self._on_staged()
        except BaseException as late:
            self._error = self._error or late
        self._enqueued.set()


class Stager:
    """A ring of page-locked buffers for one accelerator.

    Its threads start with the first copy, and end when it is dropped.

    Args:
        runtime: The accelerator.
        piece: Bytes of a buffer.
        buffers: How many there are.
        executor: Runs the copies into buffers; None for threads of its own.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        piece: int = PIECE,
        buffers: int = BUFFERS,
        executor: Executor | None = None,
    ) -> None:
        self.runtime, self.stream = runtime, runtime.new_stream()
        self._piece, self._count, self._executor = piece, buffers, executor
        self._free: queue.Queue[_Buffer] = queue.Queue()
        self._made = 0
        # Held while work for the stream is enqueued, so that an event stands behind what it means.
        self._lock = threading.Lock()

    def send(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        after: Sequence[Event] = (),
        on_piece: Callable[[int, int], None] | None = None,
        on_staged: Callable[[], None] | None = None,
    ) -> Sending:
        """Copy a tensor to the device; returns at once.

        A cast is made where fewer bytes cross: on the host to a narrower dtype, on the device to a wider one.

        Args:
            source: On the CPU, one-dimensional and contiguous.
            target: On the device, one-dimensional and contiguous, of as many elements.
            after: What must have happened before `target` is written.
            on_piece: Called with the first and the last byte of `source` of each piece that has been read.
            on_staged: Called when all of it has been read.
        """
        wire = min(source.dtype, target.dtype, key=lambda dtype: dtype.itemsize)
        step = max(1, self._piece // wire.itemsize)
        starts = range(0, source.numel(), step)
        sending = Sending(max(1, len(starts)), on_staged)
        for start in starts or [0]:
            part = slice(start, start + step)
            work = _Piece(self, sending, source[part], target[part], wire, tuple(after), on_piece, start)
            self._submit(work)
        return sending

    def _submit(self, work: _Piece) -> None:
        with self._lock:
            if self._executor is None:
                pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pretrained-staging")
                weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
                self._executor = pool
        self._executor.submit(work)

    def _borrow(self) -> _Buffer:
        """Return a buffer, which the device may still read."""
        with self._lock:
            # The oldest is taken first, and a few lie ready, so that a thread rarely waits for the device.
            make = self._free.qsize() < THREADS and self._made < self._count
            self._made += make
        if make:
            try:
                return _Buffer(self.runtime.pinned(self._piece))
            except BaseException:
                with self._lock:
                    self._made -= 1
                raise
        return self._free.get()

    def stage(self, piece: _Piece) -> None:
        """Carry one piece over; runs in a thread of the ring.

        Args:
            piece: What to copy, and where to.
        """
        buffer = self._borrow()
        try:
            if buffer.read is not None:
                buffer.read.synchronize()
            nbytes = piece.source.numel() * piece.wire.itemsize
            staged = buffer.memory[:nbytes].view(piece.wire)
            staged.copy_(piece.source)
            if piece.on_piece is not None:
                size = piece.source.element_size()
                piece.on_piece(piece.start * size, (piece.start + piece.source.numel()) * size)
            # Wider on the device: the narrow bytes land in memory of their own first.
            landed = None if piece.wire == piece.target.dtype else self.runtime.empty(nbytes)
            with self._lock:
                if landed is not None:
                    self.runtime.wait(self.stream, self.runtime.event(self.runtime.current_stream()))
                    self.runtime.hold(landed, self.stream)
                for event in piece.after:
                    self.runtime.wait(self.stream, event)
                try:
                    if landed is None:
                        self.runtime.copy(piece.target, staged, self.stream)
                    else:
                        self.runtime.copy(landed.view(piece.wire), staged, self.stream)
                        self.runtime.copy(piece.target, landed.view(piece.wire), self.stream)
                finally:
                    buffer.read = self.runtime.event(self.stream)
        finally:
            self._free.put(buffer)

    def close(self) -> None:
        """End the threads, once what was sent is enqueued."""
        if isinstance(self._executor, ThreadPoolExecutor):
            self._executor.shutdown()

    def event(self) -> Event:
        """Return the point that the stream's work has reached."""
        with self._lock:
            return self.runtime.event(self.stream)


@dataclass(slots=True)
class _Piece:
    """A piece of a tensor on its way; calling it copies it, and lets go of both ends."""

    stager: Stager
    sending: Sending
    source: torch.Tensor
    target: torch.Tensor
    wire: torch.dtype
    after: tuple[Event, ...]
    on_piece: Callable[[int, int], None] | None
    start: int

    def __call__(self) -> None:
        error: BaseException | None = None
        try:
            if not self.sending.is_cancelled and self.source.numel():
                self.stager.stage(self)
        except BaseException as raised:
            error = raised
        # Whoever waits for the sending may count the references to the target.
        del self.source, self.target
        self.sending.finish_piece(error, self.stager.event)


def flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor's elements in the order in which they lie in memory; None where they leave gaps.

    Args:
        tensor: Any tensor.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return None
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def like(memory: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return bytes as a tensor of another's dtype, shape and strides.

    Args:
        memory: uint8, at least as many bytes.
        tensor: One for which `flat` returned elements.
    """
    nbytes = math.prod(tensor.shape) * tensor.element_size()
    return memory[:nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
