# SPDX-License-Identifier: Apache-2.0
"""``pretrained plan MODEL``: where a model's weights would live, from headers or the config alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_key_map
from pretrained.arch.skeletons import architecture_of, config_of, policy_for, skeleton_for, workload_for
from pretrained.cli.placing import (
    add_quantization_arguments,
    device_map_of,
    machine_budgets,
    quantization_of,
)
from pretrained.core.budgets import Home, parse_budget_text
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import CONFIG_NAME, PreTrainedConfig, read_json_object
from pretrained.core.device_map import check_device_map
from pretrained.core.dtypes import DTYPES, floating_dtype_name
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.homes import Placement
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.placement import Workload, plan_placement
from pretrained.core.plan import LoadPlan, LoadPolicy, plan_load
from pretrained.core.plan_picture import draw
from pretrained.core.quantization import QuantizationConfig, planned_nbytes
from pretrained.core.quantized_files import block_sizes, split_quantized
from pretrained.core.report import fold_keys
from pretrained.core.skeleton import Skeleton
from pretrained.core.units import weight_sizes
from pretrained.errors import ArgumentError, CheckpointError, FileError


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
    add_quantization_arguments(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="rows to keep room for, with --context (1)")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens a row to keep room for: key-value cache, activations"
    )
    parser.add_argument("--architecture", metavar="CLASS", help="model class instead of the config's")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--offline", action="store_true", help="use local files and the download cache only")
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
        special: Bytes of the weights that the files hold quantized.
        notes: What the files say against the config.
    """

    config: PreTrainedConfig
    name: str
    skeleton: Skeleton
    dtype: str | None
    files: LoadPlan | None
    special: Mapping[str, int] = field(default_factory=dict)
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
    scheme = f", {options.quantize} in the blocks" if options.quantize else ", packed" * options.packed
    count = f"{model.skeleton.num_parameters:,} parameters"
    print(f"{options.model}: {model.name}, {count}, {dtype}{scheme}, {placement.strategy}\n")
    print(placement)
    if options.svg is not None:
        print(f"picture: {options.svg}")
    return 0


def _read(options: argparse.Namespace) -> _Model:
    hub = HubOptions(revision=options.revision or "main", local_files_only=options.offline)
    source = resolve(options.model, hub)
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
    special: dict[str, int] = {}
    if values.get("quantization_config") and checkpoint.format != "gguf":
        checkpoint, special = split_quantized(checkpoint, skeleton, policy)
    files = plan_load(checkpoint, skeleton, policy, layouts=layouts)
    return _Model(config, name, skeleton, dtype, files, special, _file_notes(files, skeleton, special))


def _checkpoint(source: Source, gguf_file: str | None) -> Checkpoint | None:
    """Return the headers of weights that are here; None where there are none, or only on the hub."""
    if source.kind == "hub":
        return _cached(source, gguf_file)
    if source.kind == "file" and source.path is not None:
        return None if source.path.suffix == ".json" else open_checkpoint(source.path)
    try:
        return open_checkpoint(find_weights(source.folder, gguf_file=gguf_file))
    except FileError:
        if gguf_file is not None or not (source.folder / CONFIG_NAME).is_file() or _has_weights(source):
            raise
        return None


def _cached(source: Source, gguf_file: str | None) -> Checkpoint | None:
    """Return the headers of a repository's weights if the download cache holds all; a plan fetches none."""
    try:
        return open_checkpoint(find_weights(source.folder, gguf_file=gguf_file))
    except (FileError, CheckpointError) as error:
        if gguf_file is None and source.file(CONFIG_NAME, required=False) is not None:
            return None
        raise FileError(
            "The weights are not in the download cache, and what a GGUF model is stands in them alone",
            where=source.name,
            found=str(error.found or error),
            mend="Fetch them first, such as with: pretrained inspect",
        ) from error


def _has_weights(source: Source) -> bool:
    endings = (".safetensors", ".bin", ".gguf", ".index.json", ".h5", ".msgpack")
    return any(name.endswith(endings) for name in source.listing())


def _dtype(wanted: str, config: PreTrainedConfig, checkpoint: Checkpoint | None) -> str | None:
    if wanted != "auto":
        return floating_dtype_name(wanted)
    if checkpoint is not None and checkpoint.format == "gguf":
        return "float32"
    if config.dtype is not None:
        return config.dtype
    stored = (info.dtype for info in checkpoint.tensors.values()) if checkpoint is not None else ()
    return next((name for name in stored if name in DTYPES and DTYPES[name].is_loadable), "float32")


def _file_notes(files: LoadPlan, skeleton: Skeleton, special: Mapping[str, int]) -> tuple[str, ...]:
    notes = []
    if special:
        notes.append(f"{len(special)} weights are quantized in the files, and counted as they lie there")
    missing = [key for key in files.missing if skeleton.ties.get(key, key) not in special]
    if missing:
        notes.append(f"the files lack {', '.join(fold_keys(missing)[:5])}")
    if files.mismatched:
        names = [key for key, _, _ in files.mismatched]
        notes.append(f"the files hold other shapes of {', '.join(fold_keys(names)[:5])}")
    return tuple(notes)


def _placement(model: _Model, options: argparse.Namespace) -> Placement:
    policy = policy_for(model.config, model.dtype)
    stored = {step.key: step.source.dtype for step in model.files.steps} if model.files else None
    sizes = _sizes(model, policy, stored, options)
    notes = list(model.notes)
    if options.max_memory is None:
        budgets, note = machine_budgets()
        notes.append(note)
    else:
        budgets = parse_budget_text(options.max_memory)
    if model.files is not None:
        to_read = model.files.nbytes_to_read + sum(model.special.values())
    else:
        as_stored = model.config.dtype or model.dtype or "float32"
        plain = weight_sizes(model.skeleton, LoadPolicy(dtype=as_stored))
        to_read = sum(plain[key] for key in model.skeleton.params if key not in model.skeleton.ties)
        notes.append(f"no weights are here: they are taken to be stored as {as_stored}")
    workload = _workload(model, options)
    found = _decide(device_map_of(options.device_map), model.skeleton, sizes, budgets, workload, to_read)
    return replace(found, notes=(*found.notes, *notes))


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
    model: _Model, policy: LoadPolicy, stored: Mapping[str, str] | None, options: argparse.Namespace
) -> dict[str, int]:
    """Return the bytes of each weight once it is loaded."""
    special = dict(model.special)
    wanted = quantization_of(options)
    if wanted is not None and special:
        raise ArgumentError(
            "The checkpoint is quantized already",
            where="--packed" if options.packed else "--quantize",
            mend="Leave it out, or plan for the unquantized checkpoint.",
        )
    if options.packed and model.files is not None:
        special = block_sizes(model.files, model.skeleton)
    if options.packed and not special:
        raise ArgumentError(
            "There are no blocks to keep packed",
            where="--packed",
            expected="a GGUF file of a quantized model",
            mend="Leave it out, or use --quantize int8 or int4.",
        )
    plain = weight_sizes(model.skeleton, policy, stored=stored, nbytes=lambda key, _: special.get(key))
    if options.quantize is None:
        return plain
    config = QuantizationConfig(quant_method=options.quantize)
    return {**plain, **planned_nbytes(model.skeleton, config, lambda spec: plain[spec.key])}


def _decide(
    wanted: str | dict[str, Any],
    skeleton: Skeleton,
    sizes: Mapping[str, int],
    budgets: Mapping[Home, int | None],
    workload: Workload | None,
    bytes_to_read: int,
) -> Placement:
    if isinstance(wanted, str):
        return plan_placement(
            skeleton, sizes, budgets, strategy=wanted, workload=workload, bytes_to_read=bytes_to_read
        )
    return check_device_map(
        skeleton, wanted, budgets, sizes=sizes, workload=workload, bytes_to_read=bytes_to_read
    )
