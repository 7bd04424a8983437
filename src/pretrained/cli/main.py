# SPDX-License-Identifier: Apache-2.0
"""``pretrained``: the command line's verbs and how they fail."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from pretrained import __version__
from pretrained.cli.console import paragraph
from pretrained.errors import PretrainedError

# Verb -> (module, one line). A verb's module is imported when it is asked for: `inspect` needs no framework.
_VERBS = {
    "demo": ("pretrained.cli.demo", "fetch a small model and chat with it"),
    "run": ("pretrained.cli.run", "generate text with a model"),
    "inspect": ("pretrained.cli.inspect", "show what a model holds, from headers only"),
    "plan": ("pretrained.cli.plan", "show where a model's weights would live"),
    "convert": ("pretrained.cli.convert", "write a checkpoint in another format, dtype or number of files"),
    "doctor": ("pretrained.cli.doctor", "say what is wrong with a model's files or this machine"),
    "push": ("pretrained.cli.push", "upload a folder to the hub as one commit"),
}

_EXAMPLES = """\
examples:
  pretrained demo
  pretrained run ./my-model "What is the capital of France?"
  pretrained run model.gguf - < prompt.txt
  pretrained run ./my-model --input prompts.jsonl --output answers.jsonl
  pretrained inspect ./my-model
  pretrained plan ./my-model --max-memory 0=10GiB,cpu=30GiB --dtype bf16
  pretrained convert model.gguf ./my-model --dtype bf16
  pretrained doctor ./my-model
  pretrained push ./my-model me/my-model --private
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; None for those of this process.

    Returns:
        The exit code: 0, 1 after an error, 130 after an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        _top_parser().print_help()
        return 0
    if words[0] not in _VERBS:
        # Help, the version, or a word that is no verb: the last two end the program.
        _top_parser().parse_args(words)
        return 0
    # Intermixed, so that options may stand between MODEL and PROMPT.
    options = _verb_parser(words[0]).parse_intermixed_args(words[1:])
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pretrained").setLevel(logging.INFO if options.verbose else logging.NOTSET)
    try:
        code: int = options.execute(options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted.
        sys.stderr.close()
        return 0
    except (PretrainedError, OSError, ImportError, MemoryError) as error:
        if options.debug:
            raise
        print(paragraph(error), file=sys.stderr)
        return 1
    return code


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrained",
        description="Load, run, inspect and share pretrained models, from local files or the hub.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pretrained {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs", required=True)
    for name, (_, summary) in _VERBS.items():
        verbs.add_parser(name, help=summary)
    return parser


def _verb_parser(name: str) -> argparse.ArgumentParser:
    module, summary = _VERBS[name]
    parser = argparse.ArgumentParser(prog=f"pretrained {name}", description=f"{summary.capitalize()}.")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell what is done, and why")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    import_module(module).add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
