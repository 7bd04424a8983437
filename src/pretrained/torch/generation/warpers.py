# SPDX-License-Identifier: Apache-2.0
"""Filters for sampling: they sharpen or flatten the scores, or leave only the likelier tokens.

Each is called with ``(input_ids [rows, length], scores [rows, vocab])`` and returns new scores in which
what was filtered out is `filter_value`. Names and arguments are the ecosystem's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import LogitsProcessor

_LEAST = 2048
"""Smaller vocabularies are sorted at once."""


class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the scores: below 1 sharper, above 1 flatter.

    Args:
        temperature: Above 0.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = _within("temperature", temperature, "a number above 0", lambda t: t > 0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores over the temperature."""
        return scores / self.temperature


class _Filter(LogitsProcessor):
    """A filter that always leaves some tokens.

    Args:
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many of the likeliest tokens stay whatever the rule says.
    """

    def __init__(self, filter_value: float, min_tokens_to_keep: int) -> None:
        self.filter_value = filter_value
        self.min_tokens_to_keep = int(
            _within("min_tokens_to_keep", min_tokens_to_keep, "1 or more", lambda n: n >= 1)
        )

    def _keep_best(self, drop: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take the likeliest tokens, and those that score the same, out of what is dropped."""
        count = min(self.min_tokens_to_keep, scores.shape[-1])
        least = scores.amax(-1, keepdim=True) if count == 1 else scores.topk(count).values[..., -1:]
        return drop & (scores < least)


class TopKLogitsWarper(_Filter):
    """Only the `top_k` likeliest tokens.

    Args:
        top_k: How many; tokens that score the same as the last of them stay too.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many stay at least.
    """

    def __init__(self, top_k: int, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        top_k = int(_within("top_k", top_k, "1 or more", lambda k: k >= 1))
        self.top_k = max(top_k, self.min_tokens_to_keep)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the likeliest tokens."""
        least = scores.topk(min(self.top_k, scores.shape[-1])).values[..., -1:]
        return torch.where(scores < least, self.filter_value, scores)


class TopPLogitsWarper(_Filter):
    """Only the likeliest tokens that together have probability `top_p` (nucleus, arXiv:1904.09751).

    Args:
        top_p: Above 0, up to 1.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many stay at least.
    """

    def __init__(self, top_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = _within("top_p", top_p, "a number above 0 and up to 1", lambda p: 0 < p <= 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the nucleus."""
        probs = scores.softmax(-1)
        count = _count_likely(probs, 1 - self.top_p, self.min_tokens_to_keep)
        if count is None:
            return self._of_all(scores)
        best, index = probs.topk(count)
        others = 1 - best.sum(-1, keepdim=True, dtype=torch.float64)
        # Of each token and all that are less likely.
        mass = others + best.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1)
        keep = mass > 1 - self.top_p
        keep[..., : self.min_tokens_to_keep] = True
        return torch.where(_all_but(keep, index, scores), self.filter_value, scores)

    def _of_all(self, scores: torch.Tensor) -> torch.Tensor:
        # Summed from the least likely up, where float32 sums lose least.
        ascending, order = scores.sort(dim=-1)
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
        drop[..., -self.min_tokens_to_keep :] = False
        return torch.where(drop.scatter(-1, order, drop), self.filter_value, scores)


class TopHLogitsWarper(LogitsProcessor):
    """Only the likeliest tokens whose entropy adds up to a share of the whole (arXiv:2509.02510).

    Args:
        top_h: Share of the entropy, above 0, up to 1.
        filter_value: Score of what is filtered out.
    """

    top_n = 100
    """Only so many tokens are looked at; the published rule's bound."""

    def __init__(self, top_h: float, filter_value: float = -math.inf) -> None:
        self.top_h = _within("top_h", top_h, "a number above 0 and up to 1", lambda h: 0 < h <= 1)
        self.filter_value = filter_value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the tokens that stay."""
        best, index = scores.topk(min(self.top_n, scores.shape[-1]))
        probs = best.softmax(-1)
        terms = torch.special.entr(probs)
        keep = (terms.cumsum(-1) <= self.top_h * terms.sum(-1, keepdim=True)) & (probs > 0)
        keep[..., 0] = True
        return torch.where(_all_but(keep, index, scores), self.filter_value, scores)


class MinPLogitsWarper(_Filter):
    """Only tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082).

    Args:
        min_p: From 0 to 1.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many stay at least.
    """

    def __init__(self, min_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = _within("min_p", min_p, "a number from 0 to 1", lambda p: 0 <= p <= 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the tokens that stay."""
        probs = scores.softmax(-1)
        drop = probs < self.min_p * probs.amax(-1, keepdim=True)
        if self.min_tokens_to_keep > 1:
            # Exactly so many, ties or not; one always stays, as min_p is no more than 1.
            best = probs.topk(min(self.min_tokens_to_keep, probs.shape[-1])).indices
            drop.scatter_(-1, best, False)
        return torch.where(drop, self.filter_value, scores)


class TypicalLogitsWarper(_Filter):
    """Tokens whose surprise is nearest to what is expected, up to a mass (arXiv:2202.00666).

    Args:
        mass: Between 0 and 1: probability that the tokens that stay have together.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many of the most typical tokens stay at least.
    """

    def __init__(
        self, mass: float = 0.9, filter_value: float = -math.inf, min_tokens_to_keep: int = 1
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = _within("typical_p", mass, "a number between 0 and 1", lambda p: 0 < p < 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the typical tokens."""
        log_probs, probs = scores.log_softmax(-1), scores.softmax(-1)
        entropy = torch.special.entr(log_probs.exp()).sum(-1, keepdim=True)
        distance = (-log_probs - entropy).abs()
        count = _count_likely(probs, 1 - self.mass, self.min_tokens_to_keep)
        if count is not None and float(entropy.max()) > _surprise(probs, 1 - self.mass) / 2:
            # Tokens that were not counted could be nearer to the entropy than some that were.
            count = None
        if count is None:
            nearest, order = distance.sort(dim=-1)
        else:
            nearest, order = distance.topk(count, largest=False)
        before = probs.gather(-1, order).cumsum(-1) < self.mass
        last = before.sum(-1, keepdim=True).clamp_(max=nearest.shape[-1] - 1)
        drop = distance > nearest.gather(-1, last)
        drop.scatter_(-1, order[..., : self.min_tokens_to_keep], False)
        return torch.where(drop, self.filter_value, scores)


class EpsilonLogitsWarper(_Filter):
    """Only tokens at least as likely as `epsilon` (arXiv:2210.15191).

    Args:
        epsilon: Between 0 and 1.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many stay at least.
    """

    def __init__(self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _within("epsilon_cutoff", epsilon, "a number between 0 and 1", lambda e: 0 < e < 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the tokens that stay."""
        drop = scores.softmax(-1) < self.epsilon
        return torch.where(self._keep_best(drop, scores), self.filter_value, scores)


class EtaLogitsWarper(_Filter):
    """Only tokens likelier than a bound that falls as the entropy grows (arXiv:2210.15191).

    The bound is min(epsilon, sqrt(epsilon) exp(-entropy)).

    Args:
        epsilon: Between 0 and 1.
        filter_value: Score of what is filtered out.
        min_tokens_to_keep: How many stay at least.
        device: Accepted for compatibility; the rule follows the scores.
    """

    def __init__(
        self,
        epsilon: float,
        filter_value: float = -math.inf,
        min_tokens_to_keep: int = 1,
        device: object = None,
    ) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _within("eta_cutoff", epsilon, "a number between 0 and 1", lambda e: 0 < e < 1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores of the tokens that stay."""
        probs = scores.softmax(-1)
        entropy = torch.special.entr(probs).sum(-1, keepdim=True)
        bound = (math.sqrt(self.epsilon) * torch.exp(-entropy)).clamp_(max=self.epsilon)
        return torch.where(self._keep_best(probs < bound, scores), self.filter_value, scores)


def _count_likely(probs: torch.Tensor, rest: float, keep: int) -> int | None:
    """Return among how many of the likeliest tokens a filter finds all that it leaves, or None for all.

    Sorting a whole vocabulary costs milliseconds. Tokens with less than ``rest / vocab`` add up to less
    than `rest` together, so a filter that leaves all but a share of `rest` leaves none of them.

    Args:
        probs: [rows, vocab] probabilities.
        rest: Share of probability that may be dropped.
        keep: How many tokens stay at least.
    """
    vocab = probs.shape[-1]
    # Asking a device for the number would make the host wait.
    if not probs.is_cpu or vocab < _LEAST or rest <= 0:
        return None
    likely = (probs >= rest / vocab).sum(-1)
    count = max(int(likely.max()), keep)
    return count if count <= vocab // 2 else None


def _surprise(probs: torch.Tensor, rest: float) -> float:
    """Return minus the logarithm of the bound in `_count_likely`."""
    return math.log(probs.shape[-1] / rest)


def _all_but(keep: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return [rows, vocab], False at the indices that are to be kept."""
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, index, ~keep)


def _within(name: str, value: float, expected: str, right: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not right(value):
        raise GenerationError(f"{name} cannot be {value!r}", expected=expected)
    return value
