# SPDX-License-Identifier: Apache-2.0
"""``pretrained inspect MODEL``: what a model holds, from headers only, without a framework."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrained.arch.gguf import gguf_config
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.config import CONFIG_NAME, read_json_object
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.report import fold_keys, format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument("model", metavar="MODEL", help="folder, weights file or hub id")
    parser.add_argument("--variant", help="infix of the weights' file names, such as fp16")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(execute=inspect)


def inspect(options: argparse.Namespace) -> int:
    """Print what a model holds.

    Args:
        options: The parsed arguments.
    """
    source = resolve(options.model, HubOptions(revision=options.revision or "main"))
    checkpoint = _open(source, options)
    config = _config(source, checkpoint)
    facts = summary(config, checkpoint)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    _print(facts, options.model)
    if options.tensors:
        print()
        for info in checkpoint.tensors.values():
            print(
                f"{info.key}  {list(info.shape)}  {info.dtype}  {format_bytes(info.nbytes)}  {info.file.name}"
            )
    return 0


def summary(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a model holds, ready for JSON.

    Args:
        config: Content of its config.json, or what a GGUF file says; empty where there is none.
        checkpoint: What its files hold.
    """
    blocks: dict[str, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        blocks.setdefault(_block(info.key), []).append(info)
    return {
        "architecture": (config.get("architectures") or [None])[0],
        "model_type": config.get("model_type"),
        "format": checkpoint.format,
        "num_parameters": sum(info.num_elements for info in checkpoint.tensors.values()),
        "num_tensors": len(checkpoint.tensors),
        "nbytes": checkpoint.nbytes,
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values()).most_common()),
        "blocks": _folded(blocks),
        "files": {file.name: file.stat().st_size for file in checkpoint.files},
        "config": {name: config[name] for name in _SHOWN if config.get(name) is not None},
    }


_SHOWN = (
    "vocab_size", "hidden_size", "d_model", "n_embd", "dim",
    "num_hidden_layers", "num_layers", "n_layer", "n_layers",
    "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads",
    "intermediate_size", "d_ff", "max_position_embeddings", "n_positions",
)  # fmt: skip


def _open(source: Source, options: argparse.Namespace) -> Checkpoint:
    if source.kind == "file" and source.path is not None and source.path.name != CONFIG_NAME:
        return open_checkpoint(source.path)
    folder = source.weights_folder(variant=options.variant, gguf_file=options.gguf_file)
    return open_checkpoint(find_weights(folder, variant=options.variant, gguf_file=options.gguf_file))


def _config(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.format == "gguf":
        return gguf_config(checkpoint.metadata, checkpoint.tensors)
    file: Path | None = source.file(CONFIG_NAME, required=False)
    return {} if file is None else read_json_object(file)


def _block(key: str) -> str:
    """Return the path down to the first number in a key, or its first two parts."""
    numbered = re.match(r"(.*?\.\d+)\.", key)
    return numbered.group(1) if numbered else key.rpartition(".")[0] or key


def _folded(blocks: dict[str, list[TensorInfo]]) -> list[dict[str, Any]]:
    """Return a row for each group of blocks that differ in their number only."""
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name, infos in blocks.items():
        shape = re.sub(r"\.\d+$", ".{}", name)
        size = (shape, sum(i.num_elements for i in infos), sum(i.nbytes for i in infos))
        groups.setdefault(size, []).append(name)
    return [
        {"name": _one_name(names), "num_parameters": count * len(names), "nbytes": nbytes * len(names)}
        for (_, count, nbytes), names in groups.items()
    ]


def _one_name(names: Iterable[str]) -> str:
    return ", ".join(fold_keys(names))


def _print(facts: dict[str, Any], model: str) -> None:
    kind = facts["architecture"] or facts["model_type"] or "no config"
    print(f"{model}: {kind}, {facts['num_parameters']:,} parameters, {format_bytes(facts['nbytes'])}")
    if facts["config"]:
        print("  " + ", ".join(f"{name} {value}" for name, value in facts["config"].items()))
    print("  dtypes: " + ", ".join(f"{name} ({count} tensors)" for name, count in facts["dtypes"].items()))
    print("  files:  " + ", ".join(f"{name} ({format_bytes(size)})" for name, size in facts["files"].items()))
    width = max((len(row["name"]) for row in facts["blocks"]), default=0)
    print(f"\n{'block':<{width}}  {'parameters':>15}  {'bytes':>10}  share")
    for row in facts["blocks"]:
        share = row["nbytes"] / facts["nbytes"] if facts["nbytes"] else 0.0
        bar = "█" * round(20 * share)
        print(
            f"{row['name']:<{width}}  {row['num_parameters']:>15,}  {format_bytes(row['nbytes']):>10}  {bar}"
        )
