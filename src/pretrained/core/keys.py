# SPDX-License-Identifier: Apache-2.0
"""Key rules: how the names in a file and the names a model promises meet.

Module paths are checkpoint keys, so most families need no rule at all. The rest is said as data: a
`Rename` is a template that reads both ways, a `Drop` names what a file may carry and the model derives.
`match_keys` is a pure function from the two sets of names to a `KeyMatch`; nothing is lost in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from pretrained.errors import ArgumentError, WeightsError


@dataclass(frozen=True, slots=True)
class Rename:
    """A file's name for a weight, and the model's.

    Attributes:
        file: Template of the name in the file; ``*`` stands for any text, the same on both sides and
            in the same order.
        model: Template of the promised name.
    """

    file: str
    model: str

    def to_model(self, key: str) -> str | None:
        """Return the promised name of a file's key, or None where the rule does not apply."""
        return _substitute(self.file, self.model, key)

    def to_file(self, key: str) -> str | None:
        """Return the file's name of a promised key, or None where the rule does not apply."""
        return _substitute(self.model, self.file, key)


@dataclass(frozen=True, slots=True)
class Drop:
    """A key that a file may hold and no model needs.

    Attributes:
        file: Template of its name, with ``*`` for any text.
        why: Why it is not needed, for the report.
    """

    file: str
    why: str


KeyRule = Rename | Drop

# TensorFlow's names for the two vectors of a layer norm, in BERT-era files converted from it.
LEGACY_NORM_RULES: tuple[KeyRule, ...] = (
    Rename("*LayerNorm.gamma", "*LayerNorm.weight"),
    Rename("*LayerNorm.beta", "*LayerNorm.bias"),
)


@dataclass(frozen=True, slots=True)
class KeyMatch:
    """How the keys of a file serve a model.

    Attributes:
        sources: Promised key -> key in the file.
        missing: Promised keys that the file lacks, in the model's order; ties are resolved.
        unexpected: The file's keys that serve nothing.
        dropped: The file's keys that a `Drop` rule names -> why.
        renamed: Promised key -> the name for it in files like this one, where a rule of the architecture
            (not the prefix, nor the user's `key_mapping`) changed it. The prefix is the model's.
    """

    sources: Mapping[str, str]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def match_keys(
    file_keys: Iterable[str],
    promised: Iterable[str],
    *,
    ties: Mapping[str, str] | None = None,
    base_prefix: str = "",
    rules: Sequence[KeyRule] = (),
    key_mapping: Mapping[str, str] | None = None,
) -> KeyMatch:
    """Match the names in a file with the names a model promises.

    Args:
        file_keys: Keys in the file.
        promised: Keys of the model, in module order.
        ties: Alias -> owner, for keys that name one tensor; an absent member takes the group's tensor.
        base_prefix: Attribute that holds the headless model (``"bert"``), which a file written by
            another head may have more or less of.
        rules: The architecture's key rules.
        key_mapping: The user's ``{regex: replacement}``, applied to the file's keys first.

    Raises:
        ArgumentError: `key_mapping` is no set of regular expressions and replacements, or by it two keys
            of the file would fill one weight.
        WeightsError: two keys of the file would fill one weight without it.
    """
    promised = list(promised)
    wanted = set(promised)
    mapping = _compiled(key_mapping or {})
    sources: dict[str, str] = {}
    renamed: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unexpected: list[str] = []
    for key in file_keys:
        name = _mapped(key, mapping)
        target = _find(name, wanted, base_prefix, rules)
        if target is None:
            why = next(
                (rule.why for rule in rules if isinstance(rule, Drop) and _fits(rule.file, name)), None
            )
            if why is None:
                unexpected.append(key)
            else:
                dropped[key] = why
            continue
        if target in sources:
            raise _collision(target, sources[target], key, by_mapping=bool(mapping))
        sources[target] = key
        if not _differs_by_prefix_only(name, target, base_prefix):
            renamed[target] = _with_prefix_of(target, name, base_prefix)
    _share(sources, promised, ties or {})
    missing = tuple(key for key in promised if key not in sources)
    return KeyMatch(sources, missing, tuple(unexpected), dropped, renamed)


def _find(name: str, wanted: set[str], base_prefix: str, rules: Sequence[KeyRule]) -> str | None:
    """Return the promised key that `name` stands for, trying the plainest reading first."""
    spellings = [name]
    for rule in rules:
        if isinstance(rule, Rename) and (other := rule.to_model(name)) is not None:
            spellings.append(other)
    prefix = f"{base_prefix}." if base_prefix else ""
    for spelling in spellings:
        for candidate in (spelling, prefix + spelling, spelling.removeprefix(prefix)):
            if candidate in wanted:
                return candidate
    for spelling in spellings[1:]:
        # A second rule may apply once the first has: gamma inside an otherwise renamed module.
        for rule in rules:
            if isinstance(rule, Rename) and (other := rule.to_model(spelling)) is not None:
                for candidate in (other, prefix + other, other.removeprefix(prefix)):
                    if candidate in wanted:
                        return candidate
    return None


def _share(sources: dict[str, str], promised: list[str], ties: Mapping[str, str]) -> None:
    """Let every member of a tie group have the tensor of the first member that the file holds."""
    groups: dict[str, list[str]] = {}
    for alias, owner in ties.items():
        groups.setdefault(owner, [owner]).append(alias)
    for members in groups.values():
        held = next((sources[member] for member in members if member in sources), None)
        if held is not None:
            for member in members:
                sources.setdefault(member, held)


def _collision(target: str, first: str, second: str, *, by_mapping: bool) -> Exception:
    what, found = f"Two keys of the file would fill {target!r}", f"{first!r} and {second!r}"
    if by_mapping:
        mend = "Make the regular expressions so narrow that each weight has one source."
        return ArgumentError(what, where="key_mapping", found=found, mend=mend)
    mend = "The file names weights in two ways; leave one of the two out, or map it away with key_mapping."
    return WeightsError(what, where="checkpoint", found=found, mend=mend)


def _with_prefix_of(target: str, name: str, base_prefix: str) -> str:
    """Give a file's name the prefix that the model has, so that a save is of one style throughout."""
    if not base_prefix:
        return name
    prefix = f"{base_prefix}."
    return (prefix if target.startswith(prefix) else "") + name.removeprefix(prefix)


def _differs_by_prefix_only(key: str, target: str, base_prefix: str) -> bool:
    prefix = f"{base_prefix}." if base_prefix else ""
    return key in (target, prefix + target) or target == prefix + key


def _compiled(key_mapping: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for pattern, replacement in key_mapping.items():
        if not isinstance(pattern, str | re.Pattern) or not isinstance(replacement, str):
            raise ArgumentError(
                "key_mapping is not a dictionary of regular expressions and replacements",
                where="key_mapping",
                expected="texts",
                found=f"{pattern!r}: {replacement!r}"[:200],
            )
        try:
            compiled.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ArgumentError(
                f"{pattern!r} is not a regular expression",
                where="key_mapping",
                found=str(error),
                mend="To mean a character itself, put a backslash before it.",
            ) from error
    return compiled


def _mapped(key: str, mapping: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in mapping:
        try:
            changed, count = pattern.subn(replacement, key)
        except (re.error, IndexError) as error:
            raise ArgumentError(
                f"{replacement!r} is not a replacement for {pattern.pattern!r}",
                where="key_mapping",
                found=str(error),
                mend="Groups are written \\1, \\2 and so on, as many as the expression has parentheses.",
            ) from error
        if count:
            return changed
    return key


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("(.*)".join(re.escape(part) for part in template.split("*")))


def _fits(template: str, key: str) -> bool:
    return _pattern(template).fullmatch(key) is not None


def _substitute(source: str, target: str, key: str) -> str | None:
    found = _pattern(source).fullmatch(key)
    if found is None:
        return None
    parts = iter(found.groups())
    return "".join(next(parts) if piece == "*" else piece for piece in re.split(r"(\*)", target))
