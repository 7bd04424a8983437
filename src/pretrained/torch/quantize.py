# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are quantized, and putting leaves where they were."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pretrained.core.integer_form import IntegerForm
from pretrained.core.quantization import QuantizationConfig, names_module
from pretrained.errors import ArgumentError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized import (
    IntegerLeaf,
    QuantizedEmbedding,
    QuantizedLeaf,
    QuantizedLinear,
)
from pretrained.torch.quantized_blocks import GgufEmbedding, GgufLeaf, GgufLinear
from pretrained.torch.stored_leaf import StoredLeaf

logger = logging.getLogger(__name__)

# Names of a leaf's tensors beside `weight`.
SCALES = ("weight_scale", "weight_zero", "weight_order")


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


def integer_leaf(
    module: nn.Module, config: QuantizationConfig | IntegerForm, dtype: torch.dtype
) -> IntegerLeaf:
    """Return an empty int8 or int4 leaf for a layer, on the meta device; it shares the layer's bias.

    Args:
        module: A `Linear`, `Conv1D` or `Embedding`.
        config: Its scheme or form.
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
    return dressed(leaf, module)


def gguf_leaf(module: nn.Module, block_type: str, dtype: torch.dtype) -> GgufLeaf:
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
    return dressed(leaf, module)


def dressed(leaf: Any, module: nn.Module) -> Any:
    """Return a leaf with the bias of the layer that it stands for.

    Args:
        leaf: Empty.
        module: That layer.
    """
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
    ties |= {alias: owner for alias, owner in _shared(model).items() if alias not in ties}
    for alias, owner in list(ties.items()):
        path, _, name = owner.rpartition(".")
        try:
            leaf = model.get_submodule(path)
        except AttributeError:
            continue
        if name == "weight" and isinstance(leaf, StoredLeaf):
            del ties[alias]
            for part in leaf.form.tensors:
                ties[f"{alias.removesuffix('weight')}{part}"] = f"{path}.{part}"
        elif name == "weight" and isinstance(leaf, IntegerLeaf):
            for scale in SCALES:
                if getattr(leaf, scale, None) is not None:
                    ties[f"{alias.removesuffix('weight')}{scale}"] = f"{path}.{scale}"
    return ties


def _shared(model: Any) -> dict[str, str]:
    """Return what a load found to be shared without a tie that says so."""
    shared: dict[str, str] = getattr(model, "_shared_weights", {})
    return shared


def module_ties(model: Any) -> dict[str, str]:
    """Return the ties between whole weights as module paths, alias -> owner.

    Args:
        model: With `ties`.
    """
    return {
        alias.removesuffix(".weight"): owner.removesuffix(".weight")
        for alias, owner in model.ties().items()
        if alias.endswith(".weight") and owner.endswith(".weight")
    }


def block_types_of(model: nn.Module) -> dict[str, str]:
    """Return the scheme of each quantized layer by path.

    Args:
        model: Any module.
    """
    return {path: leaf.scheme for path, leaf in quantized_leaves(model).items()}


def use_kernel_layouts(model: nn.Module) -> None:
    """Make resident 4-bit layers ready for this CPU's packed kernel.

    Args:
        model: Any module; layers on other devices stay as they are, and so do those moved by hooks, which
            are made ready at each call.
    """
    for leaf in quantized_leaves(model).values():
        if not isinstance(leaf, IntegerLeaf | GgufLinear) or leaf.weight.is_meta:
            continue
        if leaf._forward_pre_hooks:
            leaf.lay_out_at_call()
        else:
            leaf.use_kernel_layout()
