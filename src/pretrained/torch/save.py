# SPDX-License-Identifier: Apache-2.0
"""Saving: what to write is decided first; then tensors stream out one file at a time."""

from __future__ import annotations

import errno
import inspect
import logging
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from pretrained.core.adapter_files import ADAPTER_CONFIG, ADAPTER_STEM
from pretrained.core.atomic_files import errors_with_mend, one_saver, write_text_atomically
from pretrained.core.config import CONFIG_NAME
from pretrained.core.disk_space import free_bytes
from pretrained.core.generation_config import GENERATION_CONFIG_NAME
from pretrained.core.own_code import own_code, write_own_code
from pretrained.core.push import prepare_push
from pretrained.core.weights_names import candidates
from pretrained.core.writer import plan_shards, write_checkpoint
from pretrained.errors import ArgumentError, ConfigError, FileError, NotYetError
from pretrained.torch.adapters_mixin import adapter_to_write
from pretrained.torch.dispatch import disk_weights_of
from pretrained.torch.mapped_mixin import check_files
from pretrained.torch.offload import ReleaseBehind
from pretrained.torch.quantize import all_ties, quantized_leaves
from pretrained.torch.save_ranks import SharedSave, is_model_shared, is_shared
from pretrained.torch.saved_weights import class_of, unknown_aliases, whole_tensors, without_wrappers
from pretrained.torch.tensors import dtype_name_of
from pretrained.torch.ties import head_tie

logger = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = "5GB"

# Known to the ecosystem and not offered yet: name -> (values that ask for nothing, when to expect it).
_LATER: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed_checkpoint": ((None, False), "It comes with the release for several machines."),
}

SaveFunction = Callable[[dict[str, torch.Tensor], str], Any]


class _TensorSource:
    """A tensor that hands its bytes to the writer when its turn comes."""

    def __init__(
        self, key: str, tensor: torch.Tensor, model: Any, behind: ReleaseBehind, shared: SharedSave | None
    ) -> None:
        self._key, self.tensor = key, tensor
        self._model, self._behind, self._shared = model, behind, shared
        self.dtype = dtype_name_of(tensor.dtype)
        self.shape = tuple(tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def whole(self) -> torch.Tensor:
        """Return the tensor, its parts put together where several processes hold them."""
        self._behind.enter(self.tensor)
        check_files(self._model)
        return self.tensor if self._shared is None else self._shared.whole(self._key, self.tensor)

    def read(self) -> memoryview:
        return memoryview(_bytes_of(self.whole()).numpy().data)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, row by row; of a contiguous one on the CPU without a copy."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.numel() and not tensor.is_contiguous():
        # Memory of its own, which goes back to the system with it; the heap keeps what several tensors took.
        room = torch.frombuffer(mmap.mmap(-1, tensor.numel() * tensor.element_size()), dtype=tensor.dtype)
        tensor = room.view(tensor.shape).copy_(tensor)
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    save_function: SaveFunction | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    safe_serialization: bool = True,
    variant: str | None = None,
    save_original_format: bool = True,
    save_peft_format: bool = True,
    **kwargs: Any,
) -> None:
    """Write a model into a folder: the weights, config.json and generation_config.json.

    Of a model with adapters the active one is written, and nothing else: adapter_model.safetensors and
    adapter_config.json.

    Each file is written under a temporary name and renamed, so a reader finds the checkpoint that was there
    or the new one. Saving into the folder that the model was loaded from is safe. Weights come first: no
    fault in a config costs them.

    Args:
        model: A `PreTrainedModel`.
        save_directory: The folder; made where it is absent.
        is_main_process: False writes nothing: another process does. A model whose weights several processes
            hold parts of (`DTensor`, FSDP2) is saved by all of them together: each calls this, and the one
            that says True writes; where all say so, the first.
        state_dict: Weights to write instead of the model's own.
        save_function: Writes one pickle, as ``save_function(tensors by name, path)``; None for
            ``torch.save``. It has a say only with ``safe_serialization=False``.
        push_to_hub: Also push the files written; `kwargs` are then those of `push_to_hub`.
        max_shard_size: Most bytes a file may hold (a number, or "5GB", "200MB", "1GiB").
        safe_serialization: True writes model.safetensors, False pytorch_model.bin, with an index where
            the size makes several files.
        variant: Infix of the weights' file names.
        save_original_format: Give weights the names they had in the files they were loaded from, where
            an architecture's key rule changed them; False writes the names of the modules. What a
            `key_mapping` renamed keeps the modules' names either way, so that the folder loads without it.
        save_peft_format: Begin the names in an adapter's file with peft's prefix; False leaves it out.
        **kwargs: `repo_id` and the other arguments of `push_to_hub`.

    Raises:
        ArgumentError: an argument that cannot work, the folder is a file, or a weight has no values.
        UnknownArgumentError: an argument that nothing takes.
        NotYetError: an argument of a later release.
        FileError: the folder cannot be written, or the disk is full, and an earlier checkpoint stays whole;
            or pickles are to go where safetensors files, which loads prefer, already are.
        ConfigError: the config cannot be written as JSON; the weights are.
    """
    _refuse_later(kwargs)
    folder = _folder(save_directory)
    known = inspect.signature(save_pretrained).parameters
    push = prepare_push("save_pretrained", folder, push_to_hub, kwargs, known)
    if save_function is not None and not callable(save_function):
        raise ArgumentError(
            "save_function is not a function of (tensors by name, path)",
            where="save_function",
            found=repr(save_function)[:200],
        )
    shared = SharedSave(is_main_process) if state_dict is None and is_model_shared(model) else None
    if shared is None and not is_main_process:
        return
    adapter_config = None
    if model.has_adapters():
        weights, adapter_config = adapter_to_write(model, state_dict, save_peft_format)
        max_shard_size = sum(tensor.nbytes for tensor in weights.values()) + 1
    else:
        weights = weights_to_write(model, state_dict, save_original_format)
    code_map, code = own_code(class_of(model), type(model.config)) if adapter_config is None else ({}, {})
    if code_map:
        model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **code_map}
    stem = "model" if adapter_config is None else ADAPTER_STEM
    behind = ReleaseBehind(disk_weights_of(model))
    sources = {key: _TensorSource(key, tensor, model, behind, shared) for key, tensor in weights.items()}
    _check_values(weights)
    names = {"file_stem": stem}
    if not safe_serialization:
        names = {"file_stem": "pytorch_model" if adapter_config is None else stem, "suffix": ".bin"}
    sizes = {key: source.nbytes for key, source in sources.items()}
    plan = plan_shards(sizes, max_shard_size, variant=variant, **names)
    texts, fault = config_texts(model) if adapter_config is None else ({ADAPTER_CONFIG: adapter_config}, None)
    if shared is not None and not shared.writes:
        shared.give(weights, folder)
        return
    with nullcontext() if shared is None else shared.writing():
        with errors_with_mend(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with one_saver(folder):
            write_own_code(folder, {name: text for name, text in code.items() if "/" in name})
            texts |= {name: text for name, text in code.items() if "/" not in name}
            if safe_serialization:
                if save_function not in (None, torch.save):
                    logger.warning("save_function writes pickles; safetensors files are written without it.")
                write_checkpoint(
                    folder, plan, sources, {"format": "pt"}, file_stem=stem, variant=variant, texts=texts
                )
            else:
                _refuse_beside_safetensors(folder, variant, plan.file_stem)
                write_checkpoint(
                    folder,
                    plan,
                    sources,
                    file_stem=plan.file_stem,
                    variant=variant,
                    write_file=_pickle_writer(sources, save_function or torch.save),
                    texts=texts,
                )
    if fault is not None:
        raise fault
    push(model)


def weights_to_write(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None = None, original_names: bool = True
) -> dict[str, torch.Tensor]:
    """Return the tensors that a save writes, tied ones once, under the names it gives them.

    Args:
        model: A `PreTrainedModel`.
        state_dict: Weights to write instead of the model's own.
        original_names: Undo renames by key rules.

    Raises:
        ArgumentError: `state_dict` is not a dictionary of tensors by name.
    """
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise ArgumentError("state_dict is not a dictionary", where="state_dict", found=type(state_dict))
    if state_dict is None:
        _refuse_unsavable(model)
    # The parameters themselves where they are shared: nothing else tells that two of them are one.
    keep = state_dict is None and is_model_shared(model)
    given = dict(model.state_dict(keep_vars=keep) if state_dict is None else state_dict)
    for key, tensor in given.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ArgumentError(
                "state_dict holds something else than tensors by name",
                where=f"state_dict[{key!r}]",
                found=type(tensor).__name__,
            )
    weights = whole_tensors(without_wrappers(given, model), keep_shared=keep)
    for alias, owner in {**all_ties(model), **unknown_aliases(model, weights)}.items():
        # Written only where the two have come apart, for then the file must say so.
        if alias in weights and owner in weights and _same_memory(weights[alias], weights[owner]):
            del weights[alias]
    for pattern in model._keys_to_ignore_on_save or ():
        weights.pop(pattern, None)
    renamed = getattr(model, "_checkpoint_names", {}) if original_names else {}
    return {renamed.get(key, key): tensor for key, tensor in weights.items()}


def _refuse_unsavable(model: Any) -> None:
    """Raise where a weight is an object that plain tensors in a file cannot hold."""
    held = [path for path, leaf in quantized_leaves(model).items() if not leaf.is_savable]
    if held:
        raise NotYetError(
            f"Weights that {model.quantization_method} has quantized cannot be saved",
            where=f"{held[0]} and {len(held) - 1} more" if len(held) > 1 else held[0],
            mend="Call dequantize() first, or quantize with quant_method 'int8' or 'int4', which are saved.",
        )


def _folder(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ArgumentError(
            "A model is saved into a folder", where="save_directory", expected="its path", found=repr(path)
        )
    folder = Path(path)
    if folder.is_file():
        raise ArgumentError(
            "A model is saved into a folder", where=folder, found="a file", mend="Name a folder."
        )
    return folder


def _same_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first is second or is_shared(first) or is_shared(second):
        return first is second
    return (
        first.device == second.device
        and first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _refuse_later(kwargs: dict[str, Any]) -> None:
    for name, (idle, release) in _LATER.items():
        if kwargs.pop(name, None) not in idle:
            raise NotYetError(f"save_pretrained does not offer {name} yet", where=name, mend=release)


def _check_values(weights: Mapping[str, torch.Tensor]) -> None:
    empty = [key for key, tensor in weights.items() if tensor.is_meta]
    if empty:
        raise ArgumentError(
            f"{len(empty)} weights have no values to save, such as {empty[0]!r}",
            where="torch.device('meta')",
            mend="Give the model memory first, or pass the values as state_dict=.",
        )


def _refuse_beside_safetensors(folder: Path, variant: str | None, stem: str) -> None:
    """Raise where a pickle would be written that no load would ever find."""
    names = [f"{stem}.safetensors"] if stem == ADAPTER_STEM else candidates(variant, True)
    present = [name for name in names if (folder / name).exists()]
    if present:
        raise FileError(
            f"The folder holds {present[0]}, which is loaded instead of {stem}.bin",
            where=folder,
            mend="Save into another folder, or remove that file first if it is out of date.",
        )


def _pickle_writer(
    sources: Mapping[str, _TensorSource], save_function: SaveFunction
) -> Callable[[Path, Sequence[str]], None]:
    """Return what writes one pickle of tensors, in memory of their own: a pickle stores whole storages."""

    def write(file: Path, keys: Sequence[str]) -> None:
        shard = {key: _compact(sources[key].whole()) for key in keys}
        try:
            save_function(shard, str(file))
        except RuntimeError as error:  # torch's writer says so of a full disk
            needed = sum(tensor.nbytes for tensor in shard.values())
            free = free_bytes(file)
            full = free is not None and free < needed
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
        if not file.is_file():
            raise ArgumentError(
                "save_function did not write the file that it was given",
                where="save_function",
                expected="a file at the path that is its second argument",
            )

    return write


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose storage holds nothing else: a pickle takes whole storages."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    # A new view of the same bytes has a storage of its own size, so a contiguous tensor is not copied.
    return torch.from_numpy(_bytes_of(tensor).numpy()).view(tensor.dtype).view(tensor.shape)


def config_texts(model: Any) -> tuple[dict[str, str], ConfigError | None]:
    """Return the texts of config.json and generation_config.json.

    The config is set to say which class and dtype are saved, and whether the head is tied.

    Args:
        model: A `PreTrainedModel`, with its weights.

    Returns:
        The texts by file name, and what is wrong with a config that cannot be written.
    """
    config = model.config
    # Set one by one and not by `update`, which would refuse a config that contradicts itself.
    config.architectures, config.dtype = [class_of(model).__name__], dtype_name_of(model.dtype)
    alias, owner = head_tie(model)
    if alias is not None and config.tie_word_embeddings:
        weights = model.state_dict(keep_vars=True)
        if alias in weights and owner in weights and not _same_memory(weights[alias], weights[owner]):
            logger.warning("%s is no longer tied to %s; the config now says so.", alias, owner)
            config.tie_word_embeddings = False
    texts: dict[str, str] = {}
    fault = None
    try:
        texts[CONFIG_NAME] = config.to_json_string()
    except ConfigError as error:
        fault = error
    if model.generation_config is not None:
        # Days of training are not lost to a sampling flag: the weights are written all the same.
        try:
            model.generation_config.warn_before_saving()
            texts[GENERATION_CONFIG_NAME] = model.generation_config.to_json_string()
        except (ValueError, TypeError) as error:
            logger.warning("generation_config.json was not written: %s", error)
    return texts, fault


def write_configs(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json beside weights that something else has written.

    Args:
        model: A `PreTrainedModel`, with its weights.
        folder: Where.

    Raises:
        FileError: one of them cannot be written.
        ConfigError: the config cannot be written as JSON; the generation config is.
    """
    texts, fault = config_texts(model)
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    if fault is not None:
        raise fault
