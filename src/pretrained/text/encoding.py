# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer returns, and how its rows become rectangles and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pretrained.errors import ArgumentError, TokenizerError


class BatchEncoding(dict[str, Any]):
    """The inputs of a model by name: a dictionary whose keys are attributes too.

    ``model(**encoding)`` works, and so does ``encoding.input_ids``.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"This encoding has no {name!r}; it holds {', '.join(self)}.") from None

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to a device, in place, and return this object.

        Args:
            device: As for ``torch.Tensor.to``.
            non_blocking: As for ``torch.Tensor.to``.

        Raises:
            TokenizerError: it holds lists or NumPy arrays.
        """
        for name, value in self.items():
            if not hasattr(value, "to"):
                raise TokenizerError(
                    f"{name} is no PyTorch tensor, so it cannot be moved",
                    found=type(value).__name__,
                    mend="Tokenize with return_tensors='pt'.",
                )
            self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None) -> BatchEncoding:
        """Turn every list into a tensor, in place, and return this object.

        Args:
            tensor_type: ``"pt"``, ``"np"``, or None to change nothing.

        Raises:
            ArgumentError: an unknown type.
            TokenizerError: the rows differ in length.
        """
        if tensor_type is None:
            return self
        make = tensor_maker(tensor_type)
        for name, value in self.items():
            if isinstance(value, list):
                self[name] = make(_rectangle(name, value))
        return self


def tensor_maker(tensor_type: str) -> Callable[[np.ndarray], Any]:
    """Return a function from an array to a tensor.

    Args:
        tensor_type: ``"pt"`` for PyTorch, ``"np"`` for NumPy.

    Raises:
        ArgumentError: an unknown type.
    """
    kind = str(getattr(tensor_type, "value", tensor_type))  # transformers' enum of the same strings
    if kind == "np":
        return lambda array: array
    if kind == "pt":
        import torch  # noqa: PLC0415  # only where tensors of it are wanted

        return torch.from_numpy
    raise ArgumentError(
        f"Unknown return_tensors={kind!r}",
        expected="'pt', 'np' or None",
        mend="JAX and TensorFlow take NumPy arrays: use 'np'.",
    )


def _rectangle(name: str, rows: list[Any]) -> np.ndarray:
    lengths = {len(row) for row in rows if isinstance(row, list)}
    if len(lengths) > 1:
        raise TokenizerError(
            f"The rows of {name} differ in length, so they make no tensor",
            found=f"lengths from {min(lengths)} to {max(lengths)}",
            mend="Pass padding=True, and truncation=True for a fixed maximum.",
        )
    return np.asarray(rows, dtype=np.int64)


def pad_rows(
    rows: Mapping[str, Sequence[Sequence[Any]]],
    fillers: Mapping[str, Any],
    *,
    length: int | None,
    multiple: int | None,
    side: str,
) -> dict[str, list[list[Any]]]:
    """Make all rows equally long.

    Args:
        rows: Lists by name; the lists of one text have one length under every name.
        fillers: What each name is filled with.
        length: To reach at least this; None for the longest row.
        multiple: Round the length up to a multiple of this, which tensor cores like.
        side: ``"right"`` or ``"left"``.
    """
    longest = max((len(row) for row in rows["input_ids"]), default=0)
    target = longest if length is None else max(length, longest)
    if multiple:
        target = -(-target // multiple) * multiple
    padded: dict[str, list[list[Any]]] = {}
    for name, values in rows.items():
        filled = []
        for row in values:
            filler = [fillers[name]] * (target - len(row))
            filled.append(filler + list(row) if side == "left" else list(row) + filler)
        padded[name] = filled
    return padded


def plain(values: Any) -> Any:
    """Turn arrays and tensors of any framework into Python's lists and numbers.

    Args:
        values: A number, a sequence, an array, a tensor, or a sequence of those.
    """
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, list | tuple) and any(hasattr(v, "tolist") for v in values):
        return [plain(v) for v in values]
    return list(values) if isinstance(values, tuple) else values
