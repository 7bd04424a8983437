# SPDX-License-Identifier: Apache-2.0
"""Runs the fault suite on this library and on transformers, and writes docs/FAULTS.md.

    python tools/faults/run.py            both libraries, a table on the screen and in docs/FAULTS.md
    python tools/faults/run.py --only pretrained

Each library is imported once in a process of its own; each case runs in a copy of that process (fork), with
two gigabytes of memory and half a minute of time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cases import CASES, MARKER, Case, other, tensors, write_base
from rules import GRADES, RULES, Outcome, grade

PAGE = Path(__file__).parents[2] / "docs" / "FAULTS.md"
LIBRARIES = ("pretrained", "transformers")
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
TIME_S, MEMORY = 30, 2 << 30
KILLS = 10
MOST = 20_000  # characters of a text; a pipe holds some more
KILLED = "killed while it saves in several files"


def in_a_process(work: Callable[[], dict[str, Any]], kill_after: float | None = None) -> dict[str, Any]:
    """Do some work in a copy of this process.

    Args:
        work: Returns what is to come back.
        kill_after: Seconds after which it is killed; None for the suite's own limit.

    Returns:
        What it returned; ``{"died": reason}`` where the process came to another end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        answer: dict[str, Any] = {"died": "the process ended"}
        with suppress(BaseException):
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            answer = work()
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    limit, started = kill_after or TIME_S, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            os.close(reader)
            return {"died": f"stopped after {limit:.1f} s"}
        time.sleep(0.002)
    with os.fdopen(reader) as pipe:
        raw = pipe.read()
    if os.WIFSIGNALED(status):
        return {"died": signal.Signals(os.WTERMSIG(status)).name}
    return dict(json.loads(raw)) if raw else {"died": "no answer"}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        with suppress(Exception):
            self.text += record.getMessage() + "\n"


def attempt(case: Case, lib: Any, folder: Path) -> dict[str, Any]:
    """Make the call of a case and say what came of it."""
    lines = Lines()
    for name in (lib.__name__, None):
        logging.getLogger(name).addHandler(lines)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(lines)
    warnings.simplefilter("always")
    try:
        result = case.call(lib, folder)
        right = case.right is not None and bool(case.right(result))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        kind = type(error).__name__
        return {"error": str(error)[:MOST], "kind": kind, "log": lines.text[:MOST], "at": at}
    return {"right": right, "log": lines.text[:MOST]}


def outcome_of(case: Case, lib: Any, folder: Path) -> tuple[Outcome, dict[str, Any]]:
    """Prepare a folder, run a case in it and look at what is left."""
    write_base(folder)
    case.change(folder)
    answer = in_a_process(lambda: attempt(case, lib, folder))
    intact = True
    if case.after is not None:
        after = case.after

        def look() -> dict[str, Any]:
            return {"intact": bool(after(lib, folder))}

        intact = in_a_process(look).get("intact", False)
    known = {name: answer[name] for name in ("error", "kind", "right", "log", "died") if name in answer}
    return Outcome(**known, executed=(folder / MARKER).exists(), intact=intact), answer


def killed_saves(lib: Any, folder: Path) -> tuple[Outcome, dict[str, Any]]:
    """Kill saves of a larger model at moments spread over their time; each folder must be old or new, whole.

    The model is in several files, as large ones are.
    """
    write_base(folder)
    large = {"num_hidden_layers": 2, "intermediate_size": 60_000}
    content = json.loads((folder / "config.json").read_text()) | large
    (folder / "config.json").write_text(json.dumps(content))
    from safetensors.torch import save_file  # its writer, as in `write_base`

    save_file(tensors(size=60_000), folder / "model.safetensors", {"format": "pt"})
    size = {"size": 60_000}

    def split() -> dict[str, Any]:
        model = lib.LlamaForCausalLM.from_pretrained(folder)
        model.save_pretrained(folder.with_name("split"), max_shard_size="4MB")
        return {}

    in_a_process(split)
    folder = folder.with_name("split")

    def whole(where: Path) -> dict[str, Any]:
        own = lib.LlamaForCausalLM.from_pretrained(where).state_dict()
        parts = tensors(**size)
        old = all((own[key] == tensor).all() for key, tensor in parts.items())
        new = all((own[key] == tensor + 1).all() for key, tensor in parts.items())
        return {"whole": bool(old or new)}

    def save(where: Path, started: Path) -> dict[str, Any]:
        model = other(lib, where)
        started.touch()
        begun = time.monotonic()
        model.save_pretrained(where, max_shard_size="4MB")
        return {"took": time.monotonic() - begun}

    def killed(where: Path, after: float) -> None:
        flag = where.with_suffix(".started")
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                save(where, flag)
            os._exit(0)
        while not flag.exists() and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(after)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    trial = shutil.copytree(folder, folder.with_name("trial"))
    took = in_a_process(lambda: save(Path(trial), folder.with_suffix(".trial"))).get("took", 0.2)
    broken = 0
    for number in range(KILLS):
        where = Path(shutil.copytree(folder, folder.with_name(f"kill{number}")))
        killed(where, took * (number + 0.5) / KILLS)
        broken += not in_a_process(lambda where=where: whole(where)).get("whole", False)
        shutil.rmtree(where)
    note = f"{broken} of {KILLS} folders broken"
    return Outcome(right=not broken, intact=not broken), {"log": note, "note": note}


def run_library(name: str) -> dict[str, Any]:
    """Run every case on one library, in this process and copies of it."""
    import torch  # only the processes that run cases need it

    torch.set_num_threads(1)
    lib = importlib.import_module(name)
    for wanted in ("LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        getattr(lib, wanted)
    results = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        jobs: list[tuple[str, str, Callable[[Path], tuple[Outcome, dict[str, Any]]], Any, Any]] = [
            (case.group, case.name, lambda at, case=case: outcome_of(case, lib, at), case.place, case.fact)
            for case in CASES
        ]
        jobs.append(("saving", KILLED, lambda at: killed_saves(lib, at), (), ()))
        for number, (group, title, job, place, fact) in enumerate(jobs):
            folder = Path(temporary) / f"{number:02d}" / "model"
            folder.parent.mkdir()
            outcome, answer = job(folder)
            mark = grade(outcome, place, fact)
            shown = outcome.died or outcome.error or answer.get("note") or outcome.log
            results[f"{group}: {title}"] = {
                "grade": mark,
                "kind": outcome.kind,
                "text": shown.replace(temporary, "")[:600],
            }
            shutil.rmtree(folder.parent)
    return {"library": name, "version": importlib.metadata.version(name), "results": results}


def run_both(only: str | None) -> list[dict[str, Any]]:
    """Run each library in a fresh process of its own."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    found = []
    for name in LIBRARIES:
        if only in (None, name):
            command = [sys.executable, __file__, "--worker", name]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.rpartition("\n#")[2]))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the grades as Markdown: counts, then every case."""
    lines = ["| library | " + " | ".join(GRADES) + " |", "|---" * (len(GRADES) + 1) + "|"]
    for one in found:
        counts = Counter(result["grade"] for result in one["results"].values())
        lines.append(
            f"| {one['library']} {one['version']} | "
            + " | ".join(str(counts[mark]) for mark in GRADES)
            + " |"
        )
    lines += ["", "| case | " + " | ".join(one["library"] for one in found) + " |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for title in found[0]["results"]:
        marks = (one["results"][title]["grade"] for one in found)
        lines.append(f"| {title} | " + " | ".join(m if m == "good" else f"**{m}**" for m in marks) + " |")
    return "\n".join(lines)


def write_page(found: list[dict[str, Any]]) -> None:
    """Put rules, versions and table between the markers of the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    versions = ", ".join(f"{one['library']} {one['version']}" for one in found)
    others = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors"))
    today = datetime.datetime.now(datetime.UTC).date()
    stamp = f"{today}: {versions}; {others}, Python {platform.python_version()}."
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{stamp}\n\n{RULES}\n\n{table(found)}\n\n{END}{after}", encoding="utf-8"
    )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=LIBRARIES, help="one library; the page stays as it is")
    parser.add_argument("--texts", action="store_true", help="print each error's text too")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("\n#" + json.dumps(run_library(arguments.worker)))
        return
    found = run_both(arguments.only)
    print(table(found))
    if arguments.texts:
        for one in found:
            for title, result in one["results"].items():
                print(f"\n{one['library']}: {title}: {result['grade']}\n  {result['kind']} {result['text']}")
    if arguments.only is None:
        write_page(found)


if __name__ == "__main__":
    main()
