# SPDX-License-Identifier: Apache-2.0
"""Which cache `generate` makes: from `cache_implementation`, `cache_config` and the lengths of a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError, did_you_mean
from pretrained.torch.cache import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    SlidingWindowCache,
    StaticCache,
)
from pretrained.torch.generation.inputs import GenerationInputs

NAMES = (
    "dynamic",
    "dynamic_full",
    "static",
    "sliding_window",
    "offloaded",
    "offloaded_static",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
    "quantized",
)
"""What `cache_implementation` may say. The last but one and two are older names of ``offloaded_static``."""

_AS_BY_DEFAULT = ("hybrid", "hybrid_chunked")
"""Old names in files of models with sliding layers, which the growing cache serves."""

_FIXED = {
    "static": StaticCache,
    "sliding_window": SlidingWindowCache,
    "offloaded_static": StaticCache,
    "offloaded_hybrid": StaticCache,
    "offloaded_hybrid_chunked": StaticCache,
}
_QUANTIZED = ("backend", "nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
# Of older configs; what they say is seen at the first update.
_SEEN_LATER = ("config", "compute_dtype", "device", "cache_implementation", "batch_size", "max_batch_size")


def check_cache(config: GenerationConfig) -> None:
    """Raise where the settled fields of the cache cannot be obeyed; drop names that mean the default.

    Args:
        config: The settled config.

    Raises:
        GenerationError: an unknown name, or settings that the cache does not have or that cannot work.
    """
    name = config.cache_implementation
    if name in _AS_BY_DEFAULT:
        del config.cache_implementation
        name = None
    if name == "paged":
        raise GenerationError(
            "Pages serve many requests at once, and generate() answers one batch",
            where="cache_implementation",
            found="'paged'",
            mend="Call generate_batch() with the prompts, without padding; or leave it out.",
        )
    if name is not None and name not in NAMES:
        raise GenerationError(
            f"There is no cache_implementation {name!r}",
            where="cache_implementation",
            expected=", ".join(NAMES),
            mend=did_you_mean(str(name), NAMES) or None,
        )
    settings = cache_settings(config.cache_config)
    takes = _QUANTIZED if name == "quantized" else ("max_cache_len",) if name in _FIXED else ()
    for key in settings:
        if key not in takes and key not in _SEEN_LATER:
            known = ", ".join(takes) or "nothing: this cache has no settings"
            near = did_you_mean(key, takes)
            if not near and key in _QUANTIZED:
                near = 'Set cache_implementation="quantized".'
            raise GenerationError(
                f"cache_config has no {key!r} for cache_implementation={name!r}",
                where="cache_config",
                expected=known,
                mend=near or None,
            )
    if name == "quantized":
        # Made without the model: what is wrong whatever the model is.
        QuantizedCache(**{key: settings[key] for key in _QUANTIZED if key in settings})
    length = settings.get("max_cache_len")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise GenerationError(
            "max_cache_len must be a whole number of 1 or more", where="cache_config", found=length
        )


def cache_settings(cache_config: Any) -> dict[str, Any]:
    """Return what a `cache_config` says, values of None left out.

    Args:
        cache_config: A dict, an object with attributes or `to_dict`, or None.

    Raises:
        GenerationError: neither.
    """
    if cache_config is None:
        return {}
    if callable(getattr(cache_config, "to_dict", None)):
        cache_config = cache_config.to_dict()
    elif not isinstance(cache_config, Mapping) and hasattr(cache_config, "__dict__"):
        cache_config = vars(cache_config)
    if not isinstance(cache_config, Mapping) or not all(isinstance(key, str) for key in cache_config):
        raise GenerationError(
            "cache_config has the wrong type",
            where="cache_config",
            expected='a dict of settings, such as {"nbits": 4}',
            found=type(cache_config).__name__,
        )
    return {key: value for key, value in cache_config.items() if value is not None}


def make_cache(
    model: Any, inputs: GenerationInputs, config: GenerationConfig, new_tokens: int, margin: int = 0
) -> Cache:
    """Return the cache that a call fills: the user's, or a new one.

    Args:
        model: The model that generates.
        inputs: What it starts from.
        config: The settled config.
        new_tokens: How many steps there can be at most.
        margin: How many tokens may be taken back.

    Raises:
        GenerationError: the cache has no room for the whole sequence.
    """
    # The last new token is never fed back.
    length = inputs.past_length + max(inputs.input_ids.shape[1], _vectors(inputs)) + new_tokens - 1
    if inputs.cache is not None:
        own = inputs.cache
        own.keep_margin(margin)
    else:
        own = _make(model.config, config, length, margin)
    _check_room(own, length, made=inputs.cache is None)
    crosses = model.config.is_encoder_decoder or inputs.extra.get("encoder_hidden_states") is not None
    if crosses and not isinstance(own, EncoderDecoderCache):
        # Made here, so that what is computed of the encoder's output is computed once for all steps.
        return EncoderDecoderCache(own, DynamicCache())
    return own


def _make(model_config: Any, config: GenerationConfig, length: int, margin: int) -> Cache:
    name = config.cache_implementation
    settings = cache_settings(config.cache_config)
    if name in _FIXED:
        asked = config.max_cache_len or settings.get("max_cache_len")
        kind, offloading = _FIXED[name], name.startswith("offloaded")
        more = {"margin": margin} if "margin" in inspect.signature(kind).parameters else {}
        return kind(model_config, asked or length, offloading=offloading, **more)
    if name == "quantized":
        chosen = {key: settings[key] for key in _QUANTIZED if key in settings}
        return QuantizedCache(config=model_config, margin=margin, **chosen)
    if name == "dynamic_full":
        return DynamicCache()
    return DynamicCache(config=model_config, offloading=name == "offloaded", margin=margin)


def _check_room(cache: Cache, needed: int, *, made: bool) -> None:
    room = cache.get_max_length()
    if 0 <= room < needed:
        raise GenerationError(
            "The cache has no room for the whole sequence",
            where="max_cache_len" if made else "past_key_values",
            expected=f"max_cache_len={needed} or more",
            found=room,
            mend="Leave max_cache_len out, or pass a smaller max_new_tokens."
            if made
            else "Make a larger StaticCache, pass a smaller max_new_tokens, or use a DynamicCache.",
        )


def _vectors(inputs: GenerationInputs) -> int:
    return 0 if inputs.inputs_embeds is None else inputs.inputs_embeds.shape[1]
