# SPDX-License-Identifier: Apache-2.0
"""Looking models up: local paths, and ids against a small server that speaks the Hub's endpoints."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import huggingface_hub
import pytest

from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.errors import ArgumentError, CheckpointError, FileError

OLD, NEW = "a" * 40, "b" * 40
INDEX = json.dumps({"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}})
SHARDED = {
    "config.json": b'{"v": 2}',
    "model.safetensors.index.json": INDEX.encode(),
    "model-1.safetensors": b"one",
    "model-2.safetensors": b"two",
    "pytorch_model.bin": b"pickle",
    "sub/config.json": b'{"sub": true}',
}
REPOS = {
    "org/tiny": {OLD: {"config.json": b'{"v": 1}', "model.safetensors": b"old"}, NEW: SHARDED},
    "org/torn": {NEW: {"model.safetensors.index.json": INDEX.encode(), "model-1.safetensors": b"one"}},
    "org/evil": {NEW: {"model.safetensors.index.json": b'{"weight_map": {"x": "../../x.safetensors"}}'}},
    "org/bent": {NEW: {"model.safetensors.index.json": b'{"weight_map": 3}'}},
}
REVISIONS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints of the Hub that a download needs."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("authorization")))
        status, headers, body = self.answer(path)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer(self, path):
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            return self.answer_info(repo, revision)
        repo, _, rest = path[1:].partition("/resolve/")
        commit, _, name = rest.partition("/")
        content = REPOS.get(repo, {}).get(commit, {}).get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha1(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content

    def answer_info(self, repo, revision):
        errors = {
            "org/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
            "org/hidden": (401, {"X-Error-Code": "RepoNotFound"}),
            "org/refused": (403, {}),
            "org/busy": (429, {}),
            "org/broken": (500, {}),
        }
        if repo in errors:
            return *errors[repo], b""
        if repo not in REPOS:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = REVISIONS.get(revision)
        if commit not in REPOS[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in REPOS[repo][commit]]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    # Of another name before 1.0; either drops the connections that stay open.
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()


@pytest.fixture
def options(server, tmp_path):
    """Make options that point at the server and at a fresh cache."""

    def make(**changes):
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return HubOptions(
            **({"endpoint": endpoint, "cache_dir": tmp_path / "cache", "token": False} | changes)
        )

    return make


@pytest.fixture
def no_network(monkeypatch):
    """Make every new connection fail the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


def paths(server):
    # The library asks one address of its own accord.
    return [(verb, path) for verb, path, _ in server.seen if "agent-harnesses" not in path]


# Local paths


def test_local_path_needs_no_hub_library(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys; from pretrained.core.hub import resolve;"
        f"s = resolve({str(tmp_path)!r}); s.require('config.json'); s.weights_folder();"
        "sys.exit(any(m in sys.modules for m in ('huggingface_hub', 'requests', 'httpx', 'numpy')))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


def test_folder_file_and_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("config.json", "sub/config.json", "model.gguf"):
        (tmp_path / name).write_text("{}")
    folder = resolve(tmp_path)
    assert (folder.kind, folder.folder) == ("folder", tmp_path)
    assert folder.require("config.json") == tmp_path / "config.json"
    assert folder.file("tokenizer.json", required=False) is None
    assert folder.listing() == {"config.json", "sub/config.json", "model.gguf"}
    assert resolve(str(tmp_path), HubOptions(subfolder="sub")).folder == tmp_path / "sub"
    file = resolve(tmp_path / "model.gguf")
    assert (file.kind, file.path, file.folder) == ("file", tmp_path / "model.gguf", tmp_path)
    with pytest.raises(ArgumentError, match="A file has no subfolders"):
        resolve(tmp_path / "model.gguf", HubOptions(subfolder="sub"))


def test_local_folder_wins_over_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny").kind == "folder"


@pytest.mark.parametrize("form", ["{}", "{}/", "./modl", "../here/modl", "org/deep/modl"])
def test_missing_local_path_suggests_and_stays_local(form, tmp_path, monkeypatch, no_network):
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    (here / "org" / "deep" / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(FileError, match=r"No such file or folder \(/.*modl\)\. Did you mean 'model'\?"):
        resolve(form.format(here / "modl"))


def test_missing_parent_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(OSError, match=r"has no 'rums'\. Did you mean 'runs'\?"):
        resolve(tmp_path / "rums" / "model")
    with pytest.raises(FileError, match="holds nothing like it"):
        resolve(tmp_path / "runs" / "zzz")


def test_empty_folder(tmp_path):
    with pytest.raises(FileError, match=r"The folder is empty \(/.*\)\. Save a model there"):
        resolve(tmp_path)


def test_unknown_local_subfolder(tmp_path):
    (tmp_path / "encoder").mkdir()
    with pytest.raises(FileError, match=r"no subfolder 'encodr' .*Did you mean 'encoder'\?"):
        resolve(tmp_path, HubOptions(subfolder="encodr"))


@pytest.mark.parametrize(
    ("held", "mend"),
    [
        ("notes.txt", r"found notes.txt\. Check the path, or save the model there first"),
        ("m.Q4.gguf", r"This is a GGUF model: pass gguf_file='m.Q4.gguf'"),
        ("adapter_config.json", "It holds an adapter"),
        ("unet/config.json", r"pass subfolder='unet'"),
        ("confg.json", "Did you mean 'confg.json'"),
    ],
)
def test_folder_without_config(held, mend, tmp_path):
    (tmp_path / held).parent.mkdir(exist_ok=True)
    (tmp_path / held).write_text("{}")
    with pytest.raises(FileError, match=rf"There is no config.json \({tmp_path}\).*{mend}"):
        resolve(tmp_path).require("config.json")


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "a\\..\\..\\b", "C:/x"])
def test_names_stay_in_the_folder(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArgumentError, match="The file name leaves the model's folder"):
        resolve(tmp_path).file(name)
    with pytest.raises(ArgumentError, match="The subfolder leaves the model's folder"):
        resolve(tmp_path, HubOptions(subfolder=name))


# Arguments


@pytest.mark.parametrize("name", ["", None, 3])
def test_no_path_at_all(name):
    with pytest.raises(ArgumentError, match="must be a non-empty string or path"):
        resolve(name)


@pytest.mark.parametrize("name", ["a b", "org/a--b", "org/a..b", "x.git", "org/modèle"])
def test_malformed_id(name, no_network):
    with pytest.raises(FileError, match=r"neither an existing path nor the id of a repository"):
        resolve(name)


def test_web_address():
    with pytest.raises(FileError, match=r"A web address is not a model id .* Pass the id 'org/tiny'\."):
        resolve("https://huggingface.co/org/tiny/tree/main")


def test_contradicting_options():
    with pytest.raises(ArgumentError, match="local_files_only=True forbids it"):
        resolve("org/tiny", HubOptions(force_download=True, local_files_only=True))
    with pytest.raises(ArgumentError, match="Set the environment variables HTTP_PROXY"):
        resolve("org/tiny", HubOptions(proxies={"https": "http://proxy"}))


def test_take_leaves_other_arguments():
    kwargs = {"revision": None, "token": "secret", "subfolder": "x", "dtype": "auto"}
    taken = HubOptions.take(kwargs)
    assert kwargs == {"dtype": "auto"}
    assert taken == HubOptions(token="secret", subfolder="x")
    assert "secret" not in repr(taken)


# The Hub


def test_download_is_pinned_to_one_commit(server, options):
    source = resolve("org/tiny", options())
    assert source.commit == NEW
    assert source.require("config.json").read_bytes() == b'{"v": 2}'
    assert source.file("tokenizer.json", required=False) is None
    assert paths(server) == [
        ("GET", "/api/models/org/tiny/revision/main"),
        ("HEAD", f"/org/tiny/resolve/{NEW}/config.json"),
        ("GET", f"/org/tiny/resolve/{NEW}/config.json"),
    ]


def test_weights_are_fetched_exactly(server, options):
    folder = resolve("org/tiny", options()).weights_folder()
    assert sorted(p.name for p in folder.iterdir()) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "model.safetensors.index.json",
    ]
    folder = resolve("org/tiny", options(cache_dir=folder / "c2")).weights_folder(use_safetensors=False)
    assert [p.name for p in folder.iterdir()] == ["pytorch_model.bin"]


def test_revision_and_subfolder(options):
    assert resolve("org/tiny", options(revision="v1")).require("config.json").read_bytes() == b'{"v": 1}'
    sub = resolve("org/tiny", options(subfolder="sub"))
    assert sub.listing() == {"config.json"}
    path = sub.require("config.json")
    assert path.read_bytes() == b'{"sub": true}'
    assert path.parent == sub.folder


def test_force_download_fetches_once_a_source(server, options):
    resolve("org/tiny", options()).require("config.json")
    server.seen.clear()
    resolve("org/tiny", options()).require("config.json")
    assert len(paths(server)) == 1
    server.seen.clear()
    source = resolve("org/tiny", options(force_download=True))
    assert source.require("config.json") == source.require("config.json")
    assert [verb for verb, path in paths(server) if "resolve" in path] == ["HEAD", "GET"]


@pytest.mark.parametrize("revision", ["main", NEW])
def test_warm_cache_without_network(revision, options, server, monkeypatch):
    resolve("org/tiny", options(revision=revision)).weights_folder()
    server.seen.clear()
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection was opened"))
    source = resolve("org/tiny", options(revision=revision, local_files_only=True))
    assert (source.kind, source.commit) == ("hub", NEW)
    assert "model.safetensors.index.json" in source.listing()
    assert (source.weights_folder() / "model-2.safetensors").read_bytes() == b"two"
    assert source.file("generation_config.json", required=False) is None
    with pytest.raises(FileError, match=r"There is no config.json .*Only the download cache was searched"):
        source.require("config.json")
    assert server.seen == []


def test_offline_variable(options, monkeypatch, no_network):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match=r"no download is allowed since HF_HUB_OFFLINE is set") as caught:
        resolve("org/tiny", options())
    assert "models--org--tiny: " not in str(caught.value)
    assert "models--org--tiny, found nothing of this repository" in str(caught.value)
    with pytest.raises(ArgumentError, match="HF_HUB_OFFLINE forbids it"):
        resolve("org/tiny", options(force_download=True))


def test_offline_names_cached_revisions(options):
    resolve("org/tiny", options(revision="v1")).require("config.json")
    with pytest.raises(FileError, match=r"\(revision 'main'\).*found revisions v1\. Fetch it once"):
        resolve("org/tiny", options(local_files_only=True))


def test_unreachable_hub_falls_back_to_the_cache(options, caplog):
    resolve("org/tiny", options()).require("config.json")
    dead = options(endpoint="http://127.0.0.1:9")
    assert resolve("org/tiny", dead).require("config.json").read_bytes() == b'{"v": 2}'
    assert "using the cached files of 'org/tiny'" in caplog.text
    with pytest.raises(FileError, match=r"The Hub could not be reached for 'org/tiny' .*127.0.0.1:9"):
        resolve("org/tiny", options(endpoint="http://127.0.0.1:9", force_download=True))


@pytest.mark.parametrize(
    ("repo", "changes", "text"),
    [
        ("org/none", {}, r"There is no repository 'org/none' on the Hub, or it is private \(revision 'main'"),
        ("org/none", {}, r"no token was sent, since token=False"),
        ("org/none", {"token": "hf_secret"}, r"the given token was sent"),
        ("org/none", {"token": None}, r"no token was sent, since none is stored"),
        ("org/tiny", {"token": True}, r"token=True needs a stored login"),
        ("org/hidden", {}, r"or it is private .*for a private one pass token="),
        ("org/gated", {}, r"'org/gated' is gated: .* Ask at http://127.0.0.1:\d+/org/gated"),
        ("org/refused", {}, r"The Hub refused access to 'org/refused'"),
        ("org/busy", {}, r"too many requests"),
        ("org/broken", {}, r"The Hub answered with status 500"),
        ("org/tiny", {"revision": "v9"}, r"'org/tiny' has no revision 'v9'"),
        ("org/tiny", {"subfolder": "sup"}, r"no subfolder 'sup' .*found sub\. Did you mean 'sub'\?"),
    ],
)
def test_refusals(repo, changes, text, options):
    with pytest.raises(FileError, match=text) as caught:
        resolve(repo, options(**changes))
    assert "hf_secret" not in str(caught.value)


def test_mistyped_local_folder_is_suggested(options, tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"no such local path either\. Did you mean 'my-model'\?"):
        resolve("my-modl", options())


def test_token_is_sent(server, options):
    resolve("org/tiny", options(token="hf_abc")).require("config.json")
    assert {auth for _, path, auth in server.seen if "/org/tiny" in path} == {"Bearer hf_abc"}


def test_vanished_file(options):
    source = resolve("org/tiny", options())
    ghost = Source(
        "hub", "org/tiny", source.folder, commit=NEW, names=frozenset({"x"}), options=source.options
    )
    with pytest.raises(FileError, match=r"'org/tiny' has no file 'x'"):
        ghost.require("x")


def test_torn_and_hostile_indexes(options):
    with pytest.raises(CheckpointError, match=r"names the file 'model-2.safetensors', which the repository"):
        resolve("org/torn", options()).weights_folder()
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        resolve("org/evil", options()).weights_folder()
    with pytest.raises(CheckpointError, match="weight_map"):
        resolve("org/bent", options()).weights_folder()


def test_downloads_are_quiet_off_a_terminal(options, capfd):
    resolve("org/tiny", options()).weights_folder()
    assert capfd.readouterr() == ("", "")
