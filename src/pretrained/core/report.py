# SPDX-License-Identifier: Apache-2.0
"""What a load did, for people: numbered keys folded, every finding with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load found and did.

    Attributes:
        model: Class name of the model.
        source: Where the weights came from.
        missing: Promised weights that the files lack and that were initialised instead.
        unexpected: Keys of the files that serve nothing.
        mismatched: ``(key, shape in the file, shape in the model)`` of weights initialised instead.
        dropped: Keys of the files that a rule leaves out -> why.
        errors: Messages about tensors that could not be used.
        dtypes: Stored dtype -> loaded dtype -> number of tensors.
        quantized: Layers that this load has quantized -> root-mean-square error of the weight, relative
            to its root mean square.
        notes: What else a user may want to know: one sentence each.
        nbytes_read: Bytes of the files that were used.
        load_s: Seconds from the call to the ready model.
    """

    model: str
    source: str
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    errors: tuple[str, ...] = ()
    dtypes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    quantized: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    nbytes_read: int = 0
    load_s: float = 0.0

    def loading_info(self) -> dict[str, Any]:
        """Return the dictionary that ``output_loading_info=True`` gives."""
        return {
            "missing_keys": sorted(self.missing),
            "unexpected_keys": sorted(self.unexpected),
            "mismatched_keys": sorted(self.mismatched),
            "error_msgs": list(self.errors),
        }

    @property
    def worst_quantized(self) -> tuple[str, float] | None:
        """The quantized layer with the largest relative error, and the error."""
        return max(self.quantized.items(), key=lambda item: item[1], default=None)

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing that a user should look at."""
        return not (self.missing or self.unexpected or self.mismatched or self.errors)

    def __str__(self) -> str:
        lines = [f"{self.model} from {self.source}"]
        if self.missing:
            lines.append("  newly initialised (train them before use):")
            lines += [f"    {key}" for key in fold_keys(self.missing)]
        if self.mismatched:
            lines.append("  newly initialised, for the file's shape differs:")
            lines += [f"    {line}" for line in fold_mismatches(self.mismatched)]
        if self.unexpected:
            lines.append("  not used (another head or architecture):")
            lines += [f"    {key}" for key in fold_keys(self.unexpected)]
        if (worst := self.worst_quantized) is not None:
            count, (layer, error) = len(self.quantized), worst
            lines.append(f"  {count} layers quantized; largest relative error {error:.2%}, {layer}")
        lines += [f"  {message}" for message in (*self.notes, *self.errors)]
        return "\n".join(lines)


def fold_keys(keys: Iterable[str]) -> list[str]:
    """Fold keys that differ in one number: ``layers.{0..31}.weight``.

    Args:
        keys: Any keys, in any order.

    Returns:
        The folded names, in the order of their first key.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for key in keys:
        number = re.search(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$", key)
        if number is None:
            groups.setdefault((key,), [])
        else:
            around = (key[: number.start()], key[number.end() :])
            groups.setdefault(around, []).append(int(number.group()))
    return [(_ranges(numbers) if numbers else "").join(around) for around, numbers in groups.items()]


def fold_mismatches(mismatched: Iterable[Mismatch]) -> list[str]:
    """Say which weights have which shapes, those that differ in one number folded.

    Args:
        mismatched: ``(key, shape in the file, shape in the model)``.
    """
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for key, theirs, ours in mismatched:
        groups.setdefault((theirs, ours), []).append(key)
    return [
        f"{key}: file {list(theirs)}, model {list(ours)}"
        for (theirs, ours), keys in groups.items()
        for key in fold_keys(keys)
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
    return "{" + text + "}"


def format_bytes(count: float) -> str:
    """Return a byte count as people write it (decimal units, as disks and shard sizes do).

    Args:
        count: Bytes.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
