# SPDX-License-Identifier: Apache-2.0
"""`IntegerForm`: how the integers of one weight are stored, whoever made them.

The forms that this library makes itself are in `pretrained.core.quantization`. Weights that other libraries
have quantized keep their numbers exactly, so their forms are more general:

=================  ==========================================================================================
tensor             what it is
=================  ==========================================================================================
``weight``         4 bits: uint8 [out, in / 2], integers q of 0..15, the even input in the low half of a byte;
                   8 bits: int8 [out, in], integers q of -128..127
``weight_scale``   s: [out, groups] in `scale_dtype`; [out] for 8 bits with one scale for each output and no
                   zero
``weight_zero``    ``zero="point"``: integers z [out, groups], uint8 (4 bits) or int8 (8 bits);
                   ``zero="offset"``: numbers o [out, groups] in `scale_dtype`
``weight_order``   only where `is_ordered`: int32 [in]; column c of the stored matrix belongs to input
                   ``weight_order[c]``
=================  ==========================================================================================

The value of stored column c, group g = c // group_size, is ``(q - z) * s`` with points, ``(q - m) * s + o``
with offsets and ``(q - m) * s`` without zeros; m is 8 for 4 bits and 0 for 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerForm:
    """The form of one weight.

    Attributes:
        bits: 4 or 8, as stored; integers of fewer bits are stored in 4.
        group_size: Stored columns that share a scale; None for one scale for each output.
        zero: ``"point"``, ``"offset"`` or None.
        scale_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        is_ordered: Whether the stored columns are in another order than the inputs.
        compute_dtype: As `QuantizationConfig.compute_dtype`.
    """

    bits: int
    group_size: int | None = None
    zero: Literal["point", "offset"] | None = None
    scale_dtype: str = "bfloat16"
    is_ordered: bool = False
    compute_dtype: str | None = None

    @property
    def method(self) -> str:
        """``"int4"`` or ``"int8"``."""
        return f"int{self.bits}"

    def tensors(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the shape and dtype of each tensor by name.

        Args:
            shape: (out, in); `in` is a multiple of `group_size`, and even for 4 bits.
        """
        rows, columns = shape
        groups = columns // (self.group_size or columns)
        integers = ((rows, columns), "int8") if self.bits == 8 else ((rows, columns // 2), "uint8")
        is_flat = self.bits == 8 and self.group_size is None and self.zero is None
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "weight": integers,
            "weight_scale": ((rows,) if is_flat else (rows, groups), self.scale_dtype),
        }
        if self.zero is not None:
            dtype = self.scale_dtype if self.zero == "offset" else integers[1]
            found["weight_zero"] = ((rows, groups), dtype)
        if self.is_ordered:
            found["weight_order"] = ((columns,), "int32")
        return found
