# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers made on the spot, as the files that models come with."""

import json

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_PLAIN = ["the", "cat", "sat", "on", "a", "mat", "un", "i", "e", "中", ",", ".", "!", "?", "'"]
WORDS = [*_SPECIAL, *_PLAIN, "##believ", "##able", "##s", "##t", "##n"]


def write_wordpiece(folder, **config):
    """Write a BERT folder of the old kind: vocab.txt and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 64} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_json_tokenizer(folder, **config):
    """Write a tokenizer.json (word-level, with a beginning and an end token) and its config."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "hello", "world", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    # Settings that a call must not inherit.
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_alphabet():
    """The characters that byte-level vocabularies spell the 256 bytes with."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def gguf_metadata(kind, tokens, **more):
    """Metadata of a GGUF file with a vocabulary."""
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
    }
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in more.items()}
