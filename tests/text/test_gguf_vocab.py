# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  # the tables of splits and broken files read best one case a line
"""Tokenizers from GGUF metadata: against transformers, against slow references, and broken ones."""

import re
import time
from itertools import pairwise

import numpy as np
import pytest

from pretrained.core.gguf import read_gguf
from pretrained.errors import ArgumentError, TokenizerError, UnknownArgumentError
from pretrained.text.gguf_vocab import gguf_tokenizer
from pretrained.text.tokenizer import AutoTokenizer, PreTrainedTokenizer
from support.texts import TEXTS
from support.tokenizers import byte_alphabet, gguf_metadata

CHAT = [
    {"role": "user", "content": "What is <b>é & è</b>?"},
    {"role": "assistant", "content": "It's 'HTML'."},
    {"role": "user", "content": "Thanks"},
]


def byte_level(pre="gpt-2", merges=(), more_tokens=(), **more):
    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in merges), *more_tokens]
    return gguf_metadata("gpt2", tokens, pre=pre, merges=list(merges), **more)


def load(metadata, **kwargs):
    return PreTrainedTokenizer.from_gguf_metadata(metadata, **kwargs)


# The real file


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def oracle(smollm2_gguf):
    from transformers import AutoTokenizer as Oracle

    return Oracle.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.mark.slow  # the oracle takes seconds to load the file
@pytest.mark.realweights
def test_smollm2_as_the_oracle(smollm2, oracle):
    # Two digits in one piece are what the oracle gets wrong; see the next test.
    texts = [t for t in TEXTS if not re.search(r"[²³½Ⅷ₃]", t)]
    for text in [*texts, "<|im_start|>user\nhi<|im_end|>", "x<|endoftext|>y <repo_name>"]:
        ids = smollm2(text).input_ids
        assert ids == oracle(text).input_ids, text
        assert smollm2.decode(ids) == oracle.decode(ids) == text
        assert smollm2.decode(ids, skip_special_tokens=True) == oracle.decode(ids, skip_special_tokens=True)
    assert smollm2.get_vocab() == oracle.get_vocab()
    assert smollm2.special_tokens_map == oracle.special_tokens_map
    assert smollm2.model_max_length == 8192


@pytest.mark.realweights
def test_smollm2_splits_digits(smollm2):
    # Its vocabulary was trained on single digits: no token holds one beside anything else. The blanks
    # before a number stay together for that reason.
    assert not [t for t in smollm2.get_vocab() if re.search(r"\d", t) and len(t) > 1]
    assert smollm2.tokenize("x   42") == ["x", "ĠĠĠ", "4", "2"]
    for text in TEXTS:
        assert smollm2.decode(smollm2(text).input_ids) == text


@pytest.mark.slow
@pytest.mark.realweights
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chat_as_the_oracle(prompt, smollm2, oracle):
    arguments = {"add_generation_prompt": prompt, "tokenize": False}
    text = smollm2.apply_chat_template(CHAT, **arguments)
    assert text == oracle.apply_chat_template(CHAT, **arguments)
    assert smollm2.apply_chat_template(CHAT, add_generation_prompt=prompt) == oracle(text).input_ids


@pytest.mark.realweights
def test_smollm2_is_saved_for_everybody(smollm2, tmp_path):
    from transformers import AutoTokenizer as Oracle

    smollm2.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), Oracle.from_pretrained(tmp_path)):
        assert again(TEXTS).input_ids == smollm2(TEXTS).input_ids
        assert again.chat_template == smollm2.chat_template
        assert again.eos_token == "<|im_end|>"


@pytest.mark.realweights
def test_smollm2_loads_fast(smollm2_gguf):
    def load_once():
        started = time.process_time()  # the work done, whatever else the machine is doing
        AutoTokenizer.from_pretrained(smollm2_gguf)
        return time.process_time() - started

    assert min(load_once() for _ in range(3)) < 0.25


@pytest.mark.realweights
def test_metadata_once_read_is_enough(smollm2_gguf, smollm2):
    again = load(read_gguf(smollm2_gguf).metadata, padding_side="left", pad_token="<|endoftext|>")
    assert again("Hello  there").input_ids == smollm2("Hello  there").input_ids
    assert (again.padding_side, again.pad_token_id) == ("left", 0)


# Byte-level BPE


def test_merges_and_specials():
    metadata = byte_level(
        merges=["h e", "l l", "he ll", "Ġ hell"],
        more_tokens=["<s>", "</s>", "<think>"],
        token_type=[1] * 260 + [3, 3, 4],
        bos_token_id=260,
        eos_token_id=261,
        padding_token_id=0xFFFFFFFF,
    )
    tokenizer = load(metadata)
    assert tokenizer.tokenize("hello hell<think>") == ["hell", "o", "Ġhell", "<think>"]
    assert tokenizer("<s>").input_ids == [260]
    assert (tokenizer.pad_token, tokenizer.all_special_ids) == (None, [260, 261])
    assert tokenizer.decode([260, 256, 262], skip_special_tokens=True) == "he<think>"


@pytest.mark.parametrize(
    ("flags", "pre", "ids"),
    [
        ({}, "gpt-2", ["a"]),
        ({"add_bos_token": True}, "gpt-2", ["<s>", "a"]),
        ({"add_bos_token": True, "add_eos_token": True}, "gpt-2", ["<s>", "a", "</s>"]),
        ({}, "llama-bpe", ["<s>", "a"]),
        ({"add_bos_token": False}, "llama-bpe", ["a"]),
    ],
)
def test_row_ends(flags, pre, ids):
    metadata = byte_level(pre, more_tokens=["<s>", "</s>"], bos_token_id=256, eos_token_id=257, **flags)
    assert load(metadata).tokenize("a", add_special_tokens=True) == ids


def test_row_ends_can_be_asked_for():
    metadata = byte_level("llama-bpe", more_tokens=["<s>", "</s>"], bos_token_id=256, eos_token_id=257)
    assert load(metadata, add_eos_token=True)("a").input_ids[::2] == [256, 257]
    assert len(load(metadata, add_bos_token=False)("a").input_ids) == 1


TEXT = "I'M 12345 naïve  Héllo!!\r\n\n x1  y"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'", "M", " 12345", " naïve", " ", " Héllo", "!!", "\r\n\n", " x", "1", " ", " y"]),
        ("smollm", ["I", "'", "M", " ", *"12345", " naïve", " ", " Héllo", "!!", "\r\n\n", " x", "1", " ", " y"]),
        ("llama-bpe", ["I", "'M", " ", "123", "45", " naïve", " ", " Héllo", "!!\r\n\n", " x", "1", " ", " y"]),
        ("qwen2", ["I", "'M", " ", *"12345", " naïve", " ", " Héllo", "!!\r\n\n", " x", "1", " ", " y"]),
        ("tekken", ["I", "'M", " ", *"12345", " naïve", " ", " Héllo", "!!\r\n\n", " x", "1", " ", " y"]),
        ("gpt-4o", ["I'M", " ", "123", "45", " naïve", " ", " Héllo", "!!\r\n\n", " x", "1", " ", " y"]),
        ("default", ["I", "'", "M", " ", "123", "45", " naïve", " ", " Héllo", "!!", "\r\n\n", " x", "1", " ", " y"]),
    ],
)  # fmt: skip
def test_splits(pre, pieces):
    tokenizer = load(byte_level(pre, add_bos_token=False)).backend_tokenizer
    found = [TEXT[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert found == pieces


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "llama4", "qwen35", "gpt-2"])
def test_splits_as_the_oracle(pre):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    metadata = byte_level(pre, merges=["Ġ a", "Ġ Ġ", "1 2", "12 3", "i n", "! !"], add_bos_token=False)
    parts = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges")}
    oracle, _ = convert_gguf_tokenizer("llama", parts | {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre})
    tokenizer = load(metadata)
    for text in [*TEXTS, TEXT]:
        # The published tokenizers of Qwen compose characters first, which the oracle leaves out here.
        if "\u0301" in text or "\u212b" in text:
            continue
        assert tokenizer(text).input_ids == oracle.encode(text).ids, text


def test_qwen_composes_characters():
    qwen, other = load(byte_level("qwen2")), load(byte_level("stablelm2"))
    assert qwen("e\u0301").input_ids == qwen("é").input_ids
    assert other("e\u0301").input_ids != other("é").input_ids


def test_whole_words_may_ignore_merges():
    merges = {"merges": ["a b"], "more_tokens": ["abc"]}
    assert load(byte_level("llama-bpe", **merges), add_bos_token=None).tokenize("abc") == ["abc"]
    assert load(byte_level("qwen2", **merges)).tokenize("abc") == ["ab", "c"]


# SentencePiece's BPE


def slow_bpe(text, scores):
    """Join the neighbours whose joint token scores best, the first of equals, until none is a token."""
    symbols = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def sentencepiece(seed=0, kind="llama", **more):
    """A random vocabulary over three letters, with bytes to fall back to."""
    rng = np.random.default_rng(seed)
    letters = [*"abc", "\u2581"]
    words = {letter + other for letter in letters for other in letters}
    words |= {"".join(rng.choice(letters, rng.integers(3, 6))) for _ in range(60)}
    # A word can be reached only if it is two words joined.
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *sorted(words)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-float(i) for i in rng.permutation(len(tokens) - 259)]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return gguf_metadata(kind, tokens, token_type=np.array(types), scores=np.array(scores), **(ends | more))


@pytest.mark.parametrize("seed", range(3))
def test_merges_follow_from_scores(seed):
    metadata = sentencepiece(seed)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    by_token = dict(zip(tokens[259:], scores[259:], strict=True))
    tokenizer = load(metadata)
    rng = np.random.default_rng(seed)
    for _ in range(50):
        text = "".join(rng.choice([*"abc", " "], rng.integers(1, 20)))
        assert tokenizer.tokenize(text) == slow_bpe("\u2581" + text.replace(" ", "\u2581"), by_token)
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentencepiece_ends_bytes_and_spaces():
    tokenizer = load(sentencepiece())
    assert tokenizer("a").input_ids[0] == 1
    assert tokenizer.tokenize("é")[-2:] == ["<0xC3>", "<0xA9>"]
    text = "ab é\n日本 👍 c"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    bare = load(sentencepiece(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert bare.tokenize("c", add_special_tokens=True) == ["c", "</s>"]
    assert bare.decode(bare(" c").input_ids, skip_special_tokens=True) == " c"


def test_given_merges_win():
    tokens = ["<unk>", "a", "b", "c", "ab", "bc"]
    merges = gguf_metadata(
        "llama", tokens, merges=["b c", "a b"], add_bos_token=False, add_space_prefix=False
    )
    assert load(merges).tokenize("abc") == ["a", "bc"]


# Unigram


def slow_unigram(text, scores):
    """The split of the best total score, by trying every last token."""
    best = {0: (0.0, [])}
    for end in range(1, len(text) + 1):
        found = [
            (best[start][0] + scores[text[start:end]], [*best[start][1], text[start:end]])
            for start in range(end)
            if start in best and text[start:end] in scores
        ]
        if found:
            best[end] = max(found, key=lambda item: item[0])
    return best[len(text)][1]


def test_unigram_takes_the_best_split():
    rng = np.random.default_rng(0)
    letters = [*"abc", "\u2581"]
    words = sorted({"".join(rng.choice(letters[:3], rng.integers(2, 5))) for _ in range(40)})
    words += sorted({"\u2581" + word for word in words[:15]})
    scores = {
        token: -float(score) for token, score in zip([*letters, *words], rng.uniform(2, 9, 99), strict=False)
    }
    tokens = ["<pad>", "</s>", "<unk>", *scores, *(f"[PAD{i}]" for i in range(100))]
    values = [0.0, 0.0, -10.0, *scores.values(), *[0.0] * 100]
    metadata = gguf_metadata(
        "t5", tokens, scores=values, eos_token_id=1, unknown_token_id=2, padding_token_id=0
    )
    tokenizer = load(metadata)
    for _ in range(50):
        text = "".join(rng.choice([*"abc", " "], rng.integers(1, 20), p=[0.3, 0.3, 0.3, 0.1]))
        want = [piece for word in text.split() for piece in slow_unigram("\u2581" + word, scores)]
        assert tokenizer.tokenize(text) == want
    assert tokenizer("ab").input_ids[-1] == 1
    last = len(tokens) - 1
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [last, last - 99]
    assert last in tokenizer("a <extra_id_0> b").input_ids
    assert tokenizer.decode(tokenizer("ab c").input_ids, skip_special_tokens=True) == "ab c"


# Broken files


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"has no vocabulary \(x.gguf\): expected tokenizer.ggml.tokens"),
        (gguf_metadata("gpt2", []), "has no vocabulary"),
        (gguf_metadata("bert", ["a"]), r"unknown kind, 'bert' .*one of gpt2, llama, t5"),
        (gguf_metadata(None, ["a"]), "unknown kind, None"),
        (gguf_metadata("gpt2", ["a"]), "has no merges"),
        (gguf_metadata("gpt2", ["a"], merges=["a b"]), "merges of this GGUF file do not fit"),
        (gguf_metadata("gpt2", ["a"], merges=[], pre="qwen3"), r"not known here: 'qwen3' .*Did you mean 'qwen35'"),
        (gguf_metadata("gpt2", ["a"], merges=[], token_type=[1, 1]), "expected 1 values, found 2"),
        (gguf_metadata("gpt2", ["a"], merges=[], eos_token_id=7), r"eos_token_id is outside .*less than 1, found 7"),
        (gguf_metadata("llama", ["a", "b"]), "has no scores"),
        (gguf_metadata("t5", ["a", "b"], scores=[0.0]), "scores does not fit the vocabulary"),
    ],
)  # fmt: skip
def test_broken_metadata(metadata, message):
    with pytest.raises(TokenizerError, match=message):
        gguf_tokenizer(metadata, "x.gguf")


def test_arguments_that_cannot_work():
    with pytest.raises(
        UnknownArgumentError, match=r"takes an argument 'pading_side'.*Did you mean 'padding_side'"
    ):
        load(byte_level(), pading_side="left")
    with pytest.raises(ArgumentError, match="padding_side must be"):
        load(byte_level(), padding_side="top")
    with pytest.raises(TokenizerError, match=r"has no eos_token to add\. Pass eos_token"):
        load(byte_level(), add_eos_token=True)


def test_named_templates():
    metadata = byte_level() | {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.tool_use": "tools",
    }
    assert load(metadata).chat_template == {"default": "plain", "tool_use": "tools"}
