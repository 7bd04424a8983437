# SPDX-License-Identifier: Apache-2.0
"""The safetensors header reader against the reference package and against files that lie."""

import json
import os
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pretrained.core.dtypes import DTYPES
from pretrained.core.safetensors_file import MAX_HEADER_BYTES, read_safetensors_header
from pretrained.errors import CheckpointError, FileError


def entry(dtype="F32", shape=(2,), span=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def write(folder: Path, header: object, data: bytes = bytes(8), *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def test_it_agrees_with_the_safetensors_package(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 7), np.float16),
        "scalar": np.array(3, np.int64),
        "flags": np.array([True, False, True]),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt", "note": "ü"})
    checkpoint = read_safetensors_header(file)
    assert checkpoint.format == "safetensors"
    assert checkpoint.framework == "pt"
    assert checkpoint.metadata == {"format": "pt", "note": "ü"}
    assert checkpoint.files == (file,)
    assert checkpoint.nbytes == sum(array.nbytes for array in tensors.values())
    data = file.read_bytes()
    assert set(checkpoint.tensors) == set(tensors)
    for key, array in load_file(file).items():
        info = checkpoint.tensors[key]
        assert (info.shape, info.dtype, info.nbytes) == (array.shape, array.dtype.name, array.nbytes)
        assert data[info.offset : info.offset + info.nbytes] == array.tobytes()
    offsets = [info.offset for info in checkpoint.tensors.values()]
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_every_dtype_of_the_table(tmp_path, dtype):
    header = {"a": entry(dtype.safetensors, (3,), (0, 3 * dtype.itemsize))}
    info = read_safetensors_header(write(tmp_path, header, bytes(3 * dtype.itemsize))).tensors["a"]
    assert (info.dtype, info.nbytes) == (dtype.name, 3 * dtype.itemsize)


def test_no_metadata_means_no_framework_and_an_unknown_tag_is_kept(tmp_path):
    assert read_safetensors_header(write(tmp_path, {"a": entry()})).framework is None
    odd = {"__metadata__": {"format": "np"}, "a": entry()}
    assert read_safetensors_header(write(tmp_path, odd)).framework == "np"


def test_a_file_without_tensors_is_valid(tmp_path):
    assert not read_safetensors_header(write(tmp_path, {}, b"")).tensors


def test_header_padding_is_allowed(tmp_path):
    raw = json.dumps({"a": entry()}).encode() + b" " * 5
    assert list(read_safetensors_header(write(tmp_path, raw)).tensors) == ["a"]


CASES = {
    "no file": (None, "does not exist"),
    "empty": (b"", "expected at least 8 bytes, found 0 bytes"),
    "seven bytes": (bytes(7), "expected at least 8 bytes, found 7 bytes"),
    "header longer than the file": (
        (100).to_bytes(8, "little") + b"{}",
        "expected at least 108 bytes, found 10",
    ),
    "huge header": ((2**62).to_bytes(8, "little") + b"{}", "lies about the length of its header"),
    "zip": (b"PK\x03\x04" + bytes(60), "a zip archive, as torch.save writes"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML or XML page"),
    "gguf": (b"GGUF" + bytes(60), "a GGUF file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_is_something_else(tmp_path, name):
    content, message = CASES[name]
    file = tmp_path / "model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((CheckpointError, FileError), match=message) as caught:
        read_safetensors_header(file)
    assert str(file) in str(caught.value)


def test_folders_and_pipes_are_refused(tmp_path):
    with pytest.raises(FileError, match="expected a file, found a folder"):
        read_safetensors_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="neither a file nor a folder"):
        read_safetensors_header(tmp_path / "pipe")


def test_an_unreadable_path_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="cannot be opened"):
        read_safetensors_header(tmp_path / ("x" * 300))


NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
LIES = {
    "not utf-8": (b'{"a": "\xff"}', "is not UTF-8 text"),
    "not json": (b'{"a": }', "is not valid JSON"),
    "long int": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "nan": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "'a' a wrong shape"),
    "nested": (NESTED, "nested too deep"),
    "duplicate": (b'{"a": 1, "a": 2}', "names 'a' twice"),
    "entry type": ({"a": 3}, "'a' a wrong entry.*expected dtype, shape and data_offsets, found 3"),
    "entry keys": ({"a": {"dtype": "F32", "shape": [2]}}, "wrong entry.*found \\['dtype', 'shape'\\]"),
    "extra key": ({"a": entry() | {"x": 1}}, "wrong entry"),
    "dtype": ({"a": entry("F33")}, "'a' a wrong dtype.*expected one of F64, .*found 'F33'"),
    "dtype type": ({"a": entry(3)}, "wrong dtype"),
    "dtype not read": (
        {"a": entry("F8_E8M0", (8,))},
        "'a' is stored as F8_E8M0, which this library does not read",
    ),
    "shape type": ({"a": entry(shape=()) | {"shape": 2}}, "wrong shape.*found 2"),
    "shape bool": ({"a": entry(shape=(True, 2))}, "wrong shape"),
    "too many dims": ({"a": entry(shape=(1,) * 65)}, "at most 64 whole numbers"),
    "negative dim": ({"a": entry(shape=(-2,))}, "wrong shape.*found \\[-2\\]"),
    "huge dim": ({"a": entry(shape=(2**64,))}, "wrong shape"),
    "overflowing shape": ({"a": entry(shape=(2**62, 2**62))}, "wrong byte span"),
    "span type": ({"a": entry(span=(0, 8.0))}, "wrong byte span"),
    "span length": ({"a": entry(span=(0, 4, 8))}, "wrong byte span"),
    "span reversed": ({"a": entry(span=(8, 0))}, "begin <= end, found \\[8, 0\\]"),
    "span negative": ({"a": entry(span=(-8, 0))}, "wrong byte span"),
    "span against shape": ({"a": entry(span=(0, 4))}, "expected 8 bytes for F32 \\[2\\], found 4 bytes"),
    "overlap": ({"a": entry(), "b": entry(shape=(1,), span=(4, 8))}, "'b' and of 'a' overlap"),
    "same span": ({"a": entry(), "b": entry()}, "overlap"),
    "hole": (
        {"a": entry(shape=(1,), span=(0, 4)), "b": entry(shape=(0,), span=(8, 8))},
        "'b' and of 'a' leave a hole",
    ),
    "hole at start": ({"a": entry(shape=(1,), span=(4, 8))}, "'a' and of the header leave a hole"),
    "past the end": (
        {"a": entry(shape=(4,), span=(0, 16))},
        "is truncated.*expected \\d+ bytes, found \\d+ bytes",
    ),
    "bytes left over": ({"a": entry(shape=(1,), span=(0, 4))}, "bytes after its last tensor"),
    "metadata type": ({"__metadata__": [], "a": entry()}, "__metadata__ is malformed"),
    "metadata values": ({"__metadata__": {"x": 1}, "a": entry()}, "expected an object of strings"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies(tmp_path, name):
    header, message = LIES[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(write(tmp_path, header))
    assert "model.safetensors" in str(caught.value)


def test_a_header_that_is_not_an_object(tmp_path):
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_safetensors_header(write(tmp_path, b"[1, 2]"))
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_safetensors_header(write(tmp_path, b"", b""))


def test_the_longest_header_is_bounded(tmp_path):
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES} bytes"):
        read_safetensors_header(write(tmp_path, {}, length=MAX_HEADER_BYTES + 1))


def test_truncation_says_both_sizes(tmp_path):
    file = write(tmp_path, {"a": entry(shape=(100,), span=(0, 400))}, bytes(400))
    whole = file.stat().st_size
    os.truncate(file, whole - 1)
    with pytest.raises(CheckpointError, match=f"truncated.*expected {whole} bytes, found {whole - 1} bytes"):
        read_safetensors_header(file)


def test_a_thousand_tensors_take_milliseconds(tmp_path):
    save_file(
        {f"layers.{i}.weight": np.zeros((4, 4), np.float32) for i in range(1000)}, tmp_path / "m.safetensors"
    )
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        read_safetensors_header(tmp_path / "m.safetensors")
        best = min(best, time.perf_counter() - start)
    # About 4 ms here; the bound is loose because test machines are shared.
    assert best < 0.05


def check_mutation(folder: Path, position: int, replacement: bytes) -> None:
    """Whatever the bytes are, the reader either refuses or returns spans that lie in the file."""
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", (2, 3), (0, 12)),
        "b": entry("F32", (1,), (12, 16)),
        "c": entry("I8", (0, 2), (16, 16)),
    }
    file = write(folder, header, bytes(16))
    good = file.read_bytes()
    position %= len(good) + 1
    file.write_bytes(good[:position] + replacement + good[position + len(replacement) :])
    size = file.stat().st_size
    try:
        checkpoint = read_safetensors_header(file)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)
        return
    for info in checkpoint.tensors.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= size
    assert sum(info.nbytes for info in checkpoint.tensors.values()) <= size


MUTATION = given(
    st.integers(0, 400), st.one_of(st.binary(max_size=9), st.sampled_from(b'0123456789[]{},:"-e'))
)
QUIET = [HealthCheck.function_scoped_fixture]


@MUTATION
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_mutated_files(tmp_path, position, replacement):
    check_mutation(
        tmp_path, position, replacement if isinstance(replacement, bytes) else bytes([replacement])
    )


@pytest.mark.long
@MUTATION
@settings(max_examples=20_000, deadline=None, suppress_health_check=QUIET)
def test_many_mutated_files(tmp_path, position, replacement):
    check_mutation(
        tmp_path, position, replacement if isinstance(replacement, bytes) else bytes([replacement])
    )
