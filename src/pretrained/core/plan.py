# SPDX-License-Identifier: Apache-2.0
"""`LoadPlan`: what a load will do, decided from headers before a byte of weights is read.

`plan_load` is pure. It takes what the files hold (a `Checkpoint`), what the model promises (a
`Skeleton`) and the wishes of the call, and returns a frozen value that a backend executes and that can
be printed first. All contradictions are found here, together, so that a load that starts also ends.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.keys import KeyMatch, KeyRule, match_keys
from pretrained.core.report import fold_keys
from pretrained.core.skeleton import Skeleton
from pretrained.errors import WeightsError, did_you_mean

_MANY = 20


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
        renamed: Promised key -> key in the file, where a rule changed the name.
    """

    steps: tuple[LoadStep, ...]
    ties: Mapping[str, str] = field(default_factory=dict)
    initialise: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
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
        WeightsError: weights of the body are missing, or shapes differ, and the call does not allow it.
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
    if mismatched and not policy.ignore_mismatched_sizes:
        raise _shapes_differ(mismatched, source)
    _check_body(match, skeleton, policy, source)
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


def _steps(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    policy: LoadPolicy,
    match: KeyMatch,
    names: Mapping[str, str],
    layouts: Mapping[str, MappedTensor],
) -> tuple[list[LoadStep], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
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
    if plain is not None and not plain.is_floating:
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


def _check_body(match: KeyMatch, skeleton: Skeleton, policy: LoadPolicy, source: object) -> None:
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
    near = did_you_mean(absent[0], match.unexpected)
    hint = (
        f"The file has keys that nothing uses, such as {match.unexpected[0]!r}. " if match.unexpected else ""
    )
    raise WeightsError(
        f"{len(absent)} of {len(skeleton.params)} weights of the model are not in the checkpoint",
        where=source,
        expected=_listed(fold_keys(absent)),
        found=f"{len(match.sources)} matching and {len(match.unexpected)} other keys",
        mend=f"{hint}{near} Check that config.json describes these weights, map the names with key_mapping, "
        "or pass allow_missing=True to initialise what is missing.".replace("  ", " "),
    )


def _shapes_differ(
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]], source: object
) -> WeightsError:
    lines = [f"{key}: file {list(theirs)}, model {list(ours)}" for key, theirs, ours in mismatched]
    return WeightsError(
        f"{len(lines)} weights have another shape in the file than in the model",
        where=source,
        found=_listed(lines),
        mend="Check that config.json describes these weights, or pass ignore_mismatched_sizes=True to "
        "initialise them anew.",
    )


def _listed(lines: Sequence[str]) -> str:
    shown = "; ".join(lines[:_MANY])
    return shown if len(lines) <= _MANY else f"{shown}; and {len(lines) - _MANY} more"
