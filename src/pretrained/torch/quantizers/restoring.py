# SPDX-License-Identifier: Apache-2.0
"""Loading what a save wrote: integers and scales, or packed blocks, as they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.ggml import DEQUANTIZABLE
from pretrained.core.integer_form import IntegerForm
from pretrained.core.keys import match_keys
from pretrained.core.plan import LoadPlan
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
from pretrained.torch.quantized import IntegerLeaf
from pretrained.torch.quantizers.base import Quantizing
from pretrained.torch.tensors import Read

_SCALE_DTYPES = ("bfloat16", "float16", "float32")


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
        self._check_method(leaves, checkpoint)
        for path, leaf in leaves.items():
            put(model, path, leaf)

    def _check_method(self, leaves: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Raise where the config names a width that no layer has: one of the two is of another model."""
        bits = {"int8": 8, "int4": 4}.get(self.config.quant_method)
        if self.config.quant_method == "int4" and (
            self.config.quantize_head or self.config.quantize_embeddings
        ):
            return  # those have 8 bits, and may be all that there is
        held = sorted({leaf.form.bits for leaf in leaves.values() if isinstance(leaf, IntegerLeaf)})
        if bits is not None and bits not in held:
            raise WeightsError(
                "The config and the files name different quantizations",
                where=checkpoint.files[0] if checkpoint.files else "state_dict",
                expected=self.config.quant_method,
                found=" and ".join(f"int{number}" for number in held),
                mend="Correct quant_method in config.json, or fetch the files that belong to it.",
            )

    def _integer_leaves(
        self, model: Any, modules: Mapping[str, nn.Module], checkpoint: Checkpoint
    ) -> dict[str, Any]:
        names = [f"{path}.{name}" for path in modules for name in ("weight", *SCALES)]
        found = match_keys(
            checkpoint.tensors, names, base_prefix=model.base_model_prefix, rules=model.key_rules
        ).sources
        leaves: dict[str, Any] = {}
        for path, module in modules.items():
            if f"{path}.weight_scale" not in found or f"{path}.weight" not in found:
                continue
            tensors = {
                name: checkpoint.tensors[found[f"{path}.{name}"]]
                for name in ("weight", *SCALES)
                if f"{path}.{name}" in found
            }
            leaves[path] = integer_leaf(module, self._form(tensors), self.torch_dtype)
        for one, other in module_ties(model).items():
            for here, there in ((one, other), (other, one)):
                if there in leaves and here not in leaves and here in modules:
                    leaves[here] = integer_leaf(modules[here], leaves[there].form, self.torch_dtype)
        return leaves

    def _form(self, tensors: Mapping[str, TensorInfo]) -> IntegerForm:
        """Read a layer's form off its tensors."""
        weight, scale = tensors["weight"], tensors["weight_scale"]
        zero = tensors.get("weight_zero")
        bits = {"int8": 8, "uint8": 4}.get(weight.dtype, 0)
        if bits and len(weight.shape) == 2 and scale.dtype in _SCALE_DTYPES and 0 not in scale.shape:
            columns = weight.shape[1] * 8 // bits
            groups = scale.shape[1] if len(scale.shape) == 2 else 1
            form = IntegerForm(
                bits=bits,
                group_size=None if len(scale.shape) == 1 else columns // groups,
                zero=None if zero is None else "offset" if zero.dtype == scale.dtype else "point",
                scale_dtype=scale.dtype,
                is_ordered="weight_order" in tensors,
                compute_dtype=self.config.compute_dtype,
            )
            expected = form.tensors((weight.shape[0], columns))
            if all(
                name in tensors and (tensors[name].shape, tensors[name].dtype) == expected[name]
                for name in expected
            ):
                return form
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
