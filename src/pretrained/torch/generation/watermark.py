# SPDX-License-Identifier: Apache-2.0
"""Watermarks: rules that let text tell where it comes from, without showing.

Which tokens are preferred follows from the tokens before and a secret alone, so that whoever knows the
secret can count them later (`pretrained.torch.generation.watermark_detection`). Tables and lists are drawn
with torch's generators as the ecosystem draws them: marks left there are found here and the other way round.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from typing import Any

import torch

from pretrained.core.watermarking import SynthIDTextWatermarkingConfig, WatermarkingConfig
from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import LogitsProcessor

logger = logging.getLogger("pretrained.generation")


class WatermarkLogitsProcessor(LogitsProcessor):
    """Makes "green" tokens likelier (Kirchenbauer et al. 2023, arXiv:2306.04634, algorithms 2 and 3).

    Args:
        vocab_size: Of the model.
        device: Where the lists are drawn; a CUDA device draws others than the CPU.
        greenlist_ratio: Share of the vocabulary that is green, between 0 and 1.
        bias: Added to the scores of green tokens.
        hashing_key: Secret from which the lists follow.
        seeding_scheme: ``"lefthash"``: a list follows from the last token; ``"selfhash"``: from the last
            tokens and the new one, tried for the 40 likeliest.
        context_width: How many tokens that is.
    """

    table_size = 1_000_003
    """Prime size of the table that scatters token ids, as published."""

    _TRIED = 40
    _KEPT_LISTS, _KEPT_VERDICTS = 128, 1 << 16

    def __init__(
        self,
        vocab_size: int,
        device: Any,
        greenlist_ratio: float = 0.25,
        bias: float = 2.0,
        hashing_key: int = 15485863,
        seeding_scheme: str = "lefthash",
        context_width: int = 1,
    ) -> None:
        # The config's checks are this rule's too.
        WatermarkingConfig(greenlist_ratio, bias, hashing_key, seeding_scheme, context_width)
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.greenlist_size = int(vocab_size * greenlist_ratio)
        self.bias = bias
        self.hash_key = hashing_key
        self.seeding_scheme = seeding_scheme
        self.context_width = context_width
        self.rng = torch.Generator(device=self.device)
        self._lists: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._verdicts: dict[tuple[int, int], bool] = {}
        self._warned = False

    @functools.cached_property
    def fixed_table(self) -> torch.Tensor:
        """[table_size] a random order of numbers that follows from the secret."""
        rng = torch.Generator(device=self.device).manual_seed(self.hash_key)
        return torch.randperm(self.table_size, generator=rng, device=self.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores with the green tokens lifted."""
        if input_ids.shape[1] < self.context_width:
            if not self._warned:
                logger.warning("No watermark until there are context_width=%d tokens.", self.context_width)
            self._warned = True
            return scores
        if self.seeding_scheme == "selfhash":
            green = self._green_candidates(input_ids, scores)
        else:
            lists = [self.green_tokens(seed) for seed in self.seeds(input_ids[:, -self.context_width :])]
            green = lists[0][None] if len(lists) == 1 else torch.stack(lists)
            green = _as_wide(green, scores)
        return torch.where(green, scores + self.bias, scores)

    def seeds(self, windows: torch.Tensor) -> list[int]:
        """Return the seeds of the lists that follow from windows of tokens.

        Args:
            windows: [windows, context_width] token ids; for ``"selfhash"`` the new token is the last one.
        """
        if self.seeding_scheme == "lefthash":
            return [self.hash_key * last % (2**64 - 1) for last in windows[:, -1].tolist()]
        scattered = self.fixed_table[windows.to(self.device) % self.table_size] + 1
        # In 64 bits that wrap around, as published.
        seeds = (self.hash_key * scattered * scattered[:, -1:]).amin(-1)
        return [seed % (2**64 - 1) for seed in seeds.tolist()]

    def green_tokens(self, seed: int) -> torch.Tensor:
        """Return the list of a seed, as [vocab] booleans.

        Args:
            seed: From `seeds`.
        """
        found = self._lists.get(seed)
        if found is None:
            found = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            found[self._draw(seed)] = True
            self._lists[seed] = found
            if len(self._lists) > self._KEPT_LISTS:
                self._lists.popitem(last=False)
        else:
            self._lists.move_to_end(seed)
        return found

    def is_green(self, seed: int, token: int) -> bool:
        """Whether a token is in the list of a seed.

        Args:
            seed: From `seeds`.
            token: Its id.
        """
        found = self._verdicts.get((seed, token))
        if found is None:
            found = bool((self._draw(seed) == token).any())
            if len(self._verdicts) >= self._KEPT_VERDICTS:
                self._verdicts.clear()
            self._verdicts[seed, token] = found
        return found

    def _draw(self, seed: int) -> torch.Tensor:
        self.rng.manual_seed(seed)
        order = torch.randperm(self.vocab_size, generator=self.rng, device=self.device)
        return order[: self.greenlist_size]

    def _green_candidates(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab], True for those of the likeliest tokens that would be green themselves."""
        best = scores.topk(min(self._TRIED, scores.shape[1])).indices
        rows, tried = best.shape
        before = input_ids[:, input_ids.shape[1] - (self.context_width - 1) :]
        windows = torch.cat([before[:, None].expand(-1, tried, -1), best[..., None]], dim=-1)
        pairs = zip(self.seeds(windows.flatten(0, 1)), best.flatten().tolist(), strict=True)
        verdicts = torch.tensor([self.is_green(seed, token) for seed, token in pairs], device=scores.device)
        green = torch.zeros_like(scores, dtype=torch.bool)
        return green.scatter_(1, best, verdicts.view(rows, tried))


def _as_wide(green: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Fit lists to heads that have more or fewer scores than the vocabulary has tokens."""
    missing = scores.shape[1] - green.shape[1]
    return torch.nn.functional.pad(green, (0, missing)) if missing else green


class SynthIDTextWatermarkState:
    """What `SynthIDTextWatermarkLogitsProcessor` knows of the rows that it marks.

    Args:
        batch_size: Rows.
        ngram_len: Tokens that a hash sees.
        context_history_size: How many contexts back are remembered.
        device: Where the rows are.

    Attributes:
        context: [rows, ngram_len - 1] newest tokens; 0 before the first new one.
        context_history: [rows, contexts] hashes of the contexts before.
        num_calls: Calls so far.
        start: Length of the prompt; None before the first call.
    """

    def __init__(self, batch_size: int, ngram_len: int, context_history_size: int, device: Any) -> None:
        self.context = torch.zeros((batch_size, ngram_len - 1), dtype=torch.int64, device=device)
        self.context_history = torch.zeros(
            (batch_size, context_history_size), dtype=torch.int64, device=device
        )
        self.num_calls = 0
        self.start: int | None = None


class SynthIDTextWatermarkLogitsProcessor(LogitsProcessor):
    """Chooses by a tournament of coin throws that follow from the tokens before and secret keys.

    Averaged over keys, each token is as likely as without it (Dathathri et al. 2024,
    doi:10.1038/s41586-024-08025-4, non-distortionary, two leaves a round). A context that came before is
    left without a mark. Beams may change places: everything follows from their tokens.

    Args:
        ngram_len: Tokens that a hash sees: those before the new one, and it.
        keys: Secrets, one for each round.
        sampling_table_size: Size of the table of coin throws.
        sampling_table_seed: Its seed.
        context_history_size: So many contexts back a repeated one is noticed.
        device: Where the table is drawn, and the scores are.
        skip_first_ngram_calls: Leave the first ``ngram_len - 1`` new tokens without a mark.
        debug_mode: Take all tokens as equally likely, for tests.
    """

    # Of the linear congruential generator that newlib and musl use.
    _MULTIPLIER, _INCREMENT = 6364136223846793005, 1

    def __init__(
        self,
        ngram_len: int,
        keys: list[int],
        sampling_table_size: int,
        sampling_table_seed: int,
        context_history_size: int,
        device: Any,
        skip_first_ngram_calls: bool = False,
        debug_mode: bool = False,
    ) -> None:
        # The config's checks are this rule's too.
        SynthIDTextWatermarkingConfig(
            ngram_len, list(keys), context_history_size, sampling_table_seed, sampling_table_size
        )
        self.ngram_len = ngram_len
        self.keys = torch.tensor(list(keys), device=device)
        self._keys = [int(key) for key in keys]
        rng = torch.Generator(device=device).manual_seed(sampling_table_seed)
        self.sampling_table = torch.randint(0, 2, (sampling_table_size,), generator=rng, device=device)
        self.context_history_size = context_history_size
        self.device = torch.device(device)
        self.skip_first_ngram_calls = skip_first_ngram_calls
        self.debug_mode = debug_mode
        self.state: SynthIDTextWatermarkState | None = None
        self._throws: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logarithms of the probabilities after the tournament."""
        _two_dimensions(input_ids)
        if self.debug_mode:
            scores = torch.ones_like(scores)
        hashes = self._follow(input_ids)
        if hashes is None:
            return scores
        tokens = torch.arange(scores.shape[1], device=scores.device)
        base = self._mix(hashes[:, -1:], tokens)
        probs = scores.softmax(-1)
        for key in self._keys:
            probs = _round(probs, self._throw(self._mix(base, key), scores.dtype))
        repeated = (hashes[:, :-1] == hashes[:, -1:]).any(-1, keepdim=True)
        return torch.where(repeated, scores, _finite_log(probs))

    def _follow(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Return hashes of the contexts so far, [rows, contexts], the newest last; None to leave no mark."""
        rows, length = input_ids.shape
        state = self.state
        if state is None or state.context.shape[0] != rows or length < (state.start or 0):
            state = SynthIDTextWatermarkState(rows, self.ngram_len, self.context_history_size, self.device)
            self.state = state
        if state.start is None:
            state.start = length
        known = self.ngram_len - 1
        begun = torch.nn.functional.pad(input_ids[:, state.start :], (known, 0))
        state.context = begun[:, -known:]
        state.num_calls = length - state.start + 1
        skipped = known if self.skip_first_ngram_calls else 0
        if state.num_calls <= skipped:
            return None
        first = max(skipped, state.num_calls - 1 - self.context_history_size)
        hashes = self._context_hashes(begun[:, first:].unfold(1, known, 1))
        state.context_history = hashes[:, :-1].flip(-1)
        return hashes

    # -- pieces, which detection uses too ----------------------------------------------------------

    def accumulate_hash(
        self,
        current_hash: torch.Tensor,
        data: torch.Tensor,
        multiplier: int = _MULTIPLIER,
        increment: int = _INCREMENT,
    ) -> torch.Tensor:
        """Return hashes that have taken in more data.

        Args:
            current_hash: [...] int64.
            data: [..., length] int64, taken in from the first to the last.
            multiplier: Of the linear congruential generator.
            increment: Of the linear congruential generator.
        """
        for item in data.unbind(-1):
            current_hash = (current_hash + item) * multiplier + increment
        return current_hash

    def compute_ngram_keys(self, ngrams: torch.Tensor) -> torch.Tensor:
        """Return a number for each n-gram and key, [batch, n-grams, keys].

        Args:
            ngrams: [batch, n-grams, ngram_len] token ids.

        Raises:
            GenerationError: another shape.
        """
        if ngrams.dim() != 3 or ngrams.shape[2] != self.ngram_len:
            raise GenerationError(
                "These are no n-grams of this watermark",
                where="ngrams",
                expected=f"[batch, n-grams, {self.ngram_len}]",
                found=tuple(ngrams.shape),
            )
        return self._mix(self._context_hashes(ngrams)[..., None], self.keys)

    def sample_g_values(self, ngram_keys: torch.Tensor) -> torch.Tensor:
        """Return the coin throws, 0 or 1, of numbers from `compute_ngram_keys`.

        Args:
            ngram_keys: Any shape, int64.
        """
        return self.sampling_table[self._wrapped(ngram_keys)]

    def compute_g_values(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the coin throws of each n-gram of token sequences, [batch, length - ngram_len + 1, keys].

        Args:
            input_ids: [batch, length].
        """
        _two_dimensions(input_ids)
        return self.sample_g_values(self.compute_ngram_keys(input_ids.unfold(1, self.ngram_len, 1)))

    def update_scores(self, scores: torch.Tensor, g_values: torch.Tensor) -> torch.Tensor:
        """Return logarithms of the probabilities after the tournament.

        Args:
            scores: [rows, vocab].
            g_values: [rows, vocab, keys].
        """
        probs = scores.softmax(-1)
        for throws in g_values.to(scores.dtype).unbind(-1):
            probs = _round(probs, throws)
        return _finite_log(probs)

    def compute_context_repetition_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [batch, length - ngram_len + 1], True where the context of a token is new.

        Args:
            input_ids: [batch, length].
        """
        _two_dimensions(input_ids)
        hashes = self._context_hashes(input_ids[:, :-1].unfold(1, self.ngram_len - 1, 1))
        steps = torch.arange(hashes.shape[1], device=hashes.device)
        distance = steps[:, None] - steps
        near = (distance > 0) & (distance <= self.context_history_size)
        return torch.stack([~((row[:, None] == row) & near).any(-1) for row in hashes])

    def compute_eos_token_mask(self, input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
        """Return [batch, length], 1 before a row's first end token and 0 from it on.

        Args:
            input_ids: [batch, length].
            eos_token_id: What ends a sequence.
        """
        _two_dimensions(input_ids)
        return ((input_ids == eos_token_id).cumsum(-1) == 0).to(torch.int64)

    def expected_mean_g_value(self, vocab_size: int, coinflip_prob: float = 0.5) -> float:
        """Return the mean of marked text's coin throws after one round over equally likely tokens.

        Args:
            vocab_size: How many tokens.
            coinflip_prob: Probability of a 1.
        """
        return coinflip_prob + coinflip_prob * (1 - coinflip_prob) * (1 - 1 / vocab_size)

    def _context_hashes(self, windows: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(windows.shape[:-1], dtype=torch.int64, device=windows.device)
        return self.accumulate_hash(ones, windows)

    def _mix(self, hashes: torch.Tensor, item: torch.Tensor | int) -> torch.Tensor:
        return (hashes + item) * self._MULTIPLIER + self._INCREMENT

    def _wrapped(self, numbers: torch.Tensor) -> torch.Tensor:
        size = self.sampling_table.shape[0]
        # Of a power of two, the low bits are the remainder, for negative numbers too, and cost no division.
        return numbers & (size - 1) if size & (size - 1) == 0 else numbers % size

    def _throw(self, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._throws is None or self._throws.dtype != dtype or self._throws.device != numbers.device:
            self._throws = self.sampling_table.to(numbers.device, dtype)
        return self._throws[self._wrapped(numbers)]


def _round(probs: torch.Tensor, throws: torch.Tensor) -> torch.Tensor:
    """Return probabilities after one round: of two tokens drawn, the one that threw 1 wins."""
    return probs * (1 + throws - (throws * probs).sum(-1, keepdim=True))


def _finite_log(probs: torch.Tensor) -> torch.Tensor:
    return probs.log().nan_to_num_(
        nan=torch.finfo(probs.dtype).min,
        posinf=torch.finfo(probs.dtype).min,
        neginf=torch.finfo(probs.dtype).min,
    )


def _two_dimensions(input_ids: torch.Tensor) -> None:
    if input_ids.dim() != 2:
        raise GenerationError(
            "A watermark is looked for in a batch of sequences",
            where="input_ids",
            expected="[batch, length]",
            found=tuple(input_ids.shape),
        )
