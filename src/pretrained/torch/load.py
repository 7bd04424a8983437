# SPDX-License-Identifier: Apache-2.0
"""Loading: decide in the core, then build empty, stream, assign, tie and audit.

`from_pretrained` is the path that every source takes: safetensors, PyTorch files, GGUF, state dicts.
What differs between them is the `read` function that turns a planned step into a tensor.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pretrained.core.adapter_files import base_of, is_adapter
from pretrained.core.budgets import DISK, available_host_memory
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.collector import no_collection
from pretrained.core.config import PreTrainedConfig
from pretrained.core.dtypes import DTYPES, floating_dtype_name
from pretrained.core.file_state import check_load
from pretrained.core.hub import Source
from pretrained.core.keys import KeyRule
from pretrained.core.options import LoadOptions, unknown_argument
from pretrained.core.plan import LoadPlan, LoadPolicy, LoadStep, check_depth, plan_load
from pretrained.core.prefetch import Prefetch
from pretrained.core.progress import reporting
from pretrained.core.reader import MappedFiles
from pretrained.core.report import LoadReport, format_bytes
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.errors import (
    ArgumentError,
    ConfigError,
    PretrainedError,
    UnknownArgumentError,
)
from pretrained.torch.devices import check_memory, home_name, single_device
from pretrained.torch.dispatch import Homes, attach
from pretrained.torch.empty import no_memory
from pretrained.torch.initialise import initialise_missing
from pretrained.torch.load_sources import (
    check_generation_config,
    find_source,
    layouts_of,
    open_weights,
    read_generation_config,
    read_model_config,
)
from pretrained.torch.mapped_mixin import watch_files
from pretrained.torch.offload import DiskWeights
from pretrained.torch.place import (
    blocks_of,
    check_new,
    is_one_device,
    on_disk,
    place,
    placed_reader,
    sizes_of,
    write_new,
)
from pretrained.torch.quantize import all_ties, packed_keys
from pretrained.torch.quantized import IntegerLeaf, MadeWeight
from pretrained.torch.quantizers.base import Quantizer
from pretrained.torch.quantizers.choose import quantizer_for
from pretrained.torch.rounding import Packed
from pretrained.torch.serial_threads import serial_pool
from pretrained.torch.tensors import TORCH_DTYPES, Read, dtype_name_of, mapped_reader, state_dict_reader
from pretrained.torch.ties import settle_ties, shared_by_construction
from pretrained.torch.uploads import Uploads

logger = logging.getLogger(__name__)

# The page this library implements: "models normally come up in float32", and "auto" is asked for.
DEFAULT_DTYPE = "float32"

Model = TypeVar("Model", bound=Any)


# Tensors made in inference mode could never be trained, nor used with any that are.
@torch.inference_mode(False)
def from_pretrained(
    cls: type[Model], path: str | Path | Source | None, /, *model_args: Any, **kwargs: Any
) -> Any:
    """Load a model; `PreTrainedModel.from_pretrained` documents the arguments.

    Args:
        cls: Model class.
        path: Hub id, folder, weights file, or None.
        *model_args: For the constructor.
        **kwargs: Options, config overrides and constructor arguments.
    """
    started = time.perf_counter()
    given = dict(kwargs)
    options = LoadOptions.take(kwargs)
    # A budget is held against a map of one device too, which takes the sizes that only a plan knows.
    is_simple = is_one_device(options.device_map) and options.max_memory is None
    device = single_device(options.device_map) if is_simple else None
    check_dtype(options.dtype)
    check_generation_config(options.generation_config)
    source = find_source(path, options)
    if source is not None and is_adapter(source, options.variant):
        return _with_adapter(cls, source, options, model_args, given)
    checkpoint = open_weights(source, options)
    states = checkpoint.states
    config, kwargs = read_model_config(cls, source, checkpoint, options, kwargs)
    check_depth(config, checkpoint, path)
    dtype = resolve_dtype(options.dtype, config, checkpoint)
    model = build_empty(cls, config, *model_args, **kwargs)
    model.name_or_path = "" if path is None else str(path)
    quantizer = quantizer_for(config, checkpoint, options, dtype)
    checkpoint = quantizer.view(model, checkpoint)
    if checkpoint.format != "gguf":
        settle_ties(model, checkpoint, key_mapping=options.key_mapping, state_dict=options.state_dict)
    quantizer.prepare(model, checkpoint)
    skeleton = skeleton_of(model)
    plan = plan_load(
        checkpoint,
        skeleton,
        policy_of(model, options, dtype, quantizer.rules),
        layouts=layouts_of(checkpoint),
        source=path,
    )
    model.generation_config = read_generation_config(model, source, options)
    read = None if options.state_dict is None else state_dict_reader(options.state_dict)
    files = MappedFiles(states) if options.state_dict is None else None
    if device is not None:
        quantizer.is_resident = True
        plan, read = quantizer.wrap(model, plan, read or mapped_reader(files, copy_all=options.disable_mmap))
        computes = quantizer.is_active
        execute(model, plan, device, read, options.progress, files=files, dtype=dtype, computes=computes)
    else:
        plan = execute_placed(model, plan, skeleton, read, files, options, dtype, quantizer)
    # What was changed while it was read is not trusted, wherever its weights went.
    check_load(states, checkpoint.files)
    config.dtype = dtype_name_of(model.dtype)
    model._checkpoint_names = dict(plan.renamed)
    if files is not None and not options.disable_mmap:
        watch_files(model, plan, files, states)
    quantizer.finish(model)
    model.eval()
    if options.device_map is not None and device is not None:
        model.hf_device_map = {"": home_name(device)}
    report = LoadReport(
        model=cls.__name__,
        source=str(path) if path is not None else "state_dict",
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=plan.mismatched,
        dropped=plan.dropped,
        dtypes=plan.dtypes,
        quantized=quantizer.errors,
        notes=tuple(quantizer.notes),
        nbytes_read=plan.nbytes_to_read,
        load_s=time.perf_counter() - started,
    )
    model.load_report = report
    _log(report, options)
    return (model, report.loading_info()) if options.output_loading_info else model


def _with_adapter(
    cls: type[Any], source: Source, options: LoadOptions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load the model that an adapter was trained on, and put the adapter into it."""
    # These said where the adapter is, and the base model has been looked up with them.
    for name in ("adapter_name", "adapter_kwargs", "revision", "subfolder"):
        kwargs.pop(name, None)
    loaded = from_pretrained(cls, base_of(source), *args, **kwargs)
    model = loaded[0] if options.output_loading_info else loaded
    model.load_adapter(source, options.adapter_name)
    return loaded


@torch.inference_mode(False)
def from_config(
    cls: type[Model],
    config: PreTrainedConfig,
    *model_args: Any,
    dtype: Any = None,
    torch_dtype: Any = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> Model:
    """Build a model with new weights; `PreTrainedModel._from_config` documents the arguments."""
    config = copy.deepcopy(config)
    # New weights are plain; the entry speaks of the files that the config came with.
    config.__dict__.pop("quantization_config", None)
    if attn_implementation is not None:
        config.update({"attn_implementation": attn_implementation})
    dtype = torch_dtype if dtype is None else dtype
    check_dtype(dtype)
    wanted = _config_dtype(config) if dtype in (None, "auto") else floating_dtype_name(str(dtype))
    model = build_empty(cls, config, *model_args, **kwargs)
    device = torch.get_default_device()
    if device.type == "meta":
        config.dtype = wanted or DEFAULT_DTYPE
        return model.to(TORCH_DTYPES[config.dtype]).train()
    skeleton = skeleton_of(model)
    # Every weight is missing from a checkpoint that does not exist: the same plan, the same executor.
    policy = policy_of(model, LoadOptions(allow_missing=True), wanted or DEFAULT_DTYPE)
    plan = plan_load(Checkpoint({}, (), "none"), skeleton, policy)
    execute(model, plan, device, state_dict_reader({}), False, dtype=wanted)
    config.dtype = dtype_name_of(model.dtype)
    return model.train()


def build_empty(cls: type[Model], config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Model:
    """Build a model whose parameters have shapes and no memory.

    Args:
        cls: Model class.
        config: Its configuration.
        *args: Further constructor arguments.
        **kwargs: Further constructor arguments by name.

    Raises:
        UnknownArgumentError: the constructor does not take one of them.
        ConfigError: the config's sizes are beyond what a tensor can have.
    """
    _check_arguments(cls, config, args, kwargs)
    try:
        with no_memory(), no_collection():
            model = cls(config, *args, **kwargs)
            model._shared_weights = shared_by_construction(model)
            return model
    except ConfigError as error:
        if config.name_or_path and config.name_or_path not in str(error.where):
            error.where = f"{error.where}, {config.name_or_path}" if error.where else config.name_or_path
        raise
    except (RuntimeError, OverflowError, TypeError) as error:
        # Of a size beyond 63 bits torch says by a TypeError that it is one.
        ours = isinstance(error, PretrainedError)
        if ours or (isinstance(error, TypeError) and "verflow" not in str(error)):
            raise
        raise ConfigError(
            f"{cls.__name__} cannot be built with the sizes in its config",
            where=config.name_or_path or None,
            found=str(error).partition("\n")[0],
            mend="Correct them in config.json or in the call.",
        ) from error


def _check_arguments(
    cls: type[Any], config: PreTrainedConfig, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise for arguments that the constructor does not take, before anything is built."""
    signature = inspect.signature(cls)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [] if takes_any else [name for name in kwargs if name not in signature.parameters]
    if unknown:
        raise unknown_argument(
            cls.__name__,
            unknown,
            [*signature.parameters, *(name for name in config.__dict__ if not name.startswith("_"))],
            f"It is an attribute of the config: set config.{unknown[0]} on the config that you pass."
            if config.has(unknown[0])
            else None,
        )
    try:
        signature.bind(config, *args, **kwargs)
    except TypeError as error:
        raise UnknownArgumentError(
            f"{cls.__name__} cannot be built from these arguments", where=str(error), expected=str(signature)
        ) from error


def skeleton_of(module: nn.Module) -> Skeleton:
    """Return what a module promises to hold: its parameters and saved buffers, with its ties.

    Args:
        module: Any module, with or without memory.
    """
    params: dict[str, ParamSpec] = {}
    derived: dict[str, ParamSpec] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            key = f"{prefix}.{name}" if prefix else name
            params[key] = ParamSpec(key, tuple(parameter.shape))
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            key = f"{prefix}.{name}" if prefix else name
            held = derived if name in part._non_persistent_buffers_set else params
            held[key] = ParamSpec(key, tuple(buffer.shape), is_buffer=True)
    ties = all_ties(module)
    return Skeleton(params, {alias: owner for alias, owner in ties.items() if alias in params}, derived)


def policy_of(
    model: Any, options: LoadOptions, dtype: str | None, rules: Sequence[KeyRule] = ()
) -> LoadPolicy:
    """Return the planner's view of a model class and a call.

    Args:
        model: A model, with or without memory.
        options: The call's wishes.
        dtype: Name of the dtype to load as; None keeps each tensor's own.
        rules: Further key rules, for these files.
    """
    return LoadPolicy(
        dtype=dtype,
        keep_fp32=tuple(model._keep_in_fp32_modules or ()),
        keep_fp32_strict=tuple(model._keep_in_fp32_modules_strict or ()),
        ignore_mismatched_sizes=options.ignore_mismatched_sizes,
        optional=tuple(model._optional_weights),
        silent_missing=tuple(model._keys_to_ignore_on_load_missing or ()),
        silent_unexpected=tuple(model._keys_to_ignore_on_load_unexpected or ()),
        key_mapping=options.key_mapping,
        rules=(*model.key_rules, *rules),
        base_prefix=model.base_model_prefix,
        allow_missing=options.allow_missing,
        packed=packed_keys(model),
    )


def execute(
    model: Any,
    plan: LoadPlan,
    device: torch.device | Homes,
    read: Read,
    progress: Any = None,
    *,
    files: MappedFiles | None = None,
    dtype: str | None = None,
    computes: bool = False,
) -> None:
    """Carry a plan out on a model built empty.

    Args:
        model: Built by `build_empty`; changed in place.
        plan: What to do.
        device: Where the weights go: one device, or homes.
        read: Reads one tensor.
        progress: As `LoadOptions.progress`.
        files: The maps that `read` reads from, to read ahead of it; None where it reads from none.
        dtype: Dtype of weights that are initialised; None for the one most loaded weights have.
        computes: Whether reading takes work even where nothing is cast: weights are quantized on the way.
    """
    homes = device if isinstance(device, Homes) else Homes({"": home_name(device)}, device)
    buffers = buffers_of(model)
    ahead = Prefetch(files, () if files is None else _to_read(plan, homes, buffers))
    done, total = 0, plan.nbytes_to_read
    uploads = Uploads(files)

    def read_home(step: LoadStep) -> torch.Tensor:
        device = homes.resting(step.key, is_buffer=step.key in buffers)
        # What is quantized on the way is laid out for the device that it goes to.
        return read(step, device) if computes else uploads.read(step, device, read)

    with reporting(progress, total, "loading") as report, uploads:
        for step, tensor in _read_all(plan, read_home, ahead, computes):
            assign(model, step.key, tensor)
            done += step.source.nbytes
            report(done, total, "loading")
    new = [key for key in plan.initialise if key not in plan.ties]
    _allocate(model, new, homes, TORCH_DTYPES[dtype or _usual_dtype(plan)])
    _fill_derived_buffers(model, homes)
    model.tie_weights()
    initialise_missing(model, new)
    _audit(model, new)
    for module in model.modules():
        module._initialised = True


def execute_placed(
    model: Any,
    plan: LoadPlan,
    skeleton: Skeleton,
    read: Read | None,
    files: MappedFiles | None,
    options: LoadOptions,
    dtype: str | None,
    quantizer: Quantizer,
) -> LoadPlan:
    """Carry a plan out over several homes and make the model run from them.

    Args:
        model: Built by `build_empty`; changed in place.
        plan: What to do.
        skeleton: What the model promises.
        read: Reads weights that are in no file; None for weights in files.
        files: The maps of the weights' files; None for weights in no file.
        options: The call's device map, budgets and offload folder.
        dtype: Name of the dtype that weights are loaded as.
        quantizer: What is quantized on the way.

    Returns:
        The plan with what is quantized on the way.
    """
    plan, quantized = quantizer.wrap(model, plan, read or mapped_reader(files, copy_all=options.disable_mmap))
    skeleton = skeleton_of(model) if quantizer.is_active else skeleton
    homes = place(
        options.device_map,
        skeleton,
        quantizer.sizes(model, sizes_of(skeleton, plan, dtype or _usual_dtype(plan))),
        blocks=blocks_of(model, model._no_split_modules),
        modules=[path for path, _ in model.named_modules()],
        max_memory=options.max_memory,
        offload_buffers=options.offload_buffers,
    )
    if options.disable_mmap and DISK in homes.device_map.values():
        raise ArgumentError(
            "Weights placed on disk are used from the map of their file",
            where="disable_mmap, device_map",
            mend="Leave disable_mmap out, or place everything on devices and 'cpu'.",
        )
    quantizer.check_homes(homes.device_map.values())
    buffers, store = buffers_of(model), DiskWeights(None if files is None else files.expected)
    folder = options.offload_folder
    new = check_new(plan, homes, buffers, folder)
    placed = on_disk(plan, homes, buffers, store, read, folder, quantizer, quantized)
    reader = placed_reader(quantized, homes, buffers, store)
    usual, computes = dtype or _usual_dtype(plan), quantizer.is_active
    execute(model, placed, homes, reader, options.progress, files=files, dtype=usual, computes=computes)
    if new and folder is not None:
        write_new(model, new, store, folder)
    attach(model, homes, store, skip_keys=getattr(model, "_skip_keys_device_placement", None) or ())
    model.hf_device_map = dict(homes.device_map)
    return plan


def buffers_of(model: nn.Module) -> frozenset[str]:
    """Return the keys of a module's buffers.

    Args:
        model: Any module.
    """
    return frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))


def _read_all(
    plan: LoadPlan, read: Callable[[LoadStep], torch.Tensor], ahead: Prefetch, computes: bool
) -> Iterator[tuple[LoadStep, torch.Tensor]]:
    """Read every step, in file order; those that compute something side by side."""

    def read_waited(step: LoadStep) -> torch.Tensor:
        ahead.wait(step.source)
        tensor = read(step)
        ahead.used(step.source)
        return tensor

    with ahead:
        if not computes and all(step.is_view for step in plan.steps):
            for step in plan.steps:
                yield step, read_waited(step)
            return
        with serial_pool() as pool:
            yield from zip(plan.steps, pool.map(read_waited, plan.steps), strict=True)


def _to_read(plan: LoadPlan, homes: Homes, buffers: frozenset[str]) -> list[TensorInfo]:
    """Return what is worth reading ahead: not what stays on disk, nor views that memory cannot hold."""
    steps = [s for s in plan.steps if homes.home(s.key, is_buffer=s.key in buffers) != DISK]
    kept_bytes = sum(step.source.nbytes for step in steps if step.is_view)
    left = available_host_memory()
    fits = left is None or kept_bytes < left
    return [step.source for step in steps if fits or not step.is_view]


def assign(model: nn.Module, key: str, tensor: torch.Tensor | Packed | MadeWeight) -> None:
    """Put a tensor where a key says, keeping whether it is trained.

    Args:
        model: The model.
        key: Name of a parameter or buffer.
        tensor: Its values.
    """
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(name)
    if isinstance(tensor, MadeWeight):
        module._parameters[name] = tensor.parameter
    elif isinstance(tensor, Packed):
        assert isinstance(module, IntegerLeaf)
        module.fill(tensor)
    elif old is not None:
        trained = old.requires_grad and tensor.is_floating_point()
        module._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
    else:
        module._buffers[name] = tensor


def check_dtype(dtype: Any) -> None:
    """Raise for a dtype argument that cannot be meant, before anything is read.

    Args:
        dtype: As the user gave it.
    """
    if dtype is not None and dtype != "auto":
        floating_dtype_name(str(dtype))


def resolve_dtype(wanted: Any, config: PreTrainedConfig, checkpoint: Checkpoint) -> str | None:
    """Return the name of the dtype to load as.

    Args:
        wanted: None for `DEFAULT_DTYPE`; ``"auto"`` for the config's, else that of the first floating
            tensor in the files; or a dtype in any spelling.
        config: The model's configuration.
        checkpoint: What the files hold.
    """
    if wanted is None:
        return DEFAULT_DTYPE
    if wanted != "auto":
        return floating_dtype_name(str(wanted))
    if checkpoint.format == "gguf":
        return DEFAULT_DTYPE
    if config.dtype is not None:
        return _config_dtype(config)
    stored = (info.dtype for info in checkpoint.tensors.values())
    return next((name for name in stored if name in DTYPES and DTYPES[name].is_loadable), DEFAULT_DTYPE)


def _config_dtype(config: PreTrainedConfig) -> str | None:
    """Return the dtype that a config names, having checked that weights can have it."""
    try:
        return None if config.dtype is None else floating_dtype_name(config.dtype)
    except ArgumentError as error:
        raise ConfigError(
            f"The config's dtype is {config.dtype}, which weights cannot be loaded as",
            where=config.name_or_path or "dtype",
            expected=error.expected,
            mend="Pass dtype='float32' or another one.",
        ) from error


# -- after the bytes -----------------------------------------------------------------------------


def _usual_dtype(plan: LoadPlan) -> str:
    counts: dict[str, int] = {}
    for (_, loaded), count in plan.dtypes.items():
        counts[loaded] = counts.get(loaded, 0) + count
    floating = {name: count for name, count in counts.items() if TORCH_DTYPES[name].is_floating_point}
    return max(floating, key=lambda name: floating[name], default=DEFAULT_DTYPE)


def _allocate(model: nn.Module, keys: Iterable[str], homes: Homes, dtype: torch.dtype) -> None:
    """Give weights that are to be initialised memory, with a first element that shows if none does it."""
    slots: dict[str, tuple[torch.Tensor, torch.device]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters.get(name, module._buffers.get(name))
        assert old is not None
        slots[key] = (old, homes.resting(key, is_buffer=name in module._buffers))
    check_memory({k: old.numel() * dtype.itemsize for k, (old, at) in slots.items() if at.type == "cpu"})
    for key, (old, device) in slots.items():
        tensor = torch.empty(old.shape, dtype=dtype if old.is_floating_point() else old.dtype, device=device)
        if tensor.numel() and tensor.is_floating_point():
            tensor.view(-1)[0] = float("nan")
        assign(model, key, tensor)


def _fill_derived_buffers(model: nn.Module, homes: Homes) -> None:
    for path, module in model.named_modules():
        derive = getattr(module, "init_buffers", None)
        if callable(derive):
            name = next(iter(module._buffers), "")
            derive(homes.resting(f"{path}.{name}" if path else name, is_buffer=True))


def _audit(model: nn.Module, initialised: Iterable[str]) -> None:
    """Raise where anything is left without values; a load never ends in chance numbers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    for key in initialised:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is not None and tensor.numel() and bool(tensor.detach().view(-1)[0].isnan()):
            left.append(key)
    if left:
        raise ArgumentError(
            f"{type(model).__name__} does not say how to initialise {left[0]!r}",
            where=", ".join(left[:10]),
            mend="Handle its module in _init_weights(module), or give the module that owns a derived "
            "buffer a method init_buffers(device).",
        )


def _log(report: LoadReport, options: LoadOptions) -> None:
    level = logging.INFO if report.is_plain else logging.WARNING
    logger.log(level, "%s", report)
    logger.info("read %s in %.2f s", format_bytes(report.nbytes_read), report.load_s)
    narrow = {
        stored
        for stored, loaded in report.dtypes
        if loaded == "float32" and stored in ("bfloat16", "float16")
    }
    if options.dtype is None and narrow:
        logger.warning(
            "The file's %s weights were loaded as float32, twice their size; pass dtype='auto' to keep them.",
            " and ".join(sorted(narrow)),
        )
