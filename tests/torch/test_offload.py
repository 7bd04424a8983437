# SPDX-License-Identifier: Apache-2.0
"""Weights on disk: mapped spans, their release, converted copies, and files that change."""

import errno
import gc
import json
import mmap
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.plan import LoadStep
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.errors import CheckpointError, FileError, PlacementError
from pretrained.torch import offload, read_ahead
from pretrained.torch.offload import DiskWeights, is_mappable
from pretrained.torch.offload_folder import INDEX, transformed, written_from_memory
from pretrained.torch.tensors import mapped_reader

ROWS = 64 * 1024


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {name: torch.arange(ROWS, dtype=torch.float32) + at for at, name in enumerate("abc")}
    save_file(tensors, path)
    return path


def infos(path):
    return read_safetensors_header(path).tensors


def resident(tensor):
    """Bytes of a tensor's pages that are mapped into this process."""
    with open("/proc/self/pagemap", "rb") as pagemap:
        first, last = tensor.data_ptr() // mmap.PAGESIZE, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
        pagemap.seek(first * 8)
        entries = torch.frombuffer(bytearray(pagemap.read((last - first) * 8)), dtype=torch.int64)
    return int((entries < 0).sum()) * mmap.PAGESIZE


# -- spans ---------------------------------------------------------------------------------------


def test_a_released_weight_takes_no_memory_and_keeps_its_values(file):
    store = DiskWeights()
    weight = store.tensor(infos(file)["b"])
    assert weight.sum() > 0
    assert resident(weight) > weight.nbytes * 0.9
    store.span_of(weight).release()
    assert resident(weight) <= 64 * 1024
    assert torch.equal(weight, torch.arange(ROWS) + 1.0)


@pytest.mark.parametrize("system", ["that scans", "that is older"])
@pytest.mark.parametrize("edit", ["in place", "through data", "through numpy"])
def test_an_edit_is_never_lost(file, edit, system, monkeypatch):
    if system == "that is older":
        monkeypatch.setattr("pretrained.torch.offload._SCAN", 0xC06066FF)
    store = DiskWeights()
    parameter = nn.Parameter(store.tensor(infos(file)["b"]))
    with torch.no_grad():
        if edit == "in place":
            parameter[5000] = -1
        elif edit == "through data":
            parameter.data[5000] = -1
        else:
            parameter.detach().numpy()[5000] = -1
    span = store.span_of(parameter.data)
    span.release()
    assert parameter[5000] == -1
    assert span.is_edited
    assert infos(file) and torch.frombuffer(bytearray(file.read_bytes()[-4:]), dtype=torch.float32)[0] > 0


@pytest.mark.parametrize("scan", [offload._SCAN, 0xC06066FF])
def test_pages_of_the_file_are_no_edits(file, scan, monkeypatch):
    monkeypatch.setattr(offload, "_SCAN", scan)
    store = DiskWeights()
    weight = store.tensor(infos(file)["a"])
    span = store.span_of(weight)
    assert float(weight.sum()) > 0
    assert not offload._edited(span._first, span._length, weight)
    weight[ROWS // 2] += 1
    assert offload._edited(span._first, span._length, weight)


def test_edits_are_seen_without_a_page_table(file, monkeypatch):
    monkeypatch.setattr("pretrained.torch.offload._PAGEMAP", "/proc/self/absent")
    store = DiskWeights()
    weight = nn.Parameter(store.tensor(infos(file)["a"]))
    store.span_of(weight.data).release()
    assert not store.span_of(weight.data).is_edited
    with torch.no_grad():
        weight.add_(1)
    store.span_of(weight.data).release()
    assert weight[3] == 4


def test_neighbours_in_a_page_are_left_alone(tmp_path):
    save_file(
        {"a": torch.ones(1500), "b": torch.ones(1500), "c": torch.ones(1500)}, tmp_path / "x.safetensors"
    )
    store = DiskWeights()
    held = {key: store.tensor(info) for key, info in infos(tmp_path / "x.safetensors").items()}
    held["a"][-1] = held["c"][0] = 7
    store.span_of(held["b"]).release()
    assert held["a"][-1] == held["c"][0] == 7


def test_a_part_of_a_weight_is_not_its_span(file):
    store = DiskWeights()
    weight = store.tensor(infos(file)["a"])
    assert store.span_of(weight[:10]) is None
    assert store.span_of(torch.zeros(3)) is None
    assert store.nbytes == weight.nbytes


def test_empty_weights_are_no_spans(tmp_path):
    save_file({"a": torch.ones(0, 4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    store = DiskWeights()
    assert store.tensor(infos(tmp_path / "x.safetensors")["a"]).shape == (0, 4)
    assert store.nbytes == 0


def test_descriptors_and_maps_end_with_the_tensors(file):
    def census():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(file))

    before = census()
    store = DiskWeights()
    weight = store.tensor(infos(file)["a"])
    assert census() != before
    del store, weight
    assert census() == before


def test_a_file_that_cannot_be_mapped_is_refused(file, monkeypatch):
    monkeypatch.setattr("pretrained.core.reader._map", lambda *_: None)
    with pytest.raises(PlacementError, match=r"cannot map this file.*w\.safetensors.*local disk"):
        DiskWeights().tensor(infos(file)["a"])


@pytest.mark.parametrize(
    ("change", "mappable"),
    [({}, True), ({"dtype": "bfloat16"}, False), ({"strides": (1, 2)}, False), ({"offset": 6}, False)],
)
def test_what_can_be_used_as_it_lies(change, mappable):
    facts = {"key": "a", "dtype": "float32", "shape": (2, 2), "file": Path("x"), "offset": 8, "nbytes": 16}
    assert is_mappable(LoadStep("a", TensorInfo(**{**facts, **change}), "float32")) is mappable


# -- files that change ---------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [("cut", "was cut short"), ("touch", "was changed")])
def test_a_changed_file_is_named(file, change, message):
    store = DiskWeights()
    span = store.span_of(store.tensor(infos(file)["a"]))
    span.file.check()
    if change == "cut":
        os.truncate(file, 100)
    else:
        os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match=rf"{message} under a model .*{re.escape(str(file))}.*rename"):
        span.file.check()


def test_a_replaced_file_goes_on_serving_its_old_content(file, tmp_path):
    store = DiskWeights()
    weight = store.tensor(infos(file)["a"])
    save_file({"a": torch.zeros(3)}, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    store.span_of(weight).file.check()
    assert weight[7] == 7


# -- converted copies ----------------------------------------------------------------------------


def steps_of(path, dtype="bfloat16", keys="abc"):
    return [LoadStep(key, infos(path)[key], dtype) for key in keys]


class Counting:
    """A reader that counts what it reads."""

    def __init__(self):
        self.read = []

    def __call__(self, step, device):
        self.read.append(step.key)
        return mapped_reader()(step, device)


def test_copies_are_made_once(file, tmp_path):
    folder, count = tmp_path / "off", Counting()
    first = transformed(folder, steps_of(file, keys="ab"), count)
    assert sorted(count.read) == ["a", "b"]
    again = transformed(folder, steps_of(file, keys="abc"), count)
    assert sorted(count.read) == ["a", "b", "c"]
    assert {key: again[key] for key in "ab"} == first
    values = DiskWeights().tensor(again["b"])
    assert torch.equal(values, (torch.arange(ROWS) + 1.0).bfloat16())
    transformed(folder, steps_of(file, "float16"), count)
    assert len(count.read) == 6
    assert transformed(folder, steps_of(file), count) == again
    assert len(count.read) == 6


def test_copies_of_another_model_are_refused(file, tmp_path):
    transformed(tmp_path / "off", steps_of(file), mapped_reader())
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "w.safetensors"
    save_file({"a": torch.ones(5)}, other)
    with pytest.raises(PlacementError, match=r"made from another model .*offload_folder"):
        transformed(tmp_path / "off", steps_of(other, keys="a"), mapped_reader())


def test_copies_of_an_older_state_are_refused(file, tmp_path):
    transformed(tmp_path / "off", steps_of(file), mapped_reader())
    os.utime(file, (5, 5))
    with pytest.raises(PlacementError, match="older state of this model's files"):
        transformed(tmp_path / "off", steps_of(file), mapped_reader())


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_damaged_copies_are_made_again(file, tmp_path, damage):
    folder, count = tmp_path / "off", Counting()
    info = transformed(folder, steps_of(file), count)["a"]
    if damage == "gone":
        info.file.unlink()
    else:
        os.truncate(info.file, 500)
    assert transformed(folder, steps_of(file), count)["a"] == info
    assert len(count.read) == 6


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 9, "weights": {}}', '{"format": 1, "weights": {"a": {}}}']
)
def test_an_index_that_cannot_be_read_is_refused(file, tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(PlacementError, match=r"index of the offload folder.*Delete the folder"):
        transformed(tmp_path, steps_of(file), mapped_reader())


def test_an_index_cannot_lead_out_of_its_folder(file, tmp_path):
    folder, count = tmp_path / "off", Counting()
    transformed(folder, steps_of(file), count)
    index = json.loads((folder / INDEX).read_text())
    for entry in index["weights"].values():
        entry["file"] = f"../off/{entry['file']}"
    (folder / INDEX).write_text(json.dumps(index))
    transformed(folder, steps_of(file), count)
    assert len(count.read) == 6


def test_a_full_disk_leaves_nothing_half_written(file, tmp_path, monkeypatch):
    folder = tmp_path / "off"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pretrained.core.writer.write_tensor", full)
        with pytest.raises(FileError, match=r"converted copy.*room for \d+ bytes.*No space.*offload_folder"):
            transformed(folder, steps_of(file), mapped_reader())
    assert not [name for name in os.listdir(folder) if not name.endswith(".lock")]
    assert set(transformed(folder, steps_of(file), mapped_reader())) == set("abc")


def test_a_folder_that_cannot_be_made_is_named(file, tmp_path):
    (tmp_path / "off").write_text("a file")
    with pytest.raises(FileError, match="offload folder cannot be made"):
        transformed(tmp_path / "off", steps_of(file), mapped_reader())


def test_what_a_killed_load_left_is_cleared_by_the_next(file, tmp_path):
    name = transformed(tmp_path / "one", steps_of(file), mapped_reader())["a"].file.name
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / f".tmp-0123abcd-{name}").write_bytes(b"half")
    transformed(folder, steps_of(file), mapped_reader())
    assert not list(folder.glob(".tmp-*"))


def test_copies_from_memory_go_with_the_model(tmp_path):
    store = DiskWeights()
    found = written_from_memory(tmp_path, {"a": torch.arange(10), "b": torch.ones(2, 3).half()}, store)
    weight = store.tensor(found["a"])
    assert torch.equal(weight, torch.arange(10))
    del store
    gc.collect()
    assert not list(tmp_path.glob("*.safetensors"))
    assert weight[3] == 3


# -- read-ahead ----------------------------------------------------------------------------------


class Part:
    def __init__(self, *spans):
        self.ahead, self.successor, self.is_requested = list(spans), None, False


@pytest.fixture
def parts(file):
    store = DiskWeights()
    made = [Part(store.span_of(store.tensor(info))) for info in infos(file).values()]
    made[0].successor, made[1].successor = made[1], made[2]
    return made


def test_what_is_in_memory_is_not_asked_for(parts, file):
    file.read_bytes()
    ahead = read_ahead.ReadAhead()
    ahead.enter(parts[0])
    assert all(part.is_requested for part in parts)
    assert ahead._pool is None


def test_what_is_not_in_memory_is_read_by_threads_that_end(parts, file, monkeypatch):
    read = []
    monkeypatch.setattr(read_ahead, "is_in_memory", lambda *_: False)
    monkeypatch.setattr(read_ahead, "_read", lambda file, start, length: read.append((start, length)))
    ahead = read_ahead.ReadAhead()
    ahead.enter(parts[0])
    threads = list(ahead._pool._threads)
    del ahead
    gc.collect()
    for thread in threads:
        thread.join(5)
    spans = [span for part in parts for span in part.ahead]
    assert sorted(read) == sorted((span.info.offset, span.info.nbytes) for span in spans)


def test_pieces_are_read_to_their_end(parts):
    span = parts[2].ahead[0]
    os.posix_fadvise(span.file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    read_ahead._read(span.file, span.info.offset, span.info.nbytes)
    end = span.info.offset + span.info.nbytes
    assert read_ahead.is_in_memory(span.file.descriptor, span.info.offset, span.info.nbytes)
    assert end == os.fstat(span.file.descriptor).st_size


def test_the_order_of_the_last_run_is_followed(parts):
    ahead = read_ahead.ReadAhead()
    for at in (0, 2, 1):
        ahead.enter(parts[at])
    assert parts[0].successor is parts[2] and parts[2].successor is parts[1]


def test_the_window_bounds_what_is_asked_for(parts, monkeypatch):
    monkeypatch.setattr(read_ahead, "WINDOW", parts[0].ahead[0].info.nbytes + 1)
    read_ahead.ReadAhead().enter(parts[0])
    assert [part.is_requested for part in parts] == [True, True, False]
