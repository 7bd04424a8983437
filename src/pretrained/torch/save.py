# SPDX-License-Identifier: Apache-2.0
"""Saving: what to write is decided first; then tensors stream out one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pretrained.core.writer import plan_shards, write_checkpoint
from pretrained.errors import ArgumentError
from pretrained.torch.tensors import dtype_name_of

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = "5GB"


class _TensorSource:
    """A tensor that hands its bytes to the writer when its turn comes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.dtype = dtype_name_of(tensor.dtype)
        self.shape = tuple(tensor.shape)

    def read(self) -> memoryview:
        tensor = self.tensor.detach().cpu().contiguous()
        if not tensor.numel():
            return memoryview(b"")
        # A buffer of plain bytes: numpy has no name for every dtype of torch.
        return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    save_function: Callable[[Any, Any], None] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    safe_serialization: bool = True,
    variant: str | None = None,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    """Write a model into a folder: config.json, generation_config.json and the weights.

    Args:
        model: A `PreTrainedModel`.
        save_directory: The folder; made where it is absent.
        is_main_process: False writes nothing: another process does.
        state_dict: Weights to write instead of the model's own.
        save_function: Not offered yet, see Raises.
        push_to_hub: Also push the folder's content; `kwargs` are then those of `push_to_hub`.
        max_shard_size: Most bytes a file may hold (a number, or "5GB", "200MB", "1GiB").
        safe_serialization: False asks for pytorch_model.bin, which is not offered yet.
        variant: Infix of the weights' file names.
        save_original_format: Give weights the names they had in the files they were loaded from, where
            a key rule changed them.
        **kwargs: `repo_id` and the other arguments of `push_to_hub`.

    Raises:
        ArgumentError: an argument that cannot work, or the folder is a file.
        FileError: the folder cannot be written, or the disk is full; an earlier checkpoint stays whole.
    """
    if not safe_serialization or save_function is not None:
        raise ArgumentError(
            "Only safetensors files are written",
            where="safe_serialization, save_function",
            mend="Leave both out; for a pickle, call torch.save(model.state_dict(), path) yourself.",
        )
    folder = Path(save_directory)
    if folder.is_file():
        raise ArgumentError(
            "A model is saved into a folder", where=folder, found="a file", mend="Name a folder."
        )
    if not is_main_process:
        return
    tensors = {
        key: _TensorSource(tensor)
        for key, tensor in weights_to_write(model, state_dict, save_original_format).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_configs(model, folder)
    sizes = {key: source.tensor.numel() * source.tensor.element_size() for key, source in tensors.items()}
    plan = plan_shards(sizes, max_shard_size, variant=variant)
    write_checkpoint(folder, plan, tensors, {"format": "pt"}, variant=variant)
    if push_to_hub:
        model.push_to_hub(kwargs.pop("repo_id", None) or folder.name, **kwargs)
    elif kwargs:
        raise ArgumentError(
            f"save_pretrained does not know the argument {next(iter(kwargs))!r}", where=", ".join(kwargs)
        )


def weights_to_write(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None, original_names: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors that a save writes, tied ones once, under the names it gives them.

    Args:
        model: A `PreTrainedModel`.
        state_dict: Weights to write instead of the model's own.
        original_names: Undo renames by key rules.
    """
    weights = dict(model.state_dict() if state_dict is None else state_dict)
    for alias, owner in model.ties().items():
        # Written only where the two have come apart, for then the file must say so.
        if alias in weights and owner in weights and _same_memory(weights[alias], weights[owner]):
            del weights[alias]
    for pattern in model._keys_to_ignore_on_save or ():
        weights.pop(pattern, None)
    renamed = getattr(model, "_checkpoint_names", {}) if original_names else {}
    return {renamed.get(key, key): tensor for key, tensor in weights.items()}


def _same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _write_configs(model: Any, folder: Path) -> None:
    config = model.config
    config.update({"architectures": [type(model).__name__], "dtype": str(model.dtype)})
    config.save_pretrained(folder)
    if model.generation_config is not None:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            # Days of training are not lost to a sampling flag: the weights are written all the same.
            logger.warning("generation_config.json was not written: %s", error)
