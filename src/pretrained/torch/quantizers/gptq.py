# SPDX-License-Identifier: Apache-2.0
"""Weights in the layout of GPTQ, which `pretrained.core.gptq` describes."""

from __future__ import annotations

from typing import ClassVar

import torch

from pretrained.core.gptq import GptqLayer, GptqScheme
from pretrained.core.integer_form import IntegerForm
from pretrained.errors import WeightsError
from pretrained.torch.quantized_ops import CHUNK
from pretrained.torch.quantizers.foreign import ForeignFormat, StoredWeight, packed_by_rows
from pretrained.torch.rounding import Packed

SCALE_DTYPES = ("float16", "bfloat16", "float32")


class Gptq(ForeignFormat[GptqScheme]):
    """GPTQ's way.

    2 and 3 bits are stored in 4. Where activations were quantized in an order (``desc_act``) that leaves
    groups of equal size, the leaf keeps the order; where groups are uneven, the weight becomes plain.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    sign: ClassVar[tuple[str, ...]] = ("qweight",)

    def form(self, weight: StoredWeight) -> IntegerForm | None:
        """Check the headers, and look whether the groups are in order."""
        layer = self.scheme.layer(weight.path)
        (out, inputs), bits, size = weight.shape, layer.bits, layer.group_size or weight.shape[1]
        groups = -(-inputs // size)
        why = f"with {bits} bits and groups of {size}"
        if inputs * bits % 32 or out * bits % 32:
            raise WeightsError(
                f"A layer of these sizes cannot be packed into words {why}",
                where=weight.path,
                found=f"{inputs} inputs, {out} outputs",
                mend="Check that config.json (sizes, bits) describes these weights.",
            )
        weight.check("qweight", (inputs * bits // 32, out), "int32", why=why)
        weight.check("qzeros", (groups, out * bits // 32), "int32", why=why)
        weight.check("scales", (groups, out), *SCALE_DTYPES, why=why)
        is_ordered = False
        if "g_idx" in weight.parts:
            weight.check("g_idx", (inputs,), "int32", "int64", why="")
            group_of = _group_of(weight, groups)
            if bool((torch.bincount(group_of, minlength=groups) != size).any()):
                return None
            is_ordered = not torch.equal(group_of, torch.arange(inputs) // size)
        elif inputs % size:
            return None
        symmetric = layer.symmetric and bits in (4, 8)
        return IntegerForm(
            bits=8 if bits == 8 else 4,
            group_size=None if groups == 1 else size,
            zero=None if symmetric else "point",
            scale_dtype=weight.parts["scales"].dtype,
            is_ordered=is_ordered,
        )

    def put_together(self, weight: StoredWeight, form: IntegerForm | None) -> Packed | torch.Tensor:
        """Turn the words on their side; integers keep their values."""
        layer = self.scheme.layer(weight.path)
        words, scales = weight.read("qweight"), weight.read("scales").t().contiguous()
        zeros = unpack_words(weight.read("qzeros").t(), layer.bits)
        if self.scheme.zeros_less_one:
            zeros = (zeros + 1) & (2**layer.bits - 1)
        if form is None:
            return self._plain(weight, layer, words, scales, zeros)
        if form.zero is None:
            _check_middle(zeros, layer.bits, weight.path)
        order = _order(weight, scales.shape[1]) if form.is_ordered else None

        def integers(part: slice) -> torch.Tensor:
            values = unpack_words(words[:, part], layer.bits)
            values = (values if order is None else values[order]).t().contiguous()
            return (values ^ 128).view(torch.int8) if form.bits == 8 else values + _shift(layer.bits)

        if form.bits == 4 and layer.bits < 4:
            # In the middle of 16 values, where the kernel's rounded offsets are small.
            zeros = zeros + _shift(layer.bits)
        points = None
        if form.zero is not None:
            points = (zeros ^ 128).view(torch.int8) if form.bits == 8 else zeros
        if layer.bits == 4 and order is None:
            # The bytes of a word are four of our bytes already.
            data = _turned(words)
            return Packed(data, scales, points, 0.0)
        flat = form.bits == 8 and form.group_size is None and points is None
        return packed_by_rows(
            integers, weight.shape, form.bits, scales[:, 0].clone() if flat else scales, points, order
        )

    def _plain(
        self,
        weight: StoredWeight,
        layer: GptqLayer,
        words: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
    ) -> torch.Tensor:
        out, inputs = weight.shape
        groups = scales.shape[1]
        group_of = (
            _group_of(weight, groups)
            if "g_idx" in weight.parts
            else torch.arange(inputs) // (layer.group_size or inputs)
        )
        result = torch.empty(out, inputs, dtype=torch.float32)
        step = max(1, CHUNK // inputs)
        for start in range(0, out, step):
            part = slice(start, start + step)
            values = unpack_words(words[:, part], layer.bits).t().to(torch.float32)
            result[part] = (values - zeros[part][:, group_of]) * scales[part].float()[:, group_of]
        return result


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the integers of packed words, low end first.

    Args:
        words: int32 [n, columns]; for 3 bits n divides by 3.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 [n * 32 / bits, columns].
    """
    period, count = (3, 32) if bits == 3 else (1, 32 // bits)
    rows = words.reshape(len(words) // period, period, words.shape[1])
    result = torch.empty(len(rows), count, words.shape[1], dtype=torch.uint8)
    mask = 2**bits - 1
    for index in range(count):
        word, shift = divmod(index * bits, 32)
        values = rows[:, word] >> shift
        if shift + bits > 32:
            # The shift has filled up with the sign.
            values = (values & (2 ** (32 - shift) - 1)) | (rows[:, word + 1] << (32 - shift))
        result[:, index] = values & mask
    return result.view(-1, words.shape[1])


def _shift(bits: int) -> int:
    """Return what is added to integers of fewer than 4 bits and to their zero points."""
    return 8 - 2 ** (bits - 1) if bits < 4 else 0


def _turned(words: torch.Tensor) -> torch.Tensor:
    """Return [n, out] words as the bytes of each output, uint8 [out, 4 n]."""
    inputs, out = words.shape
    result = torch.empty(out, inputs, dtype=torch.int32)
    step = max(1, CHUNK // inputs)
    for start in range(0, out, step):
        result[start : start + step] = words[:, start : start + step].t()
    return result.view(torch.uint8)


def _group_of(weight: StoredWeight, groups: int) -> torch.Tensor:
    found = weight.read("g_idx").to(torch.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise WeightsError(
            "g_idx names groups that are not there",
            where=weight.parts["g_idx"].key,
            expected=f"0 to {groups - 1}",
            found=f"{int(found.min())} to {int(found.max())}",
            mend="The checkpoint is damaged; take it again from where it was made.",
        )
    return found


def _order(weight: StoredWeight, groups: int) -> torch.Tensor:
    return torch.argsort(_group_of(weight, groups), stable=True).to(torch.int32)


def _check_middle(zeros: torch.Tensor, bits: int, path: str) -> None:
    """Raise where a zero point that the config calls symmetric is another."""
    middle = 2 ** (bits - 1)
    if bool((zeros != middle).any()):
        raise WeightsError(
            "The config says that the weights are symmetric (sym), and their zero points differ",
            where=f"{path}.qzeros",
            expected=middle,
            found=f"{int(zeros.min())} to {int(zeros.max())}",
            mend="Set 'sym' to false in quantization_config of config.json; if the numbers are off by one, "
            "set 'checkpoint_format' ('gptq' or 'gptq_v2').",
        )
