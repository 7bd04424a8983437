# SPDX-License-Identifier: Apache-2.0
"""Repositories of the Hub: what they hold, and their files, through ``huggingface_hub``.

The download cache is that library's, in its documented layout
("Manage your cache" in its guides): ``refs/<revision>`` holds a commit, ``snapshots/<commit>/`` the files.
Nothing is ever written to the Hub, and no thread is started. Progress bars are the library's own, which
appear on a terminal only. What the server says is not trusted with paths: a commit must be one, names that
leave the repository's folder are passed over, and what lands outside the cache's folder is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, hf_hub_download

from pretrained.core.hub_errors import NETWORK_ERRORS, explain, is_outage
from pretrained.core.weights_names import few
from pretrained.errors import ArgumentError, CheckpointError, FileError, did_you_mean

if TYPE_CHECKING:
    from pretrained.core.hub import HubOptions

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        commit: Which one.
        folder: Where the cache keeps its files (``subfolder`` included); it may not exist yet.
        names: The files of the repository below ``subfolder``; None where only the cache was asked,
            and so ``folder`` holds all there is.
    """

    commit: str
    folder: Path
    names: frozenset[str] | None


def look_up(repo_id: str, options: HubOptions, *, hint: str = "") -> Snapshot:
    """Resolve a revision to a commit and list the repository, in one request.

    Without a network (``local_files_only``, ``HF_HUB_OFFLINE``) no request is made and the cache answers;
    it also answers, with a warning, when the Hub cannot be reached.

    Args:
        repo_id: A well-formed id.
        options: Revision, subfolder, token and so on.
        hint: What an error adds where a mistyped name may be the cause.

    Raises:
        FileError: no such repository, revision or subfolder, no access, no connection, or not cached.
        ArgumentError: ``force_download`` without a network.
    """
    if options.local_files_only:
        return _look_up_cached(repo_id, options, "local_files_only=True", hint)
    if constants.HF_HUB_OFFLINE:
        if options.force_download:
            raise ArgumentError(
                "force_download=True asks for the network and HF_HUB_OFFLINE forbids it",
                mend="Unset HF_HUB_OFFLINE or drop force_download.",
            )
        return _look_up_cached(repo_id, options, "HF_HUB_OFFLINE is set", hint)
    api = HfApi(endpoint=options.endpoint, token=options.token, library_name="pretrained")
    try:
        info = api.model_info(repo_id, revision=options.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except NETWORK_ERRORS as error:
        if is_outage(error) and not options.force_download and _cached_commit(repo_id, options):
            logger.warning("The Hub cannot be reached; using the cached files of %r.", repo_id)
            return _look_up_cached(repo_id, options, "the Hub cannot be reached", hint)
        raise explain(error, repo_id, options, hint=hint) from error
    if not _COMMIT.fullmatch(str(info.sha)):
        raise FileError(
            f"The server's answer about {repo_id!r} is not one of a Hub",
            where=options.endpoint or constants.ENDPOINT,
            expected="a commit of 40 hexadecimal digits",
            found=repr(info.sha)[:100],
            mend="Check HF_ENDPOINT and the proxy.",
        )
    files = _safe_names((sibling.rfilename for sibling in info.siblings or ()), repo_id)
    return Snapshot(
        str(info.sha), _snapshot_folder(repo_id, str(info.sha), options), _below(files, repo_id, options)
    )


def download(repo_id: str, name: str, commit: str, options: HubOptions) -> Path:
    """Fetch one file at a commit, or find it in the cache, and return its local path.

    Args:
        repo_id: The repository.
        name: The file, relative to the subfolder of the options.
        commit: As `look_up` found it.
        options: Token, cache and so on.

    Raises:
        FileError: it cannot be fetched.
        CheckpointError: what arrived is not what the Hub's checksum says; it is removed from the cache.
    """
    fresh = options.force_download or not (_snapshot_folder(repo_id, commit, options) / name).exists()
    try:
        path = hf_hub_download(
            repo_id,
            name,
            subfolder=options.subfolder or None,
            revision=commit,
            cache_dir=_cache_root(options),
            force_download=options.force_download,
            token=options.token,
            endpoint=options.endpoint,
            library_name="pretrained",
        )
    except (*NETWORK_ERRORS, ValueError) as error:
        # A failed force_download is a ValueError there, with the cause behind it.
        raise explain(error, repo_id, options, file=name) from error
    if fresh:
        _check_arrival(Path(path), repo_id, name, options)
    _remember_revision(repo_id, commit, options)
    return Path(path)


def _check_arrival(path: Path, repo_id: str, name: str, options: HubOptions) -> None:
    """Check that a file that has just been fetched lies inside the cache and has the content it should.

    The cache names large files by their SHA-256, which the Hub sends as their ETag. ``huggingface_hub``
    compares sizes only.
    """
    root = _cache_root(options).resolve()
    # One step only: a blob may itself be a link, to a store inside the cache that names files otherwise.
    blob = Path(os.path.abspath(path.parent / os.readlink(path))) if path.is_symlink() else path
    if not path.resolve().is_relative_to(root):
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"The server gave {name!r} of {repo_id!r} an ETag that leaves the download cache",
            where=root,
            found=str(blob),
            mend="Do not use this server. Look at that file, and remove it if it is not yours.",
        )
    if not _SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise CheckpointError(
            f"{name!r} of {repo_id!r} arrived damaged, and was removed from the cache",
            where=f"revision {options.revision!r}",
            expected=f"SHA-256 {blob.name}",
            found=found,
            mend="Load it again; if it happens again, the server or a proxy in between changes files.",
        )


def _safe_names(names: Iterable[str], repo_id: str) -> list[str]:
    """Leave out names that would leave the repository's folder in the cache."""
    safe: list[str] = []
    unsafe: list[str] = []
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        leaves = parts.is_absolute() or ".." in parts.parts or re.match(r"[A-Za-z]:", name)
        (unsafe if leaves else safe).append(name)
    if unsafe:
        logger.warning("%r lists files outside its folder, which are passed over: %s", repo_id, few(unsafe))
    return safe


def _below(files: list[str], repo_id: str, options: HubOptions) -> frozenset[str]:
    """The files below the subfolder, relative to it."""
    if not options.subfolder:
        return frozenset(files)
    prefix = options.subfolder.strip("/") + "/"
    names = frozenset(name.removeprefix(prefix) for name in files if name.startswith(prefix))
    if not names:
        folders = sorted({str(PurePosixPath(name).parent) for name in files if "/" in name})
        raise FileError(
            f"The repository has no subfolder {options.subfolder!r}",
            where=f"{repo_id!r}, revision {options.revision!r}",
            found=", ".join(folders[:8]) or "no subfolders",
            mend=did_you_mean(options.subfolder, folders) or None,
        )
    return names


def _look_up_cached(repo_id: str, options: HubOptions, why: str, hint: str) -> Snapshot:
    commit = _cached_commit(repo_id, options)
    if commit is not None:
        folder = _snapshot_folder(repo_id, commit, options)
        if folder.is_dir():
            return Snapshot(commit, folder, None)
    cache = _repo_cache(repo_id, options)
    refs = cache / "refs"
    known = sorted(p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file())
    sub = f", subfolder {options.subfolder!r}" if options.subfolder else ""
    raise FileError(
        f"{repo_id!r} is not in the download cache, and no download is allowed since {why}",
        where=f"revision {options.revision!r}{sub}",
        expected=f"files below {cache}",
        found=f"revisions {', '.join(known)}" if known else "nothing of this repository",
        mend=f"{hint} Fetch it once with downloads allowed, or pass the cache_dir that holds it.".strip(),
    )


def _cached_commit(repo_id: str, options: HubOptions) -> str | None:
    """The commit that the cache last saw for a revision, if it holds files of it."""
    cache = _repo_cache(repo_id, options)
    commit = options.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (cache / "refs" / options.revision).read_text().strip()
        except OSError:
            return None
    return commit if (cache / "snapshots" / commit).is_dir() else None


def _snapshot_folder(repo_id: str, commit: str, options: HubOptions) -> Path:
    return _repo_cache(repo_id, options) / "snapshots" / commit / options.subfolder.strip("/")


def _repo_cache(repo_id: str, options: HubOptions) -> Path:
    return _cache_root(options) / ("models--" + repo_id.replace("/", "--"))


def _cache_root(options: HubOptions) -> Path:
    return Path(options.cache_dir or constants.HF_HUB_CACHE).expanduser()


def _remember_revision(repo_id: str, commit: str, options: HubOptions) -> None:
    """Note in the cache which commit a revision is, so that offline use finds it by name.

    ``huggingface_hub`` notes it only for downloads by branch or tag, and ours are by commit.
    """
    if options.revision == commit:
        return
    ref = _repo_cache(repo_id, options) / "refs" / options.revision
    with contextlib.suppress(OSError):  # a read-only cache still serves the files
        if ref.is_file() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=ref.parent.parent, delete=False) as file:
            file.write(commit)
        os.replace(file.name, ref)
