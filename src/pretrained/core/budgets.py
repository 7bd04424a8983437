# SPDX-License-Identifier: Apache-2.0
"""Homes and how much memory each may give: what ``max_memory`` and a device map's values may say.

A home is an accelerator's index, ``"cpu"``, ``"disk"``, or another device by its framework's name
(``"mps"``).
A budget is a number of bytes, or None for no limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pretrained.errors import PlacementError, did_you_mean

Home = int | str
Budgets = Mapping[Home, int | None]

CPU = "cpu"
DISK = "disk"

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")
_INDEXED = re.compile(r"(?:cuda|xpu|npu|hip):(\d+)")
# Devices that exist once and go by their name.
_NAMED = (CPU, DISK, "mps", "meta")


def parse_size(size: int | str, *, where: object = "max_memory") -> int:
    """Return a number of bytes.

    Args:
        size: Bytes, or text such as ``"10GiB"`` (2**30 each), ``"10GB"`` (10**9 each), ``"1.5 GiB"``.
        where: What to name in errors.

    Raises:
        PlacementError: it is negative, or not a size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit = found[2] if found else ""
    # "Gb" is ten times as often a slip as it is a gigabit; which one is meant cannot be told.
    is_bits = len(unit) > 1 and unit[-1] == "b" and unit[0].isupper()
    if found is None or unit.lower() not in _UNITS or is_bits:
        raise PlacementError(
            "This is not an amount of memory",
            where=where,
            expected="bytes as a number, or text such as '10GiB' or '500MB'",
            found=repr(size),
            mend=f"Write {size[:-1]}B for bytes." if is_bits and isinstance(size, str) else None,
        )
    return int(float(found[1]) * _UNITS[unit.lower()])


def parse_home(value: Any, *, where: object = "device_map") -> Home:
    """Return a home from any spelling of a device.

    Args:
        value: An index, ``"cuda:1"``, ``"cuda"`` (index 0), ``"cpu"``, ``"disk"``, a framework's device
            object (taken by its text), or an index as text.
        where: What to name in errors.

    Raises:
        PlacementError: a negative index, or no device at all.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise PlacementError("A device index is a number from 0 on", where=where, found=value)
        return value
    text = "" if value is None or isinstance(value, bool | float) else str(value)
    if text in _NAMED:
        return text
    if text.isdecimal():
        return int(text)
    if text in ("cuda", "xpu", "npu", "hip"):
        return 0
    if (indexed := _INDEXED.fullmatch(text)) is not None:
        return int(indexed[1])
    if text == "cpu:0":
        return CPU
    raise PlacementError(
        f"Unknown device {value!r}",
        where=where,
        expected="an index such as 0, 'cuda:0', 'cpu' or 'disk'",
        mend=did_you_mean(text, (*_NAMED, "cuda", "cuda:0")) or None,
    )


def parse_budgets(max_memory: Mapping[Any, Any]) -> dict[Home, int | None]:
    """Return budgets from what ``max_memory`` says: accelerators in order, then ``"cpu"``, then ``"disk"``.

    What is not named is not used, except the disk, which is there without limit unless it is named.

    Args:
        max_memory: Device in any spelling -> size in any spelling; None for no limit.

    Raises:
        PlacementError: a device or a size cannot be read, or a device is named twice.
    """
    budgets: dict[Home, int | None] = {}
    for device, size in max_memory.items():
        home = parse_home(device, where="max_memory")
        if home in budgets:
            raise PlacementError("A device is named twice", where=f"max_memory[{device!r}]", found=home)
        budgets[home] = None if size is None else parse_size(size, where=f"max_memory[{device!r}]")
    budgets.setdefault(DISK, None)
    return {home: budgets[home] for home in in_order(budgets)}


def parse_budget_text(text: str) -> dict[Home, int | None]:
    """Return budgets from one word of a command line.

    Args:
        text: ``"0=10GiB,cpu=30GiB"``.

    Raises:
        PlacementError: it cannot be read.
    """
    pairs: dict[str, str] = {}
    for part in text.split(","):
        device, equals, size = part.partition("=")
        if not equals or device.strip() in pairs:
            raise PlacementError(
                "This is not a list of budgets",
                where="--max-memory",
                expected="device=size, each device once, with commas between, such as 0=10GiB,cpu=30GiB",
                found=repr(text),
            )
        pairs[device.strip()] = size
    return parse_budgets(pairs)


def in_order(homes: Iterable[Home]) -> list[Home]:
    """Return homes in the order in which a placement fills them: indices, other devices, cpu, disk.

    Args:
        homes: Any.
    """

    def rank(home: Home) -> tuple[int, int]:
        if isinstance(home, int):
            return 0, home
        return {CPU: 2, DISK: 3}.get(home, 1), 0

    return sorted(homes, key=rank)


def spelled(home: Home) -> str:
    """Return what people call a home.

    Args:
        home: Any.
    """
    return f"GPU {home}" if isinstance(home, int) else home


def accelerators_of(homes: Iterable[Home]) -> list[Home]:
    """Return those that compute on their own memory, in order.

    Args:
        homes: Any.
    """
    return [home for home in in_order(homes) if home not in (CPU, DISK, "meta")]


def available_host_memory() -> int | None:
    """Return how many bytes this process can still take without swapping, or None where nothing says so.

    What the system has left, or its memory group (a container's limit), whichever is less. Linux only.
    """
    lefts = [_system_left(), *(_group_left(folder) for folder in _group_folders())]
    known = [left for left in lefts if left is not None]
    return min(known, default=None)


def _system_left() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _group_folders(
    groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Return the folders that describe the memory groups this process is in, the outermost first.

    A container sees its own group at the root; a job of a scheduler or a service sees the whole tree, and
    which group is its own stands in `groups`: lines of ``number:controllers:path`` (Linux, cgroups(7)).
    """
    folders = [root, root / "memory"]
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return folders
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # The newer interface has one tree and names no controllers.
        if controllers and "memory" not in controllers.split(","):
            continue
        folder = root / "memory" if controllers else root
        for name in PurePosixPath(path).parts[1:]:
            folder /= name
            folders.append(folder)
    return folders


def _group_left(folder: Path) -> int | None:
    """Return what a memory group leaves; page cache counts as left, for the system takes it back."""
    for limit, used, cached in (
        ("memory.max", "memory.current", r"^(?:in)?active_file (\d+)$"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", r"^total_(?:in)?active_file (\d+)$"),
    ):
        try:
            most = (folder / limit).read_text(encoding="ascii").strip()
            taken = int((folder / used).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        # The older interface writes "no limit" as a number near 2**63.
        if not most.isdecimal() or int(most) >= 1 << 60:
            return None
        return max(0, int(most) - taken + sum(map(int, re.findall(cached, stat, re.MULTILINE))))
    return None
