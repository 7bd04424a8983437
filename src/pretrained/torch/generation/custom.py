# SPDX-License-Identifier: Apache-2.0
"""Decoding loops of a user's own: a function in place of a strategy, or one from a repository."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrained.core.generation_fields import FIELDS
from pretrained.core.hub import HubOptions, resolve
from pretrained.core.own_code import CodeOptions, load_function
from pretrained.errors import GenerationError
from pretrained.torch.generation.settings import accepted
from pretrained.torch.generation.strategies import Run

FILE = "custom_generate/generate.py"
"""Where a repository has its function `generate`."""


def load_custom(
    name: str | Path | None, model: Any, trust_remote_code: bool | None, kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """Return the function of a repository or folder that generates.

    Args:
        name: Hub id or folder; None for where the model is from.
        model: The model.
        trust_remote_code: Whether the call allows that the function's file runs.
        kwargs: Hub arguments (`revision`, `token`, ...), taken out of it.

    Raises:
        ArgumentError: a repository, and no revision of it.
        ConfigError: the code was not trusted, leaves its folder, has no such function or fails.
        FileError: there is no such file.
    """
    place = name or getattr(model, "name_or_path", None)
    if not place:
        raise GenerationError(
            "There is no folder to take custom_generate from",
            where="pretrained_model_name_or_path",
            mend="Pass a folder or a hub id.",
        )
    code = CodeOptions.take({"trust_remote_code": trust_remote_code})
    source = resolve(place, HubOptions.take(kwargs))
    return load_function(source, FILE, "generate", code)


def check_custom(custom_generate: Any) -> None:
    """Raise where `custom_generate` is nothing that could generate.

    Args:
        custom_generate: As it was passed.

    Raises:
        GenerationError: it is neither a function, nor the name of a folder or repository, nor None.
    """
    named = isinstance(custom_generate, str | Path) and bool(str(custom_generate))
    if custom_generate is not None and not callable(custom_generate) and not named:
        raise GenerationError(
            "custom_generate cannot generate",
            where="custom_generate",
            expected="a function (model, input_ids, **arguments), a folder or a hub id",
            found=repr(custom_generate)[:100],
        )


def take_own_arguments(function: Any, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments out of a call that only a user's own function knows.

    Args:
        function: The function, or None.
        model: The model.
        kwargs: Of the call; changed in place.
    """
    if function is None:
        return {}
    known = accepted(model) | set(FIELDS)
    return {name: kwargs.pop(name) for name in _named(function) if name in kwargs and name not in known}


def run_custom(function: Callable[..., Any], own: dict[str, Any], more: dict[str, Any], run: Run) -> Any:
    """Call a user's function as the ecosystem does, and return what it returns.

    It is given the model and the prompt's ids, and by name `logits_processor`, `stopping_criteria`, the
    settled `generation_config`, and the inputs of a first forward (`attention_mask`, `past_key_values`,
    `use_cache`, `encoder_outputs`, ...).

    Args:
        function: The user's.
        own: Arguments that only the function knows.
        more: Arguments of `generate`; each is passed where it is set and the function takes it.
        run: The call, prepared.
    """
    inputs, config = run.inputs, copy.deepcopy(run.config)
    config.max_length = run.lengths.max_length
    encoder = inputs.encoder_outputs is not None
    mask = inputs.encoder_attention_mask if encoder else inputs.attention_mask
    shape = inputs.encoder_outputs.last_hidden_state if encoder else inputs.inputs_embeds
    shape = inputs.input_ids if shape is None else shape
    if mask is None:
        mask = torch.ones(shape.shape[:2], dtype=torch.int64, device=shape.device)
    arguments: dict[str, Any] = {
        **inputs.extra,
        "attention_mask": mask,
        "past_key_values": run.decoder.cache,
        "use_cache": run.decoder.cache is not None,
    }
    given = {
        "encoder_outputs": inputs.encoder_outputs,
        "decoder_attention_mask": inputs.attention_mask if encoder else None,
        "inputs_embeds": inputs.inputs_embeds,
        "position_ids": inputs.position_ids,
        **{name: value for name, value in more.items() if _takes(function, name)},
    }
    arguments |= {name: value for name, value in given.items() if value is not None}
    return function(
        run.model,
        run.sequences.ids.clone(),
        logits_processor=run.processors,
        stopping_criteria=run.criteria,
        generation_config=config,
        **arguments,
        **own,
    )


def run_loaded(
    model: Any,
    name: str | Path,
    trust_remote_code: bool | None,
    given: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """Load a function with `load_custom`, call it with the arguments of `generate`, and return its result.

    Args:
        model: The model.
        name: Hub id or folder.
        trust_remote_code: Whether the call allows that the function's file runs.
        given: Arguments of `generate`; those that are None are left out.
        kwargs: Its further arguments; hub arguments are taken out.
    """
    function = load_custom(name, model, trust_remote_code, kwargs)
    return function(model=model, **{n: v for n, v in given.items() if v is not None}, **kwargs)


def _named(function: Callable[..., Any]) -> list[str]:
    found = list(inspect.signature(function).parameters.values())
    # The first two are the model and the ids, whatever they are called.
    return [p.name for p in found[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _takes(function: Callable[..., Any], name: str) -> bool:
    found = inspect.signature(function).parameters.values()
    return name in _named(function) or any(p.kind is p.VAR_KEYWORD for p in found)
