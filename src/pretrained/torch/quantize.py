# SPDX-License-Identifier: Apache-2.0
"""Quantizing models: which layers, while their weights stream in, on the way out, and back to plain ones.

A load calls `quantizer_for` once, before it plans. What comes back knows the three ways that a quantized
model comes up, which differ in who makes the integers: this load (`Rounding`), GGML's blocks in a GGUF
file (`Blocks`), or the load before the save (`Restoring`).
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pretrained.arch.gguf import RowUnpermute, Transpose
from pretrained.core.budgets import DISK
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE
from pretrained.core.keys import match_keys
from pretrained.core.options import LoadOptions
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.quantization import (
    QuantizationConfig,
    names_module,
    requested_quantization,
    stored_quantization,
)
from pretrained.core.reader import release_pages
from pretrained.errors import ArgumentError, NotYetError, WeightsError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized import (
    GgufEmbedding,
    GgufLinear,
    IntegerLeaf,
    QuantizedEmbedding,
    QuantizedLeaf,
    QuantizedLinear,
)
from pretrained.torch.quantized_ops import quantize
from pretrained.torch.tensors import TORCH_DTYPES, Read

logger = logging.getLogger(__name__)

# Names of a leaf's tensors beside `weight`.
_SCALES = ("weight_scale", "weight_zero")


# -- which layers ---------------------------------------------------------------------------------


def select(model: nn.Module, config: QuantizationConfig) -> dict[str, QuantizationConfig]:
    """Return the layers that a scheme quantizes, each with the scheme it gets.

    Quantized are the dense layers of the body. The output head, other layers outside the body and the
    token embedding are as the config says, and int8 then: they are looked up as well as multiplied
    with, and matter most to the result. A tied head goes with its embedding.

    Args:
        model: With or without memory.
        config: int8 or int4.

    Raises:
        ArgumentError: a layer's input does not divide into groups.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = _embedding_group(model, modules)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", model)
    in_body = {id(module) for module in body.modules()}
    coarse = dataclasses.replace(config, quant_method="int8", group_size=None, symmetric=True)
    head_tied = any(modules[path] is head for path in tied)
    chosen: dict[str, QuantizationConfig] = {}
    for path, module in modules.items():
        if names_module(config.skip_modules, path) is not None:
            continue
        if path in tied:
            if config.quantize_embeddings or (config.quantize_head and head_tied):
                chosen[path] = coarse
        elif type(module) in (nn.Linear, Conv1D):
            outside = module is head or id(module) not in in_body
            if not outside:
                chosen[path] = config
            elif config.quantize_head:
                chosen[path] = coarse if module is head else config
    if any(path in tied for path in chosen) and not all(path in chosen for path in tied):
        raise ArgumentError(
            "A tied weight cannot be quantized in one place and skipped in another",
            where="quantization_config.skip_modules",
            found=", ".join(path for path in tied if path not in chosen),
            mend="Skip every name of the weight, or leave quantize_embeddings and quantize_head out.",
        )
    for pattern in config.skip_modules:
        if not any(names_module((pattern,), path) for path in modules):
            logger.warning("skip_modules: no module of %s is called %r", type(model).__name__, pattern)
    _check_groups(modules, chosen)
    return chosen


def _embedding_group(model: Any, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the paths of the token embedding and of every layer that shares its weight."""
    if not hasattr(model, "get_input_embeddings"):
        return ()
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ()
    paths = [path for path, module in modules.items() if module is embedding]
    ties = model.ties() if callable(getattr(model, "ties", None)) else {}
    for alias, owner in ties.items():
        ends = [key.removesuffix(".weight") for key in (alias, owner) if key.endswith(".weight")]
        if len(ends) == 2 and any(end in paths for end in ends):
            paths += [end for end in ends if end not in paths]
    return tuple(paths)


def _check_groups(modules: Mapping[str, nn.Module], chosen: Mapping[str, QuantizationConfig]) -> None:
    bad = []
    for path, config in chosen.items():
        columns = dense_shape(modules[path])[1]
        if config.group_size is not None and columns % config.group_size:
            bad.append(f"{path} ({columns})")
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        size = next(config.group_size for config in chosen.values() if config.group_size is not None)
        raise ArgumentError(
            f"The inputs of {len(bad)} layers do not divide into groups of {size}",
            where=shown,
            mend="Pass a smaller group_size, name them in skip_modules, or use 'int8'.",
        )


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a dense layer, or (rows, size) of an embedding.

    Args:
        module: A `Linear`, `Conv1D`, `Embedding` or quantized leaf.
    """
    if isinstance(module, QuantizedLeaf):
        return module.shape
    first, second = module.weight.shape  # type: ignore[union-attr,misc]
    return (int(second), int(first)) if isinstance(module, Conv1D) else (int(first), int(second))


# -- putting leaves in ----------------------------------------------------------------------------


def integer_leaf(module: nn.Module, config: QuantizationConfig, dtype: torch.dtype) -> IntegerLeaf:
    """Return an empty int8 or int4 leaf for a layer, on the meta device; it shares the layer's bias.

    Args:
        module: A `Linear`, `Conv1D` or `Embedding`.
        config: Its scheme.
        dtype: What its weight would be loaded as.
    """
    rows, columns = dense_shape(module)
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            leaf: Any = QuantizedEmbedding(rows, columns, config, dtype=dtype, padding_idx=module.padding_idx)
        else:
            leaf = QuantizedLinear(
                columns, rows, config, bias=False, dtype=dtype, transposed=isinstance(module, Conv1D)
            )
    return _dressed(leaf, module)


def gguf_leaf(module: nn.Module, block_type: str, dtype: torch.dtype) -> QuantizedLeaf:
    """Return an empty leaf for GGML's blocks, on the meta device; it shares the layer's bias.

    Args:
        module: A `Linear`, `Conv1D` or `Embedding`.
        block_type: GGML's name.
        dtype: What its weight would be loaded as.
    """
    rows, columns = dense_shape(module)
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            leaf: Any = GgufEmbedding(rows, columns, block_type, dtype=dtype, padding_idx=module.padding_idx)
        else:
            leaf = GgufLinear(
                columns, rows, block_type, bias=False, dtype=dtype, transposed=isinstance(module, Conv1D)
            )
    return _dressed(leaf, module)


def _dressed(leaf: Any, module: nn.Module) -> Any:
    bias = getattr(module, "bias", None)
    if bias is not None:
        leaf.bias = bias
    leaf._initialised = True
    return leaf.train(module.training)


def put(model: nn.Module, path: str, leaf: nn.Module) -> None:
    """Replace a module.

    Args:
        model: Changed in place.
        path: Where.
        leaf: By what.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, leaf)


def quantized_leaves(model: nn.Module) -> dict[str, QuantizedLeaf]:
    """Return the quantized layers by path.

    Args:
        model: Any module.
    """
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if isinstance(module, QuantizedLeaf)}


def packed_keys(model: nn.Module) -> frozenset[str]:
    """Return the keys of integers and scales.

    Args:
        model: Any module.
    """
    return frozenset(
        f"{path}.{name}"
        for path, leaf in quantized_leaves(model).items()
        for name, _ in leaf.named_parameters()
        if name != "bias"
    )


def all_ties(model: Any) -> dict[str, str]:
    """Return the model's ties, with those of the scales of quantized weights.

    Args:
        model: A module with `ties`, or any other.
    """
    declared = getattr(model, "ties", None)
    ties: dict[str, str] = dict(declared()) if callable(declared) else {}
    for alias, owner in list(ties.items()):
        path, _, name = owner.rpartition(".")
        try:
            leaf = model.get_submodule(path)
        except AttributeError:
            continue
        if name == "weight" and isinstance(leaf, IntegerLeaf):
            for scale in _SCALES:
                if getattr(leaf, scale, None) is not None:
                    ties[f"{alias.removesuffix('weight')}{scale}"] = f"{path}.{scale}"
    return ties


def quantize_model(model: nn.Module, config: QuantizationConfig) -> dict[str, float]:
    """Quantize the layers of a model whose weights are there, in place, one at a time.

    Args:
        model: Any module of dense layers.
        config: int8 or int4.

    Returns:
        Path -> relative error of its weight.

    Raises:
        WeightsError: a weight has no values, or some that are no finite numbers.
        ArgumentError: as `select`.
    """
    errors: dict[str, float] = {}
    done: dict[int, IntegerLeaf] = {}
    for path, scheme in select(model, config).items():
        module = model.get_submodule(path)
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        leaf = integer_leaf(module, scheme, weight.dtype)
        twin = done.get(id(weight))
        if twin is None:
            packed = quantize(weight, scheme, key=f"{path}.weight", transposed=isinstance(module, Conv1D))
            leaf.fill(packed)
            errors[path] = packed.error
            done[id(weight)] = leaf
        else:
            for name in ("weight", "weight_scale"):
                leaf._parameters[name] = twin._parameters[name]
        put(model, path, leaf)
    use_kernel_layouts(model)
    return errors


def use_kernel_layouts(model: nn.Module) -> None:
    """Make resident 4-bit layers ready for this CPU's packed kernel.

    Args:
        model: Any module; layers on other devices, or moved by hooks, stay as they are.
    """
    for leaf in quantized_leaves(model).values():
        if isinstance(leaf, IntegerLeaf) and not leaf._forward_pre_hooks and not leaf.weight.is_meta:
            leaf.use_kernel_layout()


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> None:
    """Put plain layers where quantized ones are, one at a time.

    Args:
        model: Changed in place.
        dtype: Of the weights; None for what each would have been loaded as.
    """
    for path, leaf in quantized_leaves(model).items():
        put(model, path, leaf.plain(dtype))
    if callable(getattr(model, "tie_weights", None)):
        model.tie_weights()


# -- loads ----------------------------------------------------------------------------------------


class Quantizer:
    """What a load does about quantization; this one does nothing.

    Attributes:
        errors: Layers that the load has quantized -> relative error.

    Args:
        dtype: What plain weights are loaded as; None keeps each one's own.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self.errors: dict[str, float] = {}

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Change the empty model before the load is planned.

        Args:
            model: Without memory.
            checkpoint: What the files hold.
        """

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Change the plan, and how its steps are read; put leaves into the model.

        Args:
            model: Without memory.
            plan: What to do.
            read: Reads one tensor.
        """
        return plan, read

    is_active = False

    def sizes(self, model: Any, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of every weight, those of quantized layers as they are stored.

        Args:
            model: With leaves in place.
            sizes: As for plain weights.
        """
        found = dict(sizes)
        for path, leaf in quantized_leaves(model).items():
            for name, value in leaf.named_parameters():
                if name != "bias":
                    found[f"{path}.{name}"] = value.numel() * value.element_size()
        return found

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse a placement that the weights cannot have.

        Args:
            homes: Where they would go.
        """

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds, and make its layers ready.

        Args:
            model: Loaded.
        """


class _Quantizing(Quantizer):
    """What the three ways share.

    Args:
        config: The scheme.
        dtype: As `Quantizer`.
        is_mapped: Whether weights are read from maps of files, whose pages can be given back.
    """

    def __init__(self, config: QuantizationConfig, dtype: str | None, *, is_mapped: bool = False) -> None:
        super().__init__(dtype)
        self.config, self.is_mapped = config, is_mapped

    is_active = True

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse the disk: what lies there are the checkpoint's own files, and this load makes others."""
        if DISK in homes:
            raise NotYetError(
                "Weights that this load quantizes or repacks cannot be placed on disk yet",
                where="quantization_config, device_map",
                mend="Load without 'disk', save_pretrained, and load that folder with the device_map.",
            )

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds, and make its layers ready."""
        use_kernel_layouts(model)
        # A rule knows `weight` but not the scales beside it, so these keep the model's own names.
        own = {f"{path}.weight" for path in quantized_leaves(model)}
        names = getattr(model, "_checkpoint_names", {})
        model._checkpoint_names = {key: name for key, name in names.items() if key not in own}
        model.config.quantization_config = self.config.to_dict()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype that stands for the weights in layers that are quantized."""
        return TORCH_DTYPES[self.dtype or "float32"]


class Restoring(_Quantizing):
    """Loads what a save wrote: no weight is quantized again."""

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Put leaves where the files hold quantized weights; the files decide, not the class."""
        modules = {
            path: module
            for path, module in model.named_modules(remove_duplicate=False)
            if type(module) in (nn.Linear, Conv1D, nn.Embedding)
        }
        if self.config.quant_method == "gguf":
            leaves = self._gguf_leaves(model, modules)
        else:
            leaves = self._integer_leaves(model, modules, checkpoint)
        if not leaves:
            raise WeightsError(
                f"The config says that the weights are quantized ({self.config.quant_method}), and the files "
                "hold plain ones",
                where=checkpoint.files[0] if checkpoint.files else "state_dict",
                mend="Take quantization_config out of config.json; as an argument it quantizes.",
            )
        for path, leaf in leaves.items():
            put(model, path, leaf)

    def _integer_leaves(
        self, model: Any, modules: Mapping[str, nn.Module], checkpoint: Checkpoint
    ) -> dict[str, Any]:
        names = [f"{path}.{name}" for path in modules for name in ("weight", *_SCALES)]
        found = match_keys(
            checkpoint.tensors, names, base_prefix=model.base_model_prefix, rules=model.key_rules
        ).sources
        leaves: dict[str, Any] = {}
        for path, module in modules.items():
            scale = found.get(f"{path}.weight_scale")
            if scale is None:
                continue
            weight = checkpoint.tensors[found[f"{path}.weight"]]
            zero = found.get(f"{path}.weight_zero")
            config = self._scheme(weight, checkpoint.tensors[scale], zero is not None)
            leaves[path] = integer_leaf(module, config, self.torch_dtype)
        for one, other in _module_ties(model).items():
            for here, there in ((one, other), (other, one)):
                if there in leaves and here not in leaves and here in modules:
                    leaves[here] = integer_leaf(modules[here], leaves[there].config, self.torch_dtype)
        return leaves

    def _scheme(self, weight: TensorInfo, scale: TensorInfo, has_zero: bool) -> QuantizationConfig:
        """Read a layer's scheme off its tensors."""
        if weight.dtype == "int8" and len(scale.shape) == 1:
            return dataclasses.replace(self.config, quant_method="int8", group_size=None, symmetric=True)
        if weight.dtype == "uint8" and len(weight.shape) == len(scale.shape) == 2 and scale.shape[1]:
            size = 2 * weight.shape[1] // scale.shape[1]
            return dataclasses.replace(
                self.config, quant_method="int4", group_size=size, symmetric=not has_zero
            )
        raise WeightsError(
            "This tensor is in no form that a quantized layer is saved in",
            where=weight.key,
            expected="int8 with a scale for each row, or uint8 with scales for groups",
            found=f"{weight.dtype} {list(weight.shape)} with a scale of shape {list(scale.shape)}",
        )

    def _gguf_leaves(self, model: Any, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        types = self.config.block_types
        found = match_keys(
            types, modules, base_prefix=model.base_model_prefix, ties=_module_ties(model)
        ).sources
        for path in found:
            if types[found[path]] not in DEQUANTIZABLE:
                raise ArgumentError(
                    "A layer is packed in a type that cannot be read",
                    where=f"quantization_config.block_types[{found[path]!r}]",
                    found=repr(types[found[path]]),
                )
        return {path: gguf_leaf(modules[path], types[found[path]], self.torch_dtype) for path in found}

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Change nothing: the plan reads integers and scales as they are stored."""
        self._check_whole(plan, packed_keys(model))
        return plan, read

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Allow the disk: what was saved is used as it lies."""

    def _check_whole(self, plan: LoadPlan, keys: frozenset[str]) -> None:
        absent = [key for key in plan.initialise if key in keys and key not in plan.ties]
        if absent:
            raise WeightsError(
                "Parts of quantized weights are not in the checkpoint, or have another shape",
                where=", ".join(absent[:5]),
                mend="They cannot be initialised; load the checkpoint they were made from.",
            )

    def finish(self, model: Any) -> None:
        """Make layers ready, and keep what the config says, without layers this class lacks."""
        if self.config.quant_method == "gguf":
            self.config = dataclasses.replace(self.config, block_types=_block_types(model))
        super().finish(model)


class Rounding(_Quantizing):
    """Quantizes each weight when it is read, a piece at a time, straight from the mapped file."""

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Put leaves in, and read their weights as `Packed`."""
        chosen = select(model, self.config)
        read_keys = {step.key: step for step in plan.steps}
        owners = _module_ties(model)
        schemes: dict[str, tuple[QuantizationConfig, bool]] = {}
        for path, config in chosen.items():
            step = read_keys.get(f"{owners.get(path, path)}.weight")
            # Weights that will be initialised, or that stay float32 in a half-precision model.
            if step is None or (self.dtype is not None and step.dtype != self.dtype):
                continue
            module = model.get_submodule(path)
            put(model, path, integer_leaf(module, config, TORCH_DTYPES[step.dtype]))
            schemes[f"{path}.weight"] = (config, isinstance(module, Conv1D))

        def read_packed(step: LoadStep, device: torch.device) -> Any:
            if step.key not in schemes:
                return read(step, device)
            config, transposed = schemes[step.key]
            stored = _as_stored(step)
            values = read(stored, torch.device("cpu"))
            packed = quantize(values, config, key=step.key, transposed=transposed)
            if self.is_mapped and stored.is_view:
                _let_go(values)
            self.errors[step.key.removesuffix(".weight")] = packed.error
            return packed.to(device)

        return plan, read_packed


class Blocks(_Quantizing):
    """Keeps GGML's blocks of a GGUF file as they are."""

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Refuse files that hold no blocks."""
        if checkpoint.format != "gguf":
            raise ArgumentError(
                "quant_method 'gguf' keeps the blocks of a GGUF file, and this is none",
                where="quantization_config",
                found=checkpoint.format,
                mend="Pass a GGUF file, or quant_method 'int8' or 'int4'.",
            )

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Put leaves in, and read their weights as rows of bytes."""
        steps, users = [], _users(plan)
        reorder: dict[str, RowUnpermute] = {}
        for step in plan.steps:
            paths = users.get(step.key, ())
            modules = [model.get_submodule(path) for path in paths]
            if not paths or not _keepable(step, modules):
                steps.append(step)
                continue
            for path, module in zip(paths, modules, strict=True):
                put(model, path, gguf_leaf(module, step.source.dtype, TORCH_DTYPES[step.dtype]))
            steps.append(_as_rows(step))
            # A transposed layer keeps the file's order: the leaf multiplies the usual way round.
            if isinstance(step.apply, RowUnpermute):
                reorder[step.key] = step.apply

        def read_rows(step: LoadStep, device: torch.device) -> torch.Tensor:
            rows = read(step, device)
            if step.key not in reorder:
                return rows
            ordered = torch.from_numpy(reorder[step.key](rows.cpu().numpy())).to(device)
            if self.is_mapped and rows.device.type == "cpu":
                _let_go(rows)
            return ordered

        return dataclasses.replace(plan, steps=tuple(steps)), read_rows

    def finish(self, model: Any) -> None:
        """Note the type of each layer in the config: the bytes alone do not tell."""
        self.config = dataclasses.replace(self.config, block_types=_block_types(model))
        super().finish(model)


def quantizer_for(config: Any, checkpoint: Checkpoint, options: LoadOptions, dtype: str | None) -> Quantizer:
    """Return what a load does about quantization.

    Args:
        config: The model's configuration.
        checkpoint: What the files hold.
        options: The call's wishes.
        dtype: What plain weights are loaded as; None keeps each one's own.

    Raises:
        ArgumentError: the call asks for another scheme than the files are in.
        NotYetError: the files were quantized by another library.
    """
    wanted = requested_quantization(
        options.quantization_config, load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit
    )
    stored = stored_quantization(
        getattr(config, "quantization_config", None), where=config.name_or_path or "config"
    )
    if stored is not None and checkpoint.format != "none":
        if wanted is not None and wanted.quant_method != stored.quant_method:
            raise ArgumentError(
                "The checkpoint is quantized already",
                where="quantization_config",
                expected=stored.quant_method,
                found=wanted.quant_method,
                mend="Leave the argument out, or load it, call dequantize(), save it and load that.",
            )
        if wanted is not None and wanted.compute_dtype is not None:
            stored = dataclasses.replace(stored, compute_dtype=wanted.compute_dtype)
        return Restoring(stored, dtype)
    if wanted is None:
        return Quantizer(dtype)
    is_mapped = options.state_dict is None and not options.disable_mmap
    return (Blocks if wanted.quant_method == "gguf" else Rounding)(wanted, dtype, is_mapped=is_mapped)


def _as_stored(step: LoadStep) -> LoadStep:
    """Ask for a view of the file where there can be one, and for float32 otherwise."""
    plain = step.source.dtype in DTYPES and DTYPES[step.source.dtype].is_floating
    return dataclasses.replace(step, dtype=step.source.dtype if plain and step.apply is None else "float32")


def _let_go(view: torch.Tensor) -> None:
    """Give the pages of a weight back that has been read once and will not be read again.

    Args:
        view: Of a private map; nothing else may look at its bytes any more.
    """
    if sys.platform != "linux":
        return
    first = -(-view.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (view.data_ptr() + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        release_pages(first, length)


def _users(plan: LoadPlan) -> dict[str, tuple[str, ...]]:
    """Return which modules take each step's weight, tied ones too."""
    users: dict[str, tuple[str, ...]] = {}
    for key in (*(step.key for step in plan.steps), *plan.ties):
        owner = plan.ties.get(key, key)
        path, _, name = key.rpartition(".")
        users[owner] = (*users.get(owner, ()), path) if name == "weight" else ()
    return users


def _keepable(step: LoadStep, modules: list[nn.Module]) -> bool:
    blocks = step.source.dtype in DEQUANTIZABLE and BLOCK_TYPES[step.source.dtype].elements > 1
    layers = all(type(module) in (nn.Linear, Conv1D, nn.Embedding) for module in modules)
    return blocks and layers and (step.apply is None or isinstance(step.apply, RowUnpermute | Transpose))


def _as_rows(step: LoadStep) -> LoadStep:
    """Return a step that reads packed rows as bytes; only their order may change."""
    info = step.source
    rows = dataclasses.replace(info, dtype="uint8", shape=(info.shape[0], info.nbytes // info.shape[0]))
    return LoadStep(step.key, rows, "uint8", None, rows.shape)


def _module_ties(model: Any) -> dict[str, str]:
    return {
        alias.removesuffix(".weight"): owner.removesuffix(".weight")
        for alias, owner in model.ties().items()
        if alias.endswith(".weight") and owner.endswith(".weight")
    }


def _block_types(model: nn.Module) -> dict[str, str]:
    return {path: leaf.scheme for path, leaf in quantized_leaves(model).items()}
