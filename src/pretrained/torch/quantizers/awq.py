# SPDX-License-Identifier: Apache-2.0
"""Weights in the layout of AWQ, which `pretrained.core.awq` describes."""

from __future__ import annotations

from typing import ClassVar

import torch

from pretrained.core.awq import OUTPUTS, AwqScheme
from pretrained.core.integer_form import IntegerForm
from pretrained.errors import WeightsError
from pretrained.torch.quantizers.foreign import ForeignFormat, StoredWeight, packed_by_rows
from pretrained.torch.rounding import Packed

_SCALE_DTYPES = ("float16", "bfloat16", "float32")


class Awq(ForeignFormat[AwqScheme]):
    """AWQ's way."""

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    sign: ClassVar[tuple[str, ...]] = ("qweight",)

    def form(self, weight: StoredWeight) -> IntegerForm:
        """Check the headers."""
        out, inputs = weight.shape
        size = self.scheme.group_size or inputs
        if out % 8 or inputs % size or inputs % 2:
            raise WeightsError(
                f"A layer of these sizes cannot be packed into words with groups of {size}",
                where=weight.path,
                found=f"{inputs} inputs, {out} outputs",
                mend="Check that config.json (sizes, group_size) describes these weights.",
            )
        groups, why = inputs // size, f"with 4 bits and groups of {size}"
        weight.check("qweight", (inputs, out // 8), "int32", why=why)
        weight.check("qzeros", (groups, out // 8), "int32", why=why)
        weight.check("scales", (groups, out), *_SCALE_DTYPES, why=why)
        return IntegerForm(
            bits=4,
            group_size=None if groups == 1 else size,
            zero="point",
            scale_dtype=weight.parts["scales"].dtype,
        )

    def put_together(self, weight: StoredWeight, form: IntegerForm | None) -> Packed:
        """Bring outputs into their order, and turn the words on their side."""
        words = weight.read("qweight")

        def integers(part: slice) -> torch.Tensor:
            return unpack_outputs(words[:, part.start // 8 : part.stop // 8])

        return packed_by_rows(
            integers,
            weight.shape,
            4,
            weight.read("scales").t().contiguous(),
            unpack_outputs(weight.read("qzeros")),
            align=8,
        )


def unpack_outputs(words: torch.Tensor) -> torch.Tensor:
    """Return the integers of packed words by output.

    Args:
        words: int32 [rows, out / 8].

    Returns:
        uint8 [out, rows].
    """
    turned = words.t()
    result = torch.empty(turned.shape[0], 8, turned.shape[1], dtype=torch.uint8)
    for nibble, output in enumerate(OUTPUTS):
        result[:, output] = (turned >> (4 * nibble)) & 15
    return result.view(-1, turned.shape[1])
