# SPDX-License-Identifier: Apache-2.0
"""`LoadPlan`: what a load will do, decided from headers before a byte of weights is read.

`plan_load` is pure. It takes what the files hold (a `Checkpoint`), what the model promises (a
`Skeleton`) and the wishes of the call, and returns a frozen value that a backend executes and that can
be printed first. All contradictions are found here, together, so that a load that starts also ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.keys import KeyMatch, KeyRule, match_keys
from pretrained.core.report import Mismatch, fold_keys, fold_mismatches
from pretrained.core.skeleton import Skeleton
from pretrained.errors import WeightsError, did_you_mean

_MANY = 20
# No published model has a tenth of these; a config that asks for more than the files hold is a lie, and
# building its modules would take memory before any weight is missed.
_MANY_LAYERS = 1000
# How the schemes of the ecosystem name what stands beside (or for) a quantized weight.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|weight_format|weight_scale(_inv)?|weight_zero_point|weight_packed|"
    r"weight\.(absmax|quant_map|nested_absmax|quant_state\..+))$"
)


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor of a file whose values are laid out differently from the model's.

    Attributes:
        key: Promised key, before any prefix.
        apply: numpy array -> numpy array in the model's layout; None where only the name differs.
        shape: Shape after `apply`; None for the shape in the file.
    """

    key: str
    apply: Callable[[Any], Any] | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """The wishes of a call that concern which weights fill what.

    Attributes:
        dtype: Name of the dtype to load floating weights as; None keeps each tensor's own.
        keep_fp32: Module-path patterns that stay float32 when `dtype` is float16.
        keep_fp32_strict: The same for float16 and bfloat16.
        ignore_mismatched_sizes: Initialise weights whose shape differs instead of refusing.
        optional: Patterns of weights that a file may lack although the body needs them (a pooler).
        silent_missing: Regular expressions of missing keys that are no finding.
        silent_unexpected: Regular expressions of unexpected keys that are no finding.
        key_mapping: The user's ``{regex: replacement}``.
        rules: The architecture's key rules.
        base_prefix: Attribute that holds the headless model.
        allow_missing: Initialise missing weights of the body instead of refusing.
        packed: Keys of quantized layers, whose tensors are taken as they are stored.
    """

    dtype: str | None = "float32"
    keep_fp32: tuple[str, ...] = ()
    keep_fp32_strict: tuple[str, ...] = ()
    ignore_mismatched_sizes: bool = False
    optional: tuple[str, ...] = ()
    silent_missing: tuple[str, ...] = ()
    silent_unexpected: tuple[str, ...] = ()
    key_mapping: Mapping[str, str] | None = None
    rules: Sequence[KeyRule] = ()
    base_prefix: str = ""
    allow_missing: bool = False
    packed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One weight: where it comes from and what it becomes.

    Attributes:
        key: Promised key.
        source: The span in the file.
        dtype: Name of the dtype it is loaded as.
        apply: Change of layout on the way, or None.
        shape: Shape after `apply`; None for the shape in the file.
    """

    key: str
    source: TensorInfo
    dtype: str
    apply: Callable[[Any], Any] | None = None
    shape: tuple[int, ...] | None = None

    @property
    def is_view(self) -> bool:
        """Whether the file's bytes are the weight's values as they stand."""
        return self.apply is None and self.source.dtype == self.dtype


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load will do.

    Attributes:
        steps: One for each tensor to read, in file order; tied weights have one.
        ties: Alias -> owner, both promised keys, that will share one tensor.
        initialise: Promised keys to initialise, for the files lack them or hold another shape.
        missing: Those of `initialise` that are a finding.
        unexpected: Keys of the files that serve nothing and are a finding.
        mismatched: ``(key, shape in the file, shape in the model)``.
        dropped: Keys of the files that a rule leaves out -> why.
        renamed: Promised key -> its name in files like these, where a rule changed it; see `KeyMatch`.
    """

    steps: tuple[LoadStep, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    initialise: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes_to_read(self) -> int:
        """Bytes of the files that the load will read."""
        return sum(step.source.nbytes for step in self.steps)

    @property
    def nbytes_resident(self) -> int:
        """Bytes the loaded weights take, newly initialised ones left out."""
        return sum(step.source.num_elements * DTYPES[step.dtype].itemsize for step in self.steps)

    @property
    def dtypes(self) -> dict[tuple[str, str], int]:
        """(stored dtype, loaded dtype) -> number of tensors."""
        return dict(Counter((step.source.dtype, step.dtype) for step in self.steps))


def plan_load(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    policy: LoadPolicy,
    *,
    layouts: Mapping[str, MappedTensor] | None = None,
    source: object = None,
) -> LoadPlan:
    """Decide what a load will do.

    Args:
        checkpoint: What the files hold.
        skeleton: What the model promises.
        policy: The wishes of the call.
        layouts: For files with names and layouts of their own (GGUF): key in the file -> what it
            becomes. Keys that are absent here are left out.
        source: What to name in errors; None for the first file.

    Raises:
        WeightsError: weights of the body are missing, or shapes differ, and the call does not allow it;
            or the files hold numbers that are no floating weights.
    """
    source = source or (checkpoint.files[0] if checkpoint.files else "state_dict")
    names = {key: key for key in checkpoint.tensors}
    if layouts is not None:
        names = {layouts[key].key: key for key in checkpoint.tensors if key in layouts}
    match = match_keys(
        names,
        skeleton.params,
        ties=skeleton.ties,
        base_prefix=policy.base_prefix,
        rules=policy.rules,
        key_mapping=policy.key_mapping,
    )
    steps, mismatched = _steps(checkpoint, skeleton, policy, match, names, layouts or {})
    _check_numbers(steps, skeleton, match, policy.packed, source)
    if mismatched and not policy.ignore_mismatched_sizes:
        raise _shapes_differ(mismatched, source)
    _check_body(match, skeleton, policy, names, source)
    bad = {key for key, _, _ in mismatched}
    return LoadPlan(
        steps=tuple(sorted(steps, key=lambda step: (str(step.source.file), step.source.offset))),
        ties=dict(skeleton.ties),
        initialise=(*match.missing, *(key for key in match.sources if key in bad)),
        missing=_findings(match.missing, policy.silent_missing),
        unexpected=_findings(match.unexpected, policy.silent_unexpected),
        mismatched=tuple(mismatched),
        dropped=match.dropped,
        renamed={} if layouts is not None else match.renamed,
    )


def check_depth(config: Any, checkpoint: Checkpoint, source: object = None) -> None:
    """Raise where a config asks for far more layers than the files can fill, before they are built.

    Args:
        config: A model's config.
        checkpoint: What the files hold.
        source: What to name in the error; None for the first file.

    Raises:
        WeightsError: it does.
    """
    names = ("num_hidden_layers", "num_decoder_layers")
    counts = {name: getattr(config, name, None) or 0 for name in names}
    name = max(counts, key=lambda name: counts[name])
    if counts[name] > _MANY_LAYERS and counts[name] > len(checkpoint.tensors):
        raise WeightsError(
            f"The config asks for {counts[name]} layers; the files hold {len(checkpoint.tensors)} tensors",
            where=source or (checkpoint.files[0] if checkpoint.files else "state_dict"),
            mend=f"Correct {config.attribute_map.get(name, name)!r} in config.json.",
        )


def _steps(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    policy: LoadPolicy,
    match: KeyMatch,
    names: Mapping[str, str],
    layouts: Mapping[str, MappedTensor],
) -> tuple[list[LoadStep], list[Mismatch]]:
    steps, mismatched = [], []
    for key, spec in skeleton.params.items():
        if key not in match.sources or key in skeleton.ties:
            continue
        file_key = names[match.sources[key]]
        info = checkpoint.tensors[file_key]
        layout = layouts.get(file_key)
        shape = layout.shape if layout is not None and layout.shape is not None else info.shape
        if shape != spec.shape:
            mismatched.append((key, shape, spec.shape))
            continue
        dtype = target_dtype(key, info.dtype, policy)
        steps.append(LoadStep(key, info, dtype, None if layout is None else layout.apply, shape))
    return steps, mismatched


def target_dtype(key: str, stored: str, policy: LoadPolicy) -> str:
    """Return the name of the dtype that a weight is loaded as.

    Args:
        key: Promised key.
        stored: Its dtype in the file; a block type of GGML counts as floating.
        policy: The wishes of the call.
    """
    plain = DTYPES.get(stored)
    if key in policy.packed or (plain is not None and not plain.is_floating):
        return stored
    dtype = policy.dtype or (stored if plain is not None else "float32")
    half = dtype in ("float16", "bfloat16")
    keep = policy.keep_fp32_strict if half else ()
    if dtype == "float16":
        keep = (*keep, *policy.keep_fp32)
    return "float32" if any(_names_module(pattern, key) for pattern in keep) else dtype


def _names_module(pattern: str, key: str) -> bool:
    """Tell whether a whole dotted part (or path) of `key` fits, so "wo" is not in "word_embeddings"."""
    path = f".{key}."
    return f".{pattern}." in path or fnmatchcase(key, pattern)


def _findings(keys: Sequence[str], silent: Sequence[str]) -> tuple[str, ...]:
    patterns = [re.compile(pattern) for pattern in silent]
    return tuple(key for key in keys if not any(pattern.search(key) for pattern in patterns))


def _check_numbers(
    steps: Sequence[LoadStep],
    skeleton: Skeleton,
    match: KeyMatch,
    packed: frozenset[str],
    source: object,
) -> None:
    """Raise where the files hold whole numbers or quantized ones where weights should be."""
    quantized = [key for key in match.unexpected if _QUANTIZED.search(key)]
    if quantized:
        raise WeightsError(
            f"The weights are quantized: {len(quantized)} keys hold scales or packed numbers",
            where=source,
            found=_listed(fold_keys(quantized)),
            mend="To be read, config.json must say how, as quantization_config; otherwise use the checkpoint "
            "in a plain dtype, or a GGUF file.",
        )
    whole = [
        f"{step.key} ({step.source.dtype})"
        for step in steps
        if step.key not in packed
        and not skeleton.params[step.key].is_buffer
        and step.source.dtype in DTYPES
        and not DTYPES[step.source.dtype].is_floating
    ]
    if whole:
        raise WeightsError(
            f"{_counted(len(whole), 'weight')} stored as no floating numbers",
            where=source,
            expected="a floating dtype",
            found=_listed(whole),
            mend="If they are quantized, use the checkpoint in a plain dtype; otherwise convert them where "
            "they were made.",
        )


def _check_body(
    match: KeyMatch, skeleton: Skeleton, policy: LoadPolicy, names: Iterable[str], source: object
) -> None:
    """Raise where weights of the body, not of a new head, are missing."""
    if policy.allow_missing:
        return
    prefix = f"{policy.base_prefix}."
    has_head = any(key.startswith(prefix) for key in skeleton.params)
    absent = [
        key
        for key in _findings(match.missing, policy.silent_missing)
        if (key.startswith(prefix) or not has_head)
        and not any(_names_module(pattern, key) for pattern in policy.optional)
    ]
    if not absent:
        return
    total = len(skeleton.params)
    raise WeightsError(
        f"{len(absent)} of {total} weights of the model {'is' if len(absent) == 1 else 'are'} not in the "
        "checkpoint",
        where=source,
        expected=_listed(fold_keys(absent)),
        found=f"{len(match.sources)} matching and {len(match.unexpected)} other keys",
        mend=f"{_hint(match, absent[0], policy, names)}Check that config.json describes these weights, map "
        "the names with key_mapping, or pass allow_missing=True to initialise what is missing.",
    )


def _hint(match: KeyMatch, absent: str, policy: LoadPolicy, names: Iterable[str]) -> str:
    """Say what in the call or the file may be behind a missing weight."""
    if policy.key_mapping:
        keys = list(names)
        idle = [pattern for pattern in policy.key_mapping if not any(re.search(pattern, key) for key in keys)]
        if idle:
            return f"key_mapping's {idle[0]!r} fits no key of the file. "
        return f"key_mapping was applied first, to keys such as {keys[0]!r}. " if keys else ""
    if not match.unexpected:
        return ""
    near = did_you_mean(absent, match.unexpected)
    return f"The file has keys that nothing uses, such as {match.unexpected[0]!r}. {near}".rstrip() + " "


def _shapes_differ(mismatched: Sequence[Mismatch], source: object) -> WeightsError:
    return WeightsError(
        f"{_counted(len(mismatched), 'weight', 'has', 'have')} another shape in the file than in the model",
        where=source,
        found=_listed(fold_mismatches(mismatched)),
        mend="Check that config.json describes these weights, or pass ignore_mismatched_sizes=True to "
        "initialise them anew.",
    )


def _counted(count: int, noun: str, one: str = "is", many: str = "are") -> str:
    return f"{count} {noun} {one}" if count == 1 else f"{count} {noun}s {many}"


def _listed(lines: Sequence[str]) -> str:
    shown = "; ".join(lines[:_MANY])
    return shown if len(lines) <= _MANY else f"{shown}; and {len(lines) - _MANY} more"
