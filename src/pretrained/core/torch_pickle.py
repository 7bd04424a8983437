# SPDX-License-Identifier: Apache-2.0
"""Reads where the tensors of a ``pytorch_model.bin`` lie, without executing anything in it.

Two containers exist. Since PyTorch 1.6 a file is a zip archive with stored (uncompressed) entries: the
pickle in ``<name>/data.pkl`` and one entry ``<name>/data/<key>`` for each storage. Before, it was a stream of
five pickles (a magic number, a protocol number, facts on the machine, the object, the list of storage keys)
and then for each key a count and the raw bytes. Both end in absolute byte spans of the file itself, so
everything after this reads weights straight from it, as from safetensors.

Source: `torch/serialization.py`, PyTorch 2.13.
"""

from __future__ import annotations

import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.pickle_machine import CONVERT, run_pickle
from pretrained.core.pickle_values import StorageRef, StoredTensor
from pretrained.core.untrusted import DOWNLOAD_AGAIN, describe_start, open_regular, read_at
from pretrained.errors import CheckpointError

MAX_PICKLE_BYTES: Final = 64 * 2**20
"""Longest pickle that is read. The one of a state dict takes about 200 bytes a tensor."""

MOST_GROWTH: Final = 100
"""Bytes of tensors that one byte of a file may stand for, by shared storages and strides of 0."""

_ZIP_START: Final = b"PK\x03\x04"
_PICKLE_START: Final = b"\x80"
_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
_Spans = dict[str, tuple[int, int]]  # first byte and length of each storage, by key
_NESTED_UNDER: Final = ("state_dict", "model", "model_state_dict")


def read_torch_checkpoint(file: Path) -> Checkpoint:
    """Read what a file written by ``torch.save`` holds.

    Args:
        file: The file, in either of torch's containers. It must hold a state dict: a dict of tensors, or one
            under the key ``state_dict``, ``model`` or ``model_state_dict`` of a dict.

    Returns:
        The tensors in the order of the dict. Views keep their strides; tensors that share a storage have
        equal or overlapping spans. ``metadata["non_tensors"]`` lists the keys whose values are no tensors.

    Raises:
        FileError: the file cannot be opened.
        CheckpointError: it is truncated or malformed, asks for code to be run, or holds no state dict.
    """
    with open_regular(file) as (opened, size):
        start = read_at(opened, 0, 32)
        if start.startswith(_ZIP_START):
            value, spans = _read_zip(opened, file=file, size=size)
        elif start.startswith(_PICKLE_START):
            value, spans = _read_legacy(opened, file=file, size=size)
        else:
            raise _not_torch(start, file=file)
    tensors, others = _state_dict(value, file=file)
    infos = {key: _tensor_info(key, tensor, spans, file=file) for key, tensor in tensors.items()}
    _refuse_growth(infos, file=file, size=size)
    return Checkpoint(
        tensors=infos,
        files=(file,),
        format="pytorch",
        framework="pt",
        metadata={"non_tensors": others} if others else {},
    )


# The zip container


def _read_zip(opened: BinaryIO, *, file: Path, size: int) -> tuple[Any, _Spans]:
    entries = _zip_entries(opened, file=file)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            "This zip archive is not a PyTorch weights file",
            where=file,
            expected="one entry <name>/data.pkl",
            found=f"{len(pickles)} in {len(entries)} entries",
            mend=CONVERT,
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(
            "This is a TorchScript program, not a file of weights",
            where=file,
            mend="Load it where it was made and save its state_dict() as safetensors.",
        )

    def span(name: str) -> tuple[int, int]:
        return _zip_span(opened, entries[name], file=file, size=size)

    byteorder = (
        read_at(opened, *span(f"{root}byteorder"))[:10] if f"{root}byteorder" in entries else b"little"
    )
    if byteorder != b"little":
        raise _foreign_byte_order(byteorder.decode("ascii", "replace"), file=file)
    offset, length = span(pickles[0])
    if length > MAX_PICKLE_BYTES:
        raise _corrupt(f"its pickle has {length} bytes", file=file)
    value, _ = run_pickle(read_at(opened, offset, length), where=file)
    prefix = f"{root}data/"
    spans = {name.removeprefix(prefix): span(name) for name in entries if name.startswith(prefix)}
    _refuse_overlaps(spans, file=file)
    return value, spans


def _zip_entries(opened: BinaryIO, *, file: Path) -> dict[str, zipfile.ZipInfo]:
    """Read the archive's table of contents; refuse any that torch would not write."""
    try:
        infos = zipfile.ZipFile(opened).infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        OverflowError,
        ValueError,
        OSError,
        struct.error,
    ) as error:
        raise _corrupt(f"its table of contents is missing or damaged ({error})", file=file) from None
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename
        if name in entries:
            raise _corrupt(f"it has two entries {name[:200]!r}", file=file)
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            raise _corrupt(f"its entry {name[:200]!r} has a forbidden name", file=file)
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _corrupt(f"its entry {name[:200]!r} is compressed, which torch never does", file=file)
        if info.flag_bits & 1:
            raise _corrupt(f"its entry {name[:200]!r} is encrypted", file=file)
        entries[name] = info
    return entries


def _zip_span(opened: BinaryIO, info: zipfile.ZipInfo, *, file: Path, size: int) -> tuple[int, int]:
    """Return where an entry's bytes lie, from its local header, whose length only the file itself knows."""
    raw = read_at(opened, info.header_offset, _LOCAL_HEADER.size) if 0 <= info.header_offset < size else b""
    if len(raw) < _LOCAL_HEADER.size or not raw.startswith(_ZIP_START):
        raise _corrupt(f"its entry {info.orig_filename[:200]!r} is not where the contents say", file=file)
    _, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
    offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + info.file_size > size:
        raise CheckpointError(
            f"Entry {info.orig_filename[:200]!r} of this PyTorch file goes past its end",
            where=file,
            expected=f"at least {offset + info.file_size} bytes",
            found=f"{size} bytes",
            mend=DOWNLOAD_AGAIN,
        )
    return offset, info.file_size


def _refuse_overlaps(spans: _Spans, *, file: Path) -> None:
    end = 0
    for key, (offset, length) in sorted(spans.items(), key=lambda item: item[1]):
        if offset < end and length:
            raise _corrupt(f"storage {key[:100]!r} overlaps another", file=file)
        end = max(end, offset + length)


# The container from before PyTorch 1.6


def _read_legacy(opened: BinaryIO, *, file: Path, size: int) -> tuple[Any, _Spans]:
    data = read_at(opened, 0, min(size, MAX_PICKLE_BYTES))
    magic, position = run_pickle(data, where=file)
    if magic != _LEGACY_MAGIC:
        raise _not_torch(data, file=file)
    protocol, position = run_pickle(data, where=file, start=position)
    if protocol != _LEGACY_PROTOCOL:
        raise _corrupt(f"its protocol {str(protocol)[:20]} is unknown", file=file)
    machine, position = run_pickle(data, where=file, start=position)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _foreign_byte_order("big", file=file)
    value, position = run_pickle(data, where=file, start=position)
    keys, position = run_pickle(data, where=file, start=position)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _corrupt("its list of storages is not a list of strings", file=file)
    itemsizes = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in _walk(value)}
    spans: _Spans = {}
    for key in keys:
        if key not in itemsizes:
            raise _corrupt(f"no tensor tells the element size of storage {key[:100]!r}", file=file)
        count = int.from_bytes(read_at(opened, position, 8), "little", signed=True)
        length = count * itemsizes[key]
        if count < 0 or key in spans or position + 8 + length > size:
            raise CheckpointError(
                f"Storage {key[:100]!r} of this PyTorch file goes past its end or is listed twice",
                where=file,
                expected=f"at least {position + 8 + length} bytes",
                found=f"{size} bytes",
                mend=DOWNLOAD_AGAIN,
            )
        spans[key] = (position + 8, length)
        position += 8 + length
    return value, spans


# From the pickled value to tensors


def _walk(value: Any, seen: set[int] | None = None) -> list[StoredTensor]:
    """List every tensor anywhere in a value, however deep it lies.

    Args:
        value: From `run_pickle`.
        seen: The containers that an earlier walk visited; a hostile file may share one a million times.
    """
    found: dict[int, StoredTensor] = {}
    seen = set() if seen is None else seen
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, StoredTensor):
            found[id(part)] = part
        elif isinstance(part, dict | list | tuple) and id(part) not in seen:
            seen.add(id(part))
            todo.extend(part.values() if isinstance(part, dict) else part)
    return list(found.values())


def _state_dict(value: Any, *, file: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Find the dict of tensors in a file's value, and name what else lies beside it."""
    if not isinstance(value, dict):
        raise _no_state_dict(f"a {type(value).__name__}", file=file)
    others: list[str] = []
    if not _has_tensors(value):
        nested = [key for key in _NESTED_UNDER if _has_tensors(value.get(key))]
        if len(nested) > 1:
            raise _no_state_dict(f"one under each of {nested}", file=file)
        if nested:
            others = [str(key) for key in value if key != nested[0]]
            value = value[nested[0]]
        elif value:
            raise _no_state_dict(f"a dict with the keys {[str(key)[:50] for key in value][:5]}", file=file)
    tensors: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for key, item in value.items():
        if not isinstance(item, StoredTensor):
            if _walk(item, seen):
                raise _no_state_dict(
                    f"tensors inside a {type(item).__name__} at {str(key)[:100]!r}", file=file
                )
            others.append(str(key))
        elif isinstance(key, str):
            tensors[key] = item
        else:
            raise _no_state_dict(f"a tensor under the key {key!r}, which is no string", file=file)
    return tensors, tuple(others)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, StoredTensor) for item in value.values())


def _tensor_info(key: str, tensor: StoredTensor, spans: _Spans, *, file: Path) -> TensorInfo:
    """Check a tensor against its storage and place it in the file."""
    itemsize, elements = tensor.dtype.itemsize, prod(tensor.shape)
    if elements * itemsize >= 2**63:  # a stride of 0 lets a small storage claim any shape
        raise _corrupt(f"tensor {key!r} claims the shape {tensor.shape}", file=file)
    if tensor.dtype.name not in DTYPES:
        raise CheckpointError(
            f"Tensor {key!r} is stored as {tensor.dtype.name}, which this library does not read",
            where=file,
            expected="one of " + ", ".join(DTYPES),
            mend="Convert the tensor to one of these, or use a checkpoint that is stored in one.",
        )
    start, length = _storage_span(key, tensor.storage, spans, file=file)
    empty = prod(tensor.shape) == 0
    reach = (
        0
        if empty
        else 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    )
    begin = tensor.storage.offset * tensor.storage.dtype.itemsize + tensor.offset * itemsize
    if begin + reach * itemsize > length:
        raise CheckpointError(
            f"Tensor {key!r} goes past the end of its storage",
            where=file,
            expected=f"at least {begin + reach * itemsize} bytes",
            found=f"{length} bytes",
            mend=DOWNLOAD_AGAIN,
        )
    strides = None if elements == 0 or _is_contiguous(tensor) else tensor.strides
    return TensorInfo(key, tensor.dtype.name, tensor.shape, file, start + begin, reach * itemsize, strides)


def _refuse_growth(infos: dict[str, TensorInfo], *, file: Path, size: int) -> None:
    """Refuse tensors that are out of proportion to the file: storages may be shared, and strides may be 0."""
    claimed = sum(prod(info.shape) * DTYPES[info.dtype].itemsize for info in infos.values())
    if claimed > MOST_GROWTH * size:
        raise _corrupt(f"its tensors claim {claimed} bytes of a file of {size}", file=file)


def _storage_span(key: str, storage: StorageRef, spans: _Spans, *, file: Path) -> tuple[int, int]:
    if storage.key not in spans:
        raise _corrupt(f"storage {storage.key[:100]!r} of tensor {key!r} is not in it", file=file)
    start, length = spans[storage.key]
    expected = storage.count * storage.dtype.itemsize
    if length < expected:
        raise CheckpointError(
            f"Storage {storage.key[:100]!r} of tensor {key!r} is too short",
            where=file,
            expected=f"{expected} bytes",
            found=f"{length} bytes",
            mend=DOWNLOAD_AGAIN,
        )
    return start, expected


def _is_contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _corrupt(why: str, *, file: Path) -> CheckpointError:
    return CheckpointError(f"This PyTorch file is damaged or forged: {why}", where=file, mend=DOWNLOAD_AGAIN)


def _not_torch(start: bytes, *, file: Path) -> CheckpointError:
    return CheckpointError(
        "This is not a PyTorch weights file",
        where=file,
        expected="what torch.save writes",
        found=describe_start(start[:32]),
        mend=DOWNLOAD_AGAIN,
    )


def _foreign_byte_order(order: str, *, file: Path) -> CheckpointError:
    return CheckpointError(
        "This PyTorch file was written with another byte order",
        where=file,
        expected="little",
        found=order,
        mend="Convert it to safetensors, which is always little-endian.",
    )


def _no_state_dict(found: str, *, file: Path) -> CheckpointError:
    under = ", ".join(repr(key) for key in _NESTED_UNDER)
    return CheckpointError(
        "This PyTorch file does not hold a state dict",
        where=file,
        expected=f"a dict of tensors, or one under {under}",
        found=found,
        mend="Load it where it was made and save its state_dict() as safetensors.",
    )
