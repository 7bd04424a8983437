# SPDX-License-Identifier: Apache-2.0
"""From spans of bytes to torch tensors: the one seam between the core's files and this backend."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.ggml import dequantize
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


def _bytes(count: int) -> torch.Tensor:
    return torch.from_numpy(np.empty(count, dtype=np.uint8))


def mapped_reader(files: MappedFiles | None = None, *, copy_all: bool = False) -> Read:
    """Return a function that reads tensors from mapped files; threads may call it side by side.

    A tensor that needs no cast and stays on the CPU is a view of a private map: its pages are the
    file's own, shared between processes, until something writes to them; the file never changes.

    Args:
        files: The maps; None for new ones.
        copy_all: Give every tensor memory of its own.
    """
    files, arena = files or MappedFiles(), Arena()

    def read(step: LoadStep, device: torch.device) -> torch.Tensor:
        info, dtype = step.source, TORCH_DTYPES[step.dtype]
        stored = TORCH_DTYPES.get(info.dtype)
        on_cpu = device.type == "cpu"
        if step.is_view and on_cpu and not copy_all:
            return _view(files, info)
        shape = step.shape if step.shape is not None else info.shape
        target = (
            arena.empty(shape, dtype)
            if device.type == "cpu"
            else torch.empty(shape, dtype=dtype, device=device)
        )
        if stored is not None:
            values = _view(files, info)
        elif step.apply is None and dtype == torch.float32 and on_cpu:
            dequantize(files.buffer(info), info.dtype, info.shape, out=target.numpy())
            files.release(info)
            return target
        else:
            values = torch.from_numpy(dequantize(files.buffer(info), info.dtype, info.shape))
        if step.apply is not None:
            values = torch.from_numpy(step.apply(values.float().numpy()))
        elif stored is not None and info.strides is None:
            return _copy_and_release(files, info, values, target)
        target.copy_(values)
        files.release(info)
        return target

    return read


def _copy_and_release(
    files: MappedFiles, info: TensorInfo, values: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Copy a view of a file piece by piece, so that no more of the file is in memory than a piece."""
    source, sink = values.reshape(-1), target.view(-1)
    step = _COPY_BYTES // values.element_size()
    for start in range(0, source.numel(), step):
        end = min(start + step, source.numel())
        sink[start:end].copy_(source[start:end])
        files.release(info, start * values.element_size(), end * values.element_size())
    return target


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
