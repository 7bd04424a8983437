# SPDX-License-Identifier: Apache-2.0
"""What stands between a stranger's tokenizer files and the ``tokenizers`` library.

That library is native code: it raises bare `Exception`, panics (which Python sees as no `Exception` at all),
and ends the process where memory is not there. So what would lead there is refused before, and what it
raises becomes a `TokenizerError`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pretrained.core.untrusted import open_regular, read_at
from pretrained.errors import PretrainedError, TokenizerError

MAX_FILE_BYTES: Final = 256 * 2**20
"""Longest file of a tokenizer. The largest vocabularies, as tokenizer.json, take about 40 MB."""

MOST_GROWTH: Final = 1000
"""Characters that the normalizers of a tokenizer.json may make of one."""

_CHARSMAP: Final = re.compile(r'"precompiled_charsmap"\s*:\s*"([^"]*)"')
# Letters are never escaped by any writer, so only a file with such escapes is searched part by part.
_ESCAPED_LETTER: Final = re.compile(r"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
_FETCH: Final = "Fetch or save it again."


@contextmanager
def library_faults(what: str, where: object = None) -> Iterator[None]:
    """Turn whatever the native library raises into a TokenizerError.

    Args:
        what: What it was asked to do, as the error says it.
        where: The file, for errors.
    """
    try:
        yield
    except PretrainedError:
        raise
    except BaseException as error:
        # Its own errors are bare Exceptions; a TypeError is about what the caller passed.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(what, where=where, found=str(error)[:500], mend=_FETCH) from error


@contextmanager
def malformed_files(where: object) -> Iterator[None]:
    """Turn what Python raises about values of wrong types into a TokenizerError that names the place.

    Args:
        where: The folder or file.
    """
    try:
        yield
    except PretrainedError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise TokenizerError(
            "The tokenizer's files hold a value that cannot be",
            where=where,
            found=f"{type(error).__name__}: {error}"[:500],
            mend=_FETCH,
        ) from error


def read_bounded(file: Path) -> str:
    """Read a text file of a tokenizer.

    Args:
        file: UTF-8, at most `MAX_FILE_BYTES`.

    Raises:
        FileError: it cannot be opened.
        TokenizerError: it is no UTF-8, or too large.
    """
    with open_regular(file) as (opened, size):
        if size > MAX_FILE_BYTES:
            raise TokenizerError(
                "The tokenizer's file is too large",
                where=file,
                expected=f"at most {MAX_FILE_BYTES} bytes",
                found=f"{size} bytes",
                mend=_FETCH,
            )
        data = read_at(opened, 0, size)
    try:
        # As text files are read: any line end is one line end.
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            "The tokenizer's file is not UTF-8 text", where=file, found=str(error), mend=_FETCH
        ) from error


def check_charsmaps(text: str, where: object) -> None:
    """Refuse a tokenizer.json whose tables of characters lie about their size: the library believes them.

    Args:
        text: The JSON.
        where: The file, for errors.
    """
    found: list[Any] = _CHARSMAP.findall(text)
    if _ESCAPED_LETTER.search(text):
        todo = [json.loads(text)]
        while todo:
            part = todo.pop()
            if isinstance(part, dict):
                found.append(part.get("precompiled_charsmap") or "")
                todo.extend(part.values())
            elif isinstance(part, list):
                todo.extend(part)
    for spelled in found:
        try:
            check_charsmap(base64.b64decode(spelled), where)
        except (binascii.Error, TypeError, ValueError) as error:
            raise _bad_charsmap(str(error), where) from error


def check_charsmap(table: bytes, where: object) -> None:
    """Refuse a table of characters that lies about its size.

    Args:
        table: The length of a trie in bytes (4 bytes, little-endian), the trie, and texts that end in zeros.
        where: The file, for errors.
    """
    if not table:
        return
    length = int.from_bytes(table[:4], "little")
    if len(table) < 4 or length % 4 or 4 + length > len(table):
        raise _bad_charsmap(f"a trie of {length} bytes in a table of {len(table)}", where)


def check_growth(normalizer: Any, where: object) -> None:
    """Refuse normalizers that would make a long text of a short one.

    Args:
        normalizer: Of the ``tokenizers`` library, or None.
        where: The file, for errors.
    """
    if normalizer is None:
        return
    growth = 1
    todo = [json.loads(normalizer.__getstate__())]
    while todo:
        part = todo.pop()
        if not isinstance(part, dict):
            continue
        todo.extend(part.get("normalizers") or ())
        pattern = part.get("pattern") or {}
        replaced = max(1, len(pattern.get("String") or "")) if isinstance(pattern, dict) else 1
        growth *= max(1, -(-len(part.get("content") or "") // replaced))
        growth += len(part.get("prepend") or "")
        if growth > MOST_GROWTH:
            raise TokenizerError(
                "The tokenizer's normalizers make too much of a text",
                where=where,
                expected=f"at most {MOST_GROWTH} characters of one",
                mend="Do not trust this model.",
            )


def _bad_charsmap(found: str, where: object) -> TokenizerError:
    return TokenizerError(
        "The tokenizer's table of characters (precompiled_charsmap) is damaged",
        where=where,
        found=found,
        mend=_FETCH,
    )
