# SPDX-License-Identifier: Apache-2.0
"""What config.json says of weights in the layout of AWQ (AutoAWQ's version "gemm").

Of a layer [out, in] with groups of g inputs and 4 bits an integer:

===========  ==========================  ===================================================================
tensor       shape and dtype             what it is
===========  ==========================  ===================================================================
``qweight``  int32 [in, out / 8]         integers q; nibble n (from the low end) of word w belongs to output
                                         ``8 * w + (0, 2, 4, 6, 1, 3, 5, 7)[n]``
``qzeros``   int32 [groups, out / 8]     zero points z, packed the same way
``scales``   float16 [groups, out]       s
===========  ==========================  ===================================================================

The weight of output o and input i is ``(q - z) * s`` of group ``i // g``. (Read off AutoAWQ 0.2.9,
``awq/modules/linear/gemm.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pretrained.core.foreign_quantization import ForeignScheme, not_read, whole_number, yes_or_no
from pretrained.errors import ConfigError

# Output of each nibble of a word, from the low end.
OUTPUTS: Final = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqScheme(ForeignScheme):
    """AWQ's settings.

    Attributes:
        group_size: Inputs that share a scale; None for all.
    """

    quant_method: ClassVar[str] = "awq"

    group_size: int | None

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Read ``quantization_config``; ``modules_to_not_convert`` shows in the files by itself."""
        version = values.get("version") or values.get("checkpoint_format") or values.get("format") or "gemm"
        version = str(getattr(version, "value", version)).lower()
        if version != "gemm":
            raise not_read(f"AWQ of the version {version!r}", where=where)
        bits = whole_number(values, ("bits", "w_bit"), 4, where=where)
        if bits != 4:
            raise not_read(f"AWQ with {bits} bits", where=where)
        if not yes_or_no(values, "zero_point", True, where=where):
            raise not_read("AWQ without zero points", where=where)
        size = whole_number(values, ("group_size", "q_group_size"), 128, where=where)
        if size < 1 and size != -1:
            raise ConfigError(
                "There are no groups of this size",
                where=f"quantization_config.group_size, {where}",
                expected="a positive number, or -1 for one group",
                found=size,
            )
        return cls(group_size=None if size == -1 else size)
