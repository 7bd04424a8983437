# SPDX-License-Identifier: Apache-2.0
"""Streamers: they are given the tokens as they come and hand on text that will not change any more."""

from __future__ import annotations

import asyncio
import itertools
import queue
import unicodedata
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from pretrained.errors import GenerationError


class BaseStreamer:
    """What `generate(streamer=...)` calls. The prompt comes first, in one piece."""

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens.

        Args:
            value: The prompt, [rows, length], or each row's new token, [rows]; on the CPU.
        """
        raise NotImplementedError(f"{type(self).__name__} must define put")

    def end(self) -> None:
        """Learn that there are no more."""
        raise NotImplementedError(f"{type(self).__name__} must define end")

    def fail(self, error: BaseException) -> None:
        """Learn that generation raised; the same as `end` unless a streamer has someone to tell.

        Args:
            error: What it raised.
        """
        self.end()


class TextStreamer(BaseStreamer):
    """Prints text as soon as whole words are there. One row only.

    Args:
        tokenizer: Anything with ``decode(list of ids, **decode_kwargs) -> str``.
        skip_prompt: Leave out the prompt.
        **decode_kwargs: Passed to `decode`, such as ``skip_special_tokens=True``.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._ids: list[int] = []
        # How much of the text of these was handed on, and what it was.
        self._sent = 0
        self._said = ""
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens and hand on the text that they settle.

        Args:
            value: [1, length] or [1] token ids, on the CPU.

        Raises:
            GenerationError: more than one row.
        """
        if value.dim() > 1 and value.shape[0] > 1:
            raise GenerationError(
                "This streamer takes one row",
                where="streamer",
                found=f"batch {value.shape[0]}",
                mend="Call generate for one prompt at a time, or derive from BaseStreamer.",
            )
        if self._prompt_is_next:
            self._prompt_is_next = False
            if self.skip_prompt:
                return
        self._ids.extend(value.reshape(-1).tolist())
        text = self._text()
        self._step_back(text)
        ready = _settled(text)
        if ready > self._sent:
            self.on_finalized_text(text[self._sent : ready])
            self._sent, self._said = ready, text[:ready]
        if text.endswith("\n"):
            # Nothing after a line's end changes what is before it: start over, so that decoding stays short.
            # One token stays: some tokenizers drop a space at the very beginning.
            self._ids = self._ids[-1:]
            self._said = self._text()
            self._sent = len(self._said)

    def end(self) -> None:
        """Hand on the rest."""
        rest = ""
        if self._ids:
            text = self._text()
            self._step_back(text)
            rest = text[self._sent :]
        self._ids, self._sent, self._said, self._prompt_is_next = [], 0, "", True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Do something with text that will not change: here, print it.

        Args:
            text: The new text.
            stream_end: Whether it is the last.
        """
        print(text, flush=True, end="\n" if stream_end else "")

    def _step_back(self, text: str) -> None:
        """Go on from where the text is still the same: some decoders take a space back before a full stop."""
        if not text.startswith(self._said):
            same = zip(text, self._said, strict=False)
            self._sent = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same))
            self._said = text[: self._sent]

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._ids, **self.decode_kwargs))


def _settled(text: str) -> int:
    """Return how much of a text later tokens cannot change: whole words, lines, and CJK characters."""
    if text.endswith("\n"):
        return len(text)
    # Scripts without spaces: each character stands for itself.
    if text and unicodedata.east_asian_width(text[-1]) == "W":
        return len(text)
    return text.rfind(" ") + 1


class TextIteratorStreamer(TextStreamer):
    """Iterates over the text while `generate` runs in another thread.

    Args:
        tokenizer: Anything with ``decode(list of ids, **decode_kwargs) -> str``.
        skip_prompt: Leave out the prompt.
        timeout: Seconds to wait for the next piece before ``queue.Empty`` is raised; None to wait forever.
        **decode_kwargs: Passed to `decode`.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put text into the queue.

        Args:
            text: The new text.
            stream_end: Whether it is the last.
        """
        self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def fail(self, error: BaseException) -> None:
        """Let the iteration raise what `generate` raised.

        Args:
            error: What it raised.
        """
        self.text_queue.put(error)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        value = self.text_queue.get(timeout=self.timeout)
        if value is None:
            raise StopIteration
        if isinstance(value, BaseException):
            raise value
        return value


class AsyncTextIteratorStreamer(TextStreamer):
    """Iterates asynchronously over the text while `generate` runs in another thread.

    It must be made inside a coroutine, as it belongs to that coroutine's event loop.

    Args:
        tokenizer: Anything with ``decode(list of ids, **decode_kwargs) -> str``.
        skip_prompt: Leave out the prompt.
        timeout: Seconds to wait for the next piece before ``TimeoutError``; None to wait forever.
        **decode_kwargs: Passed to `decode`.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Put text into the queue, from whichever thread.

        Args:
            text: The new text.
            stream_end: Whether it is the last.
        """
        self._send(text)
        if stream_end:
            self._send(None)

    def fail(self, error: BaseException) -> None:
        """Let the iteration raise what `generate` raised.

        Args:
            error: What it raised.
        """
        self._send(error)

    def _send(self, value: str | BaseException | None) -> None:
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, value)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            value = await self.text_queue.get()
        if value is None:
            raise StopAsyncIteration
        if isinstance(value, BaseException):
            raise value
        return value
