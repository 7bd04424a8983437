# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: core <- arch <- {text, torch} <- auto <- cli. Read from the source, by ast."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import pretrained

ROOT = Path(pretrained.__file__).parent

# Room -> rooms it may import. The package's own __init__ is the room "root".
MAY_IMPORT = {
    "root": {"errors", "core"},
    "errors": set(),
    "core": {"errors", "core"},
    "arch": {"errors", "core", "arch"},
    "text": {"errors", "core", "arch", "text"},
    "torch": {"errors", "core", "arch", "torch"},
    "testing": {"errors", "core", "arch", "text", "torch", "testing"},
    "auto": {"errors", "core", "arch", "text", "torch", "auto"},
    "cli": {"root", "errors", "core", "arch", "text", "torch", "auto", "cli"},
}
# Room -> packages from outside that it may import, whether at the top or where they are used.
THIRD_PARTY = {
    "root": set(),
    "errors": set(),
    "core": {"huggingface_hub", "ml_dtypes", "numpy", "safetensors", "tqdm"},
    "arch": {"numpy"},
    "text": {"jinja2", "numpy", "tokenizers", "torch"},
    "torch": {"bitsandbytes", "flash_attn", "ml_dtypes", "numpy", "peft", "torch", "torchao"},
    "testing": {"numpy", "torch"},
    "auto": set(),
    "cli": {"huggingface_hub", "numpy", "torch", "tqdm"},
}
# What takes tens of milliseconds or more to import, and is needed by some calls only.
HEAVY = {"huggingface_hub", "jinja2", "peft", "tokenizers", "tqdm"}
# Modules that are themselves imported where they are used, and so may have heavy imports at their top.
LAZY_MODULES = {
    "core/hub_errors.py": "imported by core.hub when an id, not a path, is looked up",
    "core/hub_remote.py": "imported by core.hub when an id, not a path, is looked up",
    "torch/peft_layers.py": "imported by a model when it gets an adapter",
    "text/chat.py": "imported by a tokenizer when a chat template is rendered",
}
SOURCES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts == ("__init__.py",):
        return "root"
    return parts[0].removesuffix(".py")


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Return the dotted names that a file imports; ``from a import b`` counts as ``a.b``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _top(tree) if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _top(tree: ast.AST):
    """Yield the statements that run when a module is imported, type-checking blocks left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top(node)


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "pretrained":
            found.add(parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "root")
    return found


def packages_imported(path: Path, *, top_only: bool = False) -> set[str]:
    names = {name.partition(".")[0] for name in imports(path, top_only=top_only)}
    return names - {"pretrained"} - set(sys.stdlib_module_names)


def test_every_room_is_known():
    assert {room(path) for path in SOURCES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    wrong = rooms_imported(path) - MAY_IMPORT[room(path)]
    assert not wrong, f"{room(path)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_agreed_packages_are_imported(path):
    wrong = packages_imported(path) - THIRD_PARTY[room(path)]
    assert not wrong, f"{room(path)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    if path.relative_to(ROOT).as_posix() in LAZY_MODULES:
        pytest.skip("imported lazily itself")
    assert not packages_imported(path, top_only=True) & HEAVY


def test_lazy_modules_are_never_imported_at_the_top():
    lazy = {"pretrained." + name.removesuffix(".py").replace("/", ".") for name in LAZY_MODULES}
    for path in SOURCES:
        if path.relative_to(ROOT).as_posix() not in LAZY_MODULES:
            names = imports(path, top_only=True)
            assert not {name for name in lazy for found in names if f"{found}.".startswith(f"{name}.")}, path


def test_the_graph_has_no_cycle_between_rooms():
    order = ["errors", "core", "arch", "text", "torch", "testing", "auto", "cli"]
    for name in order:
        allowed = MAY_IMPORT[name] - {name, "root"}
        assert all(order.index(other) < order.index(name) for other in allowed)


def test_backends_never_import_each_other():
    backends = {"torch", "flax", "tensorflow"}
    for name in backends & set(MAY_IMPORT):
        assert not MAY_IMPORT[name] & (backends - {name})


def test_the_incumbents_are_an_oracle_in_tests_only():
    for packages in THIRD_PARTY.values():
        assert not packages & {"transformers", "accelerate", "gguf"}


def test_the_reader_of_imports_sees_every_form(tmp_path):
    file = tmp_path / "example.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch.nn as nn\n"
        "if TYPE_CHECKING:\n    import jax\n"
        "class A:\n    import flax\n"
        "def f():\n    from pretrained.torch import load\n"
    )
    assert imports(file) == {"typing.TYPE_CHECKING", "torch.nn", "jax", "flax", "pretrained.torch.load"}
    assert imports(file, top_only=True) == {"typing.TYPE_CHECKING", "torch.nn", "flax"}
