# SPDX-License-Identifier: Apache-2.0
"""Asks for the pages that the next layers will need while the current one computes.

Only pages that are not in memory are asked for (`core.prefetch.is_in_memory`). Where everything is warm,
read-ahead costs a few probes and no thread is started.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Protocol

from pretrained.core.prefetch import is_in_memory
from pretrained.core.reader import read_into_cache
from pretrained.torch.offload import Span, WatchedFile

WINDOW: Final = 256 << 20
"""Bytes that are asked for ahead of the layer that runs. They are page cache, not the process's memory."""

_PIECE: Final = 8 << 20
_THREADS: Final = 4


class Part(Protocol):
    """What is read ahead as one: the disk weights of one module.

    Attributes:
        ahead: Spans worth reading ahead.
        successor: What ran after it last time; before the first run, what follows in the module tree.
        is_requested: Whether its pages were asked for since it last ran.
    """

    ahead: list[Span]
    successor: Any
    is_requested: bool


class ReadAhead:
    """Follows the order in which the parts of one model run.

    Two threads that run the model at once only spoil each other's guesses.
    """

    def __init__(self) -> None:
        self._last: Part | None = None
        self._bytes_ahead = 0
        self._pool: ThreadPoolExecutor | None = None

    def enter(self, part: Part) -> None:
        """Note that a part runs now, and ask for what comes after it.

        Args:
            part: The part.
        """
        if self._last is not None and self._last is not part:
            self._last.successor = part
        self._last = part
        if part.is_requested:
            self._bytes_ahead -= _nbytes(part)
            # Much is on its way still: to look at each layer would cost more than it finds.
            if self._bytes_ahead > WINDOW * 3 // 4:
                return
        self._bytes_ahead = 0
        for coming in _coming(part):
            self._bytes_ahead += _nbytes(coming)
            if not coming.is_requested:
                coming.is_requested = True
                for span in coming.ahead:
                    self._request(span)

    def _request(self, span: Span) -> None:
        info = span.info
        end = info.offset + info.nbytes
        for start in range(info.offset, end, _PIECE):
            length = min(_PIECE, end - start)
            if not is_in_memory(span.file.descriptor, start, length):
                self._submit(span, start, length)

    def _submit(self, span: Span, start: int, length: int) -> Future[None]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="pretrained-read-ahead")
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        # The file goes along so that its descriptor stays open until the piece is read.
        return self._pool.submit(_read, span.file, start, length)


def _coming(part: Part) -> Iterator[Part]:
    """Yield a part and those that follow it, as far as the window reaches."""
    nbytes, seen = 0, set()
    coming: Part | None = part
    while coming is not None and nbytes < WINDOW and id(coming) not in seen:
        yield coming
        seen.add(id(coming))
        nbytes += _nbytes(coming)
        coming = coming.successor


def _nbytes(part: Part) -> int:
    return sum(span.info.nbytes for span in part.ahead)


def _read(file: WatchedFile, start: int, length: int) -> None:
    read_into_cache(file.descriptor, start, length)
