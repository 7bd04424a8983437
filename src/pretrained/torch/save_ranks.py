# SPDX-License-Identifier: Apache-2.0
"""Saving a model whose weights several processes hold parts of: all give their parts, one writes.

Every process calls ``save_pretrained``. They agree on the one that writes; it then says which weight comes
next, and they put that one together, so that none ever holds more than one whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pretrained.errors import ArgumentError, FileError


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether several processes hold parts of a tensor (a `DTensor`).

    Args:
        tensor: Any tensor.
    """
    mesh = getattr(tensor, "device_mesh", None)
    return mesh is not None and mesh.size() > 1


def is_model_shared(model: Any) -> bool:
    """Whether several processes hold parts of a model's weights.

    Args:
        model: Any module.
    """
    return any(is_shared(tensor) for tensor in (*model.parameters(), *model.buffers()))


class SharedSave:
    """One save of several processes.

    Args:
        is_main_process: What this process was told; one must be true, or all (then the first writes).

    Raises:
        ArgumentError: several processes, and not all, would write; or none.
    """

    def __init__(self, is_main_process: bool) -> None:
        told: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, bool(is_main_process))
        writers = [rank for rank, writes in enumerate(told) if writes]
        if len(writers) not in (1, len(told)):
            raise ArgumentError(
                "One process has to write a model that all hold parts of",
                where="is_main_process",
                expected="True in one process, or in all",
                found=f"True in {len(writers)} of {len(told)}",
                mend="Call save_pretrained in every process, with is_main_process=(rank == 0).",
            )
        self._writer = writers[0]
        self.writes = distributed.get_rank() == self._writer

    def whole(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with all its values; for the process that writes.

        Args:
            key: Its name, known to every process.
            tensor: This process's part of it, or the whole where it is not shared.
        """
        if not is_shared(tensor):
            return tensor
        self._say((key, None))
        return _whole(tensor)

    def give(self, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Give this process's parts to the one that writes, until that one is done.

        Args:
            weights: By name.
            folder: Where the other writes, for the message.

        Raises:
            FileError: it could not write.
        """
        while True:
            key, fault = self._say(None)
            if key is None:
                break
            _whole(weights[key])
        if fault is not None:
            raise FileError(
                f"Process {self._writer}, which writes the model, failed", where=folder, found=fault
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the others go once the writing has ended, and tell them how."""
        fault = None
        try:
            yield
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._say((None, fault))

    def _say(self, message: tuple[str | None, str | None] | None) -> tuple[str | None, str | None]:
        """Tell all processes the next key, or None and what went wrong; the others pass None to hear it."""
        messages: list[Any] = [message]
        distributed.broadcast_object_list(messages, src=self._writer)
        heard: tuple[str | None, str | None] = messages[0]
        return heard


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return full
