# SPDX-License-Identifier: Apache-2.0
"""The small trained T5 under tests/data spells numbers, so that a seq2seq model's words can be checked."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers

from pretrained.core.files import open_checkpoint
from pretrained.testing.battery import assert_close
from pretrained.torch.models.t5 import T5EncoderModel, T5ForConditionalGeneration

FOLDER = Path(__file__).parent.parent / "data" / "spelling-t5"

# None of them was trained on. Written by hand, not by the function that made the training data.
HELD_OUT = {
    "101": "one hundred one",
    "118": "one hundred eighteen",
    "130": "one hundred thirty",
    "205": "two hundred five",
    "514": "five hundred fourteen",
    "719": "seven hundred nineteen",
    "1009": "one thousand nine",
    "1033": "one thousand thirty-three",
    "1100": "one thousand one hundred",
    "2000": "two thousand",
    "2400": "two thousand four hundred",
    "4303": "four thousand three hundred three",
    "8000": "eight thousand",
    "9965": "nine thousand nine hundred sixty-five",
    "9972": "nine thousand nine hundred seventy-two",
    "9995": "nine thousand nine hundred ninety-five",
}
# Trained on: all numbers below 100 are.
SMALL = {"0": "zero", "3": "three", "11": "eleven", "42": "forty-two", "90": "ninety"}


@pytest.fixture(scope="module")
def model():
    return T5ForConditionalGeneration.from_pretrained(FOLDER)


def encode(texts):
    """ByT5's ids, padded on the right: byte + 3, end 1, padding 0."""
    rows = [[byte + 3 for byte in text.encode()] + [1] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def decode(ids):
    return [bytes(i - 3 for i in row if i > 2).decode() for row in ids.tolist()]


def spellings(model, texts, **options):
    inputs = encode(texts)
    return dict(zip(texts, decode(model.generate(**inputs, do_sample=False, **options)), strict=True))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_numbers_it_never_saw(model, options):
    assert spellings(model, list(HELD_OUT), **options) == HELD_OUT


def test_small_numbers(model):
    assert spellings(model, list(SMALL)) == SMALL


def test_one_by_one_as_in_a_batch(model):
    for text, words in list(HELD_OUT.items())[::5]:
        assert spellings(model, [text]) == {text: words}


def test_padding_on_the_left_as_on_the_right(model):
    inputs = encode(list(HELD_OUT))
    width = inputs["input_ids"].shape[1]
    rows = [row[row != 0] for row in inputs["input_ids"]]
    left = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    tokens = model.generate(left, attention_mask=(left != 0).long(), do_sample=False)
    assert decode(tokens) == list(HELD_OUT.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_oracle_reads_the_same_files_and_writes_the_same(dtype):
    inputs = encode(list(HELD_OUT))
    ours = T5ForConditionalGeneration.from_pretrained(FOLDER, dtype=dtype)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(FOLDER, dtype=dtype).eval()
    assert torch.equal(ours.generate(**inputs), theirs.generate(**inputs))


def test_the_oracles_scores_are_the_same(model):
    inputs = encode(list(HELD_OUT))
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    inputs["labels"] = encode(list(HELD_OUT.values()))["input_ids"]
    with torch.no_grad():
        assert_close(model(**inputs).logits, theirs(**inputs).logits, "logits")


def test_the_oracles_tokenizer_reads_the_folder(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    inputs = tokenizer(list(HELD_OUT), return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], encode(list(HELD_OUT))["input_ids"])
    words = tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)
    assert words == list(HELD_OUT.values())


def test_it_is_sure_of_its_words(model):
    words = encode(list(HELD_OUT.values()))
    labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
    assert model(**encode(list(HELD_OUT)), labels=labels).loss.item() < 0.01


def test_its_encoder_alone():
    whole = T5ForConditionalGeneration.from_pretrained(FOLDER)
    encoder, info = T5EncoderModel.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        ours, theirs = encoder(**encode(["42"])), whole.get_encoder()(**encode(["42"]))
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_the_folder_is_small_and_complete():
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000
    tokenizer = json.loads((FOLDER / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "ByT5Tokenizer"
    assert {info.dtype for info in open_checkpoint(FOLDER / "model.safetensors").tensors.values()} == {
        "bfloat16"
    }


def test_what_was_held_out_is_what_the_script_holds_out(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools")
    script = importlib.import_module("train_spelling_t5")
    trained, held_out = script.split()
    assert set(map(int, HELD_OUT)) <= set(held_out) and not set(held_out) & set(trained)
    assert {text: script.spell(int(text)) for text in (HELD_OUT | SMALL)} == HELD_OUT | SMALL
