# SPDX-License-Identifier: Apache-2.0
"""``pretrained convert SRC DST``: a checkpoint in another format, dtype or number of files."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_dropped, gguf_key_map
from pretrained.arch.skeletons import config_of, policy_for, skeleton_for
from pretrained.cli.convert_gguf import METHODS, read_tokenizer, write_gguf
from pretrained.core import convert as core
from pretrained.core.atomic_files import write_text_atomically
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import CONFIG_NAME, PreTrainedConfig, read_json_object
from pretrained.core.dtypes import DTYPES, floating_dtype_name
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.plan import LoadPolicy
from pretrained.core.progress import reporting
from pretrained.core.registry import FAMILIES, model_type_of
from pretrained.core.report import format_bytes
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.core.torch_pickle import read_torch_checkpoint
from pretrained.core.untrusted import leads_out
from pretrained.core.weights_names import candidates
from pretrained.core.writer import ShardPlan, TensorSource, plan_shards
from pretrained.errors import (
    ArgumentError,
    FileError,
    MissingDependencyError,
    NotYetError,
    TokenizerError,
    did_you_mean,
)

_FORMATS: Final = ("safetensors", "pytorch", "gguf")
_LATER: Final = {
    "msgpack": "It comes with the release of the Flax backend.",
    "h5": "It comes with the release of the TensorFlow backend.",
}

_SHARD_SIZE: Final = "5GB"

# Files of a model's folder that go with its weights, whatever their format.
_CARRIED: Final = (
    "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt",
)  # fmt: skip
_TEMPLATES: Final = "additional_chat_templates/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments.

    Args:
        parser: The verb's own.
    """
    parser.add_argument("source", metavar="SRC", help="folder, weights file or hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make, or a name.gguf")
    parser.add_argument(
        "--to", metavar="FORMAT", help="safetensors (default), pytorch, or gguf (default for name.gguf)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: each tensor's own; GGUF blocks: float32)"
    )
    parser.add_argument(
        "--max-shard-size", default=_SHARD_SIZE, metavar="SIZE", help="most bytes of one file (5GB)"
    )
    parser.add_argument(
        "--quantize",
        metavar="METHOD",
        help="int8 or int4, layer by layer over the disk; for gguf q8_0, q4_0 or q4_1",
    )
    parser.add_argument(
        "--without-tokenizer", action="store_true", help="leave the tokenizer out of a GGUF file"
    )
    parser.add_argument("--force", action="store_true", help="replace the weights that DST holds")
    parser.add_argument("--variant", help="infix of the weights' file names in SRC, such as fp16")
    parser.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of a folder or repository")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--offline", action="store_true", help="use local files and the download cache only")
    parser.set_defaults(execute=convert)


@dataclass(slots=True)
class _Job:
    """A conversion on its way.

    Attributes:
        source: Where the old files are.
        checkpoint: Their headers.
        values: Content of config.json, or what a GGUF file says; empty where there is none.
        config: The same, typed; None where the architecture is not known.
        dtype: The dtype that was asked for, or None.
        notes: What a person should know.
    """

    source: Source
    checkpoint: Checkpoint
    values: dict[str, Any]
    config: PreTrainedConfig | None
    dtype: str | None
    notes: list[str] = field(default_factory=list)


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint.

    Args:
        options: The parsed arguments.
    """
    _check_words(options)
    hub = HubOptions(revision=options.revision or "main", local_files_only=options.offline)
    source = resolve(options.source, hub)
    local = None if source.kind == "hub" else source.path or source.folder
    core.check_target(options.target, local, force=options.force)
    job = _read(source, options)
    if options.to == "pytorch":
        _refuse_beside_safetensors(options.target)
    with core.work_folder(options.target) as work:
        if options.to == "gguf":
            plan, kept = _to_gguf(job, options, work)
        elif options.quantize is None:
            plan, kept = _convert(job, options, work)
        else:
            plan, kept = _quantize(job, options, work)
    _print(job, plan, kept, options)
    return 0


def _check_words(options: argparse.Namespace) -> None:
    """Raise for words that no conversion understands."""
    is_file = options.target.suffix == ".gguf"
    if options.to is None:
        options.to = "gguf" if is_file else "safetensors"
    if options.to in _LATER:
        raise NotYetError(
            f"Conversion to {options.to} is not offered yet", where="--to", mend=_LATER[options.to]
        )
    if options.to not in _FORMATS:
        known = (*_FORMATS, *_LATER)
        raise ArgumentError(
            f"Unknown format {options.to!r}",
            where="--to",
            expected=", ".join(_FORMATS),
            mend=did_you_mean(options.to, known) or None,
        )
    if (options.to == "gguf") != is_file:
        raise ArgumentError(
            "A GGUF model is one file, and the others are folders",
            where="DST",
            expected="a name that ends in .gguf" if options.to == "gguf" else "a folder's name",
            found=str(options.target),
        )
    if options.dtype is not None:
        options.dtype = floating_dtype_name(options.dtype)
    methods = {"safetensors": ("int8", "int4"), "pytorch": (), "gguf": METHODS}[options.to]
    if options.quantize is not None and options.quantize not in methods:
        raise ArgumentError(
            f"{options.to} files are not quantized to {options.quantize!r}",
            where="--quantize",
            expected=" or ".join(methods) or "no --quantize",
            mend=did_you_mean(options.quantize, methods) or None,
        )
    if options.to == "gguf" and options.quantize and options.dtype:
        raise ArgumentError("A matrix is quantized or has a dtype", where="--dtype", mend="Leave one out.")
    if options.to == "gguf" and options.dtype == "float64":
        raise ArgumentError("A GGUF model has no float64 weights", where="--dtype")
    if options.to == "gguf" and options.max_shard_size != _SHARD_SIZE:
        raise NotYetError("GGUF models in several files are not written yet", where="--max-shard-size")


def _read(source: Source, options: argparse.Namespace) -> _Job:
    if source.kind == "file" and source.path is not None:
        checkpoint = open_checkpoint(source.path)
    else:
        folder = source.weights_folder(variant=options.variant, gguf_file=options.gguf_file)
        checkpoint = open_checkpoint(
            find_weights(folder, variant=options.variant, gguf_file=options.gguf_file)
        )
    notes = []
    if checkpoint.format == "gguf":
        values = gguf_config(checkpoint.metadata, checkpoint.tensors)
    else:
        file = source.file(CONFIG_NAME, required=False)
        values = {} if file is None else read_json_object(file)
        if file is None:
            notes.append("there is no config.json beside the weights, so the new folder has none either")
    config = None
    model_type = model_type_of(values)
    if isinstance(model_type, str) and model_type in FAMILIES:
        config = config_of(values | {"model_type": model_type}, where=source)
    if values.get("quantization_config") and (options.dtype or options.quantize or options.to == "gguf"):
        raise ArgumentError(
            "The checkpoint is quantized already, and its tensors mean something only as they are",
            where="--dtype" if options.dtype else "--quantize" if options.quantize else "--to",
            found=(values["quantization_config"] or {}).get("quant_method"),
            mend="Leave it out, or convert the unquantized checkpoint.",
        )
    return _Job(source, checkpoint, values, config, options.dtype, notes)


def _refuse_beside_safetensors(target: Path) -> None:
    present = [name for name in candidates(None, True) if (target / name).exists()]
    if present:
        raise FileError(
            f"DST holds {present[0]}, which is loaded instead of pytorch_model.bin",
            where=target,
            mend="Name another place, or remove that file first if it is out of date.",
        )


# Without a model: tensor by tensor


def _convert(job: _Job, options: argparse.Namespace, work: Path) -> tuple[ShardPlan, tuple[str, ...]]:
    steps = _plan(job)
    reading = core.Reading(job.checkpoint)
    tensors = {step.key: core.ConvertedTensor(step, reading) for step in steps.steps}
    if options.to == "pytorch":
        # Imported here: the other target needs no framework.
        from pretrained.torch.convert import pickle_writer  # noqa: PLC0415

        names = {"file_stem": "pytorch_model", "suffix": ".bin"}
        writer, read = pickle_writer, read_torch_checkpoint
    else:
        names = {}
        writer, read = partial(core.safetensors_writer, _metadata(job)), read_safetensors_header
    plan = plan_shards(steps.sizes, options.max_shard_size, **names)
    with reporting(None, plan.total_size, "convert") as progress:
        kept = core.write_parts(work, plan, tensors, writer, read, nbytes=steps.sizes, progress=progress)
    core.finish(work, options.target, plan, tensors, lambda folder: _add_files(job, folder))
    return plan, kept


def _plan(job: _Job) -> core.ConversionPlan:
    policy, ties = LoadPolicy(dtype=job.dtype), {}
    if job.config is not None:
        policy = policy_for(job.config, job.dtype)
        ties = dict(skeleton_for(job.config).ties)
    elif job.values:
        job.notes.append(
            f"the architecture {model_type_of(job.values)!r} is not known here: tensors are taken as they are"
        )
    layouts = dropped = None
    if job.checkpoint.format == "gguf":
        arch = gguf_architecture(job.checkpoint.metadata)
        layouts = gguf_key_map(arch, job.values, job.checkpoint.tensors)
        dropped = gguf_dropped(job.checkpoint.tensors)
    plan = core.plan_conversion(job.checkpoint, policy, layouts=layouts, dropped=dropped, ties=ties)
    for alias, owner in plan.aliases.items():
        job.notes.append(f"{alias} is {owner} in the old files, and is written once")
    job.notes += [f"{key} is left out: {why}" for key, why in plan.dropped.items()]
    return plan


def _metadata(job: _Job) -> dict[str, str]:
    if job.checkpoint.format != "safetensors":
        return {"format": "pt"}
    return {key: value for key, value in job.checkpoint.metadata.items() if isinstance(value, str)}


# Through a model: quantized


def _quantize(job: _Job, options: argparse.Namespace, work: Path) -> tuple[ShardPlan, tuple[str, ...]]:
    if job.config is None:
        raise ArgumentError(
            "Only models of known architectures are quantized",
            where="--quantize",
            expected=f"'model_type' to be one of {', '.join(FAMILIES)}",
            found=repr(model_type_of(job.values)),
        )
    # Imported here: a conversion without quantization needs no framework.
    from pretrained.torch.convert import load_quantized, model_tensors  # noqa: PLC0415
    from pretrained.torch.save import write_configs  # noqa: PLC0415

    offload = work / "offload"
    offload.mkdir(exist_ok=True)
    hub = {"variant": options.variant, "revision": options.revision, "gguf_file": options.gguf_file}
    hub |= {"local_files_only": options.offline or None}
    hub = {name: value for name, value in hub.items() if value is not None}
    dtype = options.dtype or "auto"
    model = load_quantized(options.source, job.config, options.quantize, dtype, offload, **hub)
    tensors: Mapping[str, TensorSource] = model_tensors(model)
    sizes = {key: prod(t.shape) * DTYPES[t.dtype].itemsize for key, t in tensors.items()}
    plan = plan_shards(sizes, options.max_shard_size)
    writer, read = partial(core.safetensors_writer, {"format": "pt"}), read_safetensors_header
    with reporting(None, plan.total_size, "convert") as progress:
        kept = core.write_parts(work, plan, tensors, writer, read, nbytes=sizes, progress=progress)

    def add(folder: Path) -> None:
        write_configs(model, folder)
        _add_files(replace(job, values={}), folder)

    core.finish(work, options.target, plan, tensors, add)
    return plan, kept


# As one file


def _to_gguf(job: _Job, options: argparse.Namespace, work: Path) -> tuple[ShardPlan, tuple[str, ...]]:
    if job.config is None:
        raise ArgumentError(
            "Only models of known architectures become GGUF files",
            where="config.json",
            found=repr(model_type_of(job.values)),
        )
    if options.target.is_dir():
        raise FileError("DST is a folder", where=options.target, mend="Name a file.")
    return write_gguf(
        work,
        options.target,
        job.checkpoint,
        job.config,
        job.values,
        wanted=options.quantize or options.dtype,
        name=Path(job.source.name).stem if job.source.kind == "file" else Path(job.source.name).name,
        tokenizer=None if options.without_tokenizer else read_tokenizer(job.source, job.checkpoint),
        notes=job.notes,
    )


# What goes with the weights


def _add_files(job: _Job, folder: Path) -> None:
    """Write config.json, and bring along tokenizer, generation config, templates, card and licence."""
    gguf = job.checkpoint.format == "gguf"
    if job.values and (gguf or job.dtype is not None):
        write_text_atomically(folder / CONFIG_NAME, json.dumps(_config(job), indent=2) + "\n")
    elif job.values:
        core.carry({CONFIG_NAME: job.source.require(CONFIG_NAME)}, folder)
    if gguf:
        _write_gguf_tokenizer(job, folder)
        return
    names = [name for name in job.source.listing() if name.startswith(_TEMPLATES) and name.endswith(".jinja")]
    carried = [*_CARRIED, *sorted(names)]
    outside = [name for name in carried if leads_out(job.source.folder, job.source.folder / name)]
    if outside:
        job.notes.append(f"left behind, for they are links out of the folder: {', '.join(outside)}")
    found = {name: job.source.file(name, required=False) for name in carried if name not in outside}
    core.carry({name: file for name, file in found.items() if file is not None}, folder)
    code = sorted(name for name in job.source.listing() if name.endswith(".py"))
    if code:
        job.notes.append(f"code is left behind: {', '.join(code[:5])}")


def _config(job: _Job) -> dict[str, Any]:
    """Return config.json with the new dtype, under the name that the file has for it."""
    values = {name: value for name, value in job.values.items() if value is not None}
    names = [name for name in ("torch_dtype", "dtype") if name in values] or ["dtype"]
    if job.dtype is None:
        kinds = Counter(info.dtype for info in job.checkpoint.tensors.values())
        plain = len(kinds) == 1 and next(iter(kinds)) in DTYPES
        return values | {names[0]: next(iter(kinds)) if plain else "float32"}
    return (job.values if job.checkpoint.format != "gguf" else values) | dict.fromkeys(names, job.dtype)


def _write_gguf_tokenizer(job: _Job, folder: Path) -> None:
    if "tokenizer.ggml.tokens" not in job.checkpoint.metadata:
        job.notes.append("the GGUF file has no tokenizer")
        return
    # Imported here: only a GGUF file's vocabulary must be read to be brought along.
    from pretrained.text.tokenizer import AutoTokenizer  # noqa: PLC0415

    try:
        AutoTokenizer.from_pretrained(str(job.checkpoint.files[0])).save_pretrained(folder)
    except (TokenizerError, MissingDependencyError) as error:
        job.notes.append(f"the tokenizer is not brought along: {error}")


def _print(job: _Job, plan: ShardPlan, kept: tuple[str, ...], options: argparse.Namespace) -> None:
    target: Path = options.target
    folder = target.parent if options.to == "gguf" else target
    count = sum(len(keys) for keys in plan.files.values())
    wanted = ", ".join(filter(None, (options.quantize, options.dtype)))
    print(
        f"{options.source}: {job.checkpoint.format} to {options.to}{', ' + wanted if wanted else ''}, "
        f"{count} tensors, {format_bytes(job.checkpoint.nbytes)} to {format_bytes(plan.total_size)}"
    )
    for name in plan.files:
        size = format_bytes((folder / name).stat().st_size)
        print(f"  {name}  {size}{'  (kept from the run before)' if name in kept else ''}")
    files = [] if options.to == "gguf" else [path for path in folder.rglob("*") if path.is_file()]
    others = sorted(str(path.relative_to(folder)) for path in files if path.name not in plan.files)
    if others:
        print(f"  beside them: {', '.join(others)}")
    for note in job.notes:
        print(f"note: {note}")
    print("verified: keys, shapes, dtypes and every byte were read back and compared")
