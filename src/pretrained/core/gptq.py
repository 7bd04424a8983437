# SPDX-License-Identifier: Apache-2.0
"""What config.json says of weights in the layout of GPTQ (AutoGPTQ, GPTQModel).

Of a layer [out, in] with groups of g inputs and b bits an integer, each 32-bit word from its low end up:

===========  ====================================  ===========================================================
tensor       shape and dtype                       what it is
===========  ====================================  ===========================================================
``qweight``  int32 [in * b / 32, out]              integers q, packed along the inputs
``qzeros``   int32 [groups, out * b / 32]          zero points z, packed along the outputs; the format
                                                   ``gptq`` stores (z - 1) mod 2**b, ``gptq_v2`` stores z
``scales``   float16 [groups, out]                 s
``g_idx``    int32 [in]                            the group of each input; i // g where it is absent
===========  ====================================  ===========================================================

The weight of output o and input i is ``(q - z) * s`` of group ``g_idx[i]``. (Read off AutoGPTQ 0.7.1,
``qlinear_cuda_old.py``; three bits run on over words, in 32 numbers to three of them.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pretrained.core.foreign_quantization import ForeignScheme, not_read, whole_number, yes_or_no
from pretrained.errors import ConfigError

BITS: Final = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GptqLayer:
    """How one layer is stored.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; None for all.
        symmetric: Whether every zero point is the middle of the range.
    """

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqScheme(ForeignScheme):
    """GPTQ's settings.

    Attributes:
        default: How layers are stored.
        overrides: (regular expression of a module's name, how such layers are stored instead); the first
            that matches counts.
        zeros_less_one: Whether zero points are stored less one.
    """

    quant_method: ClassVar[str] = "gptq"

    default: GptqLayer
    overrides: tuple[tuple[str, GptqLayer], ...] = ()
    zeros_less_one: bool = True

    def layer(self, path: str) -> GptqLayer:
        """Return how a layer is stored.

        Args:
            path: The module's name in the files.
        """
        for pattern, layer in self.overrides:
            if re.match(pattern, path):
                return layer
        return self.default

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Read ``quantization_config``; how the integers were found is of no matter and not looked at."""
        form = values.get("checkpoint_format") or values.get("format") or "gptq"
        form = getattr(form, "value", form)
        if form not in ("gptq", "gptq_v2") or values.get("is_marlin_format"):
            name = form if form not in ("gptq", "gptq_v2") else "marlin"
            raise not_read(f"GPTQ in the format {name!r}", where=where)
        if str(values.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            raise not_read(f"GPTQ packed into {values['pack_dtype']}", where=where)
        if values.get("rotation"):
            raise not_read(f"GPTQ with the rotation {values['rotation']!r}", where=where)
        default = _layer(values, None, where)
        return cls(
            default=default,
            overrides=_overrides(values.get("dynamic"), default, where),
            zeros_less_one=form == "gptq",
        )


def _layer(values: Mapping[str, Any], default: GptqLayer | None, where: str) -> GptqLayer:
    bits = whole_number(values, ("bits",), None if default is None else default.bits, where=where)
    if bits not in BITS:
        raise not_read(f"GPTQ with {bits} bits", where=where)
    usual = 128 if default is None else default.group_size or -1
    size = whole_number(values, ("group_size",), usual, where=where)
    if size < 1 and size != -1:
        raise ConfigError(
            "There are no groups of this size",
            where=f"quantization_config.group_size, {where}",
            expected="a positive number, or -1 for one group",
            found=size,
        )
    symmetric = yes_or_no(values, "sym", True if default is None else default.symmetric, where=where)
    return GptqLayer(bits, None if size == -1 else size, symmetric)


def _overrides(value: Any, default: GptqLayer, where: str) -> tuple[tuple[str, GptqLayer], ...]:
    """Read GPTQModel's ``dynamic``: ``-:`` leaves modules plain, which shows in the files by itself."""
    if not value:
        return ()
    where = f"dynamic, {where}"
    if not isinstance(value, Mapping):
        raise ConfigError("dynamic is a dictionary of patterns", where=where, found=repr(value)[:200])
    found = []
    for pattern, settings in value.items():
        text = str(pattern).removeprefix("+:").removeprefix("-:")
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(
                f"{pattern!r} is not a regular expression", where=where, found=str(error)
            ) from error
        if isinstance(settings, Mapping) and not str(pattern).startswith("-:"):
            found.append((text, _layer(settings, default, where)))
        elif settings and not isinstance(settings, Mapping):
            raise ConfigError(
                f"The settings of {pattern!r} are no dictionary", where=where, found=repr(settings)[:200]
            )
    return tuple(found)
