# SPDX-License-Identifier: Apache-2.0
"""Device maps that users write: checked as a whole, before a byte is read, and turned into a `Placement`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrained.core.budgets import CPU, DISK, Home, accelerators_of, in_order, parse_home, spelled
from pretrained.core.homes import PlacedBlock, Placement, Room
from pretrained.core.placement import Workload, rooms_of
from pretrained.core.report import fold_keys, format_bytes
from pretrained.core.skeleton import Skeleton
from pretrained.core.units import Unit, covering, module_order, units_of
from pretrained.errors import PlacementError, did_you_mean

_MANY = 10


def check_device_map(
    skeleton: Skeleton,
    device_map: Mapping[str, Any],
    available: Iterable[Home] | Mapping[Home, int | None],
    *,
    sizes: Mapping[str, int] | None = None,
    modules: Iterable[str] = (),
    workload: Workload | None = None,
    bytes_to_read: int | None = None,
) -> Placement:
    """Check a device map and say what it means.

    An entry covers everything under its module, except what has a longer entry of its own. A tied weight
    lives where the key that owns it does; an entry for a module around an alias does not move it.

    Args:
        skeleton: What the model promises, with its blocks marked.
        device_map: Module path (``""`` for the model) or parameter key -> device in any spelling.
        available: The homes there are (indices, ``"cpu"``, ``"disk"``); with budgets, these are kept.
        sizes: Bytes of each weight by key; None where nobody needs them, and then budgets are not compared.
        modules: Paths of further modules, without weights, that a map may name.
        workload: Key-value cache and activations to keep room for.
        bytes_to_read: For the report; None for the sum of the sizes.

    Returns:
        The placement. A block that the map splits is allowed, and noted.

    Raises:
        PlacementError: modules that the model does not have, weights without an entry, a device that is not
            there, a tied weight told to live in two homes, or a budget that is overdrawn; all of a kind at
            once.
    """
    order = [spec.key for spec in module_order(skeleton)]
    given = _sorted_by_module(_parsed(device_map), order, modules)
    _check_homes(given, available)
    _check_covers(given, skeleton)
    homes, notes = _homes(given, skeleton, order)
    workload = workload or Workload()
    known = sizes if sizes is not None else dict.fromkeys(skeleton.params, 0)
    pieces = _pieces(units_of(skeleton, known, workload.cache), homes, skeleton, known)
    notes += _split_notes(pieces)
    budgets = dict(available) if isinstance(available, Mapping) and sizes is not None else {}
    units, places = [unit for unit, _ in pieces], [home for _, home in pieces]
    fast = accelerators_of(places) or [CPU]
    largest = max((unit.nbytes for unit, home in pieces if home not in fast), default=0)
    main = _main(units, places, budgets, fast, largest, workload.activations)
    rooms = rooms_of(units, places, budgets, main, largest, workload.activations)
    _check_budgets(rooms, main, pieces)
    return Placement(
        strategy="given",
        device_map=given,
        homes=homes,
        blocks=tuple(
            PlacedBlock(unit.name, home, unit.nbytes, "as given", unit.paths[1:], unit.cache_bytes)
            for unit, home in pieces
        ),
        rooms=rooms,
        main=main,
        bytes_to_read=sum(unit.nbytes for unit in units) if bytes_to_read is None else bytes_to_read,
        notes=tuple(notes),
    )


# -- what the entries say ------------------------------------------------------------------------


def _parsed(device_map: Mapping[str, Any]) -> dict[str, Home]:
    if not isinstance(device_map, Mapping) or not device_map:
        raise PlacementError(
            "A device map names modules and their homes",
            where="device_map",
            expected="such as {'encoder': 0, 'decoder': 'cpu'}",
            found=repr(device_map),
        )
    for path in device_map:
        if not isinstance(path, str):
            raise PlacementError(
                "A device map's keys are module paths",
                where="device_map",
                expected="text such as 'encoder.block.0', or '' for the whole model",
                found=repr(path),
            )
    return {path: parse_home(home, where=f"device_map[{path!r}]") for path, home in device_map.items()}


def _sorted_by_module(
    given: Mapping[str, Home], order: Sequence[str], modules: Iterable[str]
) -> dict[str, Home]:
    """Return the entries in module order; raise for those that name nothing."""
    first: dict[str, int] = {"": 0}
    for index, key in enumerate(order):
        first.setdefault(key, index)
        at = key.find(".")
        while at >= 0:
            first.setdefault(key[:at], index)
            at = key.find(".", at + 1)
    empty = set(modules) - set(first)
    unknown = [path for path in given if path not in first and path not in empty]
    if unknown:
        known = sorted({*first, *empty} - {""})
        near = " ".join(filter(None, (did_you_mean(path, known) for path in unknown[:_MANY])))
        tops = list(dict.fromkeys(key.partition(".")[0] for key in order))
        raise PlacementError(
            "The device map names modules that the model does not have",
            where="device_map",
            expected=f"paths under {_listed(tops)}",
            found=_listed([repr(path) for path in unknown]),
            mend=near or "model.named_modules() lists the paths.",
        )
    last = len(order)
    return dict(sorted(given.items(), key=lambda item: (first.get(item[0], last), item[0].count("."))))


def _check_homes(given: Mapping[str, Home], available: Iterable[Home]) -> None:
    there = set(available)
    absent = {path: home for path, home in given.items() if home not in there}
    if absent:
        raise PlacementError(
            "The device map names a device that is not there",
            where="device_map",
            expected="one of " + (", ".join(map(repr, in_order(there))) or "none"),
            found=_listed([f"{path!r}: {home!r}" for path, home in absent.items()]),
            mend="Map these modules to a device that is there, or pass device_map='auto'.",
        )


def _check_covers(given: Mapping[str, Home], skeleton: Skeleton) -> None:
    bare = [key for key in skeleton.params if covering(key, given) is None]
    if bare:
        modules = fold_keys(dict.fromkeys(key.rpartition(".")[0] or key for key in bare))
        example = bare[0].rpartition(".")[0] or bare[0]
        raise PlacementError(
            f"The device map is incomplete: {len(bare)} weights have no home",
            where="device_map",
            expected="an entry for each module, or one for a module around it",
            found=f"none for {_listed(modules)}",
            mend=f"Add {example!r}, or '' for everything that is not named.",
        )


def _homes(
    given: Mapping[str, Home], skeleton: Skeleton, order: Sequence[str]
) -> tuple[dict[str, Home], list[str]]:
    """Return the home of each parameter and buffer, ties resolved."""
    entries = {key: covering(key, given) for key in order}
    # A derived buffer that the map forgot costs bytes only: it goes with the first entry.
    homes = {key: given[entry if entry is not None else next(iter(given))] for key, entry in entries.items()}
    notes: list[str] = []
    clashes: list[str] = []
    for alias, owner in skeleton.ties.items():
        if alias not in homes or owner not in homes or homes[alias] == homes[owner]:
            continue
        entry = entries[alias]
        if entry in (alias, alias.rpartition(".")[0]):
            clashes.append(f"{alias} ({homes[alias]!r}) is {owner} ({homes[owner]!r})")
        else:
            notes.append(
                f"{alias} is tied to {owner} and lives with it on {spelled(homes[owner])}, "
                f"not on {spelled(homes[alias])} with {entry}"
            )
            homes[alias] = homes[owner]
    if clashes:
        alias = next(a for a in skeleton.ties if a in homes and homes[a] != homes[skeleton.ties[a]])
        raise PlacementError(
            "The device map tells tied weights, which are one tensor, to live in two homes",
            where="device_map",
            found="; ".join(clashes[:_MANY]),
            mend=f"Give {entries[alias]!r} the home {homes[skeleton.ties[alias]]!r}, or leave its entry out.",
        )
    return homes, notes


# -- what they cost ------------------------------------------------------------------------------


def _pieces(
    units: Sequence[Unit], homes: Mapping[str, Home], skeleton: Skeleton, sizes: Mapping[str, int]
) -> list[tuple[Unit, Home]]:
    """Return each unit with its home; one that the map splits comes as one piece for each home."""
    found: list[tuple[Unit, Home]] = []
    for unit in units:
        parts: dict[Home, list[str]] = {}
        for key in unit.keys:
            parts.setdefault(homes[key], []).append(key)
        if len(parts) == 1:
            found.append((unit, next(iter(parts))))
            continue
        for index, (home, keys) in enumerate(parts.items()):
            own = [key for key in keys if key not in skeleton.ties]
            nbytes = sum(sizes.get(key, 0) for key in own)
            paths = tuple(path for path in unit.paths if any(covering(key, {path: 0}) for key in keys))
            found.append((Unit(paths, tuple(keys), nbytes, 0 if index else unit.cache_bytes), home))
    return found


def _split_notes(pieces: Sequence[tuple[Unit, Home]]) -> list[str]:
    homes: dict[str, list[Home]] = {}
    for unit, home in pieces:
        homes.setdefault(unit.name, []).append(home)
    return [
        f"{name} is split over {' and '.join(map(spelled, places))}: activations are moved inside it"
        for name, places in homes.items()
        if len(places) > 1
    ]


def _main(
    units: Sequence[Unit],
    places: Sequence[Home],
    budgets: Mapping[Home, int | None],
    fast: Sequence[Home],
    largest: int,
    activations: int,
) -> Home:
    """Return the first device that computes and has room for what comes back; else the first."""
    for home in fast:
        rooms = rooms_of(units, places, budgets, home, largest, activations)
        if all(room.free is None or room.free >= 0 for room in rooms if room.home == home):
            return home
    return fast[0]


def _check_budgets(rooms: Sequence[Room], main: Home, pieces: Sequence[tuple[Unit, Home]]) -> None:
    over = [room for room in rooms if room.free is not None and room.free < 0]
    if not over:
        return
    room = over[0]
    parts = [f"{format_bytes(room.weights)} of weights"]
    if room.returning:
        slow = [(unit.nbytes, unit.name) for unit, home in pieces if home in (CPU, DISK) and home != main]
        name = max(slow)[1]
        parts.append(f"{format_bytes(room.returning)} for {name}, which comes back to run")
    parts += [f"{format_bytes(room.cache)} of key-value cache"] if room.cache else []
    parts += [f"{format_bytes(room.activations)} of activations"] if room.activations else []
    here = fold_keys(unit.name for unit, home in pieces if home == room.home)
    raise PlacementError(
        f"The device map puts more on {spelled(room.home)} than its budget holds",
        where="max_memory",
        expected=f"at most {format_bytes(room.budget or 0)}",
        found=f"{format_bytes(room.peak)}: {', '.join(parts)}",
        mend=f"Move some of {_listed(here)} elsewhere, raise the budget, or pass device_map='auto'.",
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MANY])
    return shown if len(names) <= _MANY else f"{shown} and {len(names) - _MANY} more"
