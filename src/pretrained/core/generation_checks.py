# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a generation config: values, pairs of fields that clash, fields without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrained.core.generation_fields import FIELDS
from pretrained.errors import GenerationError

if TYPE_CHECKING:
    from pretrained.core.generation_config import GenerationConfig

_SIZED = ("static", "sliding_window", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")
_OUTPUT_FLAGS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def wrong_value(name: str, value: Any, expected: str) -> GenerationError:
    """Return the error for a field's value.

    Args:
        name: The field.
        value: What it was set to.
        expected: What would have been right.
    """
    mend = "Leave it out for its default" + (
        f" ({FIELDS[name].default!r})." if FIELDS[name].default is not None else "."
    )
    if name == "top_p" and value == 0:
        mend = "For the most probable token alone, pass do_sample=False."
    return GenerationError(f"{name} cannot be {value!r}", expected=expected, mend=mend)


def contradictions(config: GenerationConfig) -> list[GenerationError]:
    """Return an error for each pair of fields that cannot both be obeyed.

    Args:
        config: The config.
    """
    found = []

    def add(what: str, where: str, mend: str) -> None:
        found.append(GenerationError(what, where=where, mend=mend))

    if config.do_sample and config.temperature == 0:
        add(
            "temperature cannot be 0 when sampling",
            "temperature",
            "For the most probable token each time, pass do_sample=False; else a temperature above 0.",
        )
    for least, most in (("min_length", "max_length"), ("min_new_tokens", "max_new_tokens")):
        if config.is_set(least) and config.is_set(most) and getattr(config, least) > getattr(config, most):
            add(
                f"{least}={getattr(config, least)} is more than {most}={getattr(config, most)}",
                least,
                f"Lower {least} or raise {most}.",
            )
    returned, beams = config.num_return_sequences, config.num_beams
    if returned > 1 and beams == 1 and not config.do_sample:
        add(
            f"Greedy decoding gives one sequence, so num_return_sequences={returned} would repeat it",
            "num_return_sequences",
            "Pass do_sample=True, or num_beams of at least as many, or leave num_return_sequences out.",
        )
    if beams > 1 and returned > beams:
        add(
            f"num_return_sequences={returned} is more than num_beams={beams}",
            "num_return_sequences",
            "Raise num_beams or lower num_return_sequences.",
        )
    found += _beam_contradictions(config)
    if config.dola_layers is not None and beams > 1:
        add(
            f"dola_layers is for one sequence at a time, and num_beams={beams}",
            "dola_layers",
            "Pass num_beams=1, or leave dola_layers out.",
        )
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(config, name)
        forced = [forced] if isinstance(forced, int) else forced
        if forced and config.suppress_tokens and set(forced) <= set(config.suppress_tokens):
            add(f"{name}={forced} is also in suppress_tokens", name, "Take it out of one of the two.")
    if config.compile and config.disable_compile:
        add("compile and disable_compile contradict each other", "compile", "Leave one of them out.")
    elif wants_compile(config) and not config.use_cache:
        add("A compiled step needs a cache", "use_cache", "Leave use_cache=False out, or compile.")
    elif wants_compile(config) and config.cache_implementation not in (None, "static"):
        add(
            f"A compiled step cannot use a cache of kind {config.cache_implementation!r}",
            "cache_implementation",
            'Leave it out or pass "static"; or leave compile out.',
        )
    if config.low_memory:
        add(
            "low_memory is gone from this ecosystem",
            "low_memory",
            "Leave it out; memory is bounded without it.",
        )
    return found


def wants_compile(config: GenerationConfig) -> bool:
    """Tell whether a config asks for a compiled step.

    Args:
        config: The config.
    """
    return (config.compile or config.compile_config is not None) and not config.disable_compile


def _beam_contradictions(config: GenerationConfig) -> list[GenerationError]:
    """What is wrong with groups of beams and constraints."""
    found = []
    beams, groups = config.num_beams, config.num_beam_groups
    constrained = next((n for n in ("constraints", "force_words_ids") if config.is_set(n)), None)

    def add(what: str, where: str, mend: str) -> None:
        found.append(GenerationError(what, where=where, mend=mend))

    if beams % groups:
        add(
            f"num_beams={beams} cannot be divided into num_beam_groups={groups}",
            "num_beam_groups",
            f"Pass num_beams={groups * max(-(-beams // groups), 2)}, or another number of groups.",
        )
    elif groups > 1:
        if config.diversity_penalty <= 0:
            add(
                f"num_beam_groups={groups} would all search alike with "
                f"diversity_penalty={config.diversity_penalty}",
                "diversity_penalty",
                "Pass a diversity_penalty above 0, such as 1.0.",
            )
        if config.do_sample:
            add(
                "Groups of beams are searched, not sampled",
                "num_beam_groups",
                "Pass do_sample=False or num_beam_groups=1.",
            )
    if constrained is None:
        return found
    if beams == 1:
        add(f"{constrained} are for beam search", constrained, "Pass num_beams of 2 or more.")
    if config.do_sample:
        add(
            f"{constrained} are for beam search, which do_sample=True is not",
            constrained,
            "Pass do_sample=False.",
        )
    if groups > 1:
        add(
            f"{constrained} cannot be met by groups of beams",
            constrained,
            "Pass num_beam_groups=1.",
        )
    ends = config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    if any(one in ends for one in _flat(config.force_words_ids or [])):
        add(
            "force_words_ids hold the token that ends a text",
            "force_words_ids",
            "Tokenize the words with add_special_tokens=False.",
        )
    return found


def _flat(items: list[Any]) -> list[int]:
    return [one for item in items for one in (_flat(item) if isinstance(item, list) else [item])]


def effectless(config: GenerationConfig) -> dict[str, str]:
    """Return the set fields that have no effect beside the others, each with the reason.

    Args:
        config: The config.
    """
    found = {}
    for name in (name for name in FIELDS if config.is_set(name)):
        field = FIELDS[name]
        if getattr(config, name) == field.default:
            continue
        if name == "penalty_alpha" and (config.do_sample or config.num_beams > 1 or config.top_k < 2):
            found[name] = "contrastive search is neither sampled nor with beams, and needs top_k of 2 or more"
        contrastive = name == "top_k" and config.penalty_alpha
        if field.group == "sampling" and not config.do_sample and not contrastive:
            found[name] = "it is used only when sampling; set do_sample=True or leave it out"
        elif name == "diversity_penalty" and config.num_beam_groups == 1:
            found[name] = "it is used only by groups of beams; set num_beam_groups or leave it out"
        elif field.group == "beams" and config.num_beams == 1:
            found[name] = "it is used only by beam search; set num_beams or leave it out"
        elif name in _OUTPUT_FLAGS and not config.return_dict_in_generate:
            found[name] = "nothing returns it; set return_dict_in_generate=True"
        elif field.group == "cache" and name != "use_cache" and not config.use_cache:
            found[name] = "there is no cache with use_cache=False"
        elif name == "max_cache_len" and config.cache_implementation not in _SIZED:
            found[name] = 'it sizes a static cache; set cache_implementation="static"'
        elif name == "return_legacy_cache" and not config.return_dict_in_generate:
            found[name] = "no cache is returned; set return_dict_in_generate=True"
    return found
