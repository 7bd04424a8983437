# SPDX-License-Identifier: Apache-2.0
"""From what a user passes to `generate` to frozen, checked inputs of the model.

Everything that can be wrong with them is found here, before the first forward.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.errors import GenerationError
from pretrained.torch.cache import Cache, as_cache
from pretrained.torch.generation.checks import check_batch, check_embeds, check_ids, check_mask, vocabulary
from pretrained.torch.generation.settings import Lengths, parameters, settle_lengths
from pretrained.torch.outputs import BaseModelOutput, ModelOutput

logger = logging.getLogger("pretrained.generation")


@dataclass(frozen=True)
class GenerationInputs:
    """What the model starts from. Rows are the batch, each repeated for the sequences wanted of it.

    Attributes:
        input_ids: [rows, length] the beginning of the returned sequences (of the decoder's, where there is
            an encoder); length 0 where the prompt is `inputs_embeds` alone.
        inputs_embeds: [rows, length, hidden] prompt given as vectors, or None.
        attention_mask: [rows, past + length] mask of the decoder; None where nothing is padded.
        position_ids: [rows, length] positions that the user gave, or None.
        cache: The user's cache to go on from, or None.
        skip: How many tokens of the prompt that cache holds already.
        past_length: How many tokens it holds before the prompt, of which `input_ids` knows nothing.
        encoder_outputs: Of the encoder, or None.
        encoder_attention_mask: [rows, input length], or None where nothing is padded.
        encoder_input_ids: [rows, input length] what rules that look at the input see; the prompt itself
            where there is no encoder; None where the input has no ids.
        extra: Further inputs, passed to every forward.
    """

    input_ids: torch.Tensor
    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cache: Cache | None = None
    skip: int = 0
    past_length: int = 0
    encoder_outputs: Any = None
    encoder_attention_mask: torch.Tensor | None = None
    encoder_input_ids: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many sequences are generated."""
        return self.input_ids.shape[0]

    @property
    def embeds_length(self) -> int:
        """Positions of the prompt that are not among `input_ids`."""
        return 0 if self.inputs_embeds is None else self.inputs_embeds.shape[1] - self.input_ids.shape[1]

    @property
    def padding(self) -> torch.Tensor | None:
        """[rows] how many padding tokens each prompt begins with; None where nothing is padded."""
        if self.attention_mask is None:
            return None
        return (self.attention_mask[:, self.past_length :] != 0).int().argmax(dim=1)


def prepare_inputs(
    model: Any, config: GenerationConfig, inputs: torch.Tensor | None, kwargs: dict[str, Any]
) -> GenerationInputs:
    """Check what the user passed and put it into the form that the loop needs.

    Args:
        model: The model that will generate.
        config: The settled config.
        inputs: The prompt, or the encoder's input.
        kwargs: Inputs of the model by name; all of them are known to be accepted by it.

    Returns:
        The inputs, on the model's device, encoder run.

    Raises:
        GenerationError: something about them cannot work; names the argument and the mend.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    if inputs is not None and "input_ids" in given:
        raise GenerationError(
            "The prompt is given twice", where="inputs, input_ids", mend="Pass one of them."
        )
    if inputs is not None:
        given["input_ids"] = inputs
    device = _device(model)
    if device is not None:
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    prepare = _prepare_encoder_decoder if model.config.is_encoder_decoder else _prepare_decoder
    prepared = prepare(model, config, given)
    # Beams run the prompt once and share what comes of it.
    return prepared if config.num_beams > 1 else _expand(prepared, config.num_return_sequences)


def lengths_of(
    model: Any, config: GenerationConfig, by_user: frozenset[str], inputs: GenerationInputs
) -> Lengths:
    """Settle how long the sequences of prepared inputs may become.

    Args:
        model: The model that will generate.
        config: The settled config.
        by_user: Fields that the user set.
        inputs: The prepared inputs.

    Raises:
        GenerationError: as `settle_lengths`.
    """
    # Rotary and relative positions have no end; learned ones do.
    rotary = any(getattr(model.config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    return settle_lengths(
        config,
        by_user,
        ids_length=inputs.input_ids.shape[1],
        embeds_length=inputs.embeds_length,
        past_length=inputs.past_length,
        positions=getattr(model.config, "max_position_embeddings", None),
        absolute=not rotary,
        feeds_last=config.get_generation_mode() is GenerationMode.CONTRASTIVE_SEARCH,
    )


# -- decoders ------------------------------------------------------------------------------------


def _prepare_decoder(model: Any, config: GenerationConfig, given: dict[str, Any]) -> GenerationInputs:
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    mask, cache = given.pop("attention_mask", None), given.pop("past_key_values", None)
    if embeds is not None:
        check_embeds(embeds, ids)
        if ids is None:
            ids = torch.empty((embeds.shape[0], 0), dtype=torch.int64, device=embeds.device)
    elif ids is None:
        ids = _beginning(model, config, given)
    ids = check_ids(ids, vocabulary(model), "input_ids", may_be_empty=embeds is not None)
    prompt = ids.shape[1] if embeds is None else embeds.shape[1]
    cache = _check_cache(cache, config)
    past = 0 if cache is None else cache.get_seq_length()
    mask = _decoder_mask(mask, ids, embeds, config, prompt, past)
    # With a cache the mask tells whether the prompt holds the whole sequence or only what is new.
    only_new = mask is not None and mask.shape[1] == past + prompt and past > 0
    skip = 0 if only_new else past
    if past and skip >= prompt:
        raise GenerationError(
            "The cache already holds the whole prompt",
            where="past_key_values",
            expected=f"a prompt of more than {past} tokens, those of the cache included",
            found=f"{prompt} tokens",
            mend="Pass the whole sequence; or only its new tokens with an attention_mask over cached and new "
            "ones; or call cache.crop(-1) to compute the last token again.",
        )
    return GenerationInputs(
        input_ids=ids,
        inputs_embeds=embeds,
        attention_mask=None if mask is None or bool((mask == 1).all()) else mask,
        position_ids=given.pop("position_ids", None),
        cache=cache,
        skip=skip,
        past_length=past if only_new else 0,
        encoder_input_ids=ids if ids.shape[1] else None,
        extra=given,
    )


def _beginning(model: Any, config: GenerationConfig, given: dict[str, Any]) -> torch.Tensor:
    """Start from the beginning-of-sequence token where there is no prompt."""
    if config.bos_token_id is None:
        raise GenerationError(
            "There is no prompt, and no token to begin with",
            where="input_ids",
            mend="Pass input_ids, or bos_token_id=... to begin with that token.",
        )
    batch = next((v.shape[0] for v in given.values() if isinstance(v, torch.Tensor)), 1)
    return torch.full((batch, 1), config.bos_token_id, dtype=torch.int64, device=_device(model))


def _decoder_mask(
    mask: torch.Tensor | None,
    ids: torch.Tensor,
    embeds: torch.Tensor | None,
    config: GenerationConfig,
    prompt: int,
    past: int,
) -> torch.Tensor | None:
    pad = config.pad_token_id
    if mask is None:
        if embeds is not None:
            return None
        ends = _as_list(config.eos_token_id)
        if pad is None or pad in ends:
            _refuse_mixed_lengths(ids, pad if pad is not None or not ends else ends[0])
            return None
        if not bool((ids == pad).any()):
            return None
        mask = (ids != pad).long()
    else:
        allowed = (prompt,) if past == 0 else (prompt, past + prompt)
        mask = check_mask(mask, ids.shape[0], allowed, "attention_mask")
    if ids.shape[0] > 1 and bool((mask[:, -1] == 0).any()):
        _warn_once(
            "A batch is padded on the right, so the new text would follow the padding: expect worse text. "
            'Pad on the left: tokenizer.padding_side = "left".'
        )
    return mask


def _refuse_mixed_lengths(ids: torch.Tensor, pad: int | None) -> None:
    """Raise where rows look padded to one length with a token that may also be text."""
    if pad is None or ids.shape[0] == 1:
        return
    other = (ids != pad).int()
    begins, ends = other.argmax(dim=1), other.flip(1).argmax(dim=1)
    if bool((begins != begins[0]).any() | (ends != ends[0]).any()):
        raise GenerationError(
            f"The rows seem padded with token {pad}, which also ends a text, and there is no mask to tell",
            where="attention_mask",
            mend="Pass the mask that the tokenizer returned with these ids: generate(**inputs); or "
            "torch.ones_like(input_ids) where all of it is text.",
        )


def _check_cache(cache: Any, config: GenerationConfig) -> Cache | None:
    if cache is None:
        return None
    cache = as_cache(cache)
    if not isinstance(cache, Cache):
        raise GenerationError(
            "past_key_values has the wrong type",
            where="past_key_values",
            expected="a Cache, or the tuples of an older one",
            found=type(cache).__name__,
        )
    if config.cache_implementation is not None:
        raise GenerationError(
            "A cache is passed and another one asked for",
            where="cache_implementation",
            mend="Pass past_key_values or cache_implementation, not both.",
        )
    if not config.use_cache:
        raise GenerationError(
            "A cache is passed, and use_cache=False", where="past_key_values", mend="Pass one of them."
        )
    return cache


# -- encoder-decoders ----------------------------------------------------------------------------


def _prepare_encoder_decoder(model: Any, config: GenerationConfig, given: dict[str, Any]) -> GenerationInputs:
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    mask, outputs = given.pop("attention_mask", None), given.pop("encoder_outputs", None)
    decoder_ids = given.pop("decoder_input_ids", None)
    decoder_mask, cache = given.pop("decoder_attention_mask", None), given.pop("past_key_values", None)
    if ids is not None and embeds is not None:
        raise GenerationError(
            "The encoder's input is given twice", where="input_ids, inputs_embeds", mend="Pass one of them."
        )
    if embeds is not None:
        check_embeds(embeds, None)
    if ids is not None:
        ids = check_ids(ids, vocabulary(model), "input_ids")
    encoder_only: dict[str, Any] = {}
    if outputs is None:
        if ids is None and embeds is None:
            ids = _beginning(model, config, given)
        mask = _encoder_mask(mask, *(ids if ids is not None else embeds).shape[:2])
        outputs, encoder_only = _encode(model, config, ids, embeds, mask, given)
    else:
        outputs = _as_encoder_output(outputs)
        mask = _encoder_mask(mask, *outputs.last_hidden_state.shape[:2])
    batch = outputs.last_hidden_state.shape[0]
    device = outputs.last_hidden_state.device
    start = _start_ids(config, batch, device)
    if decoder_ids is None:
        decoder_ids = start
    else:
        decoder_ids = check_ids(decoder_ids, vocabulary(model), "decoder_input_ids")
        check_batch(decoder_ids, batch, "decoder_input_ids")
        if bool((decoder_ids[:, 0] != start[:, 0]).all()):
            decoder_ids = torch.cat([start, decoder_ids], dim=1)
            if decoder_mask is not None:
                decoder_mask = torch.cat([torch.ones_like(decoder_mask[:, :1]), decoder_mask], dim=1)
    prompt = decoder_ids.shape[1]
    cache = _check_cache(cache, config)
    past = 0 if cache is None else cache.get_seq_length()
    if decoder_mask is not None:
        allowed = (prompt,) if past == 0 else (prompt, past + prompt)
        decoder_mask = check_mask(decoder_mask, batch, allowed, "decoder_attention_mask")
    only_new = past > 0 and decoder_mask is not None and decoder_mask.shape[1] == past + prompt
    skip = 0 if only_new else past
    if past and skip >= prompt:
        raise GenerationError(
            "The cache already holds the whole beginning of the answer",
            where="past_key_values",
            expected=f"decoder_input_ids of more than {past} tokens, those of the cache included",
            found=f"{prompt} tokens",
            mend="Pass the whole sequence so far as decoder_input_ids.",
        )
    return GenerationInputs(
        input_ids=decoder_ids,
        attention_mask=decoder_mask if decoder_mask is not None and bool((decoder_mask != 1).any()) else None,
        cache=cache,
        skip=skip,
        past_length=past if only_new else 0,
        encoder_outputs=outputs,
        encoder_attention_mask=mask,
        encoder_input_ids=ids,
        extra={name: value for name, value in given.items() if name not in encoder_only},
    )


def _encode(
    model: Any,
    config: GenerationConfig,
    ids: torch.Tensor | None,
    embeds: torch.Tensor | None,
    mask: torch.Tensor | None,
    given: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Run the encoder; return its output and the inputs that only it takes."""
    encoder = model.get_encoder()
    takes = parameters(type(encoder).forward)
    arguments = {name: value for name, value in given.items() if name in takes}
    own = {name: value for name, value in arguments.items() if name not in parameters(type(model).forward)}
    arguments |= {"input_ids": ids} if ids is not None else {"inputs_embeds": embeds}
    for flag in ("output_attentions", "output_hidden_states"):
        if getattr(config, flag):
            arguments[flag] = True
    return encoder(attention_mask=mask, return_dict=True, **arguments), own


def _as_encoder_output(outputs: Any) -> Any:
    if isinstance(outputs, tuple | list):
        outputs = BaseModelOutput(*outputs)
    elif isinstance(outputs, dict):
        outputs = BaseModelOutput(**outputs)
    if getattr(outputs, "last_hidden_state", None) is None:
        raise GenerationError(
            "encoder_outputs lacks what the decoder reads",
            where="encoder_outputs",
            expected="an output with last_hidden_state, such as model.get_encoder()(input_ids)",
            found=type(outputs).__name__,
        )
    return outputs


def _encoder_mask(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = check_mask(mask, batch, (length,), "attention_mask")
    return None if bool((mask == 1).all()) else mask


def _start_ids(config: GenerationConfig, batch: int, device: torch.device) -> torch.Tensor:
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    if start is None:
        raise GenerationError(
            "There is no token for the decoder to begin with",
            where="decoder_start_token_id",
            mend="Pass decoder_start_token_id=... (T5 begins with its padding token, 0).",
        )
    ids = torch.tensor(_as_list(start), dtype=torch.int64, device=device)
    if len(ids) not in (1, batch):
        raise GenerationError(
            "decoder_start_token_id needs one token, or one for each row",
            where="decoder_start_token_id",
            expected=f"1 or {batch}",
            found=len(ids),
        )
    return ids[:, None].expand(batch, 1)


# -- small things --------------------------------------------------------------------------------


def _expand(inputs: GenerationInputs, times: int) -> GenerationInputs:
    """Repeat each row for the sequences that are wanted of it, its cache too."""
    if times == 1:
        return inputs
    if inputs.cache is not None and inputs.cache.batch_size == inputs.rows:
        inputs.cache.batch_repeat_interleave(times)
    return repeat_inputs(inputs, times)


def repeat_inputs(inputs: GenerationInputs, times: int) -> GenerationInputs:
    """Repeat each row of everything but the cache, its copies next to each other.

    Args:
        inputs: The inputs.
        times: How often.
    """
    batch = inputs.rows

    def repeat(value: Any) -> Any:
        return repeat_rows(value, batch, times)

    outputs = repeat(inputs.encoder_outputs)
    return replace(
        inputs,
        input_ids=repeat(inputs.input_ids),
        inputs_embeds=repeat(inputs.inputs_embeds),
        attention_mask=repeat(inputs.attention_mask),
        position_ids=repeat(inputs.position_ids),
        encoder_outputs=outputs,
        encoder_attention_mask=repeat(inputs.encoder_attention_mask),
        encoder_input_ids=repeat(inputs.encoder_input_ids),
        extra={name: repeat(value) for name, value in inputs.extra.items()},
    )


def repeat_rows(value: Any, batch: int, times: int) -> Any:
    """Repeat each row of a tensor, or of all tensors of an output, its copies next to each other.

    Args:
        value: A tensor, an output, a tuple of them, or anything else, which stays as it is.
        batch: How many rows there are; a tensor with another number stays as it is.
        times: How often.
    """
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch:
        return value.repeat_interleave(times, dim=0)
    if isinstance(value, ModelOutput):
        # States and attentions of each layer are a record of the prompts, and stay one row for each of them.
        return type(value)(
            **{k: v if isinstance(v, tuple) else repeat_rows(v, batch, times) for k, v in value.items()}
        )
    if isinstance(value, tuple):
        return tuple(repeat_rows(item, batch, times) for item in value)
    return value


def _device(model: Any) -> torch.device | None:
    """Where ids are looked up; None where the parameters are not there yet (offloaded)."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    device = getattr(weight, "device", None) or getattr(model, "device", None)
    return None if device is None or device.type == "meta" else device


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
