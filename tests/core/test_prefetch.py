# SPDX-License-Identifier: Apache-2.0
"""Reading ahead of a load: what is asked for, in which order, and that nothing of it stays."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pretrained.core import prefetch
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.prefetch import Piece, Prefetch, is_in_memory, plan_pieces
from pretrained.core.reader import MappedFiles


def info(file: Path, offset: int, nbytes: int) -> TensorInfo:
    return TensorInfo(f"{file.name}@{offset}", "uint8", (nbytes,), file, offset, nbytes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


class Recording(MappedFiles):
    """Notes what is asked for, and can make it wait or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def populate(self, file: Path, start: int, length: int) -> None:
        self.asked.append((start, length))


def test_pieces_cover_every_byte_once_and_join_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_PIECE", 100)
    a, b = Path("a"), Path("b")
    infos = [info(a, 8, 30), info(a, 38, 250), info(b, 0, 10), info(a, 500, 5)]
    assert plan_pieces(infos) == [
        Piece(a, 8, 100, 0),
        Piece(a, 108, 100, 100),
        Piece(a, 208, 80, 200),
        Piece(b, 0, 10, 280),
        Piece(a, 500, 5, 290),
    ]


def test_warm_files_start_no_thread(file: Path) -> None:
    file.read_bytes()
    with Prefetch(MappedFiles(), [info(file, 0, 1000)]) as ahead:
        assert not [t for t in threading.enumerate() if t.name.startswith("pretrained-prefetch")]
        ahead.wait(info(file, 0, 1000))


def test_cold_bytes_arrive_before_wait_returns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "is_in_memory", lambda *_: False)
    monkeypatch.setattr(prefetch, "_PIECE", 4096)
    monkeypatch.setattr(prefetch, "WINDOW", 16384)
    files = Recording()
    infos = [info(file, start, 10_000) for start in range(0, 200_000, 10_000)]
    with Prefetch(files, infos) as ahead:
        for tensor in infos:
            ahead.wait(tensor)
            end = tensor.offset + min(tensor.nbytes, 8192)
            assert sum(length for start, length in list(files.asked) if start < end) >= end
            most = max(start for start, _ in list(files.asked))
            assert most <= tensor.offset + 16384, "beyond the window"
            ahead.used(tensor)
    assert sum(length for _, length in files.asked) == 200_000


def test_a_tensor_larger_than_the_window_does_not_wait_for_ever(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "is_in_memory", lambda *_: False)
    monkeypatch.setattr(prefetch, "_PIECE", 1024)
    monkeypatch.setattr(prefetch, "WINDOW", 4096)
    infos = [info(file, 0, 500_000), info(file, 500_000, 100)]
    with Prefetch(Recording(), infos) as ahead:
        for tensor in infos:
            ahead.wait(tensor)
            ahead.used(tensor)


def test_an_error_in_the_load_ends_the_threads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "is_in_memory", lambda *_: False)
    monkeypatch.setattr(prefetch, "_PIECE", 1024)
    monkeypatch.setattr(prefetch, "WINDOW", 2048)
    with pytest.raises(KeyError), Prefetch(Recording(), [info(file, 0, 500_000)]):
        raise KeyError("the load failed")
    assert not [t for t in threading.enumerate() if t.name.startswith("pretrained-prefetch")]


@pytest.mark.parametrize("what", ["absent", "shorter"])
def test_what_cannot_be_read_ahead_is_left_to_the_reader(
    what: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "is_in_memory", lambda *_: False)
    tensor = info(file.with_name("gone") if what == "absent" else file, 0, 1 << 22)
    with Prefetch(MappedFiles(), [tensor]) as ahead:
        ahead.wait(tensor)
        ahead.used(tensor)


def test_evicted_pages_are_told_from_warm_ones_and_brought_back(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
        assert is_in_memory(descriptor, 0, 1 << 20)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if is_in_memory(descriptor, 0, 1 << 20):
            pytest.skip("this file system keeps its pages")
        tensor = info(file, 0, 1 << 20)
        with Prefetch(MappedFiles(), [tensor]) as ahead:
            ahead.wait(tensor)
        assert is_in_memory(descriptor, 0, 1 << 20)
    finally:
        os.close(descriptor)


def test_where_the_system_cannot_tell_nothing_is_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_NOWAIT", 0)
    files: Any = Recording()
    with Prefetch(files, [info(file, 0, 1000)]):
        pass
    assert files.asked == []
