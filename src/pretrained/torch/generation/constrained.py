# SPDX-License-Identifier: Apache-2.0
"""The beams of a constrained search: some go on for their scores, some for their progress.

Candidates are sorted into banks by how far they have come with the constraints, and the beams that run on
are dealt from the banks in turn (Post and Vilar 2018, arXiv:1804.06609). Constraints are Python objects, so
this room looks at each beam on the host; the scores stay tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from pretrained.core.constraints import ConstraintListState, constraints_of
from pretrained.core.generation_config import GenerationConfig
from pretrained.torch.generation.hypotheses import EMPTY, BeamGroup, Candidates, Terms

logger = logging.getLogger("pretrained.generation")

# A token of progress outweighs any score.
_BANK_WEIGHT = 100.0


@dataclass(slots=True)
class _Beam:
    """One beam's progress; beams of equal tokens have the same name."""

    state: ConstraintListState
    name: int


@dataclass(slots=True)
class _Step:
    """A way for a beam to go on."""

    beam: int
    token: int
    total: float
    state: ConstraintListState
    name: tuple[int, int]


class ConstrainedGroup(BeamGroup):
    """Beams that have to fulfil constraints before they may end.

    Args:
        prompt: [P, length] ids to begin with; a phrase that is in them counts.
        config: The settled config.
        terms: How sequences compare.
    """

    def __init__(self, prompt: torch.Tensor, config: GenerationConfig, terms: Terms) -> None:
        super().__init__(prompt.shape[0], config.num_beams, terms, prompt.device)
        self._wanted = config.num_return_sequences
        constraints = constraints_of(config)
        self._running: list[list[_Beam]] = []
        for ids in prompt.tolist():
            state = ConstraintListState(constraints)
            state.reset(ids)
            self._running.append([_Beam(state, 0)] * self.beams)
        self._sums: torch.Tensor = self.sums
        self._ranks: torch.Tensor | None = None

    def candidates(
        self, scores: torch.Tensor, count: int, *, drawn: bool, generator: torch.Generator | None = None
    ) -> Candidates:
        """Return the best continuations, and keep all for the constraints' tokens."""
        self._sums = scores + self.sums[:, :, None]
        return super().candidates(scores, count, drawn=drawn, generator=generator)

    def finish(self, found: Candidates, hits: torch.Tensor, rows: torch.Tensor, length: int) -> None:
        """End candidates whose constraints are fulfilled; others that would end are dropped."""
        super().finish(found, hits & self._fulfilled().gather(1, found.beams), rows, length)

    def go_on(self, found: Candidates, hits: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the K beams that run on, from all banks."""
        tokens, beams = super().go_on(found, hits)
        steps = [
            self._steps(running, *lists)
            for running, *lists in zip(
                self._running, tokens.tolist(), beams.tolist(), self.sums.tolist(), strict=True
            )
        ]
        self._read_sums(steps)
        chosen = [_deal(of_prompt, self.beams) for of_prompt in steps]
        self._running = [self._named(of_prompt) for of_prompt in chosen]
        device = tokens.device
        tokens = torch.tensor([[step.token for step in row] for row in chosen], device=device)
        beams = torch.tensor([[step.beam for step in row] for row in chosen], device=device)
        # Read again rather than from the host's numbers, so that no bit is lost.
        flat = beams * self._sums.shape[-1] + tokens
        self.sums = self._sums.flatten(1).gather(1, flat)
        return tokens, beams

    def finish_running(self, found: Candidates, rows: torch.Tensor, length: int) -> None:
        """End the running beams whose constraints are fulfilled; others only where too few are left."""
        fulfilled = self._fulfilled()
        BeamGroup.finish(self, found, fulfilled, rows, length)
        missing = self.ended.sum(-1) < self._wanted
        lacking = ~fulfilled & (self.open & missing)[:, None]
        if bool(missing.any()):
            logger.warning(
                "Not all sequences fulfil the constraints: there was no room, or no way to. "
                "Raise max_new_tokens or num_beams."
            )
        # In float64, where so low a number leaves room for the scores' order.
        nothing = torch.full_like(self.scores, 3 * EMPTY, dtype=torch.float64)
        totals = self.terms.score(found.sums, length)
        ranks = torch.cat(
            [
                torch.where(self.ended, self.scores.double(), nothing),
                torch.where(lacking, totals.double() + EMPTY, nothing),
            ],
            dim=1,
        )
        ends = torch.stack([torch.full_like(rows, length), rows, found.tokens], dim=-1)
        self._ranks, order = ranks.topk(self.beams)
        self.scores = torch.cat([self.scores, totals], dim=1).gather(1, order)
        self.ends = torch.cat([self.ends, ends], dim=1).gather(1, order[..., None].expand(-1, -1, 3))

    def ranks(self) -> torch.Tensor:
        """Return by what the sequences are ordered, [P, K]: fulfilled ones first."""
        return self.scores if self._ranks is None else self._ranks

    def _fulfilled(self) -> torch.Tensor:
        rows = [[beam.state.completed for beam in running] for running in self._running]
        return torch.tensor(rows, device=self.sums.device)

    def _steps(
        self, running: list[_Beam], tokens: list[int], beams: list[int], sums: list[float]
    ) -> list[_Step]:
        """Return a prompt's K best steps, and then those that bring a beam on with its constraints."""
        steps, seen = [], set()
        for token, beam, total in zip(tokens, beams, sums, strict=True):
            state = running[beam].state
            if not state.completed:
                state = state.copy()
                state.add(token)
            name = (running[beam].name, token)
            seen.add(name)
            steps.append(_Step(beam, token, total, state, name))
        for index, begun in enumerate(running):
            for token in () if begun.state.completed else begun.state.advance() or ():
                name = (begun.name, token)
                if name not in seen:
                    seen.add(name)
                    state = begun.state.copy()
                    state.add(token)
                    steps.append(_Step(index, token, 0.0, state, name))
        return steps

    def _read_sums(self, steps: list[list[_Step]]) -> None:
        """Fill in the sums of the constraints' steps, in one look at the device."""
        asked = [(row, step) for row, of_prompt in enumerate(steps) for step in of_prompt[self.beams :]]
        if not asked:
            return
        index = torch.tensor([(row, step.beam, step.token) for row, step in asked], device=self._sums.device)
        for (_, step), total in zip(asked, self._sums[tuple(index.t())].tolist(), strict=True):
            step.total = total

    @staticmethod
    def _named(steps: list[_Step]) -> list[_Beam]:
        names: dict[tuple[int, int], int] = {}
        return [_Beam(step.state, names.setdefault(step.name, len(names))) for step in steps]


def _deal(steps: list[_Step], beams: int) -> list[_Step]:
    """Choose the steps that are taken: the best of each bank, then the second best, and so on."""
    if len(steps) == beams:
        return steps
    banks = [step.state.get_bank() for step in steps]
    order = sorted(range(len(steps)), key=lambda i: -(banks[i] * _BANK_WEIGHT + steps[i].total))
    rank: dict[int, int] = {}
    place: dict[int, int] = {}
    bank = None
    for i in order:
        # Counted within a run of one bank: a score below -100 lets a bank come again.
        rank[banks[i]] = rank[banks[i]] + 1 if banks[i] == bank else 0
        place[i], bank = rank[banks[i]], banks[i]
    return [steps[i] for i in sorted(order, key=place.__getitem__)[:beams]]
