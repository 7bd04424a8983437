# SPDX-License-Identifier: Apache-2.0
"""``pretrained push FOLDER REPO``: upload a folder to the hub as one commit, without a framework."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pretrained.core.push import check_weights, files_of, push_files
from pretrained.core.report import format_bytes
from pretrained.errors import FileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument("folder", metavar="FOLDER", help="what to upload, subfolders included")
    parser.add_argument("repo", metavar="REPO", help="name or owner/name; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make it a private repository")
    parser.add_argument("--revision", help="branch to commit to; made where it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", metavar="TEXT", help="title of the commit")
    parser.add_argument("--description", metavar="TEXT", help="body of the commit")
    parser.add_argument("--tag", action="append", metavar="TAG", help="add to the model card; repeatable")
    parser.add_argument("--token", help="a token that may write (default: HF_TOKEN, else the stored login)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the files, send nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(execute=push)


def push(options: argparse.Namespace) -> int:
    """Check a folder's weights and upload it, or say what would be uploaded.

    Args:
        options: The parsed arguments.
    """
    folder = Path(options.folder).expanduser()
    if not folder.is_dir():
        raise FileError(
            "There is no such folder",
            where=folder.absolute(),
            mend="Name a folder that save_pretrained wrote.",
        )
    names = files_of(folder)
    check_weights(folder, names)
    sizes = {name: (folder / name).stat().st_size for name in names}
    facts: dict[str, object] = {"repo": options.repo, "files": sizes, "nbytes": sum(sizes.values())}
    if not options.json:
        _print_files(sizes)
    if options.dry_run:
        if not options.json:
            print(f"nothing was sent: this is what a push to {options.repo} would upload")
    else:
        commit = push_files(
            folder,
            names,
            options.repo,
            commit_message=options.message or f"Upload {folder.absolute().name}",
            commit_description=options.description,
            private=True if options.private else None,
            token=options.token,
            revision=options.revision,
            create_pr=options.create_pr,
            tags=options.tag,
        )
        facts |= {"commit": commit.oid, "url": commit.pr_url or commit.commit_url}
        if not options.json:
            print(f"{'proposed' if commit.pr_url else 'pushed'}: {facts['url']}")
    if options.json:
        print(json.dumps(facts, indent=2))
    return 0


def _print_files(sizes: dict[str, int]) -> None:
    rows = [*sizes.items(), (f"{len(sizes)} files", sum(sizes.values()))]
    width = max(len(name) for name, _ in rows)
    for name, size in rows:
        print(f"{name:<{width}}  {format_bytes(size):>10}", flush=True)
