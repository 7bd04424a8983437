# SPDX-License-Identifier: Apache-2.0
"""Whether a disk has room for what is to be written: asked before writing, and told when writing fails."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from pretrained.errors import FileError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(path: Path) -> int | None:
    """Return how many bytes the file system of a path has for this user, or None where it does not say.

    Args:
        path: A folder, or a file in a folder that exists.
    """
    try:
        total, _, free = shutil.disk_usage(path if path.is_dir() else path.parent)
    except OSError:
        return None
    # Some file systems of the network and in user space say that they have nothing at all.
    return free if total else None


def check_room(file: Path, needed: int) -> None:
    """Raise unless a file of some size can be written.

    Args:
        file: The first of the files that are to be written; its folder exists.
        needed: Bytes of all of them.

    Raises:
        FileError: the disk has fewer bytes free.
    """
    free = free_bytes(file)
    if free is not None and free < needed:
        raise FileError(
            "The disk has no room for what is to be written, and nothing was",
            where=file,
            expected=f"{needed} free bytes",
            found=str(free),
            mend="Free space or save elsewhere.",
        )


def described(error: OSError, file: Path, needed: int | None) -> str:
    """Return what the system said about a failed write, with the bytes needed and free where it helps.

    Args:
        error: The system's error.
        file: What was written.
        needed: Bytes that the file was to have; None where nobody knows.
    """
    text = str(error)
    free = free_bytes(file)
    if error.errno in _FULL and free is not None:
        text += f"; {free} bytes are free" + ("" if needed is None else f", {needed} are needed")
    elif error.errno == errno.EFBIG and needed is not None:
        text += f"; {needed} bytes are needed"
    return text
