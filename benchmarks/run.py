# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark and write the figures: ``make bench`` (or ``python benchmarks/run.py NAME ...``)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from chart import draw
from measure import Comparison, write

_ALL = ("import_time", "load_gguf", "greedy")


def main(names: list[str]) -> None:
    """Run the named benchmarks, or all of them.

    Args:
        names: Script names.
    """
    results: list[Comparison] = []
    for name in names or _ALL:
        found = import_module(name).run()
        results += found
        for result in found:
            show(result)
    folder = Path(__file__).parent / "results"
    write(results, folder / "latest.json")
    draw(results, folder / "latest.svg")
    print(f"\nwrote {folder}/latest.json and latest.svg")


def show(result: Comparison) -> None:
    """Print one comparison as a table.

    Args:
        result: What was found.
    """
    print(f"\n{result.claim} (target: {result.target})")
    for name, figure in result.ours.items():
        line = f"  {name:<28} {figure.median:>12.4g}  [{figure.least:.4g} .. {figure.most:.4g}]"
        if name in result.peer:
            theirs = result.peer[name]
            line += f"   peer {theirs.median:>10.4g}  [{theirs.least:.4g} .. {theirs.most:.4g}]"
            line += f"   ours/peer {result.ratios[name]:.3g}"
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
