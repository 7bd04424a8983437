# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a callback for programs, a bar for people at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pretrained.core.options import Progress

# Smaller loads are over before a bar could be read.
_WORTH_A_BAR = 200_000_000


def _silent(done: int, total: int, stage: str) -> None:
    """Report to nobody."""


@contextmanager
def reporting(progress: Progress | bool | None, total: int, stage: str) -> Iterator[Progress]:
    """Yield the function that a stage of work calls with ``(bytes done, bytes in all, stage)``.

    Args:
        progress: A function to call; False for silence; True for a bar; None for a bar where standard
            error is a terminal and the work is large.
        total: Bytes of the whole stage.
        stage: What is being done, for the bar's label.
    """
    if callable(progress):
        yield progress
        return
    wanted = progress if progress is not None else sys.stderr.isatty() and total > _WORTH_A_BAR
    if not wanted:
        yield _silent
        return
    # Imported here: only a terminal needs it, and it costs more than the rest of this module.
    from tqdm import tqdm  # noqa: PLC0415

    with tqdm(total=total, desc=stage, unit="B", unit_scale=True, leave=False) as bar:
        yield lambda done, _total, _stage: bar.update(done - bar.n)


@contextmanager
def counting(total: int | None, unit: str, *, shown: bool, start: int = 0) -> Iterator[Callable[[], object]]:
    """Yield a function to call for each thing that is done.

    Args:
        total: How many there are in all; None where that is not known.
        unit: What they are.
        shown: Whether to show a bar on standard error.
        start: How many are done already.
    """
    if not shown:
        yield lambda: None
        return
    # Imported here: as above.
    from tqdm import tqdm  # noqa: PLC0415

    with tqdm(total=total, unit=unit, initial=start) as bar:
        yield bar.update
