# SPDX-License-Identifier: Apache-2.0
"""From an id, a folder or a file to local files.

`resolve` decides once where a model's files come from and returns a `Source`; every later question
("its config.json?", "its weights?") is asked of that value. A local path never reaches the network nor
imports ``huggingface_hub``. An id is resolved to one commit, so all files of a load are of one version,
and the repository is listed once, so a file that is not there costs no request.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pretrained.core.save_journal import text_file
from pretrained.core.untrusted import fault_of, refuse_link_out
from pretrained.core.weights_names import INDEX_NAME, choose_weights, few
from pretrained.errors import ArgumentError, CheckpointError, FileError, did_you_mean

# The Hub's rule for names: letters, digits, "-", "_", "."; no dot or dash at the ends; no "--" or "..".
_ID = re.compile(r"(?:[A-Za-z0-9_][\w\-.]{0,95}/)?[A-Za-z0-9_][\w\-.]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubOptions:
    """How to look a model up; the arguments of every ``from_pretrained`` that concern files.

    Attributes:
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the repository (or the local folder) that holds the files.
        token: A token; True for the stored login and an error without one; None for the stored login
            where there is one; False to send none.
        cache_dir: Download cache; None for ``HF_HUB_CACHE``, else ``HF_HOME``'s, else the user's.
        force_download: Fetch again what the cache holds.
        local_files_only: Use the cache only; no request is made. ``HF_HUB_OFFLINE=1`` does the same.
        proxies: Refused: ``huggingface_hub`` takes proxies from the environment only.
        endpoint: The Hub's address; None for ``HF_ENDPOINT``, else the public one.
    """

    revision: str = "main"
    subfolder: str = ""
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    local_files_only: bool = False
    proxies: dict[str, str] | None = None
    endpoint: str | None = None

    @classmethod
    def take(cls, kwargs: MutableMapping[str, Any]) -> HubOptions:
        """Take the Hub's arguments out of a call's keyword arguments.

        Args:
            kwargs: Changed in place: the names that this class knows are removed. A None stands for the
                default, as in the calls that users write.
        """
        taken = {f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs}
        return cls(**{name: value for name, value in taken.items() if value is not None})

    def check(self) -> None:
        """Raise ArgumentError where the options contradict each other or cannot be obeyed."""
        if self.proxies:
            raise ArgumentError(
                "Proxies cannot be set for one call",
                where="proxies",
                mend="Set the environment variables HTTP_PROXY and HTTPS_PROXY, which downloads obey.",
            )
        if self.force_download and self.local_files_only:
            raise ArgumentError(
                "force_download=True asks for the network and local_files_only=True forbids it",
                mend="Pass only one of them.",
            )
        check_token(self.token)
        _check_inside(self.subfolder, "subfolder")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files come from.

    Attributes:
        kind: ``"folder"`` or ``"file"`` for local ones, ``"hub"`` for a repository.
        name: The id, or the local path.
        folder: The local folder that holds the files (``subfolder`` included). For a repository it is
            the snapshot in the cache, which holds what has been fetched so far.
        path: The file itself where ``kind`` is ``"file"``.
        commit: The repository's commit.
        names: Files of the repository below ``subfolder``; None where the folder says it.
        options: How the source was looked up.
    """

    kind: Literal["folder", "file", "hub"]
    name: str
    folder: Path
    path: Path | None = None
    commit: str | None = None
    names: frozenset[str] | None = None
    options: HubOptions = HubOptions()
    _fetched: dict[str, Path] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.name

    def listing(self) -> frozenset[str]:
        """Names of the files, relative, with forward slashes; in a local folder down to its subfolders."""
        if self.names is not None:
            return self.names
        return frozenset(_listing(self.folder))

    def file(self, name: str, *, required: bool = True) -> Path | None:
        """Return a file by its name, downloading it if need be.

        Args:
            name: Relative to the folder, such as ``"config.json"``.
            required: False to get None for a file that does not exist.

        Raises:
            FileError: the file is required and does not exist, or cannot be fetched.
            ArgumentError: the name leaves the folder.
        """
        _check_inside(name, "file name")
        if self.names is not None and name in self.names:
            return self._fetch(name)
        if self.names is None:
            path = text_file(self.folder, name)
            if os.path.isfile(path):
                if self.path != path:  # what the user names may be any link
                    refuse_link_out(self.folder, path)
                return path
        if not required:
            return None
        raise self._missing(name)

    def require(self, name: str) -> Path:
        """Return a file that must exist; see `file`."""
        path = self.file(name)
        assert path is not None
        return path

    def weights_folder(
        self,
        *,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        gguf_file: str | None = None,
    ) -> Path:
        """Return a local folder that holds the weights, fetching exactly the files that they need.

        Args:
            variant: Infix of the file names (``"fp16"`` for ``model.fp16.safetensors``).
            use_safetensors: None prefers safetensors, True requires it, False skips it.
            gguf_file: A GGUF file to use instead.

        Raises:
            FileError: no such weights, or they cannot be fetched.
            CheckpointError: the index is malformed or names files that the repository lacks.
        """
        if self.names is None:
            return self.folder
        name = choose_weights(
            self.names,
            variant=variant,
            use_safetensors=use_safetensors,
            gguf_file=gguf_file,
            where=self._label(),
        )
        path = self.require(name)
        if INDEX_NAME.fullmatch(name):
            # Imported here: only an index of a repository needs it, and it brings NumPy.
            from pretrained.core.files import read_index  # noqa: PLC0415

            for shard in read_index(path).files:
                if shard not in self.names:
                    raise CheckpointError(
                        f"The index names the file {shard!r}, which the repository does not hold",
                        where=f"{self._label()}, {name}",
                        mend=did_you_mean(shard, self.names)
                        or "The upload is incomplete; try another revision.",
                    )
                self._fetch(shard)
        return self.folder

    def _fetch(self, name: str) -> Path:
        """Download a file that the repository is known to hold, at this source's commit."""
        # Remembered so that force_download fetches a file once a load, not once a question.
        if name not in self._fetched:
            from pretrained.core import hub_remote  # noqa: PLC0415  # see _resolve_id

            self._fetched[name] = hub_remote.download(self.name, name, str(self.commit), self.options)
        return self._fetched[name]

    def _label(self) -> str:
        if self.kind != "hub":
            return str(self.folder)
        sub = f", subfolder {self.options.subfolder!r}" if self.options.subfolder else ""
        return f"{self.name!r}, revision {self.options.revision!r}{sub}"

    def _missing(self, name: str) -> FileError:
        if self.names is None and (fault := fault_of(self.folder / name)) != "does not exist":
            return FileError(
                f"{name} {fault}",
                where=self.folder,
                expected="a file",
                mend="Check its permissions." if "reached" in fault else "Put the file itself there.",
            )
        names = self.listing()
        elsewhere = sorted(n for n in names if PurePosixPath(n).name == name)
        ggufs = sorted(n for n in names if n.endswith(".gguf"))
        if elsewhere:
            parent = str(PurePosixPath(self.options.subfolder, elsewhere[0]).parent)
            mend = f"There is one in a subfolder: pass subfolder={parent!r}."
        elif name == "config.json" and ggufs:
            mend = f"This is a GGUF model: pass gguf_file={ggufs[0]!r}."
        elif name == "config.json" and "adapter_config.json" in names:
            mend = "It holds an adapter, not a model: load the base model that adapter_config.json names."
        elif near := did_you_mean(name, names):
            mend = near
        elif self.kind == "hub" and self.names is None:
            mend = "Only the download cache was searched; allow downloads to look at the Hub."
        else:
            mend = "Check the path, or save the model there first with save_pretrained."
        return FileError(f"There is no {name}", where=self._label(), found=few(names), mend=mend)


def resolve(path_or_id: str | os.PathLike[str] | Source, options: HubOptions | None = None) -> Source:
    """Find where a model's files are.

    Args:
        path_or_id: A local folder or file, or the id of a repository (``"org/name"``). What exists
            locally wins; what is written like a path (absolute, from ``.`` or ``~``, or of more than
            two parts) is never looked for on the network. A `Source` is returned as it is.
        options: Revision, token, cache and so on; None for the defaults.

    Raises:
        FileError: nothing is there, or it cannot be reached; an empty folder; a malformed id.
        ArgumentError: options that contradict each other.
    """
    if isinstance(path_or_id, Source):
        return path_or_id
    options = options or HubOptions()
    if not isinstance(path_or_id, str | os.PathLike) or not os.fspath(path_or_id):
        raise ArgumentError(
            "A model's path or id must be a non-empty string or path",
            found=repr(path_or_id),
            where="path_or_id",
        )
    options.check()
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    try:
        kind = "folder" if path.is_dir() else "file" if path.is_file() else None
    except OSError as error:  # longer than the system allows
        raise FileError("This cannot be a path", where=f"{text[:100]}...", found=error.strerror) from error
    if kind == "folder":
        return _resolve_folder(path, options)
    if kind == "file":
        if options.subfolder:
            raise ArgumentError(
                "A file has no subfolders",
                where=path,
                found=f"subfolder={options.subfolder!r}",
                mend="Drop subfolder.",
            )
        return Source("file", str(path), path.parent, path=path, options=options)
    if isinstance(path_or_id, os.PathLike) or _written_like_a_path(text):
        raise _no_such_path(text, path)
    return _resolve_id(text, options)


def _resolve_folder(path: Path, options: HubOptions) -> Source:
    folder = path / options.subfolder if options.subfolder else path
    if not folder.is_dir():
        near = did_you_mean(options.subfolder, [p.name for p in path.iterdir() if p.is_dir()])
        raise FileError(
            f"The folder has no subfolder {options.subfolder!r}", where=path.absolute(), mend=near or None
        )
    try:
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise FileError(
            "The folder cannot be read",
            where=folder.absolute(),
            found=str(error),
            mend="Check its permissions.",
        ) from error
    if is_empty:
        raise FileError(
            "The folder is empty",
            where=folder.absolute(),
            mend="Save a model there with save_pretrained, or check the path.",
        )
    return Source("folder", str(path), folder, options=options)


def _written_like_a_path(text: str) -> bool:
    normal = text.replace(os.sep, "/")
    return os.path.isabs(text) or normal[0] in ".~" or normal.count("/") > 1 or normal.endswith("/")


def _no_such_path(text: str, path: Path) -> FileError:
    if re.match(r"https?://", text):
        parts = text.split("://", 1)[1].split("/")
        name = "/".join(parts[1:3])
        return FileError("A web address is not a model id", where=text, mend=f"Pass the id {name!r}.")
    path = Path(os.path.abspath(path))
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    fault = fault_of(path)
    if parent == path.parent and fault != "does not exist":
        return FileError(f"This {fault}", where=path, expected="a file or a folder", mend="Check the path.")
    missing = path.relative_to(parent).parts[0]
    near = did_you_mean(missing, (p.name for p in _peek(parent)))
    if parent != path.parent:
        near = f"{str(parent)!r} has no {missing!r}. {near}".strip()
    return FileError(
        "No such file or folder", where=path, mend=near or f"{str(parent)!r} holds nothing like it."
    )


def _peek(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):  # an unreadable folder only costs the suggestion
        return list(folder.iterdir())
    return []


def _resolve_id(repo_id: str, options: HubOptions) -> Source:
    if not is_repo_id(repo_id):
        raise FileError(
            f"{repo_id!r} is neither an existing path nor the id of a repository",
            expected="an id such as 'org/name', of letters, digits, '-', '_' and '.'",
            where=f"looked in {Path.cwd()}",
            mend=_near_local(repo_id) or None,
        )
    # Imported here: local paths work without it, and huggingface_hub costs more than this whole package.
    from pretrained.core import hub_remote  # noqa: PLC0415

    found = hub_remote.look_up(repo_id, options, hint=_near_local(repo_id))
    return Source("hub", repo_id, found.folder, commit=found.commit, names=found.names, options=options)


def is_repo_id(text: str) -> bool:
    """Whether a text can be the name of a repository, ``"name"`` or ``"owner/name"``.

    Args:
        text: What the user wrote.
    """
    rules = _ID.fullmatch(text) and ".." not in text and "--" not in text
    return bool(rules) and not text.endswith((".git", "-", "."))


def check_token(token: object) -> None:
    """Raise ArgumentError for a token that cannot be sent; the message does not show it.

    Args:
        token: A token, True, False or None.
    """
    if isinstance(token, str) and (not token or re.search(r"[^!-~]", token)):
        raise ArgumentError(
            "The token is empty, or has blanks or line ends in it",
            where="token",
            mend="Strip what was read from a file; None means the stored login.",
        )


def _check_inside(name: str, what: str) -> None:
    """Refuse a name that would leave the model's folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ArgumentError(f"The {what} leaves the model's folder", found=repr(name))


def _listing(folder: Path) -> list[str]:
    # Two levels only: a user may point at a folder that holds half the disk.
    top = _peek(folder)
    inner = [path for sub in top if os.path.isdir(sub) for path in _peek(sub)]
    return [path.relative_to(folder).as_posix() for path in top + inner if os.path.isfile(path)]


def _near_local(name: str) -> str:
    """A suggestion among local folders, for an id that may be a mistyped path."""
    parent, _, last = name.rpartition("/")
    near = did_you_mean(last, (p.name for p in _peek(Path(parent or "."))))
    return f"There is no such local path either. {near}" if near else ""
