# SPDX-License-Identifier: Apache-2.0
"""ByT5's tokenizer, which is UTF-8 itself."""

import json

import pytest

from pretrained.errors import ArgumentError, TokenizerError
from pretrained.text.tokenizer import AutoTokenizer
from support.texts import TEXTS

SPECIAL_TEXTS = ["hé</s> <extra_id_0>x", "a <pad> b", "<extra_id_12><extra_id_1>2", "</s></s>", "x </s>"]


@pytest.fixture
def byt5(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def oracle():
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


def test_ids_are_bytes(byt5):
    assert byt5("aé").input_ids == [97 + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert byt5("a", "b") == {"input_ids": [100, 1, 101, 1], "attention_mask": [1, 1, 1, 1]}
    assert (byt5.pad_token_id, byt5.eos_token_id, byt5.unk_token_id, len(byt5)) == (0, 1, 2, 384)
    assert byt5.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_124>"]) == [259, 383]


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
def test_as_the_oracle(byt5, oracle):
    for text in [*TEXTS, *SPECIAL_TEXTS]:
        ids = byt5(text).input_ids
        assert ids == oracle(text).input_ids, text
        assert byt5.tokenize(text) == oracle.tokenize(text)
        for skip in (True, False):
            assert byt5.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)
    broken = [107, 198, 1, 4, 259, 230]
    assert byt5.decode(broken) == oracle.decode(broken)
    assert byt5.decode(broken, skip_special_tokens=True) == "h\x01"
    assert byt5.vocab_size == oracle.vocab_size
    assert byt5.get_vocab() == oracle.get_vocab()


def test_round_trip(byt5):
    for text in TEXTS:
        assert byt5.decode(byt5(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("max_length", [2, 3, 5, 9])
def test_truncation_and_padding(side, max_length, byt5):
    byt5.truncation_side = byt5.padding_side = side
    batch = byt5(["abcdef", "x"], truncation=True, max_length=max_length, padding="max_length")
    for text, ids, mask in zip(["abcdef", "x"], batch["input_ids"], batch["attention_mask"], strict=True):
        keep = min(len(text), max_length - 1)
        cut = text[len(text) - keep :] if side == "left" else text[:keep]
        filler = max_length - keep - 1
        want, ones = [*(ord(c) + 3 for c in cut), 1], [1] * (keep + 1)
        assert ids == ([0] * filler + want if side == "left" else want + [0] * filler)
        assert mask == ([0] * filler + ones if side == "left" else ones + [0] * filler)


def test_pairs_are_cut_like_other_tokenizers(byt5):
    row = byt5("abcdefgh", "xy", truncation=True, max_length=7, return_special_tokens_mask=True)
    assert byt5.decode(row.input_ids, skip_special_tokens=True) == "abcxy"
    assert row.special_tokens_mask == [0, 0, 0, 1, 0, 0, 1]


def test_offsets_count_characters(byt5):
    offsets = byt5("é1<pad>", return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 1), (0, 1), (1, 2), (2, 7), (0, 0)]


def test_saved_files_load_here_and_in_the_oracle(byt5, tmp_path):
    from transformers import AutoTokenizer as Oracle

    byt5.add_special_tokens({"additional_special_tokens": ["<new>"]})
    byt5.save_pretrained(tmp_path / "out")
    again, oracle = (t.from_pretrained(tmp_path / "out") for t in (AutoTokenizer, Oracle))
    text = "é<new>ü<extra_id_3>"
    assert again(text).input_ids == byt5(text).input_ids == oracle(text).input_ids
    assert len(again) == len(byt5) == 385
    assert again.all_special_ids == byt5.all_special_ids


def test_what_it_cannot_do(byt5):
    with pytest.raises(TokenizerError, match=r"expected 0 to 383, found 384"):
        byt5.convert_ids_to_tokens([384])
    with pytest.raises(ArgumentError, match="always ends a row in </s>"):
        AutoTokenizer.from_pretrained(byt5.name_or_path, add_eos_token=False)
    assert byt5.backend_tokenizer is None
