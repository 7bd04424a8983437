# SPDX-License-Identifier: Apache-2.0
"""From a settled config to the rules on scores and the rules for stopping, in the ecosystem's order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.core.watermarking import as_watermarking_config
from pretrained.errors import GenerationError
from pretrained.torch.generation import logits as rules
from pretrained.torch.generation import warpers
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.logits import LogitsProcessorList
from pretrained.torch.generation.settings import Lengths
from pretrained.torch.generation.stopping import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

logger = logging.getLogger("pretrained.generation")

Rule = Callable[..., torch.Tensor]


def build_processors(
    config: GenerationConfig,
    lengths: Lengths,
    inputs: GenerationInputs,
    *,
    user: Iterable[Rule] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], Any] | None = None,
    vocab_size: int | None = None,
) -> LogitsProcessorList:
    """Return the rules on scores that a call asks for.

    Penalties, bans and forced tokens come first, then the user's own, then the filters for sampling, last
    the normalisation. A user's rule of the same class takes the place of the config's.

    Args:
        config: The settled config.
        lengths: The settled lengths.
        inputs: The prepared inputs.
        user: The user's own rules.
        prefix_allowed_tokens_fn: See `PrefixConstrainedLogitsProcessor`.
        vocab_size: Of the model; watermarks need it.

    Raises:
        GenerationError: a rule lacks what it needs.
    """
    prompt = inputs.input_ids.shape[1]
    ordered = [*_biases(config, inputs), *_ends(config, lengths, prompt)]
    if prefix_allowed_tokens_fn is not None:
        beams = config.num_beams // config.num_beam_groups if config.num_beams > 1 else 0
        beams = beams or config.num_return_sequences
        ordered.append(rules.PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, beams))
    ordered += _forced(config, lengths, prompt)
    ordered = _merge(ordered, list(user or ()))
    if config.do_sample:
        ordered += sampling_filters(config)
    if config.watermarking_config is not None:
        # After all filters: green tokens are chosen among what they leave.
        mark = as_watermarking_config(config.watermarking_config)
        ordered.append(mark.construct_processor(vocab_size or 0, inputs.input_ids.device))
    if config.renormalize_logits:
        ordered.append(rules.LogitNormalization())
    return LogitsProcessorList(ordered)


def _biases(config: GenerationConfig, inputs: GenerationInputs) -> list[Rule]:
    """Biases, penalties and bans that look at the tokens so far."""
    found: list[Rule] = []
    if config.sequence_bias is not None:
        found.append(rules.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.num_beams > 1 and config.num_beam_groups > 1:
        found.append(
            rules.HammingDiversityLogitsProcessor(
                config.diversity_penalty, config.num_beams, config.num_beam_groups
            )
        )
    if config.encoder_repetition_penalty != 1.0:
        ids = _encoder_ids(inputs, "encoder_repetition_penalty")
        found.append(rules.EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, ids))
    if config.repetition_penalty != 1.0:
        found.append(rules.RepetitionPenaltyLogitsProcessor(config.repetition_penalty, inputs.padding))
    if config.no_repeat_ngram_size > 0:
        found.append(rules.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size > 0:
        ids = _encoder_ids(inputs, "encoder_no_repeat_ngram_size")
        found.append(rules.EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, ids))
    if config.bad_words_ids is not None:
        found.append(rules.NoBadWordsLogitsProcessor(config.bad_words_ids, config.eos_token_id))
    return found


def _ends(config: GenerationConfig, lengths: Lengths, prompt: int) -> list[Rule]:
    """Rules that keep the end away."""
    found: list[Rule] = []
    if config.eos_token_id is None:
        return found
    if lengths.min_length > 0:
        found.append(rules.MinLengthLogitsProcessor(lengths.min_length, config.eos_token_id))
    if lengths.min_new_tokens > 0:
        found.append(
            rules.MinNewTokensLengthLogitsProcessor(prompt, lengths.min_new_tokens, config.eos_token_id)
        )
    return found


def _forced(config: GenerationConfig, lengths: Lengths, prompt: int) -> list[Rule]:
    """Forced tokens, clean-up and suppressed tokens."""
    found: list[Rule] = []
    if config.forced_bos_token_id is not None:
        found.append(rules.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        found.append(rules.ForcedEOSTokenLogitsProcessor(lengths.max_length, config.forced_eos_token_id))
    if config.remove_invalid_values:
        found.append(rules.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        if config.eos_token_id is None:
            raise GenerationError(
                "exponential_decay_length_penalty makes the end likelier, and there is none",
                where="exponential_decay_length_penalty",
                mend="Pass eos_token_id=...",
            )
        decay = config.exponential_decay_length_penalty
        found.append(rules.ExponentialDecayLengthPenalty(decay, config.eos_token_id, prompt))
    if config.suppress_tokens is not None:
        found.append(rules.SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens is not None:
        # After a start token alone, a forced token comes first; then it is the second that begins.
        forced_first = prompt <= 1 and config.forced_bos_token_id is not None
        begin = prompt + 1 if forced_first else prompt
        found.append(rules.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin))
    return found


def sampling_filters(config: GenerationConfig) -> list[Rule]:
    """Return the filters for sampling that a config asks for, in the ecosystem's order.

    Args:
        config: The settled config.
    """
    found: list[Rule] = []
    ends = config.eos_token_id
    # Beams need a token to go on with beside every one that ends them.
    keep = 1 if config.num_beams == 1 else 1 + (len(ends) if isinstance(ends, list) else 1)
    if config.temperature != 1.0:
        found.append(warpers.TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        found.append(warpers.TopHLogitsWarper(config.top_h))
    if config.top_k > 0:
        found.append(warpers.TopKLogitsWarper(config.top_k, min_tokens_to_keep=keep))
    if config.top_p < 1.0:
        found.append(warpers.TopPLogitsWarper(config.top_p, min_tokens_to_keep=keep))
    if config.min_p is not None:
        found.append(warpers.MinPLogitsWarper(config.min_p, min_tokens_to_keep=keep))
    if config.typical_p < 1.0:
        found.append(warpers.TypicalLogitsWarper(config.typical_p, min_tokens_to_keep=keep))
    if config.epsilon_cutoff > 0.0:
        found.append(warpers.EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=keep))
    if config.eta_cutoff > 0.0:
        found.append(warpers.EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=keep))
    return found


def build_criteria(
    config: GenerationConfig,
    lengths: Lengths,
    *,
    tokenizer: Any = None,
    user: Iterable[Callable[..., Any]] | None = None,
) -> StoppingCriteriaList:
    """Return the rules for stopping that a call asks for; a user's of the same class replaces one.

    Args:
        config: The settled config.
        lengths: The settled lengths.
        tokenizer: For `stop_strings`.
        user: The user's own rules.

    Raises:
        GenerationError: stop strings without a tokenizer.
    """
    found: list[Callable[..., Any]] = [MaxLengthCriteria(lengths.max_length)]
    if config.max_time is not None:
        found.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise GenerationError(
                "stop_strings are looked for in text, and there is no tokenizer to make it",
                where="stop_strings",
                mend="Pass tokenizer=... to generate().",
            )
        found.append(StopStringCriteria(tokenizer, config.stop_strings))
    if config.eos_token_id is not None:
        found.append(EosTokenCriteria(config.eos_token_id))
    if config.is_assistant and config.assistant_confidence_threshold > 0:
        found.append(ConfidenceCriteria(config.assistant_confidence_threshold))
    return StoppingCriteriaList(_merge(found, list(user or ())))


def _merge(ours: list[Any], theirs: list[Any]) -> list[Any]:
    """Put the user's rules in place of ours of the same class, and the others after them."""
    merged: list[Any] = []
    for rule in ours:
        own = next((other for other in theirs if type(other) is type(rule)), None)
        if own is not None:
            logger.warning("Your %s takes the place of the one that the config asks for.", type(own).__name__)
        merged.append(rule if own is None else own)
    for rule in theirs:
        if not any(rule is other for other in merged):
            merged.append(rule)
    return merged


def _encoder_ids(inputs: GenerationInputs, name: str) -> torch.Tensor:
    if inputs.encoder_input_ids is None:
        raise GenerationError(
            f"{name} looks at the ids of the input, and there are none", where=name, mend="Pass input_ids."
        )
    return inputs.encoder_input_ids
