# SPDX-License-Identifier: Apache-2.0
"""The part of ``pretrained convert`` that writes GGUF files: types, names, layouts, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_key_map
from pretrained.arch.gguf_export import (
    FACTORS,
    RowPermute,
    check_expressible,
    check_same_model,
    gguf_metadata,
    gguf_name,
    rope_factors,
    token_ids,
)
from pretrained.arch.skeletons import architecture_of, config_of, policy_for, skeleton_for
from pretrained.core import convert as core
from pretrained.core.atomic_files import errors_with_mend, sync_folder
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import PreTrainedConfig
from pretrained.core.ggml import block_nbytes, is_block_type
from pretrained.core.ggml_encode import BLOCK, WRITABLE, quantize_blocks
from pretrained.core.gguf import read_gguf
from pretrained.core.gguf_writer import GgufTensor, GgufValue, gguf_writer
from pretrained.core.hub import Source
from pretrained.core.plan import LoadPlan, LoadStep, plan_load
from pretrained.core.progress import reporting
from pretrained.core.writer import ShardPlan
from pretrained.errors import WeightsError

METHODS = ("q8_0", "q4_0", "q4_1")
# A small part of most models, and what 4 bits hurt most.
_FINER = ("token_embd.weight", "output.weight")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


class _Tensor:
    """A weight as it lies in the GGUF file; see `GgufTensor`."""

    def __init__(
        self, step: LoadStep, reading: core.Reading, dtype: str, permute: RowPermute | None, name: str
    ) -> None:
        self._step, self._reading, self._permute, self._name = step, reading, permute, name
        self.dtype = dtype
        self.shape = step.source.shape if step.shape is None else step.shape

    def read(self) -> memoryview:
        """Return its bytes."""
        self._reading.enter(self._step.source)
        array = self._reading.files.array(self._step.source)
        for apply in (self._step.apply, self._permute):
            array = array if apply is None else apply(array)
        if is_block_type(self.dtype):
            return memoryview(quantize_blocks(array, self.dtype, key=self._step.key).data)
        array = np.ascontiguousarray(core.cast(array, self.dtype, key=self._step.key))
        return memoryview(array.reshape(-1).view(np.uint8).data)


class _Factors:
    """The tensor that says Llama 3.1's rotary scaling."""

    def __init__(self, values: Any) -> None:
        self._values = np.ascontiguousarray(values, np.float32)
        self.dtype, self.shape = "float32", self._values.shape

    def read(self) -> bytes:
        """Return its bytes."""
        return self._values.tobytes()


def write_gguf(
    work: Path,
    target: Path,
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    values: Mapping[str, Any],
    *,
    wanted: str | None,
    name: str,
    tokenizer: Any,
    notes: list[str],
) -> tuple[ShardPlan, tuple[str, ...]]:
    """Write a model of the Llama family as a GGUF file.

    Args:
        work: From `pretrained.core.convert.work_folder`.
        target: The file.
        checkpoint: The old files.
        config: Their config.
        values: The same, as it was read.
        wanted: A dtype or a block type for matrices; None keeps each tensor's own. Vectors are float32.
        name: What to call the model.
        tokenizer: The tokenizer to put in; None for none.
        notes: Added to.

    Returns:
        What was written, and whether it was there already from a run before.

    Raises:
        NotYetError: GGUF cannot say what the model or its tokenizer is.
        WeightsError: weights are missing.
        CheckpointError: what was read back is not what was written.
    """
    architecture = architecture_of(config)
    check_expressible(config, architecture)
    steps = _steps(checkpoint, config, values)
    reading = core.Reading(checkpoint)
    tensors: dict[str, GgufTensor] = {}
    coarse = []
    for step in steps:
        key, permute = gguf_name(step.key, config)
        shape = step.source.shape if step.shape is None else step.shape
        dtype = _type(key, step.source.dtype, shape, wanted)
        coarse += [key] if wanted in METHODS and len(shape) == 2 and not is_block_type(dtype) else []
        tensors[key] = _Tensor(step, reading, dtype, permute, key)
    if coarse:
        notes.append(f"{len(coarse)} matrices have rows that are no multiple of {BLOCK}, and stay float16")
    if wanted in METHODS and wanted != "q8_0":
        notes.append("the embedding and the head are q8_0, which keeps results closer")
    factors = rope_factors(config)
    if factors is not None:
        tensors[FACTORS] = _Factors(factors)
    most = max(WRITABLE, key=lambda kind: sum(_count(t) for t in tensors.values() if t.dtype == kind))
    metadata = gguf_metadata(config, name=name, file_type=wanted or most) | token_ids(config)
    metadata |= _tokenizer(tokenizer, config, notes)
    sizes = {key: block_nbytes(tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    plan = ShardPlan({target.name: tuple(tensors)}, None, target.stem, None, sum(sizes.values()), ".gguf")

    def read(file: Path) -> Checkpoint:
        return _check_metadata(read_gguf(file), metadata)

    with reporting(None, plan.total_size, "convert") as progress:
        kept = core.write_parts(
            work, plan, tensors, partial(gguf_writer, metadata), read, nbytes=sizes, progress=progress
        )
    part = work / "parts" / target.name
    found = read(part)
    check_same_model(config, config_of(gguf_config(found.metadata, found.tensors), where=target))
    with errors_with_mend(target):
        os.replace(part, target)
        sync_folder(target.parent)
    return plan, kept


def _count(tensor: GgufTensor) -> int:
    return block_nbytes(tensor.dtype, tensor.shape) if len(tensor.shape) == 2 else 0


def _steps(checkpoint: Checkpoint, config: PreTrainedConfig, values: Mapping[str, Any]) -> list[LoadStep]:
    """Match the files with the causal language model that a GGUF file holds."""
    layouts = None
    if checkpoint.format == "gguf":
        layouts = gguf_key_map(gguf_architecture(checkpoint.metadata), values, checkpoint.tensors)
    name = architecture_of(config)
    causal = name if name.endswith("ForCausalLM") else name.removesuffix("Model") + "ForCausalLM"

    def plan() -> LoadPlan:
        return plan_load(checkpoint, skeleton_for(config, causal), policy_for(config, None), layouts=layouts)

    found = plan()
    head, embedding = (checkpoint.tensors.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    both = (head, embedding) if config.tie_word_embeddings and head and embedding else None
    if both and not core.same_bytes(*both, checkpoint):
        # The files decide where they and the config disagree, as in a load.
        config.tie_word_embeddings = False
        found = plan()
    if found.initialise:
        raise WeightsError(
            "The files lack weights of a causal language model, which is what a GGUF file holds",
            where=found.initialise[0],
            mend="Convert to safetensors instead.",
        )
    # A head of its own comes last, whatever its place in the files.
    return sorted(found.steps, key=lambda step: step.key == "lm_head.weight")


def _type(name: str, stored: str, shape: tuple[int, ...], wanted: str | None) -> str:
    if len(shape) < 2:
        return "float32"
    if wanted in METHODS:
        if shape[-1] % BLOCK:
            return "float16"
        return "q8_0" if name in _FINER else str(wanted)
    if wanted is not None:
        return wanted
    return stored if stored in WRITABLE and not is_block_type(stored) else "float32"


def _tokenizer(tokenizer: Any, config: PreTrainedConfig, notes: list[str]) -> dict[str, GgufValue]:
    if tokenizer is None:
        notes.append("there is no tokenizer in the GGUF file: programs that need one cannot run it")
        return {}
    # Imported here: only this needs the tokenizers library.
    from pretrained.text.gguf_export import tokenizer_metadata  # noqa: PLC0415

    found = tokenizer_metadata(tokenizer, int(config.vocab_size))
    return {key: GgufValue(kind, value) for key, (kind, value) in found.items()}


def read_tokenizer(source: Source, checkpoint: Checkpoint) -> Any:
    """Return the tokenizer of a model, or None where it has none.

    Args:
        source: Where the model is.
        checkpoint: Its headers.

    Raises:
        TokenizerError: its files are broken, or of a kind that is not read.
    """
    if checkpoint.format == "gguf":
        there = "tokenizer.ggml.tokens" in checkpoint.metadata
    else:
        there = source.kind != "file" and not source.listing().isdisjoint(_TOKENIZER_FILES)
    if not there:
        return None
    # Imported here: see `_tokenizer`.
    from pretrained.text.tokenizer import AutoTokenizer  # noqa: PLC0415

    if checkpoint.format == "gguf":
        return AutoTokenizer.from_pretrained(str(checkpoint.files[0]))
    options = source.options
    hub: dict[str, Any] = {"revision": options.revision, "local_files_only": options.local_files_only}
    return AutoTokenizer.from_pretrained(source.name, **hub)


def _check_metadata(found: Checkpoint, metadata: Mapping[str, GgufValue]) -> Checkpoint:
    """Compare the metadata that was read back with what was meant."""
    for key, value in metadata.items():
        read = found.metadata.get(key)
        if read is None:
            same = False
        elif value.kind == "f32":
            same = bool(np.float32(read) == np.float32(value.value))
        else:
            same = list(read) == list(value.value) if value.kind.endswith("[]") else read == value.value
        if not same:
            raise core.differs(f"{key} is not what was meant", found.files[0])
    return found
