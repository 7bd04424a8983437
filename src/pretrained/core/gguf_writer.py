# SPDX-License-Identifier: Apache-2.0
"""Writes GGUF files, version 3: the way back of `pretrained.core.gguf`, one tensor at a time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from pretrained.core.atomic_files import new_file
from pretrained.core.ggml import BLOCK_TYPES, block_nbytes

ALIGNMENT: Final = 32

# enum gguf_metadata_value_type -> how a value of it is packed.
_KINDS: Final = {"i32": (5, "<i"), "u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?")}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufValue:
    """A value of a GGUF file's metadata, with the type that readers expect.

    Attributes:
        kind: ``"u32"``, ``"i32"``, ``"f32"``, ``"bool"`` or ``"str"``; with ``[]`` after it, a list of them.
        value: The value.
    """

    kind: str
    value: Any


class GgufTensor(Protocol):
    """A tensor that is to be written; it hands over its bytes when its turn comes."""

    @property
    def dtype(self) -> str:
        """A name of `pretrained.core.ggml.BLOCK_TYPES`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, row-major."""

    def read(self) -> bytes | bytearray | memoryview:
        """Return the bytes; they may be dropped right after."""


def gguf_writer(
    metadata: Mapping[str, GgufValue], tensors: Mapping[str, GgufTensor]
) -> Callable[[Path, Sequence[str]], None]:
    """Return what writes a GGUF file.

    Args:
        metadata: The key-value section.
        tensors: All tensors, by their names in the file.
    """

    def write(file: Path, keys: Sequence[str]) -> None:
        with new_file(file) as opened:
            opened.write(_head(metadata, {key: tensors[key] for key in keys}))
            for key in keys:
                raw = memoryview(tensors[key].read())
                opened.write(raw)
                opened.write(b"\0" * (-raw.nbytes % ALIGNMENT))

    return write


def _head(metadata: Mapping[str, GgufValue], tensors: Mapping[str, GgufTensor]) -> bytes:
    """Return everything before the data, padded."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    for name, tensor in tensors.items():
        axes = tensor.shape[::-1]
        parts += [_text(name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes)]
        parts.append(struct.pack("<IQ", BLOCK_TYPES[tensor.dtype].type_id, offset))
        offset += -(-block_nbytes(tensor.dtype, tensor.shape) // ALIGNMENT) * ALIGNMENT
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % ALIGNMENT)


def _value(value: GgufValue) -> bytes:
    kind = value.kind.removesuffix("[]")
    number, form = (_STRING, "") if kind == "str" else _KINDS[kind]
    if kind == value.kind:
        return struct.pack("<I", number) + _packed(value.value, form)
    items = b"".join(_packed(item, form) for item in value.value)
    return struct.pack("<IIQ", _ARRAY, number, len(value.value)) + items


def _packed(value: Any, form: str) -> bytes:
    return struct.pack(form, value) if form else _text(value)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
