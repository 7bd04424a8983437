# SPDX-License-Identifier: Apache-2.0
"""One family of errors: each says what failed, where, what was expected and found, and how to mend it.

Every class also derives from the built-in exception that users of this field already catch for the
same fault (``OSError`` for files, ``ValueError`` for arguments, ...), so existing ``except`` clauses
keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PretrainedError(Exception):
    """Base of every error that this library raises on purpose.

    Args:
        what: One clause that says what failed.
        where: File, tensor key, argument or device concerned.
        expected: What would have been right.
        found: What was there instead.
        mend: What the user can do next.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        mend: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.mend = mend

    def __str__(self) -> str:
        text = self.what
        if self.where is not None:
            text += f" ({self.where})"
        facts = []
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.found is not None:
            facts.append(f"found {self.found}")
        if facts:
            text += ": " + ", ".join(facts)
        if not text.endswith((".", "?", "!")):
            text += "."
        if self.mend:
            text += " " + self.mend
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.found, self.mend))


def _rebuild(
    cls: type[PretrainedError], what: str, where: object, expected: object, found: object, mend: str | None
) -> PretrainedError:
    return cls(what, where=where, expected=expected, found=found, mend=mend)


class ConfigError(PretrainedError, ValueError):
    """A config.json (or a config object) is absent, malformed or contradicts itself."""


class FileError(PretrainedError, OSError):
    """A path, repository or file cannot be found or reached."""


class CheckpointError(PretrainedError, OSError):
    """A weights file is truncated, corrupt, hostile or lies about its content."""


class WeightsError(PretrainedError, RuntimeError):
    """The tensors of a checkpoint do not fit the model."""


class ArgumentError(PretrainedError, ValueError):
    """An argument has a value that cannot work."""


class UnknownArgumentError(PretrainedError, TypeError):
    """An argument that nothing here takes."""


class PlacementError(PretrainedError, ValueError):
    """A device map or a memory budget cannot be satisfied."""


class GenerationError(PretrainedError, ValueError):
    """A generation setting or input contradicts another, or cannot run."""


class TokenizerError(PretrainedError, ValueError):
    """A tokenizer's files or a chat template cannot be used."""


class MissingDependencyError(PretrainedError, ImportError):
    """An optional package is needed and not installed."""


class NotYetError(PretrainedError, NotImplementedError):
    """A known argument or feature that this version does not offer yet."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``'Did you mean x?'`` for the nearest known name, or an empty string.

    Args:
        name: What the user wrote.
        known: The names that exist.
    """
    if not isinstance(name, str) or len(name) > 200:  # a stranger's file may name anything
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else ""
