# SPDX-License-Identifier: Apache-2.0
"""Copies of weights that cannot stay on disk as they lie in the checkpoint: cast, decoded, or from memory.

An offload folder holds safetensors files and an index of its own. The index says of each copy which bytes of
which file it was made from and how, so that a later load uses it again instead of making it anew, and so that
the copies of another model, or of an older state of the files, are never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from pretrained.core.atomic_files import errors_with_mend, write_text_atomically
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.plan import LoadStep
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.core.writer import plan_shards, write_checkpoint
from pretrained.errors import CheckpointError, FileError, PlacementError
from pretrained.torch.offload import DiskWeights
from pretrained.torch.tensors import Read, dtype_name_of

INDEX: Final = "pretrained-offload.json"
"""Name of the index in an offload folder."""

_STEM: Final = "pretrained-offload"
_FORMAT: Final = 1
_WHOLE: Final = 1 << 60


class _Converted:
    """A weight that is read and converted when its turn to be written comes, and dropped after."""

    def __init__(self, step: LoadStep, read: Read) -> None:
        self.step, self.dtype = step, step.dtype
        self.shape = step.shape if step.shape is not None else step.source.shape
        self._read = read

    def read(self) -> memoryview:
        tensor = self._read(self.step, torch.device("cpu")).detach().contiguous()
        return (
            memoryview(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
        )


def transformed(folder: Path, steps: Sequence[LoadStep], read: Read) -> dict[str, TensorInfo]:
    """Return where the converted weights of a checkpoint lie, making those copies that are not there yet.

    Args:
        folder: The offload folder; made where it is absent.
        steps: What to convert; their sources are files.
        read: Reads and converts one weight.

    Returns:
        For each key a span of plain values of the step's dtype.

    Raises:
        PlacementError: the folder belongs to another model, or to other files of this one.
        FileError: the folder cannot be written, or the disk is full; nothing half-written stays.
    """
    with errors_with_mend(folder, what="The offload folder cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = {step.key: _identity(step) for step in steps}
    with _alone(folder):
        known = _read_index(folder)
        _check_owner(folder, known, wanted)
        infos = _existing(folder, known, wanted)
        left = [step for step in steps if step.key not in infos]
        if left:
            name = hashlib.sha256(json.dumps([wanted[step.key] for step in left]).encode()).hexdigest()[:16]
            file = _write(folder, f"{_STEM}-{name}", left, read)
            infos |= read_safetensors_header(file).tensors
            entries = {
                _entry(step.key, step.dtype): {"file": file.name, "source": wanted[step.key]} for step in left
            }
            text = json.dumps({"format": _FORMAT, "weights": {**known, **entries}}, indent=1)
            write_text_atomically(folder / INDEX, text + "\n")
    return infos


def written_from_memory(
    folder: Path, tensors: Mapping[str, torch.Tensor], store: DiskWeights
) -> dict[str, TensorInfo]:
    """Write tensors that are in no file. The copy goes when the model goes: nobody could tell whose it is.

    Args:
        folder: The offload folder; made where it is absent.
        tensors: By key; any device.
        store: Whose end removes the file.

    Returns:
        For each key the span of its values.

    Raises:
        FileError: the folder cannot be written, or the disk is full; nothing half-written stays.
    """
    with errors_with_mend(folder, what="The offload folder cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    steps = []
    for key, tensor in tensors.items():
        dtype = dtype_name_of(tensor.dtype)
        steps.append(LoadStep(key, TensorInfo(key, dtype, tuple(tensor.shape), Path("memory"), 0, 0), dtype))
    stem = f"{_STEM}-memory-{secrets.token_hex(8)}"
    file = _write(folder, stem, steps, lambda step, _: tensors[step.key].cpu())
    store.remove_with_me(file)
    return dict(read_safetensors_header(file).tensors)


def _write(folder: Path, stem: str, steps: Sequence[LoadStep], read: Read) -> Path:
    sources = {step.key: _Converted(step, read) for step in steps}
    sizes = {step.key: step.source.num_elements * DTYPES[step.dtype].itemsize for step in steps}
    plan = plan_shards(sizes, _WHOLE, file_stem=stem)
    try:
        write_checkpoint(folder, plan, sources, {"format": "pt"}, file_stem=stem)
    except FileError as error:
        raise FileError(
            "The weights placed on disk need a converted copy, and writing it failed",
            where=folder,
            expected=f"room for {sum(sizes.values())} bytes",
            found=error.found,
            mend="Free space, name an offload_folder elsewhere, or load with dtype='auto': weights that keep "
            "the dtype of their file need no copy.",
        ) from error
    return folder / f"{stem}.safetensors"


# -- the index -----------------------------------------------------------------------------------


def _identity(step: LoadStep) -> dict[str, Any]:
    """Return what a copy was made from and how; equal values mean equal copies."""
    info = step.source
    state = os.stat(info.file)
    return {
        "file": str(info.file.resolve()),
        "size": state.st_size,
        "mtime_ns": state.st_mtime_ns,
        "offset": info.offset,
        "nbytes": info.nbytes,
        "stored": info.dtype,
        "dtype": step.dtype,
        "shape": list(step.shape if step.shape is not None else info.shape),
        "strides": None if info.strides is None else list(info.strides),
        "layout": None if step.apply is None else getattr(step.apply, "__qualname__", repr(type(step.apply))),
    }


def _entry(key: str, dtype: str) -> str:
    return f"{key} {dtype}"


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        weights = content["weights"]
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        if not all({"file", "source"} <= set(entry) for entry in weights.values()):
            raise ValueError("an entry without file or source")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlacementError(
            "The index of the offload folder cannot be read",
            where=folder / INDEX,
            expected=f"an index of format {_FORMAT}",
            found=str(error),
            mend="Delete the folder, or name another as offload_folder.",
        ) from error
    return dict(weights)


def _check_owner(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless every copy in the folder was made from files that this load reads, as they are now."""
    mine = {(source["file"], source["size"], source["mtime_ns"]) for source in wanted.values()}
    paths = {file for file, _, _ in mine}
    for entry in known.values():
        source = entry["source"]
        found = (source.get("file"), source.get("size"), source.get("mtime_ns"))
        # A shard whose weights are all on devices this time is no stranger.
        shard_of_mine = Path(str(found[0])).parent in {Path(path).parent for path in paths}
        if found in mine or (shard_of_mine and found[0] not in paths):
            continue
        older = found[0] in paths
        raise PlacementError(
            "The offload folder holds copies made from "
            + ("an older state of this model's files" if older else "another model"),
            where=folder,
            expected=f"copies of {sorted(paths)[0]}",
            found=f"copies of {found[0]}",
            mend="Delete the folder, or name another as offload_folder.",
        )


def _existing(
    folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, TensorInfo]:
    """Return the copies that are there and were made as this load would make them."""
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    infos = {}
    for key, source in wanted.items():
        entry = known.get(_entry(key, source["dtype"]))
        if entry is None or entry["source"] != source or Path(entry["file"]).name != entry["file"]:
            continue
        if entry["file"] not in headers:
            # A copy that is gone or damaged is made again.
            try:
                headers[entry["file"]] = read_safetensors_header(folder / entry["file"]).tensors
            except (CheckpointError, FileError):
                headers[entry["file"]] = {}
        info = headers[entry["file"]].get(key)
        if info is not None and (info.dtype, list(info.shape)) == (source["dtype"], source["shape"]):
            infos[key] = info
    return infos


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process after the other fill a folder; only work depends on it, not what is read."""
    if sys.platform == "win32":
        yield
        return
    import fcntl  # noqa: PLC0415 - there is none on Windows

    with errors_with_mend(folder, what="The offload folder cannot be written"):
        descriptor = os.open(folder / f".{_STEM}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
