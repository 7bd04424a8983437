# SPDX-License-Identifier: Apache-2.0
"""Loading and placing any `nn.Module`, under the names and arguments of accelerate.

Differences that are meant: weights placed on disk stay in the checkpoint's own files where their dtype is the
model's, and can be read at any time; a weight that neither the checkpoint nor the model has values for is an
error and not a tensor without memory; a map that is incomplete, or names what is not there, is refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from pretrained.core.budgets import CPU, DISK, Home
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.dtypes import floating_dtype_name
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.placement import STRATEGIES
from pretrained.core.plan import LoadPlan, LoadPolicy, plan_load
from pretrained.core.report import fold_keys
from pretrained.core.skeleton import Skeleton
from pretrained.errors import ArgumentError, NotYetError, PlacementError, WeightsError
from pretrained.torch.device_maps import (
    MaxMemory,
    compute_module_sizes,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    skeleton_of_any,
    tensor_sizes,
    tensors_of,
)
from pretrained.torch.devices import single_device
from pretrained.torch.dispatch import Homes, attach, remove_hooks
from pretrained.torch.empty import no_fills, no_memory
from pretrained.torch.offload import DiskWeights
from pretrained.torch.offload_folder import written_from_memory
from pretrained.torch.place import blocks_of, on_disk, place, placed_reader
from pretrained.torch.tensors import dtype_name_of, mapped_reader

__all__ = [
    "compute_module_sizes",
    "cpu_offload",
    "disk_offload",
    "dispatch_model",
    "get_balanced_memory",
    "get_max_memory",
    "infer_auto_device_map",
    "init_empty_weights",
    "load_checkpoint_and_dispatch",
    "load_checkpoint_in_model",
    "remove_hooks",
]

logger = logging.getLogger(__name__)

Names = Iterable[str] | str | None


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Make modules that are built inside, by this thread, have parameters without memory.

    Args:
        include_buffers: Build buffers without memory too. None and False keep their values, which modules
            often compute when they are built and which no checkpoint holds.
    """
    if include_buffers:
        with no_memory():
            yield
        return
    thread = threading.get_ident()

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter is None or is_lazy(parameter) or parameter.is_meta:
            return None
        empty = parameter.detach().to("meta")
        # Weights of other classes carry more than values; their own constructor knows what.
        made = type(parameter)(empty, requires_grad=parameter.requires_grad)
        return made if isinstance(made, nn.Parameter) else nn.Parameter(empty, parameter.requires_grad)

    # torch's stub leaves out that a hook may return another parameter.
    handle = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        with no_fills():
            yield
    finally:
        handle.remove()


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: Mapping[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Iterable[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Fill a module with the weights of a checkpoint, each straight into its place.

    Args:
        model: Any module, with or without memory.
        checkpoint: A weights file, an index, or a folder with either.
        device_map: Module path -> device; None leaves weights where they are (on the CPU where they have no
            memory yet). Call `dispatch_model` to make a model with several homes run.
        offload_folder: Where weights on disk go that cannot be used as they lie in the checkpoint.
        dtype: Dtype of floating weights; None for the one each has in the model.
        offload_state_dict: Accepted for compatibility: loading holds no state dict.
        offload_buffers: Let buffers follow the map onto the CPU and disk.
        keep_in_fp32_modules: Module names that stay float32 when `dtype` is float16.
        offload_8bit_bnb: Not offered.
        strict: Raise for weights that the model lacks or the checkpoint lacks.
        full_state_dict: False is not offered.
        broadcast_from_rank0: Not offered.

    Raises:
        WeightsError: shapes differ, or with `strict` keys do.
        PlacementError: the map or the folder cannot be used.
        NotYetError: one of the arguments that are not offered.
    """
    _refuse(offload_8bit_bnb=offload_8bit_bnb, broadcast_from_rank0=broadcast_from_rank0)
    if not full_state_dict:
        _refuse(full_state_dict="False")
    skeleton = skeleton_of_any(model)
    plan = _plan(model, skeleton, _opened(checkpoint), dtype, keep_in_fp32_modules, checkpoint, strict)
    homes = _homes(model, skeleton, device_map, offload_buffers=offload_buffers)
    _fill(model, skeleton, plan, homes, offload_folder)


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | Path,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: MaxMemory = None,
    no_split_module_classes: Names = None,
    offload_folder: str | Path | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: Names = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """Fill a module with the weights of a checkpoint, placed by a map, and make it run from there.

    Args:
        model: Any module, with or without memory.
        checkpoint: A weights file, an index, or a folder with either.
        device_map: ``"auto"``, ``"balanced"``, ``"balanced_low_0"``, ``"sequential"``, or module path ->
            device; None places nothing.
        max_memory: As for `get_max_memory`.
        no_split_module_classes: Names of classes that are not split.
        offload_folder: As for `load_checkpoint_in_model`.
        offload_buffers: As for `load_checkpoint_in_model`.
        dtype: As for `load_checkpoint_in_model`.
        offload_state_dict: As for `load_checkpoint_in_model`.
        skip_keys: As for `dispatch_model`.
        preload_module_classes: As for `dispatch_model`.
        force_hooks: As for `dispatch_model`.
        strict: As for `load_checkpoint_in_model`.
        full_state_dict: As for `load_checkpoint_in_model`.
        broadcast_from_rank0: As for `load_checkpoint_in_model`.

    Returns:
        The same module.

    Raises:
        WeightsError: shapes differ, or a weight has no values in the checkpoint nor in the model.
        ArgumentError: an unknown way to place a model.
        PlacementError: the map, the budgets or the folder cannot be used.
    """
    if isinstance(device_map, str):
        if device_map not in STRATEGIES:
            device_map = {"": device_map}
        else:
            wanted: dict[str, Any] = {
                "no_split_module_classes": no_split_module_classes,
                "dtype": dtype,
            }
            if device_map != "sequential":
                low_zero = device_map == "balanced_low_0"
                max_memory = get_balanced_memory(model, max_memory, low_zero=low_zero, **wanted)  # type: ignore[assignment]
            device_map = infer_auto_device_map(model, max_memory, **wanted)
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
        broadcast_from_rank0=broadcast_from_rank0,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
    )


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Any],
    main_device: torch.device | str | int | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | Path | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: Names = None,
    preload_module_classes: Iterable[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Put the weights of a module where a map says and make it run from there.

    Args:
        model: Any module with values.
        device_map: Module path -> device; complete.
        main_device: Where modules run whose weights live on the CPU or on disk; None for the map's first
            accelerator, or the CPU.
        state_dict: Values of weights that have no memory in the model.
        offload_dir: Where weights on disk are written that lie in no file yet.
        offload_index: Not offered: the folders that another library wrote are not read.
        offload_buffers: Let buffers follow the map onto the CPU and disk.
        skip_keys: Keyword arguments whose tensors are not moved between devices.
        preload_module_classes: Classes that use weights of their submodules without calling them.
        force_hooks: Attach hooks also where nothing has to be moved.

    Returns:
        The same module, with `hf_device_map`.

    Raises:
        PlacementError: the map or the folder cannot be used.
        WeightsError: a weight has no values.
        NotYetError: `offload_index`.
    """
    _refuse(offload_index=offload_index)
    skeleton = skeleton_of_any(model)
    main = None if main_device is None else _existing(main_device, "main_device")
    homes = _homes(model, skeleton, device_map, offload_buffers=offload_buffers, main=main)
    assert homes is not None
    store = _settle(model, skeleton, homes, state_dict or {}, offload_dir)
    skip = [skip_keys] if isinstance(skip_keys, str) else (skip_keys or ())
    attach(model, homes, store, skip_keys=skip, whole=preload_module_classes or (), force=force_hooks)
    model.hf_device_map = dict(homes.device_map)  # type: ignore[assignment]
    return model


def cpu_offload(
    model: nn.Module,
    execution_device: torch.device | str | int | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Iterable[str] | None = None,
) -> nn.Module:
    """Keep a module's weights on the CPU and bring each to a device when it is used.

    Args:
        model: Any module with values.
        execution_device: Where it runs; None for where its first parameter is.
        offload_buffers: Keep buffers on the CPU too.
        state_dict: As for `dispatch_model`.
        preload_module_classes: As for `dispatch_model`.

    Returns:
        The same module.
    """
    return _offload(model, CPU, execution_device, None, offload_buffers, state_dict, preload_module_classes)


def disk_offload(
    model: nn.Module,
    offload_dir: str | Path,
    execution_device: torch.device | str | int | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Iterable[str] | None = None,
) -> nn.Module:
    """Keep a module's weights on disk and use each from there.

    Args:
        model: Any module with values.
        offload_dir: Where they are written; the files go when the model goes.
        execution_device: Where it runs; None for where its first parameter is.
        offload_buffers: Keep buffers on disk too.
        preload_module_classes: As for `dispatch_model`.

    Returns:
        The same module.
    """
    return _offload(model, DISK, execution_device, offload_dir, offload_buffers, None, preload_module_classes)


# -- how -----------------------------------------------------------------------------------------


def _offload(
    model: nn.Module,
    home: Home,
    execution_device: Any,
    folder: str | Path | None,
    offload_buffers: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
    whole: Iterable[str] | None,
) -> nn.Module:
    first = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    main = first if execution_device is None else _existing(execution_device, "execution_device")
    homes = Homes({"": home}, main, offload_buffers)
    store = _settle(model, skeleton_of_any(model), homes, state_dict or {}, folder)
    attach(model, homes, store, whole=whole or ())
    return model


def _existing(device: Any, where: str) -> torch.device:
    try:
        return single_device(device)
    except PlacementError as error:
        error.where = where
        raise


def _opened(checkpoint: str | Path) -> Checkpoint:
    path = Path(checkpoint)
    opened = open_checkpoint(find_weights(path) if path.is_dir() else path)
    if opened.format == "gguf":
        raise ArgumentError(
            "A GGUF file names and lays out weights in a way of its own",
            where=path,
            mend="Load it with AutoModel...from_pretrained, which knows the architectures.",
        )
    return opened


def _plan(
    model: nn.Module,
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    dtype: Any,
    keep_fp32: Iterable[str] | None,
    source: object,
    strict: bool,
) -> LoadPlan:
    name = None if dtype is None else floating_dtype_name(str(dtype))
    policy = LoadPolicy(dtype=name, keep_fp32=tuple(keep_fp32 or ()), allow_missing=True)
    plan = plan_load(checkpoint, skeleton, policy, source=source)
    if strict and (plan.missing or plan.unexpected):
        raise WeightsError(
            "Checkpoint and model do not have the same weights",
            where=source,
            found=f"missing: {_listed(plan.missing)}; unexpected: {_listed(plan.unexpected)}",
            mend="Build the model that the checkpoint was saved from, or pass strict=False.",
        )
    if plan.missing or plan.unexpected:
        logger.warning(
            "%s: missing: %s; unexpected: %s", source, _listed(plan.missing), _listed(plan.unexpected)
        )
    if dtype is not None:
        return plan
    own = {key: dtype_name_of(tensor.dtype) for key, tensor, *_ in tensors_of(model)}
    return replace(plan, steps=tuple(replace(step, dtype=own[step.key]) for step in plan.steps))


def _homes(
    model: nn.Module,
    skeleton: Skeleton,
    device_map: Any,
    *,
    offload_buffers: bool,
    main: torch.device | None = None,
) -> Homes | None:
    if device_map is None:
        return None
    return place(
        device_map,
        skeleton,
        tensor_sizes(model),
        blocks=blocks_of(model, getattr(model, "_no_split_modules", None)),
        modules=[path for path, _ in model.named_modules()],
        offload_buffers=offload_buffers,
        main=main,
    )


def _fill(
    model: nn.Module,
    skeleton: Skeleton,
    plan: LoadPlan,
    homes: Homes | None,
    folder: str | Path | None,
) -> None:
    """Read the steps of a plan into a module."""
    slots = _slots(model, skeleton)
    buffers = frozenset(key for key, _, _, _, is_buffer in tensors_of(model) if is_buffer)
    store, read = _store(model), mapped_reader()
    if homes is not None:
        plan = on_disk(plan, homes, buffers, store, None, folder)
        read = placed_reader(read, homes, buffers, store)
    for step in plan.steps:
        old = _tensor(slots[step.key][0])
        here = torch.device("cpu") if old.is_meta else old.device
        device = here if homes is None else homes.resting(step.key, is_buffer=step.key in buffers)
        _assign(slots[step.key], read(step, device))
    if store.nbytes and "_dispatch" not in model.__dict__:
        model.__dict__["_disk_weights"] = store


def _settle(
    model: nn.Module,
    skeleton: Skeleton,
    homes: Homes,
    state_dict: Mapping[str, torch.Tensor],
    folder: str | Path | None,
) -> DiskWeights:
    """Bring the weights of a module to their homes; return those on disk."""
    slots = _slots(model, skeleton)
    store = _store(model)
    values = {}
    for key, group in slots.items():
        tensor = _tensor(group[0])
        values[key] = state_dict[key].to(tensor.dtype) if tensor.is_meta and key in state_dict else tensor
    empty = [key for key, tensor in values.items() if tensor.is_meta]
    if empty:
        raise WeightsError(
            f"{len(empty)} weights of the model have no values",
            where=", ".join(fold_keys(empty)[:10]),
            mend="Load a checkpoint that holds them, or pass them in state_dict.",
        )
    is_buffer = {key: slots[key][0][2] for key in slots}
    to_write = {
        key: tensor.detach()
        for key, tensor in values.items()
        if homes.home(key, is_buffer=is_buffer[key]) == DISK
        and store.span_of(tensor.data) is None
        and tensor.numel()
    }
    written = {}
    if to_write:
        if folder is None:
            raise ArgumentError(
                f"{len(to_write)} weights placed on disk are in memory now",
                where="offload_dir",
                mend="Pass a folder that they can be written to.",
            )
        written = written_from_memory(Path(folder), to_write, store)
    # From here on nothing is refused any more.
    remove_hooks(model)
    for key, tensor in values.items():
        device = homes.resting(key, is_buffer=is_buffer[key])
        old = _tensor(slots[key][0])
        new = store.tensor(written[key]) if key in written else tensor.detach().to(device)
        if old.is_meta or new.data_ptr() != old.data_ptr() or new.device != old.device:
            _assign(slots[key], new)
    return store


Slot = tuple[nn.Module, str, bool]


def _slots(model: nn.Module, skeleton: Skeleton) -> dict[str, list[Slot]]:
    """Return for each tensor's first key every place in the module tree that holds it."""
    slots: dict[str, list[Slot]] = {}
    first: dict[int, str] = {}
    for key, tensor, part, name, is_buffer in tensors_of(model):
        slots.setdefault(first.setdefault(id(tensor), key), []).append((part, name, is_buffer))
    return slots


def _tensor(slot: Slot) -> torch.Tensor:
    part, name, is_buffer = slot
    tensor = (part._buffers if is_buffer else part._parameters)[name]
    assert tensor is not None
    return tensor


def _assign(slots: list[Slot], tensor: torch.Tensor) -> None:
    """Put one tensor into every place that shares it."""
    old = _tensor(slots[0])
    value = tensor
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    for part, name, is_buffer in slots:
        table: dict[str, Any] = part._buffers if is_buffer else part._parameters
        table[name] = value


def _store(model: nn.Module) -> DiskWeights:
    """Return the module's weights on disk, which outlast its hooks."""
    dispatch = model.__dict__.get("_dispatch")
    store = model.__dict__.get("_disk_weights") if dispatch is None else dispatch.store
    return DiskWeights() if store is None else store


def _listed(keys: Iterable[str]) -> str:
    folded = fold_keys(keys)
    return (", ".join(folded[:10]) + (", ..." if len(folded) > 10 else "")) or "none"


def _refuse(**asked: Any) -> None:
    for name, value in asked.items():
        if value:
            raise NotYetError(
                f"{name}={value!r} is not offered yet",
                where=name,
                mend="Leave it out; weights are read from plain files.",
            )
