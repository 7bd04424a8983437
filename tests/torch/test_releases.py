# SPDX-License-Identifier: Apache-2.0
"""Letting go of weights on disk in runs of neighbours."""

import mmap
import os

import pytest
import torch
from safetensors.torch import save_file

from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.torch import offload, releases
from pretrained.torch.offload import DiskWeights
from pretrained.torch.releases import Releases

# Ten pages and a half, so that neighbours share a page.
ROWS = 10 * 1024 + 512


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({name: torch.arange(ROWS, dtype=torch.float32) + at for at, name in enumerate("abcdef")}, path)
    return path


@pytest.fixture
def store(file):
    store = DiskWeights()
    store.weights = [store.tensor(info) for info in read_safetensors_header(file).tensors.values()]
    return store


def spans(store, *which):
    return [store.span_of(store.weights[at]) for at in which]


def resident_bytes(weights):
    """Bytes of the pages of all weights that are mapped into this process."""
    first, last = weights[0].data_ptr(), weights[-1].data_ptr() + weights[-1].nbytes
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(first // mmap.PAGESIZE * 8)
        entries = torch.frombuffer(
            bytearray(pagemap.read((last // mmap.PAGESIZE - first // mmap.PAGESIZE) * 8)), dtype=torch.int64
        )
    return int((entries < 0).sum()) * mmap.PAGESIZE


def test_neighbours_are_released_as_one(store, monkeypatch):
    released = []
    monkeypatch.setattr(offload, "release_pages", lambda address, nbytes: released.append((address, nbytes)))
    letting = Releases(store)
    letting.add(spans(store, 4, 1, 0, 2))
    letting.flush()
    page, runs = mmap.PAGESIZE, [(0, 2), (4, 4)]
    starts = [-(-store.weights[first].data_ptr() // page) * page for first, _ in runs]
    ends = [(store.weights[last].data_ptr() + ROWS * 4) // page * page for _, last in runs]
    assert released == [(start, end - start) for start, end in zip(starts, ends, strict=True)]


def test_nothing_is_resident_after_all_was_let_go(store):
    total = sum(float(weight.sum()) for weight in store.weights)
    assert resident_bytes(store.weights) > 5 * ROWS * 4
    letting = Releases(store)
    letting.add(spans(store, *range(6)))
    letting.flush()
    assert resident_bytes(store.weights) <= mmap.PAGESIZE
    assert sum(float(weight.sum()) for weight in store.weights) == total


def test_an_edit_among_neighbours_is_kept_and_the_others_let_go(store):
    store.weights[1][5000] = -1
    for weight in store.weights:
        weight.sum()
    letting = Releases(store)
    for _ in range(2):
        letting.add(spans(store, *range(6)))
        letting.flush()
    assert store.weights[1][5000] == -1
    assert spans(store, 1)[0].is_edited and not spans(store, 0)[0].is_edited
    # The edited weight, and the pages that two weights share.
    assert resident_bytes(store.weights) <= (11 + 7) * mmap.PAGESIZE


def test_what_waits_is_bounded(store, monkeypatch):
    letting, runs = Releases(store), []
    letting._batch_bytes = 2 * ROWS * 4
    monkeypatch.setattr(releases, "release_run", lambda run: runs.append(len(run)))
    for at in range(5):
        letting.add(spans(store, at))
    assert runs == [2, 2]
    letting.after(None, (), None)
    assert runs == [2, 2, 1]


@pytest.mark.parametrize("left", [None, 10**12, 1000])
def test_the_cache_is_emptied_behind_only_where_it_cannot_hold_the_weights(store, left, monkeypatch):
    monkeypatch.setattr(releases, "available_host_memory", lambda: left)
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advised.append(args[1:3]))
    letting = Releases(store)
    letting.add(spans(store, 0, 1, 3))
    letting.flush()
    first, third = (span.info for span in spans(store, 0, 3))
    whole = [(first.offset, 2 * ROWS * 4), (third.offset, ROWS * 4)]
    assert advised == (whole if left == 1000 else [])
