# SPDX-License-Identifier: Apache-2.0
"""From floats to GGML's types: the way back of `pretrained.core.ggml`, for the types that conversions write.

A block's scale is found from its 32 numbers in float32 and stored as float16; the integers are rounded with
the scale before that rounding, as in GGML's reference (quantize_row_*_ref in ggml-quants.c of
https://github.com/ggml-org/ggml), to which results are bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pretrained.core.ggml import block_nbytes
from pretrained.errors import WeightsError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK: Final = 32
# Blocks that are handled at a time: a MiB of float32.
_CHUNK: Final = 1 << 13

_Q8_0: Final = np.dtype([("d", "<f2"), ("qs", "i1", (32,))])
_Q4_0: Final = np.dtype([("d", "<f2"), ("qs", "u1", (16,))])
_Q4_1: Final = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))])


def quantize_blocks(array: npt.NDArray[Any], dtype: str, *, key: str) -> Bytes:
    """Return an array as blocks of GGML.

    Args:
        array: Floats; the last axis is a multiple of 32.
        dtype: ``"q8_0"``, ``"q4_0"`` or ``"q4_1"``.
        key: The tensor's name, for the error.

    Returns:
        The blocks' bytes, row by row, one axis.

    Raises:
        ArgumentError: a row is no whole number of blocks.
        WeightsError: NaN, infinities or numbers beyond a float16 scale are among the values.
    """
    nbytes = block_nbytes(dtype, array.shape)
    layout, encode = _ENCODERS[dtype]
    rows = np.ascontiguousarray(array).reshape(-1, BLOCK)
    blocks = np.empty(nbytes // layout.itemsize, layout)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for start in range(0, len(rows), _CHUNK):
            piece = rows[start : start + _CHUNK].astype(np.float32, copy=False)
            encode(piece, blocks[start : start + _CHUNK])
    if not all(np.isfinite(blocks[name]).all() for name in blocks.dtype.names or () if name != "qs"):
        raise WeightsError(
            f"{key!r} cannot be quantized: it holds NaN, infinities or numbers beyond a float16 scale",
            where=key,
            mend="Check the checkpoint with: pretrained doctor --values",
        )
    return blocks.view(np.uint8).reshape(-1)


def _inverse(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _encode_q8_0(x: Floats, out: npt.NDArray[np.void]) -> None:
    # The largest magnitude becomes 127; halves are rounded away from zero.
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    whole += np.floor(np.float32(2) * (size - whole))
    out["d"] = scale[:, 0]
    out["qs"] = np.copysign(whole, scaled)


def _encode_q4_0(x: Floats, out: npt.NDArray[np.void]) -> None:
    # The number of the largest magnitude becomes -8, so the scale has the opposite of its sign.
    at = np.abs(x).argmax(axis=1)[:, None]
    scale = np.take_along_axis(x, at, axis=1) / np.float32(-8)
    out["d"] = scale[:, 0]
    out["qs"] = _nibbles(x * _inverse(scale) + np.float32(8.5))


def _encode_q4_1(x: Floats, out: npt.NDArray[np.void]) -> None:
    # The smallest number becomes 0 and the largest 15.
    least = x.min(axis=1, keepdims=True)
    scale = (x.max(axis=1, keepdims=True) - least) / np.float32(15)
    out["d"], out["m"] = scale[:, 0], least[:, 0]
    out["qs"] = _nibbles((x - least) * _inverse(scale) + np.float32(0.5))


def _nibbles(values: Floats) -> Bytes:
    """Cut numbers to 0..15 and pack them: the first half of a block lies in the low bits."""
    integers = np.clip(np.trunc(values), 0, 15).astype(np.uint8)
    packed: Bytes = integers[:, :16] | (integers[:, 16:] << np.uint8(4))
    return packed


_ENCODERS: Final[dict[str, tuple[np.dtype[np.void], Callable[[Floats, npt.NDArray[np.void]], None]]]] = {
    "q8_0": (_Q8_0, _encode_q8_0),
    "q4_0": (_Q4_0, _encode_q4_0),
    "q4_1": (_Q4_1, _encode_q4_1),
}
WRITABLE: Final = ("float32", "float16", "bfloat16", *_ENCODERS)
"""Types of tensors that conversions to GGUF write."""
