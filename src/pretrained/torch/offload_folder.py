# SPDX-License-Identifier: Apache-2.0
"""Copies of weights that cannot stay on disk as they lie in the checkpoint: converted, or from memory.

An offload folder holds safetensors files and an index of its own. The index says of each copy which bytes of
which file it was made from and how, so that a later load uses it again instead of making it anew, and so that
the copies of another model, or of an older state of the files, are never taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from pretrained.core import writer
from pretrained.core.atomic_files import errors_with_mend, removed_on_error, write_text_atomically
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.file_state import replaced
from pretrained.core.files import MAX_INDEX_BYTES
from pretrained.core.plan import LoadStep
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.core.untrusted import open_regular, parse_json_object, read_at
from pretrained.core.writer import plan_shards, safetensors_layout, write_checkpoint
from pretrained.errors import FileError, PlacementError
from pretrained.torch.offload import DiskWeights
from pretrained.torch.offload_tidy import STEM, alone, hold, tidy
from pretrained.torch.rounding import Packed
from pretrained.torch.tensors import Read, dtype_name_of

INDEX: Final = "pretrained-offload.json"
"""Name of the index in an offload folder."""

_STEM: Final = STEM
_FORMAT: Final = 1
_WHOLE: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class Form:
    """How a weight is stored where that takes more than one plain tensor: quantized.

    Attributes:
        scheme: Everything that decides about the numbers; equal texts mean equal copies.
        tensors: Key -> (dtype, shape) of what stands for the weight.
    """

    scheme: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class _Spec:
    """A tensor that is to be written, without its bytes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> memoryview:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A tensor's bytes, for the writer."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return dtype_name_of(self.tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self) -> memoryview:
        plain = self.tensor.detach().cpu().contiguous()
        return memoryview(plain.view(-1).view(torch.uint8).numpy().data) if plain.numel() else memoryview(b"")


def transformed(
    folder: Path,
    steps: Sequence[LoadStep],
    read: Read,
    forms: Mapping[str, Form] | None = None,
    errors: MutableMapping[str, float] | None = None,
) -> dict[str, TensorInfo]:
    """Return where the converted weights of a checkpoint lie, making those copies that are not there yet.

    Weights are read, converted and written one at a time.

    Args:
        folder: The offload folder; made where it is absent.
        steps: What to convert; their sources are files.
        read: Reads and converts one weight; those that have a form come as `Packed`.
        forms: The forms of weights that become more than one tensor.
        errors: Takes the errors of rounding by module, those of copies from an earlier load too.

    Returns:
        For each key a span of plain values of the step's dtype, or of the form's.

    Raises:
        PlacementError: the folder belongs to another model, or to other files of this one.
        FileError: the folder cannot be written, or the disk is full; nothing half-written stays.
    """
    with errors_with_mend(folder, what="The offload folder cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    forms, errors = forms or {}, {} if errors is None else errors
    wanted = {step.key: _identity(step, forms.get(step.key)) for step in steps}
    with alone(folder) as is_alone:
        known = _read_index(folder)
        _check_owner(folder, known, wanted)
        infos = _existing(folder, known, wanted, forms, errors)
        left = [step for step in steps if not infos.keys() >= _specs(step, forms).keys()]
        if left:
            if is_alone:
                tidy(folder, {entry["file"] for entry in known.values()})
            name = hashlib.sha256(json.dumps([wanted[step.key] for step in left]).encode()).hexdigest()[:16]
            made: dict[str, float] = {}
            file = _write(folder, f"{_STEM}-{name}", left, read, forms, made)
            _check_unchanged(file, wanted, left, forms)
            infos |= read_safetensors_header(file).tensors
            errors.update({key.removesuffix(".weight"): error for key, error in made.items()})
            entries = {
                _entry(step.key, wanted[step.key]): {
                    "file": file.name,
                    "written": _state(file),
                    "source": wanted[step.key],
                    **({"error": made[step.key]} if step.key in made else {}),
                }
                for step in left
            }
            there = {key: entry for key, entry in known.items() if (folder / entry["file"]).is_file()}
            text = json.dumps({"format": _FORMAT, "weights": {**there, **entries}}, indent=1)
            with removed_on_error(folder, [file.name]):
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
    steps = []
    for key, tensor in tensors.items():
        dtype = dtype_name_of(tensor.dtype)
        steps.append(LoadStep(key, TensorInfo(key, dtype, tuple(tensor.shape), Path("memory"), 0, 0), dtype))
    return converted_from_memory(folder, steps, lambda step, _: tensors[step.key], {}, store)


def converted_from_memory(
    folder: Path, steps: Sequence[LoadStep], read: Read, forms: Mapping[str, Form], store: DiskWeights
) -> dict[str, TensorInfo]:
    """Do what `written_from_memory` does with weights that are converted one at a time.

    Args:
        folder: The offload folder; made where it is absent.
        steps: What to write.
        read: As for `transformed`.
        forms: As for `transformed`.
        store: Whose end removes the file.
    """
    with errors_with_mend(folder, what="The offload folder cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder) as is_alone:
        if is_alone:
            named: set[str] = set()
            with suppress(PlacementError):
                named = {entry["file"] for entry in _read_index(folder).values()}
                tidy(folder, named)
        file = _write(folder, f"{_STEM}-memory-{secrets.token_hex(8)}", steps, read, forms, {})
        hold(file, store)
    store.remove_with_me(file)
    return dict(read_safetensors_header(file).tensors)


def _specs(step: LoadStep, forms: Mapping[str, Form]) -> dict[str, _Spec]:
    form = forms.get(step.key)
    if form is not None:
        return {key: _Spec(dtype, shape) for key, (dtype, shape) in form.tensors.items()}
    return {step.key: _Spec(step.dtype, step.shape if step.shape is not None else step.source.shape)}


def _write(
    folder: Path,
    stem: str,
    steps: Sequence[LoadStep],
    read: Read,
    forms: Mapping[str, Form],
    errors: MutableMapping[str, float],
) -> Path:
    """Write one file of copies; each weight is made when its turn comes, and dropped after."""
    specs = {key: spec for step in steps for key, spec in _specs(step, forms).items()}
    sizes = {key: spec.nbytes for key, spec in specs.items()}
    plan = plan_shards(sizes, _WHOLE, file_stem=stem)

    def write_file(path: Path, keys: Sequence[str]) -> None:
        # The tensors of one weight do not lie side by side in the file.
        head, starts = safetensors_layout({key: specs[key] for key in keys}, {"format": "pt"})
        with open(path, "xb") as opened:
            opened.write(head)
            for step in steps:
                value: Any = read(step, torch.device("cpu"))
                tensors = {step.key: value}
                if isinstance(value, Packed):
                    errors[step.key] = value.error
                    tensors = {key: value.part(key.rpartition(".")[2]) for key in _specs(step, forms)}
                for key, tensor in tensors.items():
                    opened.seek(starts[key])
                    writer.write_tensor(opened, key, _Bytes(tensor))

    try:
        write_checkpoint(folder, plan, specs, file_stem=stem, write_file=write_file)
    except FileError as error:
        raise FileError(
            "The weights placed on disk need a converted copy, and writing it failed",
            where=error.where or folder,
            expected=f"room for {sum(sizes.values())} bytes",
            found=error.found if error.expected is None else f"{error.found} free",
            mend="Free space, name an offload_folder elsewhere, or load with dtype='auto': weights that keep "
            "the dtype of their file need no copy.",
        ) from error
    return folder / f"{stem}.safetensors"


# -- the index -----------------------------------------------------------------------------------


def _identity(step: LoadStep, form: Form | None) -> dict[str, Any]:
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
        # Changes of layout are functions, or values that say all of themselves.
        "layout": None if step.apply is None else getattr(step.apply, "__qualname__", repr(step.apply)),
        "scheme": None if form is None else form.scheme,
    }


def _check_unchanged(
    file: Path,
    wanted: Mapping[str, Mapping[str, Any]],
    steps: Sequence[LoadStep],
    forms: Mapping[str, Form],
) -> None:
    """Remove copies whose sources were changed while they were made, and raise."""
    for step in steps:
        with suppress(OSError):
            if _identity(step, forms.get(step.key)) == wanted[step.key]:
                continue
        file.unlink(missing_ok=True)
        raise replaced(step.source.file)


def _state(file: Path) -> list[int]:
    state = os.stat(file)
    return [state.st_size, state.st_mtime_ns]


def _entry(key: str, source: Mapping[str, Any]) -> str:
    return f"{key} {source['scheme'] or source['dtype']}"


def _read_index(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / INDEX):
        return {}
    try:
        with open_regular(folder / INDEX) as (opened, size):
            if size > MAX_INDEX_BYTES:
                raise ValueError(f"{size} bytes")
            content = parse_json_object(read_at(opened, 0, size), where=folder / INDEX, what="index")
        weights = content["weights"]
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        for entry in weights.values():
            if not isinstance(entry["file"], str) or not isinstance(entry["source"], dict):
                raise ValueError("an entry whose file is no name or whose source is no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlacementError(
            "The index of the offload folder cannot be read",
            where=folder / INDEX,
            expected=f"an index of format {_FORMAT}",
            found=getattr(error, "what", None) or str(error),
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
    folder: Path,
    known: Mapping[str, Any],
    wanted: Mapping[str, Mapping[str, Any]],
    forms: Mapping[str, Form],
    errors: MutableMapping[str, float],
) -> dict[str, TensorInfo]:
    """Return the copies that are there and were made as this load would make them."""
    headers: dict[str, Mapping[str, TensorInfo]] = {}
    infos: dict[str, TensorInfo] = {}
    for key, source in wanted.items():
        entry = known.get(_entry(key, source))
        if entry is None or entry["source"] != source or Path(entry["file"]).name != entry["file"]:
            continue
        if entry["file"] not in headers:
            # A copy that is gone, damaged or was written to since is made again.
            try:
                intact = _state(folder / entry["file"]) == entry.get("written")
                headers[entry["file"]] = (
                    read_safetensors_header(folder / entry["file"]).tensors if intact else {}
                )
            except (OSError, ValueError):
                headers[entry["file"]] = {}
        form = forms.get(key)
        expected = {key: (source["dtype"], tuple(source["shape"]))} if form is None else form.tensors
        held = headers[entry["file"]]
        found = {name: (held[name].dtype, held[name].shape) for name in expected if name in held}
        if found == {name: (dtype, tuple(shape)) for name, (dtype, shape) in expected.items()}:
            infos |= {name: held[name] for name in expected}
            if isinstance(entry.get("error"), float):
                errors[key.removesuffix(".weight")] = entry["error"]
    return infos
