# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that speaks the part of the Hub's HTTP API that huggingface_hub's client uses.

Repositories, branches and pull requests live in memory. Large files take the LFS way: a batch request, PUTs
(in parts above `part_size`), and for downloads a redirect to a second address, as to a CDN. Xet is not
offered. `Fault` makes the server refuse, stall, cut a connection or send something else.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

TOKENS = {
    "hf_alice": ("alice", True),
    "hf_bob": ("bob", True),
    "hf_reader": ("alice", False),
    "hf_me": ("me", True),
}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What goes wrong, for requests whose "VERB /path" matches a pattern.

    `times` counts the requests it hits (a negative number: all). It answers with `status` and `headers`;
    or waits `delay` seconds; or cuts the connection after `cut` bytes of the body, sent or received; or
    sends what `change` makes of the body.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None


@dataclass
class Repo:
    """A repository: commits are full listings, path -> ("git", content) or ("lfs", sha256)."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, tuple]] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict, ref: str, message: tuple[str, str]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), ref, sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer:
    """The server; a context manager. `requests` lists (verb, path, headers, bytes of the body)."""

    def __init__(self, part_size: int = 1 << 40, lfs_from: int = 1024):
        self.part_size, self.lfs_from = part_size, lfs_from
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, dict, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        self._threads = []
        for server in self._servers:
            server.daemon_threads = True
            server.handle_error = lambda *args: None  # connections that clients or faults cut
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *error: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()

    def reset(self) -> None:
        """Forget everything."""
        for kept in (self.repos, self.objects, self.parts, self.requests, self.faults):
            kept.clear()
        self.part_size = 1 << 40

    def constants(self) -> dict[str, object]:
        """What huggingface_hub.constants would hold, had HF_ENDPOINT named this server from the start."""
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        return {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }

    def add(self, repo_id: str, files: dict[str, bytes], ref: str = "main", **facts: bool) -> str:
        """Put files into a repository without a client; return the commit."""
        repo = self.repos.setdefault(repo_id, Repo(**facts))
        old = repo.commits.get(repo.refs.get(ref, ""), {})
        return repo.commit(old | {n: self.stored(n, c) for n, c in files.items()}, ref, ("Added", ""))

    def stored(self, name: str, content: bytes) -> tuple:
        if not self.is_large(name, len(content)):
            return ("git", content)
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return ("lfs", oid)

    def is_large(self, name: str, size: int) -> bool:
        return name.endswith((".safetensors", ".bin", ".gguf")) or size >= self.lfs_from

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repo = self.repos[repo_id]
        listing = repo.commits[repo.find(revision)]
        return {n: self.objects[v] if kind == "lfs" else v for n, (kind, v) in listing.items()}

    def asked(self, pattern: str) -> list[str]:
        """The requests so far that match, as "VERB /path"."""
        lines = [f"{verb} {path}" for verb, path, _, _ in self.requests]
        return [line for line in lines if re.search(pattern, line)]


class _Cut(Exception):
    """The connection is to end here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    # Headers and body are two writes; a client should not wait for the second.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = self.fault()
        try:
            body = self.read_body(
                None if fault is None else fault.cut if self.command in ("PUT", "POST") else None
            )
            self.hub.requests.append((self.command, self.route, dict(self.headers.items()), len(body)))
            if fault is not None and fault.delay:
                time.sleep(fault.delay)
            if fault is not None and fault.status is not None:
                self.send(fault.status, fault.headers, b"")
            else:
                with self.hub.lock:
                    answer = self.answer(body)
                self.send(*answer, fault)
        except (_Cut, ConnectionError, TimeoutError):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_GET

    def fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, f"{self.command} {self.route}"):
                    fault.times -= 1
                    return fault
        return None

    def read_body(self, cut: int | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if cut is not None and len(body) >= cut:
                    raise _Cut
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length", 0))
        if cut is not None:
            self.rfile.read(min(cut, length))
            raise _Cut
        return self.rfile.read(length)

    def send(self, status: int, headers: dict, body: bytes, fault: Fault | None = None) -> None:
        if fault is not None and fault.change is not None:
            body = fault.change(body)
        headers = {"Content-Length": str(len(body)), **headers}
        if fault is not None and fault.change is not None:
            headers |= fault.headers
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            self.wfile.write(body[: fault.cut])
            self.wfile.flush()
            raise _Cut
        self.wfile.write(body)

    # -- routes --------------------------------------------------------------------------------

    def answer(self, body: bytes) -> tuple[int, dict, bytes]:
        for verb, pattern, method in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in verb:
                return method(self, body, *match.groups())
        return self.refuse(404, "EntryNotFound", "no such route")

    def refuse(self, status: int, code: str, message: str = "") -> tuple[int, dict, bytes]:
        return status, {"X-Error-Code": code, "X-Error-Message": message}, b""

    def json(self, value: object, status: int = 200) -> tuple[int, dict, bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @property
    def user(self) -> tuple[str, bool] | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, repo_id: str) -> tuple[int, dict, bytes] | None:
        if self.user is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if not self.user[1] or self.user[0] != repo_id.split("/", maxsplit=1)[0]:
            return self.refuse(403, "", "You don't have the rights to write here")
        return None

    def readable(self, repo_id: str) -> Repo | tuple[int, dict, bytes]:
        repo = self.hub.repos.get(repo_id)
        owner = self.user is not None and self.user[0] == repo_id.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and not owner):
            return self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not owner:
            return self.refuse(403 if self.user else 401, "GatedRepo", "Access to this model is restricted")
        return repo

    def whoami(self, body: bytes) -> tuple[int, dict, bytes]:
        if self.user is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        return self.json({"type": "user", "name": self.user[0], "orgs": []})

    def create(self, body: bytes) -> tuple[int, dict, bytes]:
        wish = json.loads(body)
        if self.user is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        repo_id = f"{wish.get('organization') or self.user[0]}/{wish['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos and self.may_write(repo_id) is None:
            return self.json(url, 409)
        if refused := self.may_write(repo_id):
            return refused
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.json(url)

    def validate(self, body: bytes) -> tuple[int, dict, bytes]:
        text = json.loads(body)["content"]
        if "license: bad" in text:
            return self.json({"errors": [{"message": '"license" must be one of those'}], "warnings": []}, 400)
        return self.json({"errors": [], "warnings": []})

    def info(self, body: bytes, repo_id: str, revision: str | None) -> tuple[int, dict, bytes]:
        repo = self.readable(repo_id)
        if isinstance(repo, tuple):
            return repo
        sha = repo.find(revision or "main")
        if sha is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": name} for name in repo.commits[sha]]
        return self.json(
            {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def branch(self, body: bytes, repo_id: str, name: str) -> tuple[int, dict, bytes]:
        if refused := self.may_write(repo_id):
            return refused
        repo = self.hub.repos[repo_id]
        if name in repo.refs:
            return self.refuse(409, "", "Reference already exists")
        repo.refs[name] = repo.refs["main"]
        return self.json({})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> tuple[int, dict, bytes]:
        repo = self.readable(repo_id)
        if isinstance(repo, tuple):
            return repo
        if not self.query.get("create_pr") and (refused := self.may_write(repo_id)):
            return refused
        listing = repo.commits.get(repo.find(revision) or "")
        if listing is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = []
        for file in json.loads(body)["files"]:
            kind, value = listing.get(file["path"], (None, None))
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if self.hub.is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": value if kind == "lfs" else git_sha1(value) if kind == "git" else None,
                }
            )
        return self.json({"files": files})

    def batch(self, body: bytes, repo_id: str) -> tuple[int, dict, bytes]:
        objects = []
        for wish in json.loads(body)["objects"]:
            oid, size = wish["oid"], wish["size"]
            found: dict = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict = {"href": f"{self.hub.cdn}/upload/{oid}?X-Signature=secret"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    urls = {str(n): f"{self.hub.cdn}/upload/{oid}/{n}" for n in range(1, count + 1)}
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                found["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.endpoint}/verify/{oid}"},
                }
            objects.append(found)
        return self.json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> tuple[int, dict, bytes]:
        if self.command == "POST":
            numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(self.hub.parts[oid, number] for number in numbers)
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "", "The content has another SHA-256")
        self.hub.objects[oid] = body
        return 200, {}, b""

    def upload_part(self, body: bytes, oid: str, number: str) -> tuple[int, dict, bytes]:
        self.hub.parts[oid, int(number)] = body
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def verify(self, body: bytes, oid: str) -> tuple[int, dict, bytes]:
        size = json.loads(body)["size"]
        good = len(self.hub.objects.get(oid, b"")) == size
        return (200, {}, b"") if good else self.refuse(404, "", "The object is not there")

    def commit(self, body: bytes, repo_id: str, revision: str) -> tuple[int, dict, bytes]:
        repo = self.readable(repo_id)
        if isinstance(repo, tuple):
            return repo
        proposed = bool(self.query.get("create_pr"))
        if not proposed and (refused := self.may_write(repo_id)):
            return refused
        sha = repo.find(revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, sha):
            return self.refuse(412, "", "A commit has happened since")
        listing = dict(repo.commits[sha])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                listing[value["path"]] = ("git", base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.refuse(400, "", "An LFS object is missing")
                listing[value["path"]] = ("lfs", value["oid"])
            else:
                del listing[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        ref = f"refs/pr/{number}" if proposed else revision
        new = repo.commit(listing, ref, (header["summary"], header["description"]))
        return self.json(
            {
                "success": True,
                "commitOid": new,
                "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{new}",
                "pullRequestUrl": f"{self.hub.endpoint}/{repo_id}/discussions/{number}" if proposed else None,
            }
        )

    def resolve(self, body: bytes, repo_id: str, rest: str) -> tuple[int, dict, bytes]:
        repo = self.readable(repo_id)
        if isinstance(repo, tuple):
            return repo
        for ref in sorted([*repo.commits, *repo.refs], key=len, reverse=True):
            if rest.startswith(ref + "/"):
                sha, name = repo.find(ref), rest.removeprefix(ref + "/")
                break
        else:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        kind, value = repo.commits[sha].get(name, (None, None))
        if kind is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if kind == "git":
            return 200, {"ETag": f'"{git_sha1(value)}"', "X-Repo-Commit": sha}, value
        headers = {
            "Location": f"{self.hub.cdn}/cdn/{value}?Signature=secret",
            "X-Linked-Etag": f'"{value}"',
            "X-Linked-Size": str(len(self.hub.objects[value])),
            "X-Repo-Commit": sha,
            "ETag": '"of-the-pointer"',
        }
        return 302, headers, b""

    def content(self, body: bytes, oid: str) -> tuple[int, dict, bytes]:
        data = self.hub.objects[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, data
        start = int(wanted[1])
        where = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return 206, {"ETag": f'"{oid}"', "Content-Range": where}, data[start:]


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), r"/verify/(\w+)", _Handler.verify),
    (("PUT", "POST"), r"/upload/(\w+)", _Handler.upload),
    (("PUT",), r"/upload/(\w+)/(\d+)", _Handler.upload_part),
    (("GET", "HEAD"), r"/cdn/(\w+)", _Handler.content),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(.+)", _Handler.resolve),
)
