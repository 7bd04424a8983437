# SPDX-License-Identifier: Apache-2.0
"""From spans of bytes to torch tensors: the one seam between the core's files and this backend."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pretrained.arch.gguf import RowUnpermute, Transpose
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.ggml import DEQUANTIZABLE, dequantize
from pretrained.core.plan import LoadStep
from pretrained.core.reader import MappedFiles
from pretrained.errors import ArgumentError

Read = Callable[[LoadStep, torch.device], torch.Tensor]

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name_of(dtype: torch.dtype) -> str:
    """Return the canonical name of a torch dtype.

    Args:
        dtype: For example ``torch.bfloat16``.

    Raises:
        ArgumentError: no file format here holds it.
    """
    if dtype not in _NAMES:
        raise ArgumentError(f"Tensors of {dtype} cannot be stored", where="dtype", expected=", ".join(DTYPES))
    return _NAMES[dtype]


# Bytes of a file that are copied or cast at a time; four threads do it side by side.
_COPY_BYTES = 32 << 20

# The same where there is a copy in between. The C library keeps such pieces after use, so they are small.
_SCRATCH_BYTES = 4 << 20


class Arena:
    """Memory for tensors that cannot be views of a file, taken in large pieces.

    A new process pays for memory page by page when it first writes it; numpy asks for huge pages from
    4 MB on, which most single weights do not reach. A piece is freed with the last tensor in it.
    """

    _PIECE = 64 << 20
    _ALIGN = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with memory and no values yet.

        Args:
            shape: Its sizes.
            dtype: Its dtype.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._PIECE // 4:
            return _bytes(nbytes).view(dtype).view(shape)
        with self._lock:
            if self._used + nbytes > self._piece.numel():
                self._piece, self._used = _bytes(self._PIECE), 0
            start, self._used = self._used, -(-(self._used + nbytes) // self._ALIGN) * self._ALIGN
            return self._piece[start : start + nbytes].view(dtype).view(shape)


class Scratch:
    """Memory for tensors that are dropped before the next is read: one at a time in each thread.

    Not from the C library, in whose heap it would leave holes between the weights that stay, nor from an
    `Arena`, whose pieces would stay with them.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with memory and no values yet; the one before loses its own.

        Args:
            shape: Its sizes.
            dtype: Its dtype.
        """
        nbytes = max(1, math.prod(shape) * dtype.itemsize)
        held: torch.Tensor | None = getattr(self._local, "held", None)
        if held is None or len(held) < nbytes:
            self._local.held = None
            held = self._local.held = torch.frombuffer(_anonymous(nbytes), dtype=torch.uint8)
        return held[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _anonymous(nbytes: int) -> mmap.mmap:
    """Return memory straight from the system, in huge pages where it has them."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _bytes(count: int) -> torch.Tensor:
    return torch.from_numpy(np.empty(count, dtype=np.uint8))


def mapped_reader(files: MappedFiles | None = None, *, copy_all: bool = False, scratch: bool = False) -> Read:
    """Return a function that reads tensors from mapped files; threads may call it side by side.

    A tensor that needs no cast and stays on the CPU is a view of a private map: its pages are the
    file's own, shared between processes, until something writes to them; the file never changes.

    Args:
        files: The maps; None for new ones.
        copy_all: Give every tensor memory of its own.
        scratch: Read what is no view into memory that the same thread's next tensor is read into as well.
    """
    files = files or MappedFiles()
    memory: Arena | Scratch = Scratch() if scratch else Arena()

    def read(step: LoadStep, device: torch.device) -> torch.Tensor:
        info, dtype = step.source, TORCH_DTYPES[step.dtype]
        stored = TORCH_DTYPES.get(info.dtype)
        on_cpu = device.type == "cpu"
        if step.is_view and on_cpu and not copy_all:
            return _view(files, info)
        shape = step.shape if step.shape is not None else info.shape
        target = memory.empty(shape, dtype) if on_cpu else torch.empty(shape, dtype=dtype, device=device)
        if step.apply is None and stored is not None and info.strides is None:
            return _copied(files, info, target)
        if step.apply is None and stored is None and dtype == torch.float32 and on_cpu:
            dequantize(files.buffer(info), info.dtype, info.shape, out=target.numpy())
            files.release(info)
            return target
        if info.dtype in DEQUANTIZABLE and info.strides is None and len(info.shape) == 2:
            return _decoded(files, info, target, step.apply)
        values = _view(files, info) if stored is not None else torch.from_numpy(files.array(info))
        if step.apply is not None:
            values = torch.from_numpy(step.apply(values.float().numpy()))
        target.copy_(values)
        files.release(info)
        return target

    return read


def _copied(files: MappedFiles, info: TensorInfo, target: torch.Tensor) -> torch.Tensor:
    """Copy a tensor piece by piece, so that no more of its file is in memory than a piece."""
    sink, size = target.view(-1), TORCH_DTYPES[info.dtype].itemsize
    step = (_SCRATCH_BYTES if info.offset % size else _COPY_BYTES) // size
    for start in range(0, info.num_elements, step):
        end = min(start + step, info.num_elements)
        sink[start:end].copy_(_view(files, _part(info, start * size, end * size, (end - start,))))
        files.release(info, start * size, end * size)
    return target


def _decoded(
    files: MappedFiles, info: TensorInfo, target: torch.Tensor, apply: Callable[..., Any] | None
) -> torch.Tensor:
    """Decode a matrix some rows at a time: no float32 form of all of it is ever made."""
    rows, columns = info.shape
    # Rows that a change of layout needs together.
    group = rows // apply.num_heads if isinstance(apply, RowUnpermute) else 1
    if not isinstance(apply, RowUnpermute | Transpose | None) or not group or rows % group:
        group = max(1, rows)
    width = info.nbytes // max(1, rows)
    step = max(1, _SCRATCH_BYTES // max(1, 4 * columns * group)) * group
    for start in range(0, rows, step):
        end = min(start + step, rows)
        part = _part(info, start * width, end * width, (end - start, columns))
        values = dequantize(files.buffer(part), part.dtype, part.shape)
        if isinstance(apply, RowUnpermute) and group < rows:
            values = RowUnpermute(len(values) // group)(values)
        elif apply is not None:
            values = apply(values)
        sink = target[:, start:end] if isinstance(apply, Transpose) else target[start:end]
        sink.copy_(torch.from_numpy(values))
        files.release(info, start * width, end * width)
    return target


def _part(info: TensorInfo, start: int, end: int, shape: tuple[int, ...]) -> TensorInfo:
    """Return the bytes from `start` to `end` of a contiguous tensor as one of its own."""
    return replace(info, offset=info.offset + start, nbytes=end - start, shape=shape)


def state_dict_reader(state_dict: Mapping[str, torch.Tensor]) -> Read:
    """Return a function that reads tensors from a state dict, without sharing its memory.

    Args:
        state_dict: Tensors by name.
    """

    def read(step: LoadStep, device: torch.device) -> torch.Tensor:
        tensor = state_dict[step.source.key].detach()
        return tensor.to(device=device, dtype=TORCH_DTYPES[step.dtype], copy=True).contiguous()

    return read


def _view(files: MappedFiles, info: TensorInfo) -> torch.Tensor:
    dtype = TORCH_DTYPES[info.dtype]
    if info.num_elements == 0:
        return torch.empty(info.shape, dtype=dtype)
    buffer = files.buffer(info)
    if info.offset % dtype.itemsize:
        # Vector loads may assume natural alignment, which an unpadded header breaks.
        buffer = memoryview(bytearray(buffer))
    flat = torch.frombuffer(buffer, dtype=dtype)
    if info.strides is None:
        return flat.view(info.shape)
    return flat.as_strided(info.shape, info.strides).contiguous()
