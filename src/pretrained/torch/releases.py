# SPDX-License-Identifier: Apache-2.0
"""Lets go of the pages of weights on disk after their use, those of several layers at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from torch import nn

from pretrained.core.budgets import available_host_memory
from pretrained.torch.offload import DiskWeights, Span, release_run

# Less than the block for which a placement keeps room.
_BATCH: Final = 32 << 20


class Releases:
    """Gives pages back after their use: those of several layers at once where they are neighbours.

    To ask the page table and to undo its entries costs the same for one layer as for ten, and huge pages that
    lie across the border of two weights need not be taken apart.

    Args:
        store: The weights on disk that this is for.
    """

    def __init__(self, store: DiskWeights) -> None:
        self._batch_bytes = min(_BATCH, store.nbytes // 16)
        left = available_host_memory()
        self._is_beyond_memory = left is not None and store.nbytes > left
        self._lock = threading.Lock()
        self._waiting: list[Span] = []
        self._waiting_bytes = 0

    def add(self, spans: Sequence[Span]) -> None:
        """Note that weights are not in use any more.

        Args:
            spans: Theirs.
        """
        with self._lock:
            self._waiting += spans
            self._waiting_bytes += sum(span.info.nbytes for span in spans)
            if self._waiting_bytes < self._batch_bytes:
                return
        self.flush()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Give back what waits when the whole model has run; a forward hook.

        Args:
            module: The model.
            args: What it was called with.
            output: What it returned.
        """
        self.flush()

    def flush(self) -> None:
        """Give back what waits."""
        with self._lock:
            waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for run in _runs(waiting):
            release_run(run)
            if self._is_beyond_memory:
                # The next pass finds none of it in the cache whatever is done; room that is made at once
                # spares the system to search for some while it reads ahead.
                first, last = run[0], run[-1]
                length = last.info.offset + last.info.nbytes - first.info.offset
                with suppress(OSError, AttributeError):
                    os.posix_fadvise(first.file.descriptor, first.info.offset, length, os.POSIX_FADV_DONTNEED)


def _runs(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield spans in runs of neighbours."""
    run: list[Span] = []
    for span in sorted(set(spans), key=lambda span: span.address):
        if run and not run[-1].touches(span):
            yield run
            run = []
        run.append(span)
    if run:
        yield run
