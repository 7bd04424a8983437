# SPDX-License-Identifier: Apache-2.0
"""Draws a `Placement` as SVG: a column for each device, blocks stacked in it, free room left white.

All columns share one scale. Where a budget is far larger than what is used, its free room is cut short, with
a break across the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pretrained.core.budgets import DISK, spelled
from pretrained.core.homes import PlacedBlock, Placement, Room, runs
from pretrained.core.report import fold_keys, format_bytes

_COLUMN, _MARGIN, _GAP = 130, 32, 24
# Room for a character of 12 px, on the safe side: fonts differ.
_CHARACTER = 7
_TOP, _HEIGHT, _BOTTOM = 104, 470, 64
_LINE = 17
_FONT = "font-family='Helvetica, Arial, sans-serif'"
# Shades that keep dark text legible; neighbours differ.
_FILLS = ("#a8c8ec", "#c9ddb8", "#f3d6a2", "#d9c3e6", "#f2bfb6", "#b9dedb")
_RESERVED, _FREE, _INK, _FAINT = "#e3e3e3", "#ffffff", "#222222", "#777777"


@dataclass(frozen=True, slots=True)
class _Area:
    """A rectangle of a column."""

    label: str
    nbytes: int
    fill: str
    cuts: tuple[int, ...] = ()
    dashed: bool = False
    shown: int | None = None

    @property
    def height(self) -> int:
        """Bytes that are drawn: all, or what is left of them before the break."""
        return self.nbytes if self.shown is None else self.shown


def draw(placement: Placement, title: str) -> str:
    """Return the picture as an SVG document.

    Args:
        placement: What to draw.
        title: Its heading, usually the model's name.
    """
    rooms = [room for room in placement.rooms if room.peak or room.home != DISK]
    most = max((room.peak for room in rooms), default=0) or 1
    fills = _fills(placement.blocks)
    columns = [_column(room, placement, most, fills) for room in rooms]
    scale = _HEIGHT / (max((sum(area.height for area in areas) for areas in columns), default=0) or 1)
    deepest = max([_HEIGHT, *(_LINE * (len(areas) + 1) for areas in columns)])
    lefts, right = _lefts(columns)
    title, subtitle = _shortened_path(title), _subtitle(placement)
    width = 2 * _MARGIN + max(right - _MARGIN, len(title) * 12, len(subtitle) * 7)
    height = _TOP + deepest + _BOTTOM
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' "
        f"viewBox='0 0 {width} {height}' role='img'>",
        f"<title>{escape(title)}</title>",
        "<defs><pattern id='kept' width='7' height='7' patternUnits='userSpaceOnUse' "
        f"patternTransform='rotate(45)'><rect width='7' height='7' fill='{_RESERVED}'/>"
        f"<line x1='0' y1='0' x2='0' y2='7' stroke='#bdbdbd' stroke-width='3'/></pattern></defs>",
        f"<rect width='{width}' height='{height}' fill='#fbfbfa'/>",
        _text(_MARGIN, 36, title, size=19, bold=True),
        _text(_MARGIN, 58, subtitle, size=13, colour=_FAINT),
    ]
    floor = _TOP + deepest
    for left, room, areas in zip(lefts, rooms, columns, strict=True):
        parts += _draw_column(left, floor, scale, areas)
        parts += _draw_foot(left, floor, room)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _lefts(columns: Sequence[Sequence[_Area]]) -> tuple[list[int], int]:
    """Return where each column begins, with room for its labels, and where the last one's labels end."""
    lefts, at = [], _MARGIN
    for areas in columns:
        lefts.append(at)
        longest = max((len(_shortened(area.label)) for area in areas), default=0)
        at += _COLUMN + 23 + longest * _CHARACTER + _GAP
    return lefts, at - _GAP


def _shortened_path(title: str, most: int = 90) -> str:
    return title if len(title) <= most else f"…{title[-most:]}"


def _fills(blocks: Sequence[PlacedBlock]) -> dict[str, str]:
    """Return a colour for each kind of block, the same on every device."""
    kinds = list(dict.fromkeys(_kind(block.name) for block in blocks))
    return {kind: _FILLS[index % len(_FILLS)] for index, kind in enumerate(kinds)}


def _kind(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return stem if last.isdecimal() else name


def _column(room: Room, placement: Placement, most: int, fills: dict[str, str]) -> list[_Area]:
    """Return a device's areas, from the floor up."""
    areas = []
    for run in runs([block for block in placement.blocks if block.home == room.home]):
        size = sum(block.nbytes for block in run)
        tied = sum(len(block.tied) for block in run)
        also = f" (+{tied} tied)" if tied else ""
        label = f"{fold_keys([block.name for block in run])[0]}{also}  {format_bytes(size)}"
        cuts = tuple(block.nbytes for block in run) if len(run) > 1 else ()
        areas.append(_Area(label, size, fills[_kind(run[0].name)], cuts))
    for what, size in (
        ("kept for blocks that return", room.returning),
        ("kept for the key-value cache", room.cache),
        ("kept for activations", room.activations),
    ):
        if size:
            areas.append(_Area(f"{what}  {format_bytes(size)}", size, "url(#kept)"))
    if room.free is not None and room.free > 0:
        # Free room that would dwarf the fullest column is cut short.
        shown = min(room.free, int(1.3 * most) - room.peak)
        areas.append(_Area(f"free  {format_bytes(room.free)}", room.free, _FREE, dashed=True, shown=shown))
    return areas


def _draw_column(left: int, floor: int, scale: float, areas: Sequence[_Area]) -> list[str]:
    parts: list[str] = []
    middles: list[float] = []
    bottom = float(floor)
    for area in areas:
        height = area.height * scale
        top = bottom - height
        dash = " stroke-dasharray='5 4'" if area.dashed else ""
        parts.append(
            f"<rect x='{left}' y='{top:.1f}' width='{_COLUMN}' height='{height:.1f}' fill='{area.fill}' "
            f"stroke='{_INK}' stroke-width='0.8'{dash}/>"
        )
        parts += _draw_cuts(left, bottom, scale, area.cuts)
        if area.height < area.nbytes:
            parts += _draw_break(left, top + 14)
        middles.append((top + bottom) / 2)
        bottom = top
    for middle, y, area in zip(middles, _spaced(middles, floor), areas, strict=True):
        edge = left + _COLUMN
        parts.append(
            f"<path d='M{edge} {middle:.1f} L{edge + 12} {y:.1f} H{edge + 18}' fill='none' "
            f"stroke='{_FAINT}' stroke-width='0.8'/>"
        )
        parts.append(_text(edge + 23, y + 4, _shortened(area.label), size=12))
    return parts


def _draw_cuts(left: int, bottom: float, scale: float, cuts: Sequence[int]) -> list[str]:
    """Return faint lines between the blocks of an area, where they are far enough apart to be seen."""
    lines = []
    for size in cuts[:-1]:
        bottom -= size * scale
        if size * scale >= 3:
            lines.append(
                f"<line x1='{left}' x2='{left + _COLUMN}' y1='{bottom:.1f}' y2='{bottom:.1f}' "
                "stroke='#ffffff' stroke-width='1'/>"
            )
    return lines


def _draw_break(left: int, y: float) -> list[str]:
    """Return a zigzag across a column whose height is not to scale."""
    step = _COLUMN / 10
    points = " ".join(f"{left + i * step:.1f},{y + (4 if i % 2 else -4):.1f}" for i in range(11))
    return [f"<polyline points='{points}' fill='none' stroke='{_FAINT}' stroke-width='1.2'/>"]


def _draw_foot(left: int, floor: int, room: Room) -> list[str]:
    budget = ", no limit" if room.budget is None else f" of {format_bytes(room.budget)}"
    return [
        _text(left, floor + 22, spelled(room.home), size=15, bold=True),
        _text(left, floor + 41, f"{format_bytes(room.weights)}{budget}", size=12, colour=_FAINT),
    ]


def _spaced(middles: Sequence[float], floor: int) -> list[float]:
    """Return heights for labels, from the floor up: near their areas, a line apart."""
    placed: list[float] = []
    at = float(floor) + _LINE - 4
    for middle in middles:
        at = min(middle, at - _LINE)
        placed.append(at)
    at = float(_TOP - _LINE)
    for index in range(len(placed) - 1, -1, -1):
        at = placed[index] = max(placed[index], at + _LINE)
    return placed


def _subtitle(placement: Placement) -> str:
    words = [f"{placement.strategy}", f"{format_bytes(placement.bytes_to_read)} to read"]
    words += [
        f"{spelled(home)} at most {format_bytes(size)}" for home, size in placement.peak.items() if size
    ]
    if placement.offloaded:
        words.append(f"offloaded blocks run on {spelled(placement.main)}")
    return "  ·  ".join(words)


def _shortened(label: str, most: int = 38) -> str:
    name, gap, size = label.rpartition("  ")
    room = most - len(gap) - len(size)
    return label if len(name) <= room else f"{name[: room - 1]}…{gap}{size}"


def _text(x: float, y: float, words: str, *, size: int, bold: bool = False, colour: str = _INK) -> str:
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:.0f}' y='{y:.1f}' {_FONT} font-size='{size}'{weight} fill='{colour}' "
        f"xml:space='preserve'>{escape(words)}</text>"
    )
