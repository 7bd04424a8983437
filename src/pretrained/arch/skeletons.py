# SPDX-License-Identifier: Apache-2.0
"""From a config to what the model promises, by the registry: skeletons, load policies and working memory.

Planning needs no framework; this is the door for callers that hold a config and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, cast

from pretrained.core.config import PreTrainedConfig
from pretrained.core.dtypes import DTYPES
from pretrained.core.placement import Workload
from pretrained.core.plan import LoadPolicy
from pretrained.core.registry import Models, family, load_name
from pretrained.core.skeleton import Skeleton
from pretrained.errors import ArgumentError, did_you_mean

# Names of config fields for the width of the feed-forward network.
_INNER_SIZES = ("intermediate_size", "d_ff", "inner_size", "hidden_dim")
# Families that have a key-value cache only where the config makes them decoders.
_ENCODERS = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")


def config_of(values: dict[str, Any], *, where: object = "config.json") -> PreTrainedConfig:
    """Return the typed config of a config.json's values.

    Args:
        values: Content of the file, or what a GGUF file says (`pretrained.arch.gguf.gguf_config`).
        where: What to name in errors.

    Raises:
        ConfigError: the model_type is absent or unknown, or a value is wrong.
    """
    row = family(values.get("model_type"), where=where)
    config_class: type[PreTrainedConfig] = load_name(row.arch, row.config)
    return cast(PreTrainedConfig, config_class.from_dict(values))


def architecture_of(config: PreTrainedConfig, architecture: str | None = None) -> str:
    """Return the class that a config means.

    Args:
        config: A config of a known model_type.
        architecture: A class name to take instead.

    Returns:
        `architecture`, else the first of ``config.architectures`` (a TF or Flax name stands for ours), else
        AutoModel's class.

    Raises:
        ArgumentError: the family has no class by that name.
    """
    models = _models(config)
    name = architecture or next(iter(config.architectures or ()), None)
    if name is None:
        return models.tasks["Model"]
    known = [known for known in models.classes if not known.endswith("PreTrainedModel")]
    ours = name if name in known else name.removeprefix("Flax").removeprefix("TF")
    if ours.endswith("WithLMHeadModel") and "WithLMHead" in models.tasks:
        ours = models.tasks["WithLMHead"]
    if ours not in known:
        raise ArgumentError(
            f"There is no {name} for model_type {config.model_type!r}",
            where="architecture",
            expected=", ".join(known),
            found=repr(name),
            mend=did_you_mean(name, known) or None,
        )
    return ours


def skeleton_for(config: PreTrainedConfig, architecture: str | None = None) -> Skeleton:
    """Return every weight that a model promises, from its config alone.

    Args:
        config: A config of a known model_type.
        architecture: Class name; None for the one that the config names, or AutoModel's.

    Raises:
        ArgumentError: the family has no such class.
    """
    name = architecture_of(config, architecture)
    stem = _models(config).tasks["Model"].removesuffix("Model")
    return cast(Skeleton, _arch(config).skeleton(config, name.removeprefix(stem)))


def policy_for(config: PreTrainedConfig, dtype: str | None) -> LoadPolicy:
    """Return the planner's view of a family: its key rules, and what it keeps in float32.

    Args:
        config: A config of a known model_type.
        dtype: Name of the dtype to load as; None keeps each weight's own.
    """
    arch = _arch(config)
    return LoadPolicy(
        dtype=dtype,
        keep_fp32=tuple(getattr(arch, "KEEP_IN_FP32", ())),
        rules=tuple(arch.KEY_RULES),
        base_prefix=arch.BASE_MODEL_PREFIX,
    )


# -- what a run needs beside the weights ---------------------------------------------------------


def kv_cache_bytes(config: PreTrainedConfig, batch: int, context: int, dtype: str) -> tuple[int, ...]:
    """Return the bytes of key-value cache of each decoder layer.

    Two tensors, [batch, key-value heads, length, head size]; a layer with a sliding window keeps no more than
    that, and one with cross-attention keeps the encoder's keys and values too.

    Args:
        config: Of a decoder or an encoder-decoder.
        batch: Rows, beams included.
        context: Longest sequence in tokens, prompt and answer together; the encoder's length too.
        dtype: Name of the cache's dtype.

    Returns:
        One number for each layer; empty for an encoder, which keeps nothing.

    Raises:
        ArgumentError: `batch` or `context` is not positive.
    """
    _check_positive(batch=batch, context=context)
    if config.model_type in _ENCODERS and not config.is_decoder:
        return ()
    layers = config.num_decoder_layers if config.is_encoder_decoder else config.num_hidden_layers
    size = getattr(config, "head_size", None) or config.head_dim
    total = config.num_attention_heads
    keys = getattr(config, "kv_heads", None) or total
    window = getattr(config, "window", lambda layer: None)
    left = getattr(config, "kv_heads_left", getattr(config, "heads_left", lambda layer: keys))
    found = []
    for layer in range(layers or 0):
        tokens = left(layer) * min(context, window(layer) or context)
        if config.is_encoder_decoder or config.add_cross_attention:
            tokens += total * context
        found.append(2 * batch * tokens * size * DTYPES[dtype].itemsize)
    return tuple(found)


def activation_bytes(config: PreTrainedConfig, batch: int, context: int, dtype: str) -> int:
    """Estimate the bytes that a forward over a whole context computes with, on the device of the moment.

    What one block has alive at a time: the residual stream, queries, keys, values and their result, the feed-
    forward network's two inner tensors; and the scores of the last position in float32. Attention scores
    are not counted: they are never whole in memory with ``sdpa``.

    Args:
        config: Any.
        batch: Rows.
        context: Tokens a row.
        dtype: Name of the dtype that is computed in.
    """
    _check_positive(batch=batch, context=context)
    values = (getattr(config, name, None) for name in _INNER_SIZES)
    inner = next((value for value in values if value), 4 * config.hidden_size)
    block = batch * context * (6 * config.hidden_size + 2 * inner) * DTYPES[dtype].itemsize
    return int(block + batch * config.vocab_size * DTYPES["float32"].itemsize)


def workload_for(
    config: PreTrainedConfig, skeleton: Skeleton, *, batch: int, context: int, dtype: str
) -> Workload:
    """Return the memory to keep free for a run, with the cache by block.

    Args:
        config: A config of a known model_type.
        skeleton: From `skeleton_for`.
        batch: Rows, beams included.
        context: Longest sequence in tokens.
        dtype: Name of the dtype of cache and activations.
    """
    sizes = kv_cache_bytes(config, batch, context, dtype)
    blocks = _numbered_blocks(skeleton)
    if config.is_encoder_decoder:
        # An encoder alone has no decoder's blocks, and so no cache.
        blocks = [path for path in blocks if "decoder" in path.split(".")]
    cache = dict(zip(blocks, sizes, strict=True)) if len(blocks) == len(sizes) else {}
    return Workload(cache, activation_bytes(config, batch, context, dtype))


def _numbered_blocks(skeleton: Skeleton) -> list[str]:
    paths = dict.fromkeys(spec.block for spec in skeleton.params.values() if spec.block is not None)
    return [path for path in paths if path.rpartition(".")[2].isdecimal()]


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ArgumentError(f"{name} must be positive", where=name, found=value)


def _models(config: PreTrainedConfig) -> Models:
    return family(config.model_type, where="model_type").models["torch"]


def _arch(config: PreTrainedConfig) -> ModuleType:
    return import_module(family(config.model_type, where="model_type").arch)
