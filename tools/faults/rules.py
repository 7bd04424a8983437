# SPDX-License-Identifier: Apache-2.0
"""How an outcome is graded. The same rules for every library, and no exception to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GRADES = ("good", "vague", "silent", "crash", "executed")

RULES = """\
- **good**: an error that names a place (the file, argument or weight) and a fact (what was found or expected
  there), in its text, its class's name or what was logged before it; or the right result, where a case has
  one.
- **vague**: an error without these; or a wrong result, where a line of the log names place and fact.
- **silent**: a wrong result and no such line; or an error after which a checkpoint that was whole is not.
- **crash**: the process died of a signal, used more memory than it was given, or took longer than its time.
- **executed**: code of the file ran, whatever came then."""


@dataclass(frozen=True)
class Outcome:
    """What a case did.

    Attributes:
        error: The error's text, or None.
        kind: The error's class.
        right: Whether the result was right, where there was no error.
        log: Lines that were logged or warned.
        died: What ended the process, or an empty text.
        executed: Whether code of the file ran.
        intact: Whether the folder was afterwards as it must be.
    """

    error: str | None = None
    kind: str = ""
    right: bool = False
    log: str = ""
    died: str = ""
    executed: bool = False
    intact: bool = True


def grade(outcome: Outcome, place: Iterable[str], fact: Iterable[str]) -> str:
    """Return the grade of an outcome.

    Args:
        outcome: What happened.
        place: Words, one of which a good text holds.
        fact: Words, one of which a good text holds.
    """
    if outcome.executed:
        return "executed"
    if outcome.died or outcome.kind == "MemoryError":
        return "crash"
    if not outcome.intact:
        return "silent"
    if outcome.error is None:
        return "good" if outcome.right else "vague" if _names(outcome.log, place, fact) else "silent"
    shown = f"{outcome.kind}: {outcome.error}\n{outcome.log}"
    return "good" if _names(shown, place, fact) else "vague"


def _names(text: str, place: Iterable[str], fact: Iterable[str]) -> bool:
    text = text.lower()
    return any(word.lower() in text for word in place) and any(word.lower() in text for word in fact)
