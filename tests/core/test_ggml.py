# SPDX-License-Identifier: Apache-2.0
"""GGML's block types: sizes and values against the gguf package, bit for bit."""

import gguf
import numpy as np
import pytest

from pretrained.core import ggml
from pretrained.core.ggml import BLOCK_TYPES, DEQUANTIZABLE, block_nbytes, dequantize, dequantize_many
from pretrained.core.gguf import load_tensor, read_gguf
from pretrained.errors import ArgumentError

_THEIR_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_THEIR_NAMES |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
WITH_REFERENCE = [name for name in DEQUANTIZABLE if name != "float64"]
# Types the reference can also write, and how many steps they divide the range of the weights into.
STEPS = {"q4_0": 15, "q4_1": 15, "q5_0": 31, "q5_1": 31, "q8_0": 255, "bfloat16": 256, "float16": 1024}


def their_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[_THEIR_NAMES.get(name, name.upper())]


def reference(raw: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, their_type(name))


def random_bytes(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, blocks * BLOCK_TYPES[name].nbytes), dtype=np.uint8)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_ids_and_sizes_are_ggmls(name):
    kind = BLOCK_TYPES[name]
    assert kind.type_id == their_type(name)
    assert (kind.elements, kind.nbytes) == gguf.GGML_QUANT_SIZES[their_type(name)]


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_random_bytes_decode_bit_equal_to_the_reference(name):
    # Random bytes meet every bit pattern, infinite and NaN scales among them.
    raw = random_bytes(name, 48, 24)
    shape = (48, 24 * BLOCK_TYPES[name].elements)
    assert_same_bits(dequantize(raw, name, shape), reference(raw, name))


@pytest.mark.parametrize("name", STEPS)
def test_quantized_weights_decode_bit_equal_and_near_the_original(name):
    weights = np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32)
    raw = gguf.quants.quantize(weights, their_type(name)).view(np.uint8)
    ours = dequantize(raw, name, weights.shape)
    assert_same_bits(ours, reference(raw, name))
    assert np.abs(ours - weights).max() <= np.ptp(weights) / STEPS[name]


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_pieces_do_not_change_the_result(name, monkeypatch):
    raw = random_bytes(name, 8, 24)
    shape = (8, 24 * BLOCK_TYPES[name].elements)
    whole = dequantize(raw, name, shape)
    monkeypatch.setattr(ggml, "_CHUNK", 512)
    assert_same_bits(dequantize(raw, name, shape), whole)


@pytest.mark.parametrize("name", DEQUANTIZABLE)
@pytest.mark.parametrize("threads", [1, 3])
def test_many_tensors_on_threads_give_what_one_gives(name, threads, monkeypatch):
    monkeypatch.setattr(ggml, "_JOB", 1024)
    raws = [random_bytes(name, rows, 12, seed=rows) for rows in (1, 7, 30)]
    outs = [np.empty((len(raw), 12 * BLOCK_TYPES[name].elements), np.float32) for raw in raws]
    dequantize_many([(raw, name, out) for raw, out in zip(raws, outs, strict=True)], threads=threads)
    for raw, out in zip(raws, outs, strict=True):
        assert_same_bits(out, dequantize(raw, name, out.shape))


def test_float64_rounds_to_float32():
    values = np.array([1.0, 1 / 3, -2e300])
    with np.errstate(over="ignore"):
        assert_same_bits(dequantize(values.tobytes(), "float64", (3,)), values.astype(np.float32))


def test_bytes_may_lie_anywhere():
    raw = random_bytes("q4_k", 1, 3)
    shifted = np.concatenate([np.zeros(1, np.uint8), raw[0]])[1:]
    assert_same_bits(dequantize(memoryview(shifted), "q4_k", (768,)), reference(raw, "q4_k")[0])


def test_out_is_written_and_returned():
    raw = random_bytes("q8_0", 4, 2)
    out = np.zeros((4, 64), np.float32)
    assert dequantize(raw, "q8_0", (4, 64), out=out) is out
    assert_same_bits(out, reference(raw, "q8_0"))


def test_scalars_and_many_axes():
    assert dequantize(np.float32(2.5).tobytes(), "float32", ()) == np.float32(2.5)
    raw = random_bytes("q4_0", 6, 1)
    assert_same_bits(dequantize(raw, "q4_0", (2, 3, 32)), reference(raw, "q4_0").reshape(2, 3, 32))


def test_a_type_without_decoder_is_refused_by_name():
    with pytest.raises(ArgumentError, match=r"'iq4_xs' cannot be turned into float32.*q4_k.*Q4_K_M or Q8_0"):
        dequantize(bytes(136), "iq4_xs", (256,))


def test_a_wrong_number_of_bytes_is_refused():
    with pytest.raises(
        ArgumentError, match=r"type q8_0 and shape \(64,\).*expected 68 bytes, found 67 bytes"
    ):
        dequantize(bytes(67), "q8_0", (64,))


def test_a_row_of_broken_blocks_is_refused():
    with pytest.raises(ArgumentError, match=r"q8_0 cannot have shape \(2, 48\).*multiple of 32, found 48"):
        block_nbytes("q8_0", (2, 48))


def test_an_unknown_type_is_refused_with_the_nearest_name():
    with pytest.raises(ArgumentError, match=r"Unknown GGML type 'q4_km'.*Did you mean 'q4_k'"):
        block_nbytes("q4_km", (256,))


@pytest.mark.parametrize(
    ("out", "found"),
    [
        (np.zeros((2, 32)), "a C-contiguous float64 array"),
        (np.zeros((1, 64), np.float32), r"shape \(1, 64\)"),
        (np.zeros((2, 64), np.float32)[:, ::2], "a strided float32 array"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(out, found):
    with pytest.raises(ArgumentError, match=rf"target array does not fit.*\(2, 32\), found .*{found}"):
        dequantize(bytes(68), "q8_0", (2, 32), out=out)


@pytest.mark.realweights
def test_every_tensor_of_a_real_file_decodes_bit_equal(smollm2_gguf):
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_gguf).tensors}
    ours = read_gguf(smollm2_gguf).tensors
    assert ours.keys() == theirs.keys()
    for key, info in ours.items():
        tensor = theirs[key]
        assert_same_bits(load_tensor(info), gguf.quants.dequantize(tensor.data, tensor.tensor_type))
