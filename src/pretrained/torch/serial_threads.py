# SPDX-License-Identifier: Apache-2.0
"""Threads whose torch operators run on one core each.

Torch gives every thread that calls it a team of its own, as large as the machine. Two readers on two cores
are then four threads that wait for each other busily, at the end of every operator; beside other processes
that costs ten times the work itself. Work that is already cut into independent pieces is better off with
one core a piece.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def serial_pool(count: int | None = None) -> ThreadPoolExecutor:
    """Return a pool of threads in which torch's operators stay on their thread.

    Nothing changes for other threads: the setting is the OpenMP runtime's own, of one thread each. Where
    that runtime cannot be reached, threads are as torch makes them.

    Args:
        count: How many; None for as many as torch would use for one operator, at most four.
    """
    count = min(4, os.cpu_count() or 1) if count is None else count
    return ThreadPoolExecutor(count, thread_name_prefix="pretrained", initializer=_stay_alone)


def _stay_alone() -> None:
    # Torch sets a thread's number when it is first asked; a number that is set before would be lost.
    torch.get_num_threads()
    setter = _omp_set_num_threads()
    if setter is not None:
        setter(1)


@functools.cache
def _omp_set_num_threads() -> Callable[[int], None] | None:
    """Return the function of the OpenMP runtime that torch itself is linked with, or None."""
    path = getattr(torch._C, "__file__", None)
    try:
        # A handle finds the symbols of the libraries that it depends on as well.
        setter = ctypes.CDLL(path).omp_set_num_threads
    except (OSError, AttributeError, TypeError):
        return None
    setter.argtypes, setter.restype = (ctypes.c_int,), None
    return setter
