# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that bitsandbytes has stored in 8 bits: rows of integers with a scale each, as int8 layers.

The value of an integer q in row r is ``q * SCB[r] / 127`` (SCB is the row's largest magnitude). The library
is not needed. It also rounds activations when it multiplies; the layers here do not, and are closer to what
was quantized.
"""

from __future__ import annotations

from typing import ClassVar

from pretrained.core.integer_form import IntegerForm
from pretrained.core.library_quantization import BitsAndBytesScheme
from pretrained.errors import NotYetError
from pretrained.torch.quantizers.foreign import ForeignFormat, StoredWeight, packed_by_rows
from pretrained.torch.rounding import Packed


class BitsAndBytes8(ForeignFormat[BitsAndBytesScheme]):
    """``weight`` int8 [out, in], ``SCB`` float32 [out], ``weight_format`` 0 for plain rows."""

    parts: ClassVar[tuple[str, ...]] = ("weight", "SCB", "weight_format")
    sign: ClassVar[tuple[str, ...]] = ("SCB",)

    def form(self, weight: StoredWeight) -> IntegerForm:
        """Check shapes and dtypes, and that rows are plain."""
        weight.check("weight", weight.shape, "int8")
        weight.check("SCB", weight.shape[:1], "float32")
        if "weight_format" in weight.parts:
            weight.check("weight_format", (), "uint8")
            if int(weight.read("weight_format")) != 0:
                raise NotYetError(
                    "8-bit weights of bitsandbytes in the layout of a kernel are not read",
                    where=weight.path,
                    found=f"weight_format {int(weight.read('weight_format'))}",
                    mend="Save them again with a newer release of bitsandbytes, which stores plain rows.",
                )
        return IntegerForm(bits=8, scale_dtype="float32")

    def put_together(self, weight: StoredWeight, form: IntegerForm) -> Packed:
        """Return the integers and the scales."""
        integers = weight.read("weight")
        scale = weight.read("SCB").float() / 127
        return packed_by_rows(lambda part: integers[part], weight.shape, 8, scale)
