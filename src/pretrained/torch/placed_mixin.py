# SPDX-License-Identifier: Apache-2.0
"""`PlacedModelMixin`: what changes for a model whose weights live in several places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from pretrained.torch.dispatch import Dispatch, leave
from pretrained.torch.quantize import use_kernel_layouts


class PlacedModelMixin:
    """Stands before `nn.Module`, whose moves and casts it prepares."""

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device that the model runs on, or the first parameter's."""
        dispatch: Dispatch | None = self.__dict__.get("_dispatch")
        return super().device if dispatch is None else dispatch.homes.main  # type: ignore[misc,no-any-return]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Do what `to`, `half` and the like ask for, with every weight out of its home first.

        Args:
            fn: What happens to each tensor.
            recurse: Whether submodules take part.

        Raises:
            PlacementError: the weights on disk do not fit into memory; nothing has changed then.
        """
        was_placed = "_dispatch" in self.__dict__
        leave(self, fn)  # type: ignore[arg-type]
        result: Any = super()._apply(fn, recurse)  # type: ignore[misc]
        if was_placed:
            use_kernel_layouts(self)  # type: ignore[arg-type]
        return result  # type: ignore[no-any-return]
