# SPDX-License-Identifier: Apache-2.0
"""Sizes of weights that files hold quantized, from headers alone; for planners, which load nothing."""

from __future__ import annotations

from dataclasses import replace

from pretrained.core.checkpoint import Checkpoint
from pretrained.core.dtypes import DTYPES
from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE
from pretrained.core.keys import match_keys
from pretrained.core.plan import LoadPlan, LoadPolicy
from pretrained.core.skeleton import Skeleton

# Ends of the keys that hold a layer's main tensor, in the formats of this library and of others.
_MAIN = (".weight", ".qweight", ".weight_packed")


def split_quantized(
    checkpoint: Checkpoint, skeleton: Skeleton, policy: LoadPolicy
) -> tuple[Checkpoint, dict[str, int]]:
    """Separate a quantized checkpoint's plain tensors from those that make up quantized weights.

    A weight is quantized where its tensor is not floating, or has others beside it (scales, offsets) that
    are no bias.

    Args:
        checkpoint: Of a config that says that it is quantized.
        skeleton: What the model promises.
        policy: The family's key rules.

    Returns:
        The checkpoint without the quantized weights, and for each of those its key -> bytes of everything
        that makes it up.
    """
    owners = {key.removesuffix(end): key for key in checkpoint.tensors for end in _MAIN if key.endswith(end)}
    parts: dict[str, list[str]] = {}
    for key in checkpoint.tensors:
        path = key
        while path and path not in owners:
            path = path.rpartition(".")[0]
        if path and key != f"{path}.bias":
            parts.setdefault(path, []).append(key)
    plain = {f"{path}.weight" for path in owners}
    packed = {
        path: keys
        for path, keys in parts.items()
        if not (set(keys) <= plain and _is_floating(checkpoint.tensors[owners[path]].dtype))
    }
    names = {
        f"{path}.weight": sum(checkpoint.tensors[key].nbytes for key in keys) for path, keys in packed.items()
    }
    found = match_keys(
        names, skeleton.params, ties=skeleton.ties, base_prefix=policy.base_prefix, rules=policy.rules
    ).sources
    gone = {key for keys in packed.values() for key in keys}
    left = {key: info for key, info in checkpoint.tensors.items() if key not in gone}
    sizes = {key: names[source] for key, source in found.items() if key not in skeleton.ties}
    return replace(checkpoint, tensors=left), sizes


def block_sizes(files: LoadPlan, skeleton: Skeleton) -> dict[str, int]:
    """Return the bytes of the weights whose GGML blocks a load can keep packed.

    Args:
        files: What a load of a GGUF file reads.
        skeleton: What the model promises.
    """
    sizes = {}
    for step in files.steps:
        is_matrix = len(skeleton.params[step.key].shape) == 2 and step.key.endswith(".weight")
        if is_matrix and step.source.dtype in DEQUANTIZABLE and BLOCK_TYPES[step.source.dtype].elements > 1:
            sizes[step.key] = step.source.nbytes
    return sizes


def _is_floating(dtype: str) -> bool:
    # The eight-bit floats are only ever stored beside a scale, or as the result of a plain cast.
    return dtype in DTYPES and DTYPES[dtype].is_floating
