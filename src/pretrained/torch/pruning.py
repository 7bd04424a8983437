# SPDX-License-Identifier: Apache-2.0
"""Cutting heads out of attention: what a model without them computes is what it computes with them silenced.

An attention says in `HeadParts` which of its layers hold a slice for each head. A cut makes every smaller
tensor first and puts them in place at the end, so that an error leaves the model as it was. A model that is
built from a config with `pruned_heads` is small from the start; nothing is replayed on a load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrained.arch.pruning import heads_kept, merged_heads
from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized import QuantizedLeaf

Change = tuple[Any, str, Any]
"""An object, an attribute of it, and the value that it gets."""


@dataclass(frozen=True, slots=True)
class HeadParts:
    """The layers of one attention that hold a slice for each head.

    Attributes:
        queries: Layers whose outputs are the query heads, one after the other.
        keys_values: Layers whose outputs are the key-value heads.
        output: The layer whose inputs are what the query heads found.
        size: Channels of a head.
        owner: The module that counts heads.
        counts: From the heads that are left to the owner's attributes that depend on them.
        blocks: How often the outputs of `queries` go through all heads; 3 where one layer makes queries,
            keys and values.
    """

    queries: Sequence[nn.Module]
    keys_values: Sequence[nn.Module]
    output: nn.Module
    size: int
    owner: nn.Module
    counts: Callable[[tuple[int, ...]], Mapping[str, Any]]
    blocks: int = 1


class HeadPruningMixin:
    """Gives a model `prune_heads`; its headless class says in `prunable_attentions` where the heads are."""

    config: PreTrainedConfig

    def prunable_attentions(self) -> Sequence[Any]:
        """Return the attention of each layer, in order, each with a method `head_parts`; none by default."""
        base = self.base_model  # type: ignore[attr-defined]
        return () if base is self else base.prunable_attentions()

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Cut heads out of the layers' attention, for good: their weights are gone, and so is their work.

        `config.pruned_heads` lists them, so that a saved model loads again. What a head is called does not
        change when another one goes, and those that are gone already may be named again. Optimizers made
        before hold the weights that were there before.

        Args:
            heads_to_prune: Layer -> query heads. In a model where several share a key-value head
                (grouped-query attention) the heads of a group go together, and it goes with them. Of an
                encoder-decoder the encoder's heads are meant.

        Raises:
            ArgumentError: layers or heads that are not there, named twice, all of a layer, a part of a
                group; or weights that cannot be cut: quantized, placed, shared, or not this library's.
                Nothing has changed then.
        """
        attentions = self.prunable_attentions()
        if not attentions:
            raise ArgumentError(
                f"{type(self).__name__} has no heads that can be pruned",
                where="prune_heads",
                mend="A class of one's own says where they are by prunable_attentions().",
            )
        if self.__dict__.get("_dispatch") is not None:
            raise ArgumentError(
                "Heads are not cut out of a model that is placed over devices or the disk",
                where="prune_heads",
                mend="Load it without device_map, prune and save it, and load that with device_map.",
            )
        group = getattr(self.config, "group_size", 1)
        merged = merged_heads(self.config, heads_to_prune, group)
        changes: list[Change] = []
        with torch.no_grad():
            for layer in sorted(set(merged)):
                before, gone = heads_kept(self.config, layer), set(merged[layer])
                kept = tuple(head for head in before if head not in gone)
                if kept != before:
                    parts: HeadParts = attentions[layer].head_parts()
                    changes += _cuts(parts, before, kept, group, f"layer {layer}")
        _refuse_shared(self, changes)  # type: ignore[arg-type]
        if changes:
            _commit(self.config, merged, changes)


def _cuts(
    parts: HeadParts, before: tuple[int, ...], kept: tuple[int, ...], group: int, where: str
) -> Iterator[Change]:
    """Yield what changes in one attention; nothing is changed here."""
    places = [before.index(head) for head in kept]
    queries = _channels(places, parts.size, len(before), parts.blocks)
    for layer in parts.queries:
        yield from _cut(layer, queries, len(before) * parts.size * parts.blocks, where, outputs=True)
    groups = list(dict.fromkeys(place // group for place in places))
    shared = _channels(groups, parts.size, len(before) // group, 1)
    for layer in parts.keys_values:
        yield from _cut(layer, shared, len(before) // group * parts.size, where, outputs=True)
    results = _channels(places, parts.size, len(before), 1)
    yield from _cut(parts.output, results, len(before) * parts.size, where, outputs=False)
    for name, value in parts.counts(kept).items():
        yield parts.owner, name, value


def _channels(places: list[int], size: int, count: int, blocks: int) -> torch.Tensor:
    """Return the channels of some of `count` heads, in each of the blocks that go through all heads."""
    heads = torch.tensor(places)[:, None] * size + torch.arange(size)
    return (torch.arange(blocks)[:, None] * count * size + heads.flatten()).flatten()


def _cut(layer: Any, keep: torch.Tensor, size: int, where: str, *, outputs: bool) -> Iterator[Change]:
    """Yield what makes a dense layer keep some of its outputs, or of its inputs."""
    stored_in_out = isinstance(layer, Conv1D)
    _refuse_leaf(layer, size, where, outputs=outputs)
    axis = 1 if outputs == stored_in_out else 0
    yield layer, "weight", _selected(layer.weight, axis, keep)
    if outputs and layer.bias is not None:
        yield layer, "bias", _selected(layer.bias, 0, keep)
    names = ("nf", "nx") if stored_in_out else ("out_features", "in_features")
    yield layer, names[0 if outputs else 1], keep.numel()


def _selected(parameter: Any, axis: int, keep: torch.Tensor) -> nn.Parameter:
    keep = keep.to(parameter.device)
    smaller = nn.Parameter(parameter.detach().index_select(axis, keep), parameter.requires_grad)
    if parameter.grad is not None:
        smaller.grad = parameter.grad.index_select(axis, keep)
    return smaller


def _refuse_leaf(layer: Any, size: int, where: str, *, outputs: bool) -> None:
    """Raise where a layer is none whose weight can be cut, or of another size than the config says."""
    if isinstance(layer, QuantizedLeaf):
        raise ArgumentError(
            "Heads are not cut out of quantized weights",
            where=where,
            found=type(layer).__name__,
            mend="Prune the model before it is quantized, or call dequantize() first.",
        )
    plain = type(layer) in (nn.Linear, Conv1D) and type(layer._parameters.get("weight")) is nn.Parameter
    if not plain:
        raise ArgumentError(
            "Heads are cut out of plain dense layers only",
            where=where,
            expected="Linear or Conv1D with a weight of its own",
            found=f"{type(layer).__module__}.{type(layer).__name__}",
            mend="Take off adapters, parametrizations or sharding first (merge_and_unload, "
            "remove_parametrizations), and put them on again after.",
        )
    # Both kinds of layers are stored as a matrix; only the axes differ.
    axis = 1 if outputs == isinstance(layer, Conv1D) else 0
    if layer.weight.shape[axis] != size:
        raise ArgumentError(
            "The weights and config.pruned_heads do not agree",
            where=where,
            expected=f"{size} channels",
            found=int(layer.weight.shape[axis]),
            mend="Give each model a config of its own: copy.deepcopy(config).",
        )


def _refuse_shared(model: nn.Module, changes: list[Change]) -> None:
    """Raise where a weight that is cut is used under another name, too."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for owner, name, value in changes:
        if isinstance(value, nn.Parameter) and len(names.get(id(getattr(owner, name)), ())) > 1:
            raise ArgumentError(
                "A weight that several layers share cannot be cut for one of them",
                where=", ".join(names[id(getattr(owner, name))]),
            )


def _commit(config: PreTrainedConfig, merged: dict[int, list[int]], changes: list[Change]) -> None:
    """Put everything in place, or nothing."""
    before, done = dict(config.__dict__), []
    try:
        config.update({"pruned_heads": merged})
        for owner, name, value in changes:
            done.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
    except BaseException:
        for owner, name, value in reversed(done):
            setattr(owner, name, value)
        config.__dict__.clear()
        config.__dict__.update(before)
        raise
