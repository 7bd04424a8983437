# SPDX-License-Identifier: Apache-2.0
"""Sharing: files of a folder go to a repository of the Hub as one commit, with a model card.

A model, config or tokenizer is saved first, into a temporary folder or into one of the user's, and what that
save wrote is uploaded by `huggingface_hub`. Large files go first, each once: after a broken upload the next
push finds those that have arrived. The commit that makes them visible comes last. What the new weights
replace is deleted in it, so that no old file wins over a new one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pretrained.core.hub import check_token, is_repo_id
from pretrained.errors import ArgumentError, FileError, PretrainedError, UnknownArgumentError, did_you_mean

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.getLogger(__name__)

_CARD: Final = "README.md"
_ADAPTER: Final = "adapter_config.json"

PUSH_ARGUMENTS: Final = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags",
    "api",
)  # fmt: skip
"""What ``save_pretrained(push_to_hub=True)`` takes besides its own arguments."""

_RETIRED: Final = {
    "use_temp_dir": "Leave it out: a push always saves into a temporary folder.",
    "use_auth_token": "It is called token now.",
    "repo_path_or_name": "It is called repo_id now.",
    "repo_name": "It is called repo_id now.",
    "repo_url": "Pass repo_id='owner/name', and set HF_ENDPOINT for another server.",
    "organization": "Write it in repo_id: 'owner/name'.",
    "blocking": "Leave it out: a push returns when the commit is there.",
}

# model.fp16-00001-of-00002.safetensors, and pytorch_model.bin.index.fp16.json.
_INFIX = r"(?:\.(?P<variant>[\w.-]+?))??"
_WEIGHTS = re.compile(
    rf"(?P<stem>model|pytorch_model){_INFIX}(?:-\d{{5,}}-of-\d{{5,}})?\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(rf"(?P<format>model\.safetensors|pytorch_model\.bin)\.index{_INFIX}\.json")


class PushToHubMixin:
    """Adds `push_to_hub` to a class that has ``save_pretrained(folder, **options)``."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        tags: Sequence[str] | None = None,
        api: HfApi | None = None,
        **retired: Any,
    ) -> CommitInfo:
        """Save this into a temporary folder and upload that to the Hub as one commit.

        Args:
            repo_id: ``"name"`` or ``"owner/name"``; made where it does not exist.
            commit_message: Title of the commit; None for ``"Upload <class>"``.
            commit_description: Its body.
            private: Whether a new repository is private; None for the owner's default. With True, an
                existing one that is public is refused.
            token: A token that may write; None or True for the stored login.
            revision: Branch to commit to, made where it does not exist; None for the main one.
            create_pr: Open a pull request instead of committing.
            max_shard_size: Of models: largest weights file, in bytes or such as ``"5GB"`` (decimal, the
                default).
            safe_serialization: Of models: False for PyTorch's own format instead of safetensors.
            variant: Of models: infix of the weights' file names.
            tags: Added to the model card.
            api: The client to use; None for a new one.
            **retired: Names of older versions, which are refused with what took their place.

        Returns:
            The commit, with its address.

        Raises:
            FileError: the Hub refused or could not be reached; the message says what to do.
            ArgumentError: an argument that cannot work.
            UnknownArgumentError: an argument that nothing takes, such as a shard size for a config.
        """
        refuse_unknown("push_to_hub", retired, (*PUSH_ARGUMENTS, "max_shard_size", "variant"))
        # Only what was asked for is passed on: configs and tokenizers have no shards.
        options: dict[str, Any] = {}
        if max_shard_size is not None:
            options["max_shard_size"] = max_shard_size
        if not safe_serialization:
            options["safe_serialization"] = False
        if variant is not None:
            options["variant"] = variant
        with tempfile.TemporaryDirectory(prefix="pretrained-push-") as folder:
            self.save_pretrained(folder, **options)  # type: ignore[attr-defined]
            return push_files(
                Path(folder),
                _without_card(files_of(Path(folder))),
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=_with_own_tags(self, tags),
                api=api,
            )


def prepare_push(
    what: str, folder: Path, push: bool, kwargs: Mapping[str, Any], known: Collection[str] = ()
) -> Callable[[Any], None]:
    """Begin the part of a ``save_pretrained`` that pushes: check its arguments before anything is written.

    Args:
        what: The call, for errors: ``"save_pretrained"``.
        folder: Where the save will write.
        push: Its ``push_to_hub``.
        kwargs: The arguments that are left over for the push.
        known: What the save itself takes, for suggestions.

    Returns:
        A function of the saved object. Called after the save, it pushes the files that the save wrote; it
        does nothing where no push was asked for.

    Raises:
        UnknownArgumentError: an argument that nothing takes.
    """
    if not push:
        for name in kwargs:
            if name in PUSH_ARGUMENTS:
                raise UnknownArgumentError(
                    f"{what} does not know the argument {name!r}",
                    where=name,
                    mend="It belongs to push_to_hub=True.",
                )
    refuse_unknown(what, kwargs, PUSH_ARGUMENTS if push else (), near=known)
    if not push:
        return lambda _saved: None
    before = _stamps(folder)

    def push_saved(saved: Any) -> None:
        after = _stamps(folder)
        written = _without_card(name for name, stamp in after.items() if before.get(name) != stamp)
        options = {name: value for name, value in kwargs.items() if name in PUSH_ARGUMENTS}
        repo_id = options.pop("repo_id", None) or folder.absolute().name
        options["tags"] = _with_own_tags(saved, options.get("tags"))
        options["commit_message"] = options.get("commit_message") or f"Upload {type(saved).__name__}"
        push_files(folder, written, repo_id, **options)

    return push_saved


def _with_own_tags(saved: Any, tags: Any) -> Any:
    """Return the tags of a call with those that the object has been given; wrong ones as they are."""
    own = getattr(saved, "model_tags", None)
    return tags if not own or isinstance(tags, str) else [*(tags or ()), *own]


def refuse_unknown(
    what: str, kwargs: Mapping[str, Any], known: Collection[str], *, near: Collection[str] = ()
) -> None:
    """Raise UnknownArgumentError for the first argument that is not known.

    Args:
        what: The call.
        kwargs: Its further arguments.
        known: What may be among them.
        near: What else the call takes, for suggestions.
    """
    for name, value in kwargs.items():
        if name in known or (name in _RETIRED and value is None):
            continue
        raise UnknownArgumentError(
            f"{what} does not know the argument {name!r}",
            where=name,
            mend=_RETIRED.get(name) or did_you_mean(name, [*known, *near]) or "Leave it out.",
        )


def files_of(folder: Path) -> list[str]:
    """List what a push of a folder uploads: its files, subfolders included, by relative name.

    Hidden files and folders (a ``.git``, a ``.env``, what an interrupted save left) stay behind, except
    ``.gitattributes``; so does ``__pycache__``.

    Args:
        folder: A local folder.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            if not name.startswith(".") or name == ".gitattributes":
                found.append(Path(parent, name).relative_to(folder).as_posix())
    return sorted(found)


def check_weights(folder: Path, names: Collection[str]) -> None:
    """Read the headers of all weights among files, so that nothing broken is shared.

    Args:
        folder: Where they lie.
        names: Files of it.

    Raises:
        FileError: shards without their index.
        CheckpointError: a file is damaged, or an index and its files contradict each other.
    """
    # Imported here: it brings NumPy, which configs that are pushed do without.
    from pretrained.core.files import find_weights, open_checkpoint  # noqa: PLC0415

    for variant, end in sorted(_families(names), key=str):
        open_checkpoint(find_weights(folder, variant=variant, use_safetensors=end == "safetensors"))
    for name in names:
        if name.endswith(".safetensors") and _family(name) is None:  # an adapter's, or another model's
            open_checkpoint(folder / name)


def push_files(
    folder: Path,
    names: Collection[str],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload files to the Hub as one commit.

    Args:
        folder: Where they lie.
        names: Which, relative to it.
        repo_id: As for `PushToHubMixin.push_to_hub`, and so are the other arguments.
        commit_message: Title of the commit.
        commit_description: Its body.
        private: Whether a new repository is private.
        token: A token that may write.
        revision: Branch to commit to.
        create_pr: Open a pull request.
        tags: Added to the model card.
        api: The client.

    Raises:
        ArgumentError: no files, or an argument of a wrong kind.
        FileError: the Hub refused or could not be reached.
        CheckpointError: the weights among the files are damaged; nothing was sent.
    """
    _check_arguments(folder, names, repo_id, tags, private)
    check_token(token)
    check_weights(folder, names)
    # Imported here: saving to a local folder must work without it.
    from huggingface_hub import (  # noqa: PLC0415
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        constants,
    )

    from pretrained.core.hub_errors import NETWORK_ERRORS, explain_push  # noqa: PLC0415

    api = api or HfApi(token=token, library_name="pretrained")
    try:
        # The Hub answers with the full name, the user's own namespace included.
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        info = api.model_info(full_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if private and info.private is False:
            raise _not_private(full_id)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        old = replaced(there, names)
        card = _card(api, folder, names, there, full_id, info.sha, tags or ())
        adds = [CommitOperationAdd(name, folder / name) for name in names if name != _CARD or card is None]
        if card is not None:
            adds.append(CommitOperationAdd(_CARD, card.encode("utf-8")))
        deletes = [CommitOperationDelete(name, is_folder=False) for name in old]
        if old:
            logger.info("Replaced weights are deleted from %r: %s", full_id, ", ".join(old))
        with _bars_on_terminals_only():
            return api.create_commit(
                full_id,
                [*deletes, *adds],
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                # What was decided by looking at the repository must not meet another state of it.
                parent_commit=info.sha if old or (card is not None and _CARD in there) else None,
            )
    except PretrainedError:
        raise
    except (*NETWORK_ERRORS, RuntimeError, ValueError) as error:
        # The client wraps a failed upload in a RuntimeError, and malformed answers are ValueErrors.
        raise explain_push(
            error,
            repo_id,
            token=token if token is not None else getattr(api, "token", None),
            revision=revision,
            endpoint=getattr(api, "endpoint", None),
        ) from error


def replaced(there: Collection[str], names: Collection[str]) -> list[str]:
    """Return the files of a repository that new weights take the place of.

    Weights are one or several files of a stem, variant and format. Pushing another number of them would leave
    some of the old, and one old file wins over a new index.

    Args:
        there: Files of the repository.
        names: Files that are pushed.

    Raises:
        FileError: pickles are pushed where safetensors files are, which loads prefer.
    """
    families = _families(names)
    for variant, end in families:
        winner = (variant, "safetensors")
        if end == "bin" and winner not in families:
            present = sorted(name for name in there if _family(name) == winner)
            if present:
                raise FileError(
                    f"The repository holds {present[0]}, which is loaded instead of pytorch_model.bin",
                    mend="Push safetensors (the default), to another branch, or delete that file first.",
                )
    return sorted(name for name in there if name not in names and _family(name) in families)


def _family(name: str) -> tuple[str | None, str] | None:
    """The variant and format of weights, or None for other files."""
    match = _INDEX.fullmatch(name) or _WEIGHTS.fullmatch(name)
    return None if match is None else (match["variant"], match["format"].rpartition(".")[2])


def _families(names: Iterable[str]) -> set[tuple[str | None, str]]:
    return {family for name in names if (family := _family(name)) is not None}


def _without_card(names: Iterable[str]) -> list[str]:
    """Leave the card out: a save is no reason to replace the one that a repository has."""
    return [name for name in names if name != _CARD]


def _card(
    api: HfApi,
    folder: Path,
    names: Collection[str],
    there: Collection[str],
    repo_id: str,
    commit: str | None,
    tags: Sequence[str],
) -> str | None:
    """Return the model card to commit, or None where the files' own, the repository's, or none will do."""
    from pretrained.core.model_card import new_card, with_tags  # noqa: PLC0415  # as in check_weights

    families = sorted(_families(names), key=str)
    if _CARD in names:
        old = (folder / _CARD).read_text(encoding="utf-8")
    elif _CARD in there:
        if not tags:
            return None
        with tempfile.TemporaryDirectory(prefix="pretrained-card-") as cache:
            old_file = api.hf_hub_download(repo_id, _CARD, revision=commit, cache_dir=cache)
            old = Path(old_file).read_text(encoding="utf-8")
    elif not families and not tags and _ADAPTER not in names:
        return None
    elif (folder / _CARD).is_file():
        return with_tags((folder / _CARD).read_text(encoding="utf-8"), tags)
    else:
        variant = families[0][0] if families and (None, "safetensors") not in families else None
        return new_card(folder, {*names, *there}, repo_id, variant=variant, tags=tags)
    new = with_tags(old, tags)
    return None if new == old else new


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the client's upload bars, unlike those of its downloads, out of logs."""
    from huggingface_hub import constants, utils  # noqa: PLC0415  # as in push_files

    wanted = constants.HF_HUB_DISABLE_PROGRESS_BARS is False  # set to 0, and not merely unset
    if wanted or utils.are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file of a folder was written: a save renames new files into place."""
    stats = ((name, (folder / name).stat()) for name in files_of(folder) if (folder / name).exists())
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats}


def _check_arguments(folder: Path, names: Collection[str], repo_id: Any, tags: Any, private: Any) -> None:
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise ArgumentError(
            "A push needs the name of a repository",
            where="repo_id",
            expected="'name' or 'owner/name', of letters, digits, '-', '_' and '.'",
            found=repr(repo_id)[:200],
        )
    if not names:
        raise ArgumentError("There is nothing to push", where=folder, found="no files")
    if private not in (None, True, False):
        raise ArgumentError("private is True, False or None", where="private", found=repr(private))
    if isinstance(tags, str) or not all(isinstance(tag, str) and tag.strip() for tag in tags or ()):
        raise ArgumentError(
            "Tags are a list of texts", where="tags", found=repr(tags), mend="Such as tags=['tiny']."
        )


def _not_private(repo_id: str) -> FileError:
    return FileError(
        f"{repo_id!r} exists already and is public, and private=True was asked for",
        where="private",
        mend="Nothing was sent. Make it private in its settings first, or push to another name.",
    )
