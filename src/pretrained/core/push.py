# SPDX-License-Identifier: Apache-2.0
"""Sharing a model, config or tokenizer: save it into a temporary folder and upload that as one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrained.errors import FileError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_MAX_SHARD_SIZE = "5GB"


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
        max_shard_size: int | str = _MAX_SHARD_SIZE,
        safe_serialization: bool = True,
        tags: Sequence[str] | None = None,
        api: HfApi | None = None,
    ) -> CommitInfo:
        """Save this into a temporary folder and upload it to the Hub as one commit.

        Args:
            repo_id: ``"name"`` or ``"org/name"``; made where it does not exist.
            commit_message: Title of the commit; None for ``"Upload <class>"``.
            commit_description: Its body.
            private: Whether a new repository is private; None for the owner's default. An existing one
                keeps what it has.
            token: A token that may write; None or True for the stored login.
            revision: Branch to commit to, made where it does not exist; None for the main one.
            create_pr: Open a pull request instead of committing.
            max_shard_size: Largest weights file, in bytes or such as ``"5GB"`` (decimal).
            safe_serialization: False for PyTorch's own format instead of safetensors.
            tags: Added to the model card, which is made where there is none.
            api: The client to use; None for a new one.

        Returns:
            The commit, with its address.

        Raises:
            FileError: the Hub refused or could not be reached; nothing was committed.
        """
        # Only what differs from the default is passed on: configs and tokenizers have no shards.
        options: dict[str, Any] = {}
        if max_shard_size != _MAX_SHARD_SIZE:
            options["max_shard_size"] = max_shard_size
        if not safe_serialization:
            options["safe_serialization"] = False
        with tempfile.TemporaryDirectory(prefix="pretrained-push-") as folder:
            self.save_pretrained(folder, **options)  # type: ignore[attr-defined]
            return push_folder(
                Path(folder),
                repo_id,
                api=api or _new_api(token),
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                private=private,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            )


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    api: HfApi,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Upload a folder to the Hub as one commit.

    Args:
        folder: What to upload; the model card is written into it where `tags` asks for one.
        repo_id: As for `PushToHubMixin.push_to_hub`, and so are the other arguments.
        api: The client.
        commit_message: Title of the commit.
        commit_description: Its body.
        private: Whether a new repository is private.
        revision: Branch to commit to.
        create_pr: Open a pull request.
        tags: Added to the model card.

    Raises:
        FileError: the Hub refused or could not be reached.
    """
    # Imported here: saving to a local folder must work without it.
    from pretrained.core.hub_errors import NETWORK_ERRORS, first_line  # noqa: PLC0415

    try:
        # The Hub answers with the full name, the user's own namespace included.
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        if tags:
            _add_tags(folder, full_id, tags, api, revision)
        return api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except NETWORK_ERRORS as error:
        raise FileError(
            f"Pushing to {repo_id!r} failed",
            where=f"branch {revision!r}" if revision else None,
            found=first_line(error),
            mend="It needs a token that may write there: run `hf auth login` or pass token=...",
        ) from error


def _new_api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi  # noqa: PLC0415  # as in push_folder

    return HfApi(token=token, library_name="pretrained")


def _add_tags(folder: Path, repo_id: str, tags: Sequence[str], api: HfApi, revision: str | None) -> None:
    """Write a model card with the tags, keeping the repository's card where it has one."""
    from huggingface_hub import ModelCard  # noqa: PLC0415  # as in push_folder

    card_path = folder / "README.md"
    if not card_path.exists() and api.file_exists(repo_id, "README.md", revision=revision):
        published = api.hf_hub_download(repo_id, "README.md", revision=revision)
        card_path.write_text(Path(published).read_text(encoding="utf-8"), encoding="utf-8")
    text = card_path.read_text(encoding="utf-8") if card_path.exists() else "---\n---\n"
    card = ModelCard(text)
    known = list(card.data.get("tags") or [])
    card.data["tags"] = known + [tag for tag in tags if tag not in known]
    card.save(card_path)
