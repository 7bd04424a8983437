# SPDX-License-Identifier: Apache-2.0
"""What a chat template may take: a budget of steps, and bounds on strings before they are made."""

from __future__ import annotations

import contextvars
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

MAX_STEPS = 1_000_000
"""Steps of one rendering: an iteration of a loop is one, a call of a function ten."""
MAX_SECONDS = 1.0
"""Time of the processor, in the rendering thread; real templates take milliseconds."""
MAX_TEMPLATE = 100_000
"""Characters of a template. The longest of published models have about 30,000."""
MAX_CHARACTERS = 4_000_000
"""Length of a string or list that an operator, filter or method of a template makes, and of the output."""

_STEPS_PER_CALL = 10
_STEPS_PER_LOOK = 16  # at the clock
_MOST_BITS = 10_000


class OverBudgetError(Exception):
    """A rendering took too many steps or wanted too long a string."""


class Budget:
    """What one rendering may still take."""

    current: contextvars.ContextVar[Budget] = contextvars.ContextVar("current")
    """The rendering that runs in this thread; loops and calls inside a template have no other way to it."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._output = MAX_CHARACTERS
        self._end = time.thread_time() + MAX_SECONDS

    def spend_step(self) -> None:
        """Take an iteration of a loop off the budget, or raise OverBudgetError."""
        self._spend(1)
        if self._steps % _STEPS_PER_LOOK == 0:
            self.spend_time()

    def spend_call(self) -> None:
        """Take a call off the budget, or raise OverBudgetError."""
        self._spend(_STEPS_PER_CALL)
        self.spend_time()

    def spend_time(self) -> None:
        """Raise OverBudgetError where the time is over."""
        if time.thread_time() > self._end:
            raise OverBudgetError(f"more than {MAX_SECONDS} seconds")

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
    check_length(weigh(value))
    return value


def weigh(value: Any) -> int:
    """Count the characters and items of a value, however deep; what is in it twice counts twice.

    Counting ends a little above `MAX_CHARACTERS`: a value that holds another twice, which holds another
    twice, is small in memory and endless when it is written, compared or hashed.

    Args:
        value: Anything.
    """
    if isinstance(value, str | bytes):
        return len(value)
    # Imported here: a heavy package comes with its first use.
    from jinja2.utils import Namespace  # noqa: PLC0415

    total, todo = 0, [value]
    while todo and total <= MAX_CHARACTERS:
        part = todo.pop()
        if isinstance(part, str | bytes):
            total += len(part)
            continue
        if isinstance(part, Namespace):
            part = part._Namespace__attrs  # jinja2 has no other way to them
        inner: Collection[Any]
        if isinstance(part, Mapping):
            inner = [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            inner = part
        else:
            continue
        total += 8 * len(inner)  # a pointer takes as much as eight letters
        if total <= MAX_CHARACTERS:
            todo.extend(inner)
    return total


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
                check_length(weigh(many) * times)
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right if isinstance(right, tuple) else (right,))


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise OverBudgetError("an endless number")


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
    elif name in ("split", "rsplit", "splitlines") and isinstance(target, str):
        separator = texts[0] if texts else None
        check_length(8 * (target.count(separator) if separator else len(target) // 2))
    elif name == "round":
        _check_bits(4 * size)
    elif name in ("batch", "slice"):
        check_length(8 * size)
    elif name == "translate":
        check_length(len(str(target)) * max([1, *(weigh(v) for v in values)]))
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
    places = template.count("{") + template.count("%")
    check_length(len(template) + places * max((weigh(v) for v in values), default=0))
