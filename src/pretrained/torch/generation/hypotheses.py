# SPDX-License-Identifier: Apache-2.0
"""The state of a beam search: the beams that run, and the best sequences that have ended.

Shapes: P prompts, K beams of a group, C candidates of a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

EMPTY = -1.0e9
"""Score of what is not there: of a place that no sequence has taken, of a beam that must not be chosen."""

_CHUNK = 128


@dataclass(frozen=True, slots=True)
class Terms:
    """How sequences of different lengths compare, and when a prompt's search is over.

    Attributes:
        length_penalty: The sum of scores is divided by the length to this power.
        early_stopping: True to stop with the first K ended sequences; False to stop where no running beam
            beats them at its present length; "never" where none could at any length.
        max_new: How many tokens a sequence may have.
        strict: Whether an ended candidate counts too when it is asked what a running beam can reach: so
            group and constrained search were published.
    """

    length_penalty: float
    early_stopping: bool | str
    max_new: int
    strict: bool = False

    def score(self, sums: torch.Tensor, length: int) -> torch.Tensor:
        """Return the scores of sequences.

        Args:
            sums: Of the log-probabilities of their tokens.
            length: New tokens.
        """
        return sums / float(length**self.length_penalty)

    def reach(self, best: torch.Tensor, length: int) -> torch.Tensor:
        """Return the best score that a sum of log-probabilities is taken to lead to.

        Args:
            best: Sums.
            length: New tokens so far.
        """
        hopeful = self.early_stopping == "never" and self.length_penalty > 0
        return self.score(best, self.max_new if hopeful else length)


@dataclass(slots=True)
class Candidates:
    """The best continuations of a step.

    Attributes:
        sums: [P, C] log-probabilities of the sequences; falling, unless they were drawn.
        tokens: [P, C] the tokens.
        beams: [P, C] which of the K beams each continues.
        confidence: [P] NaN where the scores of a prompt hold NaN.
    """

    sums: torch.Tensor
    tokens: torch.Tensor
    beams: torch.Tensor
    confidence: torch.Tensor


class BeamGroup:
    """The beams of every prompt that compete with one another.

    Args:
        prompts: How many.
        beams: K.
        terms: How sequences compare.
        device: Where.
    """

    def __init__(self, prompts: int, beams: int, terms: Terms, device: torch.device) -> None:
        self.beams, self.terms = beams, terms
        # All beams begin as the same prompt; only the first may be continued at first.
        self.sums = torch.zeros((prompts, beams), device=device)
        self.sums[:, 1:] = EMPTY
        self.scores = torch.full((prompts, beams), EMPTY, device=device)
        self.ended = torch.zeros((prompts, beams), dtype=torch.bool, device=device)
        # Of each ended sequence: its new tokens, the row that its last one continues, and that token.
        self.ends = torch.zeros((prompts, beams, 3), dtype=torch.int64, device=device)
        self.open = torch.ones(prompts, dtype=torch.bool, device=device)
        self.touched = False
        self._drawn = False

    def candidates(
        self, scores: torch.Tensor, count: int, *, drawn: bool, generator: torch.Generator | None = None
    ) -> Candidates:
        """Return the best continuations, or ones drawn without replacement.

        Args:
            scores: [P, K, V] log-probabilities.
            count: C.
            drawn: Whether to draw them.
            generator: Source of chance; None for torch's global one.
        """
        sums = (scores + self.sums[:, :, None]).flatten(1)
        self._drawn = drawn
        if drawn:
            probs = sums.softmax(-1)
            # The largest of p over a unit exponential: as multinomial draws, without its looks at the host.
            ratios = probs / torch.empty_like(probs).exponential_(1.0, generator=generator)
            ratios, places = ratios.topk(count)
            best, confidence = sums.gather(1, places), ratios[:, 0]
        else:
            best, places = top(sums, count)
            confidence = best[:, 0]
        vocab = scores.shape[-1]
        beams = places.div(vocab, rounding_mode="floor")
        return Candidates(best, places - beams * vocab, beams, confidence)

    def finish(self, found: Candidates, hits: torch.Tensor, rows: torch.Tensor, length: int) -> None:
        """Put the candidates that end among the best K sequences, where they belong there.

        Only the first K may: the others are there so that K are left to go on.

        Args:
            found: Of this step.
            hits: [P, C] which of them end.
            rows: [P, C] row that each continues, among all rows.
            length: New tokens with this one.
        """
        hits = hits[:, : self.beams] & self.open[:, None]
        sums, tokens, rows = (x[:, : self.beams] for x in (found.sums, found.tokens, rows))
        new = torch.where(hits, self.terms.score(sums, length), EMPTY)
        ends = torch.stack([torch.full_like(tokens, length), rows, tokens], dim=-1)
        self.scores, order = torch.cat([self.scores, new], dim=1).topk(self.beams)
        self.ended = torch.cat([self.ended, hits], dim=1).gather(1, order)
        self.ends = torch.cat([self.ends, ends], dim=1).gather(1, order[..., None].expand(-1, -1, 3))
        self.touched = True

    def go_on(self, found: Candidates, hits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the K beams that run on; return their tokens and the beams they continue, [P, K] each.

        Args:
            found: Of this step.
            hits: [P, C] which candidates end; None for none of them.
        """
        sums, tokens, beams = found.sums, found.tokens, found.beams
        if hits is not None:
            sums = torch.where(hits, sums + EMPTY, sums)
        elif not self._drawn:
            # The candidates are in order already.
            self.sums = sums[:, : self.beams]
            return tokens[:, : self.beams], beams[:, : self.beams]
        self.sums, order = sums.topk(self.beams)
        return tokens.gather(1, order), beams.gather(1, order)

    def finish_running(self, found: Candidates, rows: torch.Tensor, length: int) -> None:
        """Let the running beams of prompts that are still open compete, at the end of the search.

        Args:
            found: The K beams, by their last tokens.
            rows: [P, K] row that each continues, among all rows.
            length: New tokens.
        """
        self.finish(found, torch.ones_like(rows, dtype=torch.bool), rows, length)

    def ranks(self) -> torch.Tensor:
        """Return by what the sequences are ordered, [P, K], the highest first."""
        return self.scores

    def close(self, found: Candidates, length: int) -> torch.Tensor | None:
        """Close the prompts that are done; return which are, [P], or None where none can be yet.

        Args:
            found: Of this step.
            length: New tokens with this one.
        """
        if not self.touched:
            return None
        full = self.ended.all(-1)
        if self.terms.early_stopping is not True:
            best = found.sums.amax(-1) if self.terms.strict else self.sums[:, 0]
            full &= self.terms.reach(best, length) <= self.scores.amin(-1)
        self.open = self.open & ~full
        return ~self.open


def top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``scores.topk(count)`` does; of equal scores it may choose others.

    On a CPU topk of a hundred thousand numbers costs ten times as much as their maximum, so the chunks
    with the highest maxima are found first: none of the best is outside of them.

    Args:
        scores: [rows, places].
        count: How many.
    """
    rows, places = scores.shape
    chunks = places // _CHUNK
    if scores.device.type != "cpu" or chunks < 4 * count:
        return scores.topk(count)
    whole = chunks * _CHUNK
    chosen = scores[:, :whole].view(rows, chunks, _CHUNK).amax(-1).topk(count)[1]
    index = (chosen[:, :, None] * _CHUNK + torch.arange(_CHUNK)).flatten(1)
    if whole < places:
        index = torch.cat([index, torch.arange(whole, places).expand(rows, -1)], dim=1)
    best, order = scores.gather(1, index).topk(count)
    return best, index.gather(1, order)


def trace(
    ends: torch.Tensor, tokens: list[torch.Tensor], rows: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow sequences back to the prompt.

    Args:
        ends: [N, 3] new tokens, row that the last one continues, last token.
        tokens: For each step, [rows] token of each running row.
        rows: For each step, [rows] row of the step before that each continues.

    Returns:
        Tokens, and the rows they came from, [N, longest] each; -1 after a sequence's end.
    """
    lengths, row, last = ends.unbind(-1)
    longest = int(lengths.max())
    found_tokens = ends.new_full((longest, ends.shape[0]), -1)
    found_rows = ends.new_full((longest, ends.shape[0]), -1)
    for step in range(longest - 1, -1, -1):
        final = lengths == step + 1
        found_tokens[step] = torch.where(final, last, found_tokens[step])
        found_rows[step] = torch.where(final, row, found_rows[step])
        if step < len(tokens):
            inside = lengths > step + 1
            found_tokens[step] = torch.where(inside, tokens[step][row], found_tokens[step])
            row = torch.where(inside, rows[step][row], row)
            found_rows[step] = torch.where(inside, row, found_rows[step])
    return found_tokens.t().contiguous(), found_rows.t().contiguous()
