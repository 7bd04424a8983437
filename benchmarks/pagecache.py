# SPDX-License-Identifier: Apache-2.0
"""Files cold or warm on purpose: pages put out of the system's cache or into it, and a check that they are.

"Cold" is only as cold as this system: a host that runs it as a virtual machine may keep the disk's bytes in
its own memory, which nothing in here can see. What is loaded cold is therefore compared with a plain read of
the same files in the same run.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_PAGE = mmap.PAGESIZE
_PIECE = 8 << 20
# The system may take pages back while others are still being read.
_ATTEMPTS = 4
# Pages that another process touched in between; more than this and the files are not cold.
MOST_RESIDENT = 0.01
LEAST_RESIDENT = 0.99


def evict(files: Sequence[Path]) -> None:
    """Put the files' pages out of the page cache.

    Args:
        files: Files that no process has mapped.

    Raises:
        SystemExit: pages are still there afterwards, so that nothing could be measured cold.
    """
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # Pages that are not written yet cannot be let go of.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    left = {file.name: resident(file) for file in files}
    if max(left.values(), default=0.0) > MOST_RESIDENT:
        raise SystemExit(f"these files stay in the page cache, so nothing can be measured cold: {left}")


def warm(files: Sequence[Path]) -> None:
    """Read the files' pages into the page cache.

    Args:
        files: Any files.

    Raises:
        SystemExit: they do not stay there, for want of memory.
    """
    for _ in range(_ATTEMPTS):
        for file in files:
            if resident(file) < 1.0:
                _read(file)
        if all(resident(file) >= LEAST_RESIDENT for file in files):
            return
    left = {file.name: resident(file) for file in files}
    raise SystemExit(f"these files do not stay in the page cache, so nothing can be measured warm: {left}")


def _read(file: Path) -> None:
    buffer = bytearray(_PIECE)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def resident(file: Path) -> float:
    """Return the share of a file's pages that are in the page cache.

    Args:
        file: Any file.
    """
    size = file.stat().st_size
    if not size:
        return 0.0
    pages = -(-size // _PAGE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as view:
        # ctypes takes the address of writable buffers only, and a private map may be written.
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found):
            raise OSError(ctypes.get_errno(), "mincore")
    # mincore answers in the lowest bit; the rest of the byte is not defined.
    return bytes(found).translate(bytes(i & 1 for i in range(256))).count(1) / pages
