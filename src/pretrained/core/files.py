# SPDX-License-Identifier: Apache-2.0
"""Decides which files of a folder are the weights, and opens them as one checkpoint.

The search order is the ecosystem's: ``model.safetensors``, its index, ``pytorch_model.bin``, its index; a
variant goes before the last extension. Where one file and an index are both there, the one file is taken,
whatever their age: file times say nothing after a download or a copy, other libraries choose the same, and
the writer of this project relies on the rule to switch from one file to shards in a single step. The index
that was passed over is named in the decision and in one log line.

An index is data from a stranger. The names in it must be plain file names in its own folder, and a link must
not lead out of it, save to the blobs of the same repository in a Hub cache.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.file_state import FileState, states_of
from pretrained.core.gguf import read_gguf
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.core.torch_pickle import read_torch_checkpoint
from pretrained.core.untrusted import (
    DOWNLOAD_AGAIN,
    describe_start,
    fault_of,
    leads_out,
    open_regular,
    parse_json_object,
    read_at,
    refuse_link_out,
)
from pretrained.core.weights_names import INDEX_NAME, candidates, choose_weights, few
from pretrained.errors import ArgumentError, CheckpointError, FileError

logger = logging.getLogger(__name__)

MAX_INDEX_BYTES: Final = 200_000_000
"""Longest index that is read; one of a hundred thousand tensors takes about ten million."""

_READERS: Final[Mapping[str, Callable[[Path], Checkpoint]]] = {
    "safetensors": read_safetensors_header,
    "pytorch": read_torch_checkpoint,
    "gguf": read_gguf,
}
_FORMATS: Final = {
    ".safetensors": "safetensors",
    ".bin": "pytorch",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".ckpt": "pytorch",
    ".gguf": "gguf",
}


@dataclass(frozen=True, slots=True)
class WeightsIndex:
    """What an index file says, checked for its form only.

    Attributes:
        weight_map: File name by tensor key. The names are plain ones: no folders, no ``..``.
        metadata: The index's own metadata, such as ``total_size``.
    """

    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def files(self) -> tuple[str, ...]:
        """The file names, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


@dataclass(frozen=True, slots=True)
class WeightsFiles:
    """Which files make a checkpoint.

    Attributes:
        format: ``"safetensors"``, ``"pytorch"`` or ``"gguf"``.
        files: The files that hold tensors.
        index: The index that names them, or None.
        weights_index: Its content, or None.
        passed_over: An index that was not used because one file holds everything.
        index_state: What the index was like before it was read.
    """

    format: str
    files: tuple[Path, ...]
    index: Path | None = None
    weights_index: WeightsIndex | None = field(default=None, repr=False)
    passed_over: Path | None = None
    index_state: FileState | None = field(default=None, repr=False)


def find_weights(
    folder: Path,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    gguf_file: str | None = None,
) -> WeightsFiles:
    """Decide which files of a folder make the checkpoint.

    Args:
        folder: A local folder.
        variant: Infix of the names: ``"fp16"`` for ``model.fp16.safetensors``.
        use_safetensors: None prefers safetensors to ``pytorch_model.bin``, True takes nothing else, False
            skips it.
        gguf_file: Take this GGUF file of the folder instead.

    Raises:
        FileError: the folder does not exist or holds no such weights; the message says what it does hold.
        CheckpointError: the index is malformed, leaves the folder, or names a file that is not there.
    """
    try:
        names = {entry.name for entry in os.scandir(folder) if not os.path.isdir(entry.path)}
    except OSError as error:
        raise FileError(
            "The folder cannot be read", where=folder, found=str(error), mend="Check the path."
        ) from error
    if gguf_file is not None:
        _check_inside(gguf_file)
        if (folder / gguf_file).is_file():  # it may lie in a subfolder
            names.add(gguf_file)
    try:
        name = choose_weights(
            names,
            variant=variant,
            use_safetensors=use_safetensors,
            gguf_file=gguf_file,
            where=str(folder),
        )
    except FileError as error:
        error.mend = error.mend or _elsewhere(folder)
        raise
    refuse_link_out(folder, folder / name)
    if INDEX_NAME.fullmatch(name):
        return _from_index(folder / name)
    order = candidates(variant, None)
    index = order[order.index(name) + 1] if name in order else None
    passed_over = folder / index if index in names else None
    if passed_over is not None:
        logger.warning(
            "%s holds both %s and %s; the first is loaded. Remove the one that is out of date.",
            folder,
            name,
            index,
        )
    return WeightsFiles(_format(folder / name), (folder / name,), passed_over=passed_over)


def open_checkpoint(weights: WeightsFiles | Path) -> Checkpoint:
    """Read the headers of a checkpoint's files and merge them.

    Args:
        weights: From `find_weights`; or a path: a folder, a file of any format, or an index.

    Returns:
        All tensors, in the order of the files and of their bytes in them; tensors that the files hold and the
        index does not name are kept. ``metadata["index"]`` holds the index's metadata.

    Raises:
        FileError: there is no such file, or it holds no weights.
        CheckpointError: a file is damaged, or the files and the index contradict each other.
    """
    if isinstance(weights, Path):
        weights = find_weights(weights) if weights.is_dir() else _from_file(weights)
    states = states_of(weights.files)
    parts = [_READERS[weights.format](file) for file in weights.files]
    # A GGUF file may name others.
    states = states_of(file for part in parts for file in part.files) | states
    if weights.index is None or weights.weights_index is None:
        return replace(parts[0], states=states)
    if weights.index_state is not None:
        states = {**states, weights.index: weights.index_state}
    tensors = _merge_tensors(parts)
    _check_against_index(tensors, weights.weights_index, index=weights.index)
    return Checkpoint(
        tensors=tensors,
        files=weights.files,
        format=weights.format,
        framework=_common_framework(parts),
        metadata=_merge_metadata(parts) | {"index": dict(weights.weights_index.metadata)},
        states=states,
    )


def read_index(file: Path) -> WeightsIndex:
    """Read an index file and check its form; the files it names are not looked at.

    Args:
        file: Such as ``model.safetensors.index.json``.

    Raises:
        FileError: it cannot be opened.
        CheckpointError: it is malformed, names no tensors, or names a file outside its folder.
    """
    with open_regular(file) as (opened, size):
        if size > MAX_INDEX_BYTES:
            raise _malformed(file, f"at most {MAX_INDEX_BYTES} bytes", f"{size} bytes")
        content = parse_json_object(read_at(opened, 0, size), where=file, what="weights index")
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise _malformed(file, 'an object under "metadata"', repr(metadata)[:100])
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise _malformed(file, 'tensor names to file names under "weight_map"', repr(weight_map)[:100])
    for name in sorted(set(weight_map.values())):
        if not _is_plain_name(name):
            raise CheckpointError(
                "The weights index names a file outside its folder",
                where=file,
                expected="a plain file name",
                found=repr(name[:200]),
                mend="Do not use this checkpoint, or correct its index.",
            )
    return WeightsIndex(weight_map, metadata)


# Which files


def _elsewhere(folder: Path) -> str:
    """Say where weights may be instead."""
    wanted = candidates(None, None)
    for inner in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        if any((inner / name).is_file() for name in wanted):
            return f"There are some in a subfolder: pass subfolder={inner.name!r}."
    return "Save or download the weights there first; from_config(config) builds a model with new ones."


def _from_file(file: Path) -> WeightsFiles:
    if INDEX_NAME.fullmatch(file.name):
        return _from_index(file)
    return WeightsFiles(_format(file), (file,))


def _from_index(index: Path) -> WeightsFiles:
    state = states_of([index]).get(index)
    content = read_index(index)
    formats = {_FORMATS.get(Path(name).suffix) for name in content.files}
    if len(formats) != 1 or None in formats:
        raise _malformed(index, "files that all end in .safetensors or all in .bin", few(content.files))
    (kind,) = formats
    files = tuple(_shard(index, name) for name in content.files)
    return WeightsFiles(str(kind), files, index, content, index_state=state)


def _format(file: Path) -> str:
    """Tell a file's format from its extension; from its first bytes where that says nothing."""
    if file.suffix in _FORMATS:
        return _FORMATS[file.suffix]
    with open_regular(file) as (opened, _):
        start = read_at(opened, 0, 32)
    if start.startswith(b"GGUF"):
        return "gguf"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "pytorch"
    if start[8:9] == b"{":
        return "safetensors"
    raise FileError(
        "This is not a weights file",
        where=file,
        expected="safetensors, PyTorch or GGUF",
        found=describe_start(start),
        mend="Pass a model's folder, or one of its weights files.",
    )


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _check_inside(gguf_file: str) -> None:
    path = Path(gguf_file)
    if path.is_absolute() or ".." in path.parts:
        raise ArgumentError(
            "The GGUF file must lie in the model's folder", where="gguf_file", found=repr(gguf_file)
        )


def _shard(index: Path, name: str) -> Path:
    """Return the path of a file that an index names, having checked that it may be used."""
    file = index.parent / name
    if not os.path.isfile(file):
        raise CheckpointError(
            f"The weights index names the file {name!r}, which {fault_of(file)}",
            where=index,
            mend="The download or copy is incomplete: fetch or copy that file as well.",
        )
    if not leads_out(index.parent, file):
        return file
    raise CheckpointError(
        f"The weights index names the file {name!r}, a link that leads out of the folder",
        where=index,
        found=str(file.resolve()),
        mend="If you trust the link, replace it by a copy of the file.",
    )


# Merging


def _merge_tensors(parts: list[Checkpoint]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for key, info in part.tensors.items():
            if key in tensors:
                raise CheckpointError(
                    f"Tensor {key!r} is in two files",
                    where=f"{tensors[key].file}, {info.file}",
                    mend="The files are of two checkpoints, or one was saved twice. " + DOWNLOAD_AGAIN,
                )
            tensors[key] = info
    return tensors


def _check_against_index(tensors: Mapping[str, TensorInfo], content: WeightsIndex, *, index: Path) -> None:
    """Check that each tensor is where the index says; name all that are not at once."""
    wrong = [
        (key, name)
        for key, name in content.weight_map.items()
        if key not in tensors or tensors[key].file.name != name
    ]
    if not wrong:
        return
    key, name = wrong[0]
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise CheckpointError(
        f"The weights index says that tensor {key!r} is in {name!r}, and it is not there{others}",
        where=index,
        expected=name,
        found=tensors[key].file.name if key in tensors else "the tensor in no file",
        mend="The index and the files are of two checkpoints. " + DOWNLOAD_AGAIN,
    )


def _common_framework(parts: list[Checkpoint]) -> str | None:
    frameworks = sorted({part.framework for part in parts if part.framework is not None})
    if len(frameworks) > 1:
        raise CheckpointError(
            "The files of this checkpoint were written by different frameworks",
            where=", ".join(str(part.files[0]) for part in parts[:3]),
            expected="one framework",
            found=", ".join(frameworks),
            mend="The files are of two checkpoints. " + DOWNLOAD_AGAIN,
        )
    return frameworks[0] if frameworks else None


def _merge_metadata(parts: list[Checkpoint]) -> dict[str, Any]:
    """Join the files' metadata; of values that differ the first file's is kept, lists are joined."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if key in merged and isinstance(value, tuple):
                merged[key] = (*merged[key], *value)
            else:
                merged.setdefault(key, value)
    return merged


def _malformed(index: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        "The weights index is malformed", where=index, expected=expected, found=found, mend=DOWNLOAD_AGAIN
    )
