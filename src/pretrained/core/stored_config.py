# SPDX-License-Identifier: Apache-2.0
"""What config.json says of weights that another library has quantized, and what a call asks of them.

`parse_stored` picks the reader by ``quant_method``; `read_wish` reads the call's ``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pretrained.core.compressed_tensors import CompressedConfig, parse_compressed_tensors
from pretrained.core.fp8 import Fp8Config, parse_fp8
from pretrained.errors import ArgumentError, did_you_mean

StoredConfig = CompressedConfig | Fp8Config
METHODS: Final = ("compressed-tensors", "fp8")

_WHERE: Final = "quantization_config"
_COMPUTE: Final = ("float32", "bfloat16", "float16")
_WISHES: Final = ("dequantize", "run_compressed", "compute_dtype")


@dataclass(frozen=True, slots=True)
class ReadWish:
    """What a call asks of weights that another library has quantized.

    Attributes:
        dequantize: Decode every weight while loading, into the asked dtype; False keeps them as they are.
        compute_dtype: What kept weights multiply in; None lets each layer choose.
    """

    dequantize: bool = False
    compute_dtype: str | None = None


def parse_stored(values: Mapping[str, Any], *, where: object = None) -> StoredConfig:
    """Read the entry of a config.json whose method is one of `METHODS`.

    Args:
        values: ``quantization_config``.
        where: What to name in errors.

    Raises:
        ConfigError: a value that cannot be.
        NotYetError: a form that is known and not read.
    """
    if values.get("quant_method") == "fp8":
        return parse_fp8(values, where=where)
    return parse_compressed_tensors(values, where=where)


def method_of(value: Any) -> str | None:
    """Return the ``quant_method`` of a config's entry or of an argument; None where there is none.

    Args:
        value: A dictionary, an object of this or another library, or None.
    """
    method = value.get("quant_method") if isinstance(value, Mapping) else getattr(value, "quant_method", None)
    method = getattr(method, "value", method)
    return method if isinstance(method, str) else None


def read_wish(wanted: Any, stored: Mapping[str, Any]) -> ReadWish:
    """Read the argument of a call for a checkpoint in one of these forms.

    Args:
        wanted: None, a dictionary with ``quant_method`` and any of ``dequantize``, ``run_compressed`` (the
            opposite of it) and ``compute_dtype``, or an object of another library with such attributes,
            whose other fields hold defaults and are not looked at.
        stored: The entry of config.json; a dictionary may repeat what it says.

    Raises:
        ArgumentError: it asks for what the files do not hold, or for what there is not.
    """
    if wanted is None:
        return ReadWish()
    if isinstance(wanted, Mapping):
        _check_rest(wanted, stored)
        values = {name: wanted[name] for name in _WISHES if wanted.get(name) is not None}
    else:
        found = ((name, getattr(wanted, name, None)) for name in _WISHES)
        values = {name: value for name, value in found if value is not None}
    for name in ("dequantize", "run_compressed"):
        if not isinstance(values.get(name, False), bool):
            raise ArgumentError(
                f"{name} is a yes or a no", where=f"{_WHERE}.{name}", found=repr(values[name])
            )
    kept = not values["dequantize"] if "dequantize" in values else values.get("run_compressed", True)
    if values.get("run_compressed", kept) != kept:
        raise ArgumentError("dequantize and run_compressed contradict each other", where=_WHERE)
    compute = values.get("compute_dtype")
    dtype = None if compute is None else str(compute).rpartition(".")[2]
    if dtype is not None and dtype not in _COMPUTE:
        raise ArgumentError(
            "Quantized layers multiply in a floating dtype",
            where=f"{_WHERE}.compute_dtype",
            expected="'bfloat16', 'float16', 'float32' or None",
            found=repr(compute),
        )
    return ReadWish(not kept, dtype)


def _check_rest(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if name == "quant_method" or name in _WISHES:
            continue
        if name not in stored:
            raise ArgumentError(
                f"{name!r} is no setting for reading a {method_of(wanted)} checkpoint",
                where=_WHERE,
                expected=", ".join(_WISHES),
                mend=did_you_mean(str(name), _WISHES) or "Leave it out.",
            )
        if (list(value) if isinstance(value, tuple) else value) != stored[name]:
            raise ArgumentError(
                f"The checkpoint says another {name}",
                where=f"{_WHERE}.{name}",
                expected=repr(stored[name])[:200],
                found=repr(value)[:200],
                mend="Leave it out: the files decide how their weights are read.",
            )
