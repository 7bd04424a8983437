# SPDX-License-Identifier: Apache-2.0
"""Decides where the weights of a model live: pure functions from sizes and budgets to a `Placement`.

Accelerators are filled first, then main memory, then the disk. What lives on a slower home is brought to the
first accelerator with room for it (to main memory where there is no accelerator) when it runs; then each
accelerator keeps room free for the largest block that can come back. Blocks are not split, tied weights are
priced once and share a home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pretrained.core.budgets import CPU, DISK, Budgets, Home, accelerators_of, in_order, spelled
from pretrained.core.fill import fill_in_order, running_totals, spare_first, spread
from pretrained.core.homes import PlacedBlock, Placement, Room
from pretrained.core.report import format_bytes
from pretrained.core.skeleton import Skeleton
from pretrained.core.units import Unit, compact, module_order, units_of
from pretrained.errors import ArgumentError, PlacementError, did_you_mean

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run needs beside the weights.

    Attributes:
        cache: Bytes of key-value cache by block path, kept free where the block runs.
        activations: Bytes that a forward computes with, kept free on each device that runs something.
    """

    cache: Mapping[str, int] = field(default_factory=dict)
    activations: int = 0


def plan_placement(
    skeleton: Skeleton,
    sizes: Mapping[str, int],
    budgets: Budgets,
    *,
    strategy: str = "auto",
    workload: Workload | None = None,
    returning: int | None = None,
    bytes_to_read: int | None = None,
) -> Placement:
    """Give every block of a model a home.

    Args:
        skeleton: What the model promises, with its blocks marked.
        sizes: Bytes of each weight by key, after dtype and quantization
            (`pretrained.core.units.weight_sizes`).
        budgets: Device -> bytes, None for no limit (`pretrained.core.budgets.parse_budgets`); other devices
            are not used.
        strategy: ``"auto"`` and ``"balanced"`` give the accelerators even shares, ``"balanced_low_0"`` keeps
            the first nearly free, ``"sequential"`` fills them in order. Where a model is larger than all of
            them together, each is filled.
        workload: Key-value cache and activations to keep room for.
        returning: Bytes to keep free on each accelerator once something is offloaded; None for the largest
            block that is.
        bytes_to_read: For the report; None for the sum of the sizes.

    Returns:
        The placement, which covers every parameter and buffer.

    Raises:
        PlacementError: the budgets cannot hold the model, or not the largest block that has to come back.
        ArgumentError: an unknown strategy, or sizes of another model.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(
            f"Unknown way to place a model: {strategy!r}",
            where="device_map",
            expected=", ".join(STRATEGIES),
            mend=did_you_mean(str(strategy), STRATEGIES) or None,
        )
    workload = workload or Workload()
    units = units_of(skeleton, sizes, workload.cache)
    task = _Task(units, dict(budgets), workload.activations, returning)
    planned = task.resident(strategy) or task.offloaded()
    homes_by_key = {key: home for unit, home in zip(units, planned.homes, strict=True) for key in unit.keys}
    homes = {spec.key: homes_by_key[spec.key] for spec in module_order(skeleton)}
    return Placement(
        strategy="balanced" if strategy == "auto" else strategy,
        device_map=compact(homes),
        homes=homes,
        blocks=tuple(
            PlacedBlock(unit.name, home, unit.nbytes, why, unit.paths[1:], unit.cache_bytes)
            for unit, home, why in zip(units, planned.homes, planned.reasons, strict=True)
        ),
        rooms=rooms_of(units, planned.homes, budgets, planned.main, planned.returning, workload.activations),
        main=planned.main,
        bytes_to_read=sum(unit.nbytes for unit in units) if bytes_to_read is None else bytes_to_read,
    )


def rooms_of(
    units: Sequence[Unit],
    homes: Sequence[Home],
    budgets: Budgets,
    main: Home,
    returning: int,
    activations: int,
) -> tuple[Room, ...]:
    """Return what each device holds and keeps free.

    Args:
        units: What was placed.
        homes: Their homes.
        budgets: By device, None for no limit.
        main: The device that runs what lives on a slower one.
        returning: Bytes to keep free where blocks come back.
        activations: Bytes to keep free where something runs.
    """
    fast = set(accelerators_of([*budgets, *homes, main])) | {main}
    rooms = {home: Room(home, budgets.get(home)) for home in in_order({*budgets, *homes, main})}
    for unit, home in zip(units, homes, strict=True):
        rooms[home] = replace(rooms[home], weights=rooms[home].weights + unit.nbytes)
        runs = home if home in fast else main
        rooms[runs] = replace(rooms[runs], cache=rooms[runs].cache + unit.cache_bytes)
    offloads = any(home not in fast for home in homes)
    for home in fast & {*homes, main}:
        busy = home in homes or offloads
        rooms[home] = replace(
            rooms[home], returning=returning if offloads else 0, activations=activations if busy else 0
        )
    return tuple(rooms.values())


@dataclass(slots=True)
class _Planned:
    """Homes of the units, before they become a `Placement`."""

    homes: list[Home]
    reasons: list[str]
    main: Home
    returning: int = 0


class _Task:
    """One planning problem; its methods are the two ways to solve it."""

    def __init__(
        self, units: Sequence[Unit], budgets: dict[Home, int | None], activations: int, returning: int | None
    ) -> None:
        self.units = units
        self.budgets = budgets
        self.activations = activations
        self.fixed_returning = returning
        self.loads = [unit.nbytes + unit.cache_bytes for unit in units]
        self.totals = running_totals(self.loads)
        # Largest weights among the units from each index on.
        self.largest_from = [0] * (len(units) + 1)
        for index in range(len(units) - 1, -1, -1):
            self.largest_from[index] = max(units[index].nbytes, self.largest_from[index + 1])
        used = [home for home in accelerators_of(budgets) if budgets[home] != 0]
        self.fast = used or [CPU]
        self.slow = [home for home in ((CPU, DISK) if used else (DISK,)) if home in budgets]

    # -- everything stays where it runs ----------------------------------------------------------

    def resident(self, strategy: str) -> _Planned | None:
        """Return homes that need no offloading, or None if there are none."""
        rooms = [self._room(home) for home in self.fast]
        if strategy == "sequential":
            ends: list[int] | None = fill_in_order(self.totals, rooms)
            ends = ends if ends and ends[-1] == len(self.units) else None
        else:
            ends = (spare_first if strategy == "balanced_low_0" else spread)(self.totals, rooms)
        if ends is None:
            return None
        homes = [home for home, start, end in self._runs(ends) for _ in range(start, end)]
        reasons = [self._why_resident(strategy, index, homes) for index in range(len(homes))]
        # Nothing is offloaded, so that no device has to run another's blocks.
        return _Planned(homes, reasons, homes[0] if homes else self.fast[0])

    def _why_resident(self, strategy: str, index: int, homes: list[Home]) -> str:
        home = homes[index]
        if len(self.fast) == 1:
            return "everything fits" if home != CPU else "there is no accelerator, and everything fits"
        if strategy == "sequential":
            if home == self.fast[0]:
                return "filled first"
            return f"what came before left no room on {spelled(self.fast[self.fast.index(home) - 1])}"
        load = sum(size for size, other in zip(self.loads, homes, strict=True) if other == home)
        if strategy == "balanced_low_0" and home == self.fast[0]:
            return f"the others are full; {format_bytes(load)} left over"
        spared = self.fast[1:] if strategy == "balanced_low_0" else self.fast
        return f"an even share of {len(spared)}: {format_bytes(load)}"

    # -- some come from a slower home ------------------------------------------------------------

    def offloaded(self) -> _Planned:
        """Return homes where accelerators are full and the rest comes from main memory or disk."""
        self._check_largest()
        best: tuple[int, list[int], Home] | None = None
        for count in range(len(self.units), -1, -1):
            main, rooms = self._rooms_beside(count)
            if main is None:
                continue
            ends = fill_in_order(self.totals, rooms)
            if ends[-1] >= count:
                best = count, [min(end, count) for end in ends], main
                break
        if best is None:
            raise self._no_room_for_cache()
        count, ends, main = best
        homes: list[Home | None] = [None] * len(self.units)
        reasons = [""] * len(self.units)
        for home, start, end in self._runs(ends):
            for index in range(start, end):
                homes[index] = home
                reasons[index] = (
                    f"filled {'first' if home == self.fast[0] else 'in order'}; the model is larger"
                )
        self._fill_gaps(homes, reasons, main)
        self._fill_slow(homes, reasons, main)
        placed = [home for home in homes if home is not None]
        return _Planned(placed, reasons, main, self._returning(homes))

    def _rooms_beside(self, count: int) -> tuple[Home | None, list[int]]:
        """Return the main device and the rooms on all, if the units from `count` on are offloaded."""
        back = self._at_least(self.largest_from[count])
        later = sum(unit.cache_bytes for unit in self.units[count:])
        rooms = [self._room(home) - back for home in self.fast]
        main = next((index for index, room in enumerate(rooms) if room >= later), None)
        if main is None:
            return None, rooms
        rooms[main] -= later
        return self.fast[main], rooms

    def _fill_gaps(self, homes: list[Home | None], reasons: list[str], main: Home) -> None:
        """Give later units that are small enough the room that is left on accelerators."""
        changed = True
        while changed:
            changed = False
            left = {home: self._room(home) - self._returning(homes) for home in self.fast}
            for unit, home in zip(self.units, homes, strict=True):
                if home is not None:
                    left[home] -= unit.nbytes + unit.cache_bytes
                else:
                    left[main] -= unit.cache_bytes
            for index, unit in enumerate(self.units):
                if homes[index] is not None:
                    continue
                for home in reversed(self.fast):
                    # On the main device its cache is counted already.
                    need = unit.nbytes + (0 if home == main else unit.cache_bytes)
                    if need <= left[home]:
                        homes[index], changed = home, True
                        reasons[index] = f"small enough for what is left on {spelled(home)}"
                        left[home] -= need
                        left[main] += 0 if home == main else unit.cache_bytes
                        break

    def _fill_slow(self, homes: list[Home | None], reasons: list[str], main: Home) -> None:
        """Give what is left to main memory and disk, in order; small ones later fill the gaps."""
        left = {home: self.budgets[home] for home in self.slow}
        where = " and ".join(map(spelled, self.fast))
        for index, unit in enumerate(self.units):
            if homes[index] is not None:
                continue
            for home in self.slow:
                room = left[home]
                if room is None or unit.nbytes <= room:
                    homes[index] = home
                    full = where if home == self.slow[0] else f"{where} and {CPU}"
                    reasons[index] = f"{full} full; runs on {spelled(main)}"
                    left[home] = None if room is None else room - unit.nbytes
                    break
            else:
                raise self._nowhere(unit, homes)

    def _returning(self, homes: Sequence[Home | None]) -> int:
        """Return the bytes to keep free for what comes back; units without a home yet count as offloaded."""
        sizes = [unit.nbytes for unit, home in zip(self.units, homes, strict=True) if home not in self.fast]
        return self._at_least(max(sizes)) if sizes else 0

    def _at_least(self, largest: int) -> int:
        return largest if self.fixed_returning is None else max(largest, self.fixed_returning)

    # -- common ----------------------------------------------------------------------------------

    def _room(self, home: Home) -> int:
        """Return what weights and cache may take of a device; a huge number where nothing limits it."""
        budget = self.budgets.get(home, -1)
        return (1 << 62 if budget is None else budget) - self.activations

    def _runs(self, ends: Sequence[int]) -> list[tuple[Home, int, int]]:
        return [(home, start, end) for home, start, end in zip(self.fast, [0, *ends[:-1]], ends, strict=True)]

    # -- what cannot be --------------------------------------------------------------------------

    def _check_largest(self) -> None:
        """Raise where no device that computes can hold the largest block."""
        largest = max(self.units, key=lambda unit: unit.nbytes)
        most = max(self.fast, key=self._room)
        if self._at_least(largest.nbytes) <= self._room(most):
            return
        need = self._at_least(largest.nbytes) + self.activations
        beside = f" beside {format_bytes(self.activations)} of activations" if self.activations else ""
        raise PlacementError(
            f"No device that computes can hold the largest block, {largest.name}",
            where="max_memory",
            expected=f"{format_bytes(need)} or more on {' or '.join(map(spelled, self.fast))}",
            found=_listed({home: self.budgets.get(home, 0) for home in self.fast}),
            mend=f"{largest.name} takes {format_bytes(largest.nbytes)}{beside} and has to be there whole "
            f"when it runs: raise the budget of {spelled(most)}, load in a smaller dtype or quantized, or "
            "leave the small devices out of max_memory.",
        )

    def _no_room_for_cache(self) -> PlacementError:
        cache = sum(unit.cache_bytes for unit in self.units)
        return PlacementError(
            "The key-value cache leaves no room for the blocks that use it",
            where="max_memory",
            expected=f"room for {format_bytes(cache)} of cache, {format_bytes(self.activations)} of "
            f"activations and {format_bytes(self.largest_from[0])}, the largest block",
            found=_listed({home: self.budgets.get(home, 0) for home in self.fast}),
            mend="Plan for a smaller batch or context, or raise the budgets.",
        )

    def _nowhere(self, unit: Unit, homes: Sequence[Home | None]) -> PlacementError:
        left = [unit.name for unit, home in zip(self.units, homes, strict=True) if home is None]
        total = sum(unit.nbytes for unit, home in zip(self.units, homes, strict=True) if home is None)
        return PlacementError(
            f"The budgets cannot hold the model: {len(left)} of {len(self.units)} blocks have no home",
            where="max_memory",
            expected=f"room for {format_bytes(total)} more, from {unit.name} on",
            found=_listed(self.budgets),
            mend="Raise a budget, allow the disk, or load in a smaller dtype or quantized.",
        )


def _listed(budgets: Mapping[Home, int | None]) -> str:
    parts = (
        f"{spelled(home)}: {'no limit' if size is None else format_bytes(size)}"
        for home, size in budgets.items()
    )
    return ", ".join(parts) or "no budget"
