# SPDX-License-Identifier: Apache-2.0
"""Which quantizer a load takes.

A load calls `quantizer_for` once, before it plans. What comes back knows the ways that a quantized model
comes up, which differ in who makes the integers: this load (`Rounding`), GGML's blocks in a GGUF file
(`Blocks`), the load before the save (`Restoring`), another library now (`ThroughLibrary`), or one before,
whose numbers are put into forms of this one (`Repacking`) or stay as they lie (`Stored`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from pretrained.core.checkpoint import Checkpoint
from pretrained.core.foreign_quantization import ForeignScheme
from pretrained.core.library_quantization import BitsAndBytesScheme, TorchAoScheme
from pretrained.core.options import LoadOptions
from pretrained.core.quantization import (
    READ_METHODS,
    QuantizationConfig,
    requested_quantization,
    stored_quantization,
)
from pretrained.core.stored_config import METHODS as STORED_METHODS
from pretrained.core.stored_config import method_of, parse_stored, read_wish
from pretrained.errors import ArgumentError
from pretrained.torch.quantizers.base import Quantizer
from pretrained.torch.quantizers.blocks import Blocks
from pretrained.torch.quantizers.foreign import Repacking
from pretrained.torch.quantizers.formats import FORMATS
from pretrained.torch.quantizers.library import ThroughLibrary, maker_for
from pretrained.torch.quantizers.restoring import Restoring
from pretrained.torch.quantizers.rounding import Rounding
from pretrained.torch.quantizers.stored import Stored
from pretrained.torch.tensors import mapped_reader

# What is put into forms of this library, and what a call may say of it (`read_wish`).
_REPACKED: Final = ("awq", "gptq")


def quantizer_for(config: Any, checkpoint: Checkpoint, options: LoadOptions, dtype: str | None) -> Quantizer:
    """Return what a load does about quantization.

    Args:
        config: The model's configuration.
        checkpoint: What the files hold.
        options: The call's wishes.
        dtype: What plain weights are loaded as; None keeps each one's own.

    Raises:
        ArgumentError: the call asks for another scheme than the files are in.
        MissingDependencyError: what is asked for, or in the files, needs a library that is not installed.
        NotYetError: the files were quantized by another library, in a way that is not read.
    """
    entry = getattr(config, "quantization_config", None)
    method = method_of(entry)
    if (method in STORED_METHODS or method in _REPACKED) and checkpoint.format != "none":
        return _stored_quantizer(entry, checkpoint, options, dtype, config.name_or_path or "config")
    wanted = requested_quantization(
        options.quantization_config, load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit
    )
    stored = stored_quantization(entry, where=config.name_or_path or "config")
    is_mapped = options.state_dict is None and not options.disable_mmap
    if stored is not None and checkpoint.format != "none":
        if wanted is not None and wanted.quant_method != stored.quant_method:
            raise _quantized_already(stored.quant_method, wanted.quant_method)
        if isinstance(wanted, QuantizationConfig) and isinstance(stored, QuantizationConfig):
            _check_same(stored, wanted)
        if wanted is not None and wanted.compute_dtype is not None:
            stored = dataclasses.replace(stored, compute_dtype=wanted.compute_dtype)
        if isinstance(stored, ForeignScheme):
            return _foreign_quantizer(stored, options, dtype)
        return Restoring(stored, dtype)
    if wanted is None:
        return Quantizer(dtype)
    if wanted.quant_method == "gguf":
        assert isinstance(wanted, QuantizationConfig)
        return Blocks(wanted, dtype, is_mapped=is_mapped)
    rounding: Rounding | ThroughLibrary
    if isinstance(wanted, BitsAndBytesScheme | TorchAoScheme):
        rounding = ThroughLibrary(maker_for(wanted), dtype, is_mapped=is_mapped)
    else:
        assert isinstance(wanted, QuantizationConfig)
        rounding = Rounding(wanted, dtype, is_mapped=is_mapped)
    if options.state_dict is None:
        rounding.scratch = mapped_reader(copy_all=options.disable_mmap, scratch=True)
    return rounding


def _foreign_quantizer(stored: ForeignScheme, options: LoadOptions, dtype: str | None) -> Quantizer:
    """Return what reads a checkpoint of another library into this one's layers, or into that one's."""
    is_mapped = options.state_dict is None and not options.disable_mmap
    if isinstance(stored, BitsAndBytesScheme) and stored.bits == 4:
        return maker_for(stored).restoring(dtype, key_mapping=options.key_mapping, is_mapped=is_mapped)
    format = FORMATS[stored.quant_method](stored)
    return Repacking(format, dtype, key_mapping=options.key_mapping, is_mapped=is_mapped)


def _stored_quantizer(
    entry: Any, checkpoint: Checkpoint, options: LoadOptions, dtype: str | None, where: str
) -> Quantizer:
    """Return what reads a checkpoint of another library."""
    wanted = options.quantization_config
    if options.load_in_8bit or options.load_in_4bit:
        wanted = {"quant_method": "int8" if options.load_in_8bit else "int4"}
    values = entry if isinstance(entry, Mapping) else entry.to_dict()
    method = method_of(entry)
    if wanted is not None and method_of(wanted) != method:
        raise _quantized_already(method, method_of(wanted))
    wish = read_wish(wanted, values)
    is_mapped = options.state_dict is None and not options.disable_mmap
    if method in _REPACKED:
        scheme = READ_METHODS[method].parse(values, where=where)
        return Repacking(
            FORMATS[method](dataclasses.replace(scheme, compute_dtype=wish.compute_dtype)),
            dtype,
            dequantize=wish.dequantize,
            key_mapping=options.key_mapping,
            is_mapped=is_mapped,
        )
    parsed = parse_stored({**values, "quant_method": method}, where=where)
    return Stored(parsed, wish, dtype, key_mapping=options.key_mapping, is_mapped=is_mapped)


def _check_same(stored: QuantizationConfig, wanted: QuantizationConfig) -> None:
    """Raise for a setting that this load could only ignore: the numbers are rounded already."""
    usual = QuantizationConfig(quant_method=wanted.quant_method)
    for name in ("group_size", "symmetric", "skip_modules", "quantize_embeddings", "quantize_head"):
        value = getattr(wanted, name)
        if value not in (getattr(usual, name), getattr(stored, name)):
            raise _quantized_already(f"{name}={getattr(stored, name)!r}", f"{name}={value!r}")


def _quantized_already(stored: object, wanted: object) -> ArgumentError:
    return ArgumentError(
        "The checkpoint is quantized already",
        where="quantization_config",
        expected=stored,
        found=wanted,
        mend="Leave the argument out, or load it, call dequantize(), save it and load that.",
    )
