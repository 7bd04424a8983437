# SPDX-License-Identifier: Apache-2.0
"""Compiling a decoder layer by layer: one graph for all layers that are alike.

Compiling a whole step takes as many times longer as there are layers. Here the layers of a stand-in for the
model (`stand_in`) run one compiled function, which takes the layer as an argument: torch compiles it
for the first layer, finds that the compiled code fits the others, and keeps it on disk for later processes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pretrained.core.compiling import CompileConfig
from pretrained.torch.cache import Cache

# Model -> (what shapes and settings are) -> compiled function. These hold no weights; kept for the next call.
_COMPILED: WeakKeyDictionary[nn.Module, dict[Any, Callable[..., Any]]] = WeakKeyDictionary()


class _Slots:
    """The buffers of one layer of a static cache; what a compiled layer sees of the cache."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cache_position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values at their positions; return the buffers."""
        self.keys.index_copy_(2, cache_position, key_states)
        self.values.index_copy_(2, cache_position, value_states)
        return self.keys, self.values


class _CompiledLayer(nn.Module):
    """Stands where a layer was and runs it compiled.

    Args:
        layer: A stand-in for it whose attention counts itself as layer 0, like those of all others.
        index: Which it is.
        run: The compiled function.
    """

    def __init__(self, layer: nn.Module, index: int, run: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self._index, self._run = layer, index, run

    def forward(self, *args: Any) -> Any:
        """Run the layer, which sees its own part of the cache alone."""
        seen = (self._slots(arg) if isinstance(arg, Cache) else arg for arg in args)
        return self._run(self.layer, *seen)

    def _slots(self, cache: Cache) -> _Slots:
        layer = cache.layers[self._index]
        assert layer._keys is not None and layer._values is not None
        return _Slots(layer._keys, layer._values)


def stand_in(model: nn.Module, config: CompileConfig, shape: tuple[Any, ...]) -> Any:
    """Return a model with the same weights whose layers are compiled.

    Args:
        model: The model; it stays as it is.
        config: How to compile.
        shape: What sizes a step has: steps of the same ones share the compiled code.
    """
    options = tuple(sorted((config.options or {}).items()))
    key = (*shape, config.fullgraph, config.dynamic, config.backend, config.mode, str(options))
    made = _COMPILED.setdefault(model, {})
    if key not in made:
        made[key] = _compiled(config)
    found: Any = _twin(model, {})
    for stack in list(found.modules()):
        for name, layers in list(stack._modules.items()):
            if _are_layers(layers):
                wrapped = (_CompiledLayer(layer, i, made[key]) for i, layer in enumerate(layers))  # type: ignore[arg-type]
                stack._modules[name] = nn.ModuleList(wrapped)
                for module in layers.modules():  # type: ignore[union-attr]
                    if "layer_idx" in vars(module):
                        # Otherwise the compiled code would hold for this layer alone.
                        module.layer_idx = 0
    return found


def has_layers(model: nn.Module) -> bool:
    """Tell whether there is a stack of layers to compile.

    Args:
        model: Any model.
    """
    return any(_are_layers(module) for module in model.modules())


def _are_layers(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(any("layer_idx" in vars(part) for part in layer.modules()) for layer in module)
    )


def _twin(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a tree of modules with the same parameters and buffers."""
    if id(module) not in done:
        cls = type(module)
        found = done[id(module)] = cls.__new__(cls)
        found.__dict__.update(vars(module))
        found.__dict__["_parameters"] = dict(module._parameters)
        found.__dict__["_buffers"] = dict(module._buffers)
        found.__dict__["_modules"] = {
            name: child if child is None else _twin(child, done) for name, child in module._modules.items()
        }
    return done[id(module)]


def _compiled(config: CompileConfig) -> Callable[..., Any]:
    # Torch keeps compiled code beside the code object. With one of its own, no other model or bucket can use
    # up the number of variants that torch allows, or has to be looked through at each call.
    own = types.FunctionType(_run_layer.__code__.replace(), _run_layer.__globals__, "run_layer")
    run: Callable[..., Any] = torch.compile(
        own,
        fullgraph=config.fullgraph,
        dynamic=bool(config.dynamic),
        backend=config.backend,
        mode=config.mode,
        options=config.options,
    )
    return run


def _run_layer(layer: Any, *args: Any) -> Any:
    return layer(*args)


def hooked(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules with forward hooks.

    Args:
        model: Any model.
    """
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            yield path or type(module).__name__
