# SPDX-License-Identifier: Apache-2.0
"""Training in less memory: layers that keep their inputs only and are run again in the backward pass.

Chen et al. 2016, arXiv:1604.06174. Every stack runs its layers through `CheckpointingMixin.call_layer`, so
that this room is the only one that knows how.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrained.errors import ArgumentError, NotYetError, UnknownArgumentError, did_you_mean
from pretrained.torch.cache import Cache

logger = logging.getLogger(__name__)

# What torch's function takes beside the layer and its inputs.
_SIGNATURE = frozenset(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"}
_OPTIONS = _SIGNATURE | {"preserve_rng_state"}


@dataclass(frozen=True, slots=True)
class Recomputation:
    """Which layers are run again, and how.

    Attributes:
        every_n_layers: Layers 0, n, 2 n, ... of a stack are.
        options: Arguments of `torch.utils.checkpoint.checkpoint`.
    """

    every_n_layers: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: {"use_reentrant": False})


class CheckpointingMixin:
    """Gives a model the switches of gradient checkpointing, and its stacks the way to run a layer.

    Attributes:
        supports_gradient_checkpointing: Whether the class runs its layers through `call_layer`.
    """

    supports_gradient_checkpointing: ClassVar[bool] = False

    # On each model and stack: None while layers keep what they compute.
    _recomputation: Recomputation | None = None
    _input_hooks: list[Any] | None = None

    # -- switches ------------------------------------------------------------------------------

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keep only the layers' inputs while training, and run each layer again in the backward pass.

        Gradients are those of the plain run, bit for bit, dropout included. The time of about one more
        forward pass is paid.

        Args:
            gradient_checkpointing_kwargs: Of `torch.utils.checkpoint.checkpoint`: `use_reentrant` (False
                here), `preserve_rng_state`, `context_fn`, `determinism_check`, `debug`, ...

        Raises:
            ArgumentError: the class does not support it.
            UnknownArgumentError: torch's function has no such argument.
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Let layers keep what they compute again."""
        for module in self._checkpointing_modules():
            module._recomputation = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layers are run again in the backward pass."""
        return any(module._recomputation is not None for module in self._checkpointing_modules())

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do what `gradient_checkpointing_enable` does, for every layer or for some; the newer name.

        Args:
            activation_checkpointing_kwargs: As there.
            every_n_layers: 1 for all layers; n for the layers 0, n, 2 n, ... of each stack, which keeps
                more and costs less time.
            offload: Keep the inputs in the host's memory; not offered yet.

        Raises:
            ArgumentError: the class does not support it, or `every_n_layers` is not positive.
            UnknownArgumentError: torch's function has no such argument.
            NotYetError: `offload=True`.
        """
        if not self.supports_gradient_checkpointing:
            raise ArgumentError(
                f"{type(self).__name__} does not support gradient checkpointing",
                where="supports_gradient_checkpointing",
                mend="A class that runs its layers through self.call_layer(index, layer, ...) may set it to "
                "True.",
            )
        if offload:
            raise NotYetError(
                "offload=True is not offered yet",
                where="offload",
                mend="Run the training step inside torch.autograd.graph.save_on_cpu().",
            )
        if isinstance(every_n_layers, bool) or not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ArgumentError(
                "every_n_layers must be positive",
                where="every_n_layers",
                expected="a whole number from 1 on",
                found=repr(every_n_layers),
            )
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for name in options:
            if name not in _OPTIONS:
                raise UnknownArgumentError(
                    f"torch.utils.checkpoint.checkpoint has no argument {name!r}",
                    where="gradient_checkpointing_kwargs",
                    expected=", ".join(sorted(_OPTIONS)),
                    mend=did_you_mean(name, _OPTIONS) or None,
                )
        for module in self._checkpointing_modules():
            module._recomputation = Recomputation(every_n_layers, options)

    def activation_checkpointing_disable(self) -> None:
        """Do the same as `gradient_checkpointing_disable`; the newer name."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """The same as `is_gradient_checkpointing`; the newer name."""
        return self.is_gradient_checkpointing

    def _checkpointing_modules(self) -> list[CheckpointingMixin]:
        return [module for module in self.modules() if isinstance(module, CheckpointingMixin)]  # type: ignore[attr-defined]

    # -- inputs that need gradients ------------------------------------------------------------

    def enable_input_require_grads(self) -> None:
        """Let what the token embeddings give out require gradients, though they are frozen themselves.

        Reentrant checkpointing gives a layer's weights no gradients where none of its inputs needs one, as
        with frozen embeddings under adapters. The default kind does without this.
        """
        if self._input_hooks is not None:
            return
        embeddings: dict[int, nn.Module] = {}
        for module in self._checkpointing_modules():
            # Each stack has a module of its own, even where the weight is shared (T5).
            found = module.get_input_embeddings()  # type: ignore[attr-defined]
            embeddings.setdefault(id(found), found)
        self._input_hooks = [found.register_forward_hook(_require_grad) for found in embeddings.values()]

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        for hook in self._input_hooks or ():
            hook.remove()
        self._input_hooks = None

    # -- for stacks ----------------------------------------------------------------------------

    @property
    def _recomputes(self) -> bool:
        return self._recomputation is not None and self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]

    def call_layer(self, index: int, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a layer, in the way that is asked for.

        Args:
            index: Its place in the stack.
            layer: It.
            *args: Its arguments.
            **kwargs: The same by name. A layer that is given a cache runs as ever, for a second run would
                write there a second time.
        """
        how = self._recomputation
        if how is None or not self._recomputes or index % how.every_n_layers:
            return layer(*args, **kwargs)
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return layer(*args, **kwargs)
        if how.options["use_reentrant"]:
            # That kind takes no arguments by name.
            return checkpoint(functools.partial(layer, **kwargs), *args, **how.options)
        return checkpoint(layer, *args, **how.options, **kwargs)

    def cache_choice(self, use_cache: bool | None, past_key_values: Any = None) -> bool | None:
        """Return a call's `use_cache`, or False while layers are run again: they would fill a cache twice.

        Args:
            use_cache: The call's choice.
            past_key_values: The call's cache. With one the layers run as ever, and the choice stands.
        """
        if not self._recomputes:
            return use_cache
        if past_key_values is not None:
            self._say_once("past_key_values were given: this forward keeps all activations, as without "
                           "gradient checkpointing, for a cache must not be written twice.")  # fmt: skip
            return use_cache
        if use_cache:
            self._say_once("use_cache=True has no effect while training with gradient checkpointing.")
        return False

    def _say_once(self, message: str) -> None:
        said: dict[str, bool] = self.warnings_issued  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or said.get(message):
            return
        said[message] = True
        logger.warning("%s", message)


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
