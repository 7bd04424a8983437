# SPDX-License-Identifier: Apache-2.0
"""Links and file names in the documents lead somewhere, and ARCHITECTURE.md names every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "pretrained"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# `core/plan.py`, `torch/models/*.py`, `docs/LOADING.md`; not bare names, which may be a user's own files.
NAMED = re.compile(r"`?\b((?:[\w.-]+/)+[\w*.-]+\.(?:py|pyi|md|svg))\b")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_files(text: str) -> set[str]:
    return set(NAMED.findall(FENCED.sub("", text)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in named_files(page.read_text(encoding="utf-8")):
        assert any(next(base.glob(name), None) for base in (SOURCE, ROOT, SOURCE.parent)), (
            f"{page.name}: {name}"
        )


def test_architecture_names_every_module():
    patterns = named_files((ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    named = {file for pattern in patterns for file in SOURCE.glob(pattern)}
    top = {SOURCE / name for name in ("__init__.py", "errors.py", "auto.py")}
    modules = {file for file in SOURCE.rglob("*.py") if file.name != "__init__.py"}
    left = sorted(str(file.relative_to(SOURCE)) for file in modules - named - top)
    assert not left, f"add them to docs/ARCHITECTURE.md: {left}"


def test_adding_a_model_names_every_attribute_that_a_class_can_set():
    source = (SOURCE / "torch" / "model.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "ADDING_A_MODEL.md").read_text(encoding="utf-8")
    attributes = re.findall(r"^    (\w+): ClassVar", source, re.MULTILINE)
    assert len(attributes) > 5
    assert not [name for name in attributes if f"`{name}`" not in page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    long = [line for line in text.splitlines() if len(line) > 110 and not line.startswith("|")]
    assert not long, long[0]
