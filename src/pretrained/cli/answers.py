# SPDX-License-Identifier: Apache-2.0
"""Files of prompts and of answers, one JSON object a line, and a record of which answers belong to which.

An answer is one write to the end of its file, so that a program which is killed leaves whole lines, and at
most a piece of one behind them. Beside the answers lies a record of the input and the settings; a run that
finds both goes on where the last one ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrained.core.atomic_files import write_text_atomically
from pretrained.errors import ArgumentError, FileError, PretrainedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Fields of an answer; a field of the input by one of these names is carried as ``input_...``.
OWN_FIELDS = ("line", "id", "answer", "num_tokens", "finish", "error")
_SETTINGS = ("max_new_tokens", "seed", "stop_strings")
# Seconds between two times that answers are made sure to be on the disk.
_FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class Question:
    """A line of the input.

    Attributes:
        line: Its number, from 1.
        content: What it says; empty where it is bad.
        fault: What is wrong with it, or None.
    """

    line: int
    content: Mapping[str, Any]
    fault: str | None = None

    @property
    def name(self) -> Any:
        """Its id: what it says itself, or the number of the line."""
        return self.content.get("id", self.line)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of its own."""
        return {name: self.content[name] for name in _SETTINGS if self.content.get(name) is not None}

    def answered(self, **fields: Any) -> dict[str, Any]:
        """Return the answer's line: the number, the id, what the input carries, and these fields.

        Args:
            **fields: Of `OWN_FIELDS`.
        """
        carried = {
            f"input_{name}" if name in OWN_FIELDS else name: value
            for name, value in self.content.items()
            if name != "id"
        }
        return {"line": self.line, "id": self.name, **carried, **fields}


def read_questions(file: Path) -> Iterator[Question]:
    """Yield the lines of an input; empty ones are passed over.

    Args:
        file: UTF-8, one JSON object a line, with ``prompt`` or ``messages``.

    Raises:
        FileError: it cannot be read.
    """
    with _opened(file) as lines:
        for number, raw in enumerate(lines, 1):
            if raw.strip():
                yield _question(number, raw)


def _question(number: int, raw: bytes) -> Question:
    try:
        content = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Question(number, {}, f"not UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return Question(number, {}, f"not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return Question(number, {}, "not JSON that can be read: nested too deeply")
    if not isinstance(content, dict):
        return Question(number, {}, f"not a JSON object but {_kind(content)}")
    return Question(number, content, _fault(content))


def _fault(content: Mapping[str, Any]) -> str | None:
    prompt, messages = content.get("prompt"), content.get("messages")
    if (prompt is None) == (messages is None):
        found = "has neither" if prompt is None else "has both"
        return f'needs "prompt" or "messages", and {found}'
    if prompt is not None:
        if not isinstance(prompt, str):
            return f'"prompt" must be a text, not {_kind(prompt)}'
        return None if prompt.strip() else '"prompt" is empty'
    listed = messages if isinstance(messages, list) else []
    if not listed or not all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in listed):
        return '"messages" must be a list of {"role": ..., "content": ...}'
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class InputState:
    """What an input file is known by: its first `size` bytes.

    Attributes:
        size: Bytes.
        sha256: Of those bytes.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path, size: int | None = None) -> InputState:
        """Read a file's state.

        Args:
            file: The file.
            size: How many of its first bytes count; None for all.
        """
        digest, seen = hashlib.sha256(), 0
        with _opened(file) as stream:
            while block := stream.read((1 << 20) if size is None else min(1 << 20, size - seen)):
                digest.update(block)
                seen += len(block)
        return cls(seen, digest.hexdigest())


class AnswerFile:
    """The answers of a run: opened for this process alone, read for what is there, added to.

    Args:
        file: The answers.
        source: The input.
        settings: What else decides about the answers, by name; plain values.
        drawn: Settings by chance: those of its beginning count where it goes on.

    Attributes:
        done: Numbers of the lines that are answered.
        settings: Those of the run, which are those of its beginning where it goes on.
    """

    def __init__(
        self, file: Path, source: Path, settings: Mapping[str, Any], drawn: Mapping[str, Any] | None = None
    ) -> None:
        self.file, self.source = file, source
        self.record_file = file.with_name(file.name + ".run.json")
        self.done: set[int] = set()
        if file.exists() and os.path.samefile(file, source):
            raise ArgumentError("The answers would overwrite the input", where="--output", found=str(file))
        try:
            self._descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unusable(file, error) from error
        try:
            self._lock()
            self.settings = self._begin(dict(settings), drawn or {})
        except BaseException:
            os.close(self._descriptor)
            raise
        self._flushed = time.monotonic()

    def add(self, answer: Mapping[str, Any]) -> None:
        """Add an answer.

        Args:
            answer: As `Question.answered` returned it.

        Raises:
            FileError: it cannot be written; what was there is intact.
        """
        data = _encoded(answer) + b"\n"
        end = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise _unusable(self.file, error) from error
        self.done.add(int(answer["line"]))
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Make sure that the answers are on the disk."""
        os.fsync(self._descriptor)
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush, and let others have the file."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(
                "Another run is adding to these answers",
                where=self.file,
                mend="Wait for it, or choose another --output.",
            ) from error
        except OSError:
            # A file system without locks.
            return

    def _begin(self, settings: dict[str, Any], drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Go on with what is there, or note what this run begins with; return the settings that count."""
        old = self._record()
        if old is None:
            if os.fstat(self._descriptor).st_size:
                raise FileError(
                    "There is a file already, and nothing tells that it is this input's answers",
                    where=self.file,
                    mend="Choose another --output, or remove it.",
                )
            settings = {**drawn, **settings}
        else:
            settings = self._compare(old, settings, drawn)
            self._read_done()
        state = InputState.of(self.source)
        record = {
            "input": self.source.name,
            "size": state.size,
            "sha256": state.sha256,
            "settings": settings,
        }
        if record != old:
            write_text_atomically(self.record_file, json.dumps(record, indent=2) + "\n")
        return settings

    def _record(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self.record_file.read_text(encoding="utf-8"))
            known = {"size": int, "sha256": str, "settings": dict}
            if all(isinstance(record[name], kind) for name, kind in known.items()):
                return dict(record)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise FileError(
            "The record of these answers cannot be read",
            where=self.record_file,
            mend=f"Choose another --output, or remove it and {self.file.name}.",
        )

    def _compare(
        self, old: Mapping[str, Any], settings: dict[str, Any], drawn: Mapping[str, Any]
    ) -> dict[str, Any]:
        if InputState.of(self.source, old["size"]) != InputState(old["size"], old["sha256"]):
            raise FileError(
                "The input has changed since these answers were begun, so they may not be its answers",
                where=self.source,
                expected="the file of then; more lines at its end are fine",
                mend=f"Choose another --output, or remove {self.file.name} and {self.record_file.name}.",
            )
        for name in {**old["settings"], **settings}:
            before, now = old["settings"].get(name), settings.get(name)
            if before != now and not (now is None and name in drawn):
                raise ArgumentError(
                    f"These answers were begun with another {name}",
                    where=self.file,
                    expected=repr(before),
                    found=repr(now),
                    mend="Run it with the same settings, or choose another --output.",
                )
        kept: dict[str, Any] = dict(old["settings"])
        return kept

    def _read_done(self) -> None:
        """Read which lines are answered, and cut off a last line that was not finished."""
        good = 0
        with open(self._descriptor, "rb", closefd=False) as stream:
            stream.seek(0)
            for number, raw in enumerate(stream, 1):
                try:
                    line = json.loads(raw)["line"]
                    if not raw.endswith(b"\n") or not isinstance(line, int):
                        raise ValueError(raw)
                except (ValueError, KeyError, TypeError) as error:
                    if stream.read(1):
                        raise FileError(
                            "A line of the answers is damaged",
                            where=f"{self.file}:{number}",
                            mend="Remove that line, and its prompt is answered again.",
                        ) from error
                    break
                self.done.add(line)
                good += len(raw)
        os.ftruncate(self._descriptor, good)


def _encoded(answer: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can escape and UTF-8 cannot hold.
        return json.dumps(answer).encode()


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise _unusable(file, error) from error


def _unusable(file: Path, error: OSError) -> PretrainedError:
    return FileError(f"Cannot be used: {error.strerror or error}", where=file)
