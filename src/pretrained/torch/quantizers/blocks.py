# SPDX-License-Identifier: Apache-2.0
"""Keeping GGML's blocks of a GGUF file packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrained.arch.gguf import RowUnpermute, Transpose
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.errors import ArgumentError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import block_types_of, gguf_leaf, put
from pretrained.torch.quantizers.base import Quantizing
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
        """Put leaves in, and read their weights as rows of bytes, as they lie in the file."""
        steps, users = [], _users(plan)
        for step in plan.steps:
            paths = users.get(step.key, ())
            modules = [model.get_submodule(path) for path in paths]
            if not paths or not _keepable(step, modules):
                steps.append(step)
                continue
            for path, module in zip(paths, modules, strict=True):
                leaf = gguf_leaf(module, step.source.dtype, TORCH_DTYPES[step.dtype])
                # A transposed layer keeps the file's order: the leaf multiplies the usual way round.
                if isinstance(step.apply, RowUnpermute):
                    leaf.lies_in_order(torch.from_numpy(step.apply(np.arange(leaf.shape[0]))))
                put(model, path, leaf)
            steps.append(_as_rows(step))
        return dataclasses.replace(plan, steps=tuple(steps)), read

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Allow the disk: blocks are used as they lie in their file."""

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
    """Return a step that reads packed rows as bytes, in the file's order."""
    info = step.source
    rows = dataclasses.replace(info, dtype="uint8", shape=(info.shape[0], info.nbytes // info.shape[0]))
    return LoadStep(step.key, rows, "uint8", None, rows.shape)
