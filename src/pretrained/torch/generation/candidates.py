# SPDX-License-Identifier: Apache-2.0
"""Where drafts come from: the protocol of candidate generators, and the one that looks in the prompt.

A draft is a guess at the next tokens, which the model then checks in one forward (see `speculative`).
A bad guess costs time and never changes what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pretrained.errors import GenerationError

NO_TOKEN = -1
"""Stands in a draft where a row has no guess, and among known tokens where nothing is decided."""


@dataclass(frozen=True)
class Draft:
    """A guess at the tokens that follow.

    Attributes:
        tokens: [rows, drafted] ids, -1 where a row has none.
        probs: [rows, drafted, vocab] what each token was drawn from; None where it was not drawn.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None

    @staticmethod
    def empty(ids: torch.Tensor) -> Draft:
        """Return no guess at all.

        Args:
            ids: [rows, length].
        """
        return Draft(ids.new_empty((ids.shape[0], 0)))


class CandidateGenerator(Protocol):
    """Guesses the next tokens of each row."""

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return a guess.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not. A guess
                repeats them or goes another way; they win.
            limit: How many tokens a guess may have at most, 1 or more.
            is_open: For each row whether it is not finished yet; the others need no guess.
        """

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Learn how good the last guess was.

        Args:
            drafted: How many tokens it had.
            matched: How many of them were taken.
        """


class PromptLookupCandidateGenerator:
    """Guesses that the text goes on as it did when it last read like this (Saxena 2023, prompt lookup).

    The last tokens of a row are looked for earlier in the row, and in the encoder's input where there is
    one: the longest run first, the latest place first. What followed there is copied; where that reaches
    the end of the text it goes on from its own copy, as a repeating text does.

    Args:
        num_output_tokens: How many tokens to guess.
        max_matching_ngram_size: How long a run to look for first; 2 if None. Shorter ones follow.
        eos_token_id: Tokens after which a guess ends.
        padding: How many tokens each row begins with that are padding; None for none.
        encoder_input_ids: [rows, length] text to look in first, or None.

    Raises:
        GenerationError: a number below 1.
    """

    def __init__(
        self,
        num_output_tokens: int = 10,
        max_matching_ngram_size: int | None = None,
        *,
        eos_token_id: Sequence[int] = (),
        padding: Sequence[int] | None = None,
        encoder_input_ids: torch.Tensor | None = None,
    ) -> None:
        size = 2 if max_matching_ngram_size is None else max_matching_ngram_size
        for name, value in (("num_output_tokens", num_output_tokens), ("max_matching_ngram_size", size)):
            if value < 1:
                raise GenerationError(f"{name} must be 1 or more", where=name, found=value)
        self.num_output_tokens = num_output_tokens
        self.max_matching_ngram_size = size
        self._ends = frozenset(eos_token_id)
        self._padding = padding
        self._before = None if encoder_input_ids is None else encoder_input_ids.tolist()
        self._rows: list[_Text] = []
        # Columns of the tokens that are in the index already.
        self._length = 0

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return what followed the last tokens when they last occurred.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not.
            limit: How many tokens a guess may have at most.
            is_open: For each row whether it is not finished yet.
        """
        self._read(input_ids)
        ahead = [[token for token in row if token != NO_TOKEN] for row in known.tolist()]
        found = [
            self._guess(text, row, limit) if going_on else []
            for text, row, going_on in zip(self._rows, ahead, is_open, strict=True)
        ]
        width = max(map(len, found))
        if not width:
            return Draft.empty(input_ids)
        filled = [row + [NO_TOKEN] * (width - len(row)) for row in found]
        return Draft(torch.tensor(filled, dtype=input_ids.dtype, device=input_ids.device))

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Change nothing: the number of tokens is fixed."""

    def _read(self, input_ids: torch.Tensor) -> None:
        fresh = input_ids[:, self._length :].tolist()
        if not self._rows:
            before = self._before or [[]] * len(fresh)
            self._rows = [_Text(self.max_matching_ngram_size, row) for row in before]
            skip = self._padding or [0] * len(fresh)
            fresh = [row[count:] for row, count in zip(fresh, skip, strict=True)]
        for text, row in zip(self._rows, fresh, strict=True):
            text.extend(row)
        self._length = input_ids.shape[1]

    def _guess(self, text: _Text, known: list[int], limit: int) -> list[int]:
        guess = known + text.continuation(known, min(self.num_output_tokens, limit))
        for index, token in enumerate(guess):
            if token in self._ends:
                return guess[: min(index + 1, limit)]
        return guess[:limit]


class _Text:
    """One row's tokens, and where each run of them was last followed by something."""

    def __init__(self, size: int, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        # For each run of up to `size` tokens the latest place after it.
        self._after: dict[tuple[int, ...], int] = {}
        self._size = size
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens; the runs that end at the last one are entered when something follows it."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(1, min(self._size, end) + 1):
                self._after[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def continuation(self, known: list[int], count: int) -> list[int]:
        """Return up to `count` tokens that follow this text and `known`; none where nothing matches."""
        tail = self._tokens[-self._size :] + known
        for length in range(min(self._size, len(tail)), 0, -1):
            place = self._after.get(tuple(tail[len(tail) - length :]))
            if place is not None:
                return self._copy(place, known, count)
        return []

    def _copy(self, place: int, known: list[int], count: int) -> list[int]:
        whole = len(self._tokens)
        copied: list[int] = []
        for at in range(place, place + count):
            beyond = at - whole
            if beyond < 0:
                copied.append(self._tokens[at])
            else:
                copied.append(known[beyond] if beyond < len(known) else copied[beyond - len(known)])
        return copied
