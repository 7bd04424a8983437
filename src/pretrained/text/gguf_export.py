# SPDX-License-Identifier: Apache-2.0
"""A byte-level tokenizer as the metadata of a GGUF file: the way back of `pretrained.text.gguf_vocab`.

A GGUF file says how text is split by a name only, so only splits that have one can be written. What was
written is built again and compared with the original on texts of many kinds; a tokenizer that would give
other ids is refused.
"""

from __future__ import annotations

import json
from typing import Any, Final

from pretrained.errors import NotYetError, TokenizerError
from pretrained.text.pretokenizers import GPT2_PATTERN, SPLITTINGS
from pretrained.text.tokenizer import PreTrainedTokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NAMED: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_SAMPLES: Final = (
    "Hello, world! It's 12345.67 degrees, isn't it?  We'LL see...",
    "def f(x):\n    return x**2  # tabs\tand\r\nlines\n\n\n   end ",
    "Grüße aus Köln, naïve café: ½ of ² — “quotes” … 日本語のテキスト、中文字符 한국어 🙂👩‍👩‍👧 e\u0301",
    " leading and trailing   ",
    "http://example.com/a_b-c?d=1&e=%20 100% $5 #tag @you",
    "",
)


def tokenizer_metadata(tokenizer: PreTrainedTokenizer, vocab_size: int) -> dict[str, tuple[str, Any]]:
    """Return a tokenizer as key -> (type, value), the types as in `pretrained.core.gguf_writer`.

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding; ids without a token are filled up.

    Raises:
        NotYetError: it is no byte-level BPE, or splits text in a way that GGUF has no name for.
        TokenizerError: it has more tokens than the embedding rows, or would not be the same when read.
    """
    text = tokenizer.engine.to_json()
    content = {} if text is None else json.loads(text)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not _is_byte_level(content):
        raise _refused("it is no byte-level BPE", found=model.get("type") or "bytes")
    pre, prefix = _name_of(content)
    tokens, types = _tokens(model["vocab"], content.get("added_tokens") or [], vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, tuple[str, Any]] = {
        "model": ("str", "gpt2"),
        "pre": ("str", pre),
        "tokens": ("str[]", tokens),
        "token_type": ("i32[]", types),
        "merges": ("str[]", merges),
    }
    ids = {token: index for index, token in enumerate(tokens)}
    for name, key in _NAMED.items():
        token = tokenizer.settings.special.get(name)
        if token is not None and token in ids:
            found[key] = ("u32", ids[token])
    bare = tokenizer("").input_ids
    found["add_bos_token"] = ("bool", bare[:1] == [tokenizer.bos_token_id])
    found["add_eos_token"] = ("bool", bare[-1:] == [tokenizer.eos_token_id] and len(bare) > 0)
    if prefix:
        found["add_space_prefix"] = ("bool", True)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()} | _template(tokenizer)
    _check_same(tokenizer, {key: value for key, (_, value) in metadata.items()})
    return metadata


def _is_byte_level(content: dict[str, Any]) -> bool:
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _name_of(content: dict[str, Any]) -> tuple[str, bool]:
    """Return GGUF's name for how text is split, and whether a space is put first."""
    first = content.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    patterns: list[str] = []
    prefix = False
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            prefix = bool(step.get("add_prefix_space"))
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        elif kind == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append((step.get("pattern") or {}).get("Regex", ""))
        else:
            raise _refused("it splits text in a way that GGUF has no name for", found=kind)
    normalizer = (content.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _refused("it changes text in a way that GGUF cannot say", found=normalizer)
    wanted = (tuple(patterns), bool(content["model"].get("ignore_merges")), normalizer == "NFC")
    for name, row in SPLITTINGS.items():
        if (row.patterns, row.ignore_merges, row.nfc) == wanted and name != "default":
            return name, prefix
    raise _refused("it splits text in a way that GGUF has no name for", found=" then ".join(patterns)[:200])


def _tokens(
    vocabulary: dict[str, int], added: list[dict[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    ids = {index: token for token, index in vocabulary.items()}
    types = dict.fromkeys(ids, _NORMAL)
    for token in added:
        ids[token["id"]] = token["content"]
        types[token["id"]] = _CONTROL if token.get("special") else _USER_DEFINED
    highest = max(ids, default=-1)
    if highest >= size:
        raise TokenizerError(
            "The tokenizer has more tokens than the model",
            expected=f"ids below {size}",
            found=highest,
            mend="Resize the model's embedding first.",
        )
    tokens = [ids.get(index, f"[PAD{index}]") for index in range(size)]
    return tokens, [types.get(index, _UNUSED) for index in range(size)]


def _template(tokenizer: PreTrainedTokenizer) -> dict[str, tuple[str, Any]]:
    template = tokenizer.chat_template
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": ("str", template)}
    named = {f"tokenizer.chat_template.{name}": ("str", text) for name, text in template.items()}
    default = named.pop("tokenizer.chat_template.default", None)
    return named | ({} if default is None else {"tokenizer.chat_template": default})


def _check_same(tokenizer: PreTrainedTokenizer, metadata: dict[str, Any]) -> None:
    """Raise where the tokenizer that the metadata describes gives other ids."""
    again = PreTrainedTokenizer.from_gguf_metadata(metadata)
    special = " ".join(token for token in tokenizer.settings.special.values())
    for text in (*_SAMPLES, f"a{special}b"):
        for whole in (True, False):
            ids = [each(text, add_special_tokens=whole).input_ids for each in (tokenizer, again)]
            if ids[0] != ids[1]:
                raise _refused("it would give other ids", found=f"{ids[1][:10]} for {text[:30]!r}")


def _refused(why: str, *, found: object) -> NotYetError:
    return NotYetError(
        f"The tokenizer cannot be written into a GGUF file: {why}",
        found=found,
        mend="Pass --without-tokenizer to write the weights alone, or use llama.cpp's convert_hf_to_gguf.py.",
    )
