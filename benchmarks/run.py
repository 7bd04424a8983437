# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks and write the figures: ``make bench``, or ``python benchmarks/run.py NAME ...``.

NAME is a script's, or one row of it: ``loading:cold``, ``generation:bf16``. ``--quick`` uses a checkpoint of
1 GB instead of 5.57, fewer rounds, and files of results of its own. Rows that were not run keep their
figures.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from chart import draw
from measure import OURS, Comparison, write
from report import main as write_page
from report import outcome, reached, text

_ALL = ("import_time", "load_gguf", "loading", "generation", "drafts", "packed", "compiled")
_ALL += ("many", "first_character")


def main() -> None:
    """Run what the command line names, or everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(_ALL)}, or SCRIPT:ROW")
    parser.add_argument("--quick", action="store_true", help="a small checkpoint, fewer rounds")
    parser.add_argument("--runs", type=int, help="rounds that count, for the rows of loading")
    arguments = parser.parse_args()
    file = Path(__file__).parent / "results" / ("quick.json" if arguments.quick else "latest.json")
    for name in arguments.names or _ALL:
        script, _, row = name.partition(":")
        module = import_module(script)
        if script == "loading":
            rows = [row] if row else list(module.CASES)
            found = (module.run([one], is_quick=arguments.quick, runs=arguments.runs) for one in rows)
        elif script == "generation":
            found = (module.run([one], runs=arguments.runs) for one in ([row] if row else module.ROWS))
        else:
            found = (module.run() for _ in range(1))
        for results in found:
            for result in results:
                show(result)
            # After each row: a run that is stopped keeps what it has.
            draw(write(results, file), file.with_suffix(".svg"))
    print(f"\nwrote {file} and {file.with_suffix('.svg').name}")
    if not arguments.quick:
        write_page()


def show(result: Comparison) -> None:
    """Print one comparison as a table.

    Args:
        result: What was found.
    """
    print(f"\n{result.claim}", flush=True)
    for side, figures in result.figures.items():
        print(f"  {side}")
        for name, figure in figures.items():
            values = [text(name, one) for one in (figure.median, figure.least, figure.most)]
            line = f"    {name:<24} {values[0]:>12}  [{values[1]} .. {values[2]}]"
            ratio = result.ratios.get(side, {}).get(name)
            print(line if side == OURS or ratio is None else f"{line}   ours / this {ratio:.3g}")
    for side, failure in result.failures.items():
        print(f"  {side}: {failure}")
    if result.disturbance:
        print(f"  other work took {result.disturbance:.1f} cores meanwhile")
    for verdict in result.verdicts:
        print(f"  {outcome(verdict)}: {verdict.text} ({reached(verdict)})", flush=True)


if __name__ == "__main__":
    main()
