# SPDX-License-Identifier: Apache-2.0
"""Beam search, beam sampling and group beam search: one loop, in which each step picks rows and tokens.

The prompt is run once; then its cache is repeated for the beams. Which beams go on is decided by
`hypotheses`, and with constraints by `constrained`. Shapes: P prompts, K beams of a group, C candidates.
"""

from __future__ import annotations

import numpy as np
import torch

from pretrained.torch.generation.constrained import ConstrainedGroup
from pretrained.torch.generation.hypotheses import BeamGroup, Candidates, Terms, trace
from pretrained.torch.generation.loop import Decoder, Sequences, last_logits
from pretrained.torch.generation.stopping import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopCheck,
    StoppingCriteriaList,
)
from pretrained.torch.generation.strategies import Run


def beam_search(run: Run) -> None:
    """Keep the beams with the highest sums of log-probabilities; or draw them, with `do_sample`.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
    """
    config = run.config
    terms = Terms(config.length_penalty, config.early_stopping, run.lengths.new_tokens)
    _Search(run, [BeamGroup(run.inputs.rows, config.num_beams, terms, run.sequences.ids.device)]).run()


def group_beam_search(run: Run) -> None:
    """Let groups of beams search one after the other, each away from the tokens of those before it.

    Vijayakumar et al. 2016, arXiv:1610.02424, with the Hamming diversity.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
    """
    config = run.config
    terms = Terms(config.length_penalty, config.early_stopping, run.lengths.new_tokens, strict=True)
    size = config.num_beams // config.num_beam_groups
    device = run.sequences.ids.device
    groups = [BeamGroup(run.inputs.rows, size, terms, device) for _ in range(config.num_beam_groups)]
    _Search(run, groups).run()


def constrained_beam_search(run: Run) -> None:
    """Keep beams that make progress with the constraints beside those with the highest sums.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
    """
    config = run.config
    terms = Terms(config.length_penalty, config.early_stopping, run.lengths.new_tokens, strict=True)
    group = ConstrainedGroup(run.sequences.ids, config, terms)
    _Search(run, [group]).run()


class _Search:
    """One call's search: its groups of beams, and the history that its sequences are read from.

    Args:
        run: The call.
        groups: Of beams; each prompt has a row for each beam of each group, in this order.
    """

    def __init__(self, run: Run, groups: list[BeamGroup]) -> None:
        self._run, self._groups = run, groups
        prompt = run.sequences.ids
        prompts, self._device = prompt.shape[0], prompt.device
        self._beams = sum(group.beams for group in groups)
        self._size = groups[0].beams
        self._sequences = Sequences(prompt.repeat_interleave(self._beams, dim=0), run.lengths.new_tokens)
        # First row of each prompt.
        self._first = torch.arange(0, prompts * self._beams, self._beams, device=self._device)[:, None]
        ends = run.config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        # So many that K are left however many of them end.
        self._count = max(2, 1 + len(ends)) * self._size
        self._tokens: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []
        self._check = StopCheck(prompts, self._device, behind=run.behind)
        self._kinship = _Kinship(prompts, self._beams) if self._device.type == "cpu" else None
        rules = [rule for rule in run.criteria if not isinstance(rule, MaxLengthCriteria)]
        self._clocks = StoppingCriteriaList(rule for rule in rules if isinstance(rule, MaxTimeCriteria))
        self._rules = StoppingCriteriaList(rule for rule in rules if not isinstance(rule, MaxTimeCriteria))
        # Rules of this class look at the last token alone, so the sequences need not be put together.
        self._by_token = all(type(rule) is EosTokenCriteria for rule in self._rules)

    def run(self) -> None:
        """Search, and hand the best sequences to the call."""
        run, decoder = self._run, self._run.decoder
        output, repeats = _prefill(decoder, run, self._beams)
        while True:
            logits = last_logits(output)
            if repeats > 1:
                logits = logits.repeat_interleave(repeats, dim=0)
            scores, tokens, rows, over = self._step(logits)
            run.recorder.add(output, logits, scores, repeats)
            self._tokens.append(tokens)
            self._rows.append(rows)
            self._sequences.reorder(rows)
            self._sequences.append(tokens)
            if over:
                break
            # Lets go of the last step's logits before the next ones come.
            del output, logits, scores
            self._reorder(rows)
            output, repeats = decoder.step(tokens, self._sequences), 1
        self._hand_over()

    # -- a step --------------------------------------------------------------------------------

    def _step(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """Return the scores after all rules, tokens and rows that go on, and whether that was the last."""
        run, groups = self._run, self._groups
        length = self._sequences.length - self._sequences.prompt_length + 1
        last = self._sequences.length + 1 >= run.max_length
        last = last or (bool(self._clocks) and bool(self._clocks(self._sequences.ids, None).all()))
        log_probs = logits.log_softmax(-1)
        all_scores: list[torch.Tensor] = []
        tokens: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        confidences: list[torch.Tensor] = []
        closed: list[torch.Tensor | None] = []
        stuck = True
        for index, group in enumerate(groups):
            scores = self._ruled(log_probs, index, tokens)
            found = group.candidates(
                scores.view(-1, group.beams, scores.shape[-1]),
                self._count,
                drawn=run.config.do_sample,
                generator=run.generator,
            )
            done_before = ~group.open if group.terms.strict and group.touched else None
            first = self._first + index * self._size
            of_rows = found.beams + first
            hits = self._hits(found, of_rows, scores)
            stuck = stuck and hits is not None and not run.behind and bool(hits.all())
            if last and not group.terms.strict:
                hits = torch.ones_like(found.tokens, dtype=torch.bool)
            if hits is not None:
                group.finish(found, hits, of_rows, length)
            chosen, beams = group.go_on(found, hits)
            over = group.close(found, length)
            if done_before is not None and run.pad_token_id is not None:
                # As published: a group that is done counts as having chosen padding.
                chosen = torch.where(done_before[:, None], run.pad_token_id, chosen)
            all_scores.append(scores)
            tokens.append(chosen)
            rows.append(beams + first)
            confidences.append(found.confidence)
            closed.append(over)
        done = self._check(_worst(confidences), _all(closed))
        scores = all_scores[0] if len(groups) == 1 else self._interleave(all_scores)
        return scores, torch.cat(tokens, 1).flatten(), torch.cat(rows, 1).flatten(), done or last or stuck

    def _ruled(self, log_probs: torch.Tensor, index: int, chosen: list[torch.Tensor]) -> torch.Tensor:
        """Return a group's scores after all rules, [P * K, V]."""
        processors, ids = self._run.processors, self._sequences.ids
        if len(self._groups) == 1:
            return processors(ids, log_probs) if processors else log_probs
        log_probs, ids = (self._of_group(x, index) for x in (log_probs, ids))
        blank = ids.new_zeros((self._first.shape[0], self._beams - index * self._size))
        current = torch.cat([*chosen, blank], dim=1).flatten()
        return processors(ids, log_probs, current_tokens=current, beam_group_idx=index)

    def _of_group(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        by_group = rows.view(-1, len(self._groups), self._size, rows.shape[-1])
        return by_group[:, index].reshape(-1, rows.shape[-1])

    def _interleave(self, scores: list[torch.Tensor]) -> torch.Tensor:
        vocab = scores[0].shape[-1]
        return torch.stack([x.view(-1, self._size, vocab) for x in scores], dim=1).view(-1, vocab)

    def _hits(self, found: Candidates, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """Return which candidates end, [P, C]; None where the host knows that none does."""
        if not self._rules:
            return None
        ids, known = found.tokens.reshape(-1, 1), None
        if not self._by_token:
            ids = torch.cat([self._sequences.ids.index_select(0, rows.flatten()), ids], dim=1)
            # Rules of the user's may look at all scores, this step's included.
            known = self._run.recorder.scores
            known = known if known is None else (*known, scores)
        hits = self._rules(ids, known).view_as(found.tokens)
        # Reading one number is cheap on a CPU, and most steps end nothing.
        if hits.device.type == "cpu" and not self._run.behind and not bool(hits.any()):
            return None
        return hits

    def _reorder(self, rows: torch.Tensor) -> None:
        """Bring the decoder's cache into the order of the beams that go on."""
        if self._kinship is None:
            self._run.decoder.reorder(rows)
            return
        changed, newest = self._kinship.follow(rows)
        if newest:
            index = torch.from_numpy(changed)
            self._run.decoder.copy_rows(index, rows[index], newest)

    # -- the end -------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        run, groups = self._run, self._groups
        steps = self._check.steps
        needed = self._check.finish()
        run.decoder.take_back(steps - needed)
        run.recorder.cut(needed)
        for index, group in enumerate(groups):
            if group.terms.strict:
                self._finish_running(group, index)
        wanted = run.config.num_return_sequences
        order = torch.cat([group.ranks() for group in groups], dim=1).topk(wanted)[1]
        scores = torch.cat([group.scores for group in groups], dim=1).gather(1, order)
        ends = torch.cat([group.ends for group in groups], dim=1)
        ends = ends.gather(1, order[..., None].expand(-1, -1, 3)).flatten(0, 1)
        tokens, rows = trace(ends, self._tokens, self._rows)
        pad = -1 if run.pad_token_id is None else run.pad_token_id
        prompts = run.sequences.ids.repeat_interleave(wanted, dim=0)
        run.sequences = Sequences(torch.cat([prompts, torch.where(rows < 0, pad, tokens)], dim=1), 0)
        run.recorder.add_beams(scores.flatten(), rows)

    def _finish_running(self, group: BeamGroup, index: int) -> None:
        """Let the beams that are still running compete with the sequences that ended."""
        length = len(self._tokens)
        size = group.beams
        places = (self._first + index * size + torch.arange(size, device=self._device)).flatten()
        tokens, rows = (x[places].view(-1, size) for x in (self._tokens[-1], self._rows[-1]))
        found = Candidates(group.sums, tokens, rows, group.sums[:, 0])
        group.finish_running(found, rows, length)


class _Kinship:
    """Knows on the host how far back any two beams of a prompt are the same.

    Args:
        prompts: How many.
        beams: Of each.
    """

    def __init__(self, prompts: int, beams: int) -> None:
        self._own = np.arange(prompts * beams)
        self._prompts = np.arange(prompts)[:, None, None]
        # [prompt, beam, beam] how many of the newest tokens may differ.
        self._apart = np.zeros((prompts, beams, beams), dtype=np.int64)
        self._differ = 1 - np.eye(beams, dtype=np.int64)

    def follow(self, rows: torch.Tensor) -> tuple[np.ndarray, int]:
        """Return the rows that change, and in how many of their newest tokens.

        Args:
            rows: [rows] row that each goes on from.
        """
        beams = self._apart.shape[1]
        taken = rows.numpy()
        changed = np.flatnonzero(taken != self._own)
        newest = 0
        if len(changed):
            newest = int(self._apart[changed // beams, changed % beams, taken[changed] % beams].max())
        local = (taken % beams).reshape(-1, beams)
        apart = self._apart[self._prompts, local[:, :, None], local[:, None, :]]
        self._apart = (apart + 1) * self._differ
        return changed, newest


def _prefill(decoder: Decoder, run: Run, beams: int) -> tuple[object, int]:
    """Run the prompts; return the output, and how many beams go on from each of its rows."""
    cache = run.inputs.cache
    if cache is not None and cache.batch_size == run.inputs.rows * beams:
        decoder.spread(beams)
        return decoder.prefill(), 1
    output = decoder.prefill()
    decoder.spread(beams)
    return output, beams


def _worst(confidences: list[torch.Tensor]) -> torch.Tensor:
    # A maximum keeps NaN.
    return confidences[0] if len(confidences) == 1 else torch.stack(confidences).amax(0)


def _all(closed: list[torch.Tensor | None]) -> torch.Tensor | None:
    known = [one for one in closed if one is not None]
    if len(known) < len(closed):
        return None
    return known[0] if len(known) == 1 else torch.stack(known).all(0)
