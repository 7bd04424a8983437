# SPDX-License-Identifier: Apache-2.0
"""From spans of bytes to torch tensors: the one seam between the core's files and this backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.reader import MappedFiles

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name_of(dtype: torch.dtype) -> str:
    """Return the canonical name of a torch dtype.

    Args:
        dtype: For example ``torch.bfloat16``.
    """
    return _NAMES[dtype]


def mapped_reader(
    *, copy_all: bool = False
) -> Callable[[TensorInfo, Callable[[Any], Any] | None, torch.dtype, torch.device], torch.Tensor]:
    """Return a function that reads tensors from mapped files.

    A tensor that needs no cast and stays on the CPU is a view of a private map: its pages are the
    file's own, shared between processes, until something writes to them; the file never changes.

    Args:
        copy_all: Give every tensor memory of its own.
    """
    files = MappedFiles()

    def read(
        info: TensorInfo, apply: Callable[[Any], Any] | None, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        tensor = _view(files, info) if info.dtype in TORCH_DTYPES else torch.from_numpy(files.array(info))
        if apply is not None:
            tensor = torch.from_numpy(apply(tensor.float().numpy())).contiguous()
        return tensor.to(device=device, dtype=dtype, copy=copy_all)

    return read


def state_dict_reader(
    state_dict: Mapping[str, torch.Tensor],
) -> Callable[[TensorInfo, Callable[[Any], Any] | None, torch.dtype, torch.device], torch.Tensor]:
    """Return a function that reads tensors from a state dict, without sharing its memory.

    Args:
        state_dict: Tensors by name.
    """

    def read(
        info: TensorInfo, apply: Callable[[Any], Any] | None, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return state_dict[info.key].detach().to(device=device, dtype=dtype, copy=True).contiguous()

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
