# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks and write the figures: ``make bench``, or ``python benchmarks/run.py NAME ...``.

NAME is a script's, or one row of it: ``loading:cold``. ``--quick`` uses a checkpoint of 1 GB instead of 5.57,
fewer rounds, and files of results of its own. Rows that were not run keep their figures.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from chart import draw
from measure import OURS, Comparison, Verdict, write

_ALL = ("import_time", "load_gguf", "loading", "greedy")


def main() -> None:
    """Run what the command line names, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_ALL)}, or loading:ROW")
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, fewer rounds")
    arguments = parser.parse_args()
    file = Path(__file__).parent / "results" / ("quick.json" if arguments.quick else "latest.json")
    for name in arguments.names or _ALL:
        script, _, row = name.partition(":")
        module = import_module(script)
        if script == "loading":
            rows = [row] if row else list(module.CASES)
            found = (module.run([one], is_quick=arguments.quick) for one in rows)
        else:
            found = (module.run() for _ in range(1))
        for results in found:
            for result in results:
                show(result)
            # After each row: a run that is stopped keeps what it has.
            draw(write(results, file), file.with_suffix(".svg"))
    print(f"\nwrote {file} and {file.with_suffix('.svg').name}")


def show(result: Comparison) -> None:
    """Print one comparison as a table.

    Args:
        result: What was found.
    """
    print(f"\n{result.claim}", flush=True)
    for side, figures in result.figures.items():
        print(f"  {side}")
        for name, figure in figures.items():
            values = [value(name, one) for one in (figure.median, figure.least, figure.most)]
            line = f"    {name:<24} {values[0]:>12}  [{values[1]} .. {values[2]}]"
            ratio = result.ratios.get(side, {}).get(name)
            print(line if side == OURS or ratio is None else f"{line}   ours / this {ratio:.3g}")
    for side, failure in result.failures.items():
        print(f"  {side}: {failure}")
    for verdict in result.verdicts:
        print(f"  {outcome(verdict)}: {verdict.text} ({reached(verdict)})", flush=True)


def value(name: str, number: float) -> str:
    """Return a figure in the unit that its name ends in.

    Args:
        name: Name of the figure: ``*_s``, ``*_bytes``, or a plain number.
        number: Its value.
    """
    if name.endswith("_bytes"):
        return f"{number / 1e6:,.0f} MB"
    return f"{number:.3g} s" if name.endswith("_s") and not name.startswith("tokens") else f"{number:.3g}"


def outcome(verdict: Verdict) -> str:
    """Say in a word whether a target was reached.

    Args:
        verdict: The target.
    """
    return {True: "met", False: "MISSED", None: "not measured"}[verdict.is_met]


def reached(verdict: Verdict) -> str:
    """Say what was found, and the bound.

    Args:
        verdict: The target.
    """
    is_ratio = verdict.against is not None
    bound = verdict.most if verdict.most is not None else verdict.least
    texts = [
        "nothing" if one is None else f"{one:.2f}x" if is_ratio else value(verdict.figure, one)
        for one in (verdict.found, bound)
    ]
    return f"{texts[0]}, the bound is {texts[1]}"


if __name__ == "__main__":
    main()
