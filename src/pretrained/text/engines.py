# SPDX-License-Identifier: Apache-2.0
"""The two machines that turn text into ids: the ``tokenizers`` library, and plain UTF-8 bytes (ByT5).

Both offer the same few methods, so `pretrained.text.tokenizer` does not know which one it holds. An
engine never pads; it truncates only when told how long a row may be, and is not changed by encoding, so
threads may share it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from pretrained.errors import MissingDependencyError, TokenizerError
from pretrained.text.guards import check_charsmaps, check_growth, library_faults

if TYPE_CHECKING:
    import tokenizers


def tokenizers_library() -> ModuleType:
    """Return the ``tokenizers`` package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        # Imported here: it is optional, and ByT5 does without.
        import tokenizers  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            "This tokenizer needs the tokenizers package", mend="Install it: pip install 'pretrained[text]'."
        ) from error
    return tokenizers


@dataclass(frozen=True, slots=True)
class Truncation:
    """How long a row may be, special tokens included.

    Attributes:
        max_length: In tokens.
        strategy: ``"longest_first"`` cuts the longer of a pair, ``"only_first"`` and
            ``"only_second"`` cut one of them.
        side: ``"right"`` drops the end, ``"left"`` the start.
    """

    max_length: int
    strategy: str = "longest_first"
    side: str = "right"


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded text, or pair of texts.

    Attributes:
        ids: Token ids.
        type_ids: 0 for the first text, 1 for the second.
        special_mask: 1 where the engine added a special token.
        offsets: For each token its first and last (exclusive) character in its text.
    """

    ids: list[int]
    type_ids: list[int]
    special_mask: list[int]
    offsets: list[tuple[int, int]]


class Engine(Protocol):
    """What a tokenizer needs of its machine."""

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        *,
        add_special_tokens: bool,
        truncation: Truncation | None,
    ) -> list[Row]:
        """Encode texts, or pairs of texts."""

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[str]:
        """Split a text into the spellings of its tokens."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn ids into text."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's spelling."""

    def id_to_token(self, index: int) -> str | None:
        """The spelling of an id."""

    def vocab(self) -> dict[str, int]:
        """Every token and its id, added ones included."""

    def size(self, *, with_added_tokens: bool) -> int:
        """How many tokens there are."""

    def num_special_tokens(self, *, pair: bool) -> int:
        """How many special tokens a row gets."""

    def add_tokens(self, tokens: Sequence[Any], *, special: bool) -> int:
        """Add tokens and return how many were new."""

    def special_ids(self) -> set[int]:
        """Ids that ``skip_special_tokens`` leaves out."""

    def to_json(self) -> str | None:
        """The content of a tokenizer.json; None where the engine needs no file."""


def lengths_kept(first: int, second: int, room: int, strategy: str) -> tuple[int, int]:
    """How many tokens of two texts stay when both must fit into `room`.

    Args:
        first: Tokens of the first text.
        second: Tokens of the second text, 0 without one.
        room: Tokens that fit.
        strategy: As in `Truncation`. With ``"longest_first"`` the shorter text stays whole while it
            takes up to half the room; else each gets half, the longer one the odd token.

    Raises:
        TokenizerError: the text that may be cut is too short to make them fit.
    """
    excess = first + second - room
    if excess <= 0:
        return first, second
    if strategy == "longest_first":
        if min(first, second) <= room // 2:
            return (first, room - first) if first < second else (room - second, second)
        half = room // 2
        return (room - half, half) if first > second else (half, room - half)
    cut_first = strategy == "only_first"
    if (first if cut_first else second) < excess:
        raise TokenizerError(
            f"truncation={strategy!r} cannot make the texts fit",
            found=f"texts of {first} and {second} tokens for {room}",
            mend="Use truncation='longest_first' or a larger max_length.",
        )
    return (first - excess, second) if cut_first else (first, second - excess)


class TokenizersEngine:
    """A ``tokenizers.Tokenizer``.

    Args:
        tokenizer: Its own padding and truncation are switched off: they would change with every call.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        *,
        add_special_tokens: bool,
        truncation: Truncation | None,
    ) -> list[Row]:
        """Encode texts, or pairs of texts."""
        with library_faults("The tokenizer fails on this text"):
            return self._encode(texts, pairs, add_special_tokens, truncation)

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        add_special_tokens: bool,
        truncation: Truncation | None,
    ) -> list[Row]:
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        if len(inputs) == 1:
            # The library starts threads for a batch, and complains when the process forks after that.
            pair = None if pairs is None else pairs[0]
            encoded = [self.tokenizer.encode(texts[0], pair, add_special_tokens=add_special_tokens)]
        else:
            encoded = self.tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)
        if truncation is not None:
            for i, row in enumerate(encoded):
                # Most rows fit; only those that do not are encoded again, in parts.
                if len(row) > truncation.max_length:
                    pair = None if pairs is None else pairs[i]
                    encoded[i] = self._truncated(texts[i], pair, add_special_tokens, truncation)
        return [Row(e.ids, e.type_ids, e.special_tokens_mask, e.offsets) for e in encoded]

    def _truncated(
        self, text: str, pair: str | None, add_special_tokens: bool, truncation: Truncation
    ) -> tokenizers.Encoding:
        first = self.tokenizer.encode(text, add_special_tokens=False)
        second = None if pair is None else self.tokenizer.encode(pair, add_special_tokens=False)
        special = self.num_special_tokens(pair=pair is not None) if add_special_tokens else 0
        room = _room(truncation, special)
        kept = lengths_kept(len(first), len(second) if second else 0, room, truncation.strategy)
        first.truncate(kept[0], direction=truncation.side)
        if second is not None:
            second.truncate(kept[1], direction=truncation.side)
        return self.tokenizer.post_process(first, second, add_special_tokens)

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[str]:
        """Split a text into the spellings of its tokens."""
        with library_faults("The tokenizer fails on this text"):
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).tokens

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn ids into text."""
        with library_faults("The tokenizer fails on these ids"):
            return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's spelling."""
        return self.tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """The spelling of an id."""
        return self.tokenizer.id_to_token(index)

    def vocab(self) -> dict[str, int]:
        """Every token and its id, added ones included."""
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def size(self, *, with_added_tokens: bool) -> int:
        """How many tokens there are."""
        return self.tokenizer.get_vocab_size(with_added_tokens=with_added_tokens)

    def num_special_tokens(self, *, pair: bool) -> int:
        """How many special tokens a row gets."""
        return self.tokenizer.num_special_tokens_to_add(pair)

    def add_tokens(self, tokens: Sequence[Any], *, special: bool) -> int:
        """Add tokens, given as strings or ``tokenizers.AddedToken``, and return how many were new."""
        before = self.size(with_added_tokens=True)
        if special:
            self.tokenizer.add_special_tokens(list(tokens))
        else:
            self.tokenizer.add_tokens(list(tokens))
        return self.size(with_added_tokens=True) - before

    def set_ends(self, bos: str | None, eos: str | None) -> None:
        """Make every row start and end with the given tokens, instead of what it does now.

        Args:
            bos: The token at the start; None for none.
            eos: The token at the end; None for none.

        Raises:
            TokenizerError: one of them is not in the vocabulary.
        """
        special = [(token, self.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
        for token, index in special:
            if index is None:
                raise TokenizerError(f"The special token {token!r} is not in the vocabulary")
        row = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
        second = [*([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
        self.tokenizer.post_processor = tokenizers_library().processors.TemplateProcessing(
            single=row, pair=row + second, special_tokens=special
        )

    def special_ids(self) -> set[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {index for index, token in added.items() if token.special}

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self.tokenizer.to_str(pretty=True)


MOST_SENTINELS = 10_000
"""Sentinels that a `ByteEngine` may have: each gets a name, so the number in a file is memory."""


class ByteEngine:
    """UTF-8 bytes as tokens: ByT5's vocabulary, which needs no file.

    Id = byte + 3, after ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2; sentinels ``<extra_id_0>`` ... follow the
    bytes from id 259 on. A row ends in ``</s>``. Source: https://arxiv.org/abs/2105.13626, section 3, and
    the ids of google/byt5-small.

    Args:
        extra_ids: How many sentinels.
    """

    _BASE = ("<pad>", "</s>", "<unk>")

    def __init__(self, extra_ids: int = 125) -> None:
        if not 0 <= extra_ids <= MOST_SENTINELS:
            raise TokenizerError(
                "A tokenizer of bytes cannot have so many sentinels",
                where="extra_ids",
                expected=f"0 to {MOST_SENTINELS}",
                found=extra_ids,
            )
        self.extra_ids = extra_ids
        named = [*self._BASE, *(None for _ in range(256)), *(f"<extra_id_{i}>" for i in range(extra_ids))]
        self._added = {token: index for index, token in enumerate(named) if token is not None}
        self._special = set(self._added.values())
        self._build()

    def _build(self) -> None:
        self._by_id = {index: token for token, index in self._added.items()}
        # Longest first, so that a token is never found inside a longer one; the base three take the
        # blanks around them, as the published tokenizer has them do.
        names = sorted(self._added, key=len, reverse=True)
        parts = [rf"\s*{re.escape(n)}\s*" if n in self._BASE else re.escape(n) for n in names]
        self._split = re.compile(f"({'|'.join(parts)})")

    def _ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for i, part in enumerate(self._split.split(text)):
            if i % 2:
                ids.append(self._added[part.strip() if part.strip() in self._BASE else part])
                offsets.append((position, position + len(part)))
                position += len(part)
                continue
            for character in part:
                encoded = character.encode("utf-8", errors="surrogatepass")
                ids += [byte + len(self._BASE) for byte in encoded]
                offsets += [(position, position + 1)] * len(encoded)
                position += 1
        return ids, offsets

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        *,
        add_special_tokens: bool,
        truncation: Truncation | None,
    ) -> list[Row]:
        """Encode texts, or pairs of texts."""
        second = [None] * len(texts) if pairs is None else list(pairs)
        return [
            self._row(text, pair, add_special_tokens, truncation)
            for text, pair in zip(texts, second, strict=True)
        ]

    def _row(
        self, text: str, pair: str | None, add_special_tokens: bool, truncation: Truncation | None
    ) -> Row:
        parts = [self._ids(t) for t in (text, pair) if t is not None]
        special = len(parts) if add_special_tokens else 0
        if truncation is not None:
            counts = [len(ids) for ids, _ in parts]
            kept = lengths_kept(counts[0], sum(counts[1:]), _room(truncation, special), truncation.strategy)
            parts = [
                (_cut(ids, keep, truncation.side), _cut(offsets, keep, truncation.side))
                for (ids, offsets), keep in zip(parts, kept, strict=False)
            ]
        row, eos = Row([], [], [], []), self._added["</s>"]
        for ids, offsets in parts:
            # A text that ends in </s> of its own gets no second one.
            end = 1 if add_special_tokens and ids[-1:] != [eos] else 0
            row.ids.extend(ids + [eos] * end)
            row.offsets.extend(offsets + [(0, 0)] * end)
            row.special_mask.extend([0] * len(ids) + [1] * end)
        row.type_ids.extend([0] * len(row.ids))
        return row

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[str]:
        """Split a text into the spellings of its tokens."""
        ids = self._row(text, None, add_special_tokens, None).ids
        return [str(self.id_to_token(i)) for i in ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Turn ids into text; bytes that are no valid UTF-8 are left out."""
        raw = bytearray()
        for index in ids:
            token = self._by_id.get(index)
            if token is None:
                raw.append(index - len(self._BASE))
            elif not (skip_special_tokens and index in self._special):
                raw += token.encode()
        return raw.decode("utf-8", errors="ignore")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's spelling; a byte is spelled as the character of its value."""
        if token in self._added:
            return self._added[token]
        return ord(token) + len(self._BASE) if len(token) == 1 and ord(token) < 256 else None

    def id_to_token(self, index: int) -> str | None:
        """The spelling of an id."""
        if index in self._by_id:
            return self._by_id[index]
        return chr(index - len(self._BASE)) if 3 <= index < 259 else None

    def vocab(self) -> dict[str, int]:
        """Every token and its id, added ones included."""
        return {chr(byte): byte + len(self._BASE) for byte in range(256)} | self._added

    def size(self, *, with_added_tokens: bool) -> int:
        """How many tokens there are."""
        return 256 + len(self._added) if with_added_tokens else 256

    def num_special_tokens(self, *, pair: bool) -> int:
        """How many special tokens a row gets."""
        return 2 if pair else 1

    def add_tokens(self, tokens: Sequence[Any], *, special: bool) -> int:
        """Add tokens, given as strings or objects with a ``content``, and return how many were new."""
        before = len(self._added)
        for token in tokens:
            text = token if isinstance(token, str) else token.content
            index = self._added.setdefault(text, 256 + len(self._added))
            if special:
                self._special.add(index)
        self._build()
        return len(self._added) - before

    def special_ids(self) -> set[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        return set(self._special)

    def to_json(self) -> None:
        """None: there is nothing to store."""

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """Tokens besides the bytes by id, as tokenizer_config.json's ``added_tokens_decoder`` lists them."""
        plain = {"normalized": False, "single_word": False}
        return {
            str(index): {
                "content": token,
                "lstrip": token in self._BASE,
                "rstrip": token in self._BASE,
                "special": index in self._special,
                **plain,
            }
            for token, index in self._added.items()
        }


def _room(truncation: Truncation, special: int) -> int:
    room = truncation.max_length - special
    if room < 0:
        raise TokenizerError(
            "max_length leaves no room for the special tokens",
            where="max_length",
            expected=f"at least {special}",
            found=truncation.max_length,
        )
    return room


def _cut(items: list[Any], keep: int, side: str) -> list[Any]:
    return items[len(items) - keep :] if side == "left" else items[:keep]


def load_json_tokenizer(text: str, where: object) -> TokenizersEngine:
    """Make an engine from the content of a tokenizer.json.

    Args:
        text: The JSON.
        where: The file, for errors.

    Raises:
        TokenizerError: it is not JSON, or no tokenizer that the ``tokenizers`` library knows.
    """
    library = tokenizers_library()
    try:
        with library_faults("The tokenizer's file cannot be used", where):
            check_charsmaps(text, where)
            tokenizer = library.Tokenizer.from_str(text)
            check_growth(tokenizer.normalizer, where)
            return TokenizersEngine(tokenizer)
    except TokenizerError as error:
        try:
            json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise TokenizerError(
                "The tokenizer's file is not valid JSON",
                where=where,
                found=str(problem),
                mend="Fetch or save it again.",
            ) from error
        if error.mend == "Fetch or save it again.":
            error.mend = "It may need a newer tokenizers package: pip install -U tokenizers."
        raise
