# SPDX-License-Identifier: Apache-2.0
"""The one table of dtypes: names, sizes, numpy views and the spellings that files use."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pretrained.errors import ArgumentError, did_you_mean


@dataclass(frozen=True, slots=True)
class DType:
    """A plain element type.

    Attributes:
        name: Canonical name, the one config.json uses (``"bfloat16"``).
        itemsize: Bytes an element takes.
        safetensors: Spelling in a safetensors header (``"BF16"``).
        numpy: The numpy dtype with the same bits (``ml_dtypes`` where numpy has none).
        is_floating: Whether model weights may be stored in it.
    """

    name: str
    itemsize: int
    safetensors: str
    numpy: np.dtype
    is_floating: bool

    @property
    def is_loadable(self) -> bool:
        """Whether models compute in it; 8-bit floats only store."""
        return self.is_floating and self.itemsize >= 2


def _row(name: str, safetensors: str, numpy_type: object, is_floating: bool) -> DType:
    numpy_dtype: np.dtype = np.dtype(numpy_type)  # type: ignore[call-overload]
    return DType(name, numpy_dtype.itemsize, safetensors, numpy_dtype, is_floating)


# Spellings: https://github.com/huggingface/safetensors, `Dtype` in safetensors/src/tensor.rs.
DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _row("float64", "F64", np.float64, True),
        _row("float32", "F32", np.float32, True),
        _row("float16", "F16", np.float16, True),
        _row("bfloat16", "BF16", ml_dtypes.bfloat16, True),
        _row("float8_e4m3fn", "F8_E4M3", ml_dtypes.float8_e4m3fn, True),
        _row("float8_e5m2", "F8_E5M2", ml_dtypes.float8_e5m2, True),
        _row("int64", "I64", np.int64, False),
        _row("int32", "I32", np.int32, False),
        _row("int16", "I16", np.int16, False),
        _row("int8", "I8", np.int8, False),
        _row("uint64", "U64", np.uint64, False),
        _row("uint32", "U32", np.uint32, False),
        _row("uint16", "U16", np.uint16, False),
        _row("uint8", "U8", np.uint8, False),
        _row("bool", "BOOL", np.bool_, False),
        _row("complex64", "C64", np.complex64, False),
    )
}
BY_SAFETENSORS_NAME: dict[str, DType] = {dtype.safetensors: dtype for dtype in DTYPES.values()}

_ALIASES = {
    "fp64": "float64", "double": "float64",
    "fp32": "float32", "float": "float32", "f32": "float32",
    "fp16": "float16", "half": "float16", "f16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2",
}  # fmt: skip


def dtype_name(spelling: str) -> str:
    """Return the canonical name of a dtype.

    Args:
        spelling: Any usual spelling: ``"bfloat16"``, ``"bf16"``, ``"torch.bfloat16"``, ``"BF16"``.

    Raises:
        ArgumentError: the spelling is unknown.
    """
    bare = spelling.removeprefix("torch.").removeprefix("jnp.").removeprefix("tf.")
    lower = bare.lower()
    name = _ALIASES.get(lower, lower)
    if name in DTYPES:
        return name
    if bare in BY_SAFETENSORS_NAME:
        return BY_SAFETENSORS_NAME[bare].name
    known = [*DTYPES, *_ALIASES, "auto"]
    raise ArgumentError(
        f"Unknown dtype {spelling!r}",
        where="dtype",
        expected="a floating dtype such as 'float32', 'bfloat16', 'float16', or 'auto'",
        mend=did_you_mean(lower, known),
    )


def floating_dtype_name(spelling: str) -> str:
    """Return the canonical name of a dtype that weights can be loaded as.

    Args:
        spelling: As for `dtype_name`.

    Raises:
        ArgumentError: the dtype is unknown or not a floating one.
    """
    name = dtype_name(spelling)
    if not DTYPES[name].is_loadable:
        raise ArgumentError(
            f"Weights cannot be loaded as {name}",
            where="dtype",
            expected="a floating dtype of 16 bits or more",
            found=name,
            mend="To store weights in 8 or 4 bits pass quantization_config instead of dtype.",
        )
    return name
