# SPDX-License-Identifier: Apache-2.0
"""Copies of a model's weights in the layouts that its decoding steps read fastest.

The parameters stay what and where they are. The copies are kept beside them from one call to the next, for
making them costs as much as some ten steps. Before each call every copy is compared with what it was made
of: the same parameter, at the same address, of the same version, with the same bits (`fingerprint`). What
does not agree any more is made anew.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pretrained.core.budgets import available_host_memory
from pretrained.torch.nn import Conv1D
from pretrained.torch.products import Form, fingerprint, make_copy

_SHARE = 0.5
"""Of the memory that is free, how much copies may take unasked."""

LEAST_STEPS = 32
"""Steps below which making copies does not pay."""


class _Entry:
    """A copy, and what it was made of."""

    def __init__(
        self, form: Form, weights: Sequence[torch.Tensor], marks: list[Any], transposed: bool
    ) -> None:
        self.form = form
        self._weights = [weakref.ref(weight) for weight in weights]
        self._marks = marks
        self.stored = make_copy(form, [w.t() if transposed else w for w in weights])

    def holds(self) -> bool:
        """Whether the weights are still what they were."""
        for ref, mark in zip(self._weights, self._marks, strict=True):
            weight = ref()
            if weight is None or not _agrees(mark, _mark(weight)):
                return False
        return True


class WeightCopies:
    """The copies of one model. A copied or pickled model begins without any."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: Any) -> WeightCopies:
        return WeightCopies()

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCopies, ()

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Let go of copies whose weights have changed."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if not entry.holds()]:
                del self._entries[key]

    def clear(self) -> None:
        """Let go of all copies."""
        with self._lock:
            self._entries.clear()

    def get(
        self, form: Form, weights: Sequence[torch.Tensor], *, transposed: bool = False
    ) -> torch.Tensor | None:
        """Return a copy of weights, one below the other; made where it is not there.

        Args:
            form: One that is a copy. A copy of the same weights in another form is let go of.
            weights: [out_i, in] each.
            transposed: They are [in, out_i].

        Returns:
            The copy, or None where a later change of the weights could not be noticed.
        """
        key = tuple(id(weight) for weight in weights)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.form is not form:
                self._entries.pop(key, None)
                marks = [_mark(weight) for weight in weights]
                if any(mark is None for mark in marks):
                    return None
                entry = self._entries[key] = _Entry(form, weights, marks, transposed)
            return entry.stored


def copies_of(model: nn.Module, wanted: bool | None, steps: int) -> WeightCopies | None:
    """Return where a call keeps copies of a model's weights, or None where it makes do without.

    Args:
        model: The model.
        wanted: The setting `weight_copies`; None to decide by length and free memory.
        steps: How many steps there can be.
    """
    kept: WeightCopies | None = model.__dict__.get("_weight_copies")
    if wanted is False:
        model.__dict__.pop("_weight_copies", None)
        return None
    if kept is not None and len(kept):
        kept.refresh()
    if wanted is None and not (kept is not None and len(kept)):
        free = available_host_memory()
        if steps < LEAST_STEPS or free is None or _bytes(model.modules()) > _SHARE * free:
            return None
    if kept is None:
        kept = model.__dict__["_weight_copies"] = WeightCopies()
    return kept


def _bytes(modules: Iterable[Any]) -> int:
    """Return what copies of all dense layers would take."""
    weights = {id(m.weight): m.weight for m in modules if type(m) in (nn.Linear, Conv1D)}
    return sum(weight.numel() * weight.itemsize for weight in weights.values())


def _mark(weight: torch.Tensor) -> tuple[Any, ...] | None:
    bits = fingerprint(weight)
    if bits is None:
        return None
    version = -1 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.shape, weight.dtype, version, bits


def _agrees(old: tuple[Any, ...], new: tuple[Any, ...] | None) -> bool:
    return new is not None and old[:-1] == new[:-1] and torch.equal(old[-1], new[-1])
