# SPDX-License-Identifier: Apache-2.0
"""The fields of a generation config as data: name, neutral value, what a value must look like.

`GenerationConfig` is built on this table; backends read it to know which fields they do not offer yet.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pretrained.core.compiling import wrong_compile_config
from pretrained.core.watermarking import wrong_watermark

Check = Callable[[Any], str | None]
"""Takes a value that is not None; returns what would have been right, or None where it is right."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _integer(least: int) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if right else f"a whole number of {least} or more"

    return check


def _number(expected: str, right: Callable[[float], bool]) -> Check:
    def check(value: Any) -> str | None:
        return None if _is_number(value) and right(value) else expected

    return check


def _one_of(*choices: Any) -> Check:
    def check(value: Any) -> str | None:
        # By type too: True == 1, but "early_stopping": 1 is not a choice.
        right = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if right else "one of " + ", ".join(repr(choice) for choice in choices)

    return check


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _token(value: Any) -> str | None:
    return None if _is_id(value) else "a token id (a whole number of 0 or more)"


def _tokens(value: Any) -> str | None:
    if _is_id(value) or (isinstance(value, list) and value and all(map(_is_id, value))):
        return None
    return "a token id or a list of token ids"


def _token_list(value: Any) -> str | None:
    return None if isinstance(value, list) and all(map(_is_id, value)) else "a list of token ids"


def _word_list(value: Any) -> str | None:
    words = isinstance(value, list) and value
    right = words and all(isinstance(word, list) and word and all(map(_is_id, word)) for word in value)
    return None if right else "a list of words, each a list of token ids, such as [[5], [12, 7]]"


def _forced_words(value: Any) -> str | None:
    """Words, or choices of words."""
    items = value if isinstance(value, list) else []
    words = [word for item in items for word in (item if _is_choice(item) else [item])]
    if words and all(isinstance(word, list) and word and all(map(_is_id, word)) for word in words):
        return None
    return "a list of words, each a list of token ids or several such lists to choose from"


def _is_choice(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and isinstance(item[0], list)


def _constraints(value: Any) -> str | None:
    methods = ("advance", "does_advance", "update", "reset", "remaining", "copy")
    given = value if isinstance(value, list) else []
    right = given and all(callable(getattr(one, name, None)) for one in given for name in methods)
    return None if right else "a list of Constraint objects, such as [PhrasalConstraint([5, 12])]"


def _is_biased(pair: Any) -> bool:
    """Whether a value is ([token ids], bias)."""
    right = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], list | tuple)
    return right and bool(pair[0]) and all(map(_is_id, pair[0])) and _is_number(pair[1])


def _bias(value: Any) -> str | None:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, list) and pairs and all(map(_is_biased, pairs)):
        return None
    return "pairs of token ids and a bias, such as [[[5], -2.0]] or {(5,): -2.0}"


def _strings(value: Any) -> str | None:
    if isinstance(value, str):
        return None if value else "a text that is not empty"
    right = isinstance(value, list) and value and all(isinstance(text, str) and text for text in value)
    return None if right else "a text or a list of texts, none of them empty"


def _decay(value: Any) -> str | None:
    pair = isinstance(value, list | tuple) and len(value) == 2
    right = pair and _integer(0)(value[0]) is None and _is_number(value[1]) and value[1] > 0
    return None if right else "(start, factor): new tokens before it sets in, and a factor above 0"


def _layers(value: Any) -> str | None:
    if value in ("low", "high") or (isinstance(value, list) and value and all(map(_is_id, value))):
        return None
    return '"low", "high" or a list of layers, counted from 0 for the embeddings'


def _settings(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "a ContinuousBatchingConfig, or a dict of its settings"


def _name(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a name"


def _anything(value: Any) -> str | None:
    return None


_flag = _one_of(True, False)
_positive = _number("a number above 0", lambda value: value > 0)
_at_least_0 = _number("a number of 0 or more", lambda value: value >= 0)
_share = _number("a number above 0 and up to 1", lambda value: 0 < value <= 1)
_cutoff = _number("a number from 0 to below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True, slots=True)
class Field:
    """One generation setting.

    Attributes:
        default: Effective value where nobody set it; it changes nothing about plain greedy decoding.
        check: What a value must look like.
        group: What the setting belongs to: ``length``, ``sampling`` (used only with ``do_sample``),
            ``beams`` (used only with ``num_beams > 1``), ``cache``, ``rules``, ``outputs``, ``tokens``,
            ``assistant`` (used only with an assistant), ``strategy`` or ``runtime``.
        later: True where the setting is known and no backend offers its feature yet.
    """

    default: Any
    check: Check
    group: str
    later: bool = False


FIELDS: Mapping[str, Field] = {
    # length
    "max_length": Field(20, _integer(1), "length"),
    "max_new_tokens": Field(None, _integer(1), "length"),
    "min_length": Field(0, _integer(0), "length"),
    "min_new_tokens": Field(None, _integer(0), "length"),
    "max_time": Field(None, _positive, "length"),
    "stop_strings": Field(None, _strings, "length"),
    # strategy
    "do_sample": Field(False, _flag, "strategy"),
    "num_beams": Field(1, _integer(1), "strategy"),
    "num_beam_groups": Field(1, _integer(1), "strategy"),
    "penalty_alpha": Field(None, _number("a number from 0 to 1", lambda value: 0 <= value <= 1), "strategy"),
    "dola_layers": Field(None, _layers, "strategy"),
    "constraints": Field(None, _constraints, "strategy"),
    "force_words_ids": Field(None, _forced_words, "strategy"),
    "guidance_scale": Field(None, _positive, "strategy"),
    "use_mtp": Field(None, _flag, "strategy", later=True),
    "speculation_type": Field(None, _name, "strategy", later=True),
    "prompt_lookup_num_tokens": Field(None, _integer(1), "strategy"),
    "assistant_early_exit": Field(None, _integer(1), "strategy"),
    "token_healing": Field(False, _flag, "strategy"),
    "watermarking_config": Field(None, wrong_watermark, "strategy"),
    "low_memory": Field(None, _flag, "strategy"),
    "early_stopping": Field(False, _one_of(True, False, "never"), "beams"),
    "length_penalty": Field(1.0, _number("a number", math.isfinite), "beams"),
    "diversity_penalty": Field(0.0, _number("a number", math.isfinite), "beams"),
    # cache
    "use_cache": Field(True, _flag, "cache"),
    "cache_implementation": Field(None, _name, "cache"),
    "cache_config": Field(None, _anything, "cache"),
    "max_cache_len": Field(None, _integer(1), "cache"),
    "prefill_chunk_size": Field(None, _integer(1), "cache"),
    "return_legacy_cache": Field(None, _flag, "cache"),
    # sampling
    "temperature": Field(1.0, _at_least_0, "sampling"),
    "top_k": Field(50, _integer(0), "sampling"),
    "top_p": Field(1.0, _share, "sampling"),
    "min_p": Field(None, _number("a number from 0 to 1", lambda value: 0 <= value <= 1), "sampling"),
    "top_h": Field(None, _share, "sampling"),
    "typical_p": Field(1.0, _share, "sampling"),
    "epsilon_cutoff": Field(0.0, _cutoff, "sampling"),
    "eta_cutoff": Field(0.0, _cutoff, "sampling"),
    # rules on the scores
    "repetition_penalty": Field(1.0, _positive, "rules"),
    "encoder_repetition_penalty": Field(1.0, _positive, "rules"),
    "no_repeat_ngram_size": Field(0, _integer(0), "rules"),
    "encoder_no_repeat_ngram_size": Field(0, _integer(0), "rules"),
    "bad_words_ids": Field(None, _word_list, "rules"),
    "sequence_bias": Field(None, _bias, "rules"),
    "suppress_tokens": Field(None, _token_list, "rules"),
    "begin_suppress_tokens": Field(None, _token_list, "rules"),
    "forced_bos_token_id": Field(None, _token, "rules"),
    "forced_eos_token_id": Field(None, _tokens, "rules"),
    "exponential_decay_length_penalty": Field(None, _decay, "rules"),
    "remove_invalid_values": Field(False, _flag, "rules"),
    "renormalize_logits": Field(False, _flag, "rules"),
    # what is returned
    "num_return_sequences": Field(1, _integer(1), "outputs"),
    "output_attentions": Field(False, _flag, "outputs"),
    "output_hidden_states": Field(False, _flag, "outputs"),
    "output_scores": Field(False, _flag, "outputs"),
    "output_logits": Field(None, _flag, "outputs"),
    "return_dict_in_generate": Field(False, _flag, "outputs"),
    # special tokens
    "pad_token_id": Field(None, _token, "tokens"),
    "bos_token_id": Field(None, _token, "tokens"),
    "eos_token_id": Field(None, _tokens, "tokens"),
    "decoder_start_token_id": Field(None, _tokens, "tokens"),
    # drafting for speculative decoding
    "is_assistant": Field(False, _flag, "assistant"),
    "num_assistant_tokens": Field(20, _integer(1), "assistant"),
    "num_assistant_tokens_schedule": Field(
        "constant", _one_of("constant", "heuristic", "heuristic_transient"), "assistant"
    ),
    "assistant_confidence_threshold": Field(
        0.4, _number("a number from 0 to 1", lambda value: 0 <= value <= 1), "assistant"
    ),
    "max_matching_ngram_size": Field(None, _integer(1), "assistant"),
    "assistant_lookbehind": Field(10, _integer(1), "assistant"),
    "target_lookbehind": Field(10, _integer(1), "assistant"),
    "assistant_ensemble_weight": Field(
        None, _number("a number between 0 and 1", lambda value: 0 < value < 1), "assistant"
    ),
    # runtime
    "compile": Field(False, _flag, "runtime"),
    "compile_config": Field(None, wrong_compile_config, "runtime"),
    "disable_compile": Field(False, _flag, "runtime"),
    "weight_copies": Field(None, _flag, "runtime"),
    "continuous_batching_config": Field(None, _settings, "runtime"),
}

METADATA = ("_from_model_config", "_commit_hash", "transformers_version")
"""Keys of a generation_config.json that say where it comes from; kept and written back."""

GENERATE_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
"""Objects that `generate` takes beside a config; they have no place in a JSON file."""


def normalise(value: Any) -> Any:
    """Turn whole numbers of other libraries (numpy's, a 0-d tensor) into int, tuples into lists.

    Args:
        value: A field's value as a user wrote it.
    """
    if isinstance(value, bool | int | float | str | Mapping) or value is None:
        return value
    if isinstance(value, tuple | list | set | frozenset):
        return [normalise(item) for item in value]
    if callable(getattr(value, "to_dict", None)):
        # A config within the config: kept as files have it.
        return value.to_dict()
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        # RuntimeError: a tensor of several elements.
        return normalise(value.tolist()) if hasattr(value, "tolist") else value
