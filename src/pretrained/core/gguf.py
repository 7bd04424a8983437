# SPDX-License-Identifier: Apache-2.0
"""Reads the header of a GGUF file: its metadata and where each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little endian here::

    "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata: key string | value type u32 | value
    tensors:  name string | axes u32 | sizes u64, fastest axis first | type u32 | offset u64
    padding to a multiple of the alignment, then the data that offsets count from

A file is data from a stranger: every count, length and offset is checked against the bytes that are
there before anything is allocated for it, so what the reader uses is bounded by a
multiple of the file's own size. Files can be large; only the header's pages are touched.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Iterable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.ggml import BLOCK_TYPES, BY_TYPE_ID, dequantize
from pretrained.core.untrusted import DOWNLOAD_AGAIN, describe_start, open_regular, read_at
from pretrained.errors import CheckpointError, FileError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")
_MAX_KEY = 65535  # bytes; the specification's limit
_MAX_AXES = 4  # GGML_MAX_DIMS
_MAX_NESTING = 4
_LEAST_HEADER = 4 + 4 + 8 + 8
_FORERUNNERS = (b"tjgg", b"fmgg", b"lmgg", b"algg")  # ggjt, ggmf, ggml, ggla as little-endian numbers

# enum gguf_metadata_value_type.
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# The fewest bytes a value of each type takes: what a count is checked against before it is believed.
_LEAST_BYTES = {kind: dtype.itemsize for kind, dtype in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
_LEAST_METADATA = 8 + 4 + 1  # empty key, value type, one byte
_LEAST_TENSOR = 8 + 4 + 4 + 8  # empty name, no axes, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def read_gguf(file: Path) -> Checkpoint:
    """Read what a GGUF model holds, without reading its weights.

    Args:
        file: A local ``.gguf`` file, version 2 or 3, little endian. Of a model in several files
            (``name-00001-of-00003.gguf``) any one; the others are found beside it.

    Returns:
        The checkpoint. `metadata` holds the key-value section as Python values: ``int``, ``float``,
        ``bool``, ``str``, lists of strings or of arrays, and read-only 1-D NumPy arrays for arrays of
        numbers. A tensor's `dtype` is a name of `pretrained.core.ggml.BLOCK_TYPES`, its `shape` is
        row-major (the reverse of the file's), its `offset` counts from the start of the file.

    Raises:
        FileError: there is no such file, or it cannot be opened.
        CheckpointError: the file is not GGUF, is of another version or byte order, is truncated, or
            contradicts itself.
    """
    checkpoint = _read_file(Path(file))
    count = checkpoint.metadata.get("split.count", 0)
    if type(count) is not int:
        _fail(checkpoint.files[0], "'split.count' cannot be used", "an integer", count)
    # llama.cpp leaves a count of 0 in a file that it has merged from parts.
    return checkpoint if count in (0, 1) else _read_split(checkpoint, count)


def _read_file(file: Path) -> Checkpoint:
    with open_regular(file) as (opened, size):
        start = read_at(opened, 0, 32)
        if start[:4] != _MAGIC:
            _refuse_start(file, start)
        if size < _LEAST_HEADER:
            _fail(file, "The file ends inside its header", f"at least {_LEAST_HEADER} bytes", f"{size} bytes")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(file, data).read()


def _refuse_start(file: Path, start: bytes) -> NoReturn:
    mend = DOWNLOAD_AGAIN
    found = describe_start(start)
    if start[:4] in _FORERUNNERS:
        found = "a file of the formats before GGUF"
        mend = "Convert the model again with a current llama.cpp."
    _fail(file, "This is not a GGUF file", "one that begins with b'GGUF'", found, mend)


def _read_split(part: Checkpoint, count: int) -> Checkpoint:
    """Read all files of a model, given one of them; the first holds the model's metadata."""
    (file,) = part.files
    name = _SPLIT_NAME.fullmatch(file.name)
    if name is None or int(name["count"]) != count:
        _fail(
            file,
            "The file is one part of a model in several files, and its name does not tell the others",
            f"a name like model-00001-of-{count:05}.gguf",
            file.name,
            "Give the files back the names they were published under.",
        )
    parts = []
    for number in range(count):
        path = file.with_name(f"{name['stem']}-{number + 1:05}-of-{count:05}.gguf")
        if not path.is_file():
            raise FileError(
                f"Part {number + 1} of {count} of the model is missing",
                where=path,
                mend="Download all its parts into one folder.",
            )
        parts.append(part if path == file else _read_file(path))
        found = parts[-1].metadata.get("split.no")
        if type(found) is not int or found != number:
            _fail(path, "The file is another part than its name says", f"'split.no' {number}", found)
    tensors = {key: info for each in parts for key, info in each.tensors.items()}
    total = sum(len(each.tensors) for each in parts)
    promised = parts[0].metadata.get("split.tensors.count", total)
    if type(promised) is not int or not len(tensors) == total == promised:
        _fail(file, "The parts of the model do not fit together", f"{promised} tensors", f"{len(tensors)}")
    files = tuple(path for each in parts for path in each.files)
    return Checkpoint(tensors=tensors, files=files, format="gguf", metadata=parts[0].metadata)


def load_tensor(info: TensorInfo, *, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """Read one tensor's bytes and decode them to float32.

    Args:
        info: The tensor, from `read_gguf`.
        out: Where to write, as for `pretrained.core.ggml.dequantize`.

    Raises:
        CheckpointError: the file has become shorter since its header was read.
        ArgumentError: the type cannot be decoded, or `out` does not fit.
    """
    with open_regular(info.file) as (opened, _):
        raw = read_at(opened, info.offset, info.nbytes)
    if len(raw) != info.nbytes:
        _fail(info.file, f"The data of {info.key!r} is cut off", f"{info.nbytes} bytes", f"{len(raw)} bytes")
    return dequantize(raw, info.dtype, info.shape, out=out)


def _fail(
    file: Path, what: str, expected: object = None, found: object = None, mend: str = DOWNLOAD_AGAIN
) -> NoReturn:
    raise CheckpointError(what, where=file, expected=expected, found=found, mend=mend)


class _Header:
    """A cursor over a file's header; every read checks the bytes that are left."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.size = len(data)
        self.position = 0

    def read(self) -> Checkpoint:
        tensor_count, metadata_count = self._read_counts()
        metadata = self._read_metadata(metadata_count)
        alignment = self._alignment(metadata)
        rows = [self._read_tensor_row() for _ in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        tensors = self._place(rows, start, alignment)
        return Checkpoint(tensors=tensors, files=(self.file,), format="gguf", metadata=metadata)

    # The file's parts.

    def _read_counts(self) -> tuple[int, int]:
        self._bytes(len(_MAGIC), "the magic number")
        version = self._unpack(_U32, "the version")
        if version not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
                self._fail(
                    "The GGUF file is big-endian",
                    "a little-endian file",
                    mend="Convert it with llama.cpp's gguf_convert_endian.py.",
                )
            mend = "Convert the model again with a current llama.cpp."
            if version > _VERSIONS[-1]:
                mend = "Update this library, or convert the model to version 3."
            self._fail("Unknown GGUF version", "version 2 or 3", version, mend)
        tensors = self._count("tensors", _LEAST_TENSOR)
        return tensors, self._count("metadata entries", _LEAST_METADATA)

    def _read_metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"the key of metadata entry {index}", limit=_MAX_KEY)
            if key in metadata:
                self._fail(f"The metadata key {key!r} occurs twice")
            kind = self._unpack(_U32, f"the type of {key!r}")
            metadata[key] = self._value(kind, key)
        return metadata

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            self._fail("'general.alignment' cannot be used", "a power of two up to 1048576", alignment)
        return alignment

    def _read_tensor_row(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Return a tensor's name, type, shape, byte count and offset into the data section."""
        name = self._string("a tensor's name", limit=_MAX_KEY)
        what = f"tensor {name!r}"
        axes = self._unpack(_U32, f"the number of axes of {what}")
        if axes > _MAX_AXES:
            self._fail(f"The {what} has too many axes", f"at most {_MAX_AXES}", axes)
        sizes = [self._unpack(_U64, f"the shape of {what}") for _ in range(axes)]
        type_id = self._unpack(_U32, f"the type of {what}")
        offset = self._unpack(_U64, f"the offset of {what}")
        shape = tuple(reversed(sizes))
        if 0 in shape:
            self._fail(f"The {what} has an axis of length zero", "lengths of at least 1", shape)
        kind = BY_TYPE_ID.get(type_id)
        if kind is None:
            known = ", ".join(f"{row.type_id} ({row.name})" for row in BLOCK_TYPES.values())
            mend = "Take another quantization of the model, such as Q4_K_M or Q8_0."
            self._fail(f"The {what} has an unknown type", f"one of {known}", type_id, mend)
        if (shape[-1] if shape else 1) % kind.elements:
            whole = f"a last axis that is a multiple of {kind.elements} ({kind.name})"
            self._fail(f"The rows of {what} are not whole blocks", whole, shape)
        return name, kind.name, shape, prod(shape) // kind.elements * kind.nbytes, offset

    def _place(
        self, rows: Iterable[tuple[str, str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape, nbytes, offset in rows:
            if name in tensors:
                self._fail(f"The tensor {name!r} occurs twice")
            if offset % alignment:
                self._fail(f"The tensor {name!r} is not aligned", f"a multiple of {alignment}", offset)
            end = start + offset + nbytes
            if end > self.size:
                self._fail(
                    f"The data of tensor {name!r} lies past the end of the file",
                    f"a file of at least {end} bytes",
                    f"{self.size} bytes",
                    DOWNLOAD_AGAIN,
                )
            tensors[name] = TensorInfo(name, dtype, shape, self.file, start + offset, nbytes)
        in_order = sorted(tensors.values(), key=lambda info: info.offset)
        for before, after in pairwise(in_order):
            if before.offset + before.nbytes > after.offset:
                self._fail(f"The data of tensors {before.key!r} and {after.key!r} overlap")
        return tensors

    # Values.

    def _value(self, kind: int, key: str, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key, nesting)
        dtype = self._scalar_type(kind, key)
        raw = self._bytes(dtype.itemsize, f"the value of {key!r}")
        if kind == _BOOL:
            if raw not in {b"\x00", b"\x01"}:
                self._fail(f"The value of {key!r} is no boolean", "0 or 1", raw[0])
            return raw == b"\x01"
        return np.frombuffer(raw, dtype)[0].item()

    def _array(self, key: str, nesting: int) -> Any:
        if nesting >= _MAX_NESTING:
            self._fail(f"The array {key!r} is nested too deep", f"at most {_MAX_NESTING} levels")
        kind = self._unpack(_U32, f"the element type of {key!r}")
        if kind not in _LEAST_BYTES:
            self._scalar_type(kind, key)
        count = self._count(f"elements of {key!r}", _LEAST_BYTES[kind])
        if kind == _STRING:
            return self._strings(count, key)
        if kind == _ARRAY:
            return [self._array(key, nesting + 1) for _ in range(count)]
        dtype = _SCALARS[kind]
        raw = self._bytes(count * dtype.itemsize, f"the array {key!r}")
        # `raw` is an immutable copy, so the array is read-only and outlives the map.
        values = np.frombuffer(raw, dtype)
        if kind == _BOOL:
            if (values > 1).any():
                self._fail(f"The array {key!r} holds values that are no booleans", "0 or 1", values.max())
            return values.view(np.bool_)
        return values

    def _strings(self, count: int, key: str) -> list[str]:
        # Vocabularies have 10^5 entries, so this loop is flat: 0.25 microseconds a string.
        data, position, size = self.data, self.position, self.size
        unpack: Callable[..., tuple[int]] = _U64.unpack_from
        values: list[str] = []
        append = values.append
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                start = position + 8
                position = start + length
                if position > size:
                    break
                append(data[start:position].decode())
        except struct.error:
            position = size + 1
        except UnicodeDecodeError:
            self._fail(f"Element {len(values)} of {key!r} is not UTF-8 text")
        if position > size:
            self._truncated(f"element {len(values)} of {key!r}")
        self.position = position
        return values

    def _scalar_type(self, kind: int, key: str) -> np.dtype[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self._fail(f"The metadata key {key!r} has an unknown value type", "0 to 12", kind)
        return dtype

    # Bytes.

    def _count(self, what: str, least: int) -> int:
        """Read a count and check that so many things of at least `least` bytes can follow."""
        count = self._unpack(_U64, f"the number of {what}")
        left = self.size - self.position
        if count * least > left:
            self._fail(
                f"The header promises {count} {what}, which cannot fit in the file",
                f"at most {left // least}",
                count,
            )
        return count

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._unpack(_U64, f"the length of {what}")
        if limit is not None and length > limit:
            self._fail(f"The length of {what} is out of range", f"at most {limit} bytes", length)
        raw = self._bytes(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"Not UTF-8 text: {what}")

    def _unpack(self, form: struct.Struct, what: str) -> int:
        value: int = form.unpack(self._bytes(form.size, what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        end = self.position + count
        if end > self.size:
            self._truncated(what)
        raw = self.data[self.position : end]
        self.position = end
        return raw

    def _truncated(self, what: str) -> NoReturn:
        self._fail(f"The file ends inside {what}", found=f"{self.size} bytes", mend=DOWNLOAD_AGAIN)

    def _fail(
        self, what: str, expected: object = None, found: object = None, mend: str = DOWNLOAD_AGAIN
    ) -> NoReturn:
        _fail(self.file, what, expected, found, mend)
