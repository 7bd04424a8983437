# SPDX-License-Identifier: Apache-2.0
"""``pretrained plan MODEL``: where a model's weights would live, from headers or the config alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_key_map
from pretrained.arch.skeletons import architecture_of, config_of, policy_for, skeleton_for, workload_for
from pretrained.core.budgets import CPU, DISK, Home, available_host_memory, parse_budget_text
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import CONFIG_NAME, PreTrainedConfig, read_json_object
from pretrained.core.device_map import check_device_map
from pretrained.core.dtypes import DTYPES, floating_dtype_name
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.homes import Placement
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.placement import STRATEGIES, Workload, plan_placement
from pretrained.core.plan import LoadPlan, LoadPolicy, plan_load
from pretrained.core.plan_picture import draw
from pretrained.core.quantization import QuantizationConfig, planned_nbytes
from pretrained.core.report import fold_keys, format_bytes
from pretrained.core.skeleton import Skeleton
from pretrained.core.units import weight_sizes
from pretrained.errors import ArgumentError, FileError, PlacementError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, weights file or hub id")
    parser.add_argument(
        "--device-map",
        default="auto",
        metavar="MAP",
        help="auto, balanced, balanced_low_0, sequential, or a map as JSON",
    )
    parser.add_argument(
        "--max-memory", metavar="BUDGETS", help="such as 0=10GiB,1=10GiB,cpu=30GiB (default: this machine's)"
    )
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default), bfloat16, float16 or auto (the file's own)"
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantize while loading")
    parser.add_argument("--batch", type=int, metavar="N", help="rows to keep room for, with --context (1)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a row to keep room for: key-value cache, activations"
    )
    parser.add_argument("--architecture", metavar="CLASS", help="model class instead of the config's")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the placement into a file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(execute=plan)


@dataclass(frozen=True, slots=True)
class _Model:
    """What is known of a model before it is loaded.

    Attributes:
        config: Its config.
        name: Its class.
        skeleton: What it promises.
        dtype: Dtype to load as; None keeps the files' own.
        files: What a load would read; None where there is a config only.
        notes: What the files say against the config.
    """

    config: PreTrainedConfig
    name: str
    skeleton: Skeleton
    dtype: str | None
    files: LoadPlan | None
    notes: tuple[str, ...] = ()


def plan(options: argparse.Namespace) -> int:
    """Print where a model's weights would live.

    Args:
        options: The parsed arguments.
    """
    model = _read(options)
    placement = _placement(model, options)
    if options.svg is not None:
        title = f"{options.model}: {model.name}"
        options.svg.write_text(draw(placement, title), encoding="utf-8")
    if options.json:
        facts = {"model": str(options.model), "architecture": model.name, **placement.to_dict()}
        print(json.dumps(facts, indent=2))
        return 0
    dtype = model.dtype or "the files' own dtypes"
    scheme = f", {options.quantize} in the blocks" if options.quantize else ""
    count = f"{model.skeleton.num_parameters:,} parameters"
    print(f"{options.model}: {model.name}, {count}, {dtype}{scheme}, {placement.strategy}\n")
    print(placement)
    if options.svg is not None:
        print(f"picture: {options.svg}")
    return 0


def _read(options: argparse.Namespace) -> _Model:
    source = resolve(options.model, HubOptions(revision=options.revision or "main"))
    checkpoint = _checkpoint(source, options.gguf_file)
    if checkpoint is not None and checkpoint.format == "gguf":
        values = gguf_config(checkpoint.metadata, checkpoint.tensors)
    elif source.kind == "file" and source.path is not None and source.path.suffix == ".json":
        values = read_json_object(source.path)
    else:
        values = read_json_object(source.require(CONFIG_NAME))
    config = config_of(values, where=source)
    name = architecture_of(config, options.architecture)
    skeleton = skeleton_for(config, name)
    dtype = _dtype(options.dtype, config, checkpoint)
    if checkpoint is None:
        return _Model(config, name, skeleton, dtype, None)
    # Missing weights and other shapes are what a load reports; here they only cost their bytes.
    policy = replace(policy_for(config, dtype), allow_missing=True, ignore_mismatched_sizes=True)
    layouts = None
    if checkpoint.format == "gguf":
        layouts = gguf_key_map(gguf_architecture(checkpoint.metadata), values, checkpoint.tensors)
    files = plan_load(checkpoint, skeleton, policy, layouts=layouts)
    return _Model(config, name, skeleton, dtype, files, _file_notes(files))


def _checkpoint(source: Source, gguf_file: str | None) -> Checkpoint | None:
    """Return the headers of local weights; None where there are none, or only on the hub."""
    if source.kind == "hub":
        return None
    if source.kind == "file" and source.path is not None:
        return None if source.path.suffix == ".json" else open_checkpoint(source.path)
    try:
        return open_checkpoint(find_weights(source.folder, gguf_file=gguf_file))
    except FileError:
        if gguf_file is not None or not (source.folder / CONFIG_NAME).is_file() or _has_weights(source):
            raise
        return None


def _has_weights(source: Source) -> bool:
    endings = (".safetensors", ".bin", ".gguf", ".index.json", ".h5", ".msgpack")
    return any(name.endswith(endings) for name in source.listing())


def _dtype(wanted: str, config: PreTrainedConfig, checkpoint: Checkpoint | None) -> str | None:
    if wanted != "auto":
        return floating_dtype_name(wanted)
    if config.dtype is not None and (checkpoint is None or checkpoint.format != "gguf"):
        return config.dtype
    stored = (info.dtype for info in checkpoint.tensors.values()) if checkpoint is not None else ()
    return next((name for name in stored if name in DTYPES and DTYPES[name].is_floating), "float32")


def _file_notes(files: LoadPlan) -> tuple[str, ...]:
    notes = []
    if files.missing:
        notes.append(f"the files lack {', '.join(fold_keys(files.missing)[:5])}")
    if files.mismatched:
        names = [key for key, _, _ in files.mismatched]
        notes.append(f"the files hold other shapes of {', '.join(fold_keys(names)[:5])}")
    return tuple(notes)


def _placement(model: _Model, options: argparse.Namespace) -> Placement:
    policy = policy_for(model.config, model.dtype)
    stored = {step.key: step.source.dtype for step in model.files.steps} if model.files else None
    sizes = _sizes(model.skeleton, policy, stored, options.quantize)
    budgets, note = _budgets(options.max_memory)
    if model.files is not None:
        to_read = model.files.nbytes_to_read
    else:
        # What is not there yet is taken to be stored as it is loaded, before any quantization.
        plain = weight_sizes(model.skeleton, policy)
        to_read = sum(plain[key] for key in model.skeleton.params if key not in model.skeleton.ties)
    workload = _workload(model, options)
    found = _decide(options.device_map, model.skeleton, sizes, budgets, workload, to_read)
    return replace(found, notes=(*found.notes, *model.notes, *note))


def _workload(model: _Model, options: argparse.Namespace) -> Workload | None:
    if options.context is None:
        if options.batch is not None:
            raise ArgumentError(
                "Rows of how many tokens?",
                where="--batch",
                mend="Say it with --context, such as --context 2048.",
            )
        return None
    return workload_for(
        model.config,
        model.skeleton,
        batch=1 if options.batch is None else options.batch,
        context=options.context,
        dtype=model.dtype or "float32",
    )


def _sizes(
    skeleton: Skeleton, policy: LoadPolicy, stored: Mapping[str, str] | None, quantize: str | None
) -> dict[str, int]:
    plain = weight_sizes(skeleton, policy, stored=stored)
    if quantize is None:
        return plain
    config = QuantizationConfig(quant_method=quantize)
    return {**plain, **planned_nbytes(skeleton, config, lambda spec: plain[spec.key])}


def _budgets(text: str | None) -> tuple[dict[Home, int | None], tuple[str, ...]]:
    if text is not None:
        return parse_budget_text(text), ()
    left = available_host_memory()
    found = "no limit" if left is None else format_bytes(left)
    note = f"accelerators are not looked for; planned for this machine's free memory ({found}) and disk"
    return {CPU: left, DISK: None}, (note,)


def _decide(
    word: str,
    skeleton: Skeleton,
    sizes: Mapping[str, int],
    budgets: Mapping[Home, int | None],
    workload: Workload | None,
    bytes_to_read: int,
) -> Placement:
    if word in STRATEGIES:
        return plan_placement(
            skeleton, sizes, budgets, strategy=word, workload=workload, bytes_to_read=bytes_to_read
        )
    given = _given_map(word)
    # A device that the map names and no budget limits is taken to be there.
    homes: dict[Home, int | None] = dict(budgets)
    return check_device_map(
        skeleton, given, homes, sizes=sizes, workload=workload, bytes_to_read=bytes_to_read
    )


def _given_map(word: str) -> dict[str, Any]:
    if word.lstrip().startswith("{"):
        try:
            value = json.loads(word)
        except ValueError as error:
            raise PlacementError(
                "The device map is not JSON",
                where="--device-map",
                found=str(error),
                mend='Quote it for the shell: \'{"encoder": 0, "decoder": "cpu"}\'.',
            ) from error
        return dict(value)
    if word in (CPU, DISK) or word.isdecimal() or ":" in word or word == "cuda":
        return {"": word}
    raise ArgumentError(
        f"Unknown way to place a model: {word!r}",
        where="--device-map",
        expected=f"{', '.join(STRATEGIES)}, a device, or a map as JSON",
        mend=did_you_mean(word, STRATEGIES) or None,
    )
