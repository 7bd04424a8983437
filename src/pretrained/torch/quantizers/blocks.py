# SPDX-License-Identifier: Apache-2.0
"""Keeping GGML's blocks of a GGUF file packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from pretrained.arch.gguf import RowUnpermute, Transpose
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.errors import ArgumentError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import block_types_of, gguf_leaf, put
from pretrained.torch.quantizers.base import Quantizing, let_go
from pretrained.torch.tensors import TORCH_DTYPES, Read


class Blocks(Quantizing):
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
                let_go(rows)
            return ordered

        return dataclasses.replace(plan, steps=tuple(steps)), read_rows

    def finish(self, model: Any) -> None:
        """Note the type of each layer in the config: the bytes alone do not tell."""
        self.config = dataclasses.replace(self.config, block_types=block_types_of(model))
        super().finish(model)


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
