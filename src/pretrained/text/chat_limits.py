# SPDX-License-Identifier: Apache-2.0
"""What a chat template may take: a budget of steps, and bounds on strings before they are made."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Mapping
from typing import Any

MAX_STEPS = 1_000_000
"""Steps of one rendering: an iteration of a loop is one, a call of a function ten."""
MAX_CHARACTERS = 16_000_000
"""Length of a string or list that an operator, filter or method of a template makes, and of the output."""

_STEPS_PER_CALL = 10


class OverBudgetError(Exception):
    """A rendering took too many steps or wanted too long a string."""


class Budget:
    """What one rendering may still take."""

    current: contextvars.ContextVar[Budget] = contextvars.ContextVar("current")
    """The rendering that runs in this thread; loops and calls inside a template have no other way to it."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._output = MAX_CHARACTERS

    def spend_step(self) -> None:
        """Take an iteration of a loop off the budget, or raise OverBudgetError."""
        self._spend(1)

    def spend_call(self) -> None:
        """Take a call off the budget, or raise OverBudgetError."""
        self._spend(_STEPS_PER_CALL)

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise OverBudgetError(f"more than {MAX_STEPS:,} steps")

    def spend_output(self, count: int) -> None:
        """Take characters of output off the budget, or raise OverBudgetError."""
        self._output -= count
        if self._output < 0:
            raise OverBudgetError(f"more than {MAX_CHARACTERS:,} characters of output")


def check_length(length: int) -> None:
    """Raise OverBudgetError for a string that is too long.

    Args:
        length: In characters, or items of a list.
    """
    if length > MAX_CHARACTERS:
        raise OverBudgetError(
            f"a string of {length:,} characters" if length < 10**12 else "an endless string"
        )


def checked(value: Any) -> Any:
    """Return a value, unless it is too long a string or list.

    Args:
        value: Anything.
    """
    if isinstance(value, str | list | tuple):
        check_length(len(value))
    return value


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation before it makes too much.

    Args:
        operator: ``"*"``, ``"**"``, ``"%"`` and others.
        left: Its operands.
        right: Its operands.
    """
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | list | tuple) and isinstance(times, int):
                check_length(len(many) * times)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        check_length(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))


def check_method(name: str, target: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Refuse a string's method, or the filter of the same name, before it makes too long a string.

    Args:
        name: Of the method or filter.
        target: What it works on.
        arguments: Of the call.
        keywords: Of the call.
    """
    values = (*arguments, *keywords.values())
    sizes = [abs(v) for v in values if isinstance(v, int)]
    texts = [v for v in values if isinstance(v, str)]
    size = max(sizes, default=0)
    if name in ("ljust", "rjust", "center", "zfill"):
        check_length(size)
    elif name == "expandtabs" and isinstance(target, str):
        check_length(target.count("\t") * size)
    elif name == "indent" and isinstance(target, str):
        check_length((target.count("\n") + 1) * max(size, max(map(len, texts), default=0)))
    elif name == "replace" and isinstance(target, str) and len(texts) > 1:
        check_length(len(target) + target.count(texts[0]) * len(texts[1]))
    elif name in ("format", "format_map") and isinstance(target, str):
        _check_format(target, values)


def check_join(separator: str, items: list[Any]) -> None:
    """Refuse a join before it makes too long a string.

    Args:
        separator: Between two items.
        items: All of them.
    """
    check_length(len(separator) * len(items) + sum(len(item) for item in items if isinstance(item, str)))


def _check_format(template: str, values: tuple[Any, ...]) -> None:
    """Widths stand in the template's digits or, through ``*`` and nested braces, in the values."""
    nested = "*" in template or re.search(r"\{[^}]*\{", template)
    sizes = [abs(v) for v in values if isinstance(v, int)] if nested else []
    fields = " ".join(re.findall(r"%[-+ #.\d]*|\{[^{}]*", template))
    check_length(max([*(int(digits[:12]) for digits in re.findall(r"\d+", fields)), *sizes], default=0))
    check_length(
        len(template) + template.count("{") * max((len(v) for v in values if isinstance(v, str)), default=0)
    )
