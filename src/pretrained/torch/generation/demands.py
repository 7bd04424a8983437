# SPDX-License-Identifier: Apache-2.0
"""What strategies and arguments demand of a model and of each other, asked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.errors import GenerationError
from pretrained.torch.generation.caches import check_cache
from pretrained.torch.generation.checks import check_beams
from pretrained.torch.generation.dola import candidate_layers
from pretrained.torch.generation.healing import refuse_encoders


def check_demands(
    model: Any,
    config: GenerationConfig,
    mode: GenerationMode,
    inputs: Mapping[str, Any],
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    negative_prompt_ids: Any = None,
    negative_prompt_attention_mask: Any = None,
) -> None:
    """Raise where a call cannot be carried out with this model, before its first forward.

    Args:
        model: The model that will generate.
        config: The settled config.
        mode: The strategy.
        inputs: Inputs of the model by name.
        streamer: Of the call.
        tokenizer: Of the call.
        negative_prompt_ids: Of the call.
        negative_prompt_attention_mask: Of the call.

    Raises:
        GenerationError: names the argument and the mend.
    """
    _check_streamer(streamer, config)
    check_beams(model, config)
    check_cache(config)
    if mode is GenerationMode.CONTRASTIVE_SEARCH:
        _check_contrastive(config, inputs.get("past_key_values"))
    if mode is GenerationMode.DOLA_GENERATION:
        candidate_layers(model, config.dola_layers)
    _check_guidance(model, config, negative_prompt_ids, negative_prompt_attention_mask)
    if config.token_healing:
        refuse_encoders(model)
    for name in ("stop_strings", "token_healing"):
        if getattr(config, name) and tokenizer is None:
            does = "are looked for in text" if name == "stop_strings" else "looks at the text of tokens"
            raise GenerationError(
                f"{name} {does}, and there is no tokenizer to make it",
                where=name,
                mend="Pass tokenizer=... to generate().",
            )


def _check_streamer(streamer: Any, config: GenerationConfig) -> None:
    if streamer is None:
        return
    if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
        raise GenerationError(
            "streamer lacks put and end",
            where="streamer",
            expected="a BaseStreamer, such as TextStreamer(tokenizer)",
            found=type(streamer).__name__,
        )
    if config.num_beams > 1:
        raise GenerationError(
            "A streamer shows tokens that will not change any more, and beams change until the end",
            where="streamer",
            found=f"num_beams={config.num_beams}",
            mend="Pass num_beams=1, or leave the streamer out.",
        )


def _check_contrastive(config: GenerationConfig, cache: Any) -> None:
    if not config.use_cache:
        raise GenerationError(
            "Contrastive search runs candidates ahead of a cache, and there is none",
            where="use_cache",
            mend="Leave use_cache=False out, or penalty_alpha.",
        )
    filled = len(cache) > 0 if isinstance(cache, tuple | list) else cache is not None
    if filled and (isinstance(cache, tuple | list) or cache.get_seq_length() > 0):
        raise GenerationError(
            "Contrastive search compares with the hidden states of the whole prompt, which a cache lacks",
            where="past_key_values",
            mend="Pass the whole prompt and no cache, or leave penalty_alpha out.",
        )
    if config.prefill_chunk_size is not None:
        raise GenerationError(
            "Contrastive search needs the hidden states of the whole prompt at once",
            where="prefill_chunk_size",
            mend="Leave prefill_chunk_size out, or penalty_alpha.",
        )


def _check_guidance(model: Any, config: GenerationConfig, ids: Any, mask: Any) -> None:
    if mask is not None and ids is None:
        raise GenerationError(
            "negative_prompt_attention_mask belongs to negative_prompt_ids, which are not there",
            where="negative_prompt_attention_mask",
            mend="Pass negative_prompt_ids, or leave the mask out.",
        )
    if ids is not None and config.guidance_scale is None:
        raise GenerationError(
            "A negative prompt has no effect without guidance",
            where="negative_prompt_ids",
            mend="Pass guidance_scale=... above 1, or leave negative_prompt_ids out.",
        )
    if config.guidance_scale not in (None, 1) and model.config.is_encoder_decoder:
        raise GenerationError(
            "Guidance runs a decoder on another prompt, and this model's prompt is read by an encoder",
            where="guidance_scale",
            found=type(model).__name__,
            mend="Leave guidance_scale out.",
        )
