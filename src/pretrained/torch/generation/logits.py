# SPDX-License-Identifier: Apache-2.0
"""Rules on the scores of the next token: what may come, what must come, what is less likely.

Each rule is called with ``(input_ids [rows, length], scores [rows, vocab])`` and returns new scores; it
changes neither of its arguments. Names and arguments are the ecosystem's. Each is tested against a slow
numpy version in `pretrained.testing.reference`. Filters that narrow the choice for sampling are in
`pretrained.torch.generation.warpers`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from pretrained.errors import GenerationError

TokenIds = int | Sequence[int] | torch.Tensor
Bias = Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]]


class LogitsProcessor:
    """Base of all rules; a user's own rule derives from it, or is any function of the same arguments."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return new scores.

        Args:
            input_ids: [rows, length] tokens so far, prompt included.
            scores: [rows, vocab] float32 scores of the next token.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


class LogitsProcessorList(list[Callable[..., torch.Tensor]]):
    """Rules applied one after the other."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the scores after all rules.

        Args:
            input_ids: [rows, length] tokens so far, prompt included.
            scores: [rows, vocab] scores of the next token.
            **kwargs: For rules that take more than two arguments.
        """
        for rule in self:
            scores = rule(input_ids, scores, **_taken(rule, kwargs)) if kwargs else rule(input_ids, scores)
        return scores


def _taken(rule: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(rule).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


def token_tensor(ids: TokenIds) -> torch.Tensor:
    """Return token ids as a 1-D int64 tensor.

    Args:
        ids: One id, several, or a tensor of them.

    Raises:
        GenerationError: an id is negative or no whole number.
    """
    tensor = torch.as_tensor([ids] if isinstance(ids, int) else ids)
    if tensor.is_floating_point() or (tensor.numel() and int(tensor.min()) < 0):
        raise GenerationError("Token ids are whole numbers of 0 or more", found=tensor.tolist())
    return tensor.to(torch.int64).reshape(-1)


class _TokenSet:
    """A set of tokens as an index on the device of the scores, without those outside the vocabulary."""

    def __init__(self, ids: TokenIds) -> None:
        self._ids = token_tensor(ids)
        self._ready: tuple[torch.device, int] | None = None

    def index(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the ids, [tokens], fit to index the last dimension of `scores`."""
        if self._ready != (scores.device, scores.shape[-1]):
            self._ids = self._ids[self._ids < scores.shape[-1]].to(scores.device)
            self._ready = (scores.device, scores.shape[-1])
        return self._ids

    def ban(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores in which these tokens are impossible."""
        return scores.index_fill(1, self.index(scores), -math.inf)

    def force(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores in which only these tokens are possible."""
        return torch.full_like(scores, -math.inf).index_fill_(1, self.index(scores), 0.0)


class MinLengthLogitsProcessor(LogitsProcessor):
    """No end before the sequence has `min_length` tokens, prompt included.

    Args:
        min_length: Tokens before an end may come.
        eos_token_id: What ends a sequence.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(self, min_length: int, eos_token_id: TokenIds, device: Any = None) -> None:
        self.min_length = _count("min_length", min_length, 0)
        self._eos = _TokenSet(eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, without an end where it would come too early."""
        return self._eos.ban(scores) if input_ids.shape[1] < self.min_length else scores


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """No end before `min_new_tokens` tokens follow the prompt.

    Args:
        prompt_length_to_skip: Length of the prompt.
        min_new_tokens: New tokens before an end may come.
        eos_token_id: What ends a sequence.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(
        self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: TokenIds, device: Any = None
    ) -> None:
        self.prompt_length_to_skip = _count("prompt_length_to_skip", prompt_length_to_skip, 0)
        self.min_new_tokens = _count("min_new_tokens", min_new_tokens, 0)
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Makes tokens that occurred already less likely (Keskar et al. 2019, arXiv:1909.05858).

    A score above 0 is divided by the penalty, one below 0 multiplied, once however often a token occurred.

    Args:
        penalty: Above 1 discourages, below 1 encourages.
        prompt_ignore_length: Tokens at the beginning that do not count: one number, or [rows] numbers
            (the length of each row's padding).
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | torch.Tensor | None = None) -> None:
        self.penalty = _above_0("penalty", penalty)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, penalised."""
        skip = self.prompt_ignore_length
        if isinstance(skip, int):
            input_ids = input_ids[:, skip:]
        ids, counts = _in_vocabulary(input_ids, scores)
        if isinstance(skip, torch.Tensor):
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            counts &= positions >= _for_rows(skip.to(input_ids.device), scores)[:, None]
        return _penalise(ids, scores, self.penalty, counts)


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Makes tokens of the encoder's input more likely, against invented ones.

    Args:
        penalty: Above 1 encourages tokens of the input.
        encoder_input_ids: [batch, length].
    """

    def __init__(self, penalty: float, encoder_input_ids: torch.Tensor) -> None:
        self.penalty = 1 / _above_0("penalty", penalty)
        self.encoder_input_ids = encoder_input_ids
        self._ready: tuple[tuple[int, ...], torch.Tensor, torch.Tensor | None] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, with the input's tokens lifted."""
        if self._ready is None or self._ready[0] != scores.shape:
            # The input stays the same, so it is looked over once.
            ids, counts = _in_vocabulary(_for_rows(self.encoder_input_ids, scores), scores)
            self._ready = (tuple(scores.shape), ids, None if bool(counts.all()) else counts)
        return _penalise(self._ready[1], scores, self.penalty, self._ready[2])


def _in_vocabulary(ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids that can index the scores, and which of them are what they were."""
    # Ids that the head has no score for: embeddings may be larger than heads.
    return ids.clamp(max=scores.shape[1] - 1), ids < scores.shape[1]


def _penalise(
    ids: torch.Tensor, scores: torch.Tensor, penalty: float, counts: torch.Tensor | None
) -> torch.Tensor:
    """Penalise the tokens of `ids`, [rows, length], at positions that count, [rows, length]; None for all."""
    old = scores.gather(1, ids)
    new = torch.where(old < 0, old * penalty, old / penalty)
    if counts is None:
        return scores.scatter(1, ids, new)
    # A token may stand at several positions: the penalised score is the lesser (a lifted one the greater).
    new = torch.where(counts, new, old)
    return scores.scatter_reduce(1, ids, new, "amin" if penalty >= 1 else "amax")


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """No sequence of `ngram_size` tokens twice, prompt included.

    Args:
        ngram_size: Length of what may not come twice.
    """

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = _count("ngram_size", ngram_size, 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, without tokens that would complete an n-gram again."""
        return _ban_ngrams(input_ids, input_ids, scores, self.ngram_size)


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """No sequence of `encoder_ngram_size` tokens that is in the encoder's input.

    Args:
        encoder_ngram_size: Length of what may not be repeated.
        encoder_input_ids: [batch, length].
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: torch.Tensor) -> None:
        self.ngram_size = _count("encoder_ngram_size", encoder_ngram_size, 1)
        ids = encoder_input_ids
        self.encoder_input_ids = ids[None] if ids.dim() == 1 else ids
        self._after: list[dict[tuple[int, ...], list[int]]] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, without tokens that would complete an n-gram of the input."""
        if not scores.is_cpu:
            # Reading ids back would make the host wait for the device.
            return _ban_ngrams(_for_rows(self.encoder_input_ids, scores), input_ids, scores, self.ngram_size)
        if self._after is None:
            self._after = [
                _followers(row, self.ngram_size, scores.shape[1]) for row in self.encoder_input_ids
            ]
        known = self.ngram_size - 1
        if input_ids.shape[1] < known:
            return scores
        each = scores.shape[0] // len(self._after)
        ends = input_ids[:, input_ids.shape[1] - known :].tolist()
        bans = [self._after[row // each].get(tuple(end), ()) for row, end in enumerate(ends)]
        if not any(bans):
            return scores
        scores = scores.clone()
        for row, banned in enumerate(bans):
            if banned:
                scores[row, banned] = -math.inf
        return scores


def _followers(ids: torch.Tensor, size: int, vocab: int) -> dict[tuple[int, ...], list[int]]:
    """Return which tokens below `vocab` follow each sequence of ``size - 1`` tokens."""
    after: dict[tuple[int, ...], list[int]] = {}
    for ngram in zip(*(ids.tolist()[at:] for at in range(size)), strict=False):
        if ngram[-1] < vocab:
            after.setdefault(ngram[:-1], []).append(ngram[-1])
    return after


def _ban_ngrams(source: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, size: int) -> torch.Tensor:
    """Ban tokens with which the end of `ids` would become an n-gram of `source`."""
    count, known = source.shape[1] - size + 1, size - 1
    if count < 1 or ids.shape[1] < known:
        return scores
    last, vocab = source[:, known:], scores.shape[1]
    # At which places of the source the end of the ids stands: [rows, n-grams].
    again = last < vocab
    for at in range(known):
        again = again & (source[:, at : at + count] == ids[:, at - known, None])
    # The least of a score and infinity is the score.
    ban = torch.where(again, -math.inf, math.inf).to(scores.dtype)
    return scores.scatter_reduce(1, last.clamp(max=vocab - 1), ban, "amin")


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a bias to tokens that would complete given sequences.

    Args:
        sequence_bias: Pairs of token ids and bias, ``{(5, 6): -2.0}`` or ``[[[5, 6], -2.0]]``; the bias
            goes to the last token when the others came right before it.
    """

    def __init__(self, sequence_bias: Bias) -> None:
        pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
        self.sequence_bias = {tuple(int(i) for i in ids): float(bias) for ids, bias in pairs}
        if not self.sequence_bias or any(not ids or min(ids) < 0 for ids in self.sequence_bias):
            raise GenerationError(
                "sequence_bias needs sequences of token ids",
                where="sequence_bias",
                expected="such as {(5, 6): -2.0}",
                found=sequence_bias,
            )
        self._ready: tuple[torch.device, torch.dtype, int] | None = None
        # For each length: the tokens at each place but the last, the last ones, the biases.
        self._groups: list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores with the biases that apply."""
        if self._ready != (scores.device, scores.dtype, scores.shape[1]):
            self._prepare(scores)
        if not self._groups:
            return scores
        scores = scores.clone()
        for beginnings, last, bias in self._groups:
            size = len(beginnings)
            if size > input_ids.shape[1]:
                continue
            applies = bias[None].expand(scores.shape[0], -1)
            for at, tokens in enumerate(beginnings):
                applies = torch.where(input_ids[:, at - size, None] == tokens, applies, 0.0)
            scores.index_add_(1, last, applies)
        return scores

    def _prepare(self, scores: torch.Tensor) -> None:
        vocab = scores.shape[1]
        outside = sorted({i for ids in self.sequence_bias for i in ids if i >= vocab})
        if outside:
            raise GenerationError(
                "Biased tokens are outside the vocabulary",
                where="sequence_bias or bad_words_ids",
                expected=f"ids below {vocab}",
                found=outside,
            )
        # Sequences of the same length are looked for together.
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in self.sequence_bias.items():
            by_length.setdefault(len(ids), []).append((ids, bias))
        self._groups = [
            (
                [torch.tensor([ids[at] for ids, _ in group], device=scores.device) for at in range(size - 1)],
                torch.tensor([ids[-1] for ids, _ in group], device=scores.device),
                torch.tensor([bias for _, bias in group], dtype=scores.dtype, device=scores.device),
            )
            for size, group in by_length.items()
        ]
        self._ready = (scores.device, scores.dtype, vocab)


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Never the given sequences of tokens.

    Args:
        bad_words_ids: Token ids of each word.
        eos_token_id: What ends a sequence; a word of just that is left alone.
    """

    def __init__(self, bad_words_ids: Iterable[Sequence[int]], eos_token_id: TokenIds | None = None) -> None:
        ends = [] if eos_token_id is None else token_tensor(eos_token_id).tolist()
        words = [tuple(word) for word in bad_words_ids if not (len(word) == 1 and word[0] in ends)]
        self.sequence_bias = {}
        self._ready, self._groups = None, []
        if words:
            super().__init__({word: -math.inf for word in words})


class HammingDiversityLogitsProcessor(LogitsProcessor):
    """Makes tokens less likely that groups of beams before this one chose at this step.

    Vijayakumar et al. 2016, arXiv:1610.02424.

    Args:
        diversity_penalty: Taken off the score for each beam that chose the token.
        num_beams: Beams of each prompt, all groups together.
        num_beam_groups: Groups.
    """

    def __init__(self, diversity_penalty: float, num_beams: int, num_beam_groups: int) -> None:
        self._penalty = _above_0("diversity_penalty", diversity_penalty)
        self._num_beams = _count("num_beams", num_beams, 2)
        groups = _count("num_beam_groups", num_beam_groups, 2)
        if num_beams % groups:
            raise GenerationError(
                f"num_beams={num_beams} cannot be divided into {groups} groups",
                where="num_beam_groups",
                mend="Let num_beams be a multiple of num_beam_groups.",
            )
        self._size = num_beams // groups

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        current_tokens: torch.Tensor,
        beam_group_idx: int,
    ) -> torch.Tensor:
        """Return the scores of a group, with what others chose made less likely.

        Args:
            input_ids: [prompts * group size, length] tokens so far of this group.
            scores: [prompts * group size, vocab] scores of this group.
            current_tokens: [prompts * num_beams] tokens chosen at this step, by groups before this one.
            beam_group_idx: Which group this is.
        """
        before = beam_group_idx * self._size
        if before == 0:
            return scores
        chosen = current_tokens.view(-1, self._num_beams)[:, :before]
        counts = scores.new_zeros((chosen.shape[0], scores.shape[-1]))
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
        return scores - self._penalty * _for_rows(counts, scores)


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Only tokens that a function of the sequence so far allows (De Cao et al. 2021, arXiv:2010.00904).

    Args:
        prefix_allowed_tokens_fn: Called with ``(row of the batch, token ids [length])``; returns ids.
        num_beams: Rows of scores for each row of the batch.
    """

    def __init__(
        self, prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], Sequence[int]], num_beams: int = 1
    ) -> None:
        self._allowed = prefix_allowed_tokens_fn
        self._num_beams = num_beams

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of what is allowed."""
        mask = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids):
            allowed = self._allowed(row // self._num_beams, ids)
            if len(allowed) == 0:
                raise GenerationError(
                    f"prefix_allowed_tokens_fn allows no token for row {row // self._num_beams}",
                    where="prefix_allowed_tokens_fn",
                    found=f"an empty list at length {len(ids)}",
                    mend="Let it return at least one id, such as the end-of-sequence token.",
                )
            mask[row, torch.as_tensor(allowed, device=scores.device, dtype=torch.int64)] = 0.0
        allowed_scores = scores + mask
        # Where other rules have ruled out all that is allowed, the constraint still stands.
        stuck = allowed_scores.amax(-1).isneginf().view(-1, self._num_beams).all(-1)
        return torch.where(stuck.repeat_interleave(self._num_beams)[:, None], mask, allowed_scores)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """The given token first (after the decoder's start token).

    Args:
        bos_token_id: Which token.
    """

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id
        self._bos = _TokenSet(bos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores; at length 1 only the token is possible."""
        return self._bos.force(scores) if input_ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """The given token (or one of several) last.

    Args:
        max_length: Length of the longest sequence, prompt included.
        eos_token_id: Which token.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(self, max_length: int, eos_token_id: TokenIds, device: Any = None) -> None:
        self.max_length = max_length
        self._eos = _TokenSet(eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores; for the last token only the given ones are possible."""
        return self._eos.force(scores) if input_ids.shape[1] == self.max_length - 1 else scores


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """NaN becomes 0, infinities the largest and smallest number of the dtype."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return finite scores."""
        return torch.nan_to_num(scores, nan=0.0)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Makes the end more likely with every token after a start.

    Args:
        exponential_decay_length_penalty: (start, factor): new tokens before it sets in, and the factor
            that is raised to the number of tokens since.
        eos_token_id: What ends a sequence.
        input_ids_seq_length: Length of the prompt.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: Sequence[float],
        eos_token_id: TokenIds,
        input_ids_seq_length: int,
    ) -> None:
        start, self.regulation_factor = exponential_decay_length_penalty
        self.regulation_start = int(start) + input_ids_seq_length
        self._eos = _TokenSet(eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, with the end lifted by |score| (factor^tokens - 1)."""
        late = input_ids.shape[1] - self.regulation_start
        if late <= 0:
            return scores
        eos = self._eos.index(scores)
        ends = scores[:, eos]
        lift = ends.abs() * (self.regulation_factor**late - 1)
        # An end that other rules made impossible stays so; inf - inf would be NaN.
        return scores.index_add(1, eos, torch.where(ends.isfinite(), lift, 0.0))


class LogitNormalization(LogitsProcessor):
    """Scores become logarithms of probabilities."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities."""
        return scores.log_softmax(dim=-1)


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Never the given tokens.

    Args:
        suppress_tokens: Which tokens.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(self, suppress_tokens: TokenIds, device: Any = None) -> None:
        self._tokens = _TokenSet(suppress_tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores without the tokens."""
        return self._tokens.ban(scores)


class SuppressTokensAtBeginLogitsProcessor(LogitsProcessor):
    """Not the given tokens as the first new one.

    Args:
        begin_suppress_tokens: Which tokens.
        begin_index: Length of the sequence when the first new token comes.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(self, begin_suppress_tokens: TokenIds, begin_index: int, device: Any = None) -> None:
        self._tokens = _TokenSet(begin_suppress_tokens)
        self.begin_index = begin_index

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores; at the beginning without the tokens."""
        return self._tokens.ban(scores) if input_ids.shape[1] == self.begin_index else scores


def _for_rows(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Repeat a batch's ids for the rows (beams, several answers) that continue each of its rows."""
    repeats = scores.shape[0] // ids.shape[0]
    return ids if repeats == 1 else ids.repeat_interleave(repeats, dim=0)


def _count(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise GenerationError(f"{name} cannot be {value!r}", expected=f"{least} or more")
    return value


def _above_0(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise GenerationError(f"{name} cannot be {value!r}", expected="a number above 0")
    return float(value)
