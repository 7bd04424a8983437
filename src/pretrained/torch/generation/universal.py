# SPDX-License-Identifier: Apache-2.0
"""Drafts of a model with another vocabulary: through text, or through the tokens that both know.

Either way the model that checks decides, so a translation that is not exact costs only time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrained.torch.generation.assisted import AssistedCandidateGenerator
from pretrained.torch.generation.candidates import NO_TOKEN, Draft
from pretrained.torch.generation.logits import LogitsProcessor

_BROKEN = "\ufffd"
"""What decoding makes of a character of which bytes are missing."""

_LONGEST = 8
"""Tokens that hold a whole character for sure: it has up to four bytes, and some tokens give no text."""

MakeAssistant = Callable[[torch.Tensor], AssistedCandidateGenerator]
"""Makes a generator for a beginning [rows, length] in the assistant's ids."""


class AssistedCandidateGeneratorDifferentTokenizers:
    """Guesses through text: what is new is decoded, encoded for the assistant, drafted, and back.

    Only what is new is translated, together with a few tokens before it, so that tokens at the border come
    out as they would in the whole text. Each row has an assistant's cache of its own, as the same number of
    tokens is not the same number for the assistant.

    Args:
        make: Makes the assistant's generator for one row.
        tokenizer: Of the model that checks; ``encode(text, add_special_tokens=...)`` and ``decode(ids)``.
        assistant_tokenizer: Of the assistant.
        target_lookbehind: Tokens of the model that are translated again with what is new.
        assistant_lookbehind: Tokens of the assistant that are encoded again with what is new.
        padding: How many tokens each row begins with that are padding; None for none.
        vocab_size: How many ids the assistant knows.
    """

    def __init__(
        self,
        make: MakeAssistant,
        tokenizer: Any,
        assistant_tokenizer: Any,
        *,
        target_lookbehind: int = 10,
        assistant_lookbehind: int = 10,
        padding: Sequence[int] | None = None,
    ) -> None:
        self._make = make
        self._tokenizers = (tokenizer, assistant_tokenizer)
        self._behind = (target_lookbehind, assistant_lookbehind)
        self._padding = padding
        self._rows: list[_Row] = []

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return what the assistant writes next, in the model's ids.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not.
            limit: How many tokens a guess may have at most.
            is_open: For each row whether it is not finished yet.
        """
        ids, ahead = input_ids.tolist(), known.tolist()
        if not self._rows:
            self._rows = [_Row(self._make, *self._tokenizers, *self._behind) for _ in ids]
        skip = self._padding or [0] * len(ids)
        found: list[list[int]] = []
        for row, text, more, count, going_on in zip(self._rows, ids, ahead, skip, is_open, strict=True):
            sure = [token for token in more if token != NO_TOKEN]
            guess = row.guess(text[count:] + sure, input_ids.device) if going_on else []
            found.append((sure + guess)[:limit])
        width = max(map(len, found))
        filled = [row + [NO_TOKEN] * (width - len(row)) for row in found]
        return Draft(torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device))

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Draft more or fewer tokens next time, as the schedule has it.

        Args:
            drafted: How many tokens the last draft had.
            matched: How many of them were taken.
        """
        for row in self._rows[:1]:
            # One length serves all rows.
            if row.assistant is not None:
                row.assistant.update_candidate_strategy(drafted, matched)


class _Row:
    """One row's text in the assistant's ids."""

    def __init__(
        self,
        make: MakeAssistant,
        tokenizer: Any,
        assistant_tokenizer: Any,
        target_behind: int,
        own_behind: int,
    ) -> None:
        self.assistant: AssistedCandidateGenerator | None = None
        self._make = make
        self._target, self._own = tokenizer, assistant_tokenizer
        self._target_behind, self._own_behind = target_behind, own_behind
        self._ids: list[int] = []
        self._read = 0

    def guess(self, ids: list[int], device: torch.device) -> list[int]:
        """Return what the assistant writes after these tokens of the model, in the model's tokens."""
        if self._target.decode(ids[-_LONGEST:]).endswith(_BROKEN):
            # A character's first bytes: no text yet that could be translated.
            return []
        self._follow(ids)
        if not self._ids:
            return []
        own = torch.tensor([self._ids], device=device)
        if self.assistant is None:
            self.assistant = self._make(own)
        none_known = own.new_empty((1, 0))
        draft = self.assistant.get_candidates(own, none_known, self.assistant.length.tokens, [True])
        drafted = draft.tokens[0].tolist()
        tail = self._ids[-self._own_behind :]
        new = _added(self._own, tail, tail + drafted).rstrip(_BROKEN)
        return self._translate(ids, new)

    def _follow(self, ids: list[int]) -> None:
        """Bring the assistant's ids up to these tokens of the model."""
        if not self._read:
            self._ids = _encode(self._own, self._target.decode(ids), special=True)
        else:
            window = ids[max(self._read - self._target_behind, 0) :]
            new = _added(self._target, window[: len(window) - (len(ids) - self._read)], window)
            cut = max(len(self._ids) - self._own_behind, 0)
            while cut and self._own.decode(self._ids[cut:]).startswith(_BROKEN):
                cut -= 1
            self._ids = self._ids[:cut] + _encode(self._own, self._own.decode(self._ids[cut:]) + new)
        self._read = len(ids)

    def _translate(self, ids: list[int], new: str) -> list[int]:
        """Return the model's tokens of a text that follows its tokens."""
        if not new:
            return []
        tail = ids[-self._target_behind :]
        whole = _encode(self._target, self._target.decode(tail) + new)
        if whole[: len(tail)] == tail:
            return whole[len(tail) :]
        return _encode(self._target, new)


class UniversalSpeculativeDecodingGenerator:
    """Guesses through the tokens that both vocabularies know, with their probabilities.

    The assistant draws only such tokens, so a draft and what it was drawn from carry over one by one, and
    the model takes them with the probability that rejection sampling gives (Timor et al. 2025,
    arXiv:2502.05202, token-level intersection). Tokens of the model that the assistant lacks are shown to it
    as the last token of their text.

    Args:
        make: Makes the assistant's generator, given `ban` among its rules.
        tokenizer: Of the model that checks; ``get_vocab()``, ``encode`` and ``decode``.
        assistant_tokenizer: Of the assistant.
        vocab_size: How many scores the model gives.
        assistant_vocab_size: How many scores the assistant gives.
    """

    def __init__(
        self,
        make: Callable[[torch.Tensor, LogitsProcessor], AssistedCandidateGenerator],
        tokenizer: Any,
        assistant_tokenizer: Any,
        *,
        vocab_size: int,
        assistant_vocab_size: int,
    ) -> None:
        self._make = make
        self._tokenizer, self._own = tokenizer, assistant_tokenizer
        self._vocab_size = vocab_size
        pairs = shared_tokens(tokenizer, assistant_tokenizer, vocab_size, assistant_vocab_size)
        self.shared = len(pairs)
        self._to_own = torch.full((vocab_size,), NO_TOKEN, dtype=torch.int64)
        self._to_target = torch.full((assistant_vocab_size,), NO_TOKEN, dtype=torch.int64)
        for target, own in pairs:
            self._to_own[target], self._to_target[own] = own, target
        self._assistant: AssistedCandidateGenerator | None = None

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return what the assistant draws next, in the model's ids.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not.
            limit: How many tokens a guess may have at most.
            is_open: For each row whether it is not finished yet.
        """
        if not self.shared:
            return Draft.empty(input_ids)
        own, ahead = self._in_own(input_ids), torch.where(known < 0, known, self._in_own(known.clamp(min=0)))
        if self._assistant is None:
            self._to_target = self._to_target.to(input_ids.device)
            self._assistant = self._make(own, _OnlyThese(self._to_target >= 0))
        draft = self._assistant.get_candidates(own, ahead, limit, is_open)
        tokens = torch.where(draft.tokens < 0, draft.tokens, self._to_target[draft.tokens.clamp(min=0)])
        if draft.probs is None:
            return Draft(tokens)
        ids = (self._to_target >= 0).nonzero()[:, 0]
        shape = (*draft.probs.shape[:-1], self._vocab_size)
        probs = draft.probs.new_zeros(shape).index_copy_(-1, self._to_target[ids], draft.probs[..., ids])
        return Draft(tokens, probs)

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Draft more or fewer tokens next time, as the schedule has it.

        Args:
            drafted: How many tokens the last draft had.
            matched: How many of them were taken.
        """
        if self._assistant is not None:
            self._assistant.update_candidate_strategy(drafted, matched)

    def _in_own(self, ids: torch.Tensor) -> torch.Tensor:
        if self._to_own.device != ids.device:
            self._to_own = self._to_own.to(ids.device)
        for token in ids[self._to_own[ids] < 0].unique().tolist():
            text = _encode(self._own, self._tokenizer.decode([token]))
            self._to_own[token] = text[-1] if text else 0
        return self._to_own[ids]


class _OnlyThese(LogitsProcessor):
    """Leaves only some tokens possible."""

    def __init__(self, possible: torch.Tensor) -> None:
        self._banned = ~possible

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, without the others."""
        return scores.masked_fill(self._banned, -torch.inf)


def shared_tokens(first: Any, second: Any, first_size: int, second_size: int) -> list[tuple[int, int]]:
    """Return the pairs of ids that stand for the same token in two vocabularies.

    Args:
        first: A tokenizer.
        second: Another.
        first_size: Ids from here on are left out of the first.
        second_size: And these of the second.
    """
    # Two spellings of a leading space: byte-level vocabularies', and SentencePiece's.
    theirs = {token.replace("\u2581", "\u0120"): index for token, index in second.get_vocab().items()}
    pairs = (
        (index, theirs.get(token.replace("\u2581", "\u0120"), NO_TOKEN))
        for token, index in first.get_vocab().items()
    )
    return [(mine, its) for mine, its in pairs if 0 <= its < second_size and mine < first_size]


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _added(tokenizer: Any, before: list[int], after: list[int]) -> str:
    """Return the text that the later tokens add."""
    old, new = tokenizer.decode(before), tokenizer.decode(after)
    # An incomplete character at the end is completed by what follows.
    old = old.rstrip(_BROKEN)
    return new[len(old) :] if new.startswith(old) else tokenizer.decode(after[len(before) :])
