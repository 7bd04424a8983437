# SPDX-License-Identifier: Apache-2.0
"""GGML's block-quantized types: what each block holds, and how to turn it into float32.

A quantized tensor is a row of equal blocks; a block is a small C struct (ggml/src/ggml-common.h in
https://github.com/ggml-org/ggml) that carries its scales beside its packed integers. Each decoder here
is the formula of that struct, `weight = scale * integer (+ minimum)`, rounded to float32 after each
operation in GGML's own order, so results are bit-equal to its reference.

Tensors are decoded a cache-sized piece at a time straight into the caller's array. NumPy lets other
threads run meanwhile, so `dequantize_many` uses as many cores as it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pretrained.core.dtypes import DTYPES
from pretrained.errors import ArgumentError, did_you_mean

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Decoder: TypeAlias = Callable[[npt.NDArray[np.void], Floats], None]

# Elements decoded at a time: a MiB of float32 and its integers stay in cache, and each NumPy call is
# long enough (tens of microseconds) that threads do not queue for the interpreter lock.
_CHUNK = 1 << 18
# Elements a thread takes at a time, so that one large embedding does not leave the others idle.
_JOB = 1 << 22


@dataclass(frozen=True, slots=True)
class BlockType:
    """One GGML tensor type.

    Attributes:
        name: The `dtype` of a `TensorInfo`: a plain dtype's canonical name (``"float16"``) or, in lower
            case, GGML's own (``"q4_1"``).
        type_id: Its number in files (``enum ggml_type`` in ggml.h).
        elements: Numbers a block holds; 1 for plain types.
        nbytes: Bytes a block takes.
    """

    name: str
    type_id: int
    elements: int
    nbytes: int


# (name, type id, elements, bytes). Ids: enum ggml_type in ggml/include/ggml.h; sizes: ggml-common.h.
# Ids 4, 5, 31-33 and 36-38 were types that GGML has removed; q8_1 (9) exists only in memory.
BLOCK_TYPES: dict[str, BlockType] = {
    row[0]: BlockType(*row)
    for row in (
        ("float32", 0, 1, 4),
        ("float16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("q8_k", 15, 256, 292),
        ("iq2_xxs", 16, 256, 66),
        ("iq2_xs", 17, 256, 74),
        ("iq3_xxs", 18, 256, 98),
        ("iq1_s", 19, 256, 50),
        ("iq4_nl", 20, 32, 18),
        ("iq3_s", 21, 256, 110),
        ("iq2_s", 22, 256, 82),
        ("iq4_xs", 23, 256, 136),
        ("int8", 24, 1, 1),
        ("int16", 25, 1, 2),
        ("int32", 26, 1, 4),
        ("int64", 27, 1, 8),
        ("float64", 28, 1, 8),
        ("iq1_m", 29, 256, 56),
        ("bfloat16", 30, 1, 2),
        ("tq1_0", 34, 256, 54),
        ("tq2_0", 35, 256, 66),
        ("mxfp4", 39, 32, 17),
        ("nvfp4", 40, 64, 36),
        ("q1_0", 41, 128, 18),
    )
}
BY_TYPE_ID: dict[int, BlockType] = {kind.type_id: kind for kind in BLOCK_TYPES.values()}


def _struct(*fields: tuple[str, str, int]) -> np.dtype[np.void]:
    return np.dtype([(name, kind, (count,)) if count > 1 else (name, kind) for name, kind, count in fields])


def _unpack(packed: npt.NDArray[Any], bits: int, width: int) -> Bytes:
    """Return unsigned integers of 1, 2 or 4 bits as bytes.

    Args:
        packed: ``(n, size)`` bytes. Each run of `width` bytes holds ``8 // bits`` runs of `width`
            integers: the lowest bits of all its bytes come first, then the next ones, ...
        bits: Bits an integer takes.
        width: Length of a run.

    Returns:
        ``(n, size * 8 // bits)`` bytes.
    """
    count, size = packed.shape
    runs, parts = size // width, 8 // bits
    # Runs move as single items of `width` bytes, and arithmetic sees one long contiguous array: NumPy
    # would otherwise start an inner loop for each run.
    run = np.dtype((np.void, width))
    source = np.ascontiguousarray(packed)
    result = np.empty((count, runs, parts, width), np.uint8)
    slots = result.view(run)[..., 0]
    part = np.empty_like(source)
    for index in range(parts):
        np.right_shift(source, bits * index, out=part)
        if index < parts - 1:
            np.bitwise_and(part, (1 << bits) - 1, out=part)
        slots[:, :, index] = part.reshape(count, runs, width).view(run)[..., 0]
    return result.reshape(count, size * parts)


def _column(field: npt.NDArray[Any]) -> Floats:
    """Return a struct's float16 or integer field ``(n, ...)`` as float32 with one axis more, to broadcast."""
    return field.astype(np.float32)[..., None]


def _decode_q4_0(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # d * (q - 8)
    out[...] = _unpack(blocks["qs"], 4, 16).view(np.int8) - np.int8(8)
    np.multiply(_column(blocks["d"]), out, out=out)


def _decode_q4_1(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # d * q + m
    out[...] = _unpack(blocks["qs"], 4, 16)
    np.multiply(_column(blocks["d"]), out, out=out)
    np.add(out, _column(blocks["m"]), out=out)


def _five_bits(blocks: npt.NDArray[np.void]) -> Bytes:
    """Return a q5_0 or q5_1 block's integers: four bits lie in `qs`, the fifth is bit i of `qh`."""
    quants = _unpack(blocks["qs"], 4, 16)
    high = np.unpackbits(np.ascontiguousarray(blocks["qh"]), axis=-1, bitorder="little")
    quants |= high << np.uint8(4)
    return quants


def _decode_q5_0(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # d * (q - 16)
    out[...] = _five_bits(blocks).view(np.int8) - np.int8(16)
    np.multiply(_column(blocks["d"]), out, out=out)


def _decode_q5_1(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # d * q + m
    out[...] = _five_bits(blocks)
    np.multiply(_column(blocks["d"]), out, out=out)
    np.add(out, _column(blocks["m"]), out=out)


def _decode_q8_0(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # q * d
    out[...] = blocks["qs"]
    np.multiply(out, _column(blocks["d"]), out=out)


def _decode_q2_k(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # 16 groups of 16: (d * scale) * q - (dmin * minimum); a byte holds scale (low) and minimum (high).
    packed = blocks["scales"]
    scale = _column(blocks["d"]) * (packed & np.uint8(15)).astype(np.float32)
    minimum = _column(blocks["dmin"]) * (packed >> np.uint8(4)).astype(np.float32)
    out[...] = _unpack(blocks["qs"], 2, 32)
    groups = out.reshape(len(blocks), 16, 16)
    np.multiply(scale[..., None], groups, out=groups)
    np.subtract(groups, minimum[..., None], out=groups)


def _decode_q3_k(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # 16 groups of 16: (d * (scale - 32)) * q. q is two bits in `qs`, less 4 where its bit in `hmask` is 0.
    # A scale is six bits: four in the first 8 bytes (low halves, then high), two in the last 4.
    low = _unpack(blocks["scales"][:, :8], 4, 8)
    high = _unpack(blocks["scales"][:, 8:], 2, 4)
    centred = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    scale = _column(blocks["d"]) * centred.astype(np.float32)
    quants = _unpack(blocks["qs"], 2, 32)
    quants |= _unpack(blocks["hmask"], 1, 32) << np.uint8(2)
    out[...] = quants.view(np.int8) - np.int8(4)
    groups = out.reshape(len(blocks), 16, 16)
    np.multiply(scale[..., None], groups, out=groups)


def _scale_and_minimum(blocks: npt.NDArray[np.void]) -> tuple[Floats, Floats]:
    """Return ``d * scale`` and ``dmin * minimum`` of a q4_k or q5_k block's 8 groups, each ``(n, 8, 1)``.

    Twelve bytes hold 8 scales and 8 minima of six bits. Groups 0-3 lie whole in the low bits of bytes
    0-3 (scales) and 4-7 (minima); groups 4-7 have four bits in bytes 8-11 (low half: scale, high half:
    minimum) and their top two bits above those of groups 0-3.
    """
    packed = np.ascontiguousarray(blocks["scales"])
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six = np.uint8(63)
    top = np.uint8(48)
    upper_scales = (rest & np.uint8(15)) | ((scales >> np.uint8(2)) & top)
    upper_minima = (rest >> np.uint8(4)) | ((minima >> np.uint8(2)) & top)
    scale = np.concatenate([scales & six, upper_scales], axis=1).astype(np.float32)
    minimum = np.concatenate([minima & six, upper_minima], axis=1).astype(np.float32)
    return (_column(blocks["d"]) * scale)[..., None], (_column(blocks["dmin"]) * minimum)[..., None]


def _decode_q4_k(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # 8 groups of 32: (d * scale) * q - (dmin * minimum)
    scale, minimum = _scale_and_minimum(blocks)
    out[...] = _unpack(blocks["qs"], 4, 32)
    groups = out.reshape(len(blocks), 8, 32)
    np.multiply(scale, groups, out=groups)
    np.subtract(groups, minimum, out=groups)


def _decode_q5_k(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # As q4_k, with a fifth bit in `qh`.
    scale, minimum = _scale_and_minimum(blocks)
    quants = _unpack(blocks["qs"], 4, 32)
    quants |= _unpack(blocks["qh"], 1, 32) << np.uint8(4)
    out[...] = quants
    groups = out.reshape(len(blocks), 8, 32)
    np.multiply(scale, groups, out=groups)
    np.subtract(groups, minimum, out=groups)


def _decode_q6_k(blocks: npt.NDArray[np.void], out: Floats) -> None:
    # 16 groups of 16: (d * scale) * (q - 32); four bits of q in `ql`, two in `qh`.
    scale = _column(blocks["d"]) * blocks["scales"].astype(np.float32)
    quants = _unpack(blocks["ql"], 4, 64)
    quants |= _unpack(blocks["qh"], 2, 32) << np.uint8(4)
    out[...] = quants.view(np.int8) - np.int8(32)
    groups = out.reshape(len(blocks), 16, 16)
    np.multiply(scale[..., None], groups, out=groups)


# Field order is that of the structs block_q4_0 ... block_q6_K in ggml-common.h; all little endian.
_D, _M, _DMIN = ("d", "<f2", 1), ("m", "<f2", 1), ("dmin", "<f2", 1)
_DECODERS: dict[str, tuple[np.dtype[np.void], Decoder]] = {
    "q4_0": (_struct(_D, ("qs", "u1", 16)), _decode_q4_0),
    "q4_1": (_struct(_D, _M, ("qs", "u1", 16)), _decode_q4_1),
    "q5_0": (_struct(_D, ("qh", "u1", 4), ("qs", "u1", 16)), _decode_q5_0),
    "q5_1": (_struct(_D, _M, ("qh", "u1", 4), ("qs", "u1", 16)), _decode_q5_1),
    "q8_0": (_struct(_D, ("qs", "i1", 32)), _decode_q8_0),
    "q2_k": (_struct(("scales", "u1", 16), ("qs", "u1", 64), _D, _DMIN), _decode_q2_k),
    "q3_k": (_struct(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D), _decode_q3_k),
    "q4_k": (_struct(_D, _DMIN, ("scales", "u1", 12), ("qs", "u1", 128)), _decode_q4_k),
    "q5_k": (_struct(_D, _DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)), _decode_q5_k),
    "q6_k": (_struct(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D), _decode_q6_k),
}
_PLAIN = ("float32", "float16", "bfloat16", "float64")
DEQUANTIZABLE: tuple[str, ...] = (*_PLAIN, *_DECODERS)


def is_block_type(dtype: str) -> bool:
    """Whether `dtype` names a type that packs several numbers into a block (``"q4_1"``)."""
    kind = BLOCK_TYPES.get(dtype)
    return kind is not None and kind.elements > 1


def block_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes in a file.

    Args:
        dtype: A name of `BLOCK_TYPES`.
        shape: Logical shape; its last axis must be whole blocks.

    Raises:
        ArgumentError: the type is unknown, or a row is no whole number of blocks.
    """
    kind = BLOCK_TYPES.get(dtype)
    if kind is None:
        raise ArgumentError(
            f"Unknown GGML type {dtype!r}",
            where="dtype",
            expected="one of " + ", ".join(BLOCK_TYPES),
            mend=did_you_mean(dtype, BLOCK_TYPES) or None,
        )
    row = shape[-1] if shape else 1
    if row % kind.elements:
        raise ArgumentError(
            f"A tensor of type {dtype} cannot have shape {shape}",
            where="shape",
            expected=f"a last axis that is a multiple of {kind.elements}",
            found=row,
        )
    return prod(shape) // kind.elements * kind.nbytes


def dequantize(
    raw: Bytes | memoryview | bytes,
    dtype: str,
    shape: tuple[int, ...],
    *,
    out: Floats | None = None,
) -> Floats:
    """Return a tensor's values as float32, bit-equal to GGML's reference.

    Args:
        raw: The tensor's bytes as they lie in the file, contiguous; any alignment.
        dtype: A name in `DEQUANTIZABLE`: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float64"``,
            ``"q4_0"``, ``"q4_1"``, ``"q5_0"``, ``"q5_1"``, ``"q8_0"`` or ``"q2_k"`` to ``"q6_k"``.
        shape: Logical shape, row-major.
        out: Where to write: float32, C-contiguous, of that shape. None allocates it.

    Returns:
        `out`, or a new array of `shape`.

    Raises:
        ArgumentError: the type cannot be decoded, the bytes do not fit the shape, or `out` does not.
    """
    source, target = _checked(raw, dtype, shape, out)
    _decode(source, dtype, target.reshape(-1))
    return target


def dequantize_many(
    jobs: Iterable[tuple[Bytes | memoryview | bytes, str, Floats]],
    *,
    threads: int = 2,
) -> None:
    """Decode many tensors into arrays that exist, on several threads that are gone when it returns.

    Args:
        jobs: For each tensor its bytes, its type and its target: a float32 C-contiguous array whose
            shape is the tensor's.
        threads: How many to use; 1 runs in the caller's.

    Raises:
        ArgumentError: as `dequantize`, before anything is written.
    """
    pieces: list[tuple[Bytes, str, Floats]] = []
    for raw, dtype, out in jobs:
        source, target = _checked(raw, dtype, out.shape, out)
        kind = BLOCK_TYPES[dtype]
        flat = target.reshape(-1)
        for start in range(0, flat.size, _JOB):
            stop = min(start + _JOB, flat.size)
            first, last = (place // kind.elements * kind.nbytes for place in (start, stop))
            pieces.append((source[first:last], dtype, flat[start:stop]))
    if threads <= 1:
        for piece in pieces:
            _decode(*piece)
        return
    # Largest first, so that the threads end together.
    pieces.sort(key=lambda piece: -piece[2].size)
    with ThreadPoolExecutor(threads, thread_name_prefix="dequantize") as pool:
        for future in [pool.submit(_decode, *piece) for piece in pieces]:
            future.result()


def _checked(
    raw: Bytes | memoryview | bytes, dtype: str, shape: tuple[int, ...], out: Floats | None
) -> tuple[Bytes, Floats]:
    if dtype not in DEQUANTIZABLE:
        raise ArgumentError(
            f"Tensors of type {dtype!r} cannot be turned into float32 by this version",
            where="dtype",
            expected="one of " + ", ".join(DEQUANTIZABLE),
            mend="Take a file with another quantization, such as Q4_K_M or Q8_0.",
        )
    nbytes = block_nbytes(dtype, shape)
    source = np.frombuffer(raw, np.uint8)
    if source.size != nbytes:
        raise ArgumentError(
            f"The bytes do not make a tensor of type {dtype} and shape {shape}",
            where="raw",
            expected=f"{nbytes} bytes",
            found=f"{source.size} bytes",
        )
    if out is None:
        return source, np.empty(shape, np.float32)
    if out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        order = "C-contiguous" if out.flags.c_contiguous else "strided"
        raise ArgumentError(
            "The target array does not fit the tensor",
            where="out",
            expected=f"a C-contiguous float32 array of shape {shape}",
            found=f"a {order} {out.dtype} array of shape {out.shape}",
        )
    return source, out


def _decode(source: Bytes, dtype: str, flat: Floats) -> None:
    """Decode whole blocks into a 1-D target, piece by piece."""
    # A block whose scale is infinite or NaN yields NaN, as in the reference: data, not a fault here.
    with np.errstate(invalid="ignore", over="ignore"):
        if dtype in _PLAIN:
            np.copyto(flat, source.view(DTYPES[dtype].numpy), casting="same_kind")
            return
        kind = BLOCK_TYPES[dtype]
        layout, decoder = _DECODERS[dtype]
        blocks = source.view(layout)
        rows = flat.reshape(-1, kind.elements)
        step = _CHUNK // kind.elements
        for start in range(0, len(blocks), step):
            decoder(blocks[start : start + step], rows[start : start + step])
