# SPDX-License-Identifier: Apache-2.0
"""Which weights are one tensor, where the config and the files disagree: the files are right.

Configs of whole families say ``tie_word_embeddings`` wrongly: transformers 5 writes true for every T5,
also where the file holds a head of its own; older ones say false where only the embedding is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.keys import match_keys
from pretrained.errors import ArgumentError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


def settle_ties(
    model: Any,
    checkpoint: Checkpoint,
    *,
    key_mapping: Mapping[str, str] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Set ``model.config.tie_word_embeddings`` to what the files show.

    A head that is in the files beside the embedding, with other bytes, is not tied to it. A head that is
    absent is tied where the class says so (`_ties_absent_head`); elsewhere the config's word stands.

    Args:
        model: A model without memory yet, on a config of its own.
        checkpoint: What the files hold, under the names they give; not GGUF, which tells by itself.
        key_mapping: The user's ``{regex: replacement}``.
        state_dict: The tensors themselves where there are no files.
    """
    config = model.config
    said = config.tie_word_embeddings
    alias, owner = head_tie(model)
    if alias is None:
        return
    group = [owner, *(key for key, target in model.ties().items() if target == owner and key != alias)]
    found = match_keys(
        checkpoint.tensors,
        [*model.state_dict()],
        base_prefix=model.base_model_prefix,
        rules=model.key_rules,
        key_mapping=key_mapping,
    ).sources
    head = found.get(alias)
    embedding = next((found[key] for key in group if key in found), None)
    if embedding is None:
        return
    if head is None:
        tied = said or getattr(model, "_ties_absent_head", False)
    elif state_dict is not None:
        tied = said and torch.equal(state_dict[head], state_dict[embedding])
    else:
        tied = said and same_bytes(checkpoint.tensors[head], checkpoint.tensors[embedding])
    if tied != said:
        logger.info("tie_word_embeddings is %s in the config and %s in the files of this model", said, tied)
        config.tie_word_embeddings = tied


def check_fits(model: Any, shared: Mapping[str, nn.Parameter]) -> None:
    """Raise where tying would leave a layer with a weight and a bias of different lengths.

    Args:
        model: The model.
        shared: What each alias is to become.

    Raises:
        ArgumentError: it would.
    """
    for alias, parameter in shared.items():
        path, _, name = alias.rpartition(".")
        module = model.get_submodule(path)
        if type(module) is not nn.Linear or name != "weight" or module.bias is None:
            continue
        bias = shared.get(f"{path}.bias", module.bias)
        if len(bias) != len(parameter):
            raise ArgumentError(
                "A layer cannot be tied to a weight with another number of rows than its bias has",
                where=f"{path}.bias",
                expected=len(parameter),
                found=len(bias),
                mend="Use resize_token_embeddings, which changes both, or replace the layer first.",
            )


def share(model: Any, alias: str, parameter: nn.Parameter) -> None:
    """Make one more layer hold a parameter, and say how many rows that has.

    Args:
        model: The model.
        alias: Where.
        parameter: What.
    """
    path, _, name = alias.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, name, parameter)
    # Only layers that are known to count rows of their weight: packed weights have other shapes.
    if name == "weight" and type(module) is nn.Linear:
        module.out_features = len(parameter)
    elif name == "weight" and type(module) is nn.Embedding:
        module.num_embeddings = len(parameter)


def head_tie(model: Any) -> tuple[str | None, str]:
    """Return the alias and the owner of the tie that `tie_word_embeddings` decides about.

    Args:
        model: A model, with or without memory.

    Returns:
        Two keys; None and an empty text where the config decides about no tie.
    """
    config = model.config
    said, ties = config.tie_word_embeddings, {}
    for word in (True, False):
        config.tie_word_embeddings = word
        ties[word] = model.ties()
    config.tie_word_embeddings = said
    alias = next((key for key in ties[True] if key not in ties[False]), None)
    return alias, "" if alias is None else ties[True][alias]


def shared_by_construction(model: Any) -> dict[str, str]:
    """Return which parameters are one object and are not declared as ties, as alias -> owner.

    A class of one's own may share modules or parameters in its ``__init__`` and say nothing of it in `ties`.

    Args:
        model: A model as its class builds it, with or without memory.
    """
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), key)
        if owner != key:
            shared[key] = owner
    if not shared:
        return {}
    declared = _declared(model)
    return {alias: owner for alias, owner in shared.items() if not {alias, owner} & declared}


def _declared(model: Any) -> set[str]:
    """Return the aliases of all ties that a model's class knows, whatever its config says of the head."""
    config = model.config
    said, found = config.tie_word_embeddings, set()
    for word in (True, False):
        config.tie_word_embeddings = word
        found |= {*model.ties()}
    config.tie_word_embeddings = said
    return found


def same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Tell whether two tensors of a checkpoint are one span or hold equal bytes.

    Args:
        first: Any tensor.
        second: Any other.
    """
    facts: tuple[Callable[[TensorInfo], Any], ...] = (
        lambda info: info.dtype,
        lambda info: info.shape,
        lambda info: info.strides,
        lambda info: info.nbytes,
    )
    if any(fact(first) != fact(second) for fact in facts):
        return False
    if (first.file, first.offset) == (second.file, second.offset):
        return True
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        left = first.nbytes
        while left:
            size = min(left, _CHUNK_BYTES)
            # Heads of their own differ in the first chunk, so only real copies are read to the end.
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True
