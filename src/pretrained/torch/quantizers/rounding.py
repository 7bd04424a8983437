# SPDX-License-Identifier: Apache-2.0
"""Quantizing weights while they stream in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from pretrained.core.dtypes import DTYPES
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.nn import Conv1D
from pretrained.torch.offload_folder import Form
from pretrained.torch.quantize import integer_leaf, module_ties, put, select
from pretrained.torch.quantizers.base import Quantizing, copy_form, let_go
from pretrained.torch.rounding import quantize
from pretrained.torch.tensors import TORCH_DTYPES, Read


class Rounding(Quantizing):
    """Quantizes each weight when it is read, a piece at a time, straight from the mapped file.

    Attributes:
        scratch: Reads weights that are decoded first and dropped then, into memory that they share with no
            weight that stays; None where weights are in no file.
    """

    scratch: Read | None = None

    def __init__(self, config: QuantizationConfig, dtype: str | None, *, is_mapped: bool = False) -> None:
        super().__init__(config, dtype, is_mapped=is_mapped)
        self._forms: dict[str, Form] = {}

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Put leaves in, and read their weights as `Packed`."""
        chosen = select(model, self.config)
        read_keys = {step.key: step for step in plan.steps}
        owners = module_ties(model)
        schemes: dict[str, tuple[QuantizationConfig, bool, bool]] = {}
        for path, config in chosen.items():
            step = read_keys.get(f"{owners.get(path, path)}.weight")
            # Weights that will be initialised, or that stay float32 in a half-precision model.
            if step is None or (self.dtype is not None and step.dtype != self.dtype):
                continue
            module = model.get_submodule(path)
            leaf = integer_leaf(module, config, TORCH_DTYPES[step.dtype])
            put(model, path, leaf)
            for_kernel = self.is_resident and leaf.takes_kernel_layout()
            schemes[f"{path}.weight"] = (config, isinstance(module, Conv1D), for_kernel)
            self._forms[f"{path}.weight"] = copy_form(path, leaf)

        def read_packed(step: LoadStep, device: torch.device) -> Any:
            if step.key not in schemes:
                return read(step, device)
            config, transposed, for_kernel = schemes[step.key]
            for_kernel = for_kernel and device.type == "cpu"
            stored = as_stored(step)
            used = read if self.scratch is None or (stored.is_view and self.is_mapped) else self.scratch
            values = used(stored, torch.device("cpu"))
            packed = quantize(values, config, key=step.key, transposed=transposed, for_kernel=for_kernel)
            if self.is_mapped and stored.is_view:
                let_go(values)
            self.errors[step.key.removesuffix(".weight")] = packed.error
            return packed.to(device)

        return plan, read_packed

    def forms(self, steps: Iterable[LoadStep]) -> dict[str, Form]:
        """Return integers and scales of the weights that this load quantizes."""
        return {step.key: self._forms[step.key] for step in steps if step.key in self._forms}

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Allow the disk: what is quantized goes there through the offload folder."""


def as_stored(step: LoadStep) -> LoadStep:
    """Ask for a view of the file where there can be one, and for float32 otherwise.

    Args:
        step: Of a weight that is to be quantized.
    """
    plain = step.source.dtype in DTYPES and DTYPES[step.source.dtype].is_floating
    return dataclasses.replace(step, dtype=step.source.dtype if plain and step.apply is None else "float32")
