# SPDX-License-Identifier: Apache-2.0
"""``pretrained push``, against a server on loopback."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrained.cli.main import main
from support.hub_server import Fault

MODEL = Path(__file__).parents[1] / "data" / "spelling-t5"


@pytest.fixture
def here(hub, monkeypatch):
    """The server, with a token stored for it."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    return hub


def run_main(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_folder_becomes_a_repository(here, capsys):
    code, out, err = run_main(
        capsys, "push", MODEL, "spelling", "--private", "--message", "First", "--tag", "a", "--tag", "b"
    )
    assert (code, err) == (0, "")
    repo = here.repos["alice/spelling"]
    assert out.splitlines()[-1] == f"pushed: {here.endpoint}/alice/spelling/commit/{repo.refs['main']}"
    assert "model.safetensors" in out and "5 files" in out
    assert repo.private and repo.messages[-1] == ("First", "")
    files = here.files("alice/spelling")
    assert files["model.safetensors"] == (MODEL / "model.safetensors").read_bytes()
    assert b"- a\n- b\n" in files["README.md"]


def test_branches_and_pull_requests(here, capsys):
    run_main(capsys, "push", MODEL, "alice/spelling")
    code, out, _ = run_main(capsys, "push", MODEL, "alice/spelling", "--revision", "next", "--tag", "x")
    assert code == 0 and b"- x\n" in here.files("alice/spelling", "next")["README.md"]
    code, out, _ = run_main(
        capsys, "push", MODEL, "alice/spelling", "--create-pr", "--tag", "y", "--token", "hf_bob", "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["url"] == f"{here.endpoint}/alice/spelling/discussions/1"
    assert facts["commit"] == here.repos["alice/spelling"].refs["refs/pr/1"]
    assert facts["files"]["config.json"] == (MODEL / "config.json").stat().st_size


def test_a_dry_run_sends_nothing(here, capsys):
    code, out, _ = run_main(capsys, "push", MODEL, "alice/spelling", "--dry-run")
    assert code == 0 and "nothing was sent" in out and "model.safetensors" in out
    assert not here.requests


def test_errors_are_a_paragraph_and_code_1(here, capsys, tmp_path):
    code, _, err = run_main(capsys, "push", MODEL, "bob/spelling")
    assert code == 1 and err.startswith("error: The Hub does not let you write to 'bob/spelling'")
    code, _, err = run_main(capsys, "push", tmp_path / "absent", "spelling")
    assert code == 1 and err.startswith("error: There is no such folder")
    code, _, err = run_main(capsys, "push", tmp_path, "spelling")
    assert code == 1 and err.startswith("error: There is nothing to push")
    here.faults.append(Fault("PUT /upload", times=-1, cut=1000))
    code, _, err = run_main(capsys, "push", MODEL, "spelling")
    text = " ".join(err.split())
    assert code == 1 and "file 'model.safetensors'" in text and "Push again" in text


def test_broken_weights_stay_here(here, capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:-1])
    for words in ((), ("--dry-run",)):
        code, _, err = run_main(capsys, "push", folder, "spelling", *words)
        assert code == 1 and "model.safetensors" in err
    assert not here.requests


def test_words_that_make_no_sense(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(MODEL)])


def test_the_environment_names_the_server_and_no_framework_is_loaded(hub, tmp_path):
    program = (
        "import sys; from pretrained.cli.main import main;"
        f"code = main(['push', {str(MODEL)!r}, 'me/spelling']);"
        "code = code or main(['inspect', 'me/spelling']);"
        "print('torch' in sys.modules); sys.exit(code)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_me",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "T5ForConditionalGeneration" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_a_push_that_was_killed_goes_on_where_it_was(here, capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "more.bin").write_bytes(b"more" * 1000)
    more = hashlib.sha256(b"more" * 1000).hexdigest()
    here.faults.append(Fault(f"PUT /upload/{more}", delay=4))
    environment = {
        **os.environ,
        "HF_ENDPOINT": here.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, "-m", "pretrained.cli.main", "push", str(folder), "alice/model"]
    child = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(here.objects) < 1 or not here.asked(more):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert list(here.files("alice/model")) == [".gitattributes"]
    here.requests.clear()
    code, _, err = run_main(capsys, "push", folder, "alice/model")
    assert (code, err) == (0, "")
    assert here.asked("PUT") == [f"PUT /upload/{more}"]
    assert here.files("alice/model")["more.bin"] == b"more" * 1000
