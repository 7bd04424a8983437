# SPDX-License-Identifier: Apache-2.0
"""A place to open hostile folders in: children of a warm process, with limits, watched as they read.

Run as a program it imports everything once, reads one JSON line for each task and answers with another.
Every task runs in a fork of its own, so a crash, a hang or a full memory ends only that.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

MAX_SECONDS = 12  # of wall time, before a child is killed; the tests look at the processor's time
MAX_MEMORY = 1 << 30  # address space that a child may take above what it starts with

# What reading a model's files never does, whoever asks.
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "subprocess.Popen",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.chown", "os.putenv", "os.unsetenv", "os.chdir", "os.kill", "shutil.", "socket.", "ctypes.dlopen",
    "pickle.find_class", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "tempfile.", "pty.",
)  # fmt: skip


class Cage:
    """The warm process, from the side of the tests."""

    def __init__(self) -> None:
        paths = [str(Path(__file__).parent.parent), *filter(None, sys.path)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "support.cage"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, action: str, folder: Path, *, outside: Path | None = None) -> dict:
        """Open a folder in a fork.

        Args:
            action: A name of `ACTIONS`.
            folder: What is opened, and may be read.
            outside: A folder beside it that may not.

        Returns:
            `outcome` ("loaded", "refused", "bug", "crash" or "hang"), `error`, `message`, `seconds` of the
            processor, `peak` bytes above the start, `deeds` that were none of reading the folder.
        """
        task = {"action": action, "folder": str(folder), "outside": str(outside or "")}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the warm process has ended"
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


# Inside the process


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, VmHWM or VmSize."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def watch(folder: str, outside: str, deeds: list[str]) -> None:
    """Note every deed that is not reading: the folder's files, or the modules of this Python."""
    real = os.path.realpath(folder)
    code = [os.path.realpath(p) for p in {*sys.path, sys.prefix, sys.base_prefix} if p and os.path.isdir(p)]
    readable = [
        real,
        *code,
        f"/proc/{os.getpid()}",
        "/proc/meminfo",
        "/sys",
        "/dev/urandom",
        "/etc/localtime",
        "/usr/share/zoneinfo",
    ]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return
            target = os.path.realpath(os.fsdecode(path))
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
            inside = any(target == top or target.startswith(top + os.sep) for top in readable)
            if writes or not inside or (outside and target.startswith(outside)):
                deeds.append(f"open {target} {mode} {flags}")
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "?")
            known = name.startswith(
                ("<frozen", "<string>", "<chat template>", "<attrs", "<@beartype", "<template>")
            )
            if not known and not any(os.path.realpath(name).startswith(top + os.sep) for top in code):
                deeds.append(f"exec {name}")
        elif event.startswith(FORBIDDEN):
            deeds.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


def perform(task: dict) -> dict:
    """Do one task in this process and say how it went."""
    from pretrained.errors import PretrainedError
    from support.opening import ACTIONS

    deeds: list[str] = []
    size = memory("VmSize") + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before, started = memory("VmHWM"), time.process_time()
    watch(task["folder"], task["outside"], deeds)
    result = {"outcome": "loaded", "error": "", "message": ""}
    try:
        ACTIONS[task["action"]](Path(task["folder"]))
    except PretrainedError as error:
        result = {"outcome": "refused", "error": type(error).__name__, "message": str(error)[:2000]}
    except BaseException as error:
        import traceback

        place = "".join(traceback.format_tb(error.__traceback__)[-3:])
        result = {
            "outcome": "bug",
            "error": type(error).__name__,
            "message": f"{str(error)[:300]}\n{place}",
        }
    seconds = time.process_time() - started
    return result | {"seconds": seconds, "peak": memory("VmHWM") - before, "deeds": deeds}


def fork(task: dict) -> dict:
    """Do one task in a fork and wait for it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = json.dumps(perform(task)).encode()
        except BaseException as error:
            answer = json.dumps({"outcome": "bug", "error": type(error).__name__, "message": "no answer"})
            answer = answer.encode()
        os.write(writing, answer[:60000])
        os._exit(0)
    os.close(writing)
    missing = {"error": "", "message": "", "seconds": 0.0, "peak": 0, "deeds": []}
    parts, end = [], time.monotonic() + MAX_SECONDS
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return missing | {"outcome": "hang", "seconds": float(MAX_SECONDS)}
        part = os.read(reading, 65536)
        if not part:
            break
        parts.append(part)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if not parts:
        return missing | {"outcome": "crash", "message": f"status {status}"}
    return missing | json.loads(b"".join(parts))


def main() -> None:
    """Serve tasks until the input ends."""
    import torch

    torch.set_num_threads(1)
    from support.opening import warm_up

    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(fork(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
