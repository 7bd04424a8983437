# SPDX-License-Identifier: Apache-2.0
"""4-bit weights of bitsandbytes (nf4, fp4, scales quantized or not), in that library's own layers.

Imported where a load asks for it. The format, as the library's files have it: ``weight`` uint8 [out * in / 2,
1], two codes a byte, rows one after the other; ``weight.absmax`` a scale for each `blocksize` weights,
float32, or uint8 where the scales are quantized too (``weight.nested_absmax``, ``weight.nested_quant_map``
and a ``nested_offset``); ``weight.quant_map`` the 16 values; ``weight.quant_state.bitsandbytes__nf4`` (or
``__fp4``) the other settings as JSON in bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Any, ClassVar

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from torch import nn

from pretrained.core.library_quantization import BitsAndBytesScheme
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import WeightsError
from pretrained.torch.empty import no_memory
from pretrained.torch.quantize import dense_shape, dressed
from pretrained.torch.quantized import MadeWeight, QuantizedLeaf
from pretrained.torch.quantizers.base import Quantizer, Quantizing
from pretrained.torch.quantizers.foreign import ForeignFormat, Repacking, StoredWeight
from pretrained.torch.quantizers.library import LibraryLinear, Maker, library_sizes, refuse_offload
from pretrained.torch.tensors import TORCH_DTYPES

# What the library's kernels know.
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_BLOCK = 64
_NESTED = re.compile(r"(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+))")
_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")


class Linear4bit(LibraryLinear, bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
    """The library's layer, with what this one asks of quantized layers.

    Args:
        module: The layer that stood here.
        maker: What makes its weight.
        dtype: What its weight would be loaded as.
    """

    def __init__(self, module: nn.Module, maker: BitsAndBytes4, dtype: torch.dtype) -> None:
        scheme: BitsAndBytesScheme = maker.scheme
        rows, columns = dense_shape(module)
        compute = None if scheme.compute_dtype is None else TORCH_DTYPES[scheme.compute_dtype]
        with no_memory():
            bitsandbytes.nn.Linear4bit.__init__(
                self,
                columns,
                rows,
                bias=False,
                compute_dtype=compute,
                compress_statistics=scheme.double_quant,
                quant_type=scheme.quant_type,
            )
        self.describe(module, maker, scheme.quant_type, dtype)
        # On some CPUs it would store the weight anew, for a kernel that another package has, and which
        # nothing else here could read.
        self.support_avx512bf16_for_cpu = False


class BitsAndBytes4(Maker):
    """Quantizes to nf4 or fp4."""

    scheme: BitsAndBytesScheme

    def leaf(self, module: nn.Module, dtype: torch.dtype) -> QuantizedLeaf:
        """Return an empty `Linear4bit`."""
        return dressed(Linear4bit(module, self, dtype), module)  # type: ignore[no-any-return]

    def make(self, weight: torch.Tensor, device: torch.device) -> nn.Parameter:
        """Return a `Params4bit`."""
        parameter = Params4bit(
            weight,
            requires_grad=False,
            blocksize=_BLOCK,
            compress_statistics=self.scheme.double_quant,
            quant_type=self.scheme.quant_type,
        )
        return parameter.to(device)  # type: ignore[no-any-return]

    def values(self, parameter: Any) -> torch.Tensor:
        """Return what a `Params4bit` stands for."""
        return dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[no-any-return]

    def nbytes(self, parameter: Any) -> int:
        """Return the bytes of the codes and of every scale."""
        state = parameter.quant_state.as_dict(packed=True).values()
        return int(parameter.data.nbytes + sum(value.nbytes for value in state))

    def to_dict(self) -> dict[str, Any]:
        """Return it in the spelling that other readers know."""
        return self.scheme.to_dict()

    def restoring(self, dtype: str | None, **arguments: Any) -> Quantizer:
        """Return what loads the library's 4-bit files."""
        return Restoring4(Stored4(self.scheme), dtype, **arguments)


def maker(scheme: BitsAndBytesScheme) -> BitsAndBytes4:
    """Return what the library does for a load.

    Args:
        scheme: Of 4 bits.
    """
    return BitsAndBytes4(scheme)


# -- files ---------------------------------------------------------------------------------------


class Stored4(ForeignFormat[BitsAndBytesScheme]):
    """The library's 4-bit files."""

    parts: ClassVar[tuple[str, ...]] = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *_STATES,
    )
    sign: ClassVar[tuple[str, ...]] = ("weight.absmax",)

    def split(self, key: str) -> tuple[str, str]:
        """Take the parts' names, which hold dots, off the module's path."""
        nested = _NESTED.fullmatch(key)
        return (nested[1], nested[2]) if nested else super().split(key)

    def leaf(self, module: nn.Module, form: Any, dtype: torch.dtype) -> QuantizedLeaf:
        """Return an empty `Linear4bit`."""
        return BitsAndBytes4(form).leaf(module, dtype)

    def form(self, weight: StoredWeight) -> BitsAndBytesScheme:
        """Check everything that the library's kernels take on trust."""
        state, is_nested = _state(weight), "weight.nested_absmax" in weight.parts
        rows, columns = weight.shape
        blocks = ceil(rows * columns / state["blocksize"])
        if state["shape"] != [rows, columns]:
            raise WeightsError(
                "A quantized weight is of another shape than the layer needs",
                where=weight.path,
                expected=[rows, columns],
                found=state["shape"],
                mend="Check that config.json describes these weights.",
            )
        weight.check("weight", (ceil(rows * columns / 2), 1), "uint8")
        weight.check("weight.quant_map", (16,), "float32")
        weight.check("weight.absmax", (blocks,), "uint8" if is_nested else "float32")
        if is_nested:
            weight.check("weight.nested_absmax", (ceil(blocks / state["nested_blocksize"]),), "float32")
            weight.check("weight.nested_quant_map", (256,), "float32")
        return BitsAndBytesScheme(
            quant_type=state["quant_type"], double_quant=is_nested, compute_dtype=self.scheme.compute_dtype
        )

    def put_together(self, weight: StoredWeight, form: Any) -> MadeWeight:
        """Return a `Params4bit` in memory of its own."""
        names = [name for name in weight.parts if name not in ("weight", *_STATES)]
        stats: dict[str, Any] = {name.rpartition(".")[2]: weight.read(name).clone() for name in names}
        stats |= _state(weight)
        data = weight.read("weight").clone()
        return MadeWeight(Params4bit.from_prequantized(data, stats, device="cpu"))


class Restoring4(Repacking):
    """Loads the library's 4-bit files into its layers."""

    def __init__(
        self,
        format: Stored4,
        dtype: str | None,
        *,
        key_mapping: Mapping[str, str] | None = None,
        is_mapped: bool = False,
    ) -> None:
        Quantizing.__init__(self, QuantizationConfig(quant_method="int4"), dtype, is_mapped=is_mapped)
        self.format, self.key_mapping, self.stored = format, key_mapping, {}

    def sizes(self, model: Any, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of every weight; those of quantized layers by the example of a few rows."""
        return library_sizes(model, sizes)

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse offloading."""
        refuse_offload("bitsandbytes", homes)

    def finish(self, model: Any) -> None:
        """Keep what the config says."""
        Quantizing.finish(self, model)
        model.config.quantization_config = self.format.scheme.to_dict()


def _state(weight: StoredWeight) -> dict[str, Any]:
    """Return the settings of a weight, checked: kernels that run past their memory trust them."""
    names = [name for name in _STATES if name in weight.parts]
    info = weight.parts[names[0]] if len(names) == 1 else None
    if info is None or info.dtype != "uint8" or len(info.shape) != 1 or info.nbytes > 4096:
        raise WeightsError(
            "A quantized weight has no readable settings",
            where=weight.path,
            expected=f"one of {_STATES[0]} and {_STATES[1]}, up to 4096 bytes",
            found=", ".join(weight.parts) if info is None else f"{info.dtype} {list(info.shape)}",
            mend="The checkpoint is not whole; take it again from where it was made.",
        )
    try:
        state = json.loads(bytes(weight.read(names[0]).tolist()).decode())
        is_nested = "weight.nested_absmax" in weight.parts
        kept = {
            "quant_type": _one_of(state["quant_type"], (names[0].rpartition("__")[2],)),
            "blocksize": _one_of(state["blocksize"], _BLOCKS),
            "dtype": _one_of(state["dtype"], ("float32", "bfloat16", "float16")),
            "shape": [int(size) for size in state["shape"]],
        }
        if is_nested:
            kept["nested_blocksize"] = _one_of(state["nested_blocksize"], _BLOCKS)
            kept["nested_dtype"] = _one_of(state["nested_dtype"], ("float32",))
            kept["nested_offset"] = float(state["nested_offset"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(
            "The settings of a quantized weight cannot be understood",
            where=info.key,
            found=f"{type(error).__name__}: {error}"[:200],
            mend="Take the checkpoint again from where it was made.",
        ) from error
    return kept


def _one_of(value: Any, known: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in known:
        raise ValueError(f"{value!r}, not one of {', '.join(map(str, known))}")
    return value
