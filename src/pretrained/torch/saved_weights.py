# SPDX-License-Identifier: Apache-2.0
"""From what a model's state dict holds to plain tensors under the model's own names.

Wrappers (torch.compile, activation checkpointing, data parallelism) put words into names; sharding puts
pieces into tensors; and modules may share memory in ways that the model's class does not know of.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from pretrained.errors import ArgumentError, PretrainedError
from pretrained.torch.load import build_empty, skeleton_of
from pretrained.torch.save_ranks import is_shared

# What wrappers insert into the names below them.
_INSERTED = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def without_wrappers(weights: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Return weights under the names that the model's modules have without wrappers.

    Args:
        weights: By name; ``torch.compile`` inserts ``_orig_mod.``, activation checkpointing
            ``_checkpoint_wrapped_module.``, and data parallelism puts ``module.`` before all.
        model: The model that they are of.

    Raises:
        ArgumentError: two names become one.
    """
    found: dict[str, torch.Tensor] = {}
    whole = bool(weights) and all(key.startswith("module.") for key in weights)
    prefix = "module." if whole and not hasattr(model, "module") else ""
    for key, tensor in weights.items():
        clean = key.removeprefix(prefix)
        for inserted in _INSERTED:
            clean = clean.replace(inserted, "")
        if clean in found:
            raise ArgumentError(
                "Two weights have one name once the words of wrappers are left out",
                where=f"state_dict[{key!r}]",
                found=clean,
            )
        found[clean] = tensor
    return found


def whole_tensors(
    weights: Mapping[str, torch.Tensor], *, keep_shared: bool = False
) -> dict[str, torch.Tensor]:
    """Return weights as plain tensors with all their values.

    Those that are sharded over one process are put together; over several they are refused, since that takes
    all processes, unless the caller sees to it.

    Args:
        weights: By name.
        keep_shared: Leave tensors that several processes hold parts of (`DTensor`) as they are.

    Raises:
        ArgumentError: a weight that is sharded over several processes, flattened, sparse or nested.
    """
    return {
        key: tensor if keep_shared and is_shared(tensor) else _whole(key, tensor)
        for key, tensor in weights.items()
    }


def _whole(key: str, tensor: torch.Tensor) -> torch.Tensor:
    mesh = getattr(tensor, "device_mesh", None)
    kind = type(tensor).__name__
    if mesh is not None and mesh.size() == 1:
        full: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full
    if mesh is not None or kind == "ShardedTensor" or key.rpartition(".")[2] in ("_flat_param", "flat_param"):
        raise ArgumentError(
            "A weight is sharded over several processes, and each holds a part",
            where=key,
            expected="whole tensors",
            found=f"a {kind}" + (f" over {mesh.size()} processes" if mesh is not None else ""),
            mend="Call save_pretrained in every process and leave state_dict out: they put it together. Of a "
            "model that FullyShardedDataParallel wraps, pass what get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict returns.",
        )
    if tensor.layout is not torch.strided:
        raise ArgumentError(
            "A weight is not a plain tensor",
            where=key,
            expected="a dense tensor",
            found=str(tensor.layout),
            mend="Call to_dense() on it.",
        )
    return tensor


def class_of(model: Any) -> type[Any]:
    """Return a model's own class, also where fully_shard has put one of its making over it.

    Args:
        model: A `PreTrainedModel`.
    """
    cls = type(model)
    if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        return next(base for base in cls.__bases__ if base.__name__ != "FSDPModule")
    return cls


def unknown_aliases(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return names of one memory that no tie of the model's class explains, as alias -> owner.

    A module that was added to the model and shares a weight with another is written once. Where the class
    itself promises both names, each is written, for whoever reads the file expects both.

    Args:
        model: A `PreTrainedModel`.
        weights: Its weights by name.
    """
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for key, tensor in weights.items():
        if tensor.is_meta or not tensor.numel() or is_shared(tensor):
            continue
        facts = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        owner = first.setdefault(facts, key)
        if owner != key:
            aliases[key] = owner
    if not aliases:
        return {}
    ties = model.ties()
    aliases = {alias: owner for alias, owner in aliases.items() if alias not in ties and owner not in ties}
    if not aliases:
        return {}
    try:
        fresh = build_empty(class_of(model), copy.deepcopy(model.config))
    except (PretrainedError, TypeError, ValueError):
        return {}  # a class that takes further arguments
    promised, shared = skeleton_of(fresh).params, fresh._shared_weights
    found: dict[str, str] = {}
    for alias, owner in aliases.items():
        if alias in promised and owner not in promised:
            found[owner] = alias
        elif alias not in promised or shared.get(alias) == owner:
            found[alias] = owner
    return found
