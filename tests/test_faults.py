# SPDX-License-Identifier: Apache-2.0
"""The fault suite: its rules, its page, and that this library passes it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "FAULTS.md"


def module(name):
    """Load a module of tools/faults under a name that no other has."""
    spec = importlib.util.spec_from_file_location(f"faults_{name}", ROOT / "tools" / "faults" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


rules, cases = module("rules"), module("cases")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"error": "w.bin is 5 bytes short"}, "good"),
        ({"error": "short", "log": "W.BIN: 5 bytes"}, "good"),
        ({"error": "w.bin"}, "vague"),
        ({"error": "5 bytes"}, "vague"),
        ({"error": ""}, "vague"),
        ({"right": True}, "good"),
        ({}, "silent"),
        ({"log": "w.bin is 5 bytes short"}, "vague"),
        ({"log": "something is wrong"}, "silent"),
        ({"error": "w.bin is 5 bytes short", "intact": False}, "silent"),
        ({"right": True, "intact": False}, "silent"),
        ({"died": "SIGSEGV"}, "crash"),
        ({"error": "w.bin is 5 bytes short", "kind": "MemoryError"}, "crash"),
        ({"error": "w.bin is 5 bytes short", "executed": True}, "executed"),
        ({"died": "SIGSEGV", "executed": True}, "executed"),
    ],
)
def test_the_rules(values, expected):
    assert rules.grade(rules.Outcome(**values), ("w.bin",), ("bytes",)) == expected


def test_every_case_can_be_good():
    """A case without words and without a right result could not be passed by anybody."""
    titles = [(case.group, case.name) for case in cases.CASES]
    assert len(set(titles)) == len(titles) >= 60
    assert all((case.place and case.fact) or case.right for case in cases.CASES)


def rows(text):
    """The grades of a printed table: by case, one for each library."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: [mark.strip("*") for mark in line[1:]] for line in lines if ": " in line[0]}


def test_the_page_has_every_case():
    page = PAGE.read_text()
    found = rows(page)
    assert {f"{case.group}: {case.name}" for case in cases.CASES} < found.keys()
    assert len(found) == len(cases.CASES) + 1
    assert all(len(marks) == 2 and set(marks) <= set(rules.GRADES) for marks in found.values())
    assert not {"silent", "crash", "executed"} & {marks[0] for marks in found.values()}
    assert re.search(r"\d{4}-\d\d-\d\d: pretrained [\d.]+\S*, transformers 5[\d.]+; torch ", page)
    assert all(line in page for line in rules.RULES.splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in copies of a process")
def test_nothing_is_silent_crashes_or_executes():
    command = [sys.executable, ROOT / "tools" / "faults" / "run.py", "--only", "pretrained", "--texts"]
    path = os.pathsep.join(part for part in sys.path if part)
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = rows(done.stdout)
    assert len(found) == len(cases.CASES) + 1
    bad = {title: marks for title, marks in found.items() if marks[0] not in ("good", "vague")}
    assert not bad, done.stdout
    assert sum(marks[0] == "good" for marks in found.values()) >= len(found) - 5
