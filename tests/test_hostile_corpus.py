# SPDX-License-Identifier: Apache-2.0
"""Hostile model folders: none runs code, reads or writes outside itself, or takes too much."""

import hashlib
import os
from pathlib import Path

import pytest

from support.cage import Cage
from support.hostile import CASES, copy_base, write_base
from support.opening import ACTIONS

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")

MOST_SECONDS = 2.0  # of the processor
MOST_MEMORY = 200_000_000


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def cage():
    cage = Cage()
    yield cage
    cage.close()


def tree(folder):
    """What can be seen of a folder: names, kinds, sizes, dates and contents."""
    seen = {}
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(top, name)
            status = os.lstat(path)
            plain = os.path.isfile(path) and not os.path.islink(path) and status.st_size < 10**8
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if plain else ""
            seen[path] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return seen


@pytest.fixture
def place(tmp_path, base):
    """A folder to spoil, and one beside it that holds what would work but must not be touched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (outside / "secret.json").write_bytes((base / "config.json").read_bytes())
    return copy_base(base, tmp_path / "model"), outside


@pytest.mark.parametrize("action", ACTIONS)
def test_the_good_folder_is_opened(cage, place, action):
    folder, outside = place
    result = cage.run(action, folder, outside=outside)
    assert (result["outcome"], result["deeds"]) == ("loaded", []), result


# Every fifth, and all of them in the long run.
PART = list(CASES)[::5]


@pytest.mark.parametrize(
    "name", [name if name in PART else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_hostile(cage, place, name):
    folder, outside = place
    case = CASES[name]
    case.make(folder)
    before = tree(folder.parent)
    result = cage.run(case.action, folder, outside=outside)
    assert result["outcome"] in (("refused",) if case.expected == "refused" else ("refused", "loaded")), (
        result
    )
    assert result["deeds"] == []
    assert tree(folder.parent) == before
    assert result["seconds"] < MOST_SECONDS, result
    assert result["peak"] < MOST_MEMORY, result
