# SPDX-License-Identifier: Apache-2.0
"""Loading what a save wrote: integers and scales, or packed blocks, as they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.ggml import DEQUANTIZABLE
from pretrained.core.keys import match_keys
from pretrained.core.plan import LoadPlan
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import ArgumentError, WeightsError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import (
    SCALES,
    block_types_of,
    gguf_leaf,
    integer_leaf,
    module_ties,
    packed_keys,
    put,
)
from pretrained.torch.quantizers.base import Quantizing
from pretrained.torch.tensors import Read


class Restoring(Quantizing):
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
        names = [f"{path}.{name}" for path in modules for name in ("weight", *SCALES)]
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
        for one, other in module_ties(model).items():
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
            types, modules, base_prefix=model.base_model_prefix, ties=module_ties(model)
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
            self.config = dataclasses.replace(self.config, block_types=block_types_of(model))
        super().finish(model)
