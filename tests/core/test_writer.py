# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: valid files, bounded memory, and old or new at every instant."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pretrained.core.dtypes import DTYPES
from pretrained.core.files import open_checkpoint
from pretrained.core.reader import MappedFiles
from pretrained.core.writer import (
    ShardPlan,
    parse_size,
    plan_shards,
    write_checkpoint,
    write_text_atomically,
)
from pretrained.errors import ArgumentError, CheckpointError, FileError


class Array:
    """A source over an array, which counts its reads."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = array.dtype.name
        self.shape = array.shape
        self.reads = 0

    def read(self) -> bytes:
        self.reads += 1
        return self.array.tobytes()


def sources(count: int = 6, fill: float = 0) -> dict[str, Array]:
    """Tensors of 40 bytes."""
    return {f"layers.{i}.weight": Array(np.full(10, i + fill, np.float32)) for i in range(count)}


def save(folder: Path, tensors: dict[str, Array], size: int | str, variant: str | None = None) -> ShardPlan:
    plan = plan_shards({key: t.array.nbytes for key, t in tensors.items()}, size, variant=variant)
    write_checkpoint(folder, plan, tensors, variant=variant)
    return plan


def values(folder: Path) -> dict[str, float]:
    """What a reader of the folder finds: the first number of each tensor."""
    with MappedFiles() as files:
        return {key: float(files.array(info)[0]) for key, info in open_checkpoint(folder).tensors.items()}


def expected(tensors: dict[str, Array]) -> dict[str, float]:
    return {key: float(tensor.array[0]) for key, tensor in tensors.items()}


# Sizes and plans


@pytest.mark.parametrize(
    ("size", "expected_bytes"),
    [
        (1, 1), ("1", 1), ("12B", 12), ("5KB", 5000), ("200MB", 2 * 10**8), ("5GB", 5 * 10**9),
        ("1TB", 10**12),
        ("1KiB", 1024), ("3MiB", 3 * 2**20), ("5GiB", 5 * 2**30), ("1TiB", 2**40), ("5gb", 5 * 10**9),
        (" 5 GB ", 5 * 10**9), ("1.5GB", 15 * 10**8), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes(size, expected_bytes):
    assert parse_size(size) == expected_bytes


@pytest.mark.parametrize(
    "size", ["", "GB", "5XB", "-5GB", "five", "1e9", "5GB!", 0, -1, "0GB", "0.1", 1.5, None, True]
)
def test_sizes_that_are_none(size):
    with pytest.raises(ArgumentError, match=r'not a size.*"5GB".*found ' + ("None" if size is None else "")):
        parse_size(size)


def test_one_file_when_everything_fits():
    plan = plan_shards({"b": 4, "a": 6}, 10)
    assert plan == ShardPlan({"model.safetensors": ("b", "a")}, None, "model", None, 10)
    assert plan_shards({}, 10).files == {"model.safetensors": ()}
    assert plan_shards({"a": 99}, 10).files == {"model.safetensors": ("a",)}


def test_shards_are_filled_in_order_and_a_large_tensor_gets_its_own():
    plan = plan_shards({"a": 4, "b": 6, "c": 25, "d": 5, "e": 5, "f": 1}, "10B")
    assert plan.files == {
        "model-00001-of-00004.safetensors": ("a", "b"),
        "model-00002-of-00004.safetensors": ("c",),
        "model-00003-of-00004.safetensors": ("d", "e"),
        "model-00004-of-00004.safetensors": ("f",),
    }
    assert plan.index == "model.safetensors.index.json"


def test_names_with_a_variant_and_another_stem():
    one = plan_shards({"a": 4}, 10, variant="fp16", file_stem="adapter_model")
    assert list(one.files) == ["adapter_model.fp16.safetensors"]
    two = plan_shards({"a": 6, "b": 6}, 10, variant="fp16")
    assert list(two.files) == [
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
    ]
    assert two.index == "model.safetensors.index.fp16.json"


@pytest.mark.parametrize("variant", ["", "../x", "a/b", "a b"])
def test_a_variant_that_cannot_be_in_a_name(variant):
    with pytest.raises(ArgumentError, match="variant cannot be part of a file name"):
        plan_shards({"a": 1}, 1, variant=variant)


# Files


def test_the_safetensors_package_reads_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, (3, 5)).astype(dtype.numpy) for name, dtype in DTYPES.items()}
    arrays |= {"scalar": np.array(3.0), "empty": np.zeros((0, 2), np.float16), "ü": np.ones(1, np.int8)}
    save(tmp_path, {key: Array(array) for key, array in arrays.items()}, "1GB")
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(arrays)
        for key, array in arrays.items():
            tensor = opened.get_tensor(key)
            assert str(tensor.dtype) == f"torch.{array.dtype.name}"
            assert tensor.tolist() == array.astype(complex if "complex" in key else float).tolist()


def test_tensors_are_aligned_and_bytes_are_reproducible(tmp_path):
    arrays = {
        "z": np.ones(3, np.int8),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "a": np.ones(3, ml_dtypes.bfloat16),
        "w": np.ones(3, np.float64),
        "f": np.ones(3, np.float32),
    }
    save(tmp_path, {key: Array(array) for key, array in arrays.items()}, "1GB")
    first = (tmp_path / "model.safetensors").read_bytes()
    save(tmp_path, {key: Array(arrays[key]) for key in reversed(arrays)}, "1GB")
    assert (tmp_path / "model.safetensors").read_bytes() == first
    infos = open_checkpoint(tmp_path).tensors
    assert list(infos) == ["w", "f", "a", "b", "z"]
    assert all(info.offset % DTYPES[info.dtype].itemsize == 0 for info in infos.values())
    assert int.from_bytes(first[:8], "little") % 8 == 0


def test_metadata_can_be_chosen(tmp_path):
    tensors = sources(1)
    plan = plan_shards({key: 40 for key in tensors}, 100)
    write_checkpoint(tmp_path, plan, tensors, {"format": "flax", "note": "x"})
    assert open_checkpoint(tmp_path).metadata == {"format": "flax", "note": "x"}
    write_checkpoint(tmp_path, plan, tensors, {})
    assert open_checkpoint(tmp_path).framework is None


def test_shards_and_their_index(tmp_path):
    tensors = sources(5)
    plan = save(tmp_path, tensors, 80)
    assert sorted(os.listdir(tmp_path)) == sorted([*plan.files, plan.index])
    index = json.loads((tmp_path / plan.index).read_text())
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert index["weight_map"] == {key: name for name, keys in plan.files.items() for key in keys}
    for name, keys in plan.files.items():
        assert set(load_file(tmp_path / name)) == set(keys)
    assert values(tmp_path) == expected(tensors)
    assert [tensor.reads for tensor in tensors.values()] == [1] * 5


def test_one_tensor_is_held_at_a_time(tmp_path):
    script = f"""
import resource, sys, numpy as np
sys.path[:0] = {sys.path!r}
from pathlib import Path
from pretrained.core.writer import plan_shards, write_checkpoint
class Zeros:
    dtype, shape = "uint8", (2**24,)
    def read(self):
        return bytes(2**24)
tensors = {{f"w{{i}}": Zeros() for i in range(12)}}
plan = plan_shards({{key: 2**24 for key in tensors}}, "60MB")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_checkpoint(Path(sys.argv[1]), plan, tensors)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 2.5 * 2**14  # KiB: two tensors and a half of twelve


# From one checkpoint to the next

SIZES = {"one file": "1GB", "two files": 120, "three files": 80}


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_a_save_replaces_the_old_one_and_leaves_nothing_of_it(tmp_path, old, new):
    others = ["config.json", "pytorch_model.bin", "model.fp16.safetensors", "adapter_model.safetensors"]
    others += [
        "model-00001-of-00002.txt",
        "mymodel-00001-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    ]
    for name in others:
        (tmp_path / name).touch()
    save(tmp_path, sources(fill=0), SIZES[old])
    tensors = sources(fill=100)
    plan = save(tmp_path, tensors, SIZES[new])
    names = set(plan.files) | ({plan.index} if plan.index else set())
    assert set(os.listdir(tmp_path)) == names | set(others)
    assert values(tmp_path) == expected(tensors)


def test_variants_live_beside_each_other(tmp_path):
    plain = save(tmp_path, sources(fill=0), 80)
    half = save(tmp_path, sources(fill=50), 80, "fp16")
    save(tmp_path, sources(fill=100), "1GB", "fp16")
    assert set(os.listdir(tmp_path)) == {*plain.files, plain.index, "model.fp16.safetensors"}
    assert half.index not in os.listdir(tmp_path)


def test_models_that_still_map_the_old_file_keep_it(tmp_path):
    save(tmp_path, sources(fill=0), "1GB")
    with MappedFiles() as files:
        key, info = next(iter(open_checkpoint(tmp_path).tensors.items()))
        array = files.array(info)
        save(tmp_path, sources(fill=100), "1GB")
        assert array[0] == 0
    assert values(tmp_path)[key] == 100


class Killed(BaseException):
    """Stands for SIGKILL: no handler may undo anything after it."""


STEPS = ["replace", "link", "unlink"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_a_reader_finds_old_or_new_after_a_kill_at_any_step(tmp_path, monkeypatch, old, new, links):
    """Stop before and after each rename, link and removal; then look, then save again over the remains."""
    before, after, again = sources(fill=0), sources(fill=100), sources(fill=200)
    mixes = not links and old == new and old != "one file"  # documented: no hard links, the same shard names
    real = {name: getattr(os, name) for name in STEPS}
    seen = set()
    for stop in range(100):
        folder = tmp_path / str(stop)
        folder.mkdir()
        save(folder, before, SIZES[old])
        done = 0

        def step(name, *args, stop=stop, **kwargs):
            nonlocal done
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            if done >= stop:
                raise Killed
            done += 1
            return real[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, lambda *args, _name=name, **kwargs: step(_name, *args, **kwargs))
            try:
                save(folder, after, SIZES[new])
                finished = True
            except Killed:
                finished = False
        if not mixes:
            found = values(folder)
            assert found in (expected(before), expected(after)), f"after {done} steps"
            seen.add(found == expected(after))
        save(folder, again, SIZES[new])
        assert values(folder) == expected(again)
        assert not [name for name in os.listdir(folder) if name.startswith(".tmp-")]
        if finished:
            break
    assert finished
    assert done >= 1
    assert mixes or seen == {False, True}


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_the_old_one_is_intact_after_an_error_at_any_step(tmp_path, monkeypatch, old, new):
    """Errors, other than kills, are cleaned up after; the message says which checkpoint is there."""
    before, after = sources(fill=0), sources(fill=100)
    save(tmp_path, before, SIZES[old])
    listing = sorted(os.listdir(tmp_path))
    real = os.replace
    for stop in range(100):
        done = 0

        def replace(source, target, *, stop=stop):
            nonlocal done
            if done == stop:
                done += 1
                raise OSError(errno.EIO, "Input/output error")
            done += 1
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        try:
            save(tmp_path, after, SIZES[new])
        except FileError as error:
            if "what was there before is intact" in str(error):
                assert values(tmp_path) == expected(before)
                assert sorted(os.listdir(tmp_path)) == listing
            else:
                assert "The new checkpoint is in place" in str(error)
                assert values(tmp_path) == expected(after)
                monkeypatch.setattr(os, "replace", real)
                save(tmp_path, before, SIZES[old])
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", real)
    assert stop > 0
    assert values(tmp_path) == expected(after)


# What can go wrong


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on file sizes makes the system itself refuse the write."""
    before = sources(fill=0)
    save(tmp_path, before, "1GB")
    listing = os.listdir(tmp_path)
    large = {"w": Array(np.zeros(10**6, np.uint8))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 10**5, hard))
    try:
        with pytest.raises(
            FileError, match=r"Writing failed; what was there before is intact.*max_shard_size"
        ):
            save(tmp_path, large, "1GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == listing
    assert values(tmp_path) == expected(before)


class Failing(Array):
    def __init__(self, error: BaseException) -> None:
        super().__init__(np.zeros(10, np.float32))
        self.error = error

    def read(self) -> bytes:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), FileError, "The disk is full: free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), FileError, "quota is used up"),
        (OSError(errno.EROFS, "Read-only file system"), FileError, "read-only: save elsewhere"),
        (OSError(errno.EACCES, "Permission denied"), FileError, "Get write permission"),
        (OSError("odd"), FileError, "Check the disk"),
        (CheckpointError("The source is cut off"), CheckpointError, "The source is cut off"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full", "quota", "read-only", "permission", "odd", "own", "interrupt"],
)
@pytest.mark.parametrize("size", SIZES.values())
def test_an_error_in_the_middle_leaves_the_old_checkpoint(tmp_path, size, error, kind, message):
    before = sources(fill=0)
    save(tmp_path, before, size)
    listing = sorted(os.listdir(tmp_path))
    with pytest.raises(kind, match=message) as caught:
        save(tmp_path, sources(5, fill=100) | {"z": Failing(error)}, size)
    if kind is FileError:
        assert str(tmp_path) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == listing
    assert values(tmp_path) == expected(before)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileError, match="Make the folder first"):
        save(tmp_path / "absent", sources(), "1GB")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="A part of the path is a file"):
        save(tmp_path / "file", sources(), "1GB")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileError, match="A folder has the name of a file"):
        save(tmp_path, sources(), "1GB")
    assert sorted(os.listdir(tmp_path)) == ["file", "model.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match="Get write permission"):
        save(tmp_path, sources(), "1GB")


def test_tensors_that_do_not_fit_the_plan(tmp_path):
    tensors = sources(2)
    plan = plan_shards({"layers.0.weight": 40, "other": 40}, "1GB")
    with pytest.raises(ArgumentError, match=r"same keys: 2 differ \(layers.1.weight, other\)"):
        write_checkpoint(tmp_path, plan, tensors)
    plan = plan_shards({key: 40 for key in tensors}, "1GB", variant="fp16")
    with pytest.raises(ArgumentError, match=r"plan was made for other file names.*expected 'model', 'fp16'"):
        write_checkpoint(tmp_path, plan, tensors)
    tensors["layers.0.weight"].dtype = "q4_0"
    with pytest.raises(ArgumentError, match=r"'layers.0.weight' has a dtype that safetensors.*found 'q4_0'"):
        save(tmp_path, tensors, "1GB")
    tensors["layers.0.weight"].dtype = "float16"
    with pytest.raises(
        ArgumentError, match=r"do not fit its shape: expected 20 bytes for float16 \(10,\), found 40"
    ):
        save(tmp_path, tensors, "1GB")
    assert not os.listdir(tmp_path)


def test_text_is_replaced_whole(tmp_path):
    file = tmp_path / "config.json"
    write_text_atomically(file, "ü\r\n")
    assert file.read_bytes() == "ü\r\n".encode()
    write_text_atomically(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["config.json"]
    with pytest.raises(FileError, match="Make the folder first"):
        write_text_atomically(tmp_path / "absent" / "x", "y")


def test_a_text_that_cannot_be_written_leaves_the_old(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError, match="The disk is full"):
        write_text_atomically(file, "new")
    assert os.listdir(tmp_path) == ["config.json"]
    assert file.read_text() == "old"


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    blob, link = tmp_path / "blob", tmp_path / "model.safetensors"
    blob.write_text("shared")
    link.symlink_to(blob)
    save(tmp_path, sources(), "1GB")
    assert blob.read_text() == "shared"
    assert not link.is_symlink()


@pytest.mark.long
def test_real_kills_at_random_moments(tmp_path):
    """A process saves again and again in all shapes; wherever it dies, the folder holds one whole save."""
    script = f"""
import sys, numpy as np
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_writer import save, sources
for number in range(10**6):
    save(Path(sys.argv[1]), sources(fill=100 * number), ["1GB", 120, 120, 80, 80, "1GB"][number % 6])
"""
    save(tmp_path, sources(), 80)
    rng = np.random.default_rng()
    for _ in range(30):
        with subprocess.Popen([sys.executable, "-c", script, tmp_path]) as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5 + rng.random())
            process.kill()
        found = values(tmp_path)
        first = found["layers.0.weight"]
        assert found == expected(sources(fill=first))
