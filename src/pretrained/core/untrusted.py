# SPDX-License-Identifier: Apache-2.0
"""First steps with a file that a stranger wrote: open it, parse its JSON, say what it looks like.

The checkpoint readers share these so that each of them refuses the same things in the same words.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from pretrained.errors import CheckpointError, FileError

DOWNLOAD_AGAIN: Final = (
    "Fetch the file again (from_pretrained(..., force_download=True) for a model of the hub)."
)

_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"version https://git-lfs", "a Git LFS pointer, the small text file that stands for the real one"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x80\x02\x8a\x0al\xfc\x9c", "a file of torch.save's format before version 1.6"),
    (b"\x80", "a Python pickle"),
    (b"<", "an HTML or XML page, perhaps a web server's error page"),
    (b"{", "a JSON file"),
)


def fault_of(path: Path) -> str:
    """Say what keeps a path from being a plain file, to go behind "which".

    Args:
        path: What is no plain file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "is a link that leads nowhere" if os.path.islink(path) else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be reached ({getattr(error, 'strerror', None) or error})"
    return "is a folder" if stat.S_ISDIR(mode) else "is neither a file nor a folder"


def leads_out(folder: Path, file: Path) -> bool:
    """Tell whether a file of a folder is a link that leads out of it.

    The links of the Hub's cache do not: a snapshot's files are links to the blobs of the same repository.

    Args:
        folder: The model's folder; it may itself be reached by links.
        file: A file in it.
    """
    if not os.path.islink(file):
        return False
    try:
        target, top = file.resolve().parent, folder.resolve()
    except (OSError, RuntimeError):  # a link to itself; opening it says so
        return False
    blobs = next((parent.parent / "blobs" for parent in top.parents if parent.name == "snapshots"), None)
    return not (target in (top, blobs) or top in target.parents)


def refuse_link_out(folder: Path, file: Path) -> None:
    """Raise for a file of a folder that is a link out of it, so that no model reads what lies elsewhere.

    Args:
        folder: The model's folder.
        file: A file in it.

    Raises:
        FileError: it is such a link.
    """
    if leads_out(folder, file):
        raise FileError(
            f"The file {file.name!r} is a link that leads out of the model's folder",
            where=folder,
            found=str(file.resolve()),
            mend="If you trust the link, replace it by a copy of the file, or pass the file's own path.",
        )


@contextmanager
def open_regular(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file for reading.

    Args:
        file: The file. Folders, pipes and devices are refused, because opening a pipe would wait for ever.

    Yields:
        The open file, unbuffered, and its size in bytes.

    Raises:
        FileError: it is absent, not a plain file or not readable.
    """
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "neither a file nor a folder"
            raise FileError("A weights file is needed here", where=file, expected="a file", found=kind)
        opened = open(file, "rb", buffering=0)  # noqa: SIM115 - closed below, kept out of the `except`
    except FileNotFoundError:
        fault = "is a link that leads nowhere" if os.path.islink(file) else "does not exist"
        raise FileError(f"The file {fault}", where=file, mend="Check the path.") from None
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(
            "The file cannot be opened", where=file, found=str(error), mend="Check its permissions."
        ) from error
    with opened:
        yield opened, os.fstat(opened.fileno()).st_size


def read_at(opened: BinaryIO, offset: int, count: int) -> bytes:
    """Read `count` bytes at `offset`, or what the file has of them.

    Args:
        opened: A file from `open_regular`; one unbuffered read may return fewer bytes than asked for.
        offset: First byte, from the start of the file.
        count: How many bytes.
    """
    opened.seek(offset)
    parts = []
    while count > 0 and (part := opened.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def parse_json_object(data: bytes, *, where: object, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Args:
        data: The raw bytes, UTF-8.
        where: Named in errors, normally the file.
        what: What the text is, for errors (``"safetensors header"``).

    Returns:
        The object.

    Raises:
        CheckpointError: it is not UTF-8, not JSON, not an object, nested too deep, or repeats a key.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_duplicates)
    except _DuplicateKeyError as error:
        raise CheckpointError(
            f"The {what} names {error.args[0]!r} twice", where=where, mend=DOWNLOAD_AGAIN
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"The {what} is not UTF-8 text", where=where, found=str(error), mend=DOWNLOAD_AGAIN
        ) from None
    except RecursionError:
        raise CheckpointError(f"The {what} is nested too deep", where=where, mend=DOWNLOAD_AGAIN) from None
    except ValueError as error:
        raise CheckpointError(
            f"The {what} is not valid JSON", where=where, found=str(error), mend=DOWNLOAD_AGAIN
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"The {what} is not a JSON object", where=where, found=type(value).__name__, mend=DOWNLOAD_AGAIN
        )
    return value


class _DuplicateKeyError(Exception):
    """Raised inside the JSON parser; turned into a CheckpointError outside."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def describe_start(start: bytes) -> str:
    """Say what a file that is not what its name says looks like.

    Args:
        start: Its first bytes; 32 are enough.
    """
    if not start:
        return "an empty file"
    if not any(start):
        return "a file that begins with zeros, as a broken download leaves"
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            return name
    if start[8:9] == b"{":
        return "a safetensors file"
    return f"unknown content that begins with {start[:8]!r}"
