# SPDX-License-Identifier: Apache-2.0
"""``pretrained run MODEL --input FILE --output FILE``: answer a file of prompts, together."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrained.cli.answers import AnswerFile, Question, read_questions
from pretrained.cli.console import Figures, peak_memory_bytes
from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.progress import counting
from pretrained.core.report import format_bytes
from pretrained.errors import ArgumentError, PretrainedError, TokenizerError
from pretrained.torch.generation.batch_requests import GenerationOutput

# Seconds between lines of progress where there is no terminal to draw a bar on.
_SAY_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments about files of prompts.

    Args:
        parser: A verb's own.
    """
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--input", metavar="FILE", help='JSONL: a line {"prompt": ...} or {"messages": [...]} for each answer'
    )
    group.add_argument(
        "--output", metavar="FILE", help="JSONL to add the answers to; what it has already is not done again"
    )
    group.add_argument("--strict", action="store_true", help="stop at a line that cannot be answered")
    group.add_argument("--rows", type=int, metavar="N", help="prompts answered at once (default 64)")
    group.add_argument("--cache-memory", metavar="SIZE", help="most memory for keys and values, such as 2GiB")


def check_arguments(options: argparse.Namespace) -> None:
    """Raise where the arguments about files do not go together.

    Args:
        options: The parsed arguments.

    Raises:
        ArgumentError: they do not.
    """
    if options.input is None or options.output is None:
        given, lacks = ("--output", "--input") if options.input is None else ("--input", "--output")
        raise ArgumentError(f"{given} needs {lacks}", where=given, mend="Give both.")
    if options.prompt is not None:
        raise ArgumentError("A PROMPT and --input are two ways to ask", where="PROMPT", mend="Give one.")


def run_many(options: argparse.Namespace, load: Any, generation: Mapping[str, Any]) -> int:
    """Answer the prompts of a file.

    Args:
        options: The parsed arguments.
        load: Loads model and tokenizer, given `options` and `Figures`.
        generation: Arguments of `generate` that the call asked for.
    """
    check_arguments(options)
    source = Path(options.input)
    total, faults = _survey(source)
    if faults and options.strict:
        for question in faults:
            _tell(source, question.line, question.fault)
        raise ArgumentError(
            f"{len(faults)} of {total} lines cannot be used",
            where=source,
            mend="Mend them, or leave --strict out.",
        )
    drawn = {"seed": secrets.randbelow(2**31)} if generation.get("do_sample") else {}
    answers = AnswerFile(Path(options.output), source, _settings(options, generation), drawn)
    try:
        left = total - len(answers.done)
        if not left:
            _say(options, f"all {total} lines are answered already")
            return 0
        for question in faults:
            if question.line not in answers.done:
                _tell(source, question.line, question.fault)
        if answers.done:
            _say(options, f"{len(answers.done)} of {total} lines are answered already")
        figures = Figures()
        model, tokenizer = load(options, figures)
        _answer(model, tokenizer, options, generation, source, answers, total)
    except KeyboardInterrupt:
        print(f"\n{len(answers.done)} of {total} lines are answered; run it again to go on", file=sys.stderr)
        raise
    finally:
        answers.close()
    return 0


def _survey(source: Path) -> tuple[int, list[Question]]:
    """Return how many lines there are to answer, and those that cannot be."""
    total, faults = 0, []
    for question in read_questions(source):
        total += 1
        if question.fault is not None:
            faults.append(question)
    if not total:
        raise ArgumentError(
            "There are no prompts", where=source, mend='Write one JSON object a line: {"prompt": "..."}'
        )
    return total, faults


def _settings(options: argparse.Namespace, generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides about the answers, as plain values."""
    found = {
        "model": options.model,
        "revision": options.revision,
        "gguf_file": options.gguf_file,
        "dtype": options.dtype,
        "quantize": getattr(options, "quantize", None),
        "packed": getattr(options, "packed", None) or None,
        "system": options.system,
        "raw": options.raw or None,
        **generation,
        "seed": options.seed,
    }
    return {name: value for name, value in found.items() if value is not None}


class _Run:
    """A run over one input: asks, notes answers, counts.

    Args:
        options: The parsed arguments.
        source: The input.
        answers: Filled.
        tokenizer: Of the model.
    """

    def __init__(
        self, options: argparse.Namespace, source: Path, answers: AnswerFile, tokenizer: Any
    ) -> None:
        self.options, self.source, self.answers, self.tokenizer = options, source, answers, tokenizer
        self.tokens = self.failed = 0
        self._asked: dict[str, Question] = {}

    def requests(self) -> Iterator[dict[str, Any]]:
        """Yield what is not answered yet, as `iter_batch` takes it."""
        seed = int(self.answers.settings.get("seed", 0))
        for question in read_questions(self.source):
            if question.line in self.answers.done:
                continue
            if question.fault is not None:
                self.failed += 1
                self.answers.add(question.answered(error=question.fault))
                continue
            try:
                ids = _ids(self.tokenizer, question, self.options)
            except PretrainedError as error:
                self.fail(question, str(error))
                continue
            name = str(question.line)
            self._asked[name] = question
            # A seed for each line, so that its answer depends neither on what runs beside it nor on when.
            yield {"prompt": ids, "request_id": name, "seed": seed + question.line, **question.settings}

    def take(self, output: GenerationOutput) -> None:
        """Note an answer.

        Args:
            output: As `iter_batch` yielded it.
        """
        question = self._asked.pop(output.request_id)
        if output.error is not None:
            self.fail(question, output.error)
            return
        self.tokens += len(output.generated_tokens)
        self.answers.add(
            question.answered(
                answer=output.text, num_tokens=len(output.generated_tokens), finish=output.finish_reason
            )
        )

    def fail(self, question: Question, fault: str) -> None:
        """Note that a line has no answer, and why.

        Args:
            question: The line.
            fault: What was wrong.

        Raises:
            ArgumentError: with --strict.
        """
        if self.options.strict:
            raise ArgumentError(
                f"A line cannot be answered: {fault}",
                where=f"{self.source}:{question.line}",
                mend="Mend it, or leave --strict out.",
            )
        self.failed += 1
        _tell(self.source, question.line, fault)
        self.answers.add(question.answered(error=fault))


def _answer(
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    generation: Mapping[str, Any],
    source: Path,
    answers: AnswerFile,
    total: int,
) -> None:
    """Answer what is left."""
    run = _Run(options, source, answers, tokenizer)
    batching = ContinuousBatchingConfig(max_requests_per_batch=options.rows, max_memory=options.cache_memory)
    started = said = time.perf_counter()
    shown = not options.quiet and sys.stderr.isatty()
    with counting(total, "line", shown=shown, start=len(answers.done)) as advance:
        for output in model.iter_batch(
            run.requests(), continuous_batching_config=batching, tokenizer=tokenizer, **generation
        ):
            run.take(output)
            advance()
            if not shown and time.perf_counter() - said > _SAY_S:
                said = time.perf_counter()
                _say(options, f"{len(answers.done)} of {total} lines answered")
    seconds = time.perf_counter() - started
    lost = f", {run.failed} of them with an error" if run.failed else ""
    _say(
        options,
        f"{len(answers.done)} of {total} lines answered{lost}, {run.tokens} tokens at "
        f"{run.tokens / seconds:.1f} a second, {format_bytes(peak_memory_bytes())} of memory at most",
    )


def _ids(tokenizer: Any, question: Question, options: argparse.Namespace) -> list[int]:
    """Return a question as token ids, by the chat template where there is one."""
    messages, prompt = question.content.get("messages"), question.content.get("prompt")
    chats = tokenizer.chat_template and not options.raw
    system = [{"role": "system", "content": options.system}] if options.system else []
    if messages is not None and not chats:
        raise TokenizerError(
            "Messages are for a chat template, which --raw leaves out"
            if options.raw
            else "Messages need a chat template, and this model has none",
            where='"messages"',
            mend='Write {"prompt": "..."} instead.',
        )
    if not chats:
        text = f"{options.system}\n\n{prompt}" if options.system else prompt
        return [int(one) for one in tokenizer(text)["input_ids"]]
    whole = messages if messages is not None else [{"role": "user", "content": prompt}]
    if whole[0].get("role") != "system":
        whole = [*system, *whole]
    return [int(one) for one in tokenizer.apply_chat_template(whole, add_generation_prompt=True)]


def _tell(source: Path, line: int, fault: str | None) -> None:
    print(f"{source}:{line}: {fault}", file=sys.stderr)


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(f"({text})", file=sys.stderr)
