# SPDX-License-Identifier: Apache-2.0
"""`MappedModelMixin`: a model whose weights are views of files looks at those files before it runs.

One `os.stat` for each file and call, a few microseconds. Without it a file that is cut short kills the
process at the next access, and one that is overwritten shows through in all pages not yet read. Inside a
compiled graph nothing is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from pretrained.core.file_state import FilesInUse, FileState
from pretrained.core.plan import LoadPlan
from pretrained.core.reader import MappedFiles
from pretrained.torch.offload import is_mappable
from pretrained.torch.tensors import TORCH_DTYPES


class MappedModelMixin:
    """Stands before `nn.Module`, whose calls, moves and casts it watches."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model.

        Raises:
            CheckpointError: a file that its weights are views of was changed in place.
        """
        if not torch.compiler.is_compiling():
            check_files(self)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weights by name.

        Raises:
            CheckpointError: as for a call.
        """
        check_files(self)
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Do what `to`, `half` and the like ask for; files that no weight looks at any more are let go.

        Args:
            fn: What happens to each tensor.
            recurse: Whether submodules take part.

        Raises:
            CheckpointError: as for a call.
        """
        check_files(self)
        before = _addresses(self) if self.__dict__.get("_files_in_use") else set()
        result: Any = super()._apply(fn, recurse)  # type: ignore[misc]
        if before and not before & _addresses(self):
            self.__dict__["_files_in_use"] = None
        return result  # type: ignore[no-any-return]


def check_files(model: Any) -> None:
    """Raise where a file that a model's weights are views of was changed in place.

    Args:
        model: Any module.

    Raises:
        CheckpointError: a file's size or time of change is another one.
    """
    in_use: FilesInUse | None = model.__dict__.get("_files_in_use")
    if in_use is not None:
        in_use.check()


def watch_files(
    model: nn.Module, plan: LoadPlan, files: MappedFiles, states: Mapping[Path, FileState]
) -> None:
    """Make a loaded model look at the files that its weights are views of, and the models inside it too.

    Args:
        model: Loaded.
        plan: How it was filled.
        files: What was mapped.
        states: What the files were like when their headers were read.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    used = set()
    for step in plan.steps:
        tensor, file = tensors.get(step.key), step.source.file
        stays = (
            tensor is not None and tensor.device.type == "cpu" and tensor.dtype == TORCH_DTYPES[step.dtype]
        )
        if stays and file in states and not files.was_refused(file) and is_mappable(step):
            used.add(file)
    if used:
        in_use = FilesInUse({file: states[file] for file in used})
        for module in model.modules():
            if isinstance(module, MappedModelMixin):
                module.__dict__["_files_in_use"] = in_use


def _addresses(model: Any) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}
