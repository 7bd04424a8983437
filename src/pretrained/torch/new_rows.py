# SPDX-License-Identifier: Apache-2.0
"""Values for the rows that a table gains: near the mean of the rows it has, or as the class initialises.

A new row near the mean takes no more probability from the tokens that are there than one average token has:
by Jensen's inequality exp(h @ mean) is at most the mean of exp(h @ row) (Hewitt 2021, "Initializing new word
embeddings for pretrained language models"). The spread around it, `SPREAD` times the covariance of the old
rows, is the ecosystem's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from pretrained.errors import ArgumentError

SPREAD: Final = 1e-9
"""What the covariance of the old rows is multiplied with for the new ones."""

MOST_ROWS: Final = 4096
"""Old rows that the spread of a block of new ones is drawn from; bounds the work for large vocabularies."""

# Rows that are computed with at a time, so that a table in half precision is never widened whole.
_CHUNK: Final = 4096
_BLOCK: Final = 1024

Rows = Callable[[Any], torch.Tensor]
"""Returns rows of a table, by a slice or a tensor of numbers, as floats [rows, size]."""


def rows_near_mean(rows: Rows, total: int, count: int, *, where: str) -> torch.Tensor:
    """Draw rows from a normal distribution with the mean of a table and `SPREAD` times its covariance.

    A draw is the mean plus a random combination of centred old rows. Its covariance is that of those rows
    whatever they are: too few, equal, or dependent on each other, so nothing has to be decomposed, and no
    matrix of size x size is made. Of more than `MOST_ROWS` rows a random choice is combined, a new one for
    each block. The work is total * size for the mean and count * MOST_ROWS * size for the draws.

    Args:
        rows: Reads the table.
        total: Its rows.
        count: Rows to draw, from torch's generator of the CPU.
        where: The table's name, for errors.

    Returns:
        [count, size] on the table's device; float64 where the table is, otherwise float32.

    Raises:
        ArgumentError: no old row has only finite numbers. Those that have others are left out.
    """
    mean = _mean(rows, total, where)
    # What is drawn stands alone: a device's generator would give other rows for the same seed.
    made = torch.empty(count, len(mean), dtype=mean.dtype, device=mean.device)
    for start in range(0, count, _BLOCK):
        block = made[start : start + _BLOCK]
        chosen = torch.randperm(total)[:MOST_ROWS] if total > MOST_ROWS else torch.arange(total)
        centred = _wide(rows(chosen.to(mean.device))) - mean
        centred = centred[centred.isfinite().all(-1)]
        factors = torch.randn(len(block), len(centred), dtype=mean.dtype).to(mean.device)
        spread = (SPREAD / max(len(centred), 1)) ** 0.5
        block.copy_(torch.addmm(mean, factors, centred, alpha=spread))
    return made


def _mean(rows: Rows, total: int, where: str) -> torch.Tensor:
    count, mean = 0, None
    for start in range(0, total, _CHUNK):
        piece = _wide(rows(slice(start, min(start + _CHUNK, total))))
        piece = piece[piece.isfinite().all(-1)]
        # Sums of sums: one over a whole vocabulary would lose digits.
        part = piece.sum(0)
        mean = part if mean is None else mean + part
        count += len(piece)
    if mean is None or not count:
        raise ArgumentError(
            "No row of this table has only finite numbers, so new ones cannot be drawn from them",
            where=where,
            mend="Load a checkpoint that is whole, or pass mean_resizing=False.",
        )
    return mean / count


def _wide(values: torch.Tensor) -> torch.Tensor:
    values = values.detach()
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def rows_as_initialised(
    model: Any, module: nn.Module, count: int, *, axis: int, where: str
) -> dict[str, torch.Tensor]:
    """Return rows as `_init_weights` fills them in a layer that has just those.

    Args:
        model: Whose `_init_weights` it is.
        module: An `Embedding`, `Linear` or `Conv1D`; it is not changed.
        count: Rows.
        axis: Of the weight, the one that counts rows.
        where: The layer's name, for errors.

    Returns:
        ``weight`` and, where the layer has one, ``bias``: float32 on the CPU, the weight as the layer has it.

    Raises:
        ArgumentError: the class does not initialise such a layer.
    """
    twin: Any = copy.copy(module)
    old: Any = module.weight
    shape = [count, old.shape[1 - axis]] if axis == 0 else [old.shape[1 - axis], count]
    tensors = {"weight": torch.empty(shape)}
    if getattr(module, "bias", None) is not None:
        tensors["bias"] = torch.empty(count)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    twin._parameters = {
        name: nn.Parameter(tensors[name]) if name in tensors else None for name in module._parameters
    }
    for name in ("num_embeddings", "out_features", "nf"):
        if name in twin.__dict__:
            twin.__dict__[name] = count
    if "padding_idx" in twin.__dict__:
        # The padding row is an old one.
        twin.__dict__["padding_idx"] = None
    model._init_weights(twin)
    made = {name: twin._parameters[name].detach() for name in tensors}
    if any(bool(tensor.isnan().any()) for tensor in made.values()):
        raise ArgumentError(
            f"{type(model).__name__} does not say how to initialise a {type(module).__name__}",
            where=where,
            mend="Handle it in _init_weights(module), or pass mean_resizing=True.",
        )
    return made
