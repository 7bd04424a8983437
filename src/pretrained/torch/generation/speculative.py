# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a draft is checked by the model in one forward, and what is right of it is kept.

The model decides every token itself, so the text is the one that it would write alone: its greedy tokens,
or draws from its own distribution (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023,
arXiv:2302.01318).

A window is the newest token of each row and its draft. Rows accept different numbers of tokens, and yet
stay in one rectangle: the window begins where the slowest row is, and what a faster row has decided
beyond that is its `ahead`, which fills its place in the next windows. So nothing in the caches moves, and
rules and criteria see columns as they do without drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from pretrained.torch.generation.candidates import NO_TOKEN, CandidateGenerator, Draft
from pretrained.torch.generation.stopping import MaxLengthCriteria, StopCheck, StoppingCriteriaList
from pretrained.torch.generation.strategies import Run, draw

Choose = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
"""Takes scores [rows, vocab], drafted tokens [rows] (-1 for none), and [rows, vocab] what they were drawn
from; the latter two None where there are none. Returns (confidence, tokens), [rows] each."""


def speculative(run: Run) -> None:
    """Draft, check, keep; until every row is finished.

    Args:
        run: The call, with `candidates`; its `sequences` and `recorder` are filled.

    Raises:
        GenerationError: scores that are not numbers.
    """
    assert run.candidates is not None
    sequences, window = run.sequences, _Window(run)
    output, draft = run.decoder.prefill(), Draft.empty(sequences.ids)
    run.decoder.open_windows()
    while True:
        drafted = draft.tokens.shape[1]
        taken = window.check(output, draft)
        run.decoder.take_back(drafted + 1 - taken)
        if window.done:
            return
        if drafted:
            run.candidates.update_candidate_strategy(drafted, taken - 1)
        # Lets go of the logits before the next ones come.
        del output
        draft = window.draft(run.candidates)
        newest = sequences.ids[:, -1]
        if draft.tokens.shape[1] or run.decoder.window is not None:
            fed = draft.tokens.clamp(min=0)
            ids = torch.cat([sequences.ids, fed], dim=1)
            output = run.decoder.extend(ids[:, sequences.length - 1 :], ids)
        else:
            output = run.decoder.step(newest, sequences)


class _Window:
    """Checks drafts column by column, and commits the columns that every row is sure of."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = False
        self._rules = StoppingCriteriaList(r for r in run.criteria if not isinstance(r, MaxLengthCriteria))
        rows = run.sequences.ids.shape[0]
        self._check = StopCheck(rows, run.sequences.ids.device)
        self._pad = run.pad_token_id if self._rules and rows > 1 else None
        self._is_open = [True] * rows
        # Tokens that a row has decided beyond the committed ones.
        self._ahead: list[list[int]] = [[] for _ in range(rows)]
        self._choose = _drawer(run.generator) if run.config.do_sample else _best

    def draft(self, candidates: CandidateGenerator) -> Draft:
        """Return the next draft; what rows have decided already is in its place.

        Args:
            candidates: Guesses the rest.
        """
        ids = self.run.sequences.ids
        limit = self.run.max_length - ids.shape[1] - 1
        if limit < 1:
            return Draft.empty(ids)
        width = min(max(map(len, self._ahead)), limit)
        filled = [(row + [NO_TOKEN] * width)[:width] for row in self._ahead]
        known = torch.tensor(filled, dtype=ids.dtype, device=ids.device)
        draft = candidates.get_candidates(ids, known, limit, self._is_open)
        if not width:
            return draft
        more = max(width - draft.tokens.shape[1], 0)
        tokens = torch.nn.functional.pad(draft.tokens, (0, more), value=NO_TOKEN)
        tokens[:, :width] = torch.where(known >= 0, known, tokens[:, :width])
        return Draft(tokens, draft.probs)

    def check(self, output: Any, draft: Draft) -> int:
        """Decide the tokens of a window; commit those that every row is sure of, and return how many.

        Args:
            output: Of the model, with logits for the newest token and every drafted one.
            draft: What was drafted.
        """
        run, drafted = self.run, draft.tokens.shape[1]
        columns = list(output.logits[:, -drafted - 1 :].float().unbind(1))
        if not run.recorder.idle:
            # What is kept must not keep the whole window.
            columns = [column.clone() for column in columns]
        guesses = draft.tokens.t().tolist()
        whole = torch.cat([run.sequences.ids, draft.tokens.clamp(min=0)], 1) if run.processors else None
        start, taken, is_committing = run.sequences.length, 0, True
        # Rows whose window has been right so far.
        right = [True] * len(self._is_open)
        for column, logits in enumerate(columns):
            scores = logits
            if whole is not None:
                scores = run.processors(whole[:, : start + column], run.recorder.keep(logits))
            confidence, chosen = self._choose(scores, *_at(draft, column))
            tokens = self._settle(chosen.tolist(), right, column - taken)
            if is_committing:
                run.recorder.add(_column(output, run, column, drafted), logits, scores)
                self._commit(tokens, confidence)
                taken += 1
            if self.done or column == drafted:
                break
            right = [r and token == g for r, token, g in zip(right, tokens, guesses[column], strict=True)]
            going_on = [is_right for is_right, is_open in zip(right, self._is_open, strict=True) if is_open]
            is_committing = is_committing and all(going_on)
            if not any(going_on):
                break
        return taken

    def _settle(self, tokens: list[int], right: list[bool], place: int) -> list[int]:
        """Return each row's token at a place beyond the committed ones: decided before, or now."""
        for row, ahead in enumerate(self._ahead):
            if place < len(ahead):
                tokens[row] = ahead[place]
            elif right[row] and self._is_open[row]:
                ahead.append(tokens[row])
        return tokens

    def _commit(self, tokens: list[int], confidence: torch.Tensor) -> None:
        """Add a column, tell the streamer, and ask the rules for stopping."""
        run, ids = self.run, self.run.sequences.ids
        if self._pad is not None:
            tokens = [
                token if is_open else self._pad for token, is_open in zip(tokens, self._is_open, strict=True)
            ]
        for row in self._ahead:
            del row[:1]
        column = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
        run.sequences.append(column)
        if run.streamer is not None:
            run.streamer.put(column.cpu())
        finished = self._rules(run.sequences.ids, run.recorder.scores) if self._rules else None
        self.done = self._check(confidence, finished) or run.sequences.length >= run.max_length
        if self._pad is not None:
            self._is_open = self._check.unfinished.tolist()
            self._ahead = [
                row if is_open else [] for row, is_open in zip(self._ahead, self._is_open, strict=True)
            ]


def _best(
    scores: torch.Tensor, guess: torch.Tensor | None, probs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, tokens = scores.max(dim=-1)
    return confidence, tokens


def _drawer(generator: torch.Generator | None) -> Choose:
    """Return a `Choose` that draws, from this source of chance."""

    def choose(
        scores: torch.Tensor, guess: torch.Tensor | None, probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = scores.softmax(-1)
        # A guess that was not drawn is right if the draw says so: then a seed gives the text that it gives
        # without drafts.
        if guess is None or probs is None:
            return draw(own, generator)
        return accept_or_draw(own, guess, probs, generator)

    return choose


def accept_or_draw(
    own: torch.Tensor, guess: torch.Tensor, probs: torch.Tensor, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take each guess with probability min(1, p / q), or draw from what p has more than q.

    Algorithm 1 of Leviathan et al. 2022: the tokens are distributed as p, whatever q is.

    Args:
        own: [rows, vocab] p, the model's probabilities.
        guess: [rows] tokens drawn from q; -1 where there is none, so that the draw is from p.
        probs: [rows, vocab] q.
        generator: Source of chance; None for torch's global one.

    Returns:
        A number that is NaN where p is, and the tokens; [rows] each.
    """
    is_guess = guess >= 0
    index = guess.clamp(min=0)[:, None]
    p, q = own.gather(1, index)[:, 0], probs.gather(1, index)[:, 0]
    chance = torch.rand(p.shape, dtype=p.dtype, device=p.device, generator=generator)
    is_taken = is_guess & (chance * q < p)
    rest = (own - probs).clamp_(min=0)
    # Nothing is left over where rounding alone refused a guess.
    is_whole = ~is_guess | ~(rest.sum(-1) > 0)
    confidence, drawn = draw(torch.where(is_whole[:, None], own, rest), generator)
    return confidence, torch.where(is_taken, guess, drawn)


def _at(draft: Draft, column: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the guesses at a column and what they were drawn from; None for what there is not."""
    if column >= draft.tokens.shape[1]:
        return None, None
    probs = draft.probs
    return draft.tokens[:, column], probs[:, column] if probs is not None and column < probs.shape[
        1
    ] else None


def _column(output: Any, run: Run, column: int, drafted: int) -> Any:
    """Return what an output has to say of one column of its window, as a step of its own would."""
    if not drafted or not run.recorder.layers:
        return output
    later = drafted - column
    found: dict[str, Any] = {}
    for name in run.recorder.layers:
        layers = getattr(output, name, None)
        if layers is None:
            continue
        if "hidden" in name:
            found[name] = tuple(layer[:, column : column + 1] for layer in layers)
        elif "cross" in name:
            found[name] = tuple(layer[:, :, column : column + 1] for layer in layers)
        else:
            found[name] = tuple(
                layer[:, :, column : column + 1, : layer.shape[-1] - later] for layer in layers
            )
    return SimpleNamespace(**found)
