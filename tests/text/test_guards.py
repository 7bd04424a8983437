# SPDX-License-Identifier: Apache-2.0
"""Hostile tokenizer files: what the native library would choke on is refused, what it raises is ours."""

import base64
import json
import struct

import pytest

from pretrained import AutoTokenizer
from pretrained.core.untrusted import leads_out
from pretrained.errors import FileError, TokenizerError
from pretrained.text import guards
from support.tokenizers import write_json_tokenizer


def changed(folder, **parts):
    write_json_tokenizer(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return folder


def charsmap(table):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.mark.parametrize(
    "table", [b"\xff" * 9, struct.pack("<I", 2**31), b"ab", struct.pack("<I", 3) + b"abc"]
)
def test_a_charsmap_that_lies(tmp_path, table):
    with pytest.raises(TokenizerError, match=r"precompiled_charsmap\) is damaged.*found a trie of"):
        AutoTokenizer.from_pretrained(changed(tmp_path / "t", normalizer=charsmap(table)))


def test_a_charsmap_that_hides_behind_escapes(tmp_path):
    folder = changed(tmp_path / "t", normalizer=charsmap(b"\xff" * 9))
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("precompiled_", "\\u0070recompiled_"))
    with pytest.raises(TokenizerError, match="is damaged"):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"},
        {"type": "Prepend", "prepend": "x" * 300},
    ],
    ids=["replace", "prepend"],
)
def test_normalizers_that_grow(tmp_path, step):
    with pytest.raises(TokenizerError, match="normalizers make too much of a text"):
        AutoTokenizer.from_pretrained(
            changed(tmp_path / "t", normalizer={"type": "Sequence", "normalizers": [step] * 12})
        )


def test_the_normalizers_of_published_models_pass(tmp_path):
    steps = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"},
    ]
    AutoTokenizer.from_pretrained(
        changed(tmp_path / "t", normalizer={"type": "Sequence", "normalizers": steps})
    )


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path, capfd):
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    with pytest.raises(TokenizerError, match="fails on this text"):
        AutoTokenizer.from_pretrained(changed(tmp_path / "t", post_processor=processor))("hello")
    capfd.readouterr()


def test_other_ends_of_a_program_pass_through():
    with pytest.raises(KeyboardInterrupt), guards.library_faults("x"):
        raise KeyboardInterrupt


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    folder = write_json_tokenizer(tmp_path / "t")
    monkeypatch.setattr(guards, "MAX_FILE_BYTES", 10)
    with pytest.raises(TokenizerError, match=r"too large.*expected at most 10 bytes"):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_max_length": "x"}, "hold a value that cannot be.*TypeError"),
        ({"added_tokens_decoder": {"x": "y"}}, "hold a value that cannot be"),
        ({"model_input_names": [[1]]}, "must be a list of names"),
        ({"chat_template": 5}, "must be a text, or texts by name"),
        ({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 10**8}, "so many sentinels.*0 to 10000"),
    ],
)
def test_settings_that_cannot_be(tmp_path, config, message):
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(write_json_tokenizer(tmp_path / "t", **config))


def test_links_out_of_the_folder(tmp_path):
    folder = write_json_tokenizer(tmp_path / "t")
    (tmp_path / "elsewhere.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../elsewhere.json")
    assert leads_out(folder, folder / "tokenizer.json")
    with pytest.raises(FileError, match="link that leads out of the model's folder"):
        AutoTokenizer.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder / "tokenizer.json")  # what the user names may be any link


def test_links_inside_the_folder(tmp_path):
    folder = write_json_tokenizer(tmp_path / "t")
    (folder / "tokenizer.json").rename(folder / "real.json")
    (folder / "tokenizer.json").symlink_to("real.json")
    AutoTokenizer.from_pretrained(folder)
