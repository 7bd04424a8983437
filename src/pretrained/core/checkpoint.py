# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, whatever its file format: named spans of bytes in local files.

Every reader (safetensors, PyTorch's zip and legacy files, GGUF) ends in a `Checkpoint`, so everything
after it - planning, loading, inspecting, converting - knows one format only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pretrained.core.file_state import FileState


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and how to read it.

    Attributes:
        key: Its name in the file.
        dtype: A name of `pretrained.core.dtypes.DTYPES` or a block type of `pretrained.core.ggml`
            (``"q4_1"``).
        shape: Logical shape, row-major (last axis fastest).
        file: The local file.
        offset: First byte, from the start of the file.
        nbytes: Bytes on disk.
        strides: In elements, for files that store views; None means contiguous.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Every tensor of a model's weights files, from headers only.

    Attributes:
        tensors: By key, in file order.
        files: The files, in the order of the index.
        format: ``"safetensors"``, ``"pytorch"`` or ``"gguf"``.
        framework: Who wrote it: ``"pt"``, ``"tf"``, ``"flax"``, ``"mlx"``, or None where the file
            does not say.
        metadata: The files' own metadata; for GGUF its typed key-value section.
        states: What the files, and the index that names them, were like when they were read.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    format: str
    framework: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    states: Mapping[Path, FileState] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())
