# SPDX-License-Identifier: Apache-2.0
"""Writes files so that a reader finds the old content or the new: temporary name, flush, rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from pretrained.core.disk_space import described
from pretrained.errors import FileError, PretrainedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_text_atomically(file: Path, text: str) -> None:
    """Write a small text file so that a reader finds the old content or the new, never a part.

    Args:
        file: The file; its folder must exist.
        text: The content, written as UTF-8 with the line ends as they are.

    Raises:
        FileError: the file cannot be written; what was there is intact.
    """
    with errors_with_mend(file):
        replace_text(file, text)


def replace_text(file: Path, text: str) -> None:
    """Do what `write_text_atomically` does, with the system's own errors, for a caller that explains them."""
    temporary = file.with_name(temporary_name(file.name, secrets.token_hex(4)))
    with removed_on_error(file.parent, [temporary.name]), new_file(temporary) as opened:
        opened.write(text.encode("utf-8"))
    with removed_on_error(file.parent, [temporary.name], error=OSError):
        os.replace(temporary, file)
    sync_folder(file.parent)


def temporary_name(name: str, token: str) -> str:
    """Return a hidden name for a file on its way to be `name`.

    The writer recognises such names and removes what a crash left of them; their end still tells other
    readers the format.
    """
    return f".tmp-{token}-{name}"


@contextmanager
def new_file(file: Path) -> Iterator[BinaryIO]:
    """Open a file that must not exist; flush it to the disk at the end."""
    with open(file, "xb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system offers that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def one_saver(folder: Path) -> Iterator[None]:
    """Let nobody else save into a folder meanwhile, in this process or another, where the system can tell.

    The system drops the lock with the process, and no file is left by it.

    Args:
        folder: An existing folder.

    Raises:
        FileError: someone else is saving there now.
    """
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):  # a folder that cannot be opened has its own error at the first write
            descriptor = os.open(folder, os.O_RDONLY)
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FileError(
                    "Another save is writing into this folder, and this one has changed nothing",
                    where=folder,
                    mend="Wait for it; among several processes, pass is_main_process=False in all but one.",
                ) from error
            except OSError:
                pass  # file systems of the network may have no locks for folders
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def removed_on_error(
    folder: Path, names: Iterable[str], *, error: type[BaseException] = BaseException
) -> Iterator[None]:
    """Remove files if the block fails.

    Around renames `error` must be OSError, which says that the rename did not happen; an interrupt may come
    right after one, when the files are already in use.
    """
    try:
        yield
    except error:
        for name in names:
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        raise


_MENDS: Final = {
    errno.ENOSPC: "The disk is full: free space or save elsewhere.",
    errno.EDQUOT: "The disk quota is used up: free space or save elsewhere.",
    errno.EFBIG: "The file system takes no files of this size: pass a smaller max_shard_size.",
    errno.EROFS: "The file system is read-only: save elsewhere.",
    errno.EACCES: "Get write permission for the folder, or save elsewhere.",
    errno.EPERM: "Get write permission for the folder, or save elsewhere.",
    errno.ENOENT: "Make the folder first.",
    errno.ENOTDIR: "A part of the path is a file: name a folder.",
    errno.EISDIR: "A folder has the name of a file that is to be written: rename it or save elsewhere.",
}


@contextmanager
def errors_with_mend(
    where: Path,
    *,
    what: str = "Writing failed; what was there before is intact",
    needed: int | None = None,
) -> Iterator[None]:
    """Turn the system's errors into ours; what already is one passes.

    Args:
        where: What is written.
        what: Says what failed.
        needed: Bytes that it takes, for the error of a full disk.
    """
    try:
        yield
    except PretrainedError:
        raise
    except OSError as error:
        raise FileError(
            what,
            where=where,
            found=described(error, where, needed),
            mend=_MENDS.get(error.errno or 0, "Check the disk, or save elsewhere."),
        ) from error
