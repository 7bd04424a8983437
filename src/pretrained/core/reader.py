# SPDX-License-Identifier: Apache-2.0
"""Gives the bytes of tensors, straight from the files' pages.

Each file is mapped once, privately and copy-on-write: what is not written to costs no memory that the system
cannot take back, and processes share it; what is written to becomes a private copy, and the file never
changes. A map lives as long as any array or buffer made from it.

What a map cannot survive is its file being cut short in place by someone else; touching the lost pages then
kills the process, as with every map. Replacing the file by a rename, as `pretrained.core.writer` does, is
safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.file_state import FileState, replaced
from pretrained.core.ggml import dequantize
from pretrained.core.untrusted import DOWNLOAD_AGAIN, open_regular, read_at
from pretrained.errors import CheckpointError, PretrainedError

# Without this flag Linux counts a writable private map against memory and swap, and refuses a file that is
# larger than both. Python has its name from 3.13 on; the number holds for x86 and ARM.
_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# Of Linux 5.14 and later, which `mmap` does not name; other systems refuse the number.
_POPULATE_READ: Final = 22
# What one entry of a page table's second level covers on x86 and, with pages of 4 KiB, on ARM.
_HUGE: Final = 2 << 20


class MappedFiles:
    """The files of a checkpoint, mapped when they are first needed.

    Use it as a context manager, or simply drop it: leaving it lets go of its maps, and each is undone once
    no array or buffer refers to it.

    A file that cannot be mapped, as on some network file systems, is read instead, span by span; everything
    else stays the same.

    Args:
        expected: What files were like when their headers were read, to refuse those that are not any more.
        huge_pages: Ask the system for huge pages: for files that are gone through many times.

    Attributes:
        expected: As given.
        states: What files were like when they were mapped.
    """

    def __init__(self, expected: Mapping[Path, FileState] | None = None, *, huge_pages: bool = False) -> None:
        self.expected = expected or {}
        self._huge_pages = huge_pages
        self.states: dict[Path, FileState] = {}
        # None stands for a file that cannot be mapped.
        self._maps: dict[Path, memoryview | None] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> MappedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not `mmap.close`: that fails under a living view, and may pull memory from under a C library.
        self._maps.clear()

    def buffer(self, info: TensorInfo) -> memoryview:
        """Return the exact bytes of a tensor, as they lie in its file.

        Args:
            info: The tensor.

        Returns:
            Writable bytes, format ``B``. A format without padding may place them at any address, so they
            need not be aligned to the element size.

        Raises:
            FileError: the file is gone or cannot be opened.
            CheckpointError: the file has become shorter since its header was read.
        """
        if info.nbytes == 0:
            return memoryview(bytearray())
        mapped = self._map_of(info.file)
        if mapped is None:
            return _read_span(info)
        _check_size(info, len(mapped))
        return mapped[info.offset : info.offset + info.nbytes]

    def _map_of(self, file: Path) -> memoryview | None:
        with self._lock:
            if file not in self._maps:
                with open_regular(file) as (opened, size):
                    state = FileState.of(opened.fileno())
                    expected = self.expected.get(file, state)
                    # One that has become too short is told by the tensor that it lacks.
                    if state != expected and size >= expected.size:
                        raise replaced(file)
                    self._maps[file] = mapped = _map(opened, size)
                if mapped is not None:
                    self.states[file] = state
                    if self._huge_pages:
                        _ask_for_huge_pages(mapped)
            return self._maps[file]

    def is_mapped(self, file: Path) -> bool:
        """Tell whether the bytes that `buffer` gave of a file are its own pages, not a copy.

        Args:
            file: A file that was asked for.
        """
        return self._maps.get(file) is not None

    def was_refused(self, file: Path) -> bool:
        """Tell whether a file was asked for and cannot be mapped.

        Args:
            file: Any file.
        """
        return self._maps.get(file, memoryview(b"")) is None

    def release(self, info: TensorInfo, start: int = 0, end: int | None = None) -> None:
        """Let the system take back the pages of bytes that have been copied and are not needed again.

        Without this they count as the process's memory until something else needs the space. Pages that the
        span shares with its neighbours stay. Whoever still looks at the bytes finds the file's, so nothing
        may have been written to them.

        Args:
            info: The tensor.
            start: First byte of a part of it.
            end: Byte after that part; None for the tensor's end.
        """
        mapped = self._maps.get(info.file)
        if mapped is None:
            return
        page = mmap.PAGESIZE
        first = -(-(info.offset + start) // page) * page
        last = (info.offset + (info.nbytes if end is None else end)) // page * page
        if last > first:
            # It is advice, so failing is no fault.
            with contextlib.suppress(OSError, AttributeError):
                release_pages(np.frombuffer(mapped, np.uint8).ctypes.data + first, last - first)

    def populate(self, file: Path, start: int, length: int) -> None:
        """Bring a part of a mapped file into memory, waiting for the disk; other threads go on meanwhile.

        Args:
            file: A file that was asked for before, or will be.
            start: First byte.
            length: Bytes.

        It is help, never a duty: what cannot be brought is left to whoever reads it and can say why.
        """
        with contextlib.suppress(OSError, PretrainedError):
            mapped = self._map_of(file)
            if mapped is None:
                return
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(start + length, len(mapped))
            populate_pages(np.frombuffer(mapped, np.uint8).ctypes.data + first, end - first)

    def array(self, info: TensorInfo) -> npt.NDArray[Any]:
        """Return a tensor as a numpy array.

        Args:
            info: The tensor.

        Returns:
            Plain dtypes: a writable view of the map, of the numpy type in `DTYPES`, strided where the file
            stores a view; numpy copes with addresses that are not aligned. Block types: new float32 values.
        """
        raw = self.buffer(info)
        if info.dtype not in DTYPES:
            return dequantize(raw, info.dtype, info.shape)
        dtype = DTYPES[info.dtype].numpy
        strides = None if info.strides is None else [stride * dtype.itemsize for stride in info.strides]
        return np.ndarray(info.shape, dtype, raw, strides=strides)


def _map(opened: BinaryIO, size: int) -> memoryview | None:
    """Map a whole file; the caller may close it at once. None where the file system refuses."""
    # From 3.13 on a map can do without a descriptor of its own.
    untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    try:
        if os.name == "nt":
            return memoryview(mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY))
        if not untracked:
            # A model of a hundred files would hold a hundred descriptors for as long as it lives.
            with contextlib.suppress(AttributeError, TypeError):
                return _map_without_descriptor(opened, size)
        mapped = mmap.mmap(
            opened.fileno(),
            size,
            flags=mmap.MAP_PRIVATE | _NO_RESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            **untracked,
        )
        return memoryview(mapped)
    except OSError:
        return None


def _ask_for_huge_pages(mapped: memoryview) -> None:
    """Let one entry of the page table stand for 2 MB, where the file lies in the cache in such pieces."""
    with contextlib.suppress(OSError, AttributeError):
        _advise(np.frombuffer(mapped, np.uint8).ctypes.data, len(mapped), mmap.MADV_HUGEPAGE)


def _map_without_descriptor(opened: BinaryIO, size: int) -> memoryview:
    """Ask the system itself for the map that `_map` describes, which Python before 3.13 cannot."""
    address = _map_at(opened.fileno(), 0, size)
    memory = (ctypes.c_ubyte * size).from_address(address)
    undo = weakref.finalize(memory, _c_library().munmap, address, size)
    # At the end of the process arrays may still look at the map; the system undoes it then.
    undo.atexit = False
    return memoryview(memory).cast("B")


def _map_at(descriptor: int, start: int, size: int) -> int:
    """Return the address of a new private map of a part of a file; `start` is a multiple of a page."""
    flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    address: int | None = _c_library().mmap(None, size, protection, flags, descriptor, start)
    if address is None or address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


@functools.cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *numbers)
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def release_pages(address: int, nbytes: int) -> None:
    """Give pages of a private map back; the next access reads them from the file again.

    Through C, since `mmap.madvise` holds the interpreter's lock meanwhile. Edits in the pages are lost.

    Args:
        address: Of the first page; a multiple of the page size.
        nbytes: A multiple of the page size.

    Raises:
        OSError: the system refuses.
    """
    _advise(address, nbytes, mmap.MADV_DONTNEED)


def populate_pages(address: int, nbytes: int) -> None:
    """Read pages of a map into memory, as a touch of each would, in few large reads.

    Args:
        address: Of the first page; a multiple of the page size.
        nbytes: Bytes from there on.

    Raises:
        OSError: the system cannot (Linux before 5.14, others), or the file has become shorter.
    """
    _advise(address, nbytes, _POPULATE_READ)


def read_into_cache(descriptor: int, start: int, length: int) -> None:
    """Bring a part of a file into the page cache.

    The pages are the system's: they count as no process's memory.

    Args:
        descriptor: Of the open file.
        start: First byte.
        length: Bytes.
    """
    first = start // _HUGE * _HUGE
    nbytes = start + length - first
    with contextlib.suppress(OSError, AttributeError):
        address = _map_at(descriptor, first, nbytes)
        try:
            _advise(address, nbytes, _POPULATE_READ)
            return
        finally:
            _c_library().munmap(address, nbytes)
    with contextlib.suppress(OSError):
        scratch = bytearray(min(length, 1 << 20))
        for at in range(start, start + length, len(scratch)):
            os.preadv(descriptor, [memoryview(scratch)[: start + length - at]], at)


def _advise(address: int, nbytes: int, advice: int) -> None:
    if _c_library().madvise(address, nbytes, advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _read_span(info: TensorInfo) -> memoryview:
    with open_regular(info.file) as (opened, size):
        _check_size(info, size)
        return memoryview(bytearray(read_at(opened, info.offset, info.nbytes)))


def _check_size(info: TensorInfo, size: int) -> None:
    end = info.offset + info.nbytes
    if size < end:
        raise CheckpointError(
            f"The file became shorter after its header was read; tensor {info.key!r} is cut off",
            where=info.file,
            expected=f"at least {end} bytes",
            found=f"{size} bytes",
            mend="Do not change a checkpoint while it is being loaded. " + DOWNLOAD_AGAIN,
        )
