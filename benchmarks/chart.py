# SPDX-License-Identifier: Apache-2.0
"""The results as an SVG picture: a panel for each row, a bar for each side, and the bounds that were set."""

from __future__ import annotations

from html import escape
from pathlib import Path

from measure import OURS, Comparison, Figure

_WIDTH, _LEFT, _BAR, _GAP = 900, 190, 340, 26
_LINE, _TITLE, _SPACE = 19, 24, 18
_OURS, _OTHER, _RANGE, _BOUND = "#1f7a5c", "#a9b3bb", "#333333", "#c2410c"
_HALO = 'stroke="white" stroke-width="3" paint-order="stroke"'
# The figure that a row is about, first found first; what stands beside it in the second column.
_SPEED = ("again_s", "total_s", "both_s", "first_class_after_torch_s", "tokens_per_s")
_MEMORY = ("again_memory_bytes", "peak_bytes")
_COLUMNS = ((_LEFT, _BAR), (_LEFT + _BAR + _GAP + 90, 150))


def draw(results: list[Comparison], file: Path) -> None:
    """Write the picture.

    Args:
        results: What was found.
        file: Where to.
    """
    parts: list[str] = []
    y = 12
    for result in results:
        y = _panel(result, y, parts)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{y}" fill="white"/>'
    )
    file.write_text("\n".join([head, *parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(result: Comparison, y: int, parts: list[str]) -> int:
    """Draw one row's bars from `y` down; return where the next begins."""
    claim = f'<tspan font-weight="bold">{escape(result.claim)}</tspan>'
    aside = "" if result.is_quiet else f'<tspan fill="{_BOUND}">, measured beside other work</tspan>'
    parts.append(f'<text x="10" y="{y + 14}">{claim}{aside}</text>')
    y += _TITLE
    columns = [name for names in (_SPEED, _MEMORY) if (name := _first(result, names))]
    for place, name in zip(_COLUMNS, columns, strict=False):
        _column(result, name, place, y, parts)
    for index, side in enumerate([*result.figures, *result.failures]):
        middle = y + index * _LINE + 13
        weight = ' font-weight="bold"' if side == OURS else ""
        parts.append(f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end"{weight}>{escape(side)}</text>')
        if side in result.failures:
            text = escape(result.failures[side])
            parts.append(f'<text x="{_LEFT}" y="{middle}" fill="{_BOUND}">{text}</text>')
    return y + _LINE * (len(result.figures) + len(result.failures)) + _SPACE


def _first(result: Comparison, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in result.figures.get(OURS, {})), None)


def _column(result: Comparison, name: str, place: tuple[int, int], y: int, parts: list[str]) -> None:
    left, width = place
    # A side that only reads files has one figure, its seconds.
    found = {
        side: figures.get(name) or (figures.get("total_s") if name.endswith("_s") else None)
        for side, figures in result.figures.items()
    }
    bounds = _bounds(result, name, found)
    labels: list[str] = []
    reach = max([*(figure.most for figure in found.values() if figure), *bounds]) or 1.0
    for index, (side, figure) in enumerate(found.items()):
        if figure is None:
            continue
        top = y + index * _LINE + 2
        length, least, most = (width * one / reach for one in (figure.median, figure.least, figure.most))
        colour = _OURS if side == OURS else _OTHER
        parts += [
            f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{_LINE - 5}" fill="{colour}"/>',
            f'<path d="M{left + least:.1f} {top + 7}H{left + most:.1f}" stroke="{_RANGE}"/>',
        ]
        # A bound may run through the text, which then stands on white.
        label = f'<text x="{left + most + 6:.1f}" y="{top + 11}" {_HALO}>{_text(name, figure)}</text>'
        labels.append(label)
    for bound in bounds:
        x = left + width * bound / reach
        end = y + _LINE - 1
        parts.append(f'<path d="M{x:.1f} {y}V{end}" stroke="{_BOUND}" stroke-width="2"/>')
    parts += labels


def _bounds(result: Comparison, name: str, found: dict[str, Figure | None]) -> list[float]:
    """Return where the targets of a figure lie, in its unit."""
    bounds = []
    for verdict in result.verdicts:
        bound = verdict.most if verdict.most is not None else verdict.least
        if verdict.figure != name or bound is None:
            continue
        other = found.get(verdict.against or "")
        if verdict.against is None:
            bounds.append(bound)
        elif other is not None:
            bounds.append(bound * other.median)
    return bounds


def _text(name: str, figure: Figure) -> str:
    if name.endswith("_bytes"):
        return f"{figure.median / 1e9:.2f} GB"
    if name.startswith("tokens_per"):
        return f"{figure.median:.0f} tokens/s"
    return f"{figure.median:.2f} s" if figure.median >= 0.1 else f"{figure.median * 1e3:.0f} ms"
