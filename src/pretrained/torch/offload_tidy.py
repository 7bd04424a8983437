# SPDX-License-Identifier: Apache-2.0
"""Keeping an offload folder tidy: one process fills it at a time, and what killed ones left goes.

A load that is killed leaves a temporary file, or a copy that the index does not name yet; a model that is
killed leaves the copies of weights that came from memory. None of them is ever trusted. The next load that
writes removes them: it holds the folder's lock, so whatever is unnamed and unlocked belongs to nobody.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from pretrained.core.atomic_files import errors_with_mend

if sys.platform != "win32":
    import fcntl

STEM: Final = "pretrained-offload"
"""What the names of all files in an offload folder begin with."""

_COPY: Final = re.compile(rf"{STEM}-[0-9a-f]{{16}}\.safetensors")
_FROM_MEMORY: Final = re.compile(rf"{STEM}-memory-[0-9a-f]{{16}}\.safetensors")
_TEMPORARY: Final = re.compile(rf"\.tmp-[0-9a-f]{{8}}-{STEM}[-.].*")


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Let one process after the other fill a folder; only work depends on it, not what is read.

    Args:
        folder: The offload folder.

    Yields:
        Whether this process has the folder for itself; without that nothing may be removed. A folder that
        cannot be written to has no lock, and can be read all the same.

    Raises:
        FileError: the lock cannot be opened.
    """
    if sys.platform == "win32":
        yield False
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(folder / f".{STEM}.lock", flags, 0o666)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            yield False
            return
        with errors_with_mend(folder / f".{STEM}.lock", what="The offload folder cannot be locked"):
            raise
    try:
        yield _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def hold(file: Path, owner: Any) -> None:
    """Keep a copy from being taken for one that was left behind, for as long as its owner lives.

    Args:
        file: A copy of weights that came from memory.
        owner: Whose end lets go of it.
    """
    if sys.platform == "win32":
        return
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(owner, os.close, descriptor)
        _lock(descriptor, fcntl.LOCK_SH)


def tidy(folder: Path, named: Collection[str]) -> None:
    """Remove what processes that were killed have left.

    Args:
        folder: The offload folder, which this process has for itself (`alone`).
        named: Files that the index names.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            if name in named:
                continue
            if _TEMPORARY.fullmatch(name) or _COPY.fullmatch(name) or _is_left(folder, name):
                with suppress(OSError):
                    (folder / name).unlink()


def _is_left(folder: Path, name: str) -> bool:
    """Tell whether a copy of weights from memory has no owner any more."""
    if sys.platform == "win32" or not _FROM_MEMORY.fullmatch(name):
        return False
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Lock a file until its descriptor is closed; some file systems of the network cannot."""
    try:
        fcntl.flock(descriptor, kind)
    except OSError:
        return False
    return True
