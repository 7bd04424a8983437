# SPDX-License-Identifier: Apache-2.0
"""Building a model that has shapes and no memory, fast and without touching other threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FILLS = frozenset(
    f"{name}_" for name in ("normal", "uniform", "trunc_normal", "zero", "fill", "log_normal", "exponential")
)


class _NoValues(TorchFunctionMode):
    """Skips filling tensors that have no memory.

    Random fills of meta tensors run through torch's compiler stack, whose import alone takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        fills = (
            getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in _FILLS
        )
        target = args[0] if args else kwargs.get("tensor")
        if fills and isinstance(target, torch.Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


@contextmanager
def no_memory() -> Iterator[None]:
    """Make tensors that are created inside have shapes only; torch keeps this for each thread."""
    with torch.device("meta"), _NoValues():
        yield


@contextmanager
def no_fills() -> Iterator[None]:
    """Skip the filling of tensors that have no memory, and nothing else."""
    with _NoValues():
        yield
