# SPDX-License-Identifier: Apache-2.0
"""From the settings of a call to the generator of its drafts; what cannot work is found at once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.core.generation_fields import FIELDS
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache import layer_windows
from pretrained.torch.cache_quantized import QuantizedLayer
from pretrained.torch.generation.assisted import (
    AssistedCandidateGenerator,
    DraftLength,
    DraftRules,
    EarlyExitCandidateGenerator,
    first_layers,
)
from pretrained.torch.generation.candidates import CandidateGenerator, PromptLookupCandidateGenerator
from pretrained.torch.generation.inputs import GenerationInputs, prepare_inputs
from pretrained.torch.generation.logits import LogitsProcessor, LogitsProcessorList
from pretrained.torch.generation.loop import Decoder
from pretrained.torch.generation.rules import sampling_filters
from pretrained.torch.generation.settings import RELEASE, parameters
from pretrained.torch.generation.strategies import Run
from pretrained.torch.generation.universal import (
    AssistedCandidateGeneratorDifferentTokenizers,
    UniversalSpeculativeDecodingGenerator,
)
from pretrained.torch.generation.watermark import SynthIDTextWatermarkLogitsProcessor

logger = logging.getLogger("pretrained.generation")

_LEARNED = "_num_assistant_tokens"
"""Where the schedule "heuristic" keeps a model's number between calls."""


@dataclass(frozen=True)
class Drafting:
    """What a call says of drafts.

    Attributes:
        assistant_model: The model that drafts, or None.
        tokenizer: Of the model that checks, where the assistant has another vocabulary.
        assistant_tokenizer: Of the assistant, where it has another vocabulary.
    """

    assistant_model: Any = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None

    def checked(
        self, model: Any, config: GenerationConfig, by_user: frozenset[str], given: dict[str, Any]
    ) -> Drafting:
        """Return this, or raise as `check_drafting` does; see there for the arguments."""
        check_drafting(model, config, by_user, self, given)
        return self


def check_drafting(
    model: Any,
    config: GenerationConfig,
    by_user: frozenset[str],
    drafting: Drafting,
    given: dict[str, Any],
) -> None:
    """Raise where drafts are asked for that cannot be made.

    Args:
        model: The model that checks.
        config: The settled config.
        by_user: Fields that the user set.
        drafting: What the call says of drafts.
        given: The inputs of the model, by name.

    Raises:
        GenerationError: names the argument and the mend.
        NotYetError: a setting whose feature does not exist yet.
    """
    assistant = drafting.assistant_model
    ways = {
        "assistant_model": assistant,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
        "assistant_early_exit": config.assistant_early_exit,
    }
    asked = [name for name, value in ways.items() if value is not None]
    if drafting.assistant_tokenizer is not None and assistant is None:
        raise GenerationError(
            "assistant_tokenizer belongs to an assistant, and there is none",
            where="assistant_tokenizer",
            mend="Pass assistant_model=... too, or leave it out.",
        )
    if not asked:
        _warn_of_idle(config, by_user)
        return
    if len(asked) > 1:
        raise GenerationError(
            "One draft at a time",
            where=", ".join(asked),
            found=f"{len(asked)} ways",
            mend="Pass one of them.",
        )
    _refuse_beside(config, asked[0])
    if config.assistant_early_exit is not None:
        first_layers(model, config.assistant_early_exit)
    if assistant is not None:
        _check_assistant(model, config, drafting, given)


def _warn_of_idle(config: GenerationConfig, by_user: frozenset[str]) -> None:
    used = {"is_assistant", "assistant_confidence_threshold"} if config.is_assistant else set()
    for name in sorted(by_user - used):
        if FIELDS[name].group == "assistant" and getattr(config, name) != FIELDS[name].default:
            logger.warning(
                "%s=%r has no effect: it is used only where tokens are drafted; pass assistant_model, "
                "prompt_lookup_num_tokens or assistant_early_exit.",
                name,
                getattr(config, name),
            )


def _refuse_beside(config: GenerationConfig, name: str) -> None:
    """Refuse what drafts do not go together with."""
    others = {
        "num_beams": config.num_beams > 1,
        "constraints": config.constraints is not None,
        "force_words_ids": config.force_words_ids is not None,
        "penalty_alpha": bool(config.penalty_alpha),
        "dola_layers": config.dola_layers is not None,
        "guidance_scale": config.guidance_scale is not None and config.guidance_scale != 1,
    }
    for other, is_set in others.items():
        if is_set:
            raise GenerationError(
                f"Drafts are checked by greedy decoding or sampling, so {name} and "
                f"{other}={getattr(config, other)!r} exclude each other",
                where=other,
                mend=f"Leave out {other} or {name}.",
            )
    if config.assistant_ensemble_weight is not None:
        raise NotYetError(
            "assistant_ensemble_weight would let the assistant change what the model says, and cannot be "
            "obeyed yet",
            where="assistant_ensemble_weight",
            mend=f"{RELEASE} Until then leave it out.",
        )


def _check_assistant(model: Any, config: GenerationConfig, drafting: Drafting, given: dict[str, Any]) -> None:
    assistant: Any = drafting.assistant_model

    def wrong(what: str, mend: str, **more: Any) -> GenerationError:
        return GenerationError(what, where="assistant_model", mend=mend, **more)

    if not isinstance(assistant, torch.nn.Module) or not callable(getattr(assistant, "generate", None)):
        raise wrong(
            "assistant_model must be a model with a language-model head",
            "Load it with AutoModelForCausalLM.from_pretrained(...).",
            found=type(assistant).__name__,
        )
    ours, its = (bool(one.config.is_encoder_decoder) for one in (model, drafting.assistant_model))
    if ours != its:
        kinds = {True: "an encoder-decoder", False: "a decoder alone"}
        raise wrong(
            f"The assistant is {kinds[its]} and the model {kinds[ours]}",
            "Pass an assistant of the model's kind, or prompt_lookup_num_tokens=10.",
        )
    if {"inputs_embeds", "encoder_outputs"} & {k for k, v in given.items() if v is not None}:
        raise wrong(
            "An assistant reads the prompt as ids, and here it is given as vectors",
            "Pass input_ids, or use prompt_lookup_num_tokens or assistant_early_exit.",
        )
    device, other = _place(model), _place(assistant)
    if device is not None and other is not None and device != other:
        raise wrong(
            f"The assistant is on {other} and the model on {device}",
            f"Write assistant.to({str(device)!r}).",
        )
    if len(layer_windows(assistant.config)) < 1:
        raise wrong("The assistant has no layers", "Pass another one.")
    _check_vocabularies(model, assistant, drafting)


def _check_vocabularies(model: Any, assistant: Any, drafting: Drafting) -> None:
    pair = {"tokenizer": drafting.tokenizer, "assistant_tokenizer": drafting.assistant_tokenizer}
    missing = [name for name, value in pair.items() if value is None]
    ours, its = model.config.vocab_size, assistant.config.vocab_size
    if drafting.assistant_tokenizer is None and ours == its:
        return
    if missing:
        raise GenerationError(
            "The assistant has another vocabulary" if ours != its else "One tokenizer is missing",
            where=" and ".join(missing),
            expected=f"{ours} tokens",
            found=f"{its} tokens",
            mend="Pass both tokenizers: tokenizer=... (the model's) and assistant_tokenizer=...",
        )
    if model.config.is_encoder_decoder:
        raise NotYetError(
            "An encoder-decoder cannot have an assistant with another vocabulary yet",
            where="assistant_tokenizer",
            mend=f"{RELEASE} Until then pass an assistant of the same vocabulary.",
        )


def build_candidates(
    run: Run, drafting: Drafting, inputs: GenerationInputs, decoder_of: Callable[[Any], type[Decoder]]
) -> CandidateGenerator | None:
    """Return the generator of drafts that a call asks for, or None where it asks for none.

    Args:
        run: The call.
        drafting: What it says of drafts; checked.
        inputs: The prepared inputs.
        decoder_of: Says which decoder runs a model.
    """
    config = run.config
    if config.get_generation_mode(drafting.assistant_model) is not GenerationMode.ASSISTED_GENERATION:
        return None
    for rule in run.processors:
        if isinstance(rule, SynthIDTextWatermarkLogitsProcessor):
            raise GenerationError(
                "This watermark is told of every token once and in order, which drafts cannot do",
                where="watermarking_config",
                mend="Leave the draft out, or use WatermarkingConfig.",
            )
    if any(isinstance(layer, QuantizedLayer) for layer in getattr(run.decoder.cache, "layers", ())):
        raise GenerationError(
            "What a quantized cache rounds depends on how many tokens come at once, so drafts would change "
            "the text",
            where="past_key_values" if config.cache_implementation is None else "cache_implementation",
            mend='Leave the draft out, or use another cache, such as "dynamic" or "offloaded".',
        )
    ends = _as_list(config.eos_token_id)
    if config.prompt_lookup_num_tokens is not None:
        return PromptLookupCandidateGenerator(
            config.prompt_lookup_num_tokens,
            config.max_matching_ngram_size,
            eos_token_id=ends,
            padding=_padding(inputs),
            encoder_input_ids=inputs.encoder_input_ids if run.model.config.is_encoder_decoder else None,
        )
    rules = DraftRules(
        do_sample=config.do_sample,
        threshold=_setting(config, drafting.assistant_model, "assistant_confidence_threshold"),
        eos_token_id=ends,
        processors=run.processors or None,
        generator=run.generator,
    )
    length = _draft_length(config, drafting.assistant_model)
    if config.assistant_early_exit is not None:
        return EarlyExitCandidateGenerator(run.decoder, config.assistant_early_exit, length, rules)
    if drafting.assistant_tokenizer is not None and not _same_vocabulary(run.model, drafting):
        return _universal(run, drafting, inputs, decoder_of, length, rules)
    assistant = drafting.assistant_model
    if inputs.past_length:
        raise GenerationError(
            "The cache holds tokens that the assistant has not seen",
            where="past_key_values",
            mend="Pass the whole sequence as input_ids, or use assistant_early_exit.",
        )
    return AssistedCandidateGenerator(
        assistant,
        _assistant_inputs(assistant, config, inputs),
        _assistant_config(config),
        length,
        rules,
        make_decoder=decoder_of(assistant),
        max_length=run.max_length,
        positions=_positions(assistant),
    )


def _universal(
    run: Run,
    drafting: Drafting,
    inputs: GenerationInputs,
    decoder_of: Callable[[Any], type[Decoder]],
    length: DraftLength,
    rules: DraftRules,
) -> CandidateGenerator:
    assistant, config = drafting.assistant_model, run.config

    def make(ids: torch.Tensor, rule: LogitsProcessor | None = None) -> AssistedCandidateGenerator:
        filters = _filters(config, rule)
        of_row = DraftRules(
            rules.do_sample and rule is not None, rules.threshold, (), filters or None, rules.generator
        )
        return AssistedCandidateGenerator(
            assistant,
            GenerationInputs(ids, attention_mask=None if rule is None else inputs.attention_mask),
            _assistant_config(config),
            length,
            of_row,
            make_decoder=decoder_of(assistant),
            # The assistant's own count of tokens; its cache grows.
            max_length=ids.shape[1] + 8 * (run.lengths.new_tokens + 1) + length.tokens,
            positions=_positions(assistant),
        )

    if config.do_sample:
        return UniversalSpeculativeDecodingGenerator(
            make,
            drafting.tokenizer,
            drafting.assistant_tokenizer,
            vocab_size=run.model.config.vocab_size,
            assistant_vocab_size=assistant.config.vocab_size,
        )
    return AssistedCandidateGeneratorDifferentTokenizers(
        make,
        drafting.tokenizer,
        drafting.assistant_tokenizer,
        target_lookbehind=config.target_lookbehind,
        assistant_lookbehind=config.assistant_lookbehind,
        padding=_padding(inputs),
    )


def _filters(config: GenerationConfig, rule: LogitsProcessor | None) -> LogitsProcessorList:
    """Return the rules of an assistant with another vocabulary: those that name no tokens."""
    if rule is None:
        return LogitsProcessorList()
    return LogitsProcessorList([rule, *(sampling_filters(config) if config.do_sample else ())])


def _assistant_inputs(assistant: Any, config: GenerationConfig, inputs: GenerationInputs) -> GenerationInputs:
    """Return what an assistant starts from: its own encoder is run here."""
    if not assistant.config.is_encoder_decoder:
        takes = parameters(type(assistant).forward)
        extra = {name: value for name, value in inputs.extra.items() if name in takes}
        return GenerationInputs(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            extra=extra,
        )
    given = {
        "attention_mask": inputs.encoder_attention_mask,
        "decoder_input_ids": inputs.input_ids,
        "decoder_attention_mask": inputs.attention_mask,
    }
    return prepare_inputs(assistant, _assistant_config(config), inputs.encoder_input_ids, given)


def _assistant_config(config: GenerationConfig) -> GenerationConfig:
    """Return settings for an assistant's decoder: a cache that grows, and nothing returned."""
    settled = copy.deepcopy(config)
    for name in list(settled._values):
        if name in FIELDS and FIELDS[name].group in ("cache", "outputs"):
            delattr(settled, name)
    return settled


def _draft_length(config: GenerationConfig, assistant: Any) -> DraftLength:
    schedule = _setting(config, assistant, "num_assistant_tokens_schedule")
    tokens = _setting(config, assistant, "num_assistant_tokens")
    if schedule != "heuristic" or assistant is None:
        return DraftLength(tokens, schedule)
    # It goes on over calls with the same assistant, until another number is asked for.
    kept = vars(assistant).get(_LEARNED)
    if kept is None or kept[0] != tokens:
        kept = (tokens, DraftLength(tokens, schedule))
        vars(assistant)[_LEARNED] = kept
    length: DraftLength = kept[1]
    return length


def _setting(config: GenerationConfig, assistant: Any, name: str) -> Any:
    """Return a setting: the call's, else the assistant's own, else the default."""
    own = getattr(assistant, "generation_config", None)
    is_own = not config.is_set(name) and isinstance(own, GenerationConfig) and own.is_set(name)
    return getattr(own if is_own else config, name)


def _same_vocabulary(model: Any, drafting: Drafting) -> bool:
    if model.config.vocab_size != drafting.assistant_model.config.vocab_size:
        return False
    same: bool = drafting.tokenizer.get_vocab() == drafting.assistant_tokenizer.get_vocab()
    return same


def _positions(model: Any) -> int | None:
    """Return how many positions a model has, or None where it can go on beyond them."""
    rotary = any(getattr(model.config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    return None if rotary else getattr(model.config, "max_position_embeddings", None)


def _padding(inputs: GenerationInputs) -> list[int] | None:
    padding = inputs.padding
    return None if padding is None else padding.tolist()


def _place(model: Any) -> torch.device | None:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    device = getattr(getattr(embeddings, "weight", None), "device", None)
    return None if device is None or device.type == "meta" else device


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
