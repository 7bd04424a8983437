# SPDX-License-Identifier: Apache-2.0
"""The loop of continuous batching: rows join and leave between steps.

A step runs one new token of each running answer, and pieces of prompts up to a budget, so that a long prompt
does not hold up the others. When pages run out, the youngest row gives its own back and is computed again
later (recomputation, Kwon et al. 2023, arXiv:2309.06180, section 4.5).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

import torch

from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.budgets import available_host_memory
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache import layer_windows
from pretrained.torch.cache_paged import PagedCache, Piece, Step
from pretrained.torch.generation.batch_requests import RequestStatus, Row, input_device
from pretrained.torch.generation.pages import Pages
from pretrained.torch.generation.settings import parameters
from pretrained.torch.generation.strategies import draw
from pretrained.torch.mapped_mixin import check_files

logger = logging.getLogger("pretrained.generation")

_NEEDS = ("position_ids", "past_key_values", "logits_to_keep", "attention_mask")


class BatchEngine:
    """Answers rows of one model together.

    Args:
        model: The model.
        config: How many rows and pages.

    Raises:
        NotYetError: a model whose rows cannot be run together.
    """

    def __init__(self, model: Any, config: ContinuousBatchingConfig) -> None:
        refuse_model(model)
        check_files(model)
        self.model, self.config = model, config
        self._device = input_device(model)
        on_cpu = self._device.type in ("cpu", "meta")
        self.max_rows = config.max_requests_per_batch or (64 if on_cpu else 256)
        self._max_tokens = config.max_batch_tokens or (512 if on_cpu else 2048)
        limit = _page_limit(model, config, on_cpu)
        self.pages = Pages(limit, config.page_size, share=config.allow_block_sharing)
        self.cache = PagedCache(model.config, config.page_size)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.preemptions = 0
        self.steps = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    def check(self, row: Row) -> None:
        """Raise where a row could never run.

        Args:
            row: A new row.

        Raises:
            GenerationError: it needs more pages than there may be.
        """
        # The last token is never run.
        needed = self.pages.needed(row.max_length - 1)
        if needed > self.pages.limit:
            raise GenerationError(
                "A request needs more pages than there may be",
                where=f"request {row.output.request_id}",
                expected=f"at most {self.pages.limit} pages of {self.config.page_size} tokens",
                found=f"{needed} for {row.max_length} tokens",
                mend="Pass a smaller max_new_tokens or a shorter prompt, or raise num_blocks or max_memory "
                "of ContinuousBatchingConfig.",
            )

    def add(self, row: Row) -> None:
        """Put a row at the end of the queue.

        Args:
            row: A new row.

        Raises:
            GenerationError: as `check`.
        """
        self.check(row)
        self.waiting.append(row)

    def cancel(self, request_id: str) -> Row | None:
        """Take a row out; return it, or None where there is none by that name.

        Args:
            request_id: Its name.
        """
        for rows in (self.waiting, self.running):
            for row in rows:
                if row.output.request_id == request_id:
                    rows.remove(row)
                    self._end(row, RequestStatus.CANCELLED)
                    return row
        return None

    def fail_all(self, error: BaseException) -> list[Row]:
        """End all rows with an error, and let go of all pages; return the rows.

        Args:
            error: What happened.
        """
        rows = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        for row in rows:
            row.pages.clear()
            self._end(row, RequestStatus.FAILED, error)
        self.pages = Pages(self.pages.limit, self.config.page_size, share=self.config.allow_block_sharing)
        self.cache = PagedCache(self.model.config, self.config.page_size)
        return rows

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Run one step; return the rows that got a token or ended in it."""
        rows, pieces = self._schedule()
        if not rows:
            return []
        logits, ready = self._forward(rows, pieces)
        for row, piece in zip(rows, pieces, strict=True):
            row.computed = piece.start + piece.count
        self.steps += 1
        self._pick(ready, logits)
        return ready

    # -- what runs -------------------------------------------------------------------------------

    def _schedule(self) -> tuple[list[Row], list[Piece]]:
        """Return the rows of the next step and their pieces, those of one token first."""
        rows: list[Row] = []
        for row in list(self.running):
            # It may have given way to an older one in the meantime: then it is no longer decoding.
            is_next = row.computed == len(row.tokens) - 1 and row.output.status is RequestStatus.DECODING
            if is_next and self._make_room(row):
                rows.append(row)
        budget = self._max_tokens - len(rows)
        pieces = [Piece(row.computed, 1, row.pages) for row in rows]
        for row, piece in zip(rows, pieces, strict=True):
            self._learn(row, piece)
        chosen = set(map(id, rows))
        # By turns: those that have begun, then new ones while there are pages.
        for row in self.running:
            if budget > 0 and id(row) not in chosen:
                budget -= self._add_piece(row, budget, rows, pieces)
        while budget > 0 and self.waiting and len(self.running) < self.max_rows and self._admit():
            budget -= self._add_piece(self.running[-1], budget, rows, pieces)
        order = sorted(range(len(rows)), key=lambda index: pieces[index].count != 1)
        return [rows[index] for index in order], [pieces[index] for index in order]

    def _add_piece(self, row: Row, budget: int, rows: list[Row], pieces: list[Piece]) -> int:
        count = min(len(row.tokens) - row.computed, budget)
        piece = Piece(row.computed, count, row.pages)
        rows.append(row)
        pieces.append(piece)
        # Known before it is computed: in every layer keys are written before anything looks at them, so rows
        # of this very step may share them.
        self._learn(row, piece)
        return count

    def _admit(self) -> bool:
        """Let the first row of the queue in if there are pages for all of its tokens."""
        row = self.waiting[0]
        # The last token is run in any case, for its scores.
        shared = self.pages.find(row.tokens[:-1])
        for page in shared:
            self.pages.hold(page)
        needed = self.pages.needed(len(row.tokens)) - len(shared)
        # One page for each running row to grow into, or rows would soon be sent out again.
        spare = len(self.running) if self.running else 0
        if needed + min(spare, 8) > self.pages.available and self.running:
            self.pages.release(shared)
            return False
        fresh = [self.pages.take() for _ in range(needed)]
        assert None not in fresh, "a row that fits alone found no pages"
        self.waiting.popleft()
        row.pages = shared + [page for page in fresh if page is not None]
        row.computed = len(shared) * self.config.page_size
        row.known = (len(shared), self.pages.content(shared[-1]) if shared else None)
        if row.output.lifespan[0] < 0:
            row.output.lifespan = (time.perf_counter(), -1.0)
        row.output.status = RequestStatus.PREFILLING
        self.running.append(row)
        return True

    def _make_room(self, row: Row) -> bool:
        """Get a page for a row's next token; False where the row itself had to give way."""
        while len(row.pages) * self.config.page_size <= row.computed:
            page = self.pages.take()
            if page is not None:
                row.pages.append(page)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is row:
                return False
        return True

    def _preempt(self, row: Row) -> None:
        self.running.remove(row)
        self._release(row)
        row.computed = 0
        row.output.status = RequestStatus.PENDING
        self.waiting.appendleft(row)
        self.preemptions += 1

    def _learn(self, row: Row, piece: Piece) -> None:
        """Note the content of the pages that a piece fills."""
        size = self.config.page_size
        count, before = row.known
        while (count + 1) * size <= piece.start + piece.count:
            if count and before is None:
                return
            page_tokens = tuple(row.tokens[count * size : (count + 1) * size])
            before = self.pages.learn(row.pages[count], before, page_tokens)
            count += 1
            row.known = (count, before)

    def _release(self, row: Row, *, forget: bool = False) -> None:
        let_go = self.pages.release(row.pages, forget=forget)
        if forget and let_go:
            self.cache.clear(let_go)
        row.pages, row.known = [], (0, None)

    # -- running ---------------------------------------------------------------------------------

    def _forward(self, rows: list[Row], pieces: list[Piece]) -> tuple[torch.Tensor, list[Row]]:
        """Run the pieces; return the scores [rows, vocab] after those that end theirs, and those rows."""
        tokens: list[int] = []
        lasts, ready = [], []
        for row, piece in zip(rows, pieces, strict=True):
            end = piece.start + piece.count
            tokens += row.tokens[piece.start : end]
            if end == len(row.tokens):
                lasts.append(len(tokens) - 1)
                ready.append(row)
        step = Step(pieces, self.config.page_size, self._device)
        self.cache.begin(step, self.pages.capacity)
        output = self.model(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=step.positions,
            # Of rank 4, which models pass on as it is; pages know themselves who may look at what.
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self._device),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=torch.tensor(lasts or [0], device=self._device),
        )
        return output.logits[0], ready

    def _pick(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose the next token of each row, and end rows that are finished."""
        if not rows:
            return
        scores = logits.float()
        failures: dict[int, Exception] = {}
        probabilities: list[torch.Tensor] = []
        if all(row.is_plain for row in rows):
            confidence, tokens = scores.max(dim=-1)
        else:
            confidence, tokens, scores = self._pick_by_rules(rows, scores, failures)
        if self.config.return_logprobs:
            found = scores.log_softmax(-1).gather(1, tokens[:, None])
            probabilities = found[:, 0].tolist()
        confidences, numbers, now = confidence.tolist(), tokens.tolist(), time.perf_counter()
        for index, row in enumerate(rows):
            error = failures.get(index)
            if error is None and math.isnan(confidences[index]):
                error = _not_numbers(len(row.tokens) - row.prompt_length)
            if error is not None:
                self.running.remove(row)
                self._end(row, RequestStatus.FAILED, error)
                continue
            row.tokens.append(numbers[index])
            row.output.status = RequestStatus.DECODING
            if self.config.return_logprobs:
                row.output.logprobs.append(float(probabilities[index]))
            if row.output.timestamps is not None:
                row.output.timestamps.append(now)
            row.output.finish_reason = _reason_to_end(row, now)
            if row.output.finish_reason is not None:
                self.running.remove(row)
                self._end(row, RequestStatus.FINISHED)

    def _pick_by_rules(
        self, rows: list[Row], scores: torch.Tensor, failures: dict[int, Exception]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose with each row's own rules and source of chance."""
        nothing = torch.empty((1, 0), dtype=torch.int64, device=scores.device)
        confidences, tokens, kept = [], [], []
        for index, row in enumerate(rows):
            own = scores[index : index + 1]
            try:
                if row.processors:
                    ids = torch.tensor([row.tokens], device=scores.device) if row.reads_tokens else nothing
                    own = row.processors(ids, own)
                if row.seed is None:
                    confidence, token = own.max(dim=-1)
                else:
                    confidence, token = draw(own.softmax(-1), row.generator(own.device))
            except Exception as error:
                # A rule of the user's: only its own row is lost.
                failures[index] = error
                confidence, token = own.new_zeros(1), torch.zeros(1, dtype=torch.int64, device=own.device)
            confidences.append(confidence)
            tokens.append(token)
            kept.append(own)
        return torch.cat(confidences), torch.cat(tokens), torch.cat(kept)

    # -- ends ------------------------------------------------------------------------------------

    def _end(self, row: Row, status: RequestStatus, error: BaseException | None = None) -> None:
        # What a failed row left in its pages may be no numbers.
        self._release(row, forget=status is RequestStatus.FAILED and bool(row.pages))
        row.output.status = status
        row.output.lifespan = (row.output.lifespan[0], time.perf_counter())
        if error is not None:
            row.output.error = f"{type(error).__name__}: {error}"


def _reason_to_end(row: Row, now: float) -> str | None:
    """Return why a row ends with its last token, or None where it does not."""
    if row.tokens[-1] in row.ends or (row.stops is not None and row.stops.completed(row.tokens)):
        return "stop"
    if len(row.tokens) >= row.max_length:
        return "length"
    is_late = row.max_time is not None and now - row.output.lifespan[0] > row.max_time
    return "time" if is_late else None


def refuse_model(model: Any) -> None:
    """Raise where rows of a model cannot be run together.

    Args:
        model: The model.

    Raises:
        NotYetError: names what is in the way.
    """
    name, config = type(model).__name__, model.config
    reason = None
    missing = [one for one in _NEEDS if one not in parameters(type(model).forward)]
    rotary = [module for module in model.modules() if hasattr(module, "table")]
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        reason = "it reads an encoder's output, and only decoders are served"
    elif missing:
        reason = f"its forward does not take {missing[0]}"
    elif any(
        getattr(one.table, "dynamic", None) is not None or getattr(one, "long_inv_freq", None) is not None
        for one in rotary
    ):
        reason = "its positions are stretched by the longest row, so rows would change each other"
    if reason is not None:
        raise NotYetError(
            f"{name} cannot answer requests in continuous batches: {reason}",
            where="generate_batch",
            mend="Use generate() with padded batches.",
        )


def _page_limit(model: Any, config: ContinuousBatchingConfig, on_cpu: bool) -> int:
    """Return how many pages there may be."""
    bytes_each = page_nbytes(model, config.page_size)
    bounds = [] if config.num_blocks is None else [config.num_blocks]
    room = config.max_memory_bytes
    if room is None and (config.num_blocks is None or config.max_memory_percent is not None):
        free = available_host_memory() if on_cpu else torch.cuda.mem_get_info(model.device)[0]
        share = config.max_memory_percent or (0.5 if on_cpu else 0.8)
        room = None if free is None else int(free * share)
    if room is not None:
        if room < bytes_each:
            raise GenerationError(
                "There is no room for a single page",
                where="ContinuousBatchingConfig.max_memory",
                expected=f"{bytes_each} bytes or more",
                found=room,
                mend="Raise max_memory, or make pages smaller with page_size.",
            )
        bounds.append(room // bytes_each)
    return min(bounds, default=1 << 20)


def page_nbytes(model: Any, page_size: int) -> int:
    """Return how many bytes a page takes in all layers.

    Args:
        model: The model.
        page_size: Tokens in a page.
    """
    config = model.config
    heads = getattr(config, "kv_heads", None) or getattr(config, "num_key_value_heads", None)
    heads = heads or config.num_attention_heads
    size = getattr(config, "head_size", None) or config.hidden_size // config.num_attention_heads
    return 2 * len(layer_windows(config)) * int(heads) * int(size) * page_size * int(model.dtype.itemsize)


def _not_numbers(step: int) -> GenerationError:
    return GenerationError(
        f"The scores of the next token are not numbers (step {step})",
        where="logits",
        found="NaN, or no token left possible by the rules",
        mend="Check the weights and the dtype (float16 overflows; try bfloat16 or float32), then the rules; "
        "remove_invalid_values=True goes on regardless.",
    )
