# SPDX-License-Identifier: Apache-2.0
"""Weights that live on disk: the checkpoint's own pages, let go of when they are not in use.

A weight with the home ``disk`` is a tensor on a private map of the file that holds it, so its values are
always there: reading `.weight`, saving and a state dict need nothing special. What makes it an offloaded
weight is what happens around a forward (`pretrained.torch.dispatch`): `Span.release` gives its pages back.

An edit in place of such a tensor makes private copies of the pages that it writes to. Releasing those would
lose the edit in silence, so the page table is asked first, and a span with edited pages is kept in memory.

What no map survives is its file being cut short in place: touching the lost pages kills the process. So the
files are looked at before each use (`WatchedFile.check`) and a change raises. A file that is cut short while
a layer computes is beyond that. Replacing a file by a rename is safe: the map keeps the old one.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.file_state import FileState, changed
from pretrained.core.plan import LoadStep
from pretrained.core.reader import MappedFiles, release_pages
from pretrained.errors import ArgumentError, FileError, PlacementError
from pretrained.torch.tensors import TORCH_DTYPES

if sys.platform == "linux":
    import fcntl

logger = logging.getLogger(__name__)

PAGE: Final = mmap.PAGESIZE

# Only Linux is known to give a released page back with the file's content.
_CAN_RELEASE: Final = sys.platform == "linux"

# Linux, Documentation/admin-guide/mm/pagemap.rst: 8 bytes a page.
_PAGEMAP: Final = "/proc/self/pagemap"
# The same page, "ioctl PAGEMAP_SCAN": struct pm_scan_arg, and the categories of a page.
_SCAN: Final = 0xC0606610
_SCAN_FIELDS: Final = struct.Struct("=12Q")
_IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_PRESENT, _SWAPPED, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


class WatchedFile:
    """A file that weights are mapped from, held open so that a change of it shows.

    Args:
        path: The file.

    Raises:
        FileError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise FileError(
                "A file with offloaded weights cannot be opened", where=path, found=str(error)
            ) from error
        weakref.finalize(self, os.close, self.descriptor)
        self._state = self._look()

    def _look(self) -> tuple[int, int]:
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns

    def check(self) -> None:
        """Raise where the file is not as it was when it was opened.

        Raises:
            CheckpointError: its size or its time of change is another one.
        """
        now = self._look()
        if now == self._state:
            return
        raise changed(self.path, self._state[0], now[0], "under a model that runs from it")


class Span:
    """The bytes of one weight inside a map.

    Args:
        file: The file that is mapped.
        info: Which bytes.
        tensor: The weight, a view of them.
    """

    __slots__ = ("_first", "_length", "address", "file", "info", "is_edited", "tensor")

    def __init__(self, file: WatchedFile, info: TensorInfo, tensor: torch.Tensor) -> None:
        self.file, self.info, self.tensor = file, info, tensor
        self.address = tensor.data_ptr()
        self.is_edited = False
        # Whole pages only: the first and the last one may hold a part of a neighbour.
        self._first = -(-self.address // PAGE) * PAGE
        self._length = max(0, (self.address + info.nbytes) // PAGE * PAGE - self._first)

    def release(self) -> None:
        """Give the pages back; the next access reads them from the file again."""
        if not self._length or self.is_edited or not _CAN_RELEASE:
            return
        if _edited(self._first, self._length, self.tensor):
            self.is_edited = True
            logger.info("%s was edited in place; it stays in memory from now on", self.info.key)
            return
        release_pages(self._first, self._length)

    def touches(self, after: Span) -> bool:
        """Tell whether another span follows this one in the same map, with no whole page between.

        Args:
            after: A span at a higher address.
        """
        return self.file is after.file and after.address - (self.address + self.info.nbytes) < PAGE


def release_run(run: Sequence[Span]) -> None:
    """Release neighbours as one where none of them was edited.

    Args:
        run: Spans of one map, by address, each touching the next.
    """
    first = -(-run[0].address // PAGE) * PAGE
    length = (run[-1].address + run[-1].info.nbytes) // PAGE * PAGE - first
    known = any(span.is_edited for span in run) or not _CAN_RELEASE or length <= 0
    if len(run) == 1 or known or _edited(first, length, *(span.tensor for span in run)):
        for span in run:
            span.release()
    else:
        release_pages(first, length)


def release_clean(tensor: torch.Tensor) -> None:
    """Give back the pages of a tensor that are a file's own, if none was written to.

    The next access reads them again. Memory of other kinds stays, and so does everything where the system
    does not tell the kinds apart.

    Args:
        tensor: Contiguous, on the CPU.
    """
    address = tensor.data_ptr()
    first = -(-address // PAGE) * PAGE
    length = max(0, (address + tensor.nbytes) // PAGE * PAGE - first)
    if length and _CAN_RELEASE and Path(_PAGEMAP).exists() and not _edited(first, length, tensor):
        release_pages(first, length)


def _edited(address: int, length: int, *tensors: torch.Tensor) -> bool:
    """Tell whether any page was written to, and is a private copy now."""
    try:
        with open(_PAGEMAP, "rb", buffering=0) as pagemap:
            return _scan(pagemap.fileno(), address, length)
    except OSError:
        # Without a page table to ask: torch counts edits, except those through `.data`.
        return any(tensor._version > 0 for tensor in tensors)


def _scan(pagemap: int, address: int, length: int) -> bool:
    """Tell whether a range holds a page that is not the file's: copied, or swapped out since."""
    found = np.zeros(3, np.uint64)
    request = _SCAN_FIELDS.pack(
        _SCAN_FIELDS.size, 0, address, address + length, 0, found.ctypes.data, 1, 1,
        _IS_FILE, _IS_FILE, _IS_PRESENT | _IS_SWAPPED, _IS_PRESENT,
    )  # fmt: skip
    try:
        return fcntl.ioctl(pagemap, _SCAN, bytearray(request)) > 0
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
    # Linux before 6.7: the same question, a page at a time.
    entries = np.frombuffer(os.pread(pagemap, length // PAGE * 8, address // PAGE * 8), np.uint64)
    state = entries & (_PRESENT | _SWAPPED | _OF_FILE)
    return bool(((state == _PRESENT) | (state & _SWAPPED > 0)).any())


class DiskWeights:
    """The weights of one model that live on disk. Dropping the last tensor undoes the maps.

    Args:
        expected: As for `MappedFiles`.
    """

    def __init__(self, expected: Mapping[Path, FileState] | None = None) -> None:
        self._maps = MappedFiles(expected, huge_pages=True)
        self._files: dict[Path, WatchedFile] = {}
        self._spans: dict[int, Span] = {}
        self._cleanups: list[weakref.finalize[..., Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise cannot_copy("copied")

    def __reduce__(self) -> Any:
        raise cannot_copy("pickled")

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a weight as it lies in its file.

        Args:
            info: Contiguous values of a plain dtype, aligned to it; see `is_mappable`.

        Raises:
            PlacementError: the file system does not map files.
        """
        dtype = TORCH_DTYPES[info.dtype]
        if info.num_elements == 0:
            return torch.empty(info.shape, dtype=dtype)
        buffer = self._maps.buffer(info)
        if not self._maps.is_mapped(info.file):
            raise PlacementError(
                "The file system cannot map this file, so its weights cannot stay on disk",
                where=info.file,
                mend="Copy the checkpoint to a local disk, or place the weights on a device or 'cpu'.",
            )
        tensor = torch.frombuffer(buffer, dtype=dtype).view(info.shape)
        file = self._files.get(info.file)
        if file is None:
            file = self._files[info.file] = WatchedFile(info.file)
        self._spans[tensor.data_ptr()] = Span(file, info, tensor)
        return tensor

    def span_of(self, tensor: torch.Tensor) -> Span | None:
        """Return the span that a tensor is the view of, if it is one.

        Args:
            tensor: Any tensor.
        """
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        span = self._spans.get(tensor.data_ptr())
        whole = span is not None and tensor.numel() * tensor.element_size() == span.info.nbytes
        return span if whole else None

    def remove_with_me(self, file: Path) -> None:
        """Remove a file once the model is gone; for weights that were written out of memory.

        Args:
            file: The file.
        """
        self._cleanups.append(weakref.finalize(self, _unlink, file))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(span.info.nbytes for span in self._spans.values())


class ReleaseBehind:
    """Lets go of one weight when the next is read, so that a pass over a model holds one at a time.

    Args:
        store: The model's weights on disk, or None for a model without.
    """

    def __init__(self, store: DiskWeights | None) -> None:
        self._store = store
        self._last: Span | None = None

    def enter(self, tensor: torch.Tensor) -> None:
        """Note that a weight is read now.

        Args:
            tensor: Any weight.

        Raises:
            CheckpointError: its file was changed.
        """
        if self._last is not None:
            self._last.release()
        self._last = None if self._store is None else self._store.span_of(tensor.detach())
        if self._last is not None:
            self._last.file.check()


def is_mappable(step: LoadStep) -> bool:
    """Tell whether a weight can be used as it lies in its file, without a copy.

    Args:
        step: A planned step.
    """
    info = step.source
    dtype = TORCH_DTYPES.get(info.dtype)
    plain = step.is_view and dtype is not None and info.strides is None
    return plain and dtype is not None and info.offset % dtype.itemsize == 0


def files_of(spans: Iterable[Span]) -> tuple[WatchedFile, ...]:
    """Return the files of spans, each once.

    Args:
        spans: Any spans.
    """
    return tuple(dict.fromkeys(span.file for span in spans))


def _unlink(file: Path) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)


def cannot_copy(verb: str) -> ArgumentError:
    """Return the error for a placed model that is copied or pickled as an object.

    Args:
        verb: What was tried.
    """
    return ArgumentError(
        f"A model that was placed over several homes cannot be {verb}",
        mend="Save it with save_pretrained and load it again, or read its weights in first: model.to('cpu').",
    )
