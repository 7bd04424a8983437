# SPDX-License-Identifier: Apache-2.0
"""Sharing, against a stand-in for the Hub's client."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrained.core.push import PushToHubMixin
from pretrained.errors import FileError


class Thing(PushToHubMixin):
    """Something that can be saved."""

    def save_pretrained(self, folder, **options):
        self.options = options
        (Path(folder) / "config.json").write_text("{}")


class FakeApi:
    """Records the calls and what the uploaded folder held."""

    def __init__(self, card=None, fault=None):
        self.calls, self.files, self.card, self.fault = [], {}, card, fault

    def create_repo(self, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id, kwargs))
        if self.fault:
            raise self.fault
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def file_exists(self, repo_id, name, revision=None):
        return self.card is not None

    def hf_hub_download(self, repo_id, name, revision=None):
        return self.card

    def upload_folder(self, *, folder_path, **kwargs):
        self.files = {p.name: p.read_text() for p in Path(folder_path).iterdir()}
        self.folder = Path(folder_path)
        self.calls.append(("upload_folder", kwargs))
        return "commit"


def test_pushes_what_save_writes():
    api, thing = FakeApi(), Thing()
    assert thing.push_to_hub("thing", private=True, api=api) == "commit"
    assert api.files == {"config.json": "{}"}
    assert thing.options == {}
    assert not api.folder.exists()
    upload = {
        "repo_id": "me/thing",
        "commit_message": "Upload Thing",
        "commit_description": None,
        "revision": None,
        "create_pr": False,
    }
    assert api.calls == [
        ("create_repo", "thing", {"private": True, "exist_ok": True}),
        ("upload_folder", upload),
    ]


def test_options_reach_the_save_and_the_commit():
    api, thing = FakeApi(), Thing()
    thing.push_to_hub(
        "thing",
        commit_message="Better",
        commit_description="why",
        revision="dev",
        max_shard_size="1GB",
        safe_serialization=False,
        api=api,
    )
    assert thing.options == {"max_shard_size": "1GB", "safe_serialization": False}
    assert api.calls[1] == ("create_branch", "me/thing", {"branch": "dev", "exist_ok": True})
    assert api.calls[2][1]["commit_message"] == "Better"
    assert api.calls[2][1]["commit_description"] == "why"
    assert api.calls[2][1]["revision"] == "dev"


@pytest.mark.parametrize("kwargs", [{"create_pr": True, "revision": "dev"}, {"revision": "refs/pr/3"}])
def test_pull_requests_make_no_branch(kwargs):
    api = FakeApi()
    Thing().push_to_hub("thing", api=api, **kwargs)
    assert [call[0] for call in api.calls] == ["create_repo", "upload_folder"]


def test_tags_make_or_extend_the_card(tmp_path):
    api = FakeApi()
    Thing().push_to_hub("thing", tags=["tiny"], api=api)
    assert "tags:\n- tiny\n" in api.files["README.md"]
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\ntags:\n- old\n---\n# Mine\n")
    api = FakeApi(card=card)
    Thing().push_to_hub("thing", tags=["old", "tiny"], api=api)
    assert "tags:\n- old\n- tiny\n" in api.files["README.md"]
    assert "# Mine" in api.files["README.md"]


def test_refusal_says_the_mend():
    api = FakeApi(fault=OSError("403 Forbidden"))
    with pytest.raises(
        FileError, match=r"Pushing to 'thing' failed: found OSError: 403 Forbidden\. It needs a"
    ):
        Thing().push_to_hub("thing", api=api)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="positional"):
        Thing().push_to_hub("thing", "message")
