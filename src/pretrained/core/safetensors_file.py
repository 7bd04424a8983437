# SPDX-License-Identifier: Apache-2.0
"""Reads the header of a safetensors file, and believes nothing in it that it has not checked.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; the
header, a JSON object from tensor name to dtype, shape and byte span; then the bytes of all tensors, which
the spans cover without overlaps or holes. Only the header is read here; a file of any size costs one read.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import BY_SAFETENSORS_NAME, DType
from pretrained.core.untrusted import (
    DOWNLOAD_AGAIN,
    describe_start,
    open_regular,
    parse_json_object,
    read_at,
)
from pretrained.errors import CheckpointError

MAX_HEADER_BYTES: Final = 100_000_000
"""Longest header that the format allows."""

# Types of the format's own list that `core.dtypes` has no row for, with their width in bits.
_DTYPES_NOT_READ: Final = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "U4", "I4"}
)
_LARGEST_SIZE: Final = 2**63 - 1
_MOST_AXES: Final = 64  # numpy's limit; it also bounds the time that multiplying the shape takes
_FIELDS: Final = {"dtype", "shape", "data_offsets"}


def read_safetensors_header(file: Path) -> Checkpoint:
    """Read and validate the header of one safetensors file.

    Args:
        file: The file.

    Returns:
        Its tensors in the order of their bytes, with absolute offsets. ``framework`` is the header's
        ``format`` tag as written, even one that nobody knows: what to do about it is the loader's decision.

    Raises:
        FileError: the file cannot be opened.
        CheckpointError: the file is truncated, malformed or contradicts itself.
    """
    with open_regular(file) as (opened, size):
        raw, data_start = _read_raw_header(opened, file=file, size=size)
    entries = parse_json_object(raw, where=file, what="safetensors header")
    metadata = _check_metadata(entries.pop("__metadata__", None), file=file)
    infos = [_tensor_info(key, entry, file=file, data_start=data_start) for key, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_cover(infos, file=file, data_start=data_start, size=size)
    return Checkpoint(
        tensors={info.key: info for info in infos},
        files=(file,),
        format="safetensors",
        framework=metadata.get("format"),
        metadata=metadata,
    )


def _read_raw_header(opened: BinaryIO, *, file: Path, size: int) -> tuple[bytes, int]:
    """Return the header's JSON bytes and where the data starts."""
    start = read_at(opened, 0, 32)
    if size < 8:
        raise CheckpointError(
            "This is not a safetensors file: it is too short to hold a header",
            where=file,
            expected="at least 8 bytes",
            found=f"{size} bytes",
            mend=DOWNLOAD_AGAIN,
        )
    length = int.from_bytes(start[:8], "little")
    if length > max(MAX_HEADER_BYTES, size) and start[8:9] == b"{":
        raise CheckpointError(
            "The safetensors file lies about the length of its header",
            where=file,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes in a file of {size}",
            mend=DOWNLOAD_AGAIN,
        )
    if length > MAX_HEADER_BYTES or (length > 0 and size > 8 and start[8:9] != b"{"):
        raise CheckpointError(
            "This is not a safetensors file",
            where=file,
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes that begins with '{{'",
            found=f"{describe_start(start)} (read as a header it would have {length} bytes)",
            mend=DOWNLOAD_AGAIN,
        )
    if 8 + length > size:
        raise CheckpointError(
            "The safetensors file is truncated within its header",
            where=file,
            expected=f"at least {8 + length} bytes",
            found=f"{size} bytes",
            mend=DOWNLOAD_AGAIN,
        )
    return read_at(opened, 8, length), 8 + length


def _check_metadata(value: Any, *, file: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(
            "The safetensors header's __metadata__ is malformed",
            where=file,
            expected="an object of strings",
            found=repr(value)[:100],
            mend=DOWNLOAD_AGAIN,
        )
    return value


def _tensor_info(key: str, entry: Any, *, file: Path, data_start: int) -> TensorInfo:
    """Check one entry by itself; how the spans lie to each other comes later."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else repr(entry)
        raise _lie("entry", key, file=file, expected="dtype, shape and data_offsets", found=str(found)[:100])
    dtype = _dtype(key, entry["dtype"], file=file)
    shape, span = entry["shape"], entry["data_offsets"]
    if (
        type(shape) is not list
        or len(shape) > _MOST_AXES
        or not all(type(dim) is int and 0 <= dim <= _LARGEST_SIZE for dim in shape)
    ):
        expected = f"at most {_MOST_AXES} whole numbers, 0 or more"
        raise _lie("shape", key, file=file, expected=expected, found=repr(shape)[:100])
    if (
        type(span) is not list
        or len(span) != 2
        or not all(type(offset) is int and 0 <= offset <= _LARGEST_SIZE for offset in span)
        or span[0] > span[1]
    ):
        raise _lie("byte span", key, file=file, expected="[begin, end], begin <= end", found=repr(span)[:100])
    nbytes = prod(shape) * dtype.itemsize
    if nbytes != span[1] - span[0]:
        raise _lie(
            "byte span",
            key,
            file=file,
            expected=f"{nbytes} bytes for {dtype.safetensors} {shape}",
            found=f"{span[1] - span[0]} bytes",
        )
    return TensorInfo(key, dtype.name, tuple(shape), file, data_start + span[0], nbytes)


def _dtype(key: str, spelling: Any, *, file: Path) -> DType:
    if isinstance(spelling, str):
        dtype = BY_SAFETENSORS_NAME.get(spelling)
        if dtype is not None:
            return dtype
        if spelling in _DTYPES_NOT_READ:
            raise CheckpointError(
                f"Tensor {key!r} is stored as {spelling}, which this library does not read",
                where=file,
                expected="one of " + ", ".join(BY_SAFETENSORS_NAME),
                mend="Convert the tensor to one of these, or use a checkpoint that is stored in one.",
            )
    raise _lie(
        "dtype",
        key,
        file=file,
        expected="one of " + ", ".join(BY_SAFETENSORS_NAME),
        found=repr(spelling)[:100],
    )


def _lie(part: str, key: str, *, file: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"The safetensors header gives tensor {key!r} a wrong {part}",
        where=file,
        expected=expected,
        found=found,
        mend=DOWNLOAD_AGAIN,
    )


def _check_cover(infos: list[TensorInfo], *, file: Path, data_start: int, size: int) -> None:
    """Check that the spans cover the data without overlap or hole, and that the file holds them all.

    Args:
        infos: Sorted by offset.
        file: Named in errors.
        data_start: First byte after the header.
        size: Actual size of the file in bytes.
    """
    end, previous = data_start, "the header"
    for info in infos:
        if info.offset != end:
            fault = "overlap" if info.offset < end else "leave a hole"
            raise CheckpointError(
                f"The bytes of tensor {info.key!r} and of {previous} {fault}",
                where=file,
                expected=f"data offset {end - data_start}",
                found=f"data offset {info.offset - data_start}",
                mend=DOWNLOAD_AGAIN,
            )
        end, previous = info.offset + info.nbytes, repr(info.key)
    if size != end:
        fault = "is truncated" if size < end else "has bytes after its last tensor"
        raise CheckpointError(
            f"The safetensors file {fault}",
            where=file,
            expected=f"{end} bytes",
            found=f"{size} bytes",
            mend=DOWNLOAD_AGAIN,
        )
