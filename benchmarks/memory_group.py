# SPDX-License-Identifier: Apache-2.0
"""A process in a group whose memory, page cache included, is limited: control groups, version 1, or systemd.

A limit on one process's address space is not the same: pages of mapped files would count that cost nothing,
and the page cache would not. Where no group can be made, nothing is measured.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

Runner = Callable[[list[str], dict[str, str]], "subprocess.CompletedProcess[str]"]
_CONTROLLER = Path("/sys/fs/cgroup/memory")


def limited(nbytes: int) -> Runner | None:
    """Return what runs a command in a group of its own, or None where that cannot be done.

    Args:
        nbytes: The group's limit.
    """
    group = _own_group()
    if group is not None:
        return functools.partial(_in_group, group, nbytes)
    if shutil.which("systemd-run") and Path("/run/systemd/system").is_dir():
        return functools.partial(_in_scope, nbytes)
    return None


def _own_group() -> Path | None:
    """Return the memory group that this process is in, where a group can be made inside it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    if own is None:
        return None
    group = _CONTROLLER / own.lstrip("/")
    return group if (group / "memory.limit_in_bytes").exists() and _can_make(group) else None


def _can_make(group: Path) -> bool:
    trial = group / f"pretrained-trial-{os.getpid()}"
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError:
        return False
    return True


def _in_group(
    parent: Path, nbytes: int, command: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    group = parent / f"pretrained-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        # The shell joins the group before it becomes the program, which so has all of its memory in it.
        join = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        return subprocess.run(join, capture_output=True, text=True, env=environment, check=False)
    finally:
        group.rmdir()


def _in_scope(
    nbytes: int, command: list[str], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    scope = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={nbytes}", "-p", "MemorySwapMax=0"]
    if os.getuid():
        scope.insert(1, "--user")
    return subprocess.run([*scope, *command], capture_output=True, text=True, env=environment, check=False)
