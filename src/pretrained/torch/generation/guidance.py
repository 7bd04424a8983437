# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance (Sanchez et al. 2023, arXiv:2306.17806): away from what comes without a prompt.

The scores become u + scale (c - u), of the log-probabilities c after the prompt and u after a negative one.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.torch.generation.checks import check_batch, check_ids, check_mask, vocabulary
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.logits import LogitsProcessor, LogitsProcessorList
from pretrained.torch.generation.settings import parameters

_SEQUENTIAL = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.CONTRASTIVE_SEARCH)


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Guides each row by a second run of the model, which has a negative prompt in place of the prompt.

    Args:
        guidance_scale: 1 changes nothing, more moves away from the negative prompt, less towards it.
        model: The model that generates.
        unconditional_ids: [rows, length] the negative prompt; None for the prompt's last token.
        unconditional_attention_mask: [rows, length], 0 at padding.
        use_cache: Whether the second run keeps a cache.
        prompt_length: How long the prompt is; None where the first call has just the prompt.
        sequential: Whether each call has the rows of the last one, each with one more token. Otherwise that
            is looked at, for which the host waits for the device.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        unconditional_ids: torch.Tensor | None = None,
        unconditional_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = True,
        *,
        prompt_length: int | None = None,
        sequential: bool = False,
    ) -> None:
        self.guidance_scale = guidance_scale
        self._sequential = sequential
        self.model = model
        self.use_cache = use_cache is not False
        self._ids = unconditional_ids
        self._mask = unconditional_attention_mask
        self._takes = parameters(type(getattr(model, "unsynced", model)).forward)
        self._given_length = prompt_length
        self._prompt_length = -1
        self._fed = torch.empty((0, 0), dtype=torch.int64)
        self._cache: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return [rows, vocab] guided log-probabilities.

        Args:
            input_ids: [rows, length] tokens so far.
            scores: [rows, vocab].
        """
        conditional = scores.log_softmax(-1)
        if self.guidance_scale == 1:
            return conditional
        logits = self._unconditional(input_ids).to(scores.device, scores.dtype)
        unconditional = logits[:, -1].log_softmax(-1)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def _unconditional(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the model's scores after the negative prompt and the new tokens."""
        fed, length = self._fed.shape[1], input_ids.shape[1]
        if self._cache is not None and length == self._prompt_length + fed + 1:
            new = input_ids[:, self._prompt_length :]
            # Beams change places, and drafts are taken back: then what was fed is another text.
            same_rows = self._fed.shape[0] == new.shape[0]
            if self._sequential or (same_rows and torch.equal(new[:, :-1], self._fed)):
                return self._run(new[:, -1:], new)
        if self._given_length is not None:
            self._prompt_length = self._given_length
        elif not 0 < self._prompt_length <= length <= self._prompt_length + fed + 1:
            self._prompt_length = length
        self._cache = None
        new = input_ids[:, self._prompt_length :]
        return self._run(torch.cat([self._negative(input_ids), new], dim=1), new)

    def _negative(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._ids is None:
            return input_ids[:, self._prompt_length - 1 : self._prompt_length]
        return self._for_rows(self._ids, input_ids)

    @staticmethod
    def _for_rows(given: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Repeat a negative prompt for the beams that go on from its row."""
        return given.to(rows.device).repeat_interleave(rows.shape[0] // given.shape[0], dim=0)

    def _run(self, ids: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        arguments: dict[str, Any] = {"input_ids": ids}
        if self._mask is not None:
            mask = torch.cat([self._for_rows(self._mask, new), torch.ones_like(new)], dim=1)
            arguments["attention_mask"] = mask
            if "position_ids" in self._takes:
                arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        cached = self.use_cache and "past_key_values" in self._takes
        output = self.model(**arguments, use_cache=cached, past_key_values=self._cache, return_dict=True)
        self._cache = output.past_key_values if cached else None
        self._fed = new.clone()
        logits: torch.Tensor = output.logits
        return logits


def guide(
    model: Any,
    config: GenerationConfig,
    mode: GenerationMode,
    inputs: GenerationInputs,
    processors: LogitsProcessorList,
    negative_ids: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
) -> LogitsProcessorList:
    """Put guidance before the other rules, where a call asks for it.

    Args:
        model: The model that generates.
        config: The settled config.
        mode: The strategy.
        inputs: The prepared inputs.
        processors: The other rules; a user's own guidance takes the place of this one.
        negative_ids: [batch, length] the negative prompt of the call, or None.
        negative_mask: Its mask, or None.

    Raises:
        GenerationError: the negative prompt cannot be one, or has no guidance to serve.
    """
    own = any(isinstance(rule, UnbatchedClassifierFreeGuidanceLogitsProcessor) for rule in processors)
    if config.guidance_scale is None or config.guidance_scale == 1 or own:
        return processors
    rows = inputs.rows
    ids, mask = negative_prompt(model, config, negative_ids, negative_mask, rows)
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        config.guidance_scale,
        model,
        ids,
        mask,
        config.use_cache,
        prompt_length=inputs.input_ids.shape[1],
        sequential=mode in _SEQUENTIAL,
    )
    return LogitsProcessorList([guidance, *processors])


def negative_prompt(
    model: Any,
    config: GenerationConfig,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    rows: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return a checked negative prompt and its mask, one row for each that is generated.

    Args:
        model: The model that generates.
        config: The settled config.
        ids: [batch, length], or [1, length] for all rows; None for none.
        mask: Its mask; None to take its padding tokens for padding.
        rows: How many are generated.

    Raises:
        GenerationError: it cannot be a prompt, or does not fit the batch.
    """
    if ids is None:
        return None, None
    ids = check_ids(ids, vocabulary(model), "negative_prompt_ids")
    if mask is not None:
        mask = check_mask(mask, ids.shape[0], (ids.shape[1],), "negative_prompt_attention_mask")
    elif config.pad_token_id is not None and config.pad_token_id not in _as_list(config.eos_token_id):
        mask = (ids != config.pad_token_id).long()
    if mask is not None and bool((mask == 1).all()):
        mask = None
    if rows % ids.shape[0]:
        check_batch(ids, rows, "negative_prompt_ids", than="the prompt")
    times = rows // ids.shape[0]
    return ids.repeat_interleave(times, 0), None if mask is None else mask.repeat_interleave(times, 0)


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
