# SPDX-License-Identifier: Apache-2.0
"""Heads of attention that are cut out: what a config may say, which are left, what a call may ask for.

Configs keep the number of heads that the architecture was made with and list what is gone, as transformers 4
wrote it: ``"pruned_heads": {"0": [1, 2]}``, layer -> heads. Heads are numbered as before any cut.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError, ConfigError


def heads_left(config: PreTrainedConfig, layer: int) -> int:
    """Return how many query heads a layer has, pruned ones not counted.

    Args:
        config: With `num_attention_heads`, under any spelling.
        layer: Index of the block.
    """
    return int(config.num_attention_heads) - len(set(config.pruned_heads.get(layer, ())))


def heads_kept(config: PreTrainedConfig, layer: int) -> tuple[int, ...]:
    """Return the query heads that a layer still has, in order, by their first numbers.

    Args:
        config: With `num_attention_heads`, under any spelling.
        layer: Index of the block.
    """
    gone = set(config.pruned_heads.get(layer, ()))
    return tuple(head for head in range(config.num_attention_heads) if head not in gone)


def check_pruned_heads(config: PreTrainedConfig, group: int = 1) -> None:
    """Raise `ConfigError` where `pruned_heads` names layers or heads that are not there, or leaves none.

    Args:
        config: With `num_hidden_layers` and `num_attention_heads`, under any spelling.
        group: Query heads that share one key-value head, and so go together.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    for layer, pruned in config.pruned_heads.items():
        # No list of all heads is made here: a config may claim any number of them.
        if not 0 <= layer < layers or not all(0 <= head < heads for head in pruned):
            raise ConfigError(
                "pruned_heads names a head that the model does not have",
                where=f"pruned_heads[{layer}]",
                expected=f"layers below {layers}, heads below {heads}",
                found=pruned,
            )
        if len(set(pruned)) == heads:
            raise ConfigError(
                "pruned_heads leaves a layer without any head",
                where=f"pruned_heads[{layer}]",
                found=pruned,
            )
        if _cut_groups(pruned, group):
            raise ConfigError(
                "pruned_heads cuts through groups of heads that share a key-value head",
                where=f"pruned_heads[{layer}]",
                expected=f"whole groups of {group} query heads",
                found=pruned,
            )


def merged_heads(config: PreTrainedConfig, asked: Any, group: int = 1) -> dict[int, list[int]]:
    """Return what is pruned after a call of `prune_heads`: what was before, and what it asks for.

    Args:
        config: With `num_hidden_layers` and `num_attention_heads`, under any spelling.
        asked: Layer -> heads to cut out. Those that are gone already stay so.
        group: Query heads that share one key-value head.

    Raises:
        ArgumentError: it asks for layers or heads that are not there, twice for one, for all of a layer, or
            for a part of a group.
    """
    if not isinstance(asked, Mapping):
        raise ArgumentError(
            "Heads are pruned by layer",
            where="prune_heads",
            expected="a mapping such as {0: [1, 2]}",
            found=f"{type(asked).__name__}",
        )
    merged = {layer: sorted(set(heads)) for layer, heads in config.pruned_heads.items()}
    for key, heads in asked.items():
        layer = _number(key, "prune_heads", config.num_hidden_layers, "layers")
        if not isinstance(heads, list | tuple | set | frozenset | range):
            raise ArgumentError(
                "The heads of a layer are a list",
                where=f"prune_heads[{layer}]",
                expected="whole numbers such as [1, 2]",
                found=repr(heads)[:200],
            )
        where = f"prune_heads[{layer}]"
        wanted = [_number(head, where, config.num_attention_heads, "heads") for head in heads]
        if len(set(wanted)) < len(wanted):
            raise ArgumentError("A head is named twice", where=where, found=wanted)
        after = sorted({*merged.get(layer, ()), *wanted})
        if wanted:
            _check_left(config, where, wanted, after, group)
            merged[layer] = after
    return {layer: heads for layer, heads in sorted(merged.items()) if heads}


def _check_left(
    config: PreTrainedConfig, where: str, wanted: list[int], after: list[int], group: int
) -> None:
    heads = config.num_attention_heads
    if 1 < group == heads and len(after) < heads:
        raise ArgumentError(
            "All query heads of this model share one key-value head (multi-query attention), which no part "
            "of them can take along: there is no group of heads to cut out",
            where=where,
            found=wanted,
            mend="Prune a model with several key-value heads.",
        )
    if len(after) == heads:
        raise ArgumentError(
            "That would leave the layer without any head",
            where=where,
            expected=f"at most {heads - group} of its {heads} heads to go",
            found=wanted,
            mend=f"Keep one {'head' if group == 1 else f'group of {group} heads'} at least.",
        )
    cut = _cut_groups(after, group)
    if cut:
        first = cut[0] * group
        raise ArgumentError(
            f"Query heads {first} to {first + group - 1} share key-value head {cut[0]}; all go or stay",
            where=where,
            expected=f"whole groups of {group}, such as {list(range(first, first + group))}",
            found=wanted,
        )


def _cut_groups(pruned: list[int], group: int) -> list[int]:
    """Return the groups of which some heads are pruned and some are not."""
    gone = Counter(head // group for head in set(pruned))
    return sorted(index for index, count in gone.items() if count < group)


def _number(value: Any, where: str, count: int, what: str) -> int:
    """Return a layer's or head's number as an int that is in range."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < count:
        raise ArgumentError(
            f"There are no such {what} to prune",
            where=where,
            expected=f"whole numbers from 0 to {count - 1}",
            found=repr(value)[:200],
        )
    return number
