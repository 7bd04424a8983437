# SPDX-License-Identifier: Apache-2.0
"""Sizes, budgets and device maps of any `nn.Module`, under the names and arguments of accelerate.

The maps come from `pretrained.core.placement`. Where accelerate hands out a map that overdraws a budget,
these raise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pretrained.core.budgets import Home, accelerators_of
from pretrained.core.dtypes import DTYPES, dtype_name
from pretrained.core.fill import least_ceiling, running_totals
from pretrained.core.placement import plan_placement
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.core.units import units_of, with_blocks
from pretrained.torch.place import blocks_of, free_memory

logger = logging.getLogger(__name__)

Dtype = str | torch.dtype | None
MaxMemory = Mapping[int | str, int | str] | None


def skeleton_of_any(module: nn.Module) -> Skeleton:
    """Return what any module holds; names of one tensor are ties, the first owns it.

    Args:
        module: Any module, with or without memory.
    """
    params: dict[str, ParamSpec] = {}
    derived: dict[str, ParamSpec] = {}
    ties: dict[str, str] = {}
    owners: dict[int, str] = {}
    for key, tensor, part, name, is_buffer in tensors_of(module):
        held = derived if is_buffer and name in part._non_persistent_buffers_set else params
        held[key] = ParamSpec(key, tuple(tensor.shape), is_buffer=is_buffer)
        owner = owners.setdefault(id(tensor), key)
        if owner != key and held is params and owner in params:
            ties[key] = owner
    return Skeleton(params, ties, derived)


def tensors_of(module: nn.Module) -> Iterable[tuple[str, torch.Tensor, nn.Module, str, bool]]:
    """Yield (key, tensor, owning module, name in it, is a buffer) of every tensor, tied ones under each name.

    Args:
        module: Any module.
    """
    for path, part in module.named_modules(remove_duplicate=False):
        for table, is_buffer in ((part._parameters, False), (part._buffers, True)):
            for name, tensor in table.items():
                if tensor is not None:
                    yield (f"{path}.{name}" if path else name), tensor, part, name, is_buffer


def tensor_sizes(
    module: nn.Module, dtype: Dtype = None, special: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the bytes of every tensor of a module, tied ones under each name.

    Args:
        module: Any module.
        dtype: Count wider floating tensors as if they had this dtype.
        special: Key -> dtype of those that have another.
    """
    width = None if dtype is None else _itemsize(dtype)
    sizes = {}
    for key, tensor, *_ in tensors_of(module):
        item = tensor.element_size()
        if special and key in special:
            item = _itemsize(special[key])
        elif width is not None and (tensor.is_floating_point() or tensor.is_complex()):
            item = min(item, width)
        sizes[key] = tensor.numel() * item
    return sizes


def compute_module_sizes(
    model: nn.Module,
    dtype: Dtype = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Return the bytes of every module and tensor of a model; ``""`` is the model itself.

    A tied tensor counts once, under its first name.

    Args:
        model: Any module.
        dtype: Count wider floating tensors as if they had this dtype.
        special_dtypes: Key -> dtype of those that have another.
        buffers_only: Leave parameters out.
    """
    sizes = {"": 0}
    seen: set[int] = set()
    by_key = tensor_sizes(model, dtype, special_dtypes)
    tensors = sorted(tensors_of(model), key=lambda row: row[4])
    for key, tensor, _, _, is_buffer in tensors:
        if id(tensor) in seen or (buffers_only and not is_buffer):
            continue
        seen.add(id(tensor))
        parts = key.split(".")
        for end in range(len(parts) + 1):
            path = ".".join(parts[:end])
            sizes[path] = sizes.get(path, 0) + by_key[key]
    return sizes


def get_max_memory(max_memory: MaxMemory = None) -> dict[Home, int]:
    """Return how many bytes each device may give: accelerators, then ``"cpu"``.

    Args:
        max_memory: Device -> bytes or text such as ``"10GiB"``, which then says everything; None for what is
            free: nine tenths of it on accelerators; on the CPU what the system or the memory group leaves.

    Raises:
        PlacementError: a device or an amount that cannot be read.
    """
    return {home: size for home, size in free_memory(max_memory).items() if size is not None}


def get_balanced_memory(
    model: nn.Module,
    max_memory: MaxMemory = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: Dtype = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    low_zero: bool = False,
) -> dict[Home, int]:
    """Return budgets under which filling devices in order gives accelerators even shares.

    Args:
        model: Any module.
        max_memory: As for `get_max_memory`; upper bounds.
        no_split_module_classes: Names of classes that are not split.
        dtype: As for `compute_module_sizes`.
        special_dtypes: As for `compute_module_sizes`.
        low_zero: Give the first accelerator only what the others cannot take.
    """
    budgets = get_max_memory(max_memory)
    used = [home for home in accelerators_of(budgets) if budgets[home]]
    if len(used) < 2:
        return budgets
    skeleton = with_blocks(skeleton_of_any(model), blocks_of(model, _names(no_split_module_classes)))
    units = units_of(skeleton, tensor_sizes(model, dtype, special_dtypes))
    totals = running_totals(unit.nbytes for unit in units)
    shared = used[1:] if low_zero else used
    ceiling = least_ceiling(totals, [budgets[home] for home in shared])
    if ceiling is None:
        # Larger than the accelerators together: each is filled.
        return budgets
    # The last one keeps its own bound, so that rounding never leaves a block without a place.
    balanced = {home: min(budgets[home], ceiling) for home in shared[:-1]}
    return budgets | ({used[0]: 0} if low_zero else {}) | balanced


def infer_auto_device_map(
    model: nn.Module,
    max_memory: MaxMemory = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: Dtype = None,
    special_dtypes: Mapping[str, Dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Home]:
    """Return a device map for a model: devices are filled in order, then the CPU, then the disk.

    Args:
        model: Any module, with or without memory.
        max_memory: As for `get_max_memory`.
        no_split_module_classes: Names of classes that are not split.
        dtype: As for `compute_module_sizes`.
        special_dtypes: As for `compute_module_sizes`.
        verbose: Log why each block is where it is.
        clean_result: Give the shortest map; False gives an entry for each block.
        offload_buffers: Accepted for compatibility: room for buffers is planned in any case.
        fallback_allocation: Accepted for compatibility: smaller blocks always get the room that larger ones
            leave.

    Raises:
        PlacementError: the budgets cannot hold the model, or not its largest block.
    """
    skeleton = with_blocks(skeleton_of_any(model), blocks_of(model, _names(no_split_module_classes)))
    sizes = tensor_sizes(model, dtype, special_dtypes)
    placement = plan_placement(skeleton, sizes, free_memory(max_memory), strategy="sequential")
    if verbose:
        logger.warning("%s", placement)
    if clean_result:
        return dict(placement.device_map)
    return {path: block.home for block in placement.blocks for path in (block.name, *block.tied)}


def _names(classes: Iterable[str] | str | None) -> list[str]:
    return [classes] if isinstance(classes, str) else list(classes or ())


def _itemsize(dtype: Any) -> int:
    return DTYPES[dtype_name(str(dtype))].itemsize
