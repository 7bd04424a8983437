# SPDX-License-Identifier: Apache-2.0
"""The PyTorch file reader against torch.save's own files and against forged containers."""

import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.torch_pickle import read_torch_checkpoint
from pretrained.errors import CheckpointError, FileError

ZIP, LEGACY = True, False


def save(value: object, folder: Path, zipped: bool) -> Path:
    file = folder / "pytorch_model.bin"
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file


def load(info: TensorInfo) -> np.ndarray:
    raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
    assert len(raw) == info.nbytes
    dtype = DTYPES[info.dtype].numpy
    strides = None if info.strides is None else [stride * dtype.itemsize for stride in info.strides]
    return np.ndarray(info.shape, dtype, raw, strides=strides)


def assert_same(info: TensorInfo, tensor: torch.Tensor) -> None:
    assert "torch." + info.dtype == str(tensor.dtype)
    assert info.shape == tuple(tensor.shape)
    width = torch.uint8 if tensor.numel() else tensor.dtype
    expected = tensor.detach().contiguous().view(-1).view(width).numpy() if tensor.numel() else None
    if expected is not None:
        assert load(info).tobytes() == expected.tobytes()


DTYPE_NAMES = [name for name in DTYPES if hasattr(torch, name)]


@pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_every_dtype(tmp_path, name, zipped):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
    checkpoint = read_torch_checkpoint(save({"w": tensor}, tmp_path, zipped))
    assert_same(checkpoint.tensors["w"], tensor)
    assert checkpoint.tensors["w"].strides is None


@pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_views_parameters_and_plain_values(tmp_path, zipped):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "base": base,
        "same": base,
        "rows": base[1:3],
        "columns": base[:, 2:4],
        "transposed": base.t(),
        "expanded": base[:, :1].expand(4, 5),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "single_row": base[:1, :],
        "steps": 12,
        "name": "x",
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "nothing": None,
        "list": [1, {"a": 2.5}],
    }
    checkpoint = read_torch_checkpoint(save(state, tmp_path, zipped))
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    assert list(checkpoint.tensors) == list(tensors)
    for key, tensor in tensors.items():
        assert_same(checkpoint.tensors[key], tensor)
    infos = checkpoint.tensors
    assert infos["same"].offset == infos["base"].offset
    assert infos["rows"].offset == infos["base"].offset + 24
    assert infos["rows"].strides is None
    assert infos["single_row"].strides is None
    assert infos["columns"].strides == (6, 1)
    assert infos["columns"].nbytes == (3 * 6 + 2) * 4
    assert infos["transposed"].strides == (1, 6)
    assert infos["expanded"].strides == (6, 0)
    assert infos["empty"].nbytes == 0
    assert (checkpoint.format, checkpoint.framework) == ("pytorch", "pt")
    others = ("steps", "name", "size", "dtype", "device", "nothing", "list")
    assert checkpoint.metadata["non_tensors"] == others


@pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_module_state_dict(tmp_path, zipped, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = tmp_path / "m.bin"
    torch.save(module.state_dict(), file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    checkpoint = read_torch_checkpoint(file)
    assert checkpoint.metadata == {}
    for key, tensor in module.state_dict().items():
        assert_same(checkpoint.tensors[key], tensor)


@pytest.mark.parametrize("under", ["state_dict", "model", "model_state_dict"])
def test_a_nested_state_dict(tmp_path, under):
    state = {"epoch": 3, under: {"w": torch.ones(2), "n": 1}, "optimizer": {"state": {0: torch.ones(5)}}}
    checkpoint = read_torch_checkpoint(save(state, tmp_path, LEGACY))
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.metadata["non_tensors"] == ("epoch", "optimizer", "n")


def test_an_empty_state_dict(tmp_path):
    assert not read_torch_checkpoint(save({}, tmp_path, ZIP)).tensors


NOT_STATE_DICTS = {
    "tensor": (torch.ones(2), "found a StoredTensor"),
    "list": ([torch.ones(2)], "found a list"),
    "no tensors": ({"lr": 0.1}, "found a dict with the keys \\['lr'\\]"),
    "two": ({"model": {"w": torch.ones(1)}, "state_dict": {"w": torch.ones(1)}}, "one under each of"),
    "deep": ({"w": torch.ones(1), "sub": {"x": [torch.ones(1)]}}, "tensors inside a dict at 'sub'"),
    "number": ({3: torch.ones(1)}, "a tensor under the key 3"),
}


@pytest.mark.parametrize("name", NOT_STATE_DICTS)
def test_values_that_are_no_state_dict(tmp_path, name):
    value, message = NOT_STATE_DICTS[name]
    with pytest.raises(CheckpointError, match="does not hold a state dict.*" + message):
        read_torch_checkpoint(save(value, tmp_path, ZIP))


def test_a_dtype_that_is_not_read_is_named_with_its_key(tmp_path):
    with pytest.raises(CheckpointError, match="'w' is stored as complex128"):
        read_torch_checkpoint(save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path, ZIP))


@pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_is_executed(tmp_path, monkeypatch, zipped, protocol):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch owned",)

    monkeypatch.chdir(tmp_path)
    torch.save(
        {"w": torch.ones(2), "evil": Evil()},
        "evil.bin",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    modules = set(sys.modules)
    with pytest.raises(
        CheckpointError, match=r"asks for the global 'posix.system'.*Nothing.*executed.*safetensors"
    ):
        read_torch_checkpoint(Path("evil.bin"))
    assert set(sys.modules) == modules
    assert os.listdir() == ["evil.bin"]


def test_sparse_and_quantized_tensors_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="_rebuild_sparse_tensor"):
        read_torch_checkpoint(save({"w": torch.eye(2).to_sparse()}, tmp_path, ZIP))


# Forged containers


def entries_of(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(file: Path, entries: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


@pytest.fixture
def good(tmp_path) -> Path:
    return save({"w": torch.arange(6.0)}, tmp_path, ZIP)


def test_a_rewritten_archive_is_still_read(good):
    rezip(good, entries_of(good))
    assert_same(read_torch_checkpoint(good).tensors["w"], torch.arange(6.0))


FORGERIES = {
    "compressed": (lambda e: e, "is compressed, which torch never does"),
    "no pickle": (lambda e: {"pytorch_model/version": b"3"}, "expected one entry <name>/data.pkl, found 0"),
    "two pickles": (lambda e: e | {"x/data.pkl": b"N."}, "found 2 in"),
    "torchscript": (lambda e: e | {"pytorch_model/constants.pkl": b"N."}, "a TorchScript program"),
    "big-endian": (
        lambda e: e | {"pytorch_model/byteorder": b"big"},
        "byte order.*expected little, found big",
    ),
    "dots": (lambda e: e | {"pytorch_model/../x": b""}, "forbidden name"),
    "absolute": (lambda e: e | {"/etc/passwd": b""}, "forbidden name"),
    "backslash": (lambda e: e | {"pytorch_model\\x": b""}, "forbidden name"),
    "no storage": (lambda e: without(e, "pytorch_model/data/0"), "storage '0' of tensor 'w' is not in it"),
    "short storage": (lambda e: e | {"pytorch_model/data/0": bytes(23)}, "expected 24 bytes, found 23 bytes"),
    "bad pickle": (lambda e: e | {"pytorch_model/data.pkl": b"\x80\x02}"}, "pickle.*cannot be right"),
}


def without(entries: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {key: value for key, value in entries.items() if key != name}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_archives(good, name):
    change, message = FORGERIES[name]
    compression = zipfile.ZIP_DEFLATED if name == "compressed" else zipfile.ZIP_STORED
    rezip(good, change(entries_of(good)), compression=compression)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_checkpoint(good)
    assert str(good) in str(caught.value)


def test_duplicate_entries(good):
    entries = entries_of(good)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(good, "a") as archive:
        archive.writestr("pytorch_model/data/0", entries["pytorch_model/data/0"])
    with pytest.raises(CheckpointError, match="two entries 'pytorch_model/data/0'"):
        read_torch_checkpoint(good)


def patch_central(file: Path, name: bytes, field: int, layout: str, value: int) -> None:
    """Overwrite one field of an entry in the table of contents, `field` bytes from its signature."""
    data = bytearray(file.read_bytes())
    start = data.rindex(name) - 46
    assert data[start : start + 4] == b"PK\x01\x02"
    struct.pack_into(layout, data, start + field, value)
    file.write_bytes(data)


CENTRAL = {
    "encrypted": ((8, "<H", 1), "is encrypted"),
    "elsewhere": ((42, "<I", 3), "is not where the contents say"),
    "sizes differ": ((24, "<I", 10), "is compressed"),
}


@pytest.mark.parametrize("name", CENTRAL)
def test_lies_in_the_table_of_contents(good, name):
    rezip(good, entries_of(good))
    change, message = CENTRAL[name]
    patch_central(good, b"pytorch_model/data/0", *change)
    with pytest.raises(CheckpointError, match=message):
        read_torch_checkpoint(good)


def test_an_entry_past_the_end_of_the_file(good):
    rezip(good, entries_of(good))
    patch_central(good, b"pytorch_model/data/0", 20, "<I", 10**6)
    patch_central(good, b"pytorch_model/data/0", 24, "<I", 10**6)
    with pytest.raises(CheckpointError, match=r"'pytorch_model/data/0'.*past its end"):
        read_torch_checkpoint(good)


def test_overlapping_storages(tmp_path):
    file = rezip(
        tmp_path / "x.bin", entries_of(save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path, ZIP))
    )
    data = file.read_bytes()
    start = struct.unpack_from("<I", data, data.rindex(b"pytorch_model/data/0") - 4)[0]
    patch_central(file, b"pytorch_model/data/1", 42, "<I", start)
    with pytest.raises(CheckpointError, match="overlaps another"):
        read_torch_checkpoint(file)


def test_a_zip_bomb_of_a_pickle_is_not_read(good, monkeypatch):
    monkeypatch.setattr("pretrained.core.torch_pickle.MAX_PICKLE_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"its pickle has \d+ bytes"):
        read_torch_checkpoint(good)


def pickled_tensor(count: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """A state dict of one tensor with any claims."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 2)

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {})

    pickler.persistent_id = lambda value: (
        ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None
    )
    pickler.dump({"w": Tensor()})
    return stream.getvalue()


CLAIMS = {
    "offset": (
        (6, 1, (6,), (1,)),
        "'w' goes past the end of its storage.*expected at least 28 bytes, found 24",
    ),
    "shape": ((6, 0, (7,), (1,)), "past the end of its storage"),
    "stride": ((6, 0, (2, 3), (4, 1)), "past the end of its storage"),
    "huge stride": ((6, 0, (2,), (2**62,)), "past the end of its storage"),
    "count": ((7, 0, (6,), (1,)), "Storage '0' of tensor 'w' is too short.*expected 28 bytes, found 24"),
    "huge count": ((2**62, 0, (6,), (1,)), "is too short"),
    "shape from nothing": ((6, 0, (2**40, 2**40), (0, 0)), "'w' claims the shape"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_tensors_that_do_not_fit_their_storage(good, name):
    claim, message = CLAIMS[name]
    rezip(good, entries_of(good) | {"pytorch_model/data.pkl": pickled_tensor(*claim)})
    with pytest.raises(CheckpointError, match=message):
        read_torch_checkpoint(good)


def legacy(*pickles: bytes) -> bytes:
    return b"".join(pickles)


MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
PROTOCOL = pickle.dumps(1001, 2)
MACHINE = pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)
OBJECT = pickled_tensor(6, 0, (2, 3), (3, 1))
KEYS = pickle.dumps(["0"], 2)
DATA = (6).to_bytes(8, "little") + bytes(24)
OTHER_MACHINE = pickle.dumps({"little_endian": False}, 2)
STREAMS = {
    "magic": ([pickle.dumps(2**79 - 1, 2)], "not a PyTorch weights file"),
    "protocol": ([MAGIC, pickle.dumps(1002, 2)], "protocol 1002 is unknown"),
    "byte order": ([MAGIC, PROTOCOL, OTHER_MACHINE], "another byte order.*found big"),
    "keys": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, pickle.dumps([3], 2)],
        "list of storages is not a list of strings",
    ),
    "unknown key": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, pickle.dumps(["1"], 2)],
        "no tensor tells the element size",
    ),
    "listed twice": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, pickle.dumps(["0", "0"], 2), DATA, DATA],
        "listed twice",
    ),
    "no keys": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, pickle.dumps([], 2)],
        "storage '0' of tensor 'w' is not in it",
    ),
    "no data": ([MAGIC, PROTOCOL, MACHINE, OBJECT, KEYS], "past its end"),
    "truncated data": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, KEYS, DATA[:-1]],
        "past its end.*at least \\d+ bytes",
    ),
    "fewer than claimed": (
        [MAGIC, PROTOCOL, MACHINE, OBJECT, KEYS, (5).to_bytes(8, "little"), bytes(24)],
        "is too short",
    ),
    "negative": ([MAGIC, PROTOCOL, MACHINE, OBJECT, KEYS, b"\xff" * 8, bytes(24)], "past its end"),
    "truncated": ([MAGIC, PROTOCOL, MACHINE[:-5]], "goes on past its end"),
}


def test_a_stream_made_by_hand_is_read(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(legacy(MAGIC, PROTOCOL, MACHINE, OBJECT, KEYS, DATA))
    info = read_torch_checkpoint(file).tensors["w"]
    assert (info.shape, info.nbytes, info.offset + 24) == ((2, 3), 24, file.stat().st_size)


@pytest.mark.parametrize("name", STREAMS)
def test_forged_streams(tmp_path, name):
    parts, message = STREAMS[name]
    file = tmp_path / "a.bin"
    file.write_bytes(legacy(*parts))
    with pytest.raises(CheckpointError, match=message):
        read_torch_checkpoint(file)


@pytest.mark.parametrize("zipped", [ZIP, LEGACY], ids=["zip", "legacy"])
def test_truncation_anywhere_is_an_error(tmp_path, zipped):
    file = save({"w": torch.arange(20.0), "b": torch.ones(3)}, tmp_path, zipped)
    data = file.read_bytes()
    for size in {*range(0, len(data), 37), len(data) - 1}:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=str(file)):
            read_torch_checkpoint(file)


def test_other_files(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    with pytest.raises(FileError, match="does not exist"):
        read_torch_checkpoint(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"expected what torch.save writes, found a Git LFS pointer"):
        read_torch_checkpoint(file)
    file.write_bytes(pickle.dumps({"a": 1}, 4))
    with pytest.raises(CheckpointError, match="found a Python pickle"):
        read_torch_checkpoint(file)


def check_mutation(folder: Path, zipped: bool, position: int, replacement: bytes) -> None:
    """Whatever the bytes are, the reader either refuses or returns spans that lie in the file."""
    file = save({"w": torch.arange(6.0), "t": torch.ones(2, 3).t()}, folder, zipped)
    good = file.read_bytes()
    position %= len(good)
    file.write_bytes(good[:position] + replacement + good[position + len(replacement) :])
    size = file.stat().st_size
    try:
        checkpoint = read_torch_checkpoint(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        return
    for info in checkpoint.tensors.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= size


MUTATION = given(st.booleans(), st.integers(0, 3000), st.binary(min_size=1, max_size=6))
QUIET = [HealthCheck.function_scoped_fixture]


@MUTATION
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET, derandomize=True)
def test_mutated_files(tmp_path, zipped, position, replacement):
    check_mutation(tmp_path, zipped, position, replacement)


@pytest.mark.long
@MUTATION
@settings(max_examples=20_000, deadline=None, suppress_health_check=QUIET)
def test_many_mutated_files(tmp_path, zipped, position, replacement):
    check_mutation(tmp_path, zipped, position, replacement)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_out_of_proportion_to_the_file(tmp_path, zipped):
    file = save({"w": torch.ones(1).expand(10**9)}, tmp_path, zipped)
    with pytest.raises(CheckpointError, match="its tensors claim 4000000000 bytes of a file of"):
        read_torch_checkpoint(file)
