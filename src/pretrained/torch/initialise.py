# SPDX-License-Identifier: Apache-2.0
"""New weights: initialised once, only where nothing was loaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from pretrained.torch.nn import Conv1D, RMSNorm


def initialise_module(module: nn.Module, *, std: float) -> None:
    """Initialise a stock layer as the published code of these families does.

    Weights are normal with mean 0, biases 0, norm scales 1, the padding row of an embedding 0.

    Args:
        module: The layer; others are left alone.
        std: Standard deviation of weights.
    """
    if isinstance(module, nn.Linear | Conv1D):
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
    elif isinstance(module, nn.LayerNorm | RMSNorm):
        nn.init.ones_(module.weight)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)


def initialise(model: Any) -> None:
    """Initialise every module of a model that a model inside has not initialised already.

    Args:
        model: A `PreTrainedModel` whose weights have storage.
    """
    for module in model.modules():
        if not getattr(module, "_initialised", False):
            model._init_weights(module)
            module._initialised = True


def initialise_missing(model: Any, keys: Collection[str]) -> None:
    """Initialise single weights and leave their loaded neighbours as they are.

    Args:
        model: A `PreTrainedModel` whose weights have storage.
        keys: Names of the parameters (or saved buffers) to initialise.
    """
    owners: dict[str, set[str]] = {}
    for key in keys:
        path, _, name = key.rpartition(".")
        owners.setdefault(path, set()).add(name)
    for path, names in owners.items():
        module = model.get_submodule(path)
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        loaded = [(tensor, tensor.detach().clone()) for name, tensor in own if name not in names]
        model._init_weights(module)
        with torch.no_grad():
            for tensor, values in loaded:
                tensor.copy_(values)
