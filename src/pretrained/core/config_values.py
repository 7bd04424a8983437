# SPDX-License-Identifier: Apache-2.0
"""What a value of a config must be: of the annotated type, and of a size that a model can have.

The rules about sizes go by what a field is called, because every architecture calls the same things by
the same few words; so no architecture can forget them. Contradictions between fields are for the config
classes themselves.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from pretrained.core.dtypes import dtype_name
from pretrained.errors import ArgumentError, ConfigError

MOST_LABELS: Final = 1_000_000
"""Labels that `num_labels` may ask for; each gets a name, so the number in a file is memory."""

_LARGEST_INT: Final = 2**63 - 1

PROBLEM_TYPES: Final = ("regression", "single_label_classification", "multi_label_classification")

Rule = tuple[re.Pattern[str], Callable[[float], bool], str]

# A name's pattern, what its numbers must satisfy, and how to say that.
_RULES: Final[tuple[Rule, ...]] = (
    (
        re.compile(r"(num|n|d)_\w+|\w+_(size|dim|heads|layers)|dim|max_position_embeddings|sliding_window"),
        lambda number: number >= 0,
        "0 or more",
    ),
    (re.compile(r"\w*_eps(ilon)?|initializer_\w+"), lambda number: number >= 0, "0 or more"),
    (re.compile(r"\w*dropout\w*|\w+_pdrop"), lambda number: 0 <= number <= 1, "a share from 0 to 1"),
)


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """Return the annotated fields of a config class: name -> annotation.

    Args:
        cls: The class; its bases' fields come with it.
    """
    resolved = typing.get_type_hints(cls)
    return {name: hint for name, hint in resolved.items() if typing.get_origin(hint) is not ClassVar}


def checked(cls: type, name: str, value: Any, hint: Any) -> Any:
    """Return a field's value, widened where that loses nothing.

    Args:
        cls: The config class, named in errors.
        name: The field.
        value: What a file or a call gives.
        hint: The field's annotation.

    Raises:
        ConfigError: the value is of another type, not finite, or too large for any machine.
    """
    fits, value = _fit(value, hint)
    if not fits:
        raise ConfigError(
            f"{cls.__name__}.{name} has a value of the wrong type",
            where=name,
            expected=_spelling(hint),
            found=f"{type(value).__name__} {value!r}"[:200],
            mend=f"Correct {name!r} in config.json or in the call.",
        )
    if not isinstance(value, bool) and isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise _impossible(cls, name, value, "a finite number")
        if abs(value) > _LARGEST_INT:
            raise _impossible(cls, name, value, "a number of at most 63 bits")
    return value


def check_ranges(cls: type, values: Mapping[str, Any]) -> None:
    """Raise for a number that no model can have, going by what its field is called.

    Args:
        cls: The config class.
        values: Its fields' values by name, right in type.

    Raises:
        ConfigError: a negative size or a share above 1, for example.
    """
    for name in hints(cls):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for pattern, holds, expected in _RULES:
            if pattern.fullmatch(name) and not holds(value):
                raise _impossible(cls, name, value, expected)


def _impossible(cls: type, name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{cls.__name__}.{name} has a value that no model can have",
        where=name,
        expected=expected,
        found=f"{value!r}"[:200],
        mend=f"Correct {name!r} in config.json or in the call.",
    )


def dtype_field(value: Any) -> str | None:
    """Return the canonical name of a config's dtype; "auto" in a file says nothing, so None.

    Args:
        value: Any spelling of a dtype.

    Raises:
        ConfigError: it is none.
    """
    if value is None or value == "auto":
        return None
    try:
        return dtype_name(str(value))
    except ArgumentError as error:
        raise ConfigError(error.what, where="dtype", expected=error.expected, mend=error.mend) from error


def label_fields(values: dict[str, Any], *, current: int | None = None) -> dict[str, Any]:
    """Make id2label, label2id and num_labels agree, whichever were given; heads by number, too.

    Args:
        values: Changed and returned: `num_labels` becomes the other two.
        current: How many labels there are so far; the same number asked for again keeps their names.

    Raises:
        ConfigError: one of them is malformed.
    """
    id2label = values.get("id2label")
    if isinstance(id2label, Mapping):
        id2label = {_index(key, "id2label"): label for key, label in id2label.items()}
        odd = [label for label in id2label.values() if not isinstance(label, str | int | float | None)]
        if odd:
            raise ConfigError(
                "A label of id2label is not a name",
                where="id2label",
                expected="a text or a number",
                found=f"{odd[0]!r}"[:200],
                mend="Correct 'id2label' in config.json or in the call.",
            )
        values["id2label"] = id2label
        values.setdefault("label2id", {label: index for index, label in id2label.items()})
        current = len(id2label)
    if isinstance(values.get("pruned_heads"), Mapping):
        values["pruned_heads"] = {
            _index(layer, "pruned_heads"): _heads(layer, heads)
            for layer, heads in values["pruned_heads"].items()
        }
    count = values.pop("num_labels", None)
    if count is not None and label_count(count) != current:
        values["id2label"] = {index: f"LABEL_{index}" for index in range(label_count(count))}
        values["label2id"] = {label: index for index, label in values["id2label"].items()}
    return values


def label_count(value: Any) -> int:
    """Return a number of labels.

    Args:
        value: As a file or a call gives it.

    Raises:
        ConfigError: it is no whole number from 0 to `MOST_LABELS`.
    """
    fits, count = _fit(value, int)
    if not fits or not 0 <= count <= MOST_LABELS:
        raise ConfigError(
            "num_labels cannot be a number of labels",
            where="num_labels",
            expected=f"a whole number from 0 to {MOST_LABELS}",
            found=f"{value!r}"[:200],
            mend="Correct 'num_labels' in config.json or in the call.",
        )
    return int(count)


def _index(key: Any, name: str) -> int:
    try:
        return int(key)
    except (TypeError, ValueError):
        raise ConfigError(
            f"A key of {name} is not a whole number",
            where=name,
            found=f"{key!r}"[:200],
            mend=f"Correct {name!r} in config.json or in the call.",
        ) from None


def _heads(layer: Any, heads: Any) -> list[int]:
    if isinstance(heads, list | tuple | set | frozenset):
        return sorted(_index(head, f"pruned_heads[{layer}]") for head in heads)
    raise ConfigError(
        "pruned_heads does not list heads",
        where=f"pruned_heads[{layer}]",
        expected="a list of head numbers",
        found=f"{heads!r}"[:200],
    )


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:  # noqa: PLR0911 - one line for each kind of annotation
    origin = typing.get_origin(hint)
    if hint is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        results = [_fit(value, option) for option in typing.get_args(hint)]
        return next((result for result in results if result[0]), (False, value))
    if hint is type(None):
        return value is None, value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            return True, int(value)
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number and abs(value) <= _LARGEST_INT else value
    if origin is typing.Literal:
        return value in typing.get_args(hint), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, value
        items = [_fit(item, typing.get_args(hint)[0]) for item in value]
        return all(fits for fits, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    return isinstance(value, hint), value


def _spelling(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
