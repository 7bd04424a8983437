# SPDX-License-Identifier: Apache-2.0
"""Every example in README.md, CONTRIBUTING.md and docs/ runs, and prints what the page says it prints.

A page's Python blocks run in order, in one namespace, in an empty folder laid out like the root of a clone
after ``make models``. What pages may contain:

- ``python``: run; a line ``expression  # -> value`` is checked, and what the block prints must be shown in
  the ``text`` block after it. ``python no-run: <reason>`` is only compiled.
- ``console``: lines beginning with ``$ `` are run where they call ``pretrained``; the output follows them.
  ``console measured`` leaves out the figures that differ from run to run.
- ``sh`` and others: not run.

Expected text may be wrapped differently, and ``...`` stands for anything.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest

import pretrained

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ".cache/models"
FENCE = re.compile(r"^```(\S*)[ ]*([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MEASURED = re.compile(r"\d+(\.\d+)? (?:s|ms|MB|GB)\b|\d+(\.\d+)?(?= a second)")
# The commands that a page may show, and what runs for each.
COMMANDS = {"pretrained": ["pretrained"], "make demo": ["pretrained", "demo", "--models", MODELS]}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, its text and the line where that begins."""

    language: str
    note: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], found[3], text.count("\n", 0, found.start(3)) + 1)
        for found in FENCE.finditer(text)
    ]


def fits(expected: str, found: str) -> bool:
    return doctest.OutputChecker().check_output(expected.rstrip() + "\n", found.rstrip() + "\n", OPTIONS)


def expectations(source: str) -> dict[int, str]:
    """Return what stands after ``# ->``, by line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    return {line: text[4:].strip() for line, text in comments.items() if text.startswith("# ->")}


def run_block(block: Block, page: Path, namespace: dict) -> str:
    """Run a Python block statement by statement; return what it printed."""
    expected = expectations(block.text)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for statement in ast.parse(block.text).body:
            wanted = expected.pop(statement.end_lineno, None)
            ast.increment_lineno(statement, block.line - 1)
            if wanted is None:
                code = compile(ast.Module([statement], []), str(page), "exec")
                exec(code, namespace)
                continue
            assert isinstance(statement, ast.Expr), f"{page.name}:{statement.lineno}: no value to compare"
            value = eval(compile(ast.Expression(statement.value), str(page), "eval"), namespace)
            assert fits(wanted, repr(value)), f"{page.name}:{statement.end_lineno}: {value!r}, not {wanted}"
    assert not expected, f"{page.name}: '# ->' not at the end of a statement: {expected}"
    return printed.getvalue()


def lay_out(folder: Path, text: str, request: pytest.FixtureRequest) -> None:
    """Make a folder look like the root of a clone, as far as a page needs it."""
    if MODELS in text or "make demo" in text:
        gguf, minilm = request.getfixturevalue("smollm2_gguf"), request.getfixturevalue("minilm_dir")
        assert gguf.parents[1] == minilm.parents[1]
        (folder / ".cache").mkdir()
        (folder / MODELS).symlink_to(gguf.parents[1].resolve(), target_is_directory=True)
    if "tests/data" in text:
        (folder / "tests").mkdir()
        (folder / "tests" / "data").symlink_to(ROOT / "tests" / "data", target_is_directory=True)
    if text.startswith("# Sharing"):
        serve_a_hub(folder, request)


def serve_a_hub(folder: Path, request: pytest.FixtureRequest) -> None:
    """Let a page talk to a Hub of its own on loopback, in which it is the user "me"."""
    from huggingface_hub import close_session, constants

    from support.hub_server import HubServer

    monkeypatch = request.getfixturevalue("monkeypatch")
    hub = request.getfixturevalue("hub_servers").enter_context(HubServer())
    hub.add("somebody/else", {"config.json": b"{}"})
    request.addfinalizer(close_session)
    for name, value in hub.constants().items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / ".hub"))
    # For commands, which are processes of their own.
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / ".hub"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_me")


@pytest.fixture
def hub_servers():
    with contextlib.ExitStack() as stack:
        yield stack


def pages(language: str) -> list:
    found = []
    for page in PAGES:
        wanted = [block for block in blocks(page) if block.language == language]
        if wanted:
            real = MODELS in page.read_text(encoding="utf-8")
            marks = [pytest.mark.realweights, pytest.mark.slow] if real else []
            found.append(pytest.param(page, marks=marks, id=page.name))
    return found


@pytest.mark.parametrize("page", pages("python"))
def test_python_examples(page, tmp_path, monkeypatch, request):
    lay_out(tmp_path, page.read_text(encoding="utf-8"), request)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as for a script that lies there
    # Examples register classes of their own; other tests must not see them.
    monkeypatch.setattr(pretrained.AutoConfig, "_registered", {})
    for name in pretrained.__all__:
        if name.startswith("AutoModel"):
            monkeypatch.setattr(getattr(pretrained, name), "_registered", {})
    namespace: dict = {"__name__": "__main__"}
    printed, line = "", 0
    for block in blocks(page):
        if block.language == "text":
            assert fits(block.text, printed), f"{page.name}:{block.line}: printed instead:\n{printed}"
            printed = ""
        elif block.language == "python":
            assert not printed, f"{page.name}:{line}: the page does not show what this prints:\n{printed}"
            if block.note:
                assert block.note.startswith("no-run: "), f"{page.name}:{block.line}: {block.note}"
                compile(block.text, str(page), "exec")
            else:
                printed, line = run_block(block, page, namespace), block.line
    assert not printed, f"{page.name}:{line}: the page does not show what this prints:\n{printed}"


def commands(block: Block) -> list[tuple[str, str]]:
    """Return each command of a console block with the output that the page shows for it."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"line {block.line}: output before the first command"
    return [tuple(part.partition("\n")[::2]) for part in parts[1:]]


def run_command(command: str, folder: Path) -> str:
    """Run a command that a page shows, as in a terminal of 100 columns; return both streams as one."""
    known = max((name for name in COMMANDS if command.startswith(name)), key=len, default=None)
    assert known is not None, f"pages show only commands that call pretrained, not {command!r}"
    words = [*COMMANDS[known], *shlex.split(command.removeprefix(known))]
    source = str(Path(pretrained.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": source,
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "0" if "127.0.0.1" in os.environ.get("HF_ENDPOINT", "") else "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pretrained.cli.main", *words[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("page", pages("console"))
def test_console_examples(page, tmp_path, request):
    lay_out(tmp_path, page.read_text(encoding="utf-8"), request)
    for block in blocks(page):
        if block.language != "console":
            continue
        assert block.note in ("", "measured"), f"{page.name}:{block.line}: {block.note}"
        for command, expected in commands(block):
            found = run_command(command, tmp_path)
            if block.note == "measured":
                assert fits(MEASURED.sub("#", expected), MEASURED.sub("#", found)), found
            else:
                assert fits(expected, found), f"{page.name}: {command}\n{found}"


def test_make_demo_is_the_command_that_stands_for_it():
    recipe = re.search(r"^demo:.*\n\t(.+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None and recipe[1] == "$(BIN)/pretrained demo"


def test_this_test_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n1 + 1  # -> 3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2: 2, not 3"):
        run_block(blocks(page)[0], page, {})
    page.write_text("```python\nx = 1  # -> 1\n```\n")
    with pytest.raises(AssertionError, match="no value to compare"):
        run_block(blocks(page)[0], page, {})
    assert not fits("one two", "one three")
    assert fits("one\n  two", "one two\n")
