# SPDX-License-Identifier: Apache-2.0
"""What conversions need of PyTorch: pickles of tensors, and models that are quantized on the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pretrained.arch.skeletons import architecture_of
from pretrained.core.config import PreTrainedConfig
from pretrained.core.registry import family, load_name
from pretrained.core.writer import TensorSource
from pretrained.torch.dispatch import disk_weights_of
from pretrained.torch.offload import ReleaseBehind
from pretrained.torch.save import weights_to_write
from pretrained.torch.tensors import dtype_name_of


def pickle_writer(tensors: Mapping[str, TensorSource]) -> Callable[[Path, Sequence[str]], None]:
    """Return what writes one file of ``torch.save``, as ``pytorch_model.bin`` is.

    Tensors that are stored as they lie stay pages of the old file until they are written; the others of one
    file are in memory together.

    Args:
        tensors: All tensors.
    """

    def write(file: Path, keys: Sequence[str]) -> None:
        shard = {key: _tensor(tensors[key]) for key in keys}
        try:
            torch.save(shard, file)
        except RuntimeError as error:  # torch's writer says so of a full disk
            raise OSError(errno.EIO, str(error)) from error
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return write


def _tensor(source: TensorSource) -> torch.Tensor:
    dtype = getattr(torch, source.dtype)
    raw = source.read()
    if not len(raw):
        return torch.empty(source.shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # formats without padding put tensors at any address
    return flat.view(dtype).view(source.shape)


def load_quantized(
    path: str, config: PreTrainedConfig, method: str, dtype: str, offload_folder: Path, **hub: Any
) -> Any:
    """Load a model whose layers are quantized one by one onto the disk.

    Args:
        path: Folder, file or id.
        config: Its config, which names the class.
        method: ``"int8"`` or ``"int4"``.
        dtype: Of what is not quantized; ``"auto"`` keeps the files'.
        offload_folder: For the quantized weights.
        **hub: Other arguments of ``from_pretrained``.
    """
    models = family(config.model_type, where=path).models["torch"]
    model_class = load_name(models.module, architecture_of(config))
    return model_class.from_pretrained(
        path,
        dtype=dtype,
        quantization_config={"quant_method": method},
        device_map={"": "disk"},
        offload_folder=offload_folder,
        **hub,
    )


class ModelTensor:
    """A weight of a model, as a save writes it.

    Args:
        tensor: The weight; it may be on disk.
        behind: Lets go of weights on disk that have been read.
    """

    def __init__(self, tensor: torch.Tensor, behind: ReleaseBehind) -> None:
        self._tensor, self._behind = tensor, behind
        self.dtype = dtype_name_of(tensor.dtype)
        self.shape = tuple(tensor.shape)

    def read(self) -> memoryview:
        """Return its bytes, row-major."""
        self._behind.enter(self._tensor)
        tensor = self._tensor.detach().cpu().contiguous()
        if not tensor.numel():
            return memoryview(b"")
        return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def model_tensors(model: Any) -> dict[str, ModelTensor]:
    """Return the weights of a model as a save names and writes them.

    Args:
        model: A `PreTrainedModel`.
    """
    behind = ReleaseBehind(disk_weights_of(model))
    return {key: ModelTensor(tensor, behind) for key, tensor in weights_to_write(model).items()}
