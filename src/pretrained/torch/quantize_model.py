# SPDX-License-Identifier: Apache-2.0
"""Quantizing a model whose weights are there, and turning a quantized one back into a plain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import integer_leaf, put, quantized_leaves, select, use_kernel_layouts
from pretrained.torch.quantized import IntegerLeaf
from pretrained.torch.rounding import quantize


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
