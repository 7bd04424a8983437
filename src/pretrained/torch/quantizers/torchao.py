# SPDX-License-Identifier: Apache-2.0
"""The schemes of torchao, in stock `Linear` layers whose weight is one of that library's tensors.

Imported where a load asks for it. Which schemes run where is the library's matter; what it refuses is refused
here in its words. Its tensors are objects that a file of plain tensors cannot hold, so they are not saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchao import quantization
from torchao.core import config

from pretrained.core.library_quantization import TorchAoScheme
from pretrained.errors import ArgumentError, NotYetError
from pretrained.torch.empty import no_memory
from pretrained.torch.quantize import dense_shape, dressed
from pretrained.torch.quantized import QuantizedLeaf
from pretrained.torch.quantizers.library import LibraryLinear, Maker


class TorchAoLinear(LibraryLinear, nn.Linear):  # type: ignore[misc]
    """A stock layer, with what this library asks of quantized layers.

    Args:
        module: The layer that stood here.
        maker: What makes its weight.
        dtype: What its weight would be loaded as.
    """

    is_savable = False

    def __init__(self, module: nn.Module, maker: TorchAo, dtype: torch.dtype) -> None:
        rows, columns = dense_shape(module)
        with no_memory():
            nn.Linear.__init__(self, columns, rows, bias=False)
        self.weight.requires_grad_(False)
        self.describe(module, maker, maker.name, dtype)


class TorchAo(Maker):
    """Quantizes by a config of torchao.

    Args:
        scheme: What is asked for.

    Raises:
        ArgumentError: there is no such config.
        NotYetError: it cannot quantize a weight here.
    """

    scheme: TorchAoScheme

    def __init__(self, scheme: TorchAoScheme) -> None:
        super().__init__(scheme)
        self.config = _parsed(scheme)
        self.name = type(self.config).__name__
        # Asked once, before anything is read, and not at the first layer.
        self.make(torch.ones(64, 256), torch.device("cpu"))

    def leaf(self, module: nn.Module, dtype: torch.dtype) -> QuantizedLeaf:
        """Return an empty `TorchAoLinear`."""
        return dressed(TorchAoLinear(module, self, dtype), module)  # type: ignore[no-any-return]

    def make(self, weight: torch.Tensor, device: torch.device) -> nn.Parameter:
        """Return a parameter that holds one of torchao's tensors."""
        with no_memory():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
        try:
            quantization.quantize_(layer, self.config)
        except (ImportError, AssertionError, ValueError, RuntimeError, AttributeError) as error:
            raise NotYetError(
                f"torchao cannot quantize by {self.name} here",
                where=f"{list(weight.shape)} {weight.dtype} on {device}",
                found=f"{type(error).__name__}: {error}".partition("\n")[0][:300],
                mend="Choose another of its configs, or use quant_method 'int8' or 'int4'.",
            ) from error
        return layer.weight

    def values(self, parameter: Any) -> torch.Tensor:
        """Return what one of torchao's tensors stands for."""
        return parameter.dequantize()  # type: ignore[no-any-return]

    def nbytes(self, parameter: Any) -> int:
        """Return the bytes of the tensors inside."""
        return _bytes_inside(parameter)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of TorchAoConfig."""
        found: dict[str, Any] = {
            "quant_method": "torchao",
            "quant_type": {"default": config.config_to_dict(self.config)},
        }
        if self.scheme.skip_modules:
            found["modules_to_not_convert"] = list(self.scheme.skip_modules)
        return found


def maker(scheme: TorchAoScheme) -> TorchAo:
    """Return what the library does for a load.

    Args:
        scheme: What is asked for.
    """
    return TorchAo(scheme)


def _parsed(scheme: TorchAoScheme) -> Any:
    kind = scheme.quant_type
    try:
        if isinstance(kind, str):
            kind = getattr(quantization, f"{kind.title().replace('_', '')}Config")(**scheme.arguments)
        elif isinstance(kind, dict):
            kind = config.config_from_dict(kind)
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(
            "torchao has no such scheme",
            where="quantization_config.quant_type",
            found=f"{scheme.quant_type!r}: {error}"[:300],
            mend="Pass a config object of torchao, such as torchao.quantization.Int8WeightOnlyConfig().",
        ) from error
    if not isinstance(kind, config.AOBaseConfig):
        raise ArgumentError(
            "This is no config of torchao", where="quantization_config.quant_type", found=type(kind).__name__
        )
    return kind


def _bytes_inside(tensor: torch.Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    names, _ = flatten()
    return sum(_bytes_inside(getattr(tensor, name)) for name in names)
