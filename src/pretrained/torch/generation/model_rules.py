# SPDX-License-Identifier: Apache-2.0
"""Rules on the scores that one family of models needs: of speech and audio, and forced tokens.

No config asks for them; pass them to ``generate(logits_processor=[...])``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import LogitsProcessor, TokenIds, _above_0, _count, _TokenSet


class ForceTokensLogitsProcessor(LogitsProcessor):
    """Given tokens at given positions.

    Args:
        force_token_map: Pairs of position (prompt included) and token id, ``[[1, 50259], [2, 50359]]``; a
            position whose token is None is left free.
    """

    def __init__(self, force_token_map: Mapping[int, int | None] | Iterable[Sequence[int | None]]) -> None:
        pairs = dict(force_token_map)  # type: ignore[arg-type]
        self.force_token_map: dict[int, int] = {at: token for at, token in pairs.items() if token is not None}
        self._sets = {at: _TokenSet(token) for at, token in self.force_token_map.items()}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores; at a given position only the given token is possible."""
        forced = self._sets.get(input_ids.shape[1])
        return scores if forced is None else forced.force(scores)


class AlternatingCodebooksLogitsProcessor(LogitsProcessor):
    """Tokens of two codebooks in turn (Bark's coarse model).

    Args:
        input_start_len: Length of the prompt; the first codebook's turn.
        semantic_vocab_size: Tokens before the first codebook's.
        codebook_size: Tokens of the first codebook; the second's follow.
    """

    def __init__(self, input_start_len: int, semantic_vocab_size: int, codebook_size: int) -> None:
        self.input_start_len = _count("input_start_len", input_start_len, 0)
        self.semantic_vocab_size = _count("semantic_vocab_size", semantic_vocab_size, 0)
        self.codebook_size = _count("codebook_size", codebook_size, 0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the codebook whose turn it is."""
        second = self.semantic_vocab_size + self.codebook_size
        scores = scores.clone()
        if (input_ids.shape[1] - self.input_start_len) % 2 == 0:
            scores[:, : self.semantic_vocab_size] = -math.inf
            scores[:, second:] = -math.inf
        else:
            scores[:, :second] = -math.inf
        return scores


class BarkEosPrioritizerLogitsProcessor(LogitsProcessor):
    """The end, as soon as it is likely enough (Bark's semantic model).

    Args:
        eos_token_id: What ends a sequence.
        min_eos_p: From which probability on it must come; None for never.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(self, eos_token_id: TokenIds, min_eos_p: float | None, device: Any = None) -> None:
        self.min_eos_p = None if min_eos_p is None else _above_0("min_eos_p", min_eos_p)
        self._eos = _TokenSet(eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores; of rows whose end is likely enough, only those of the ends."""
        if self.min_eos_p is None:
            return scores
        ends = self._eos.index(scores)
        over = (scores.softmax(-1, dtype=torch.float32)[:, ends] > self.min_eos_p).any(-1, keepdim=True)
        only = torch.full_like(scores, -math.inf).index_copy_(1, ends, scores[:, ends])
        return torch.where(over, only, scores)


class ClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Moves the scores away from those without a prompt, where both are in one batch (arXiv:2306.05284).

    Args:
        guidance_scale: How far; above 1.
    """

    def __init__(self, guidance_scale: float) -> None:
        if not guidance_scale > 1:
            raise GenerationError(
                f"guidance_scale cannot be {guidance_scale!r}",
                expected="a number above 1",
                where="guidance_scale",
            )
        self.guidance_scale = guidance_scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab] scores of scores [2 rows, vocab]: with the prompt first, then without."""
        if scores.shape[0] != 2 * input_ids.shape[0]:
            raise GenerationError(
                "Guidance needs the scores with and without the prompt",
                where="scores",
                expected=f"{2 * input_ids.shape[0]} rows",
                found=scores.shape[0],
            )
        given, free = scores.chunk(2)
        return free + (given - free) * self.guidance_scale


class WhisperTimeStampLogitsProcessor(LogitsProcessor):
    """Keeps the time stamps of a transcript in order (Whisper, arXiv:2212.04356).

    They come in pairs, except before the end; they never go back; the first token is one; and where all
    time stamps together are likelier than any single other token, one must come. Time stamps are the tokens
    after ``<|notimestamps|>``.

    Args:
        generate_config: Its `no_timestamps_token_id`, `eos_token_id` (or `bos_token_id`) and
            `max_initial_timestamp_index` count.
        begin_index: Length of the sequence when the first new token comes.
        _detect_timestamp_from_logprob: False to leave out the rule on their joint probability; None for
            what `generate_config` says.
    """

    def __init__(
        self, generate_config: Any, begin_index: int, _detect_timestamp_from_logprob: bool | None = None
    ) -> None:
        self.no_timestamps_token_id: int = generate_config.no_timestamps_token_id
        self.timestamp_begin = self.no_timestamps_token_id + 1
        ends = generate_config.eos_token_id or generate_config.bos_token_id
        self.eos_token_id: int = ends if isinstance(ends, int) else min(ends)
        if _detect_timestamp_from_logprob is None:
            _detect_timestamp_from_logprob = getattr(generate_config, "_detect_timestamp_from_logprob", True)
        self._detect_timestamp_from_logprob = _detect_timestamp_from_logprob
        self.begin_index = _count("begin_index", begin_index, 0)
        self.max_initial_timestamp_index = getattr(generate_config, "max_initial_timestamp_index", None)

    def set_begin_index(self, begin_index: int) -> None:
        """Change where the transcript begins.

        Args:
            begin_index: Length of the sequence when its first token comes.
        """
        self.begin_index = begin_index

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of what may come."""
        first = self.timestamp_begin
        tokens = torch.arange(scores.shape[1], device=scores.device)
        stamps = tokens >= first
        drop = tokens == self.no_timestamps_token_id
        if input_ids.shape[1] == self.begin_index:
            drop = drop | ~stamps
            if self.max_initial_timestamp_index is not None:
                drop = drop | (tokens > first + self.max_initial_timestamp_index)
        elif input_ids.shape[1] > self.begin_index:
            drop = drop | self._out_of_order(input_ids[:, self.begin_index :], tokens, stamps)
        scores = scores.masked_fill(drop, -math.inf)
        if self._detect_timestamp_from_logprob:
            together = scores[:, first:].float().logsumexp(-1)
            scores[:, :first].masked_fill_((together > scores[:, :first].amax(-1))[:, None], -math.inf)
        return scores

    def _out_of_order(self, said: torch.Tensor, tokens: torch.Tensor, stamps: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab], True for tokens that would break a pair or go back in time."""
        is_stamp = said >= self.timestamp_begin
        last = is_stamp[:, -1:]
        before = is_stamp[:, -2:-1] if said.shape[1] > 1 else torch.ones_like(last)
        closes = last & ~before
        drop = (last & before & stamps) | (closes & (tokens < self.eos_token_id))
        # The newest time stamp of each row; one that closes a pair may repeat it.
        at = torch.where(is_stamp, torch.arange(said.shape[1], device=said.device), -1).amax(-1, keepdim=True)
        newest = said.gather(1, at.clamp(min=0)) + (~closes).to(said.dtype)
        return drop | (stamps & (at >= 0) & (tokens < newest))
