# SPDX-License-Identifier: Apache-2.0
"""`QuantizedModelMixin`: what a model says and refuses once some of its layers are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from pretrained.core.dtypes import floating_dtype_name
from pretrained.errors import ArgumentError
from pretrained.torch.dispatch import check_room, disk_weights_of, modules_changed
from pretrained.torch.quantize import quantized_leaves
from pretrained.torch.quantize_model import dequantize_model
from pretrained.torch.quantized import QuantizedLeaf
from pretrained.torch.quantized_blocks import GgufLeaf, GgufLinear


class QuantizedModelMixin:
    """Stands before `nn.Module`, whose casts it refuses where they would not do what they say."""

    @property
    def is_quantized(self) -> bool:
        """Whether any layer holds a quantized weight."""
        return any(isinstance(module, QuantizedLeaf) for module in self.modules())  # type: ignore[attr-defined]

    @property
    def quantization_method(self) -> str | None:
        """``"int8"``, ``"int4"`` or ``"gguf"``; None for a plain model."""
        if not self.is_quantized:
            return None
        config = getattr(self.config, "quantization_config", None) or {}  # type: ignore[attr-defined]
        return config.get("quant_method")  # type: ignore[no-any-return]

    def dequantize(self, dtype: torch.dtype | str | None = None) -> Self:
        """Turn the model back into a plain one, in place.

        The weights keep what quantization made of them; what was lost stays lost. Those on disk are read in.

        Args:
            dtype: Of the whole model; None gives quantized layers the one they would have been loaded as.

        Returns:
            The model itself.

        Raises:
            ArgumentError: the model is not quantized.
            PlacementError: weights are on disk, and the plain ones do not fit into memory; nothing has
                changed then.
        """
        if not self.is_quantized:
            raise ArgumentError(f"{type(self).__name__} is not quantized", where="dequantize")
        name = None if dtype is None else floating_dtype_name(str(dtype))
        wanted = None if name is None else getattr(torch, name)
        if disk_weights_of(self) is not None:  # type: ignore[arg-type]
            sizes = (leaf.num_weights * (wanted or leaf.logical_dtype).itemsize for leaf in _owners(self))
            check_room(sum(sizes), "dequantize")
        dequantize_model(self, wanted)
        modules_changed(self)  # type: ignore[arg-type]
        self.config.__dict__.pop("quantization_config", None)  # type: ignore[attr-defined]
        return self if name is None else self.to(getattr(torch, name))

    # -- facts ---------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating parameter (or buffer) that is not a quantized layer's scale."""
        if not self.is_quantized:
            return super().dtype  # type: ignore[misc,no-any-return]
        leaves = quantized_leaves(self)  # type: ignore[arg-type]
        scales = {id(p) for leaf in leaves.values() for name, p in leaf.named_parameters() if name != "bias"}
        plain = (p.dtype for p in self.parameters() if id(p) not in scales and p.is_floating_point())  # type: ignore[attr-defined]
        return next(plain, next(iter(leaves.values())).logical_dtype)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters that the model stands for, tied ones once.

        Args:
            only_trainable: Leave out those that need no gradient, as quantized ones do.
            exclude_embeddings: Leave out the weights of embeddings.
        """
        count: int = super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        if not self.is_quantized:
            return count
        for leaf in _owners(self):
            stored = [value for name, value in leaf.named_parameters() if name != "bias"]
            # The plain count has taken these for parameters, unless it was told not to.
            count -= 0 if only_trainable else sum(value.numel() for value in stored)
            embeds = exclude_embeddings and not hasattr(leaf, "in_features")
            count += 0 if only_trainable or embeds else leaf.num_weights
        return count

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters as they are stored, tied ones counted once.

        Args:
            return_buffers: Count buffers too.
        """
        nbytes: int = super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        leaves = [leaf for leaf in _owners(self) if not isinstance(leaf, GgufLeaf)]
        # A tied head on GGML's blocks has a copy for the kernel, and its embedding none.
        leaves += [module for module in self.modules() if isinstance(module, GgufLinear)]  # type: ignore[attr-defined]
        return nbytes + sum(leaf.hidden_nbytes for leaf in leaves)

    # -- values and gradients ------------------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Set the weights, as `torch.nn.Module.load_state_dict` does.

        Args:
            state_dict: Of a model in the same form: quantized layers take integers and scales.
            strict: As torch has it.
            assign: As torch has it.

        Raises:
            ArgumentError: plain weights for quantized layers; nothing has changed then.
        """
        for path, leaf in quantized_leaves(self).items():  # type: ignore[arg-type]
            given, held = state_dict.get(f"{path}.weight"), leaf._parameters.get("weight")
            if (
                given is not None
                and held is not None
                and (given.dtype, given.shape) != (held.dtype, held.shape)
            ):
                raise ArgumentError(
                    "The model is quantized, and the state dict is not, or in another scheme",
                    where=f"{path}.weight",
                    expected=f"{held.dtype} {list(held.shape)}",
                    found=f"{given.dtype} {list(given.shape)}",
                    mend="Quantize it: from_pretrained(None, config=..., state_dict=..., quantization_config="
                    "...); or call dequantize() on the model first.",
                )
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set whether all weights are trained, as `torch.nn.Module.requires_grad_` does.

        Args:
            requires_grad: False freezes; True is refused for a quantized model.

        Raises:
            ArgumentError: integers cannot be trained; nothing has changed then.
        """
        if requires_grad and self.is_quantized:
            raise ArgumentError(
                "The integers of a quantized model cannot be trained",
                where="requires_grad_",
                mend="Call it on the modules that are to be trained, or call dequantize() first.",
            )
        return super().requires_grad_(requires_grad)  # type: ignore[misc,no-any-return]

    # -- casts ---------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model, or cast it; a quantized one only moves.

        Args:
            *args: As `torch.nn.Module.to` has them.
            **kwargs: The same.

        Raises:
            ArgumentError: a dtype for a quantized model.
        """
        if self.is_quantized and torch._C._nn._parse_to(*args, **kwargs)[1] is not None:
            self._refuse_cast("to(dtype)")
        return super().to(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def half(self) -> Self:
        """Cast to float16; refused for a quantized model."""
        self._refuse_cast("half()")
        return super().half()  # type: ignore[misc,no-any-return]

    def float(self) -> Self:
        """Cast to float32; refused for a quantized model."""
        self._refuse_cast("float()")
        return super().float()  # type: ignore[misc,no-any-return]

    def bfloat16(self) -> Self:
        """Cast to bfloat16; refused for a quantized model."""
        self._refuse_cast("bfloat16()")
        return super().bfloat16()  # type: ignore[misc,no-any-return]

    def double(self) -> Self:
        """Cast to float64; refused for a quantized model."""
        self._refuse_cast("double()")
        return super().double()  # type: ignore[misc,no-any-return]

    def type(self, dst_type: Any) -> Self:
        """Cast to a tensor type; refused for a quantized model.

        Args:
            dst_type: As `torch.nn.Module.type` has it.
        """
        self._refuse_cast("type()")
        return super().type(dst_type)  # type: ignore[misc,no-any-return]

    def _refuse_cast(self, call: str) -> None:
        if self.is_quantized:
            name = self.__class__.__name__
            raise ArgumentError(
                f"A quantized model cannot be cast: its integers have no other dtype ({name}.{call})",
                where=call,
                mend="Pass dtype= to from_pretrained for what is not quantized, or call dequantize() first.",
            )


def _owners(model: Any) -> list[QuantizedLeaf]:
    """Return the quantized layers, one of each group that shares its weight."""
    found: dict[int, QuantizedLeaf] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLeaf):
            found.setdefault(id(module.weight), module)
    return list(found.values())
