# SPDX-License-Identifier: Apache-2.0
"""Quantization that is left to another library: what a call or a config.json asks of it, as typed values.

``bitsandbytes`` has the 4-bit codebooks (nf4, fp4) and scales that are quantized themselves; its 8-bit
checkpoints need no library, for int8 layers of this one hold the same numbers. ``torchao`` has the schemes of
its own config classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pretrained.core.dtypes import floating_dtype_name
from pretrained.core.foreign_quantization import ForeignScheme, not_read, yes_or_no
from pretrained.errors import ArgumentError, ConfigError, NotYetError

# Fields of BitsAndBytesConfig that nothing here can obey, with the values that ask for nothing.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "llm_int8_threshold": (6.0,),
    "llm_int8_enable_fp32_cpu_offload": (False, True),
    "llm_int8_has_fp16_weight": (False,),
    "bnb_4bit_quant_storage": (None, "uint8", "torch.uint8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytesScheme(ForeignScheme):
    """What bitsandbytes is asked for, or has done.

    Attributes:
        bits: 4 or 8; 8 only in files.
        quant_type: ``"nf4"`` or ``"fp4"``; 4 bits.
        double_quant: Whether the scales are quantized too; 4 bits.
        skip_modules: As `QuantizationConfig.skip_modules`.
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    bits: int = 4
    quant_type: Literal["nf4", "fp4"] = "fp4"
    double_quant: bool = False
    skip_modules: tuple[str, ...] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Read the fields of BitsAndBytesConfig; those of loads that are over are left alone."""
        is_4bit = yes_or_no(values, "load_in_4bit", bool(values.get("_load_in_4bit")), where=where)
        is_8bit = yes_or_no(values, "load_in_8bit", bool(values.get("_load_in_8bit")), where=where)
        if is_4bit == is_8bit:
            raise ConfigError(
                "quantization_config of bitsandbytes names one of load_in_4bit and load_in_8bit",
                where=where,
                found="both" if is_4bit else "neither",
            )
        kind: Any = values.get("bnb_4bit_quant_type") or "fp4"
        if kind not in ("nf4", "fp4"):
            raise ConfigError(
                "There is no such 4-bit type",
                where=f"bnb_4bit_quant_type, {where}",
                expected="'nf4' or 'fp4'",
                found=repr(kind),
            )
        storage = values.get("bnb_4bit_quant_storage")
        if is_4bit and storage not in _IDLE["bnb_4bit_quant_storage"]:
            raise not_read(f"bitsandbytes with bnb_4bit_quant_storage={storage!r}", where=where)
        compute = values.get("bnb_4bit_compute_dtype")
        return cls(
            bits=4 if is_4bit else 8,
            quant_type=kind,
            double_quant=yes_or_no(values, "bnb_4bit_use_double_quant", False, where=where),
            skip_modules=_names(values.get("llm_int8_skip_modules"), "llm_int8_skip_modules"),
            # float32 is the library's default and says nothing.
            compute_dtype=None if compute is None or str(compute).endswith("float32") else _dtype(compute),
        )

    @classmethod
    def requested(cls, values: Mapping[str, Any]) -> Self:
        """Read what a call asks for, and refuse what the library could do and this one cannot pass on.

        Args:
            values: Fields of BitsAndBytesConfig.

        Raises:
            NotYetError: such a field.
            ConfigError: a value that cannot be.
        """
        for name, idle in _IDLE.items():
            given = values.get(name, idle[0])
            if not any(given == choice or str(given) == choice for choice in idle):
                raise NotYetError(
                    f"{name}={given!r} is not passed on to bitsandbytes",
                    where="quantization_config",
                    mend="Leave it out.",
                )
        return cls.parse(values, where="the call")

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, in the spelling that other readers of the format know."""
        values: dict[str, Any] = {"quant_method": self.quant_method, f"load_in_{self.bits}bit": True}
        if self.bits == 4:
            values["bnb_4bit_quant_type"] = self.quant_type
            values["bnb_4bit_use_double_quant"] = self.double_quant
            if self.compute_dtype is not None:
                values["bnb_4bit_compute_dtype"] = self.compute_dtype
        if self.skip_modules:
            values["llm_int8_skip_modules"] = list(self.skip_modules)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchAoScheme(ForeignScheme):
    """What torchao is asked for.

    Attributes:
        quant_type: A config object of torchao, its dictionary (``{"_type": ..., "_data": ...}``), or its name
            as in ``"int8_weight_only"``.
        arguments: For a config that is named.
        skip_modules: As `QuantizationConfig.skip_modules`.
    """

    quant_method: ClassVar[str] = "torchao"

    quant_type: Any
    arguments: Mapping[str, Any]
    skip_modules: tuple[str, ...] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Refuse files: torchao's tensors are objects of its own, which plain tensors cannot hold."""
        raise not_read("What torchao has saved", where=where)

    @classmethod
    def requested(cls, values: Mapping[str, Any]) -> Self:
        """Read what a call asks for.

        Args:
            values: Fields of TorchAoConfig.

        Raises:
            NotYetError: embeddings, or schemes that differ between modules.
            ArgumentError: fields that are no such config's.
        """
        known = ("quant_method", "quant_type", "quant_type_kwargs", "modules_to_not_convert")
        idle = ("include_input_output_embeddings", "untie_embedding_weights")
        for name, value in values.items():
            if name in idle and value:
                raise NotYetError(
                    f"{name}={value!r} is not offered with torchao",
                    where="quantization_config",
                    mend="Leave it out: embeddings and heads stay as they are.",
                )
            if name not in (*known, *idle):
                raise ArgumentError(
                    f"{name!r} is no setting of 'torchao'",
                    where="quantization_config",
                    expected=", ".join(known),
                )
        kind = values.get("quant_type")
        if isinstance(kind, Mapping) and "_type" not in kind:
            if set(kind) != {"default"}:
                raise NotYetError(
                    "Schemes of torchao that differ between modules are not offered",
                    where="quantization_config.quant_type",
                    found=", ".join(map(str, kind)),
                    mend="Pass one scheme, and modules_to_not_convert for what stays plain.",
                )
            kind = kind["default"]
        if kind is None:
            raise ArgumentError(
                "torchao is asked for without a scheme",
                where="quantization_config.quant_type",
                expected="a config object of torchao, or a name such as 'int8_weight_only'",
            )
        return cls(
            quant_type=kind,
            arguments=dict(values.get("quant_type_kwargs") or {}),
            skip_modules=_names(values.get("modules_to_not_convert"), "modules_to_not_convert"),
        )


LibraryScheme = BitsAndBytesScheme | TorchAoScheme


def asks_for_bitsandbytes(values: Mapping[str, Any]) -> bool:
    """Tell whether the fields of BitsAndBytesConfig ask for what only that library has.

    Args:
        values: The fields. ``load_in_4bit`` and ``load_in_8bit`` alone mean this library's int4 and int8.
    """
    four = bool(values.get("load_in_4bit"))
    return four and (
        values.get("bnb_4bit_quant_type", "fp4") != "fp4" or bool(values.get("bnb_4bit_use_double_quant"))
    )


def _dtype(value: Any) -> str:
    return floating_dtype_name(str(value))


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(
            f"{where} is a list of module names", where=f"quantization_config.{where}", found=repr(value)
        )
    return names
