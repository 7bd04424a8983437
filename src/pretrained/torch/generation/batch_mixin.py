# SPDX-License-Identifier: Apache-2.0
"""`BatchGenerationMixin`: many requests at once, behind `generate_batch` and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.progress import counting
from pretrained.errors import GenerationError, PretrainedError
from pretrained.torch.generation.batch_engine import BatchEngine
from pretrained.torch.generation.batch_manager import ContinuousBatchingManager
from pretrained.torch.generation.batch_requests import GenerationOutput, Prompt, Requests, Row

Batching = ContinuousBatchingConfig | Mapping[str, Any] | None


class BatchGenerationMixin:
    """Gives a decoder `generate_batch`: rows of different lengths that join and leave between steps."""

    def generate_batch(
        self,
        inputs: Iterable[Prompt],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Batching = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        *,
        tokenizer: Any = None,
        per_request: Sequence[Mapping[str, Any]] | None = None,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None = None,
        **settings: Any,
    ) -> dict[str, GenerationOutput]:
        """Answer many prompts; each as `generate` would alone.

        Args:
            inputs: The prompts: token ids without padding, or texts with `tokenizer`.
            generation_config: Settings of all.
            continuous_batching_config: How many rows and how much memory.
            record_timestamps: Note when each token came.
            progress_bar: Show one (needs tqdm).
            tokenizer: For texts and `stop_strings`; the answers then have `text`.
            per_request: Settings of each prompt, which win: fields of `GenerationConfig`, `seed`,
                `request_id`.
            logits_processor: Rules on the scores; each is called for one row at a time.
            **settings: Fields of `GenerationConfig` for all.

        Returns:
            Answers by the names of the requests, in the order of `inputs`. What fails while it runs (rules
            that raise, scores that are not numbers) says so in its `error`, and the others go on.

        Raises:
            GenerationError: a prompt or a setting that cannot work; before the first forward.
            NotYetError: a model or a setting that is not served.
        """
        prompts = list(inputs)
        own = _own(per_request, len(prompts))
        engine, requests = self._batch(
            generation_config, continuous_batching_config, settings, tokenizer, logits_processor
        )
        rows = []
        for prompt, mine in zip(prompts, own, strict=True):
            row = requests.row(prompt, record_timestamps=record_timestamps, **mine)
            engine.add(row)
            rows.append(row)
        finished: dict[str, GenerationOutput] = {}
        with counting(len(rows), "request", shown=progress_bar) as advance:
            while not engine.is_idle:
                for row in engine.step():
                    if row.output.is_finished():
                        finished[row.output.request_id] = requests.finish(row)
                        advance()
        return {row.output.request_id: finished[row.output.request_id] for row in rows}

    def iter_batch(
        self,
        inputs: Iterable[Prompt | Mapping[str, Any]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Batching = None,
        *,
        tokenizer: Any = None,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None = None,
        **settings: Any,
    ) -> Iterator[GenerationOutput]:
        """Yield answers as they are finished; prompts are taken from `inputs` as there is room.

        Args:
            inputs: As for `generate_batch`, without end if need be; or mappings with ``prompt`` and settings
                of its own. One that cannot work is answered with an `error`.
            generation_config: As for `generate_batch`.
            continuous_batching_config: As there.
            tokenizer: As there.
            logits_processor: As there.
            **settings: As there.

        Raises:
            GenerationError: a setting of all that cannot work; before the first forward.
            NotYetError: as `generate_batch`.
        """
        engine, requests = self._batch(
            generation_config, continuous_batching_config, settings, tokenizer, logits_processor
        )
        return _iterate(engine, requests, iter(inputs))

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Batching = None,
        *,
        tokenizer: Any = None,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None = None,
        **settings: Any,
    ) -> ContinuousBatchingManager:
        """Return a manager that answers requests in a thread of its own, once started.

        Args:
            generation_config: Settings of all requests.
            continuous_batching_config: How many rows and how much memory.
            tokenizer: As for `generate_batch`.
            logits_processor: As for `generate_batch`.
            **settings: Fields of `GenerationConfig` for all.
        """
        engine, requests = self._batch(
            generation_config, continuous_batching_config, settings, tokenizer, logits_processor
        )
        return ContinuousBatchingManager(engine, requests, engine.config.max_queue_size)

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config: Batching = None,
        **settings: Any,
    ) -> Iterator[ContinuousBatchingManager]:
        """Start a manager, and stop it at the end of the block.

        Args:
            generation_config: As for `init_continuous_batching`.
            block: Wait at the end until the requests are answered.
            timeout: Seconds to wait at most; None for no bound.
            continuous_batching_config: As for `init_continuous_batching`.
            **settings: As for `init_continuous_batching`.
        """
        manager = self.init_continuous_batching(generation_config, continuous_batching_config, **settings)
        manager.start()
        try:
            yield manager
        except BaseException:
            manager.stop(block=block, timeout=timeout, hard_stop=True)
            raise
        manager.stop(block=block, timeout=timeout)

    def _batch(
        self,
        generation_config: GenerationConfig | None,
        batching: Batching,
        settings: Mapping[str, Any],
        tokenizer: Any,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None,
    ) -> tuple[BatchEngine, Requests]:
        # Also as a field of the generation config, where others keep it.
        fields = dict(settings)
        within = fields.pop("continuous_batching_config", None)
        if generation_config is not None and within is None:
            within = generation_config.continuous_batching_config
        config = _batching(batching if batching is not None else within)
        engine = BatchEngine(self, config)
        requests = Requests(
            self,
            generation_config,
            fields,
            config,
            tokenizer=tokenizer,
            logits_processor=logits_processor,
        )
        return engine, requests


def _iterate(
    engine: BatchEngine, requests: Requests, inputs: Iterator[Prompt | Mapping[str, Any]]
) -> Iterator[GenerationOutput]:
    # A few wait, so that a row that leaves is followed at once.
    more, ahead = True, engine.max_rows
    while True:
        while more and len(engine.waiting) < ahead:
            try:
                one = next(inputs)
            except StopIteration:
                more = False
                break
            answer = _try_to_add(engine, requests, one)
            if answer is not None:
                yield answer
        if engine.is_idle:
            if not more:
                return
            continue
        for row in engine.step():
            if row.output.is_finished():
                yield requests.finish(row)


def _try_to_add(
    engine: BatchEngine, requests: Requests, one: Prompt | Mapping[str, Any]
) -> GenerationOutput | None:
    """Add a request; return its answer where it cannot even begin."""
    own: dict[str, Any] = dict(one) if isinstance(one, Mapping) else {"prompt": one}
    row: Row | None = None
    prompt = own.pop("prompt", None)
    try:
        row = requests.row(prompt, **own)
        engine.add(row)
    except PretrainedError as error:
        if row is not None:
            requests.finish(row)
        return requests.failed(own.get("request_id"), error)
    return None


def _own(per_request: Sequence[Mapping[str, Any]] | None, count: int) -> Sequence[Mapping[str, Any]]:
    if per_request is None:
        return [{}] * count
    if len(per_request) != count:
        raise GenerationError(
            "per_request needs settings for each prompt",
            where="per_request",
            expected=f"{count} mappings",
            found=len(per_request),
            mend="Pass {} where there are none.",
        )
    return per_request


def _batching(value: Any) -> ContinuousBatchingConfig:
    if value is None:
        return ContinuousBatchingConfig()
    if isinstance(value, ContinuousBatchingConfig):
        return value
    if isinstance(value, Mapping):
        return ContinuousBatchingConfig.from_dict(value)
    raise GenerationError(
        "continuous_batching_config has the wrong type",
        where="continuous_batching_config",
        expected="a ContinuousBatchingConfig, or a dict of its settings",
        found=type(value).__name__,
    )
