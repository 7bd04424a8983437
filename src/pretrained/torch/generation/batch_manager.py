# SPDX-License-Identifier: Apache-2.0
"""`ContinuousBatchingManager`: a thread that answers requests which come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pretrained.errors import GenerationError
from pretrained.torch.generation.batch_engine import BatchEngine
from pretrained.torch.generation.batch_requests import GenerationOutput, Prompt, Requests, Row

logger = logging.getLogger("pretrained.generation")


class ContinuousBatchingManager:
    """Takes requests at any time, from any thread, and hands out answers as they are finished.

    Made by `init_continuous_batching`; nothing runs before `start`.

    Args:
        engine: Runs the rows.
        requests: Makes them.
        max_queue_size: Requests that may wait; 0 for no bound.
    """

    def __init__(self, engine: BatchEngine, requests: Requests, max_queue_size: int = 0) -> None:
        self.engine, self._requests, self._bound = engine, requests, max_queue_size
        self._changed = threading.Condition()
        self._new: deque[Row] = deque()
        self._cancelled: deque[str] = deque()
        self._results: deque[GenerationOutput] = deque()
        self._handlers: dict[str, Callable[[GenerationOutput], Any]] = {}
        self._thread: threading.Thread | None = None
        # None while it may run; then whether those already added are still answered.
        self._stopping: bool | None = None
        self._error: BaseException | None = None
        self._pauses = 0

    # -- the thread ------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to answer.

        Raises:
            GenerationError: it runs already.
        """
        if self.is_running():
            raise GenerationError("The manager runs already", where="start")
        self._stopping = self._error = None
        self._thread = threading.Thread(target=self._run, name="continuous-batching", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Whether requests are being answered."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self, block: bool = True, timeout: float | None = None, *, hard_stop: bool = False) -> None:
        """Take no more requests, and end when those taken are answered.

        Args:
            block: Wait for that.
            timeout: Seconds to wait at most; None for no bound.
            hard_stop: End after the current step; what is not answered fails.
        """
        with self._changed:
            self._stopping = not hard_stop
            self._changed.notify_all()
        if block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended.

        Args:
            timeout: Seconds to wait at most; None for no bound.
        """
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("Requests are still being answered after %s seconds.", timeout)

    # -- requests --------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: Prompt,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> str:
        """Add a request; return its name.

        Args:
            input_ids: The prompt: token ids, or a text where there is a tokenizer.
            request_id: Its name; None for one that is made up.
            max_new_tokens: As the field of `GenerationConfig`; None for that of all.
            streaming: Hand out the answer so far after every token.
            record_timestamps: Note when each token came.
            eos_token_id: Tokens that end it; None for those of all.
            seed: Makes sampling repeatable.
            **settings: Further fields of `GenerationConfig` for this request.

        Raises:
            GenerationError: the prompt or a setting cannot work, or the manager is stopping.
        """
        settings |= {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        settings |= {} if eos_token_id is None else {"eos_token_id": eos_token_id}
        with self._changed:
            self._refuse_late()
            row = self._requests.row(
                input_ids,
                request_id,
                seed=seed,
                streaming=streaming,
                record_timestamps=record_timestamps,
                **settings,
            )
            self.engine.check(row)
            while self._bound and self.is_running() and self._waiting() >= self._bound:
                self._changed.wait(0.1)
                self._refuse_late()
            self._new.append(row)
            self._changed.notify_all()
        return row.output.request_id

    def add_requests(
        self, inputs: Iterable[Prompt], max_new_tokens: int | None = None, **settings: Any
    ) -> list[str]:
        """Add requests with the same settings; return their names, in order.

        Args:
            inputs: The prompts.
            max_new_tokens: As for `add_request`.
            **settings: As for `add_request`.
        """
        return [self.add_request(one, max_new_tokens=max_new_tokens, **settings) for one in inputs]

    def cancel_request(self, request_id: str) -> None:
        """End a request; what there is of its answer is handed out as cancelled.

        Args:
            request_id: Its name; nothing happens where it is finished already.
        """
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify_all()

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Hand one request's answers to a function instead of the queue.

        Args:
            request_id: Its name.
            callback: Called in the manager's thread; one that raises is dropped.
        """
        with self._changed:
            self._handlers[request_id] = callback

    # -- results ---------------------------------------------------------------------------------

    def get_result(
        self, request_id: str | None = None, timeout: float | None = None
    ) -> GenerationOutput | None:
        """Return the next answer; None where none comes any more, or in time.

        Args:
            request_id: Wait for the answer to this request; None for any.
            timeout: Seconds to wait at most; None for no bound.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                for index, result in enumerate(self._results):
                    if request_id is None or result.request_id == request_id:
                        del self._results[index]
                        return result
                left = None if until is None else until - time.monotonic()
                if not self.is_running() or (left is not None and left <= 0):
                    return None
                # Woken from time to time, for a thread that died cannot notify.
                self._changed.wait(0.2 if left is None else min(left, 0.2))

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Yield answers as they come, until the manager has stopped."""
        while (result := self.get_result()) is not None:
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Yield what comes for one request, until it is finished.

        Args:
            request_id: Its name.
        """
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    # -- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._take()
                while self.engine.is_idle and self._stopping is None:
                    self._changed.wait()
                    self._take()
                if self.engine.is_idle or self._stopping is False:
                    self._deliver(self.engine.fail_all(_stopped()))
                    return
            try:
                rows = self.engine.step()
            except Exception as error:
                logger.exception("A step failed; the requests that were running are lost.")
                rows = self.engine.fail_all(error)
            with self._changed:
                self._deliver(rows)

    def _take(self) -> None:
        """Take over what was added and cancelled."""
        while self._new:
            self.engine.add(self._new.popleft())
        gone = [self.engine.cancel(name) for name in self._cancelled]
        self._cancelled.clear()
        self._deliver([row for row in gone if row is not None])

    def _deliver(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.output.is_finished():
                result = self._requests.finish(row)
            elif row.streaming:
                result = row.copy_of_output()
            else:
                continue
            handler = self._handlers.get(result.request_id)
            if handler is None:
                self._results.append(result)
                continue
            try:
                handler(result)
            except Exception:
                logger.exception("The handler of request %s failed.", result.request_id)
            if result.is_finished():
                del self._handlers[result.request_id]
        self._changed.notify_all()

    def _waiting(self) -> int:
        return len(self._new) + len(self.engine.waiting)

    def _refuse_late(self) -> None:
        if self._stopping is not None:
            raise GenerationError(
                "The manager takes no more requests",
                where="add_request",
                mend="It was stopped; make another one with init_continuous_batching().",
            )


def _stopped() -> GenerationError:
    return GenerationError("The manager was stopped before the answer was whole")
