# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint or a machine, and what can be done about it: pure checks, frozen findings.

Each function looks at one thing and returns every `Finding` about it, where a load would stop at the first.
Nothing is repaired, and of weights only headers are read, save by `check_values`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.files import open_checkpoint, read_index
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.ggml import DEQUANTIZABLE, is_block_type
from pretrained.core.plan import LoadPlan
from pretrained.core.reader import MappedFiles
from pretrained.core.report import fold_keys, fold_mismatches, format_bytes
from pretrained.core.skeleton import Skeleton
from pretrained.core.weights_names import INDEX_NAME, few
from pretrained.errors import PretrainedError

Level = Literal["fault", "notice"]

_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD: Final = re.compile(r".+-\d{5,}-of-\d{5,}(\.safetensors|\.bin)")
_INDEX: Final = re.compile(
    r"(?P<stem>[^.]+)(?P<end>\.safetensors|\.bin)\.index(?:\.(?P<variant>[\w-]+))?\.json"
)
_TEMPORARY: Final = re.compile(r"\.tmp-[0-9a-f]{8}-.+")
_PARTIAL: Final = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
# Numbers looked at at a time, and bytes of a tokenizer.json that are parsed.
_PIECE: Final = 1 << 22
_MAX_TOKENIZER_BYTES: Final = 100_000_000
_VOCABULARIES: Final = {
    "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
}  # fmt: skip
_HEAD_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that somebody should know.

    Attributes:
        level: ``"fault"`` stands in the way of a load or a right result; ``"notice"`` does not.
        what: What was found.
        where: File, key or package; empty where `what` says it.
        mend: What can be done about it.
    """

    level: Level
    what: str
    where: str = ""
    mend: str = ""

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        text = f"{self.level}: {self.what}{where}"
        stop = "" if text.endswith((".", "?", "!")) else "."
        return f"{text}{stop} {self.mend}".rstrip()


def of_error(error: PretrainedError, level: Level = "fault") -> Finding:
    """Return what an error says as a finding.

    Args:
        error: From a reader, a config or a plan.
        level: How bad it is.
    """
    facts = [f"expected {error.expected}"] if error.expected is not None else []
    facts += [f"found {error.found}"] if error.found is not None else []
    what = error.what + (": " + ", ".join(facts) if facts else "")
    where = "" if error.where is None else str(error.where)
    return Finding(level, what.rstrip("."), where, error.mend or "")


# The machine


@dataclass(frozen=True, slots=True)
class Environment:
    """What a machine has, as far as it matters here.

    Attributes:
        python: Its version.
        versions: Installed version of each package; None where it is absent.
        least: Least version of each package that this library asks for.
        needed: Packages that nothing works without.
        accelerators: Names of devices that the system shows.
        memory_free: Bytes that a process can still take; None where nobody says.
        cache: The download cache.
        disk_free: Bytes free where the cache lies; None where nobody says.
        partial: Downloads in the cache that were not finished -> bytes.
        settings: Environment variables that matter, those that are set.
    """

    python: str
    versions: Mapping[str, str | None]
    least: Mapping[str, str]
    needed: frozenset[str]
    accelerators: tuple[str, ...] = ()
    memory_free: int | None = None
    cache: str = ""
    disk_free: int | None = None
    partial: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


def check_environment(found: Environment) -> list[Finding]:
    """Return what stands in the way of using this library on a machine.

    Args:
        found: What the machine has.
    """
    findings = []
    for name, version in found.versions.items():
        least = found.least.get(name)
        if version is None and name in found.needed:
            findings.append(
                Finding("fault", f"{name} is not installed", mend=f"pip install '{name}>={least}'")
            )
        elif version is not None and least is not None and _numbers(version) < _numbers(least):
            mend = f"pip install -U '{name}>={least}'"
            findings.append(Finding("fault", f"{name} {version} is older than {least}", mend=mend))
    torch = found.versions.get("torch")
    if torch is None and "torch" in found.versions:
        mend = "pip install 'pretrained[torch]', to load models and not only to look at them."
        findings.append(Finding("notice", "PyTorch is not installed", mend=mend))
    elif torch is not None and torch.endswith("+cpu") and found.accelerators:
        findings.append(
            Finding(
                "notice",
                f"PyTorch {torch} is a build without accelerators, and this machine has one",
                found.accelerators[0],
                "Install the build for it: https://pytorch.org/get-started",
            )
        )
    for name in ("tokenizers", "jinja2"):
        if name in found.versions and found.versions[name] is None:
            what = {"tokenizers": "tokenizers cannot be loaded", "jinja2": "chat templates cannot be used"}[
                name
            ]
            mend = "pip install 'pretrained[text]'"
            findings.append(Finding("notice", f"{name} is not installed: {what}", mend=mend))
    if found.disk_free is not None and found.disk_free < 1 << 30:
        free = format_bytes(found.disk_free)
        findings.append(
            Finding(
                "notice", f"The disk of the download cache has {free} free", found.cache, "Free some space."
            )
        )
    if found.partial:
        size = format_bytes(sum(found.partial.values()))
        findings.append(
            Finding(
                "notice",
                f"Downloads that were not finished: {len(found.partial)}, of {size}",
                next(iter(found.partial)),
                "The next download of the same file goes on from there; or remove them.",
            )
        )
    return findings


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


# The files of a folder


def check_listing(folder: Path, sizes: Mapping[str, int]) -> list[Finding]:
    """Return what the names of a folder's files tell: leftovers, pickles, weights that nothing uses.

    Args:
        folder: A model's folder.
        sizes: Bytes of each file in it, by name.
    """
    findings = []
    killed = sorted(name for name in sizes if _TEMPORARY.fullmatch(name))
    if killed:
        size = format_bytes(sum(sizes[name] for name in killed))
        mend = "If no save is running, remove them; the next save into this folder does."
        findings.append(Finding("notice", f"A save that was cut off left {size}", few(killed), mend))
    partial = sorted(name for name in sizes if name.endswith(_PARTIAL))
    if partial:
        findings.append(
            Finding("fault", "A download was not finished", few(partial), "Fetch these files again.")
        )
    pickles = sorted(name for name in sizes if name.endswith(_PICKLES))
    others = any(name.endswith(".safetensors") for name in sizes)
    if pickles:
        what = "Pickles can run code in libraries that unpickle them; this one reads them without executing"
        mend = (
            "They are not used beside safetensors: remove them."
            if others
            else "pretrained convert makes safetensors."
        )
        findings.append(Finding("notice", what, few(pickles), mend))
    return findings + _stale(folder, sizes)


def _stale(folder: Path, sizes: Mapping[str, int]) -> list[Finding]:
    """Tell which shards no index names, and which index one file makes useless."""
    findings, named, broken = [], set(), False
    for name in sorted(name for name in sizes if INDEX_NAME.fullmatch(name)):
        try:
            named |= set(read_index(folder / name).files)
        except PretrainedError:
            broken = True  # opening the weights says why
        part = _INDEX.fullmatch(name)
        if part is None:
            continue
        single = f"{part['stem']}{'.' + part['variant'] if part['variant'] else ''}{part['end']}"
        if single in sizes:
            what = f"{single} is loaded, and {name} passed over"
            findings.append(Finding("notice", what, mend="Remove the one that is out of date."))
    shards = [name for name in sizes if _SHARD.fullmatch(name)]
    stale = sorted(name for name in shards if name not in named)
    if stale and not broken:
        size = format_bytes(sum(sizes[name] for name in stale))
        findings.append(
            Finding(
                "notice",
                f"Shards that no index names take {size}",
                few(stale),
                "Remove them if they are old.",
            )
        )
    return findings


def check_weights(files: Iterable[Path]) -> list[Finding]:
    """Read the header of each weights file by itself, and return what is wrong with each.

    Args:
        files: The files of one checkpoint.
    """
    findings = []
    for file in files:
        try:
            open_checkpoint(file)
        except PretrainedError as error:
            findings.append(of_error(error))
    return findings


# Against the architecture


def check_plan(plan: LoadPlan, skeleton: Skeleton, special: Iterable[str] = ()) -> list[Finding]:
    """Return which weights a load would miss, not use, or find in another shape.

    Args:
        plan: With `allow_missing` and `ignore_mismatched_sizes`.
        skeleton: What the architecture promises.
        special: Promised keys that the files hold quantized, and the plan does not know.
    """
    findings, quantized = [], set(special)
    missing = [key for key in plan.missing if skeleton.ties.get(key, key) not in quantized]
    if missing:
        mend = (
            "Check that config.json and its 'architectures' describe these weights; a load initialises them."
        )
        what = f"Weights that are not in the files: {len(missing)} of {len(skeleton.params)}"
        findings.append(Finding("fault", what, "; ".join(fold_keys(missing)[:5]), mend))
    if plan.unexpected:
        what = f"Tensors of the files that serve nothing in this architecture: {len(plan.unexpected)}"
        findings.append(
            Finding(
                "notice",
                what,
                "; ".join(fold_keys(plan.unexpected)[:5]),
                "Check 'architectures' in config.json; a head for another task is left out by a load.",
            )
        )
    if plan.mismatched:
        what = f"Weights with another shape than config.json says: {len(plan.mismatched)}"
        findings.append(
            Finding("fault", what, "; ".join(fold_mismatches(plan.mismatched)[:5]), "Correct config.json.")
        )
    return findings


def check_ties(checkpoint: Checkpoint, ties: Mapping[str, str]) -> list[Finding]:
    """Return which weights the config calls one and the files hold as two.

    Args:
        checkpoint: The files.
        ties: Alias -> owner, by the config.
    """
    findings = []
    for alias, owner in ties.items():
        both = [checkpoint.tensors.get(key) for key in (alias, owner)]
        if both[0] is None or both[1] is None or _alike(both[0], both[1]):
            continue
        what = f"The config ties {alias} to {owner}, and the files hold two different tensors"
        mend = "A load believes the files. Set tie_word_embeddings to false in config.json."
        findings.append(Finding("notice", what, mend=mend))
    return findings


def _alike(first: TensorInfo, second: TensorInfo) -> bool:
    """Tell whether two tensors begin alike; heads of their own differ in their first numbers."""
    if (first.dtype, first.shape, first.nbytes) != (second.dtype, second.shape, second.nbytes):
        return False
    if (first.file, first.offset) == (second.file, second.offset):
        return True
    starts = []
    for info in (first, second):
        with info.file.open("rb") as opened:
            opened.seek(info.offset)
            starts.append(opened.read(min(info.nbytes, _HEAD_BYTES)))
    return starts[0] == starts[1]


def check_values(checkpoint: Checkpoint) -> list[Finding]:
    """Read every tensor and return those with NaN or infinities among their numbers.

    Args:
        checkpoint: The files.
    """
    findings = []
    files = MappedFiles(checkpoint.states)
    for info in checkpoint.tensors.values():
        nan, infinite = _count_bad(files, info)
        if nan or infinite:
            parts = [f"{count} {name}" for count, name in ((nan, "NaN"), (infinite, "infinite")) if count]
            what = f"{info.key!r} holds {' and '.join(parts)} of {info.num_elements} numbers"
            mend = (
                "The file is damaged or the training has failed: take another copy or an earlier checkpoint."
            )
            findings.append(Finding("fault", what, str(info.file.name), mend))
    return findings


def _count_bad(files: MappedFiles, info: TensorInfo) -> tuple[int, int]:
    if is_block_type(info.dtype):
        if info.dtype not in DEQUANTIZABLE:
            return 0, 0
    elif not DTYPES[info.dtype].is_floating:
        return 0, 0
    array = files.array(info)
    flat = np.ascontiguousarray(array).reshape(-1)
    nan = infinite = 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        finite = np.isfinite(piece)
        if not finite.all():
            count = int(np.isnan(piece).sum())
            nan, infinite = nan + count, infinite + int((~finite).sum()) - count
    files.release(info)
    return nan, infinite


# What stands beside the weights


def check_config(values: Mapping[str, Any], checkpoint: Checkpoint | None) -> list[Finding]:
    """Return what config.json says against itself or against the files.

    Args:
        values: Its content.
        checkpoint: The files; None where there are none.
    """
    findings = []
    size = values.get("vocab_size")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        for index in _ids(values.get(name)):
            if isinstance(size, int) and not -1 <= index < size:
                mend = "Correct it, or resize the embedding."
                what = f"{name} {index} is outside the vocabulary of {size}"
                findings.append(Finding("fault", what, "config.json", mend))
    said = str(values.get("dtype", values.get("torch_dtype")) or "").removeprefix("torch.")
    if checkpoint is not None and said in DTYPES:
        kinds = {
            i.dtype for i in checkpoint.tensors.values() if i.dtype in DTYPES and DTYPES[i.dtype].is_floating
        }
        if kinds and said not in kinds:
            what = f"config.json says {said}, and the weights are {', '.join(sorted(kinds))}"
            mend = "dtype='auto' loads them as the config says. Correct the config, or convert the weights."
            findings.append(Finding("notice", what, mend=mend))
    if values.get("auto_map"):
        what = "The folder names code of its own, which this library does not run"
        findings.append(
            Finding("notice", what, "auto_map in config.json", "Known architectures do not need it.")
        )
    return findings


def check_generation(config: GenerationConfig, vocab_size: int | None) -> list[Finding]:
    """Return what a generation config asks for that cannot be, or has no effect.

    Args:
        config: What generation_config.json says.
        vocab_size: Tokens that the model has.
    """
    findings = [of_error(problem) for problem in config.problems()]
    for name, reason in config.hints().items():
        findings.append(Finding("notice", f"{name} has no effect: {reason}", "generation_config.json"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for index in _ids(getattr(config, name)):
            if vocab_size is not None and not 0 <= index < vocab_size:
                what = f"{name} {index} is outside the vocabulary of {vocab_size}"
                findings.append(Finding("fault", what, "generation_config.json", "Correct it."))
    return findings


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def check_tokenizer(files: Mapping[str, Path], vocab_size: int | None) -> list[Finding]:
    """Return where a tokenizer's files and the model's vocabulary do not fit.

    Args:
        files: Those of its files that exist, by name.
        vocab_size: Rows of the embedding; None where nobody says.
    """
    if not files.keys() & _VOCABULARIES:
        mend = "Save the tokenizer there too, or load it from the repository of the model."
        return [Finding("notice", "There is no tokenizer", mend=mend)]
    file = files.get("tokenizer.json")
    if file is None:
        return []
    try:
        if file.stat().st_size > _MAX_TOKENIZER_BYTES:
            return [
                Finding("fault", "tokenizer.json is too large", str(file), "Check that it is the right file.")
            ]
        highest = _highest_id(json.loads(file.read_bytes()))
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        what = f"tokenizer.json cannot be read: {error}"
        return [Finding("fault", what, str(file), "Fetch or save it again.")]
    if vocab_size is not None and highest is not None and highest >= vocab_size:
        what = f"The tokenizer has ids up to {highest}, and the embedding {vocab_size} rows"
        mend = f"Call model.resize_token_embeddings({highest + 1}), or take the tokenizer of this model."
        return [Finding("fault", what, "tokenizer.json", mend)]
    return []


def _highest_id(content: Any) -> int | None:
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict):
        ids = [index for index in vocabulary.values() if isinstance(index, int)]
    else:
        ids = [len(vocabulary) - 1] if vocabulary else []
    ids += [token["id"] for token in content.get("added_tokens") or []]
    return max(ids, default=None)
