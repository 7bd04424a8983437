# SPDX-License-Identifier: Apache-2.0
"""A slice of tools/fuzz.py: mutated files are loaded or refused, nothing else."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")


def fuzz(*arguments, timeout):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools" / "fuzz.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_slice(tmp_path):
    fuzz("--seed", 5, "--count", 1500, "--batch", 300, "--record", tmp_path / "counts.json", timeout=120)
    record = json.loads((tmp_path / "counts.json").read_text())
    assert record["inputs"] >= 1500
    # A mutator that only breaks files, or never does, tests nothing.
    assert all(row.get("loaded") and row.get("refused") for row in record["kinds"].values()), record


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_thousand(tmp_path):
    fuzz("--seed", 6, "--count", 100_000, timeout=1700)


def test_the_record_is_of_a_whole_run():
    record = json.loads((ROOT / "docs" / "fuzzing.json").read_text())
    assert record["inputs"] >= 100_000
    assert record["bugs"] == 0
    page = (ROOT / "docs" / "FUZZING.md").read_text()
    for kind, row in record["kinds"].items():
        assert f"| `{kind}` | {row.get('loaded', 0):,} | {row.get('refused', 0):,} |" in page


def test_inputs_are_the_same_each_time():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    data = bytes(range(256))
    first, again, other = (tool.mutate_bytes(data, tool.random.Random(seed)) for seed in ("1", "1", "2"))
    assert first == again != data
    assert first != other
