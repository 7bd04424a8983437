# SPDX-License-Identifier: Apache-2.0
"""Eight processes that fetch the same model into one cache, from a server that stalls and cuts."""

import json
import os
import random
import subprocess
import sys

import pytest

from support.hub_server import Fault

FETCH = """
import contextlib, hashlib, json, os, pathlib, sys, time
import huggingface_hub.file_download as download
from pretrained.core.hub import HubOptions, resolve
endpoint, cache, gate, locks = sys.argv[1:]
if locks == "without locks":
    # As on file systems where flock says yes to everybody.
    download.WeakFileLock = lambda *args, **kwargs: contextlib.nullcontext()
pathlib.Path(gate, str(os.getpid())).touch()
while len(list(pathlib.Path(gate).iterdir())) < 8:
    time.sleep(0.005)
source = resolve("alice/large", HubOptions(endpoint=endpoint, cache_dir=cache, token=False))
source.require("config.json")
files = sorted(source.weights_folder().iterdir())
print(json.dumps({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_eight_processes_share_a_cache(locks, hub, tmp_path):
    import hashlib

    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    content = {name: random.Random(name).randbytes(1_000_000) for name in shards}
    content["model.safetensors.index.json"] = json.dumps(
        {"weight_map": {name[:11]: name for name in shards}}
    ).encode()
    content["config.json"] = b"{}"
    hub.add("alice/large", content)
    hub.faults += [Fault("GET /cdn", times=3, delay=0.2), Fault("GET /cdn", times=2, cut=300_000)]
    gate = tmp_path / "gate"
    gate.mkdir()
    words = [sys.executable, "-c", FETCH, hub.endpoint, str(tmp_path / "cache"), str(gate), locks]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_XET": "1"}
    children = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert json.loads(out) == expected
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    if locks == "with locks":
        # Three files, and two more requests to go on after the cuts.
        assert len(hub.asked("GET /cdn")) <= 5
