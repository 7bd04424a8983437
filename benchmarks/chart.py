# SPDX-License-Identifier: Apache-2.0
"""A bar chart of ratios as SVG: one bar a figure, the peer at 1, on a logarithmic axis."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from measure import Comparison

_WIDTH, _ROW, _LEFT, _RIGHT = 820, 26, 380, 90
_LOWER, _HIGHER = "#2a7f62", "#b3541e"


def draw(results: list[Comparison], file: Path) -> None:
    """Write the chart.

    Args:
        results: What was found.
        file: Where to.
    """
    rows = [(r.claim, name, ratio) for r in results for name, ratio in r.ratios.items() if ratio > 0]
    reach = max([2.0, *(max(ratio, 1 / ratio) for _, _, ratio in rows)])
    height = _ROW * (len(rows) + 2)
    middle, half = (_LEFT + _WIDTH - _RIGHT) / 2, (_WIDTH - _RIGHT - _LEFT) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{middle}" y="16" text-anchor="middle">ours / peer (logarithmic; the line is 1)</text>',
    ]
    for index, (claim, name, ratio) in enumerate(rows):
        y = _ROW * (index + 1)
        length = half * math.log(ratio) / math.log(reach)
        better = (ratio > 1) == name.startswith("tokens_per")
        parts += [
            f'<text x="8" y="{y + 16}">{escape(claim)}: {escape(name)}</text>',
            f'<rect x="{middle + min(length, 0):.1f}" y="{y + 4}" width="{abs(length):.1f}" height="16" '
            f'fill="{_LOWER if better else _HIGHER}"/>',
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 16}">{ratio:.3g}</text>',
        ]
    parts.append(f'<line x1="{middle}" y1="22" x2="{middle}" y2="{height - 8}" stroke="black"/></svg>')
    file.write_text("\n".join(parts) + "\n")
