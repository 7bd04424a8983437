# SPDX-License-Identifier: Apache-2.0
"""One activation row, or a few, times a weight: which operator does it fastest here.

`F.linear` reads weights at a third to a half of what memory gives while a step of decoding has only a few
rows. Other operators of torch come near the limit. `choose` says which one, `make_product` builds it; nothing
else in this library names them. Measured figures are in docs/PERFORMANCE.md.

The operators of oneDNN are those that torch's own compiler emits for CPUs. They bear an underscore, so
`_onednn_works` tries them once, and `F.linear` stands in where they fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum

import torch
from torch.nn import functional as F

Product = Callable[[torch.Tensor], torch.Tensor]
"""Takes [rows, in], contiguous; returns [rows, out]. One with an attribute `parts` also takes one row so many
times, [parts, in], which it would otherwise have to make."""

_SHORT = 1024

_WORDS = 509  # A prime, so that the sums below do not line up with the rows of any usual weight.


class Form(Enum):
    """How a weight is stored for its products, and by which operator it is multiplied."""

    LINEAR = "linear"
    """The weight as it is, `F.linear`."""
    ONEDNN = "onednn"
    """The weight as it is, oneDNN's kernel for few rows."""
    PACKED = "packed"
    """A copy in the order in which oneDNN's kernel reads."""
    BAGS = "bags"
    """A transposed copy, whose rows are summed with the activations as factors (one row only)."""

    @property
    def is_copy(self) -> bool:
        """Whether it needs a copy of the weight."""
        return self in (Form.PACKED, Form.BAGS)


def choose(device: torch.device, dtype: torch.dtype, rows: int, outputs: int, *, copies: bool) -> Form:
    """Return the form whose products are fastest.

    Args:
        device: Where the weight is.
        dtype: Of weight and activations.
        rows: Activation rows of a step.
        outputs: Rows of the weight.
        copies: Whether a copy of the weight may be made.
    """
    if device.type != "cpu" or not _onednn_works(dtype):
        return Form.LINEAR
    if not copies:
        return Form.ONEDNN
    # One row is bound by memory alone, and a sum of rows streams float32 best. In bfloat16 oneDNN streams as
    # well, but takes 8 microseconds longer to begin.
    short = dtype == torch.float32 or outputs <= _SHORT
    return Form.BAGS if rows == 1 and short else Form.PACKED


def make_copy(form: Form, weights: list[torch.Tensor]) -> torch.Tensor:
    """Return weights one below the other, stored as a form wants them.

    Args:
        form: One that is a copy.
        weights: [out_i, in] each.
    """
    with torch.no_grad():
        weight = weights[0].detach() if len(weights) == 1 else torch.cat(weights)
        if form is Form.BAGS:
            return weight.t().contiguous()
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return packed


def make_product(form: Form, stored: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return the function that multiplies by a weight and adds a bias.

    Args:
        form: How the weight is stored.
        stored: The weight itself, [out, in], or what `make_copy` returned.
        bias: [out], or None.
    """
    if form is Form.LINEAR:
        return lambda x: F.linear(x, stored, bias)
    if form is Form.BAGS:
        return _bags(stored, bias)
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, stored, bias, "none", [], "")


def _bags(stored: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return a product by `embedding_bag`: each thread sums its part of the rows of the transpose."""
    size, out = stored.shape
    parts = torch.get_num_threads()
    parts = parts if out % parts == 0 else 1
    # Row r of the weight is rows r * parts ... of this view, one for each thread's outputs.
    pieces = stored.view(size * parts, out // parts)
    indices, offsets = _bag_indices(size, parts)
    bag = torch.embedding_bag

    def product(x: torch.Tensor) -> torch.Tensor:
        factors = x.expand(parts, size).reshape(-1)  # Of a row that is there so often already, a view.
        y = bag(pieces, indices, offsets, False, 0, False, factors, False)[0].view(1, out)
        return y if bias is None else y + bias

    product.parts = parts  # type: ignore[attr-defined]
    return product


@functools.lru_cache(maxsize=64)
def _bag_indices(size: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        rows = torch.arange(size) * parts
        return (rows + torch.arange(parts)[:, None]).flatten(), torch.arange(0, size * parts, size)


@functools.cache
def _onednn_works(dtype: torch.dtype) -> bool:
    """Try oneDNN's product once, packed and not, against `F.linear`."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            x = torch.arange(8 * 32, dtype=dtype).view(8, 32).remainder(7) - 3
            weight = torch.arange(48 * 32, dtype=dtype).view(48, 32).remainder(5) - 2
            right = F.linear(x[:2].float(), weight.float())
            for form, stored in (
                (Form.ONEDNN, weight),
                (Form.PACKED, make_copy(Form.PACKED, [weight])),
            ):
                if not torch.allclose(make_product(form, stored, None)(x[:2]).float(), right, rtol=1e-2):
                    return False
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def fingerprint(weight: torch.Tensor) -> torch.Tensor | None:
    """Return sums of a weight's bits, piece by piece, which tell whether its values have changed.

    They are read at the speed of memory. Versions alone would miss edits through ``weight.data`` or numpy.

    Args:
        weight: On a CPU.

    Returns:
        Whole numbers; None for a weight whose memory cannot be read as such.
    """
    flat = weight.detach()
    if not flat.is_contiguous() or flat.numel() * flat.itemsize % 8 or flat.data_ptr() % 8:
        return None
    with torch.no_grad():
        words = flat.view(-1).view(torch.int64)
        whole = words.numel() // _WORDS * _WORDS
        sums = words[:whole].view(-1, _WORDS).sum(1)
        return torch.cat([sums, words[whole:].sum()[None]])
