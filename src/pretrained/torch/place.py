# SPDX-License-Identifier: Apache-2.0
"""From a wish (``device_map``, ``max_memory``) to homes, and to a plan whose disk weights can be mapped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrained.core.budgets import CPU, DISK, Budgets, Home, available_host_memory, parse_budgets
from pretrained.core.device_map import check_device_map
from pretrained.core.dtypes import DTYPES
from pretrained.core.placement import STRATEGIES, plan_placement
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.skeleton import Skeleton
from pretrained.core.units import with_blocks
from pretrained.errors import PlacementError
from pretrained.torch.dispatch import Homes, torch_device
from pretrained.torch.offload import DiskWeights, is_mappable
from pretrained.torch.offload_folder import (
    Form,
    converted_from_memory,
    transformed,
    written_from_memory,
)
from pretrained.torch.quantizers.base import Quantizer
from pretrained.torch.tensors import Read, mapped_reader

logger = logging.getLogger(__name__)

# Of an accelerator's free memory; the rest is for what a forward computes.
_SHARE_OF_FREE = 0.9


def is_one_device(device_map: Any) -> bool:
    """Tell whether a device map names one device for everything, other than the disk.

    Args:
        device_map: As the user gave it, or None.
    """
    if isinstance(device_map, Mapping):
        return set(device_map) == {""} and str(device_map[""]) != DISK
    return device_map is None or (str(device_map) not in STRATEGIES and str(device_map) != DISK)


def free_memory(max_memory: Mapping[Any, Any] | None = None) -> dict[Home, int | None]:
    """Return how many bytes each device may give.

    Args:
        max_memory: The user's budgets, which then say everything; None to ask the devices and the system.
    """
    if max_memory is not None:
        return parse_budgets(max_memory)
    free: dict[Any, Any] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free[index] = int(torch.cuda.mem_get_info(index)[0] * _SHARE_OF_FREE)
    free[CPU] = available_host_memory()
    return parse_budgets(free)


def place(
    device_map: Any,
    skeleton: Skeleton,
    sizes: Mapping[str, int],
    *,
    blocks: Iterable[str] = (),
    modules: Iterable[str] = (),
    max_memory: Mapping[Any, Any] | None = None,
    offload_buffers: bool = False,
    main: torch.device | None = None,
) -> Homes:
    """Return where every weight goes.

    Args:
        device_map: A strategy, a device, ``"disk"``, or module path -> device.
        skeleton: What the model promises.
        sizes: Bytes by key as loaded.
        blocks: Paths of modules that are not split.
        modules: Paths of all modules, which a map may name.
        max_memory: Budgets; None for what is free.
        offload_buffers: Let buffers follow the map onto the CPU and disk.
        main: Where the modules on the CPU and on disk run; None for the map's first accelerator or the CPU.

    Raises:
        PlacementError: the map is incomplete or names what is not there, or the budgets are too small.
    """
    if isinstance(device_map, str) and device_map in STRATEGIES:
        placement = plan_placement(
            with_blocks(skeleton, blocks), sizes, free_memory(max_memory), strategy=device_map
        )
        _check_there(placement.device_map.values())
        logger.info("%s", placement)
        main = torch_device(placement.main) if main is None else main
        return Homes(placement.device_map, main, offload_buffers, skeleton.ties)
    placement = check_device_map(
        with_blocks(skeleton, blocks),
        device_map if isinstance(device_map, Mapping) else {"": device_map},
        devices() if max_memory is None else free_memory(max_memory),
        sizes=sizes,
        modules=modules,
    )
    for note in placement.notes:
        logger.info("device_map: %s", note)
    main = torch_device(placement.main) if main is None else main
    return Homes(placement.device_map, main, offload_buffers, skeleton.ties)


def _check_there(homes: Iterable[Home]) -> None:
    absent = sorted({str(home) for home in homes} - {str(home) for home in devices()})
    if absent:
        raise PlacementError(
            "max_memory names a device that is not here",
            where="max_memory",
            expected=f"some of {devices()}",
            found=", ".join(absent),
        )


def devices() -> list[Home]:
    """Return every home that there is here."""
    return [*range(torch.cuda.device_count() if torch.cuda.is_available() else 0), CPU, DISK]


def blocks_of(model: nn.Module, classes: Iterable[str] | None) -> list[str]:
    """Return the paths of the modules that a placement must not split.

    Args:
        model: Any module.
        classes: Names of their classes.
    """
    names = frozenset(classes or ())
    return [path for path, module in model.named_modules() if type(module).__name__ in names]


def sizes_of(skeleton: Skeleton, plan: LoadPlan, default: str) -> dict[str, int]:
    """Return the bytes of every weight once it is loaded; of tied ones, only the owner is listed.

    Args:
        skeleton: What the model promises.
        plan: How it will be filled.
        default: Name of the dtype of weights that are initialised.
    """
    dtypes = {step.key: step.dtype for step in plan.steps}
    sizes = {
        key: spec.num_elements * DTYPES[dtypes.get(key, default)].itemsize
        for key, spec in skeleton.params.items()
        if key not in skeleton.ties
    }
    return sizes | {key: spec.num_elements * 4 for key, spec in skeleton.derived.items()}


def on_disk(
    plan: LoadPlan,
    homes: Homes,
    buffers: frozenset[str],
    store: DiskWeights,
    read: Read | None,
    folder: str | Path | None,
    quantizer: Quantizer | None = None,
    convert: Read | None = None,
) -> LoadPlan:
    """Return the plan with every weight placed on disk readable as it lies, converting those that are not.

    Args:
        plan: What to load.
        homes: Where to.
        buffers: Keys of buffers.
        store: The model's weights on disk.
        read: Reads weights that are in no file; None for weights in files.
        folder: Where converted copies go; None where none can be made.
        quantizer: Says which weights become several tensors, and keeps what rounding lost.
        convert: Its reader, for those weights.

    Raises:
        PlacementError: copies are needed and there is no folder, or it belongs to another model.
        FileError: the folder cannot be written.
    """
    placed = [step for step in plan.steps if homes.home(step.key, is_buffer=step.key in buffers) == DISK]
    forms = {} if quantizer is None else quantizer.forms(placed)
    left = [step for step in placed if read is not None or step.key in forms or not is_mappable(step)]
    if not left:
        return plan
    if folder is None:
        raise PlacementError(
            f"{len(left)} of {len(placed)} weights placed on disk need a converted copy there",
            where="offload_folder",
            found=_why(left[0], read, forms),
            mend="Pass offload_folder= a folder for the copies. Weights that keep the dtype and layout of "
            "their file (dtype='auto') need none; a quantized model that was saved needs none either.",
        )
    plain = read or _read_one

    def make(step: LoadStep, device: torch.device) -> torch.Tensor:
        return plain(step, device) if convert is None or step.key not in forms else convert(step, device)

    if read is None:
        errors = None if quantizer is None else quantizer.errors
        copies = transformed(_absolute(folder), left, make, forms, errors)
    else:
        copies = converted_from_memory(_absolute(folder), left, make, forms, store)
    moved = {step.key for step in left}
    steps = [step for step in plan.steps if step.key not in moved]
    steps += [LoadStep(key, info, info.dtype) for key, info in copies.items()]
    return replace(
        plan, steps=tuple(sorted(steps, key=lambda step: (str(step.source.file), step.source.offset)))
    )


def check_new(plan: LoadPlan, homes: Homes, buffers: frozenset[str], folder: str | Path | None) -> list[str]:
    """Return the weights placed on disk that are in no file and will be initialised.

    Args:
        plan: What to load.
        homes: Where to.
        buffers: Keys of buffers.
        folder: Where they can be written.

    Raises:
        PlacementError: there are some, and there is no folder.
    """
    new = [
        key
        for key in plan.initialise
        if key not in plan.ties and homes.home(key, is_buffer=key in buffers) == DISK
    ]
    if new and folder is None:
        module = new[0].rpartition(".")[0]
        raise PlacementError(
            f"{len(new)} weights placed on disk are in no file: they are newly initialised",
            where="offload_folder, device_map",
            found=", ".join(new[:5]),
            mend=f"Pass offload_folder= a folder to write them into, or map {module!r} to 'cpu'.",
        )
    return new


def write_new(model: nn.Module, keys: Iterable[str], store: DiskWeights, folder: str | Path) -> None:
    """Write weights that were initialised in memory into the folder, and use them from there.

    Args:
        model: Loaded; changed in place.
        keys: Of the weights.
        store: The model's weights on disk.
        folder: Where to.

    Raises:
        FileError: the folder cannot be written.
    """
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        slots[key] = (module._parameters if name in module._parameters else module._buffers, name)
    tensors = {key: table[name].detach() for key, (table, name) in slots.items()}
    for key, info in written_from_memory(_absolute(folder), tensors, store).items():
        table, name = slots[key]
        tensor = store.tensor(info)
        is_parameter = isinstance(table[name], nn.Parameter)
        table[name] = nn.Parameter(tensor, table[name].requires_grad) if is_parameter else tensor
    tie_weights = getattr(model, "tie_weights", None)
    if callable(tie_weights):
        tie_weights()


def _read_one(step: LoadStep, device: torch.device) -> torch.Tensor:
    # A reader for each weight: its map and memory go with it.
    return mapped_reader()(step, device)


def placed_reader(read: Read, homes: Homes, buffers: frozenset[str], store: DiskWeights) -> Read:
    """Return a reader that gives weights on disk as tensors of the store.

    Args:
        read: Reads all others.
        homes: Where weights go.
        buffers: Keys of buffers.
        store: The model's weights on disk.
    """

    def read_placed(step: LoadStep, device: torch.device) -> torch.Tensor:
        if homes.home(step.key, is_buffer=step.key in buffers) == DISK:
            return store.tensor(step.source)
        return read(step, device)

    return read_placed


def _why(step: LoadStep, read: Read | None, forms: Mapping[str, Form]) -> str:
    if step.key in forms:
        return f"{step.key} is quantized by this load"
    if read is not None:
        return f"{step.key} comes from memory, not from a file"
    if step.source.dtype != step.dtype:
        return f"{step.key} is {step.source.dtype} in its file and {step.dtype} in the model"
    if step.apply is not None:
        return f"{step.key} is laid out differently in its file"
    return f"{step.key} does not lie in one aligned piece in its file"


def budgets_listed(budgets: Budgets) -> dict[Home, int]:
    """Return budgets with a number for each device; the disk, which has no limit, is left out.

    Args:
        budgets: As from `free_memory`.
    """
    return {home: size for home, size in budgets.items() if size is not None}


def _absolute(folder: str | Path) -> Path:
    """Return an offload folder's path, which must mean the same after the process changes its own folder."""
    return Path(folder).expanduser().absolute()
