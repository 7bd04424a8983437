# SPDX-License-Identifier: Apache-2.0
"""`Placement`: where every weight of a model will live and why, as a value to print, save and carry out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrained.core.budgets import CPU, DISK, Home, spelled
from pretrained.core.report import fold_keys, format_bytes
from pretrained.core.units import covering


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block, loose module or loose weight, and its home.

    Attributes:
        name: Its path.
        home: Where it lives.
        nbytes: Bytes it takes there.
        reason: Why it is there.
        tied: Further paths that live there because they hold the same tensor.
        cache_bytes: Bytes of key-value cache reserved for it, where it runs.
    """

    name: str
    home: Home
    nbytes: int
    reason: str = ""
    tied: tuple[str, ...] = ()
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """What a device gives and what is taken of it, in bytes.

    Attributes:
        home: The device.
        budget: What it may give; None for no limit.
        weights: Taken by weights.
        returning: Kept free for the largest block that comes here to run.
        cache: Kept free for the key-value cache.
        activations: Kept free for what a forward computes.
    """

    home: Home
    budget: int | None
    weights: int = 0
    returning: int = 0
    cache: int = 0
    activations: int = 0

    @property
    def reserved(self) -> int:
        """Kept free for what comes and goes while the model runs."""
        return self.returning + self.cache + self.activations

    @property
    def peak(self) -> int:
        """The most that will be taken at once."""
        return self.weights + self.reserved

    @property
    def free(self) -> int | None:
        """What nobody takes; None where there is no limit, negative where a budget is overdrawn."""
        return None if self.budget is None else self.budget - self.peak


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights live.

    Attributes:
        strategy: ``"balanced"``, ``"balanced_low_0"``, ``"sequential"`` or ``"given"`` (by the user).
        device_map: Module path -> home; an entry covers everything under it except what has an entry of its
            own. Planned ones are as short as can be, given ones are the user's; both in module order.
        homes: The home of every parameter and buffer, tied ones included, in module order: what counts where
            a given map covers a tied weight twice.
        blocks: What was placed, in module order.
        rooms: The devices, accelerators first.
        main: The device that runs what lives on a slower one.
        bytes_to_read: Bytes of the files that a load will read.
        notes: What a user should know.
    """

    strategy: str
    device_map: Mapping[str, Home]
    homes: Mapping[str, Home]
    blocks: tuple[PlacedBlock, ...]
    rooms: tuple[Room, ...]
    main: Home
    bytes_to_read: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def offloaded(self) -> tuple[PlacedBlock, ...]:
        """The blocks that are brought to `main` when they run."""
        slower = _slower(self.main)
        return tuple(block for block in self.blocks if block.home in slower)

    @property
    def peak(self) -> dict[Home, int]:
        """Most bytes taken at once of each device's memory; of the disk, nothing is."""
        return {room.home: room.peak for room in self.rooms if room.home != DISK}

    def room(self, home: Home) -> Room:
        """Return what is taken of a device.

        Args:
            home: One of the placement's devices.
        """
        return next(room for room in self.rooms if room.home == home)

    def home_of(self, path: str) -> Home | None:
        """Return where a parameter or module lives; None for a module that no entry covers.

        Args:
            path: A parameter's key or a module's path.
        """
        if path in self.homes:
            return self.homes[path]
        entry = covering(path, self.device_map)
        return None if entry is None else self.device_map[entry]

    def runs_on(self, path: str) -> Home | None:
        """Return the device that a module computes on: its home, or `main` where that is slower.

        Args:
            path: A parameter's key or a module's path.
        """
        home = self.home_of(path)
        return self.main if home in _slower(self.main) else home

    def explain(self) -> str:
        """Return one line for each group of blocks: home, bytes and why."""
        rows = [("block", "home", "bytes", "why")]
        rows += [(name, spelled(home), format_bytes(size), why) for name, home, size, why in self._folded()]
        return "\n".join(aligned(rows, right=(2,)))

    def __str__(self) -> str:
        rows = [("device", "budget", "weights", "reserved", "free", "peak")]
        for room in self.rooms:
            free = "no limit" if room.free is None else format_bytes(room.free)
            budget = "no limit" if room.budget is None else format_bytes(room.budget)
            peak = "-" if room.home == DISK else format_bytes(room.peak)
            weights, reserved = format_bytes(room.weights), format_bytes(room.reserved)
            rows.append((spelled(room.home), budget, weights, reserved, free, peak))
        lines = [self.explain(), "", *aligned(rows, right=(1, 2, 3, 4, 5)), ""]
        lines += [
            f"reserved on {spelled(room.home)}: {words}" for room in self.rooms if (words := _kept(room))
        ]
        lines.append(f"to read: {format_bytes(self.bytes_to_read)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists, dictionaries, numbers and text, ready for JSON."""
        return {
            "strategy": self.strategy,
            "device_map": dict(self.device_map),
            "main": self.main,
            "blocks": [{**asdict(block), "tied": list(block.tied)} for block in self.blocks],
            "devices": [
                {**asdict(room), "reserved": room.reserved, "free": room.free, "peak": room.peak}
                for room in self.rooms
            ],
            "bytes_to_read": self.bytes_to_read,
            "notes": list(self.notes),
        }

    def _folded(self) -> list[tuple[str, Home, int, str]]:
        """Return (names, home, bytes, why) for each run of blocks that differ in their number only."""
        return [
            (folded_name(run), run[0].home, sum(block.nbytes for block in run), run[0].reason)
            for run in runs(self.blocks)
        ]


def runs(blocks: Sequence[PlacedBlock]) -> list[list[PlacedBlock]]:
    """Return neighbours that differ in one number only, share a home and a reason, together.

    Args:
        blocks: In module order.
    """
    found: list[list[PlacedBlock]] = []
    for block in blocks:
        last = found[-1][-1] if found else None
        if last is not None and _alike(last, block):
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _alike(one: PlacedBlock, other: PlacedBlock) -> bool:
    same = one.home == other.home and one.reason == other.reason
    return same and not (one.tied or other.tied) and len(fold_keys([one.name, other.name])) == 1


def folded_name(run: Sequence[PlacedBlock]) -> str:
    """Return one name for a run of blocks, with the paths tied to it.

    Args:
        run: From `runs`.
    """
    (name,) = fold_keys([block.name for block in run])
    tied = fold_keys(path for block in run for path in block.tied)
    return " = ".join([name, *tied])


def aligned(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return rows as lines with columns two spaces apart.

    Args:
        rows: Cells, the same number in each row.
        right: Columns with numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _slower(main: Home) -> tuple[Home, ...]:
    return (DISK,) if main == CPU else (CPU, DISK)


def _kept(room: Room) -> str:
    parts = {
        "for blocks that return": room.returning,
        "for the key-value cache": room.cache,
        "for activations": room.activations,
    }
    return ", ".join(f"{format_bytes(size)} {what}" for what, size in parts.items() if size)
