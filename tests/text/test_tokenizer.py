# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's calls: against transformers on a real vocabulary, and by hand on tiny ones."""

import threading

import numpy as np
import pytest

from pretrained.errors import ArgumentError, NotYetError, TokenizerError, UnknownArgumentError
from pretrained.text.tokenizer import AutoTokenizer, PreTrainedTokenizer
from support.texts import TEXTS
from support.tokenizers import write_json_tokenizer, write_wordpiece


@pytest.fixture
def bert(tmp_path):
    return AutoTokenizer.from_pretrained(write_wordpiece(tmp_path / "bert"))


@pytest.fixture
def llama(tmp_path):
    return AutoTokenizer.from_pretrained(write_json_tokenizer(tmp_path / "llama"))


# Against the oracle


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    from transformers import AutoTokenizer as Oracle

    return AutoTokenizer.from_pretrained(minilm_dir), Oracle.from_pretrained(minilm_dir)


@pytest.mark.realweights
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 7},
        {"padding": "max_length", "max_length": 20, "truncation": True},
        {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True},
        {"return_token_type_ids": False, "return_attention_mask": False},
    ],
)
def test_single_texts_as_the_oracle(arguments, minilm):
    ours, oracle = minilm
    for text in TEXTS:
        want = dict(oracle(text, **arguments))
        if "length" in want:
            want["length"] = len(want["input_ids"])
        assert dict(ours(text, **arguments)) == want, text
        assert ours.tokenize(text) == oracle.tokenize(text)


@pytest.mark.realweights
@pytest.mark.parametrize("max_length", [3, 4, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_batches_and_pairs_as_the_oracle(max_length, padding_side, minilm):
    ours, oracle = minilm
    arguments = {
        "padding": True,
        "truncation": True,
        "max_length": max_length,
        "padding_side": padding_side,
    }
    for pairs in (None, TEXTS[::-1]):
        assert dict(ours(TEXTS, pairs, **arguments)) == dict(oracle(TEXTS, pairs, **arguments))


@pytest.mark.realweights
@pytest.mark.parametrize("truncation", ["only_first", "only_second"])
def test_one_sided_truncation_as_the_oracle(truncation, minilm):
    ours, oracle = minilm
    for text in TEXTS[7:11]:
        pair = ("a short text", text) if truncation == "only_second" else (text, "a short text")
        arguments = {"truncation": truncation, "max_length": 12}
        assert dict(ours(*pair, **arguments)) == dict(oracle(*pair, **arguments))


@pytest.mark.realweights
@pytest.mark.parametrize("kind", ["np", "pt"])
def test_tensors_as_the_oracle(kind, minilm):
    ours, oracle = minilm
    got, want = (t(TEXTS, padding=True, return_tensors=kind) for t in (ours, oracle))
    assert list(got) == list(want)
    for name in want:
        assert type(got[name]) is type(want[name])
        assert got[name].dtype == want[name].dtype
        assert np.array_equal(np.asarray(got[name]), np.asarray(want[name]))


@pytest.mark.realweights
def test_decoding_and_vocabulary_as_the_oracle(minilm):
    ours, oracle = minilm
    rows = oracle(TEXTS).input_ids
    for skip in (True, False):
        for tidy in (None, True, False):
            want = oracle.batch_decode(rows, skip_special_tokens=skip, clean_up_tokenization_spaces=tidy)
            got = ours.batch_decode(rows, skip_special_tokens=skip, clean_up_tokenization_spaces=tidy)
            assert got == want
    want = dict(oracle(TEXTS, padding=True, pad_to_multiple_of=64))
    assert dict(ours(TEXTS, padding=True, pad_to_multiple_of=64)) == want
    assert ours.get_vocab() == oracle.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(oracle), oracle.vocab_size)
    assert ours.special_tokens_map == oracle.special_tokens_map
    assert set(ours.all_special_ids) == set(oracle.all_special_ids)
    assert ours.model_max_length == oracle.model_max_length
    tokens = ["the", "##s", "[CLS]", "no such token"]
    assert ours.convert_tokens_to_ids(tokens) == oracle.convert_tokens_to_ids(tokens)
    assert ours.convert_ids_to_tokens(rows[0]) == oracle.convert_ids_to_tokens(rows[0])


@pytest.mark.realweights
def test_pad_as_the_oracle(minilm):
    ours, oracle = minilm
    rows = [dict(oracle(text)) for text in TEXTS[:6]]
    want, got = (dict(t.pad(rows, return_tensors="np")) for t in (oracle, ours))
    assert {k: v.tolist() for k, v in got.items()} == {k: v.tolist() for k, v in want.items()}


@pytest.mark.realweights
def test_saved_files_load_here_and_in_the_oracle(minilm, tmp_path):
    from transformers import AutoTokenizer as Oracle

    ours, _ = minilm
    files = ours.save_pretrained(tmp_path)
    assert sorted(file.rpartition("/")[2] for file in files) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    want = dict(ours(TEXTS))
    assert dict(AutoTokenizer.from_pretrained(tmp_path)(TEXTS)) == want
    assert dict(Oracle.from_pretrained(tmp_path)(TEXTS)) == want


# Shapes of results


def test_single_text_is_flat_and_tensors_are_not(llama):
    assert llama("hello world") == {"input_ids": [0, 3, 4], "attention_mask": [1, 1, 1]}
    assert llama(["hello"]) == {"input_ids": [[0, 3]], "attention_mask": [[1, 1]]}
    assert llama("hello", return_tensors="np").input_ids.shape == (1, 2)
    assert llama.encode("hello world", add_special_tokens=False) == [3, 4]
    assert llama.encode("a b", return_tensors="pt").tolist() == [[0, 5, 6]]


def test_files_own_padding_and_truncation_are_not_inherited(llama):
    assert llama("a b c a b c").input_ids == [0, 5, 6, 7, 5, 6, 7]
    llama("a b c", truncation=True, max_length=2)
    assert llama("a b c").input_ids == [0, 5, 6, 7]


def test_text_target_becomes_labels(llama):
    llama.pad_token = "</s>"
    batch = llama(["a", "b"], text_target=["a b c", "a"], padding=True)
    assert batch["input_ids"] == [[0, 5], [0, 6]]
    assert batch["labels"] == [[0, 5, 6, 7], [0, 5, 1, 1]]
    assert llama(text_target="a")["input_ids"] == [0, 5]
    with pytest.raises(TokenizerError, match="one target for each text: found 1 for 2"):
        llama(["a", "b"], text_target=["a"])


def test_left_padding_and_truncation(llama):
    llama.pad_token, llama.padding_side, llama.truncation_side = "</s>", "left", "left"
    batch = llama(["a b c", "a"], padding=True)
    assert batch == {"input_ids": [[0, 5, 6, 7], [1, 1, 0, 5]], "attention_mask": [[1] * 4, [0, 0, 1, 1]]}
    assert llama("a b c", truncation=True, max_length=3).input_ids == [0, 6, 7]
    assert llama("a b c", max_length=3).input_ids == [0, 6, 7]


def test_pad_keeps_other_columns_and_takes_tensors(llama):
    import torch

    llama.pad_token = "</s>"
    rows = [{"input_ids": torch.tensor([5, 6]), "labels": 1}, {"input_ids": np.array([5]), "labels": 0}]
    padded = llama.pad(rows, return_tensors="np")
    assert padded.input_ids.tolist() == [[5, 6], [5, 1]]
    assert padded.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert padded.labels.tolist() == [1, 0]
    assert llama.pad({"input_ids": [5]}, padding="max_length", max_length=3).input_ids == [5, 1, 1]


def test_empty_batch(llama):
    assert llama([]) == {"input_ids": [], "attention_mask": []}


def test_encoding_moves_and_has_attributes(llama):
    batch = llama("hello", return_tensors="pt")
    assert batch.to("cpu") is batch
    assert batch.input_ids is batch["input_ids"]
    assert dict(**batch).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(AttributeError, match="no 'labels'; it holds input_ids, attention_mask"):
        batch.labels  # noqa: B018
    with pytest.raises(TokenizerError, match=r"input_ids is no PyTorch tensor.*return_tensors='pt'"):
        llama("hello").to("cpu")


# Decoding


@pytest.mark.parametrize("wrap", [list, tuple, np.array, "tensor"])
def test_decode_takes_any_kind_of_ids(wrap, llama):
    import torch

    wrap = torch.tensor if wrap == "tensor" else wrap
    assert llama.decode(wrap([0, 3, 4])) == "<s> hello world"
    assert llama.decode(wrap([0, 3, 4]), skip_special_tokens=True) == "hello world"
    assert llama.decode(wrap([[3], [4]])) == ["hello", "world"]
    assert llama.batch_decode(wrap([[3], [4]])) == ["hello", "world"]
    assert llama.decode(3) == "hello"
    assert llama.decode([torch.tensor(3), torch.tensor(4)]) == "hello world"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([-100], r"found -100\. Labels mark what is ignored by -100"),
        ([1 << 40], "outside the vocabulary"),
    ],
)
def test_ids_outside_the_vocabulary(ids, message, llama):
    with pytest.raises(TokenizerError, match=message):
        llama.decode(ids)
    with pytest.raises(TokenizerError, match=message):
        llama.convert_ids_to_tokens(ids)


def test_padding_rows_of_an_embedding_have_no_text(llama):
    assert llama.decode([3, 8, 4]) == llama.decode([3, 4]) == "hello world"
    with pytest.raises(
        TokenizerError, match=r"outside the vocabulary: expected 0 to 7, found 8\. Decode with"
    ):
        llama.convert_ids_to_tokens([3, 8])


def test_conversions(llama):
    assert llama.convert_ids_to_tokens(3) == "hello"
    assert llama.convert_ids_to_tokens([0, 3], skip_special_tokens=True) == ["hello"]
    assert llama.convert_tokens_to_ids("nothing") == 2
    llama.unk_token = None
    assert llama.convert_tokens_to_ids(["hello", "nothing"]) == [3, None]
    assert llama.convert_tokens_to_string(["hello", "world"]) == "hello world"


# Special tokens


def test_special_tokens_are_read_and_set(llama):
    assert (llama.bos_token, llama.bos_token_id, llama.pad_token, llama.pad_token_id) == (
        "<s>",
        0,
        None,
        None,
    )
    llama.pad_token = llama.eos_token
    assert llama.pad_token_id == llama.eos_token_id == 1
    llama.pad_token_id = 2
    assert llama.pad_token == "<unk>"
    with pytest.raises(
        TokenizerError, match=r"'<pad>' is not in the vocabulary.*add_special_tokens\(\{'pad_token'"
    ):
        llama.pad_token = "<pad>"


def test_tokens_can_be_added(llama):
    assert llama.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>"]}) == 2
    assert llama.add_tokens(["hello", "new"]) == 1
    assert (llama.vocab_size, len(llama)) == (8, 11)
    assert (llama.pad_token_id, llama.convert_tokens_to_ids("new")) == (8, 10)
    assert llama("a<x>b", add_special_tokens=False).input_ids == [5, 9, 6]
    assert llama.decode([5, 9, 8], skip_special_tokens=True) == "a"
    assert llama.all_special_ids == [0, 1, 2, 8, 9]
    assert llama.special_tokens_map["additional_special_tokens"] == ["<x>"]
    with pytest.raises(UnknownArgumentError, match=r"named 'pad_tok'.*Did you mean 'pad_token'"):
        llama.add_special_tokens({"pad_tok": "x"})


def test_added_tokens_survive_saving(llama, tmp_path):
    llama.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<x>"]})
    llama.padding_side = "left"
    llama.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.special_tokens_map == llama.special_tokens_map
    assert again.padding_side == "left"
    assert again("a<x>b").input_ids == llama("a<x>b").input_ids
    assert again.get_vocab() == llama.get_vocab()


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding": True}, TokenizerError, r"no pad token.*tokenizer\.pad_token = tokenizer\.eos_token"),
        ({"truncation": True}, ArgumentError, r"truncation needs a length.*Pass max_length"),
        (
            {"truncation": "longest"},
            ArgumentError,
            r"Unknown truncation='longest'.*Did you mean 'longest_first'",
        ),
        (
            {"truncation": False, "max_length": 3},
            ArgumentError,
            "max_length changes nothing without truncation",
        ),
        ({"truncation": True, "max_length": -1}, ArgumentError, "must not be negative"),
        (
            {"truncation": True, "max_length": 0},
            TokenizerError,
            r"no room for the special tokens .*at least 1",
        ),
        ({"return_tensors": "jax"}, ArgumentError, r"Unknown return_tensors='jax'.*use 'np'"),
        ({"return_tensors": "np"}, TokenizerError, r"differ in length.*from 2 to 3.*padding=True"),
        (
            {"truncation": True, "max_length": 9, "pad_to_multiple_of": 8},
            ArgumentError,
            r"max_length=9, pad_to",
        ),
        ({"pad_to_multiple_of": 8}, ArgumentError, "changes nothing without padding"),
    ],
)
def test_arguments_that_cannot_work(arguments, error, message, llama):
    with pytest.raises(error, match=message):
        llama(["a b", "a"], **arguments)


def test_padding_arguments_that_cannot_work(llama):
    llama.pad_token = "</s>"
    with pytest.raises(ArgumentError, match="Unknown padding='left'"):
        llama(["a"], padding="left")
    with pytest.raises(ArgumentError, match="padding='max_length' needs a length"):
        llama(["a"], padding="max_length")
    with pytest.raises(ArgumentError, match="padding_side must be 'left' or 'right': found 'top'"):
        llama(["a"], padding=True, padding_side="top")
    with pytest.raises(ArgumentError, match="truncation_side must be"):
        llama.truncation_side = "middle"
    with pytest.raises(TokenizerError, match="no input_ids to pad: found labels"):
        llama.pad({"labels": [1]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no text"),
        (3, "must be a string or a list of strings: found int"),
        (["a", 3], r"must hold strings only \(item 1\): found int"),
        ([("a", "b")], r"must hold strings only .*text_pair=others"),
    ],
)
def test_what_is_no_text(text, message, llama):
    with pytest.raises(TokenizerError, match=message):
        llama(text)
    with pytest.raises(TokenizerError, match="one second text for each text: found 1 for 2"):
        llama(["a", "b"], ["c"])


def test_one_sided_truncation_may_be_impossible(llama):
    with pytest.raises(
        TokenizerError, match=r"'only_first' cannot make the texts fit.*texts of 1 and 3 tokens for 2"
    ):
        llama("a", "a b c", truncation="only_first", max_length=4)


def test_auto_class_is_not_made(llama):
    with pytest.raises(TypeError, match=r"use AutoTokenizer.from_pretrained"):
        AutoTokenizer()
    assert isinstance(llama, PreTrainedTokenizer)
    assert "8 tokens, bos_token='<s>'" in repr(llama)


# Chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood }}"
)
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " world "}]


def test_chat_template_writes_text_and_ids(llama):
    llama.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert llama.apply_chat_template(CHAT, tokenize=False) == "<s> hello  world "
    assert llama.apply_chat_template(CHAT) == [0, 3, 4]
    assert llama.apply_chat_template([CHAT, CHAT[:1]]) == [[0, 3, 4], [0, 3]]
    batch = llama.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)
    assert batch.input_ids.tolist() == [[0, 3, 4]]
    assert batch.attention_mask.tolist() == [[1, 1, 1]]


def test_chat_template_arguments(llama):
    llama.chat_template = TEMPLATE
    text = llama.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False, mood="!")
    assert text == "<s>[user]hello</s>[assistant]world</s>[assistant]!"
    text = llama.apply_chat_template(CHAT, continue_final_message=True, tokenize=False)
    assert text == "<s>[user]hello</s>[assistant]world"
    assert llama.apply_chat_template(
        CHAT, chat_template="x{{ tools }}", tools=[{"a": 1}], tokenize=False
    ) == ("x[{'a': 1}]")
    with pytest.raises(ArgumentError, match="add_generation_prompt starts a new message"):
        llama.apply_chat_template(CHAT, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(NotYetError, match="return_assistant_tokens_mask is not offered yet"):
        llama.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    with pytest.raises(TokenizerError, match=r"last message is not found"):
        llama.apply_chat_template(CHAT, chat_template="x", continue_final_message=True)


def test_templates_by_name(llama):
    llama.chat_template = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    assert llama.apply_chat_template(CHAT, tokenize=False) == "plain"
    assert llama.apply_chat_template(CHAT, tools=[{}], tokenize=False) == "tools"
    assert llama.apply_chat_template(CHAT, chat_template="rag", tokenize=False) == "documents"
    llama.chat_template = {"rag": "documents"}
    with pytest.raises(TokenizerError, match=r"no chat template .*Pass one of rag or a template"):
        llama.apply_chat_template(CHAT)


def test_no_chat_template(bert):
    with pytest.raises(
        TokenizerError, match=r"This tokenizer has no chat template \(.*bert\).*chat_template="
    ):
        bert.apply_chat_template(CHAT)


# Threads


def test_threads_share_a_tokenizer(bert):
    texts = ["the cat sat on a mat . " * n for n in range(1, 12)]
    alone = [bert(t, truncation=True, max_length=n + 3) for n, t in enumerate(texts)]
    results = []

    def work():
        results.append([bert(t, truncation=True, max_length=n + 3) for n, t in enumerate(texts)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4
