# SPDX-License-Identifier: Apache-2.0
"""When to stop: rules that say for each row whether it is finished, and the check that ends the loop.

A rule is called with ``(input_ids [rows, length], scores)`` after each token and returns [rows] booleans
(or one boolean for all rows). `scores` is the tuple of scores so far where they are collected, else None.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import TokenIds, token_tensor


class StoppingCriteria:
    """Base of all stopping rules; a user's own derives from it, or is any function of the same arguments."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor | bool:
        """Return which rows are finished.

        Args:
            input_ids: [rows, length] tokens so far, prompt included.
            scores: Tuple of [rows, vocab] scores so far, or None.
            **kwargs: Not used by the rules here.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


class MaxLengthCriteria(StoppingCriteria):
    """Every row is finished at a length.

    Args:
        max_length: Prompt included.
        max_position_embeddings: Accepted for compatibility; `generate` minds the positions itself.
    """

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], all the same."""
        done = input_ids.shape[1] >= self.max_length
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


class MaxTimeCriteria(StoppingCriteria):
    """Every row is finished after a time.

    Args:
        max_time: Seconds.
        initial_timestamp: ``time.time()`` of the start; None for now.
    """

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], all the same."""
        done = time.time() - self.initial_timestamp > self.max_time
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


class EosTokenCriteria(StoppingCriteria):
    """A row is finished when its last token is one of those that end a sequence.

    Args:
        eos_token_id: One id or several.
    """

    def __init__(self, eos_token_id: TokenIds) -> None:
        self.eos_token_id = token_tensor(eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], True for rows that ended."""
        if self.eos_token_id.device != input_ids.device:
            self.eos_token_id = self.eos_token_id.to(input_ids.device)
        last = input_ids[:, -1]
        # One comparison for one id: isin costs several times as much at this size.
        if self.eos_token_id.numel() == 1:
            return last == self.eos_token_id
        return (last[:, None] == self.eos_token_id).any(-1)


class StopStringCriteria(StoppingCriteria):
    """A row is finished when its text contains a stop string that its last token completed.

    The string may begin and end inside tokens. Only the end of a row that can hold it is decoded, so a
    step's cost does not grow with the text.

    Args:
        tokenizer: Anything with ``decode(list of ids) -> str``.
        stop_strings: One text or several.
    """

    # Tokens decoded beyond those that a string needs if each gives one byte: some (special ones, pieces of
    # a character) give no text of their own.
    _SPARE = 8

    def __init__(self, tokenizer: Any, stop_strings: str | list[str]) -> None:
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self.tokenizer = tokenizer
        self._tail = max(len(text.encode()) for text in self.stop_strings) + self._SPARE

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], True for rows whose last token completed a stop string."""
        tails = input_ids[:, -self._tail :].tolist()
        return torch.tensor([self.completed(tail) for tail in tails], device=input_ids.device)

    def completed(self, ids: list[int]) -> bool:
        """Return whether the last token of a row completed a stop string.

        Args:
            ids: Tokens so far.
        """
        ids = ids[-self._tail :]
        text = self.tokenizer.decode(ids)
        if not any(stop in text for stop in self.stop_strings):
            return False
        # A replacement character at the end is a character still incomplete, not text.
        before = self.tokenizer.decode(ids[:-1]).rstrip("\ufffd")
        return any(text.find(stop, max(len(before) - len(stop) + 1, 0)) >= 0 for stop in self.stop_strings)


class ConfidenceCriteria(StoppingCriteria):
    """A row is finished when its last token was less likely than a threshold: a draft stops there.

    Args:
        assistant_confidence_threshold: Probability, from 0 to 1.
    """

    def __init__(self, assistant_confidence_threshold: float) -> None:
        self.assistant_confidence_threshold = assistant_confidence_threshold

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], True for rows whose last token was unlikely."""
        if not scores:
            raise GenerationError(
                "ConfidenceCriteria looks at scores, and none are kept",
                where="stopping_criteria",
                mend="Pass return_dict_in_generate=True, output_scores=True.",
            )
        newest = scores[-1].float()
        chosen = newest.gather(1, input_ids[:, -1:])[:, 0] - newest.logsumexp(-1)
        return chosen.exp() < self.assistant_confidence_threshold


class InterruptCriteria(StoppingCriteria):
    """Every row is finished when somebody interrupts: `generate` returns what there is.

    Used as a context, Ctrl-C finishes the token that is being made and ends the call as if it were finished;
    a second Ctrl-C raises KeyboardInterrupt at once. `stop` does the same from another thread.

        with InterruptCriteria() as interrupt:
            output = model.generate(**inputs, stopping_criteria=[interrupt])
        if interrupt.interrupted: ...

    Attributes:
        interrupted: Whether somebody did.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        """Return whether every row is finished."""
        return self.interrupted

    def stop(self) -> None:
        """Let generation end after the token that is being made."""
        self.interrupted = True

    def __enter__(self) -> InterruptCriteria:
        """Take Ctrl-C over from whoever had it.

        Raises:
            GenerationError: not in the main thread, where Ctrl-C arrives.
        """
        if threading.current_thread() is not threading.main_thread():
            raise GenerationError(
                "Ctrl-C arrives in the main thread, and this is another one",
                where="InterruptCriteria",
                mend="Write `with InterruptCriteria() as interrupt:` in the main thread, or call its stop().",
            )
        self.interrupted = False
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, signal.default_int_handler if self._before is None else self._before)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


class StoppingCriteriaList(list[Callable[..., torch.Tensor | bool]]):
    """Rules of which any finishes a row."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return [rows], True for rows that any rule finishes.

        Args:
            input_ids: [rows, length] tokens so far, prompt included.
            scores: Tuple of [rows, vocab] scores so far, or None.
            **kwargs: Passed on.
        """
        done: torch.Tensor | None = None
        for rule in self:
            rows = rule(input_ids, scores, **kwargs)
            if not isinstance(rows, torch.Tensor):
                rows = torch.full((input_ids.shape[0],), bool(rows), device=input_ids.device)
            done = rows if done is None else done | rows
        if done is None:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return done

    @property
    def max_length(self) -> int | None:
        """The least length at which a rule finishes every row, or None."""
        return min((rule.max_length for rule in self if isinstance(rule, MaxLengthCriteria)), default=None)


class StopCheck:
    """Decides after each step whether to go on, and notices scores that are not numbers.

    On a CPU it looks at once. With `behind` it looks at the verdict of the step before, which came over
    while this step was being queued, so that the host never waits for the device; `finish` then says how
    many steps were needed.

    Args:
        rows: How many.
        device: Where the rows are.
        behind: Look one step behind; of use on a CUDA device only.
    """

    def __init__(self, rows: int, device: torch.device, *, behind: bool = False) -> None:
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        self.behind = behind
        self.steps = 0
        if behind:
            self._needed = torch.zeros((), dtype=torch.int64, device=device)
            # First step at which a row's scores held NaN; -1 for none.
            self._bad_step = torch.full((rows,), -1, dtype=torch.int64, device=device)
            cuda = device.type == "cuda"
            self._verdicts = [torch.empty((), dtype=torch.bool, pin_memory=cuda) for _ in range(2)]
            self._arrived: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(2)]

    def __call__(self, confidence: torch.Tensor, finished: torch.Tensor | None) -> bool:
        """Return whether every row is finished (or was, one step ago).

        Args:
            confidence: [rows] score of each token chosen; NaN tells of NaN among the scores.
            finished: [rows] rows that end with this token; None where no rule looks at tokens.

        Raises:
            GenerationError: a row that is still open has scores that are not numbers.
        """
        if self.behind:
            return self._look_behind(confidence, finished)
        if confidence.numel() == 1:
            return self._look_at_one(confidence, finished)
        bad = confidence.isnan()
        if bad.any() and (bad & self.unfinished).any():
            raise _not_numbers(self.steps, int((bad & self.unfinished).nonzero()[0]))
        self.steps += 1
        if finished is None:
            return False
        self.unfinished = self.unfinished & ~finished
        return not bool(self.unfinished.any())

    def finish(self) -> int:
        """Return how many of the steps were needed, after the last one.

        Raises:
            GenerationError: the scores were not numbers somewhere; names the step and the row.
        """
        if not self.behind:
            return self.steps
        for row, step in enumerate(self._bad_step.tolist()):
            if step >= 0:
                raise _not_numbers(step, row)
        return int(self._needed)

    def _look_at_one(self, confidence: torch.Tensor, finished: torch.Tensor | None) -> bool:
        # A single row is read as two numbers, which costs less than tensor operations on it.
        if math.isnan(confidence.item()):
            raise _not_numbers(self.steps, 0)
        self.steps += 1
        return finished is not None and bool(finished.item())

    def _look_behind(self, confidence: torch.Tensor, finished: torch.Tensor | None) -> bool:
        bad = confidence.isnan() & self.unfinished & (self._bad_step < 0)
        self._bad_step.masked_fill_(bad, self.steps)
        self._needed += self.unfinished.any()
        if finished is not None:
            self.unfinished = self.unfinished & ~finished
        slot = self.steps % 2
        self._verdicts[slot].copy_(self.unfinished.any(), non_blocking=True)
        if self._arrived[slot] is not None:
            self._arrived[slot].record()
        self.steps += 1
        if self.steps < 2:
            return False
        if self._arrived[1 - slot] is not None:
            self._arrived[1 - slot].synchronize()
        return not bool(self._verdicts[1 - slot])


def _not_numbers(step: int, row: int) -> GenerationError:
    return GenerationError(
        f"The scores of the next token are not numbers (step {step}, row {row})",
        where="logits",
        found="NaN, or no token left possible by the rules",
        mend="Check the weights and the dtype (float16 overflows; try bfloat16 or float32), then the rules; "
        "remove_invalid_values=True goes on regardless.",
    )
