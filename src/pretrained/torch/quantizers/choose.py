# SPDX-License-Identifier: Apache-2.0
"""Which quantizer a load takes.

A load calls `quantizer_for` once, before it plans. What comes back knows the ways that a quantized model
comes up, which differ in who makes the integers: this load (`Rounding`), GGML's blocks in a GGUF file
(`Blocks`), the load before the save (`Restoring`), or another library (`Repacking`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pretrained.core.checkpoint import Checkpoint
from pretrained.core.foreign_quantization import ForeignScheme
from pretrained.core.options import LoadOptions
from pretrained.core.quantization import requested_quantization, stored_quantization
from pretrained.errors import ArgumentError
from pretrained.torch.quantizers.base import Quantizer
from pretrained.torch.quantizers.blocks import Blocks
from pretrained.torch.quantizers.foreign import Repacking
from pretrained.torch.quantizers.formats import FORMATS
from pretrained.torch.quantizers.restoring import Restoring
from pretrained.torch.quantizers.rounding import Rounding
from pretrained.torch.tensors import mapped_reader


def quantizer_for(config: Any, checkpoint: Checkpoint, options: LoadOptions, dtype: str | None) -> Quantizer:
    """Return what a load does about quantization.

    Args:
        config: The model's configuration.
        checkpoint: What the files hold.
        options: The call's wishes.
        dtype: What plain weights are loaded as; None keeps each one's own.

    Raises:
        ArgumentError: the call asks for another scheme than the files are in.
        NotYetError: the files were quantized by another library, in a way that is not read.
    """
    wanted = requested_quantization(
        options.quantization_config, load_in_8bit=options.load_in_8bit, load_in_4bit=options.load_in_4bit
    )
    stored = stored_quantization(
        getattr(config, "quantization_config", None), where=config.name_or_path or "config"
    )
    if stored is not None and checkpoint.format != "none":
        if wanted is not None and wanted.quant_method != stored.quant_method:
            raise ArgumentError(
                "The checkpoint is quantized already",
                where="quantization_config",
                expected=stored.quant_method,
                found=wanted.quant_method,
                mend="Leave the argument out, or load it, call dequantize(), save it and load that.",
            )
        if wanted is not None and wanted.compute_dtype is not None:
            stored = dataclasses.replace(stored, compute_dtype=wanted.compute_dtype)
        if isinstance(stored, ForeignScheme):
            return Repacking(
                FORMATS[stored.quant_method](stored),
                dtype,
                key_mapping=options.key_mapping,
                is_mapped=options.state_dict is None and not options.disable_mmap,
            )
        return Restoring(stored, dtype)
    if wanted is None:
        return Quantizer(dtype)
    is_mapped = options.state_dict is None and not options.disable_mmap
    if wanted.quant_method == "gguf":
        return Blocks(wanted, dtype, is_mapped=is_mapped)
    rounding = Rounding(wanted, dtype, is_mapped=is_mapped)
    if options.state_dict is None:
        rounding.scratch = mapped_reader(copy_all=options.disable_mmap, scratch=True)
    return rounding
