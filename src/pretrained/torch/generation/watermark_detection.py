# SPDX-License-Identifier: Apache-2.0
"""Detectors of watermarks: whether token ids carry the mark that a secret leaves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrained.core.watermarking import WatermarkingConfig, as_watermarking_config
from pretrained.errors import GenerationError
from pretrained.torch.generation.watermark import (
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkLogitsProcessor,
)

Numbers = NDArray[Any]


@dataclass
class WatermarkDetectorOutput:
    """What a detector found, for each row.

    Attributes:
        num_tokens_scored: [rows] tokens that were looked at.
        num_green_tokens: [rows] how many of them are green.
        green_fraction: [rows] their share.
        z_score: [rows] how many standard deviations that is above chance.
        p_value: [rows] probability of as much by chance.
        prediction: [rows] whether the row is marked.
        confidence: [rows] one minus the p-value.
    """

    num_tokens_scored: Numbers | None = None
    num_green_tokens: Numbers | None = None
    green_fraction: Numbers | None = None
    z_score: Numbers | None = None
    p_value: Numbers | None = None
    prediction: Numbers | None = None
    confidence: Numbers | None = None


class WatermarkDetector:
    """Counts the green tokens that `WatermarkLogitsProcessor` leaves (arXiv:2306.04634, section 3).

    Args:
        model_config: Of the model that generated; its vocabulary and start token count.
        device: The device that it ran on: others draw other lists.
        watermarking_config: The settings that were used, secret included.
        ignore_repeated_ngrams: Count each n-gram of a row once.
        max_cache_size: Accepted for compatibility; verdicts are kept with the rule.
    """

    def __init__(
        self,
        model_config: Any,
        device: Any,
        watermarking_config: WatermarkingConfig | Mapping[str, Any],
        ignore_repeated_ngrams: bool = False,
        max_cache_size: int = 128,
    ) -> None:
        config = as_watermarking_config(watermarking_config)
        if not isinstance(config, WatermarkingConfig):
            raise GenerationError(
                "This detector counts green tokens",
                where="watermarking_config",
                expected="a WatermarkingConfig",
                found=type(config).__name__,
                mend="Use SynthIDTextWatermarkDetector.",
            )
        encoder = model_config.is_encoder_decoder
        self.bos_token_id = model_config.decoder_start_token_id if encoder else model_config.bos_token_id
        self.greenlist_ratio = config.greenlist_ratio
        self.ignore_repeated_ngrams = ignore_repeated_ngrams
        self.processor: WatermarkLogitsProcessor = config.construct_processor(model_config.vocab_size, device)

    def __call__(
        self, input_ids: torch.Tensor, z_threshold: float = 3.0, return_dict: bool = False
    ) -> WatermarkDetectorOutput | Numbers:
        """Return whether rows are marked, [rows], or everything that was found.

        Args:
            input_ids: [rows, length] generated tokens; best without the prompt, which is not marked.
            z_threshold: From how many standard deviations above chance a row counts as marked.
            return_dict: Return a `WatermarkDetectorOutput`.

        Raises:
            GenerationError: there is no token to look at, or only some rows begin with the start token.
        """
        input_ids = self._without_start(input_ids)
        width = self.processor.context_width
        if input_ids.shape[1] <= width:
            raise GenerationError(
                "There is no token to look for a watermark in",
                where="input_ids",
                expected=f"more than context_width={width} tokens after the start token",
                found=input_ids.shape[1],
            )
        counts = [self._count(row) for row in input_ids]
        scored, green = (np.array(column, dtype=np.float64) for column in zip(*counts, strict=True))
        ratio = self.greenlist_ratio
        z_score = (green - ratio * scored) / np.sqrt(scored * ratio * (1 - ratio))
        prediction = z_score > z_threshold
        if not return_dict:
            return prediction
        p_value = _by_chance(z_score)
        return WatermarkDetectorOutput(
            scored, green, green / scored, z_score, p_value, prediction, 1 - p_value
        )

    def _without_start(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise GenerationError(
                "A watermark is looked for in a batch of sequences",
                where="input_ids",
                expected="[rows, length]",
                found=tuple(input_ids.shape),
            )
        begun = input_ids[:, 0] == (-1 if self.bos_token_id is None else self.bos_token_id)
        if bool(begun.any()) != bool(begun.all()):
            raise GenerationError(
                "Only some rows begin with the start token",
                where="input_ids",
                mend="Tokenize all of them alike, or pass them one at a time.",
            )
        return input_ids[:, 1:] if bool(begun[0]) else input_ids

    def _count(self, row: torch.Tensor) -> tuple[int, int]:
        """Return how many tokens of a row were looked at, and how many of them are green."""
        rule = self.processor
        own = rule.seeding_scheme == "selfhash"
        size = rule.context_width + (0 if own else 1)
        found = Counter(map(tuple, row.unfold(0, size, 1).tolist()))
        if self.ignore_repeated_ngrams:
            found = Counter(dict.fromkeys(found, 1))
        windows = torch.tensor([ngram if own else ngram[:-1] for ngram in found], device=row.device)
        verdicts = [
            rule.is_green(seed, ngram[-1]) for seed, ngram in zip(rule.seeds(windows), found, strict=True)
        ]
        green = sum(times for times, verdict in zip(found.values(), verdicts, strict=True) if verdict)
        return found.total(), green


class SynthIDTextWatermarkDetector:
    """Looks for the mark that `SynthIDTextWatermarkLogitsProcessor` leaves.

    Args:
        detector_module: Called with ``(g_values [rows, tokens, keys], mask [rows, tokens])``; returns its
            verdict. `mean_z_score` needs no training; a trained classifier finds the mark in shorter texts.
        logits_processor: The rule that marked, with its keys.
        tokenizer: Its `eos_token_id` is where a row ends.
    """

    def __init__(
        self,
        detector_module: Callable[[torch.Tensor, torch.Tensor], Any],
        logits_processor: SynthIDTextWatermarkLogitsProcessor,
        tokenizer: Any,
    ) -> None:
        self.detector_module = detector_module
        self.logits_processor = logits_processor
        self.tokenizer = tokenizer

    def __call__(self, tokenized_outputs: torch.Tensor) -> Any:
        """Return the verdict of `detector_module`.

        Args:
            tokenized_outputs: [rows, length] generated tokens, without the prompt.
        """
        rule = self.logits_processor
        open_rows = rule.compute_eos_token_mask(tokenized_outputs, self.tokenizer.eos_token_id)
        fresh = rule.compute_context_repetition_mask(tokenized_outputs)
        mask = fresh * open_rows[:, rule.ngram_len - 1 :]
        return self.detector_module(rule.compute_g_values(tokenized_outputs), mask)


def mean_z_score(g_values: torch.Tensor, mask: torch.Tensor, weighted: bool = True) -> torch.Tensor:
    """Return how many standard deviations the coin throws of rows are above chance, [rows].

    The weighted mean of doi:10.1038/s41586-024-08025-4: weights fall evenly from 10 to 1 over the rounds,
    because later rounds leave less of a mark. A throw by chance is 0 or 1 with probability 1/2.

    Args:
        g_values: [rows, tokens, keys], 0 or 1.
        mask: [rows, tokens], which tokens count.
        weighted: False to weigh all rounds the same.
    """
    depth = g_values.shape[-1]
    weights = torch.linspace(10.0, 1.0, depth) if weighted else torch.ones(depth)
    weights = weights.to(g_values.device)
    above = ((g_values - 0.5) * weights * mask[..., None]).sum((-1, -2))
    deviation = 0.5 * (mask.sum(-1) * weights.square().sum()).sqrt()
    return torch.where(deviation > 0, above / deviation, 0.0)


def _by_chance(z_score: Numbers) -> Numbers:
    """Return the probability of at least so many standard deviations by chance."""
    tail: Numbers = 0.5 * torch.special.erfc(torch.as_tensor(z_score / math.sqrt(2))).numpy()
    return tail
