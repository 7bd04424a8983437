# SPDX-License-Identifier: Apache-2.0
"""What the measured programs share: a watch from before the load to the end of forwards, and memory.

Programs import before the watch starts, and name the class that they load, so that neither side measures the
import of its models.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pagecache import resident

_PIECE = 1 << 20


def memory(name: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, VmHWM, RssAnon, RssFile.

    Args:
        name: Which line.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def reset_peak() -> None:
    """Let VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class AnonPeak:
    """The most anonymous memory seen, looked at 50 times a second; VmHWM counts mapped files too."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, memory("RssAnon"))

    def __enter__(self) -> AnonPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, memory("RssAnon"))


def forward(model: Any) -> None:
    """Run the first step of an answer to 16 ids.

    Args:
        model: An encoder-decoder.
    """
    import torch

    ids = torch.arange(100, 116).reshape(1, 16)
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits
    if not bool(logits.isfinite().all()):
        raise SystemExit("the logits are not finite")


def measure(load: Callable[[], Any], *, again: int = 0, cold: Sequence[str] = ()) -> Any:
    """Time a load, a first forward and further ones, and print the figures.

    Args:
        load: Returns the model.
        again: Further forwards, timed on their own: `again_s` is their median.
        cold: Files that are put out of the page cache before each of these, as far as they are not in use.

    Returns:
        The model.
    """
    before = memory("VmRSS")
    reset_peak()
    with AnonPeak() as anonymous:
        start = time.perf_counter()
        model = load()
        loaded = time.perf_counter()
        forward(model)
        end = time.perf_counter()
    peak = memory("VmHWM")
    weights = model.get_memory_footprint()
    figures = {
        "load_s": loaded - start,
        "forward_s": end - loaded,
        "total_s": end - start,
        "peak_bytes": peak,
        "anon_peak_bytes": anonymous.most,
        "before_bytes": before,
        "model_bytes": weights,
    }
    homes = getattr(model, "hf_device_map", {})
    if "disk" in homes.values():
        figures["disk_bytes"] = disk_bytes(model, homes)
    else:
        figures["above_model_bytes"] = peak - before - weights
    if again:
        figures |= _again(model, again, cold, before)
    print(json.dumps(figures))
    return model


def _again(model: Any, count: int, cold: Sequence[str], before: int) -> dict[str, float]:
    reset_peak()
    seconds, kept = [], []
    for _ in range(count):
        if cold:
            let_go(cold)
            kept.append(statistics.mean(resident(Path(file)) for file in cold))
        start = time.perf_counter()
        forward(model)
        seconds.append(time.perf_counter() - start)
    figures = {"again_s": statistics.median(seconds), "again_memory_bytes": memory("VmHWM") - before}
    if kept:
        figures["kept_in_cache"] = max(kept)
    return figures


def disk_bytes(model: Any, homes: dict[str, Any]) -> int:
    """Return the bytes of the weights that a device map puts on disk, tied ones once.

    Args:
        model: The model; its weights may be on the meta device.
        homes: Its device map.
    """
    total, seen = 0, set()
    for name, parameter in model.named_parameters():
        held = [path for path in homes if not path or name == path or name.startswith(f"{path}.")]
        if held and homes[max(held, key=len)] == "disk" and name not in seen:
            seen.add(name)
            total += parameter.numel() * parameter.element_size()
    return total


def let_go(files: Sequence[str]) -> None:
    """Put those pages of files out of the page cache that nobody has mapped.

    Args:
        files: The files.
    """
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_files(files: Sequence[str], side_by_side: bool, nbytes: int) -> None:
    """Read files as `cat` does, into a small buffer, and print the seconds.

    Args:
        files: What to read.
        side_by_side: A thread for each file, or one file after the other.
        nbytes: How much in all, from the files' beginnings, each giving the same share.
    """
    share = nbytes / sum(os.path.getsize(file) for file in files)
    start = time.perf_counter()
    if side_by_side:
        with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
            list(pool.map(lambda file: _read(file, share), files))
    else:
        for file in files:
            _read(file, share)
    print(json.dumps({"total_s": time.perf_counter() - start}))


def _read(file: str, share: float) -> None:
    buffer, left = bytearray(_PIECE), int(os.path.getsize(file) * share)
    with open(file, "rb", buffering=0) as stream:
        while left > 0:
            count = stream.readinto(memoryview(buffer)[: min(left, _PIECE)])
            if not count:
                return
            left -= count


def fill_memory(nbytes: int) -> None:
    """Fill fresh memory in huge pages, on all cores, and print the seconds: the least that a cast can take.

    Args:
        nbytes: How much.
    """
    import mmap

    import torch

    start = time.perf_counter()
    room = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(room, dtype=torch.uint8)
    for piece in whole.split(16 << 20):
        piece.fill_(1)
    seconds = time.perf_counter() - start
    print(json.dumps({"load_s": seconds, "total_s": seconds}))
