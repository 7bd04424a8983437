# SPDX-License-Identifier: Apache-2.0
"""Quantizing through another library, a weight at a time while the weights stream in.

The library's own layers or tensors stand in the model, so that it multiplies, and what looks for them finds
them. A library is a file beside this one with a `Maker`; it is imported when a load asks for it, and nothing
else imports the library.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import nn

from pretrained.core.budgets import CPU, DISK
from pretrained.core.library_quantization import LibraryScheme
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import MissingDependencyError, NotYetError, WeightsError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import dense_shape, module_ties, put, quantized_leaves, select
from pretrained.torch.quantized import MadeWeight, QuantizedLeaf, plain_dense
from pretrained.torch.quantizers.base import Quantizer, Quantizing, let_go
from pretrained.torch.quantizers.rounding import as_stored
from pretrained.torch.tensors import TORCH_DTYPES, Read

_MAKERS: Final = {
    "bitsandbytes": "pretrained.torch.quantizers.bitsandbytes",
    "torchao": "pretrained.torch.quantizers.torchao",
}


# Floats that have been quantized before the C library is told to give their memory back.
_TRIM_BYTES: Final = 1 << 25


class Maker:
    """What a library does for one load.

    Args:
        scheme: What is asked for.
    """

    def __init__(self, scheme: Any) -> None:
        self.scheme = scheme

    def leaf(self, module: nn.Module, dtype: torch.dtype) -> QuantizedLeaf:
        """Return an empty layer for a dense one, on the meta device; it shares that one's bias.

        Args:
            module: A `Linear` or `Conv1D`.
            dtype: What its weight would be loaded as.
        """
        raise NotImplementedError

    def make(self, weight: torch.Tensor, device: torch.device) -> nn.Parameter:
        """Return a quantized weight.

        Args:
            weight: [out, in], floating and contiguous; left as it is.
            device: Where it goes.
        """
        raise NotImplementedError

    def values(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return what a quantized weight stands for, [out, in].

        Args:
            parameter: From `make`.
        """
        raise NotImplementedError

    def nbytes(self, parameter: nn.Parameter) -> int:
        """Return the bytes of a quantized weight with everything that belongs to it.

        Args:
            parameter: From `make`.
        """
        raise NotImplementedError

    def restoring(self, dtype: str | None, **arguments: Any) -> Quantizer:
        """Return what loads a checkpoint that the library has quantized.

        Args:
            dtype: As `Quantizer`.
            **arguments: As `pretrained.torch.quantizers.foreign.Repacking`.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return what the model's config says of its weights."""
        raise NotImplementedError


def maker_for(scheme: LibraryScheme) -> Maker:
    """Return what does a scheme.

    Args:
        scheme: What is asked for, or what the files hold.

    Raises:
        MissingDependencyError: the library is not installed, or cannot be imported.
    """
    name = scheme.quant_method
    mend = (
        f"Install it: pip install {name}. Or use quantization_config={{'quant_method': 'int4'}} (or 'int8') "
        "on the unquantized checkpoint, which needs no library."
    )
    if find_spec(name) is None:
        raise MissingDependencyError(
            f"Weights in the scheme that is asked for need the package {name}, which is not installed",
            where="quantization_config",
            mend=mend,
        )
    try:
        with _quiet(name, "torch.utils._pytree"):
            module = import_module(_MAKERS[name])
    except ImportError as error:
        raise MissingDependencyError(
            f"The package {name} is installed and cannot be imported, or lacks what is needed",
            where="quantization_config",
            found=str(error).partition("\n")[0],
            mend=mend,
        ) from error
    maker: Maker = module.maker(scheme)
    return maker


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Leave out what libraries tell while they are imported, of kernels that this machine has not."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class ThroughLibrary(Quantizing):
    """Quantizes each weight when it is read, by a library.

    Args:
        maker: That library's part.
        dtype: As `Quantizer`.
        is_mapped: As `Quantizing`.

    Attributes:
        scratch: As `pretrained.torch.quantizers.rounding.Rounding.scratch`.
    """

    scratch: Read | None = None

    def __init__(self, maker: Maker, dtype: str | None, *, is_mapped: bool = False) -> None:
        super().__init__(
            QuantizationConfig(quant_method="int8", skip_modules=maker.scheme.skip_modules),
            dtype,
            is_mapped=is_mapped,
        )
        self.maker = maker
        self._left = 0

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Put the library's layers in, and read their weights as it makes them."""
        steps = {step.key: step for step in plan.steps}
        owners = module_ties(model)
        transposed: dict[str, bool] = {}
        for path in select(model, self.config):
            step = steps.get(f"{owners.get(path, path)}.weight")
            if step is None or (self.dtype is not None and step.dtype != self.dtype):
                continue
            module = model.get_submodule(path)
            transposed[f"{path}.weight"] = isinstance(module, Conv1D)
            put(model, path, self.maker.leaf(module, TORCH_DTYPES[step.dtype]))

        def read_made(step: LoadStep, device: torch.device) -> Any:
            if step.key not in transposed:
                return read(step, device)
            stored = as_stored(step)
            used = read if self.scratch is None or (stored.is_view and self.is_mapped) else self.scratch
            values = used(stored, torch.device("cpu"))
            weight = values.t() if transposed[step.key] else values
            weight = weight.to(TORCH_DTYPES[step.dtype], memory_format=torch.contiguous_format, copy=True)
            if self.is_mapped and stored.is_view:
                let_go(values)
            del values
            self.errors[step.key.removesuffix(".weight")], made = _made(self.maker, step.key, weight, device)
            self._left += weight.nbytes
            del weight
            if self._left > _TRIM_BYTES:
                self._left = 0
                _give_back()
            return MadeWeight(made)

        return plan, read_made

    def sizes(self, model: Any, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of every weight; those of quantized layers by the example of a few rows."""
        return library_sizes(model, sizes)

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse what a library's tensors cannot do: rest elsewhere than where they run."""
        refuse_offload(self.maker.scheme.quant_method, homes)

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds."""
        _give_back()
        super().finish(model)
        model.config.quantization_config = self.maker.to_dict()


def library_sizes(model: nn.Module, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of every weight; those of quantized layers by the example of a few rows.

    Args:
        model: With the library's layers in place.
        sizes: As for plain weights.
    """
    found = dict(sizes)
    per_row: dict[int, float] = {}
    for path, leaf in quantized_leaves(model).items():
        if isinstance(leaf, LibraryLinear):
            rows, columns = leaf.shape
            if columns not in per_row:
                example = torch.ones(64, columns, dtype=leaf.logical_dtype)
                per_row[columns] = leaf.maker.nbytes(leaf.maker.make(example, torch.device("cpu"))) / 64
            found[f"{path}.weight"] = round(rows * per_row[columns])
    return found


def refuse_offload(name: str, homes: Iterable[Any]) -> None:
    """Raise where weights would be brought to another device to run.

    Args:
        name: The library.
        homes: Where the weights would go.

    Raises:
        NotYetError: on the disk, or on the CPU beside another device.
    """
    there = set(homes)
    if DISK in there or (CPU in there and len(there) > 1):
        raise NotYetError(
            f"Weights that {name} has quantized cannot be offloaded",
            where="quantization_config, device_map",
            found=", ".join(sorted(map(str, there))),
            mend="Place them where they run, or use quant_method 'int8' or 'int4'.",
        )


def _give_back() -> None:
    """Give the memory of temporaries back, which lies in holes between the weights that stay.

    The libraries allocate both from the C library's heap, which keeps the holes: without this a load peaks
    near the size of the plain weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _made(maker: Maker, key: str, weight: torch.Tensor, device: torch.device) -> tuple[float, nn.Parameter]:
    if not bool(torch.isfinite(weight).all()):
        raise WeightsError(
            "A weight that is to be quantized holds infinities or NaN",
            where=key,
            mend="Name its module among those to skip, or check where the checkpoint was made.",
        )
    made = maker.make(weight, device)
    away = (maker.values(made).to(weight.device, torch.float32) - weight.float()).square().sum()
    size = weight.float().square().sum()
    return float((away / size).sqrt()) if float(size) else 0.0, made


class LibraryLinear(QuantizedLeaf):
    """A dense layer of a library; stands before that library's class, whose `forward` runs.

    Attributes:
        maker: Who knows what the weight stands for.
        transposed: Whether a `Conv1D` stood here.
    """

    maker: Maker
    transposed: bool
    weight: nn.Parameter
    in_features: int
    out_features: int

    def describe(self, module: nn.Module, maker: Maker, scheme: str, dtype: torch.dtype) -> None:
        """Set what `QuantizedLeaf` has, once the library's class has set itself up.

        Args:
            module: The layer that stood here.
            maker: As the attribute.
            scheme: For people.
            dtype: What the weight would be loaded as.
        """
        self.shape, self.scheme, self.logical_dtype = dense_shape(module), scheme, dtype
        self.maker, self.transposed = maker, isinstance(module, Conv1D)

    @property
    def hidden_nbytes(self) -> int:
        """Bytes beyond what the parameter says of itself, which may be less than nothing."""
        return self.maker.nbytes(self.weight) - self.weight.numel() * self.weight.element_size()

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, dequantized by the library."""
        return self.maker.values(self.weight)[part].to(dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the layer that stood here, with the dequantized weight."""
        return plain_dense(self, self.bias, self.transposed, dtype)  # type: ignore[arg-type]
