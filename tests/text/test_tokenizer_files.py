# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  # one case a line
"""Which files make a tokenizer, in whatever combination they come."""

import json
import subprocess
import sys

import pytest

from pretrained.errors import ArgumentError, FileError, TokenizerError, UnknownArgumentError
from pretrained.text.tokenizer import AutoTokenizer
from support.texts import TEXTS
from support.tokenizers import WORDS, byte_alphabet, write_json_tokenizer, write_wordpiece

SENTENCES = [*TEXTS, "The cat sat, unbelievable cats!", "isn't 中文 Élan", "a" * 200, "[MASK] the[SEP]cat"]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


# WordPiece from vocab.txt


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}]
)
def test_wordpiece_as_the_oracle(config, tmp_path):
    from transformers import BertTokenizer

    ours = AutoTokenizer.from_pretrained(write_wordpiece(tmp_path, **config))
    oracle = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, **config)
    for text in SENTENCES:
        assert dict(ours(text, "a mat")) == dict(oracle(text, "a mat")), text
    assert ours.decode(ours("The cats").input_ids) == oracle.decode(oracle("The cats").input_ids)
    assert (ours.mask_token, ours.model_max_length) == ("[MASK]", 64)


def test_wordpiece_lacks_a_special_token(tmp_path):
    write_wordpiece(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    with pytest.raises(
        TokenizerError, match=r"lacks a special token .*vocab.txt\): expected \[CLS\], \[SEP\]"
    ):
        AutoTokenizer.from_pretrained(tmp_path)


# Byte-level BPE from vocab.json and merges.txt

MERGES = "#version: 0.2\nt h\nth e\nĠ the\nĠ a\n"


def write_bpe(folder, special, **config):
    tokens = [*special, *byte_alphabet(), "th", "the", "Ġthe", "Ġa"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return write(folder, vocab__json=vocab, merges__txt=MERGES, tokenizer_config__json=config)


@pytest.mark.parametrize(
    ("name", "add_prefix_space"),
    [
        ("GPT2Tokenizer", True),
        ("GPT2Tokenizer", False),
        ("RobertaTokenizer", True),
        ("RobertaTokenizer", False),
        ("Qwen2Tokenizer", False),  # which has no such setting
    ],
)
def test_bpe_as_the_oracle(name, add_prefix_space, tmp_path):
    import transformers

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if name.startswith("R") else ["<|endoftext|>"]
    config = {"tokenizer_class": name, "add_prefix_space": add_prefix_space}
    ours = AutoTokenizer.from_pretrained(write_bpe(tmp_path, special, **config))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in MERGES.splitlines()[1:]]
    more = {} if name == "Qwen2Tokenizer" else {"add_prefix_space": add_prefix_space}
    oracle = getattr(transformers, name)(vocab=vocab, merges=merges, **more)
    for text in [*SENTENCES, f"the a{special[0]}"]:
        assert dict(ours(text)) == dict(oracle(text)), text
        assert dict(ours(text, "the the")) == dict(oracle(text, "the the"))
    if name.startswith("R"):
        # The published tokenizer's mask takes the blank before it, which the oracle's class leaves.
        assert ours.tokenize("the <mask> a")[-2:] == ["<mask>", "Ġa"]


@pytest.mark.parametrize(
    ("special", "mask"), [(["<s>", "</s>", "<unk>", "<mask>"], "<mask>"), (["<|endoftext|>"], None)]
)
def test_bpe_kind_is_told_by_the_vocabulary(special, mask, tmp_path):
    write_bpe(tmp_path, special)
    (tmp_path / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token == mask


def test_merges_that_do_not_fit(tmp_path):
    write(write_bpe(tmp_path, ["<|endoftext|>"]), merges__txt="q q\n")
    with pytest.raises(TokenizerError, match="vocabulary and the merges do not fit each other"):
        AutoTokenizer.from_pretrained(tmp_path)


# Settings


def test_settings_of_both_files(tmp_path):
    folder = write_json_tokenizer(
        tmp_path, eos_token={"content": "</s>", "special": True}, unk_token=None, extra=[1]
    )
    write(folder, special_tokens_map__json={"pad_token": "</s>", "unk_token": "<unk>"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["extra"] == [1]
    assert saved["pad_token"] == "</s>"


def test_arguments_win_over_files(tmp_path):
    folder = write_json_tokenizer(tmp_path, padding_side="left", model_max_length=5)
    plain = AutoTokenizer.from_pretrained(folder)
    assert (plain.padding_side, plain.model_max_length) == ("left", 5)
    assert plain("a b c a b c", truncation=True).input_ids == [0, 5, 6, 7, 5]
    changed = AutoTokenizer.from_pretrained(
        folder, padding_side="right", model_max_length=3, pad_token="</s>"
    )
    assert (changed.padding_side, changed.model_max_length, changed.pad_token_id) == ("right", 3, 1)
    assert AutoTokenizer.from_pretrained(folder, use_fast=False, trust_remote_code=True)("a").input_ids == [
        0,
        5,
    ]
    with pytest.raises(UnknownArgumentError, match=r"'modelmax_length'.*Did you mean 'model_max_length'"):
        AutoTokenizer.from_pretrained(folder, modelmax_length=3)


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, [5]),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_eos_token": True}, [0, 5, 1]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, [0, 5]),
        ({"tokenizer_class": "LlamaTokenizer"}, [0, 5]),
    ],
)
def test_row_ends_by_config(config, ids, tmp_path):
    assert AutoTokenizer.from_pretrained(write_json_tokenizer(tmp_path, **config))("a").input_ids == ids


def test_row_ends_by_argument(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    assert AutoTokenizer.from_pretrained(folder, add_eos_token=True)("a").input_ids == [0, 5, 1]
    assert AutoTokenizer.from_pretrained(folder, add_bos_token=False)("a").input_ids == [5]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("BertTokenizerFast", ["input_ids", "token_type_ids", "attention_mask"]),
        ("DistilBertTokenizer", ["input_ids", "attention_mask"]),
        ("LlamaTokenizerFast", ["input_ids", "attention_mask"]),
    ],
)
def test_token_types_go_to_models_that_have_them(kind, names, tmp_path):
    folder = write_json_tokenizer(tmp_path, tokenizer_class=kind)
    assert list(AutoTokenizer.from_pretrained(folder)("a")) == names
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("a", return_token_type_ids=True)
    named = AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids"])
    assert list(named("a")) == ["input_ids"]


def test_tokens_that_the_vocabulary_lacks(tmp_path):
    added = {"9": {"content": "<late>", "special": True}, "8": {"content": "plain"}}
    folder = write_json_tokenizer(tmp_path, added_tokens_decoder=added, additional_special_tokens=["world"])
    write(folder, added_tokens__json={"older": 10})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["plain", "<late>", "older"]) == [8, 9, 10]
    assert tokenizer.all_special_ids == [0, 1, 2, 4, 9]


# Chat templates


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, "in the config"),
        ({"chat_template__json": {"chat_template": "in json"}}, "in json"),
        ({"chat_template__json": {"chat_template": "x"}, "chat_template__jinja": "in jinja"}, "in jinja"),
    ],
)
def test_where_the_template_is(files, template, tmp_path):
    folder = write_json_tokenizer(tmp_path, chat_template="in the config")
    assert AutoTokenizer.from_pretrained(write(folder, **files)).chat_template == template


def test_several_templates_are_read_and_saved(tmp_path):
    several = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    tokenizer = AutoTokenizer.from_pretrained(write_json_tokenizer(tmp_path, chat_template=several))
    assert tokenizer.chat_template == {"default": "a", "rag": "b"}
    tokenizer.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": "a", "rag": "b"}


# What is not there, and what is broken


def test_no_tokenizer(tmp_path):
    write(tmp_path, config__json={})
    with pytest.raises(
        TokenizerError,
        match=r"There is no tokenizer \(/.*expected tokenizer.json, or vocab.txt, or .*found config.json\. Load",
    ):
        AutoTokenizer.from_pretrained(tmp_path)
    write(tmp_path, spiece__model="x")
    with pytest.raises(TokenizerError, match=r"spiece.model alone is not read; save the tokenizer once"):
        AutoTokenizer.from_pretrained(tmp_path)
    write(tmp_path, m__gguf="x")
    with pytest.raises(TokenizerError, match=r"pass gguf_file='m.gguf'"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_missing_paths(tmp_path):
    with pytest.raises(FileError, match="No such file or folder"):
        AutoTokenizer.from_pretrained(tmp_path / "nowhere")
    write(tmp_path, config__json={})
    with pytest.raises(FileError, match=r"There is no m\.gguf"):
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    with pytest.raises(ArgumentError, match=r"read from a folder, a tokenizer.json or a .gguf file"):
        AutoTokenizer.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"not valid JSON \(/.*tokenizer.json\)"),
        ("tokenizer.json", "{}", r"cannot be used \(/.*tokenizer.json\)"),
        ("tokenizer_config.json", "{,", r"not valid JSON \(/.*tokenizer_config.json\)"),
        ("tokenizer_config.json", "[]", r"holds no JSON object \(/.*found list"),
        ("special_tokens_map.json", "nope", r"not valid JSON \(/.*special_tokens_map.json\)"),
    ],
)
def test_broken_json(name, content, message, tmp_path):
    write_json_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_no_text(name, tmp_path):
    write_json_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match=r"not UTF-8 text \(/"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_json_by_itself(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    assert AutoTokenizer.from_pretrained(folder / "tokenizer.json")("a").input_ids == [0, 5]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "a\\b", "", "x" * 300])
def test_a_template_whose_name_leads_out_of_the_folder_is_not_written(tmp_path, name):
    source = write_json_tokenizer(tmp_path / "a", chat_template=[{"name": name, "template": "x"}])
    tokenizer = AutoTokenizer.from_pretrained(source)
    with pytest.raises(TokenizerError, match="The name of a chat template cannot be a file's name"):
        tokenizer.save_pretrained(tmp_path / "deep" / "b")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".jinja")]


def test_saving_needs_a_folder_and_no_other_arguments(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_json_tokenizer(tmp_path))
    with pytest.raises(ArgumentError, match=r"saved into a folder .*found a file"):
        tokenizer.save_pretrained(tmp_path / "tokenizer.json")
    with pytest.raises(UnknownArgumentError, match="does not know the argument 'legacy_format'"):
        tokenizer.save_pretrained(tmp_path / "out", legacy_format=False)


def test_no_framework_is_imported(tmp_path):
    folder = write_json_tokenizer(tmp_path)
    code = (
        "import sys; from pretrained.text.tokenizer import AutoTokenizer;"
        f"AutoTokenizer.from_pretrained({str(folder)!r})(['a'], return_tensors='np');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'huggingface_hub', 'jinja2')))"
    )
    path = ":".join(p for p in sys.path if p)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False).returncode == 0
