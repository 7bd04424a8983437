# SPDX-License-Identifier: Apache-2.0
"""``pretrained run MODEL PROMPT``: generate text and stream it, or answer a file of prompts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch

from pretrained.auto import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from pretrained.cli import run_many
from pretrained.cli.console import Figures
from pretrained.cli.placing import add_quantization_arguments, device_map_of, quantization_of
from pretrained.core.budgets import parse_budget_text
from pretrained.errors import ArgumentError, WeightsError
from pretrained.torch.generation.streamers import TextStreamer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument("model", metavar="MODEL", help="folder, weights file or hub id")
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text, or - to read standard input (the default)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, for models with a chat template")
    parser.add_argument("--raw", action="store_true", help="do not use the model's chat template")
    parser.add_argument("--quiet", action="store_true", help="print the answer only, no figures")
    add_loading_arguments(parser)
    add_generation_arguments(parser)
    run_many.add_arguments(parser)
    parser.set_defaults(execute=run)


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe how a model is loaded.

    Args:
        parser: A verb's own.
    """
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto (the file's own; default)"
    )
    add_quantization_arguments(group)
    group.add_argument(
        "--device-map", metavar="MAP", help="where the weights go: auto, cpu, cuda:0, or a map as JSON"
    )
    group.add_argument(
        "--max-memory",
        metavar="BUDGETS",
        help="such as 0=10GiB,cpu=30GiB; implies --device-map auto",
    )
    group.add_argument(
        "--offload-folder",
        metavar="FOLDER",
        help="for copies of weights on disk that cannot stay as they lie",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder or repository")
    group.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager or flash_attention_2")
    group.add_argument("--offline", action="store_true", help="use local files and the download cache only")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe how text is generated.

    Args:
        parser: A verb's own.
    """
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)"
    )
    group.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="flatten (>1) or sharpen (<1); implies --sample"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest; implies --sample")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest P of mass; implies --sample"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="least share of the likeliest's; implies --sample"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages repetition")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def run(options: argparse.Namespace) -> int:
    """Answer one prompt, or a file of them.

    Args:
        options: The parsed arguments.
    """
    if options.input is not None or options.output is not None:
        return run_many.run_many(options, load, _generation(options))
    prompt = sys.stdin.read() if options.prompt in (None, "-") else options.prompt
    if not prompt.strip():
        raise ArgumentError("The prompt is empty", where="PROMPT", mend="Give a text, or pipe one in.")
    figures = Figures()
    model, tokenizer = load(options, figures)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    answer(model, tokenizer, [*messages, {"role": "user", "content": prompt}], options, figures)
    if not options.quiet:
        print(f"({figures})", file=sys.stderr)
    return 0


def load(options: argparse.Namespace, figures: Figures) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        options: The parsed arguments.
        figures: Filled in.
    """
    started = time.perf_counter()
    hub = {
        "revision": options.revision,
        "local_files_only": options.offline or None,
        "gguf_file": options.gguf_file,
    }
    hub = {name: value for name, value in hub.items() if value is not None}
    config = AutoConfig.from_pretrained(options.model, **hub)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    wishes = {
        **_placement(options),
        "quantization_config": quantization_of(options),
        "attn_implementation": options.attn_implementation,
    }
    wishes = {name: value for name, value in wishes.items() if value is not None}
    model, info = auto_class.from_pretrained(
        options.model, config=config, dtype=options.dtype, output_loading_info=True, **hub, **wishes
    )
    if info["missing_keys"]:
        raise WeightsError(
            "This model has no trained language-model head, so it has nothing to say",
            where=options.model,
            found=f"no {info['missing_keys'][0]} in its files",
            mend="Use it in Python for what it was trained for, such as embeddings or classification.",
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model, **hub)
    figures.load_s = time.perf_counter() - started
    return model, tokenizer


def _placement(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` about where the weights go."""
    word = options.device_map
    if word is None and options.max_memory is not None:
        word = "auto"
    return {
        "device_map": None if word is None else device_map_of(word),
        "max_memory": None if options.max_memory is None else parse_budget_text(options.max_memory),
        "offload_folder": options.offload_folder,
    }


class _TimedStreamer(TextStreamer):
    """Prints as tokens come, and notes when."""

    def __init__(self, tokenizer: Any, figures: Figures, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.figures = figures
        self.started = time.perf_counter()
        self.first: float | None = None
        self.prompts = 1

    def put(self, value: torch.Tensor) -> None:
        if self.prompts:
            self.prompts -= 1
        else:
            now = time.perf_counter()
            self.first = self.first or now
            self.figures.num_tokens += 1
            self.figures.first_token_s = self.first - self.started
            self.figures.decode_s = now - self.first
        super().put(value)


def answer(
    model: Any,
    tokenizer: Any,
    messages: list[dict[str, str]],
    options: argparse.Namespace,
    figures: Figures,
) -> str:
    """Stream one answer to standard output and return it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        messages: The conversation so far.
        options: The parsed arguments.
        figures: Filled in.
    """
    figures.num_tokens = 0
    if tokenizer.chat_template and not options.raw:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        text = "\n\n".join(message["content"] for message in messages)
        inputs = tokenizer(text, return_tensors="pt")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    device = model.device
    inputs = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    prompt_length = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    streamer = _TimedStreamer(tokenizer, figures, skip_prompt=not model.config.is_encoder_decoder)
    output = model.generate(**inputs, streamer=streamer, **_generation(options))
    return str(tokenizer.decode(output[0][prompt_length:], skip_special_tokens=True))


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `generate` that the call asked for."""
    names = ("temperature", "top_k", "top_p", "min_p")
    sampling = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    wanted = {
        "max_new_tokens": options.max_new_tokens,
        "do_sample": bool(options.sample or sampling),
        **sampling,
    }
    if options.repetition_penalty is not None:
        wanted["repetition_penalty"] = options.repetition_penalty
    return wanted
