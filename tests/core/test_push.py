# SPDX-License-Identifier: Apache-2.0
"""Sharing, as far as it needs no server: tests/test_sharing.py has the rest."""

import json

import pytest

from pretrained.core.model_card import new_card, with_tags
from pretrained.core.push import PushToHubMixin, check_weights, files_of, prepare_push, replaced
from pretrained.errors import ArgumentError, FileError, UnknownArgumentError


class Thing(PushToHubMixin):
    """Something that can be saved."""

    def save_pretrained(self, folder, **options):
        raise AssertionError("nothing should be saved")


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError, match="positional"):
        Thing().push_to_hub("thing", "message")


def test_unknown_arguments_are_refused_before_anything_is_saved():
    with pytest.raises(UnknownArgumentError, match=r"push_to_hub does not know the argument 'tag'.*'tags'"):
        Thing().push_to_hub("thing", tag="x")
    # A default of older versions, spelled out, asks for nothing.
    with pytest.raises(AssertionError, match="nothing should be saved"):
        Thing().push_to_hub("thing", use_auth_token=None)


def test_a_save_without_a_push_takes_none_of_its_arguments(tmp_path):
    with pytest.raises(UnknownArgumentError, match=r"'token' \(token\)\. It belongs to push_to_hub=True"):
        prepare_push("Saving", tmp_path, False, {"token": "x"})
    with pytest.raises(UnknownArgumentError, match="Did you mean 'variant'"):
        prepare_push("Saving", tmp_path, False, {"varient": "x"}, ("variant",))
    prepare_push("Saving", tmp_path, False, {})(None)


@pytest.mark.parametrize(
    ("there", "names", "old"),
    [
        ("model.safetensors", "model.safetensors", ""),
        ("model.safetensors a.txt", "model-00001-of-00002.safetensors", "model.safetensors"),
        (
            "model-00001-of-00002.safetensors model.safetensors.index.json model.fp16.safetensors",
            "model.safetensors",
            "model-00001-of-00002.safetensors model.safetensors.index.json",
        ),
        (
            "model.safetensors model.a-b-00001-of-00002.safetensors model.safetensors.index.a-b.json",
            "model.a-b.safetensors",
            "model.a-b-00001-of-00002.safetensors model.safetensors.index.a-b.json",
        ),
        ("pytorch_model.bin adapter_model.safetensors", "model.safetensors", ""),
        ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin"),
        ("model.safetensors", "config.json", ""),
        ("sub/model.safetensors", "model-00001-of-00002.safetensors", ""),
    ],
)
def test_which_files_new_weights_replace(there, names, old):
    assert replaced(there.split(), names.split()) == old.split()


def test_pickles_do_not_go_beside_safetensors():
    with pytest.raises(FileError, match=r"holds model.safetensors, which is loaded instead of pytorch_model"):
        replaced(["model.safetensors"], ["pytorch_model.bin"])
    assert replaced(["model.safetensors"], ["pytorch_model.bin", "model.safetensors"]) == []
    assert replaced(["model.safetensors"], ["pytorch_model.fp16.bin"]) == []


def test_what_a_folder_is_made_of(tmp_path):
    for name in ("config.json", "sub/a.txt", ".git/HEAD", ".env", ".gitattributes", "__pycache__/x.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_of(tmp_path) == [".gitattributes", "config.json", "sub/a.txt"]
    assert files_of(tmp_path / "absent") == []


def test_shards_without_an_index_are_not_pushed(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="There are no weights"):
        check_weights(tmp_path, files_of(tmp_path))
    check_weights(tmp_path, ["config.json"])


# Cards


def test_a_card_without_weights_claims_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32000}))
    card = new_card(tmp_path, ["config.json"], "me/x", tags=["yes", 'a "b"'])
    assert card.startswith(
        '---\nlibrary_name: pretrained\ntags:\n- llama\n- "yes"\n- "a \\"b\\""\n---\n\n# x\n\n'
    )
    assert "| vocabulary | 32,000 |" in card
    assert "parameters" not in card and "from_pretrained" not in card and "pipeline_tag" not in card


@pytest.mark.parametrize("config", ['{"model_type": "x\\n- evil", "architectures": ["<b>"]}', "{}"])
def test_a_config_cannot_write_the_card(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    card = new_card(tmp_path, ["config.json"], "me/x")
    assert "evil" not in card and "<b>" not in card


def test_tags_are_added_once_and_nothing_else_changes():
    text = "---\nlicense: mit\n---\n# Mine\n"
    assert with_tags(text, ["a", "a"]) == "---\nlicense: mit\ntags:\n- a\n---\n# Mine\n"
    assert with_tags("---\ntags: [a]\n---\n", ["a"]) == "---\ntags: [a]\n---\n"
    assert with_tags("# Mine\n", ["a"]) == "---\ntags:\n- a\n---\n# Mine\n"
    with pytest.raises(ArgumentError, match="head cannot be read"):
        with_tags("---\n[\n---\n", ["a"])
