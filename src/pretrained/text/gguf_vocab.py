# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file: its vocabulary, merges, scores and flags become an engine.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
Three kinds of vocabulary (``tokenizer.ggml.model``) are read: ``gpt2`` (byte-level BPE with merges),
``llama`` (SentencePiece's BPE, whose merges follow from the scores) and ``t5`` (Unigram).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pretrained.errors import TokenizerError
from pretrained.text.engines import TokenizersEngine, tokenizers_library
from pretrained.text.guards import check_charsmap
from pretrained.text.pretokenizers import byte_level, splitting
from pretrained.text.settings import UNLIMITED, TokenizerSettings

if TYPE_CHECKING:
    import tokenizers

# enum llama_token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_SPACE = "\u2581"
_T5_SENTINELS = 100


class _Vocabulary:
    """The tokenizer's part of a file's metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: object) -> None:
        self._metadata = metadata
        self.where = where
        tokens = self.get("tokens")
        if tokens is None or len(tokens) == 0:
            raise TokenizerError(
                "This GGUF file has no vocabulary",
                where=where,
                expected="tokenizer.ggml.tokens",
                mend="Load the tokenizer from the repository that the file was made from.",
            )
        self.tokens: list[str] = list(tokens)
        types = self.get("token_type")
        self.types: list[int] = [_NORMAL] * len(self.tokens) if types is None else [*map(int, types)]
        self._check_length("token_type", self.types)
        self.ids: dict[str, int] = {token: i for i, token in enumerate(self.tokens)}

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.get(name, default))

    def scores(self) -> list[float]:
        scores = self.get("scores")
        if scores is None:
            raise TokenizerError(
                "This GGUF file's vocabulary has no scores",
                where=self.where,
                expected="tokenizer.ggml.scores",
                mend="Convert the model to GGUF again.",
            )
        values = [float(score) for score in scores]
        self._check_length("scores", values)
        return values

    def named(self) -> dict[str, str]:
        found = {}
        for name, key in _NAMED.items():
            index = self.get(key)
            if index is None:
                continue
            # llama.cpp writes 2^32 - 1 for "none".
            if 0 <= int(index) < len(self.tokens):
                found[name] = self.tokens[int(index)]
            elif int(index) != 0xFFFFFFFF:
                raise TokenizerError(
                    f"tokenizer.ggml.{key} is outside the vocabulary",
                    where=self.where,
                    expected=f"less than {len(self.tokens)}",
                    found=index,
                    mend="Convert the model to GGUF again.",
                )
        return found

    def of_type(self, kind: int) -> list[str]:
        return [token for token, of in zip(self.tokens, self.types, strict=True) if of == kind]

    def context_length(self) -> int:
        architecture = self._metadata.get("general.architecture", "")
        return int(self._metadata.get(f"{architecture}.context_length", UNLIMITED))

    def chat_template(self) -> str | dict[str, str] | None:
        prefix = "tokenizer.chat_template"
        template = self._metadata.get(prefix)
        named = {
            key.removeprefix(f"{prefix}."): str(value)
            for key, value in self._metadata.items()
            if key.startswith(f"{prefix}.") and isinstance(value, str)
        }
        if not named:
            return template
        return named | ({"default": str(template)} if template else {})

    def _check_length(self, name: str, values: Sequence[Any]) -> None:
        if len(values) != len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{name} does not fit the vocabulary",
                where=self.where,
                expected=f"{len(self.tokens)} values",
                found=len(values),
                mend="Convert the model to GGUF again.",
            )


def gguf_tokenizer(
    metadata: Mapping[str, Any], where: object = None
) -> tuple[TokenizersEngine, TokenizerSettings]:
    """Make the tokenizer that a GGUF file describes.

    Args:
        metadata: The file's key-value section, as `pretrained.core.gguf.read_gguf` gives it.
        where: The file, for errors.

    Raises:
        TokenizerError: the file has no vocabulary, one of an unknown kind, or one that contradicts
            itself.
    """
    builders = {"gpt2": _build_byte_level, "llama": _build_sentencepiece, "t5": _build_unigram}
    vocabulary = _Vocabulary(metadata, where)
    kind = vocabulary.get("model")
    if kind not in builders:
        raise TokenizerError(
            f"The vocabulary of this GGUF file is of an unknown kind, {kind!r}",
            where=where,
            expected=f"tokenizer.ggml.model to be one of {', '.join(builders)}",
            mend="Load the tokenizer from the repository that the file was made from.",
        )
    named = vocabulary.named()
    tokenizer, add_bos, add_eos = builders[kind](vocabulary)
    _add_special_tokens(tokenizer, vocabulary, named)
    engine = TokenizersEngine(tokenizer)
    engine.set_ends(
        named.get("bos_token") if vocabulary.flag("add_bos_token", add_bos) else None,
        named.get("eos_token") if vocabulary.flag("add_eos_token", add_eos) else None,
    )
    settings = TokenizerSettings(
        special=named,
        model_max_length=vocabulary.context_length(),
        chat_template=vocabulary.chat_template(),
    )
    return engine, settings


def _add_special_tokens(
    tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, named: Mapping[str, str]
) -> None:
    """Control tokens are special; user-defined ones are only taken whole, as llama.cpp takes them."""
    added_token = tokenizers_library().AddedToken
    special = dict.fromkeys([*vocabulary.of_type(_CONTROL), *named.values()])
    tokenizer.add_special_tokens([added_token(t, normalized=False, special=True) for t in special])
    whole = [t for t in vocabulary.of_type(_USER_DEFINED) if t not in special]
    tokenizer.add_tokens([added_token(t, normalized=False) for t in whole])


def _build_byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool, bool]:
    library = tokenizers_library()
    split = splitting(vocabulary.get("pre") or "default", vocabulary.where)
    merges = vocabulary.get("merges")
    if merges is None:
        raise TokenizerError(
            "This GGUF file's vocabulary has no merges",
            where=vocabulary.where,
            expected="tokenizer.ggml.merges",
            mend="Convert the model to GGUF again.",
        )
    # A blank within a token is spelled as another character, so the one blank separates.
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = library.models.BPE(vocabulary.ids, pairs, ignore_merges=split.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            "The merges of this GGUF file do not fit its vocabulary",
            where=vocabulary.where,
            found=str(error),
            mend="Convert the model to GGUF again.",
        ) from error
    tokenizer = library.Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", False)
    if split.nfc:
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level(split.patterns, add_prefix_space=prefix)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer, split.add_bos, False


def _build_sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool, bool]:
    library = tokenizers_library()
    unknown = vocabulary.named().get("unk_token") or next(iter(vocabulary.of_type(_UNKNOWN)), None)
    model = library.models.BPE(
        vocabulary.ids,
        _merges_from_scores(vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.types,
    )
    tokenizer = library.Tokenizer(model)
    replace = library.normalizers.Replace(" ", _SPACE)
    steps = [replace]
    if vocabulary.flag("add_space_prefix", True):
        steps.insert(0, library.normalizers.Prepend(_SPACE))
    tokenizer.normalizer = library.normalizers.Sequence(steps)
    decoders = library.decoders
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer, True, False


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE implies: two tokens that make a third, best score first."""
    merges = vocabulary.get("merges")
    if merges is not None:
        return [(left, right) for left, _, right in (m.partition(" ") for m in merges)]
    ids = vocabulary.ids
    found: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores(), vocabulary.types, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _BYTE, _UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _build_unigram(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool, bool]:
    library = tokenizers_library()
    tokens = _named_sentinels(vocabulary.tokens)
    unknown = vocabulary.get("unknown_token_id")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == _UNKNOWN), None)
    pieces = list(zip(tokens, vocabulary.scores(), strict=True))
    tokenizer = library.Tokenizer(
        library.models.Unigram(pieces, unk_id=unknown, byte_fallback=_BYTE in vocabulary.types)
    )
    characters = vocabulary.get("precompiled_charsmap")
    table = _bytes(characters) if characters is not None else b""
    check_charsmap(table, vocabulary.where)
    steps = [library.normalizers.Precompiled(table)] if characters is not None else []
    tokenizer.normalizer = library.normalizers.Sequence(steps)
    scheme = "always" if vocabulary.flag("add_space_prefix", True) else "never"
    metaspace = {"replacement": _SPACE, "prepend_scheme": scheme}
    spaces = [library.pre_tokenizers.Metaspace(**metaspace)]
    if vocabulary.flag("remove_extra_whitespaces", True):
        spaces.insert(0, library.pre_tokenizers.WhitespaceSplit())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(spaces)
    tokenizer.decoder = library.decoders.Metaspace(**metaspace)
    sentinels = [t for t in tokens if re.fullmatch(r"<extra_id_\d+>", t)]
    tokenizer.add_special_tokens([library.AddedToken(t, normalized=False, special=True) for t in sentinels])
    return tokenizer, False, True


def _named_sentinels(tokens: list[str]) -> list[str]:
    """T5's sentinels by their names: converters that knew only their number wrote ``[PAD32000]``.

    ``<extra_id_0>`` has the highest id, as in the published tokenizers.
    """
    tokens = list(tokens)
    blanks = [i for i, token in enumerate(tokens) if re.fullmatch(r"\[PAD\d+\]", token)][:_T5_SENTINELS]
    if any(token == "<extra_id_0>" for token in tokens):
        return tokens
    for number, index in enumerate(reversed(blanks)):
        tokens[index] = f"<extra_id_{number}>"
    return tokens


def _bytes(values: Any) -> bytes:
    # The map is stored as an array of signed or unsigned bytes.
    return bytes(int(value) & 0xFF for value in values)
