# SPDX-License-Identifier: Apache-2.0
"""Whether weights files are still what they were when their headers were read.

A header says where weights lie; a file that is changed or replaced afterwards holds something else there. A
model whose weights are views of a map sees such changes, and dies of a file that is cut short. So the state
of each file is kept, and compared when it is mapped, when the load ends, and before such a model runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrained.errors import CheckpointError

OWN_MEMORY = "disable_mmap=True loads weights into memory of their own."


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells whether a file is the same and unchanged.

    Attributes:
        identity: Device and number of the file: another one means that the name was given to another file.
        size: Bytes.
        mtime_ns: When it was last written to.
    """

    identity: tuple[int, int]
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | str | int) -> FileState:
        """Look at a file.

        Args:
            file: Its path or descriptor.

        Raises:
            OSError: it is gone.
        """
        found = os.stat(file)
        return cls((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def states_of(files: Iterable[Path]) -> dict[Path, FileState]:
    """Look at files; those that are gone are left to whoever reads them.

    Args:
        files: Their paths.
    """
    states = {}
    for file in files:
        try:
            states[file] = FileState.of(file)
        except (OSError, ValueError):
            continue
    return states


class FilesInUse:
    """The files that a model's weights are views of. Copies of a model have memory of their own, and no such.

    Args:
        states: The files as they were mapped.
    """

    def __init__(self, states: Mapping[Path, FileState]) -> None:
        # A relative path would mean another file once the process changes its folder.
        self._states = tuple((os.path.abspath(file), state) for file, state in states.items())

    def __bool__(self) -> bool:
        return bool(self._states)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def check(self, when: str = "under a model that runs from it") -> None:
        """Raise where a file was changed in place. One that was replaced or removed lives on under the map.

        Args:
            when: What was going on, for the error.

        Raises:
            CheckpointError: a file's size or time of change is another one.
        """
        for file, state in self._states:
            try:
                now = os.stat(file)
            except OSError:
                continue
            same = (now.st_size, now.st_mtime_ns) == (state.size, state.mtime_ns)
            if not same and (now.st_dev, now.st_ino) == state.identity:
                raise changed(file, state.size, now.st_size, when)


def check_load(states: Mapping[Path, FileState], files: Iterable[Path]) -> None:
    """Raise where what was loaded may be of two checkpoints; the last thing that a load does.

    Each file is held against its header when it is mapped. An index must be the same to the end: a save that
    replaces shards under names that the old index uses replaces the index first.

    Args:
        states: What the files and the index were like when they were read.
        files: Which of them hold weights.

    Raises:
        CheckpointError: a file was changed in place, or the index replaced.
    """
    FilesInUse(states).check("while it was being loaded")
    weights = set(files)
    for file, state in states.items():
        if file not in weights and states_of([file]).get(file) != state:
            raise replaced(file)


def changed(file: object, before: int, now: int, when: str) -> CheckpointError:
    """Return the error for a weights file that was changed in place.

    Args:
        file: Its path.
        before: Its size at the load, in bytes.
        now: Its size now.
        when: What was going on.
    """
    return CheckpointError(
        f"A weights file was {'cut short' if now < before else 'changed'} {when}",
        where=file,
        expected=f"{before} bytes, unchanged since the load",
        found=f"{now} bytes",
        mend="Restore the file and load the model again. To update a checkpoint under a running model, "
        "write new files and rename them into place, as save_pretrained does. " + OWN_MEMORY,
    )


def replaced(file: object) -> CheckpointError:
    """Return the error for a file that became another one while the checkpoint was loaded.

    Args:
        file: Its path.
    """
    return CheckpointError(
        "A file of this checkpoint was changed or replaced after it was read",
        where=file,
        mend="Something else writes to this checkpoint. Load the model again once that is done.",
    )
