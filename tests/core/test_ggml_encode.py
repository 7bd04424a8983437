# SPDX-License-Identifier: Apache-2.0
"""Quantizing to GGML's blocks: bit-equal to the gguf package."""

import gguf
import numpy as np
import pytest

from pretrained.core.ggml import dequantize
from pretrained.core.ggml_encode import quantize_blocks
from pretrained.errors import ArgumentError, WeightsError

KINDS = ["q8_0", "q4_0", "q4_1"]


def reference(array, kind):
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind.upper()]).reshape(-1)


def arrays():
    rng = np.random.default_rng(0)
    yield "normal", rng.standard_normal((64, 128), np.float32)
    yield "wide", (rng.standard_normal((64, 64)) * 10.0 ** rng.integers(-6, 4, (64, 64))).astype(np.float32)
    yield "zeros", np.zeros((2, 32), np.float32)
    yield "tiny", np.full((2, 32), 1e-30, np.float32)
    yield "halves", np.tile(np.arange(32, dtype=np.float32) / 2 - 8, (4, 1))
    yield "one sign", -np.abs(rng.standard_normal((8, 32), np.float32))
    yield "equal ends", np.tile(np.array([3, -3] * 16, np.float32), (2, 1))
    # More than one piece at a time.
    yield "many", rng.standard_normal((300, 1024), np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "array"), list(arrays()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_bit_equal_to_the_reference(kind, name, array):
    with np.errstate(all="ignore"):
        expected = reference(array, kind)
    np.testing.assert_array_equal(quantize_blocks(array, kind, key="w"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_counts_as_the_floats_it_stands_for(kind):
    half = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float16)
    np.testing.assert_array_equal(
        quantize_blocks(half, kind, key="w"), quantize_blocks(half.astype(np.float32), kind, key="w")
    )
    assert np.abs(dequantize(quantize_blocks(half, kind, key="w"), kind, half.shape) - half).max() < 0.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e8 * 127])
def test_what_cannot_be_quantized(kind, bad):
    array = np.ones((2, 32), np.float32)
    array[1, 3] = bad
    with pytest.raises(WeightsError, match="'w' cannot be quantized: it holds NaN, infinities"):
        quantize_blocks(array, kind, key="w")


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(ArgumentError, match="a multiple of 32"):
        quantize_blocks(np.ones((2, 33), np.float32), "q8_0", key="w")
