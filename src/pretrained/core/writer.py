# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints so that a reader finds the old one or the new one, never half of each.

First it is decided which tensor goes to which file (`plan_shards`); then tensors stream out one at a time
under temporary names, and renames put them in place (`write_checkpoint`). Files that are mapped stay as they
are: a rename replaces a name, not the bytes under it, so a model that still reads from the old files keeps
working.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from pretrained.core.atomic_files import (
    errors_with_mend,
    new_file,
    removed_on_error,
    replace_text,
    sync_folder,
    temporary_name,
    write_text_atomically,
)
from pretrained.core.disk_space import check_room
from pretrained.core.dtypes import DTYPES
from pretrained.core.save_journal import TextChange, tidy
from pretrained.errors import ArgumentError, FileError

__all__ = [
    "ShardPlan",
    "TensorSource",
    "parse_size",
    "plan_shards",
    "safetensors_layout",
    "write_checkpoint",
    "write_tensor",
    "write_text_atomically",
]

_UNITS: Final = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
# Of a tensor's entry in a header, about.
_HEADER_BYTES: Final = 100

# Seconds after which a temporary file that nobody writes to belongs to a save that was killed.
_ABANDONED_S: Final = 600

_SIZE: Final = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)")


class TensorSource(Protocol):
    """A tensor that is to be written; it hands over its bytes when its turn comes.

    Attributes:
        dtype: A name of `pretrained.core.dtypes.DTYPES`.
        shape: Its shape.
    """

    @property
    def dtype(self) -> str:
        """Name of the element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""

    def read(self) -> bytes | bytearray | memoryview:
        """Return the bytes, row-major and little-endian. They may be dropped right after."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """Which tensors go to which file.

    Attributes:
        files: Keys by file name, in the order in which the files are written.
        index: Name of the index, or None where one file holds everything.
        file_stem: What the names begin with (``"model"``).
        variant: Their infix, or None.
        total_size: Bytes of all tensors.
        suffix: What the names end in, which says the format.
    """

    files: Mapping[str, tuple[str, ...]]
    index: str | None
    file_stem: str
    variant: str | None
    total_size: int
    suffix: str = ".safetensors"


def parse_size(size: int | str, where: str | None = None) -> int:
    """Return a number of bytes.

    Args:
        size: A whole number, or text: ``"5GB"`` is 5·10⁹, ``"5GiB"`` is 5·2³⁰; units are B, KB, MB, GB, TB,
            KiB, MiB, GiB, TiB in any case, always bytes; no unit means bytes.
        where: Name of the argument, for the error.

    Raises:
        ArgumentError: it is not of this form, or less than one byte.
    """
    result = 0
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is not None and match[2].upper() in _UNITS:
            unit = _UNITS[match[2].upper()]
            result = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    elif isinstance(size, int) and not isinstance(size, bool):
        result = size
    if result < 1:
        raise ArgumentError(
            "This is not a size",
            where=where,
            expected='bytes as a whole number from 1 up, or text such as "5GB", "200MB" or "1GiB"',
            found=repr(size),
        )
    return result


def plan_shards(
    sizes: Mapping[str, int],
    max_shard_size: int | str,
    *,
    file_stem: str = "model",
    variant: str | None = None,
    suffix: str = ".safetensors",
) -> ShardPlan:
    """Decide which tensors go to which file.

    Files are filled in the order of `sizes`, so neighbours stay together; a tensor that is larger than a file
    may be gets one of its own.

    Args:
        sizes: Bytes by key, in the model's order.
        max_shard_size: Most bytes that the tensors of one file may take, as for `parse_size`.
        file_stem: What file names begin with.
        variant: Infix of the names: ``model.fp16.safetensors``.
        suffix: What file names end in.

    Raises:
        ArgumentError: the size cannot be understood, or the variant cannot be part of a name.
    """
    limit = parse_size(max_shard_size, "max_shard_size")
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w.-]+", variant)):
        raise ArgumentError(
            "The variant cannot be part of a file name",
            where="variant",
            expected="letters, digits, '_', '-' and '.'",
            found=repr(variant),
        )
    groups: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += size
    stem = file_stem if variant is None else f"{file_stem}.{variant}"
    total = sum(sizes.values())
    if len(groups) == 1:
        return ShardPlan({f"{stem}{suffix}": tuple(groups[0])}, None, file_stem, variant, total, suffix)
    files = {
        f"{stem}-{number:05d}-of-{len(groups):05d}{suffix}": tuple(group)
        for number, group in enumerate(groups, 1)
    }
    plan = ShardPlan(files, None, file_stem, variant, total, suffix)
    return replace(plan, index=_index_name(plan))


def write_checkpoint(
    folder: Path,
    plan: ShardPlan,
    tensors: Mapping[str, TensorSource],
    metadata: Mapping[str, str] | None = None,
    *,
    file_stem: str = "model",
    variant: str | None = None,
    write_file: Callable[[Path, Sequence[str]], None] | None = None,
    texts: Mapping[str, str] | None = None,
    needed: int | None = None,
) -> None:
    """Write a checkpoint into a folder, in place of an earlier one of the same stem and variant.

    Everything is first written and flushed under temporary names; nothing that exists is touched before that
    succeeds. Then, each step a rename or a removal that a reader sees whole:

    - One file: the rename is the moment of change, because readers prefer one file to an index. The old index
      and shards go afterwards.
    - Shards under new names: they appear beside the old checkpoint, then the index is replaced; that is the
      moment of change, or the removal of the old single file where there was one, since it is preferred.
    - Shards under names that the old index uses (the same number of files): an index of the temporary names
      is put in place first; that is the moment of change. Then the final names get the new files as second
      links, the final index follows, and the temporary names go. Where the file system has no hard links the
      shards are renamed one by one instead, and a reader in that short while finds a mix.

    A process that read the old index before the change and opens a shard after it is beyond what renames can
    protect.

    Args:
        folder: The folder; it must exist.
        plan: From `plan_shards`.
        tensors: A source for each key of the plan; `read` is called once each, in file order, and only one
            result is held at a time.
        metadata: The header's string pairs; None means ``{"format": "pt"}``.
        file_stem: As given to `plan_shards`.
        variant: As given to `plan_shards`.
        write_file: For other formats: writes the file at a path, which does not exist yet, with the tensors
            of some keys, instead of what this module does with the tensors and the metadata.
        texts: Small files that describe the weights, content by name (config.json). They change at the same
            moment for readers of this library, see `pretrained.core.save_journal`; for others right after.
        needed: Bytes that the disk must have free; None for those of all files.

    Raises:
        ArgumentError: the plan and the tensors do not belong together, or a tensor's bytes do not fit its
            shape.
        FileError: the folder cannot be written, or the disk is full, which is asked before anything is
            written. The earlier checkpoint is intact and
            temporary files are gone; or, as the message then says, the new one is complete and remains of
            the old one could not be removed.
    """
    _check_plan(plan, tensors, file_stem=file_stem, variant=variant)
    header = dict(metadata) if metadata is not None else {"format": "pt"}
    token = secrets.token_hex(4)
    temporary = {name: temporary_name(name, token) for name in plan.files}
    sizes = {name: _file_size(keys, tensors) for name, keys in plan.files.items()}
    _make_room(folder, plan, sum(sizes.values()) if needed is None else needed)
    with errors_with_mend(folder):
        if texts:
            tidy(folder, texts)
        change = TextChange(folder, texts or {})
        with removed_on_error(folder, temporary.values()), _undone(change, BaseException):
            for name, keys in plan.files.items():
                file = folder / temporary[name]
                with errors_with_mend(folder / name, needed=sizes[name]):
                    if write_file is not None:
                        write_file(file, keys)
                        _flush(file)
                        continue
                    with new_file(file) as opened:
                        _write_file(opened, {key: tensors[key] for key in keys}, header)
            change.prepare()
        sync_folder(folder)
        with removed_on_error(folder, temporary.values(), error=OSError), _undone(change, OSError):
            index = plan.index or _index_name(plan)
            change.announce([folder / name for name in temporary.values()], _single_name(plan), index)
            settle = _commit(folder, plan, temporary, tensors)
    done = "The new checkpoint is in place, but removing what the old one left failed"
    with errors_with_mend(folder, what=done):
        change.finish()
        settle()
        _remove_stale(folder, plan)


@contextmanager
def _undone(change: TextChange, error: type[BaseException]) -> Iterator[None]:
    """Undo what is prepared of some texts if the block fails."""
    try:
        yield
    except error:
        change.undo()
        raise


# Room


def _file_size(keys: Sequence[str], tensors: Mapping[str, TensorSource]) -> int:
    """Return about how many bytes a file of some tensors takes, its header included."""
    nbytes = sum(prod(tensors[key].shape) * DTYPES[tensors[key].dtype].itemsize for key in keys)
    return nbytes + sum(len(key) + _HEADER_BYTES for key in keys)


def _make_room(folder: Path, plan: ShardPlan, needed: int) -> None:
    """Raise where the disk has no room, having removed what killed saves left if it takes that."""
    try:
        check_room(folder / next(iter(plan.files)), needed)
        return
    except FileError:
        # Whoever still writes to such a file has touched it a moment ago.
        now = time.time()
        for name in os.listdir(folder):
            if _owned(plan, r"\.tmp-[0-9a-f]{8}-").fullmatch(name):
                with suppress(OSError):
                    if now - (folder / name).stat().st_mtime > _ABANDONED_S:
                        (folder / name).unlink()
    check_room(folder / next(iter(plan.files)), needed)


# One file


def _flush(file: Path) -> None:
    """Bring a file that someone else wrote to the disk."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(opened: BinaryIO, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
    head, starts = safetensors_layout(tensors, metadata)
    opened.write(head)
    for key in starts:
        write_tensor(opened, key, tensors[key])


def safetensors_layout(
    tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the head of a safetensors file, and where in the file each tensor begins, in file order.

    Wide element types come first, so that all are aligned, then names.

    Args:
        tensors: What the file is to hold; only dtypes and shapes are looked at.
        metadata: The header's string pairs.
    """
    order = sorted(tensors, key=lambda key: (-DTYPES[tensors[key].dtype].itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for key in order:
        tensor, dtype = tensors[key], DTYPES[tensors[key].dtype]
        begins[key], end = end, end + prod(tensor.shape) * dtype.itemsize
        offsets = [begins[key], end]
        header[key] = {"dtype": dtype.safetensors, "shape": list(tensor.shape), "data_offsets": offsets}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    head = len(raw).to_bytes(8, "little") + raw
    return head, {key: len(head) + begin for key, begin in begins.items()}


def write_tensor(opened: BinaryIO, key: str, tensor: TensorSource) -> None:
    """Write the bytes of one tensor where the file stands.

    Args:
        opened: The file.
        key: The tensor's name, for the error.
        tensor: The tensor.

    Raises:
        ArgumentError: its bytes do not fit its shape.
    """
    expected = prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    raw = memoryview(tensor.read())
    if raw.nbytes != expected:
        raise ArgumentError(
            f"The bytes of tensor {key!r} do not fit its shape",
            expected=f"{expected} bytes for {tensor.dtype} {tuple(tensor.shape)}",
            found=f"{raw.nbytes} bytes",
        )
    if expected:
        opened.write(raw.cast("B"))


# From temporary names to final ones


def _commit(
    folder: Path, plan: ShardPlan, temporary: Mapping[str, str], tensors: Mapping[str, TensorSource]
) -> Callable[[], None]:
    """Make readers find the new checkpoint; until the last step they find the old one.

    Returns:
        What is left to do for the final names, harmless to readers.
    """
    if plan.index is None:
        (name,) = plan.files
        os.replace(folder / temporary[name], folder / name)
        return _nothing
    single, index = folder / _single_name(plan), folder / plan.index
    if index.exists() and not single.exists() and any((folder / name).exists() for name in plan.files):
        extra = _second_links(folder, temporary)
        if extra is not None:
            with removed_on_error(folder, extra.values(), error=OSError):
                replace_text(index, _index_text(plan, tensors, temporary))

            def settle() -> None:
                for name in plan.files:
                    os.replace(folder / extra[name], folder / name)
                sync_folder(folder)
                replace_text(index, _index_text(plan, tensors, {}))

            return settle
    fresh = [name for name in plan.files if not (folder / name).exists()]
    with removed_on_error(folder, fresh, error=OSError):
        for name in plan.files:
            os.replace(folder / temporary[name], folder / name)
        sync_folder(folder)
        replace_text(index, _index_text(plan, tensors, {}))
        single.unlink(missing_ok=True)
    return _nothing


def _nothing() -> None:
    """What is left to do where the final names are in place already."""


def _second_links(folder: Path, temporary: Mapping[str, str]) -> dict[str, str] | None:
    """Give each temporary file another temporary name; None where the file system has no hard links."""
    token = secrets.token_hex(4)
    extra = {name: temporary_name(name, token) for name in temporary}
    try:
        with removed_on_error(folder, extra.values()):
            for name in temporary:
                os.link(folder / temporary[name], folder / extra[name])
    except (OSError, NotImplementedError):
        return None
    return extra


def _index_text(plan: ShardPlan, tensors: Mapping[str, TensorSource], names: Mapping[str, str]) -> str:
    weight_map = {key: names.get(name, name) for name, keys in plan.files.items() for key in keys}
    parameters = sum(prod(tensors[key].shape) for key in weight_map)
    metadata = {"total_parameters": parameters, "total_size": plan.total_size}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _single_name(plan: ShardPlan) -> str:
    return f"{plan.file_stem}{'.' + plan.variant if plan.variant else ''}{plan.suffix}"


def _index_name(plan: ShardPlan) -> str:
    return f"{plan.file_stem}{plan.suffix}.index{'.' + plan.variant if plan.variant else ''}.json"


def _owned(plan: ShardPlan, before: str) -> re.Pattern[str]:
    """Return what matches the names that saves of this stem and variant give, with a prefix of a form."""
    infix = "" if plan.variant is None else re.escape("." + plan.variant)
    stem, end = re.escape(plan.file_stem), re.escape(plan.suffix)
    return re.compile(
        rf"{before}({stem}{infix}(-\d{{5,}}-of-\d{{5,}})?{end}|{stem}{end}\.index{infix}\.json)"
    )


def _remove_stale(folder: Path, plan: ShardPlan) -> None:
    """Remove what an earlier save of the same stem and variant left, also one that was killed."""
    owned = _owned(plan, r"(\.tmp-[0-9a-f]{8}-)?")
    keep = {*plan.files, plan.index}
    stale = [name for name in os.listdir(folder) if owned.fullmatch(name) and name not in keep]
    # The index first: a reader must not find one whose shards are gone.
    for name in sorted(stale, key=lambda name: (not name.endswith(".json"), name)):
        (folder / name).unlink(missing_ok=True)
    sync_folder(folder)


# What can go wrong


def _check_plan(
    plan: ShardPlan, tensors: Mapping[str, TensorSource], *, file_stem: str, variant: str | None
) -> None:
    if (plan.file_stem, plan.variant) != (file_stem, variant):
        raise ArgumentError(
            "The plan was made for other file names",
            where="file_stem, variant",
            expected=f"{plan.file_stem!r}, {plan.variant!r}",
            found=f"{file_stem!r}, {variant!r}",
        )
    planned = {key for keys in plan.files.values() for key in keys}
    if planned != set(tensors):
        odd = sorted(planned ^ set(tensors))
        raise ArgumentError(
            f"The plan and the tensors do not have the same keys: {len(odd)} differ",
            where=", ".join(odd[:5]),
            expected=f"{len(planned)} keys",
            found=f"{len(tensors)} keys",
        )
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ArgumentError(
                f"Tensor {key!r} has a dtype that safetensors files cannot hold",
                expected="one of " + ", ".join(DTYPES),
                found=repr(tensor.dtype),
            )
