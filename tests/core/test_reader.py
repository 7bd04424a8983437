# SPDX-License-Identifier: Apache-2.0
"""Mapped files: exact bytes, writable memory, unchanged files, maps that outlive their owner."""

import gc
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pretrained.core import ggml, reader
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.prefetch import is_in_memory
from pretrained.core.reader import MappedFiles
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.core.torch_pickle import read_torch_checkpoint
from pretrained.errors import CheckpointError, FileError

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.array(7, np.int64),
}


@pytest.fixture
def infos(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return read_safetensors_header(tmp_path / "model.safetensors").tensors


@pytest.fixture(params=["mapped", "read"])
def way(request, monkeypatch):
    """Both ways to the bytes must give the same."""
    if request.param == "read":
        monkeypatch.setattr(reader, "_map", lambda opened, size: None)
    return request.param


def test_arrays_and_buffers(infos, way):
    with MappedFiles() as files:
        for key, expected in TENSORS.items():
            assert bytes(files.buffer(infos[key])) == expected.tobytes()
            array = files.array(infos[key])
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            np.testing.assert_array_equal(array, expected)


def test_memory_is_writable_and_the_file_never_changes(infos, way):
    file = infos["a"].file
    before = file.read_bytes()
    with MappedFiles() as files:
        array = files.array(infos["a"])
        array += 1
        tensor = torch.frombuffer(files.buffer(infos["a"]), dtype=torch.float32)
        tensor.mul_(2)
    assert file.read_bytes() == before


def test_a_read_only_file_can_be_mapped(infos):
    os.chmod(infos["a"].file, 0o444)
    with MappedFiles() as files:
        files.array(infos["a"])[0, 0] = 9


def test_views_of_one_file_share_one_map(infos):
    with MappedFiles() as files:
        one, two = files.array(infos["a"]), files.array(infos["a"])
        assert np.shares_memory(one, two)


def test_arrays_outlive_the_reader_and_the_file(infos):
    with MappedFiles() as files:
        array = files.array(infos["a"])
        tensor = torch.frombuffer(files.buffer(infos["b"]), dtype=torch.bfloat16)
    del files
    infos["a"].file.unlink()
    gc.collect()
    np.testing.assert_array_equal(array, TENSORS["a"])
    assert tensor.tolist() == [0, 1, 2, 3, 4]


def test_maps_are_undone_when_nothing_refers_to_them(infos):
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(infos["a"].file))

    files = MappedFiles()
    array = files.array(infos["a"])
    assert maps() == 1
    del files
    gc.collect()
    assert maps() == 1
    del array
    gc.collect()
    assert maps() == 0


def test_strided_views(tmp_path, way):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"columns": base[:, 2:4], "transposed": base.t(), "expanded": base[:, :1].expand(4, 3)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = read_torch_checkpoint(tmp_path / "pytorch_model.bin")
    with MappedFiles() as files:
        for key, expected in state.items():
            np.testing.assert_array_equal(files.array(checkpoint.tensors[key]), expected.numpy())


def test_misaligned_spans(tmp_path, way):
    file = tmp_path / "raw"
    for dtype in (np.float32, np.int64, ml_dtypes.bfloat16):
        values = np.arange(50).astype(dtype)
        file.write_bytes(b"xyz" + values.tobytes())
        info = TensorInfo("w", values.dtype.name, (50,), file, 3, values.nbytes)
        with MappedFiles() as files:
            array = files.array(info)
            np.testing.assert_array_equal(array, values)
            np.testing.assert_array_equal(array.astype(np.float32), values.astype(np.float32))


def test_block_types_are_decoded(tmp_path, way):
    raw = np.random.default_rng(0).integers(0, 256, 2 * 34, dtype=np.uint8)
    raw[[0, 34]], raw[[1, 35]] = 0, 60  # the scales: float16 1.0
    file = tmp_path / "raw"
    file.write_bytes(b"x" + raw.tobytes())
    info = TensorInfo("w", "q8_0", (2, 32), file, 1, raw.nbytes)
    with MappedFiles() as files:
        np.testing.assert_array_equal(files.array(info), ggml.dequantize(raw, "q8_0", (2, 32)))


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    file = tmp_path / "sparse"
    size = 2**42
    try:
        with open(file, "wb") as opened:
            opened.truncate(size)
    except OSError:
        pytest.skip("this file system has no sparse files of 4 TiB")
    with open(file, "rb") as opened:
        assert reader._map(opened, size) is not None
    with MappedFiles() as files:
        assert files.array(TensorInfo("w", "uint8", (1,), file, size - 1, 1)).tolist() == [0]


def test_a_file_that_shrank_before_it_was_mapped(infos, way):
    os.truncate(infos["a"].file, 100)
    with pytest.raises(
        CheckpointError, match=r"became shorter.*'a' is cut off.*expected at least \d+ bytes, found 100"
    ):
        MappedFiles().buffer(infos["a"])


def test_a_span_past_a_map(infos, way):
    files = MappedFiles()
    files.buffer(infos["a"])
    beyond = TensorInfo("x", "uint8", (10**6,), infos["a"].file, 0, 10**6)
    with pytest.raises(CheckpointError, match="'x' is cut off"):
        files.buffer(beyond)


def test_a_file_that_is_gone(infos):
    infos["a"].file.unlink()
    with pytest.raises(FileError, match="does not exist"):
        MappedFiles().array(infos["a"])


def test_a_file_system_that_cannot_map_is_read(infos, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(19, "No such device")

    monkeypatch.setattr(reader.mmap, "mmap", refuse)
    monkeypatch.setattr(reader, "_map_without_descriptor", refuse)
    np.testing.assert_array_equal(MappedFiles().array(infos["a"]), TENSORS["a"])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_map_holds_no_descriptor(infos):
    def held() -> list[str]:
        return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]

    with MappedFiles() as files:
        array = files.array(infos["a"])
        assert str(infos["a"].file) not in held()
    np.testing.assert_array_equal(array, TENSORS["a"])


def test_without_the_c_library_a_map_is_python_s_own(infos, monkeypatch):
    def absent() -> None:
        raise AttributeError("mmap")

    monkeypatch.setattr(reader, "_c_library", absent)
    np.testing.assert_array_equal(MappedFiles().array(infos["a"]), TENSORS["a"])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_released_pages_leave_memory_and_can_be_read_again(tmp_path, way):
    values = np.arange(1 << 20, dtype=np.int64)
    save_file({"a": values, "b": values + 1}, tmp_path / "model.safetensors")
    infos = read_safetensors_header(tmp_path / "model.safetensors").tensors

    def resident_kb() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        total = 0
        for line in lines:
            if line.endswith(str(tmp_path / "model.safetensors")):
                total += int(next(entry for entry in lines if entry.startswith("Rss:")).split()[1])
        return total

    with MappedFiles() as files:
        files.release(infos["a"])  # nothing is mapped yet
        a, b = files.array(infos["a"]), files.array(infos["b"])
        assert int(a.sum() + b.sum()) == 2 * int(values.sum()) + len(values)
        before = resident_kb()
        files.release(infos["a"])
        if way == "mapped":
            assert before > 16000
            assert resident_kb() < before - 8000
        files.release(infos["b"], 0, 100)
        np.testing.assert_array_equal(a, values)
        np.testing.assert_array_equal(b, values + 1)


@pytest.mark.parametrize("populates", [True, False])
def test_a_part_of_a_file_comes_into_the_page_cache(
    populates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(5 << 20))
    if not populates:
        monkeypatch.setattr(reader, "_POPULATE_READ", 12345)
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if is_in_memory(descriptor, 3 << 20, 1 << 20):
            pytest.skip("this file system keeps its pages")
        reader.read_into_cache(descriptor, (3 << 20) + 5, (1 << 20) + 7)
        assert is_in_memory(descriptor, (3 << 20) + 5, (1 << 20) + 7)
        # Past its end there is nothing to bring, and nothing to fail on.
        reader.read_into_cache(descriptor, 4 << 20, 9 << 20)
    finally:
        os.close(descriptor)
