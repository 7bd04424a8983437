# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of folders without a tokenizer.json: BERT's vocab.txt, and GPT-2's vocab.json with merges.txt.

What their classes did in code is rebuilt from the ``tokenizers`` library's parts: WordPiece with BERT's
cleaning (https://github.com/google-research/bert, ``tokenization.py``), and byte-level BPE as GPT-2,
RoBERTa and Qwen2 use it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrained.errors import TokenizerError
from pretrained.text.engines import TokenizersEngine, tokenizers_library
from pretrained.text.guards import read_bounded
from pretrained.text.pretokenizers import byte_level, splitting

BERT_SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIAL = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
GPT2_SPECIAL = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
QWEN2_SPECIAL = {name: "<|endoftext|>" for name in ("eos_token", "unk_token", "pad_token")}


def read_wordpiece(file: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> TokenizersEngine:
    """Make BERT's tokenizer from its list of tokens.

    Args:
        file: vocab.txt: one token a line, its id the line's number from 0.
        config: tokenizer_config.json: ``do_lower_case`` (default true), ``strip_accents`` (as
            ``do_lower_case`` where absent), ``tokenize_chinese_chars`` (default true).
        special: The named special tokens.

    Raises:
        TokenizerError: the file cannot be read as text, or lacks a special token.
    """
    library = tokenizers_library()
    tokens = read_text(file).split("\n")
    vocab = {token.removesuffix("\r"): index for index, token in enumerate(tokens) if token.strip()}
    unknown = special["unk_token"]
    _require(vocab, [unknown, special["cls_token"], special["sep_token"]], file)
    tokenizer = library.Tokenizer(
        library.models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100)
    )
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([token for token in special.values() if token in vocab])
    cls, sep = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return TokenizersEngine(tokenizer)


def read_bpe(
    vocab_file: Path, merges_file: Path, config: Mapping[str, Any], special: Mapping[str, str], style: str
) -> TokenizersEngine:
    """Make a byte-level BPE tokenizer from its vocabulary and merges.

    Args:
        vocab_file: vocab.json: tokens to ids.
        merges_file: merges.txt: one merge a line, best first.
        config: tokenizer_config.json: ``add_prefix_space`` (default false).
        special: The named special tokens.
        style: ``"gpt2"``, ``"roberta"`` or ``"qwen2"``: how text is split and rows end.

    Raises:
        TokenizerError: a file cannot be read, or they do not fit each other.
    """
    library = tokenizers_library()
    vocab = read_json(vocab_file)
    lines = read_text(merges_file).splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    try:
        model = library.models.BPE(vocab, merges)
    except Exception as error:  # the library raises bare Exception and TypeError
        raise TokenizerError(
            "The vocabulary and the merges do not fit each other",
            where=f"{vocab_file}, {merges_file.name}",
            found=str(error),
            mend="Fetch both again from one revision.",
        ) from error
    tokenizer = library.Tokenizer(model)
    prefix = bool(config.get("add_prefix_space", False))
    split = splitting("qwen2" if style == "qwen2" else "gpt-2", vocab_file)
    if split.nfc:
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level(split.patterns, add_prefix_space=prefix)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_special_tokens(_special_tokens(special, vocab, style))
    if style == "roberta":
        cls, sep = special["cls_token"], special["sep_token"]
        _require(vocab, [cls, sep], vocab_file)
        tokenizer.post_processor = library.processors.RobertaProcessing(
            (sep, vocab[sep]), (cls, vocab[cls]), trim_offsets=True, add_prefix_space=prefix
        )
    return TokenizersEngine(tokenizer)


def read_text(file: Path) -> str:
    """Read a text file.

    Args:
        file: UTF-8.

    Raises:
        TokenizerError: it is no UTF-8, or too large.
    """
    return read_bounded(file)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: The file.

    Raises:
        TokenizerError: it is no text, no JSON or no object.
    """
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            "The tokenizer's file is not valid JSON",
            where=file,
            found=str(error),
            mend="Fetch or save it again.",
        ) from error
    if not isinstance(content, dict):
        raise TokenizerError(
            "The tokenizer's file holds no JSON object", where=file, found=type(content).__name__
        )
    return content


def _special_tokens(special: Mapping[str, str], vocab: Mapping[str, int], style: str) -> list[Any]:
    added_token = tokenizers_library().AddedToken
    tokens = dict.fromkeys(token for token in special.values() if token in vocab)
    # RoBERTa's mask takes the blank before it, as it stands for a word.
    mask = special.get("mask_token") if style == "roberta" else None
    return [added_token(t, lstrip=t == mask, normalized=False, special=True) for t in tokens]


def _require(vocab: Mapping[str, int], tokens: list[str], file: Path) -> None:
    missing = [token for token in tokens if token not in vocab]
    if missing:
        raise TokenizerError(
            "The vocabulary lacks a special token",
            where=file,
            expected=", ".join(missing),
            mend="Name the tokens it has in tokenizer_config.json (cls_token, sep_token, unk_token).",
        )
