# SPDX-License-Identifier: Apache-2.0
"""A few rows times packed weights, in as few products as can be, for steps of decoding.

At one token a time calling an operator costs as much as a small product does, so the 4-bit weights of layers
that take the same input are laid behind one another and multiplied as one. The layers hold views of them from
then on: nothing is in memory twice, and every value stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pretrained.torch.quantized import QuantizedLinear
from pretrained.torch.quantized_blocks import GgufLinear
from pretrained.torch.quantized_ops import kernel_block

Product = Callable[[torch.Tensor], torch.Tensor]
"""Takes [rows, in], contiguous; returns [rows, all outs] in the same dtype."""


class Joined:
    """Packed matrices of the same width in one tensor; held by each of them, and by nothing else.

    Args:
        parts: In the kernel's layout, of the same groups, all but the last of whole blocks of rows.
    """

    def __init__(self, parts: Sequence[QuantizedLinear]) -> None:
        self.weight = torch.cat([part.weight.detach() for part in parts])
        self.scales = torch.cat([part.kernel_scales for part in parts], dim=1)
        self._addresses = []
        top = 0
        for part in parts:
            rows = slice(top, top + part.out_features)
            part.hold(self.weight[rows], self.scales[:, rows], self)
            self._addresses.append(part.weight.data_ptr())
            top = rows.stop

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and unpickled weights have memory of their own.
        return type(None), ()

    def holds(self, parts: Sequence[QuantizedLinear]) -> bool:
        """Tell whether these matrices, in this order, are what it was made of.

        Args:
            parts: Any.
        """
        return [part.weight.data_ptr() for part in parts] == self._addresses


def join(parts: Sequence[QuantizedLinear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and scales of several matrices as one, of which theirs become views.

    Args:
        parts: As `Joined` wants them.
    """
    if len(parts) == 1:
        return parts[0].weight.detach(), parts[0].kernel_scales.contiguous()
    joined = parts[0].joined
    if not isinstance(joined, Joined) or not joined.holds(parts):
        joined = Joined(parts)
    return joined.weight, joined.scales


def packed_product(layers: Sequence[nn.Module], rows: int) -> Product | None:
    """Return the product with layers that take the same input, as one; None where they cannot be one.

    Args:
        layers: Any dense layers.
        rows: Of an input.
    """
    if len(layers) == 1 and type(layers[0]) is QuantizedLinear and layers[0].form.bits == 8:
        return _int8_product(layers[0], rows)
    found = [_matrices(layer, rows) for layer in layers]
    if not all(found) or len({(len(one), one[0].kernel_group) for one in found}) != 1:
        return None
    block = kernel_block()
    if block is None or any(one[0].out_features % block for one in found[:-1]):
        return None
    with torch.inference_mode(False), torch.no_grad():
        terms = [join([one[index] for one in found]) for index in range(len(found[0]))]
        bias = _joined_bias(layers)
    return _product(terms, found[0][0].kernel_group, bias)


def _int8_product(layer: QuantizedLinear, rows: int) -> Product | None:
    """Return the product with one layer of integers of 8 bits; None where the kernel does not serve it."""
    if layer.weight_order is not None or layer.kernel(torch.empty(rows, layer.in_features)) != "int8pack":
        return None
    if layer.weight_scale.dtype != torch.bfloat16 or not layer.is_ready:
        return None
    weight, scale, multiply = layer.weight.detach(), layer.weight_scale.detach(), torch._weight_int8pack_mm
    bias = None if layer.bias is None else layer.bias.detach()

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            result = multiply(x, weight, scale)
        else:
            result = multiply(x.to(torch.bfloat16), weight, scale).to(x.dtype)
        return result if bias is None else result + bias.to(x.dtype)

    return product


def _matrices(layer: nn.Module, rows: int) -> tuple[QuantizedLinear, ...]:
    """Return the 4-bit matrices whose sum a layer's weight is; nothing where the kernel does not serve it."""
    parts: tuple[Any, ...] = layer.repacked if type(layer) is GgufLinear else (layer,)
    if not parts or type(parts[0]) is not QuantizedLinear or parts[0].weight.device.type != "cpu":
        return ()
    x = torch.empty(rows, parts[0].in_features)
    ready = all(part.weight_order is None and part.kernel_group for part in parts)
    return parts if ready and all(part.kernel(x) == "int4pack" for part in parts) else ()


def _joined_bias(layers: Sequence[nn.Module]) -> torch.Tensor | None:
    biases: list[Any] = [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    sizes: list[Any] = [layer.out_features for layer in layers]
    pairs = zip(biases, sizes, strict=True)
    return torch.cat([torch.zeros(size) if bias is None else bias.detach() for bias, size in pairs])


def _product(
    terms: list[tuple[torch.Tensor, torch.Tensor]], group: int, bias: torch.Tensor | None
) -> Product:
    multiply = torch._weight_int4pack_mm_for_cpu
    (weight, scales), *rest = terms

    def plain(x: torch.Tensor) -> torch.Tensor:
        return multiply(x, weight, group, scales)

    def whole(x: torch.Tensor) -> torch.Tensor:
        inner = x.to(torch.bfloat16)
        result = multiply(inner, weight, group, scales)
        for other, its_scales in rest:
            result += multiply(inner, other, group, its_scales)
        result = result.to(x.dtype)
        return result if bias is None else result + bias.to(x.dtype)

    def bfloat16_only(x: torch.Tensor) -> torch.Tensor:
        # The usual case, without a detour.
        return plain(x) if x.dtype == torch.bfloat16 else whole(x)

    return whole if rest or bias is not None else bfloat16_only
