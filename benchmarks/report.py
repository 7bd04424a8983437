# SPDX-License-Identifier: Apache-2.0
"""Write the measured part of docs/PERFORMANCE.md from results/latest.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from chart import draw
from measure import PEER, Comparison, Figure, Verdict, read

RESULTS = Path(__file__).parent / "results" / "latest.json"
PAGE = Path(__file__).parent.parent / "docs" / "PERFORMANCE.md"
BEGIN = "<!-- written by benchmarks/report.py: begin -->"
END = "<!-- written by benchmarks/report.py: end -->"
# The figures that the page shows, by the heads of their columns; the JSON has them all.
_COLUMNS = {
    "import_s": "import",
    "auto_config_s": "to a config",
    "first_class_after_torch_s": "first class",
    "load_s": "load",
    "both_s": "load",
    "forward_s": "first forward",
    "first_token_s": "first token",
    "total_s": "together",
    "again_s": "a later forward",
    "tokens_per_s": "tokens a second",
    "memory_share": "of memory's rate",
    "peak_bytes": "peak memory",
    "above_model_bytes": "of it above the weights",
    "again_memory_bytes": "memory of later forwards",
}
# Figures of which more is better.
_HIGHER = ("tokens_per_s", "memory_share")
# Differences that a repetition may undo.
_NOISE = 1.05


def main() -> None:
    """Rewrite the page and the picture."""
    machine, results = load(RESULTS)
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), render(machine, results)), encoding="utf-8")
    draw(results, RESULTS.with_suffix(".svg"))
    print(f"wrote {PAGE}")


def load(file: Path) -> tuple[dict[str, str], list[Comparison]]:
    """Return the machine and the results that a JSON file holds.

    Args:
        file: The file.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["machine"], [read(entry) for entry in content["results"]]


def put(page: str, text: str) -> str:
    """Return a page with what stands between the markers replaced.

    Args:
        page: The page.
        text: The new text.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page lacks its markers: {BEGIN}, {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def render(machine: dict[str, str], results: list[Comparison]) -> str:
    """Return the measured part of the page.

    Args:
        machine: What it was measured on.
        results: What was found.
    """
    days = sorted({result.measured.partition(" ")[0] for result in results if result.measured})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        _wrap(f"Measured {when} (UTC) on: {facts}."),
        "## Where we lose",
        _losses(results),
        "## The rows",
    ]
    parts += [_row(result) for result in results]
    return "\n\n".join(parts) + "\n"


def _losses(results: list[Comparison]) -> str:
    lines = []
    for result in results:
        lines += [
            f"- **{result.claim}.** Missed: {verdict.text} ({reached(verdict)})."
            for verdict in result.verdicts
            if verdict.is_met is False
        ]
        lines += [
            f"- **{result.claim}.** Not measured: {verdict.text}."
            for verdict in result.verdicts
            if verdict.is_met is None
        ]
        worse = _worse(result)
        if worse:
            lines.append(f"- **{result.claim}.** Behind {PEER}: {worse}.")
    return "\n".join(_wrap(line) for line in lines) or "In none of these rows."


def _worse(result: Comparison) -> str:
    """Name the figures shown in which the peer does better, beyond noise."""
    found = []
    for name, ratio in result.ratios.get(PEER, {}).items():
        loss = 1 / ratio if name in _HIGHER and ratio else ratio
        if name in _COLUMNS and name != "above_model_bytes" and loss > _NOISE:
            found.append(f"{_COLUMNS[name]} {ratio:.2f}x")
    return ", ".join(found)


def _row(result: Comparison) -> str:
    shown = [name for name in _COLUMNS if any(name in held for held in result.figures.values())]
    lines = [f"### {result.claim}", ""]
    if shown and result.runs:
        lines += [_wrap(f"Medians of {result.runs} rounds, {result.measured}.{_disturbed(result)}"), ""]
    if shown:
        lines += [
            f"| | {' | '.join(_COLUMNS[name] for name in shown)} |",
            f"|---|{'---|' * len(shown)}",
        ]
    for side, held in result.figures.items():
        cells = [_cell(name, held.get(name)) for name in shown]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    for side, failure in result.failures.items():
        lines.append(f"| {side} | {failure} |" + " |" * (len(shown) - 1))
    notes = [
        _wrap(f"- {outcome(verdict)}: {verdict.text} ({reached(verdict)})") for verdict in result.verdicts
    ]
    if notes:
        lines += ["", *notes]
    if result.note:
        lines += ["", _wrap(result.note)]
    return "\n".join(lines)


def _disturbed(result: Comparison) -> str:
    if result.is_quiet:
        return ""
    return (
        f" **The machine was not quiet**: other work took {result.disturbance:.1f} cores meanwhile, so "
        "seconds are too long and ratios uncertain."
    )


def _cell(name: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    low, high = text(name, figure.least), text(name, figure.most)
    middle = text(name, figure.median)
    return middle if low == high else f"{middle} [{low.split()[0]} to {high}]"


def text(name: str, number: float) -> str:
    """Return a figure in the unit that its name ends in.

    Args:
        name: Name of the figure: ``*_bytes``, ``*_s``, or a plain number.
        number: Its value.
    """
    if name.endswith("_bytes"):
        return f"{number / 1e9:.2f} GB"
    if name in _HIGHER or not name.endswith("_s"):
        return f"{number:.3g}"
    return f"{number:.2f} s" if number >= 0.995 else f"{number:.3f} s"


def outcome(verdict: Verdict) -> str:
    """Say whether a target was reached.

    Args:
        verdict: The target.
    """
    return {True: "met", False: "**missed**", None: "not measured"}[verdict.is_met]


def reached(verdict: Verdict) -> str:
    """Say what was found, and the bound.

    Args:
        verdict: The target.
    """
    bound = verdict.most if verdict.most is not None else verdict.least
    texts = [
        "the run failed"
        if one is None
        else f"{one:.2f}x"
        if verdict.against is not None
        else text(verdict.figure, one)
        for one in (verdict.found, bound)
    ]
    return f"{texts[0]}; the bound is {texts[1]}"


def _wrap(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()
