# SPDX-License-Identifier: Apache-2.0
"""From what a user passes to `generate` to one settled config: decided once, before the first forward."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pretrained.core.generation_config import GenerationConfig
from pretrained.core.generation_fields import FIELDS
from pretrained.errors import GenerationError, NotYetError, did_you_mean

logger = logging.getLogger("pretrained.generation")

RELEASE = "It comes with the generation release."

_INSTEAD = {
    "num_beams": "Until then pass num_beams=1 for greedy decoding.",
    "low_memory": "Leave it out.",
}


def settle(
    model: Any,
    generation_config: GenerationConfig | None,
    kwargs: Mapping[str, Any],
    use_model_defaults: bool | None = None,
) -> tuple[GenerationConfig, dict[str, Any], frozenset[str]]:
    """Merge the settings of a call, and tell them from the inputs of the model.

    What the call says wins over `generation_config`, that over the model's own config, that over defaults.
    None in the call switches a setting off, whatever the model's config says.

    Args:
        model: The model that will generate.
        generation_config: The user's config, or None.
        kwargs: All further keyword arguments of the call.
        use_model_defaults: False to leave out the model's own config.

    Returns:
        The settled config, a private copy; the inputs of the model; the names of the fields that the
        user set, in the call or in `generation_config`.

    Raises:
        GenerationError: an argument that nothing takes, a value that cannot work, a contradiction.
        NotYetError: a setting whose feature does not exist yet.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise GenerationError(
            "generation_config has the wrong type",
            where="generation_config",
            expected="a GenerationConfig",
            found=type(generation_config).__name__,
            mend="Write GenerationConfig(**settings).",
        )
    fields = {name: value for name, value in kwargs.items() if name in FIELDS}
    inputs = {name: value for name, value in kwargs.items() if name not in FIELDS}
    _refuse_unknown(model, inputs)
    own = getattr(model, "generation_config", None)
    config = GenerationConfig() if own is None or use_model_defaults is False else own
    config = (generation_config or GenerationConfig()).merged(config)
    for name, value in fields.items():
        if value is not None:
            setattr(config, name, value)
        elif name == "top_k":
            config.top_k = 0
        elif config.is_set(name):
            delattr(config, name)
    by_user = {name for name, value in fields.items() if value is not None}
    if generation_config is not None:
        by_user |= {name for name in FIELDS if generation_config.is_set(name)}
    _drop_negative_ids(config)
    config.validate()
    _refuse_later(config, by_user)
    for name, reason in config.hints().items():
        if name in by_user:
            logger.warning("%s=%r has no effect: %s.", name, getattr(config, name), reason)
    return config, inputs, frozenset(by_user)


def _drop_negative_ids(config: GenerationConfig) -> None:
    """Old files write -1 for "there is no such token"."""
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if config._values.get(name) == -1:
            delattr(config, name)


def _refuse_later(config: GenerationConfig, by_user: set[str]) -> None:
    for name, field in FIELDS.items():
        if field.later and not _neutral(name, getattr(config, name)):
            raise _not_yet(name, getattr(config, name))


def _neutral(name: str, value: Any) -> bool:
    if value is None or value is False or value == FIELDS[name].default:
        return True
    return (name == "guidance_scale" and value == 1) or (name == "penalty_alpha" and value == 0)


def _not_yet(name: str, value: Any, instead: str | None = None) -> NotYetError:
    instead = instead or _INSTEAD.get(name, f"Until then leave {name} out.")
    return NotYetError(f"{name}={value!r} cannot be obeyed yet", where=name, mend=f"{RELEASE} {instead}")


def refuse_arguments(**arguments: Any) -> None:
    """Refuse arguments of `generate` whose feature does not exist yet.

    Args:
        **arguments: By name; None and False are never refused.

    Raises:
        NotYetError: names the first that is set.
    """
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise NotYetError(
                f"generate() cannot use {name} yet", where=name, mend=f"{RELEASE} Until then leave it out."
            )


def _refuse_unknown(model: Any, inputs: Mapping[str, Any]) -> None:
    known = accepted(model)
    for name in inputs:
        if name in known:
            continue
        mend = did_you_mean(name, [*FIELDS, *sorted(known)])
        if name == "token_type_ids":
            mend = "Take it out: inputs.pop('token_type_ids'), or tokenize with return_token_type_ids=False."
        raise GenerationError(
            f"Neither generate() nor {type(model).__name__} takes {name!r}", where=name, mend=mend or None
        )


def accepted(model: Any) -> frozenset[str]:
    """Return the names of the inputs that a model takes in `generate`.

    Args:
        model: The model that will generate.
    """
    names = set(parameters(type(model).forward))
    names |= set(parameters(type(model).prepare_inputs_for_generation))
    if model.config.is_encoder_decoder:
        encoder, decoder = (getattr(model, f"get_{part}", lambda: None)() for part in ("encoder", "decoder"))
        names |= set(parameters(type(encoder).forward)) if encoder is not None else set()
        if decoder is not None:
            names |= {f"decoder_{name}" for name in parameters(type(decoder).forward)}
        names |= {"encoder_outputs", "decoder_input_ids"}
    return frozenset(names - {"self", "labels"})


@functools.lru_cache(maxsize=256)
def parameters(function: Any) -> tuple[str, ...]:
    """Return the names of a function's parameters, ``**kwargs`` left out.

    Args:
        function: Any function.
    """
    found = inspect.signature(function).parameters.values()
    return tuple(p.name for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sequences may and must become, in tokens of the returned sequences.

    Attributes:
        max_length: Where every row stops.
        new_tokens: How many steps that is.
        min_length: Before it no row ends, prompt included.
        min_new_tokens: So many new tokens no row ends before.
    """

    max_length: int
    new_tokens: int
    min_length: int
    min_new_tokens: int

    def reaching(self, max_length: int | None) -> Lengths:
        """Return lengths with room for a user's own `MaxLengthCriteria` that goes further.

        Args:
            max_length: Where the criteria stop; None where they do not.
        """
        more = (max_length or 0) - self.max_length
        if more <= 0:
            return self
        return replace(self, max_length=self.max_length + more, new_tokens=self.new_tokens + more)


def settle_lengths(
    config: GenerationConfig,
    by_user: frozenset[str],
    *,
    ids_length: int,
    embeds_length: int,
    past_length: int,
    positions: int | None,
    absolute: bool,
    feeds_last: bool = False,
) -> Lengths:
    """Settle the lengths of a call.

    Args:
        config: The settled config.
        by_user: Fields that the user set.
        ids_length: Tokens of the prompt that are part of the returned sequences.
        embeds_length: Positions of the prompt that are not (`inputs_embeds`).
        past_length: Tokens before the prompt that only the cache knows of.
        positions: How many positions the model has; None where there is no bound.
        absolute: Whether the model cannot go beyond them at all.
        feeds_last: Whether the strategy runs the last new token too.

    Raises:
        GenerationError: there is no room for a new token, or the user asked for more than fits.
    """
    prompt = ids_length + embeds_length
    context = past_length + prompt
    default = not config.is_set("max_length") and config.max_new_tokens is None
    if config.max_new_tokens is not None:
        new = config.max_new_tokens
        if {"max_new_tokens", "max_length"} <= by_user:
            logger.warning(
                "Both max_new_tokens=%d and max_length=%d are set; max_new_tokens counts.",
                new,
                config.max_length,
            )
    elif default:
        new = config.max_length
    else:
        new = config.max_length - prompt
        if new < 1:
            raise GenerationError(
                "The prompt leaves no room for a new token",
                where="max_length",
                expected=f"a prompt shorter than max_length={config.max_length}",
                found=f"{prompt} tokens",
                mend="Pass max_new_tokens, which does not count the prompt, or raise max_length.",
            )
    if positions is not None and feeds_last:
        positions -= 1
    new = _within_positions(new, context, positions, absolute=absolute, default=default)
    least = config.min_new_tokens or 0
    shortest = 0 if least else max(config.min_length - embeds_length, 0)
    needed = max(least, shortest - ids_length)
    if needed > new:
        name = "min_new_tokens" if least else "min_length"
        if name in by_user and by_user & {"max_new_tokens", "max_length"}:
            raise GenerationError(
                f"{name}={getattr(config, name)} asks for more than the {new} new tokens that are allowed",
                where=name,
                mend=f"Lower {name} or raise max_new_tokens.",
            )
        logger.warning("%s=%d cannot be reached: only %d new tokens fit.", name, getattr(config, name), new)
    return Lengths(ids_length + new, new, shortest, least)


def _within_positions(new: int, context: int, positions: int | None, *, absolute: bool, default: bool) -> int:
    if positions is None:
        return new
    if context > positions:
        if absolute:
            raise GenerationError(
                "The prompt is longer than the model has positions",
                where="input_ids",
                expected=f"at most {positions} tokens",
                found=context,
                mend="Keep its last part: input_ids[:, -n:].",
            )
        logger.warning(
            "The prompt of %d tokens is longer than the %d positions that this model was trained with; "
            "expect worse text.",
            context,
            positions,
        )
        return new
    if default and context < positions:
        return min(new, positions - context)
    # The last new token is never fed back, so it needs no position.
    if absolute and new > positions - context + 1:
        new = positions - context + 1
        logger.warning("Generation stops after %d new tokens, at the model's last position.", new)
    return new
