# SPDX-License-Identifier: Apache-2.0
"""How byte-level vocabularies split text before their merges apply, by the names that GGUF files use.

A GGUF file says only a name (``tokenizer.ggml.pre``). The splits behind the names are those of the
models' own tokenizer.json files; which name stands for which is llama.cpp's table (``src/llama-vocab.cpp``
of https://github.com/ggml-org/llama.cpp). A wrong split costs quality without any error, so an unknown
name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pretrained.errors import TokenizerError, did_you_mean
from pretrained.text.engines import tokenizers_library

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"

_LLAMA3 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LEAD}\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL_WITH_SLASH}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_TAIL_WITH_SLASH}"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How one family of vocabularies splits text.

    Attributes:
        patterns: Regular expressions (Oniguruma's), applied one after the other; each match is a piece
            and so is what lies between.
        ignore_merges: A piece that is a token is taken whole, whatever the merges say.
        add_bos: A row starts with the beginning-of-text token where the file does not say.
        nfc: Text is brought into Unicode's composed form first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_WORDS = Splitting((GPT2_PATTERN,))
_SINGLE_DIGITS = Splitting((r"\p{N}", GPT2_PATTERN))
_LLAMA3_STYLE = Splitting((_LLAMA3,), ignore_merges=True, add_bos=True)

SPLITTINGS: dict[str, Splitting] = {
    # llama.cpp's own guess for files that do not say.
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _WORDS),
    **dict.fromkeys(
        ("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe"), _WORDS
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _SINGLE_DIGITS),
    "minerva-7b": _SINGLE_DIGITS,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), _LLAMA3_STYLE),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano"), _LLAMA3_STYLE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), Splitting((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Splitting((_QWEN2,), nfc=True)),
    **dict.fromkeys(("stablelm2", "hunyuan"), Splitting((_QWEN2,))),
    "qwen35": Splitting((_QWEN35,), nfc=True),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Splitting((_GPT4O,))),
    "deepseek-v3": Splitting((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3_WORDS)),
}
"""By the value of ``tokenizer.ggml.pre``."""


def splitting(name: str, where: object) -> Splitting:
    """Return how the vocabularies of a name split text.

    Args:
        name: The value of ``tokenizer.ggml.pre``.
        where: The file, for errors.

    Raises:
        TokenizerError: the name is unknown.
    """
    if name in SPLITTINGS:
        return SPLITTINGS[name]
    near = did_you_mean(name, SPLITTINGS)
    raise TokenizerError(
        f"The vocabulary splits text in a way that is not known here: {name!r}",
        where=where,
        expected=f"one of {', '.join(SPLITTINGS)}",
        mend=f"{near} Load the tokenizer from the repository that the GGUF file was made from.".strip(),
    )


def byte_level(patterns: tuple[str, ...], *, add_prefix_space: bool = False) -> PreTokenizer:
    """Return a pre-tokenizer that splits by patterns and spells bytes as characters.

    Args:
        patterns: As in `Splitting`.
        add_prefix_space: Put a space before a text that starts without one.
    """
    library = tokenizers_library()
    pre_tokenizers = library.pre_tokenizers
    if patterns == (GPT2_PATTERN,):  # the library's own, faster
        whole: PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
        return whole
    steps: list[PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == r"\p{N}"
        else pre_tokenizers.Split(library.Regex(pattern), behavior="isolated")
        for pattern in patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False))
    sequence: PreTokenizer = pre_tokenizers.Sequence(steps)
    return sequence
