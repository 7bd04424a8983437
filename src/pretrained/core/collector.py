# SPDX-License-Identifier: Apache-2.0
"""Python's garbage collector, kept from running in the midst of work that leaves no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Put collections off until the end of a block of code.

    A full collection looks at everything that a framework has defined. With torch that takes 0.1 s, twice as
    long as building a model of a thousand modules without memory, and happens somewhere in its midst.

    The collector is the process's own, so other threads are without it for as long. It is on again afterwards
    whenever it was on before, whatever other threads that do the same are at.
    """
    # Only who found it on switches it, and so switches it on again: two threads cannot leave it off.
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
