# SPDX-License-Identifier: Apache-2.0
"""Which files are the weights, and what happens when an index, a shard or a link lies."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pretrained.core.files import MAX_INDEX_BYTES, WeightsFiles, find_weights, open_checkpoint, read_index
from pretrained.core.reader import MappedFiles
from pretrained.errors import ArgumentError, CheckpointError, FileError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(file: Path, *keys: str, fill: float = 0, metadata: dict | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.full(2, fill, np.float32) for key in keys}, file, metadata or {"format": "pt"})
    return file


def index(folder: Path, weight_map: object, name: str = INDEX, **more: object) -> Path:
    file = folder / name
    file.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map} | more))
    return file


def sharded(folder: Path) -> Path:
    shard(folder / A, "a")
    shard(folder / B, "b")
    return index(folder, {"a": A, "b": B})


NAMES = [
    "model.safetensors",
    INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]


def make(folder: Path, name: str) -> None:
    """Write the weights that a name stands for: one file, or an index with one shard."""
    if name.endswith(".json"):
        end = "safetensors" if "safetensors" in name else "bin"
        stem = name.split(".", maxsplit=1)[0] + (".fp16" if ".fp16." in name else "")
        target = folder / f"{stem}-00001-of-00001.{end}"
        index(folder, {"w": target.name}, name)
    else:
        target = folder / name
    if target.suffix == ".bin":
        torch.save({"w": torch.ones(2)}, target)
    else:
        shard(target, "w")


def found(folder: Path, **wishes) -> str:
    weights = find_weights(folder, **wishes)
    return (weights.index or weights.files[0]).name


def with_variant(name: str) -> str:
    stem, _, end = name.rpartition(".")
    return f"{stem}.fp16.{end}"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_search_order(tmp_path, variant):
    names = [name if variant is None else with_variant(name) for name in NAMES]
    for name in NAMES:  # the plain ones are there as well; a variant must not find them
        make(tmp_path, name)
    if variant is not None:
        for name in names:
            make(tmp_path, name)
    for position, name in enumerate(names):
        assert found(tmp_path, variant=variant) == name
        assert list(open_checkpoint(find_weights(tmp_path, variant=variant)).tensors) == ["w"]
        assert found(tmp_path, variant=variant, use_safetensors=False) == names[max(position, 2)]
        if position < 2:
            assert found(tmp_path, variant=variant, use_safetensors=True) == name
        (tmp_path / name).unlink()


def test_the_formats(tmp_path):
    for name, kind in zip(NAMES, ["safetensors", "safetensors", "pytorch", "pytorch"], strict=True):
        make(tmp_path, name)
        checkpoint = open_checkpoint(tmp_path / name)
        assert find_weights(tmp_path, use_safetensors=kind == "safetensors").format == kind
        assert (checkpoint.format, checkpoint.framework) == (kind, "pt")


def test_one_file_wins_over_an_index_and_says_so(tmp_path, caplog):
    sharded(tmp_path)
    shard(tmp_path / "model.safetensors", "a", "b", fill=1)
    with caplog.at_level(logging.WARNING):
        weights = find_weights(tmp_path)
    assert weights == WeightsFiles(
        "safetensors", (tmp_path / "model.safetensors",), passed_over=tmp_path / INDEX
    )
    assert f"holds both model.safetensors and {INDEX}; the first is loaded" in caplog.text


def test_shards_are_merged(tmp_path):
    sharded(tmp_path)
    shard(tmp_path / B, "b", "extra", fill=2, metadata={"format": "pt", "note": "x"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b", "extra"]
    assert checkpoint.files == (tmp_path / A, tmp_path / B)
    assert checkpoint.framework == "pt"
    assert checkpoint.metadata == {"format": "pt", "note": "x", "index": {"total_size": 16}}
    with MappedFiles() as files:
        assert files.array(checkpoint.tensors["b"]).tolist() == [2, 2]


def test_pytorch_shards_join_their_plain_values(tmp_path):
    torch.save({"a": torch.ones(1), "n": 1}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(1), "m": 1}, tmp_path / "two.bin")
    index(tmp_path, {"a": "one.bin", "b": "two.bin"}, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.metadata["non_tensors"] == ("n", "m")


def test_an_index_needs_no_metadata(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": A, "b": B}}))
    assert open_checkpoint(tmp_path).metadata["index"] == {}


@pytest.mark.parametrize("name", ["weights.safetensors", "w.bin", "w.pt", "w.pth", "blob1", "blob2"])
def test_single_files_of_any_name(tmp_path, name):
    file = tmp_path / name
    if name in ("weights.safetensors", "blob1"):
        shard(file, "w")
    else:
        torch.save({"w": torch.ones(2)}, file)
    assert list(open_checkpoint(file).tensors) == ["w"]


def test_gguf_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "sub" / "model.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("w", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(file).format == "gguf"
    for folder, name in ((file.parent, "model.gguf"), (tmp_path, "sub/model.gguf")):
        weights = find_weights(folder, gguf_file=name)
        assert weights == WeightsFiles("gguf", (file,))
        assert list(open_checkpoint(weights).tensors) == ["w"]
    file.rename(tmp_path / "blob")
    assert open_checkpoint(tmp_path / "blob").format == "gguf"


HINTS = {
    "nothing": ([], {}, "expected model.safetensors or .* or pytorch_model.bin.index.json, found no files"),
    "other files": (["config.json", "x.txt"], {}, r"found config.json, x.txt"),
    "variant needed": (["model.fp16.safetensors"], {}, r"found model.fp16.safetensors\. Pass variant='fp16'"),
    "variant in shards": (["model.fp16-00001-of-00002.safetensors"], {}, "Pass variant='fp16'"),
    "other variant": (["model.fp16.safetensors"], {"variant": "bf16"}, "Pass variant='fp16'"),
    "no variant": (["model.safetensors"], {"variant": "bf16"}, "Drop variant to use the plain names"),
    "safetensors only": (["pytorch_model.bin"], {"use_safetensors": True}, "Drop use_safetensors"),
    "bin only": (["model.safetensors"], {"use_safetensors": False}, "Drop use_safetensors"),
    "gguf": (["x-q4.gguf"], {}, "Pass gguf_file='x-q4.gguf'"),
    "other gguf": (
        ["x-q4.gguf"],
        {"gguf_file": "x-q5.gguf"},
        "no GGUF file 'x-q5.gguf'.*Did you mean 'x-q4.gguf'",
    ),
    "no gguf": (["model.safetensors"], {"gguf_file": "x.gguf"}, "found no GGUF file"),
    "tensorflow": (["tf_model.h5"], {}, "from_tf=True"),
    "flax": (["flax_model.msgpack"], {}, "from_flax=True"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], {}, "This is an adapter"),
    "many files": ([f"{n}.txt" for n in range(20)], {}, "and 12 more"),
}


@pytest.mark.parametrize("name", HINTS)
def test_nothing_found_says_what_helps(tmp_path, name):
    names, wishes, message = HINTS[name]
    for each in names:
        (tmp_path / each).touch()
    with pytest.raises(FileError, match=message) as caught:
        find_weights(tmp_path, **wishes)
    assert str(tmp_path) in str(caught.value)


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"The folder cannot be read.*No such file"):
        find_weights(tmp_path / "absent")
    with pytest.raises(FileError, match="The file does not exist"):
        open_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(FileError, match="The file does not exist"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(FileError, match="a link that leads nowhere"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileError, match=r"not a weights file.*expected safetensors, PyTorch or GGUF"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["../x.gguf", "/etc/passwd"])
def test_a_gguf_file_outside_the_folder(tmp_path, name):
    with pytest.raises(ArgumentError, match="must lie in the model's folder"):
        find_weights(tmp_path, gguf_file=name)


BAD_INDEXES = {
    "not json": (b"{", "weights index is not valid JSON"),
    "not an object": (b"[]", "weights index is not a JSON object"),
    "duplicate": (b'{"weight_map": {"a": "x", "a": "y"}}', "names 'a' twice"),
    "no map": (b"{}", 'malformed.*expected tensor names to file names under "weight_map", found None'),
    "empty map": (b'{"weight_map": {}}', "malformed"),
    "map of numbers": (b'{"weight_map": {"a": 1}}', "malformed"),
    "metadata": (b'{"metadata": [1], "weight_map": {"a": "x"}}', 'an object under "metadata"'),
    "parent": (
        b'{"weight_map": {"a": "../x.safetensors"}}',
        "file outside its folder.*found '../x.safetensors'",
    ),
    "absolute": (b'{"weight_map": {"a": "/x.safetensors"}}', "file outside its folder"),
    "subfolder": (b'{"weight_map": {"a": "y/x.safetensors"}}', "file outside its folder"),
    "windows": (b'{"weight_map": {"a": "y\\\\x.safetensors"}}', "file outside its folder"),
    "drive": (b'{"weight_map": {"a": "C:x.safetensors"}}', "file outside its folder"),
    "dots": (b'{"weight_map": {"a": ".."}}', "file outside its folder"),
    "nul": (b'{"weight_map": {"a": "x\\u0000.safetensors"}}', "file outside its folder"),
    "empty name": (b'{"weight_map": {"a": ""}}', "file outside its folder"),
    "mixed": (
        b'{"weight_map": {"a": "x.bin", "b": "x.safetensors"}}',
        "all end in .safetensors or all in .bin",
    ),
    "unknown": (
        b'{"weight_map": {"a": "tf_model-00001-of-00001.h5"}}',
        "all end in .safetensors or all in .bin",
    ),
    "missing": (
        b'{"weight_map": {"a": "x.safetensors"}}',
        "names the file 'x.safetensors', which does not exist",
    ),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_bad_indexes(tmp_path, name):
    content, message = BAD_INDEXES[name]
    (tmp_path / INDEX).write_bytes(content)
    for path in (tmp_path, tmp_path / INDEX):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(path)
        assert INDEX in str(caught.value)


def test_an_index_that_is_too_long(tmp_path):
    with open(tmp_path / INDEX, "wb") as opened:
        opened.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"at most {MAX_INDEX_BYTES} bytes"):
        read_index(tmp_path / INDEX)


def test_a_tensor_that_is_not_in_its_file(tmp_path):
    sharded(tmp_path)
    index(tmp_path, {"a": A, "b": B, "c": B, "d": B})
    message = r"tensor 'c' is in 'model-00002.*not there \(and 1 more\).*found the tensor in no file"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
    index(tmp_path, {"a": B, "b": A})
    with pytest.raises(CheckpointError, match=f"'a' is in '{B}'.*expected {B}, found {A}"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_in_two_files(tmp_path):
    sharded(tmp_path)
    shard(tmp_path / B, "a", "b")
    with pytest.raises(CheckpointError, match=f"Tensor 'a' is in two files.*{A}, .*{B}"):
        open_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"truncated.*{B}"):
        open_checkpoint(tmp_path)


def test_shards_of_two_frameworks(tmp_path):
    sharded(tmp_path)
    shard(tmp_path / B, "b", metadata={"format": "flax"})
    with pytest.raises(CheckpointError, match="expected one framework, found flax, pt"):
        open_checkpoint(tmp_path)


def test_links_within_the_folder_and_out_of_it(tmp_path):
    folder, outside = tmp_path / "model", shard(tmp_path / "secret.safetensors", "b")
    sharded(folder.mkdir() or folder)
    (folder / B).rename(folder / "real.safetensors")
    (folder / B).symlink_to("real.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["a", "b"]
    (folder / B).unlink()
    (folder / B).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"names the file '{B}', a link that leads out of the folder"):
        open_checkpoint(folder)
    (folder / B).unlink()
    (folder / B).symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"names the file '{B}', which is a link that leads nowhere"):
        open_checkpoint(folder)


def hub_cache(folder: Path, repository: str) -> Path:
    """A snapshot as huggingface_hub lays it out: links to blobs named by their hash."""
    blobs = folder / repository / "blobs"
    snapshot = folder / repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    shard(blobs / "aaa", "a")
    shard(blobs / "bbb", "b")
    index(blobs, {"a": A, "b": B}, "ccc")
    for name, blob in ((A, "aaa"), (B, "bbb"), (INDEX, "ccc")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_the_links_of_the_hub_cache(tmp_path):
    snapshot = hub_cache(tmp_path, "models--org--one")
    other = hub_cache(tmp_path, "models--org--two")
    assert list(open_checkpoint(snapshot).tensors) == ["a", "b"]
    assert list(open_checkpoint(snapshot / INDEX).tensors) == ["a", "b"]
    link = tmp_path / "shortcut"
    link.symlink_to(snapshot)
    assert list(open_checkpoint(link).tensors) == ["a", "b"]
    (snapshot / B).unlink()
    (snapshot / B).symlink_to(other.parent.parent / "blobs" / "bbb")
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        open_checkpoint(snapshot)
