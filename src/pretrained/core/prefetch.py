# SPDX-License-Identifier: Apache-2.0
"""Brings the bytes that a load is about to use into memory, side by side and in the order of use.

A page that is not in memory stops whoever touches it until the disk has answered, one small read at a time.
Disks answer many large reads at once several times faster. Only pages that are not there are asked for: a
read of one byte that must not wait (RWF_NOWAIT) tells them apart, so that a load of warm files costs a few
milliseconds of such probes and starts no thread.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.reader import MappedFiles

WINDOW: Final = 192 << 20
"""Bytes that are read ahead of what has been used."""

_PIECE: Final = 16 << 20
_PROBE: Final = 2 << 20
_THREADS: Final = 8
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)


@dataclass(frozen=True)
class Piece:
    """A part of a file that is read at once.

    Attributes:
        file: The file.
        start: Its first byte.
        length: Bytes.
        before: Bytes of the whole load that are used before this piece is.
    """

    file: Path
    start: int
    length: int
    before: int


def plan_pieces(infos: Iterable[TensorInfo]) -> list[Piece]:
    """Cut the spans of tensors into pieces, in the order of use; neighbours in a file go together.

    Args:
        infos: The tensors, in the order in which they are used.
    """
    pieces: list[Piece] = []
    before = 0
    for info in infos:
        at, end = info.offset, info.offset + info.nbytes
        last = pieces[-1] if pieces else None
        if last is not None and last.file == info.file and last.start + last.length == at:
            take = min(_PIECE - last.length, end - at)
            if take > 0:
                pieces[-1] = Piece(last.file, last.start, last.length + take, last.before)
                at += take
        for start in range(at, end, _PIECE):
            length = min(_PIECE, end - start)
            pieces.append(Piece(info.file, start, length, before + start - info.offset))
        before += info.nbytes
    return pieces


class Prefetch:
    """Reads ahead of a load, in threads that end with it.

    Use it as a context manager. Whoever uses a tensor calls `wait` before and `used` after.

    Args:
        files: The maps that the load reads from; None where it reads from none, and nothing is done.
        infos: What it will use, in this order.
    """

    def __init__(self, files: MappedFiles | None, infos: Sequence[TensorInfo]) -> None:
        self._files = files or MappedFiles()
        self._pieces = [] if files is None else _cold(plan_pieces(infos))
        self._befores = [piece.before for piece in self._pieces]
        # Where in the load's bytes each tensor starts.
        self._starts: dict[int, int] = {}
        self._changed = threading.Condition()
        self._arrived = [False] * len(self._pieces)
        self._next = 0
        self._used_bytes = 0
        self._is_over = False
        self._threads: list[threading.Thread] = []
        if self._pieces:
            at = 0
            for info in infos:
                self._starts[id(info)] = at
                at += info.nbytes

    def __enter__(self) -> Prefetch:
        for index in range(min(_THREADS, len(self._pieces))):
            thread = threading.Thread(target=self._work, name=f"pretrained-prefetch-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def wait(self, info: TensorInfo) -> None:
        """Return when the bytes of a tensor are in memory, as far as they were asked for.

        Of a tensor larger than the window, the first half of a window is enough to begin with.

        Args:
            info: One of the tensors given at the start.
        """
        start = self._starts.get(id(info))
        if start is None:
            return
        first = max(bisect_left(self._befores, start + 1) - 1, 0)
        last = bisect_left(self._befores, start + min(info.nbytes, WINDOW // 2))
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or all(self._arrived[first:last]))

    def used(self, info: TensorInfo) -> None:
        """Note that a tensor has been read, so that the window moves on.

        Args:
            info: One of the tensors given at the start.
        """
        if id(info) in self._starts:
            with self._changed:
                self._used_bytes += info.nbytes
                self._changed.notify_all()

    def _work(self) -> None:
        while (index := self._take()) is not None:
            piece = self._pieces[index]
            try:
                # A tensor that did not wait for the whole of its bytes may be done with them.
                if piece.before + piece.length > self._used_bytes:
                    self._files.populate(piece.file, piece.start, piece.length)
            finally:
                with self._changed:
                    self._arrived[index] = True
                    self._changed.notify_all()

    def _take(self) -> int | None:
        """Return the index of the next piece once the window has reached it, or None at the end."""
        with self._changed:
            index, self._next = self._next, self._next + 1
            if index >= len(self._pieces):
                return None
            before = self._befores[index]
            self._changed.wait_for(lambda: self._is_over or before <= self._used_bytes + WINDOW)
            return None if self._is_over else index


def _cold(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces that are not in memory."""
    if not _NOWAIT:
        return []
    cold: list[Piece] = []
    for file, group in _by_file(pieces):
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # Whoever uses the file says better what is wrong with it.
            continue
        try:
            cold += [piece for piece in group if not is_in_memory(descriptor, piece.start, piece.length)]
        finally:
            os.close(descriptor)
    return cold


def _by_file(pieces: Sequence[Piece]) -> Iterator[tuple[Path, list[Piece]]]:
    """Yield runs of pieces of the same file, in order."""
    run: list[Piece] = []
    for piece in pieces:
        if run and run[-1].file != piece.file:
            yield run[-1].file, run
            run = []
        run.append(piece)
    if run:
        yield run[-1].file, run


def is_in_memory(descriptor: int, start: int, length: int) -> bool:
    """Tell by samples whether a part of a file can be read without waiting for the disk.

    Args:
        descriptor: Of the open file.
        start: First byte.
        length: Bytes.

    Returns:
        True also where the file system cannot say: it is left to its own read-ahead then.
    """
    if not _NOWAIT:
        return True
    byte = bytearray(1)
    try:
        # All but the last sample lie inside; the last byte catches a tail that was never read.
        for at in (*range(start, start + length, _PROBE), start + length - 1):
            os.preadv(descriptor, [byte], at, _NOWAIT)
    except OSError as error:
        return error.errno != errno.EAGAIN
    return True
