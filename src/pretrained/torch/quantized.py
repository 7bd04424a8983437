# SPDX-License-Identifier: Apache-2.0
"""Leaves with quantized weights: what stands where a dense layer or an embedding was.

Their weights are plain, named, fixed tensors in the forms of `pretrained.core.quantization`, so that
state dicts, safetensors files and placement handle them like any other. A leaf picks the way to multiply
at each call: a packed kernel of torch's core where there is one, otherwise the reference, which
dequantizes and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.core.integer_form import IntegerForm
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import WeightsError
from pretrained.torch import quantized_cuda
from pretrained.torch.empty import no_memory
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized_ops import (
    CUDA_KERNEL_ROWS,
    KERNEL_ROWS,
    Dense,
    QuantizedMatmul,
    from_kernel_layout,
    kernel_block,
    linear_by_tiles,
    tiles,
    to_kernel_layout,
    unpack_nibbles,
)
from pretrained.torch.rounding import Packed
from pretrained.torch.tensors import TORCH_DTYPES

# What int8pack reads at a time: with other widths it reads past the end of a row, and at addresses that do
# not divide by 16 it kills the process, without a check for either (torch 2.13, x86).
_INT8_COLUMNS = 32
_INT8_ALIGNMENT = 16
# What int4pack packs at a time, and the groups that it knows.
INT4_ROWS = 16
_INT4_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True, slots=True)
class MadeWeight:
    """A quantized weight that a library has made, in a class of its own, ready to stand in its layer.

    Attributes:
        parameter: The weight.
    """

    parameter: nn.Parameter

    def to(self, device: torch.device) -> MadeWeight:
        """Return the weight on a device.

        Args:
            device: Where to.
        """
        here = self.parameter.device == device
        return self if here else MadeWeight(self.parameter.to(device))  # type: ignore[arg-type]


class QuantizedLeaf(nn.Module):
    """What every quantized layer has.

    Attributes:
        scheme: ``"int8"``, ``"int4"`` or a GGML type such as ``"q4_1"``.
        shape: (out, in) of a dense layer, (rows, size) of an embedding.
        logical_dtype: What the weight would be loaded as if it were not quantized.
        is_savable: Whether plain tensors can hold it, and so a file.

    Args:
        shape: As the attribute.
        scheme: As the attribute.
        dtype: As `logical_dtype`.
    """

    is_savable = True

    def __init__(self, shape: tuple[int, int], scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.scheme, self.logical_dtype = shape, scheme, dtype

    @property
    def num_weights(self) -> int:
        """How many numbers the weight holds."""
        return self.shape[0] * self.shape[1]

    @property
    def hidden_nbytes(self) -> int:
        """Bytes of the weight that no parameter shows."""
        return 0

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, dequantized.

        Args:
            part: A slice, or a tensor of row numbers.
            dtype: As what.
        """
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the whole weight as the reference has it: computed in float32, then rounded.

        Args:
            dtype: As what; None for `logical_dtype`.
        """
        return self.rows(slice(None), torch.float32).to(dtype or self.logical_dtype)

    def decode_product(self, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the product of a few rows with the weight, for steps of decoding.

        Args:
            rows: How many; the result is that of the layer itself for each number.
        """
        return self.forward

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the layer that stood here, with the dequantized weight.

        Args:
            dtype: Its dtype; None for `logical_dtype`.
        """
        raise NotImplementedError

    def _fixed(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def extra_repr(self) -> str:
        """Show sizes and scheme when the module is printed."""
        return f"{self.shape[1]}, {self.shape[0]}, scheme={self.scheme}"


class IntegerLeaf(QuantizedLeaf):
    """Weights as integers of 8 or 4 bits with scales.

    Attributes:
        form: How they are stored.

    Args:
        shape: (out, in).
        config: The scheme, or the form.
        dtype: As `QuantizedLeaf.logical_dtype`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None
    weight_order: nn.Parameter | None

    def __init__(
        self, shape: tuple[int, int], config: QuantizationConfig | IntegerForm, dtype: torch.dtype
    ) -> None:
        form = config if isinstance(config, IntegerForm) else config.form
        super().__init__(shape, form.method, dtype)
        self.form = form
        tensors = form.tensors(shape)
        for name in ("weight", "weight_scale", "weight_zero", "weight_order"):
            if name in tensors:
                self._fixed(name, tensors[name][0], TORCH_DTYPES[tensors[name][1]])
            else:
                self.register_parameter(name, None)
        # Scale and offset side by side, [groups, out, 2], while `weight` is in the kernel's layout.
        self._scales: torch.Tensor | None = None
        # The tensors that hold this weight and those of other layers (see `packed_products`), or None.
        self.joined: Any = None
        # Whether the weight stays as it is stored, and is laid out for the kernel at each call.
        self._lays_out_at_call = False

    def fill(self, packed: Packed) -> None:
        """Take a quantized weight.

        Args:
            packed: Of this leaf's shape and scheme.
        """
        self._scales, self.joined = packed.kernel_scales, None
        for name, tensor in (
            ("weight", packed.weight),
            ("weight_scale", packed.scale),
            ("weight_zero", packed.zero),
            ("weight_order", packed.order),
        ):
            if tensor is not None:
                self._parameters[name] = fixed(tensor)

    @property
    def is_ready(self) -> bool:
        """Whether the kernel reads the weight as it lies, not a copy that is laid out at each call."""
        return not self._lays_out_at_call

    @property
    def kernel_group(self) -> int:
        """Columns that share a scale while the weight is in the kernel's layout; 0 while it is not."""
        return 0 if self._scales is None else self.shape[1] // self._scales.shape[0]

    @property
    def kernel_scales(self) -> torch.Tensor:
        """Scales and offsets for the kernel, bfloat16 [groups, out, 2], while the weight is in its layout."""
        assert self._scales is not None
        return self._scales

    def hold(self, weight: torch.Tensor, scales: torch.Tensor, joined: Any) -> None:
        """Hold the same weight at another place, while it is in the kernel's layout.

        Args:
            weight: Like `weight`; a part of several layers' weights in one tensor.
            scales: Like `kernel_scales`.
            joined: Noted as `joined`.
        """
        is_shared = self.weight_scale.data_ptr() == self.kernel_scales.data_ptr()
        self.weight.data, self._scales, self.joined = weight, scales, joined
        if is_shared:
            self.weight_scale.data = scales[..., 0].t()
            if self.weight_zero is not None:
                self.weight_zero.data = scales[..., 1].t()

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, dequantized in `dtype`."""
        if self.weight_scale.dim() == 1:
            return self.weight[part].to(dtype) * self.weight_scale[part][..., None].to(dtype)
        integers = self.weight[part] if self.form.bits == 8 else self._integers(part)
        grouped = integers.to(dtype).view(*integers.shape[:-1], self.weight_scale.shape[1], -1)
        if self.form.zero == "point":
            grouped -= self._points(part).to(dtype)
        values = grouped.mul_(self.weight_scale[part][..., None].to(dtype))
        if self.form.zero == "offset":
            assert self.weight_zero is not None
            values += self.weight_zero[part][..., None].to(dtype)
        values = values.view(integers.shape)
        if self.weight_order is None:
            return values
        return values[..., torch.argsort(self.weight_order)]

    def _points(self, part: Any) -> torch.Tensor:
        """Return rows of zero points against the integers of `_integers`, [..., groups, 1]."""
        assert self.weight_zero is not None
        points = self.weight_zero[part][..., None]
        return points if self.form.bits == 8 else points.to(torch.int8).sub_(8)

    def _integers(self, part: Any) -> torch.Tensor:
        """Return rows of 4-bit integers as -8..7."""
        if self._scales is None:
            return unpack_nibbles(self.weight[part]).sub_(8)
        block = quantized_cuda.TILE_ROWS if self.weight.device.type == "cuda" else kernel_block()
        if isinstance(part, slice) and block is not None:
            start, stop, _ = part.indices(self.shape[0])
            first, last = start // block * block, min(-(-stop // block) * block, self.shape[0])
            return from_kernel_layout(self.weight[first:last])[start - first : stop - first].sub_(8)
        return from_kernel_layout(self.weight)[part].sub_(8)

    # -- layouts -------------------------------------------------------------------------------

    def takes_kernel_layout(self) -> bool:
        """Tell whether a CPU keeps the weight in the layout of its 4-bit kernel."""
        if self.form.bits != 4 or self.form.compute_dtype == "float32":
            return False
        is_whole = self.shape[0] % INT4_ROWS == 0 and self._kernel_group() is not None
        return is_whole and kernel_block() is not None

    def use_kernel_layout(self) -> bool:
        """Put 4-bit weights into the layout of their device's kernel, in place of the stored one.

        Both take as many bytes. The kernel wants scales and offsets in bfloat16: symmetric forms gain a
        column of zeros, and those of other libraries a rounded copy of their scales.

        Returns:
            Whether the leaf is ready for a packed kernel.
        """
        self._lays_out_at_call = False
        if not self._has_kernel():
            return False
        if self.form.bits == 8:
            if not _is_aligned(self.weight):
                # A view of a file, which packs tensors closely.
                self.weight.data = self.weight.detach().clone()
            return True
        if self._scales is not None:
            return True
        weight, scales = self._laid_out()
        is_shared = scales.shape[0] == self.weight_scale.shape[1] and self._shares_scales()
        self._parameters["weight"] = fixed(weight)
        if is_shared:
            self._parameters["weight_scale"] = fixed(scales[..., 0].t())
            if self.weight_zero is not None:
                self._parameters["weight_zero"] = fixed(scales[..., 1].t())
        self._scales = scales
        return True

    def lay_out_at_call(self) -> None:
        """Keep the weight where and as it is, and copy it into the kernel's layout for each call.

        For weights on disk, whose results are then those of resident ones, bit for bit. It takes about as
        long as the reference does.
        """
        self.use_stored_layout()
        self._lays_out_at_call = True

    def _has_kernel(self) -> bool:
        """Tell whether the weight's device has a packed kernel for its shape and form."""
        if self.weight.device.type == "cuda":
            # Its 4-bit kernel takes no other activations; those of others are multiplied by the reference.
            is_bfloat16 = self.form.compute_dtype == "bfloat16" or (
                self.form.compute_dtype is None and self.logical_dtype == torch.bfloat16
            )
            is_whole = self.form.bits == 4 and is_bfloat16 and self._kernel_group() is not None
            return is_whole and quantized_cuda.can_multiply(*self.shape, self.weight.device)
        if self.weight.device.type != "cpu" or self.form.compute_dtype == "float32":
            return False
        if self.form.bits == 8:
            return self.weight_scale.dim() == 1 and self.shape[1] % _INT8_COLUMNS == 0
        return self.takes_kernel_layout()

    def _laid_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and scales as the packed kernel takes them."""
        if self.form.bits == 8:
            weight = self.weight.detach()
            return weight if _is_aligned(weight) else weight.clone(), self.weight_scale.to(torch.bfloat16)
        if self._scales is not None:
            return self.weight, self._scales
        group = self._kernel_group()
        assert group is not None
        # One scale for several of the kernel's groups is repeated.
        times = self.shape[1] // self.weight_scale.shape[1] // group
        shape = (self.shape[1] // group, self.shape[0], 2)
        scales = torch.zeros(shape, dtype=torch.bfloat16, device=self.weight.device)
        scales[..., 0] = self.weight_scale.t().repeat_interleave(times, 0)
        if self.form.zero == "offset":
            assert self.weight_zero is not None
            scales[..., 1] = self.weight_zero.t().repeat_interleave(times, 0)
        elif self.form.zero == "point":
            # By the rounded scales: the kernel adds this to products with those, which should cancel.
            points = self._points(slice(None))[..., 0].t().float().neg_()
            scales[..., 1] = points.repeat_interleave(times, 0) * scales[..., 0].float()
        return to_kernel_layout(self.weight.detach()), scales

    def _kernel_group(self) -> int | None:
        """Return the largest of the kernel's groups that the leaf's own are made of."""
        size = self.shape[1] // self.weight_scale.shape[1]
        return next((group for group in _INT4_GROUPS if size % group == 0), None)

    def _shares_scales(self) -> bool:
        """Tell whether the stored scales are the kernel's numbers, so that one copy of them will do."""
        return self.form.scale_dtype == "bfloat16" and self.form.zero != "point"

    def use_stored_layout(self) -> None:
        """Undo `use_kernel_layout`."""
        if self._scales is None:
            return
        tensors = self.stored()
        self._scales = self.joined = None
        for name, tensor in tensors.items():
            self._parameters[name] = fixed(tensor)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name in the stored form; views where nothing needs to be undone."""
        tensors = {name: value.detach() for name, value in self.named_parameters() if name != "bias"}
        if self._scales is not None:
            from_kernel = from_kernel_layout(tensors["weight"])
            pairs = from_kernel.view(torch.int16)
            tensors["weight"] = (pairs | (pairs >> 4)).to(torch.uint8)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return tensors

    @property
    def kernel_nbytes(self) -> int:
        """Bytes of what the packed kernel reads."""
        return self.weight.nbytes + (0 if self._scales is None else self._scales.nbytes)

    @property
    def hidden_nbytes(self) -> int:
        """Bytes that no parameter shows: the kernel's column of zeros, or its copy of the scales."""
        if self._scales is None:
            return 0
        if self.weight_scale.data_ptr() != self._scales.data_ptr():
            return self._scales.nbytes
        return 0 if self.weight_zero is not None else self._scales.nbytes // 2

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._scales is not None:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        again = self._scales is not None
        self.use_stored_layout()
        super()._load_from_state_dict(*args, **kwargs)
        if again:
            self.use_kernel_layout()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        again = self._scales is not None
        self.use_stored_layout()
        scales = [value for name, value in self.named_parameters() if name.startswith("weight_")]
        before = [value.detach() for value in scales]
        super()._apply(fn, recurse)
        for value, old in zip(scales, before, strict=True):
            # Scales keep their digits through half() or float() of a module around this one.
            if value.dtype != old.dtype:
                value.data = old.to(value.device)
        if again:
            self.use_kernel_layout()
        return self


class QuantizedLinear(IntegerLeaf, Dense):
    """A dense layer whose weight is int8 or int4.

    Args:
        in_features: Columns of the weight.
        out_features: Its rows.
        config: The scheme.
        bias: Whether there is one; in the logical dtype.
        dtype: As `QuantizedLeaf.logical_dtype`.
        transposed: Whether a `Conv1D` stood here, for `plain`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantizationConfig | IntegerForm,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), config, dtype)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis; the result has the dtype of `x`."""
        return apply_dense(self, x, self.bias)

    def kernel(self, x: torch.Tensor) -> str | None:
        """Return the packed kernel for an input, or None for the reference; the one place that decides.

        Args:
            x: [rows, in].
        """
        if (
            x.device.type not in ("cpu", "cuda")
            or len(x) > (KERNEL_ROWS[self.form.bits] if x.device.type == "cpu" else CUDA_KERNEL_ROWS)
            or self.compute_dtype(x) != torch.bfloat16
        ):
            return None
        is_ready = self._lays_out_at_call
        if self.form.bits == 8:
            is_ready = x.device.type == "cpu" and (is_ready or _is_aligned(self.weight))
            return "int8pack" if is_ready and self._has_kernel() else None
        return "int4pack" if self._scales is not None or (is_ready and self._has_kernel()) else None

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype that a multiplication with `x` runs in.

        Args:
            x: The input.
        """
        wanted = self.form.compute_dtype
        if wanted is not None:
            return getattr(torch, wanted)
        return torch.bfloat16 if x.device.type == "cpu" else x.dtype

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` in the dtype of `x`, [rows, out]."""
        kernel, dtype = self.kernel(x), self.compute_dtype(x)
        inner = x.to(dtype)
        if kernel is not None and self.weight_order is not None:
            inner = inner[:, self.weight_order]
        if kernel == "int8pack":
            ready: tuple[torch.Tensor, torch.Tensor] = (self.weight.detach(), self.weight_scale.detach())
            if self._lays_out_at_call or self.weight_scale.dtype != torch.bfloat16:
                ready = self._laid_out()
            result = torch._weight_int8pack_mm(inner.contiguous(), *ready)
        elif kernel == "int4pack":
            weight, scales = (self.weight, self._scales) if self._scales is not None else self._laid_out()
            group = self.in_features // scales.shape[0]
            if x.device.type == "cuda":
                result = quantized_cuda.multiply(inner, weight, group, scales)
            else:
                # Scales that lie among those of other layers are copied (see `hold`).
                result = torch._weight_int4pack_mm_for_cpu(
                    inner.contiguous(), weight, group, scales.contiguous()
                )
        elif self.weight_scale.dim() == 1:
            # Integers up to 127 are exact in every dtype; scaling the result costs less than the weight.
            result = torch.cat(
                [
                    F.linear(inner, self.weight[part].to(dtype))
                    for part in tiles(self.out_features, self.in_features)
                ],
                dim=-1,
            ).mul_(self.weight_scale.to(dtype))
        else:
            result = linear_by_tiles(inner, self)
        return result.to(x.dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense layer (or `Conv1D`) with the dequantized weight."""
        return plain_dense(self, self.bias, self.transposed, dtype)


class QuantizedEmbedding(IntegerLeaf):
    """An embedding whose rows are int8, each with a scale.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        config: int8.
        dtype: Of what a lookup returns.
        padding_idx: As torch's, for `plain`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: QuantizationConfig | IntegerForm,
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), config, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up: [...] ids -> [..., size]."""
        return self.rows(ids, torch.float32).to(self.logical_dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return an embedding with the dequantized weight."""
        return plain_embedding(self, self.padding_idx, dtype)


def _is_aligned(weight: torch.Tensor) -> bool:
    return weight.data_ptr() % _INT8_ALIGNMENT == 0 and weight.is_contiguous()


def fixed(tensor: torch.Tensor) -> nn.Parameter:
    """Return a parameter that no optimizer changes.

    Args:
        tensor: Its values.
    """
    return nn.Parameter(tensor.detach(), requires_grad=False)


def apply_dense(leaf: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a quantized dense layer to the last axis.

    Args:
        leaf: The layer.
        x: [..., in].
        bias: Added in the dtype of the result.

    Raises:
        WeightsError: the layer has no values yet.
    """
    if leaf.weight.is_meta and not x.is_meta:
        raise WeightsError("A quantized layer has no values yet", where=repr(leaf), mend="Load it first.")
    flat = x.reshape(-1, x.shape[-1])
    result = (
        QuantizedMatmul.apply(flat, leaf)
        if x.requires_grad and torch.is_grad_enabled()
        else leaf.multiply(flat)
    )
    result = result.view(*x.shape[:-1], leaf.out_features)
    return result if bias is None else result + bias.to(result.dtype)


def plain_dense(
    leaf: Any, bias: torch.Tensor | None, transposed: bool, dtype: torch.dtype | None
) -> nn.Module:
    """Return the dense layer that a leaf stands for, with its weight dequantized.

    Args:
        leaf: With `in_features` and `out_features`.
        bias: Its bias.
        transposed: Whether it stands for a `Conv1D`.
        dtype: Of the layer; None for the leaf's `logical_dtype`.
    """
    weight = leaf.dequantized(dtype)
    with no_memory():
        layer: Any = (
            Conv1D(leaf.out_features, leaf.in_features)
            if transposed
            else nn.Linear(leaf.in_features, leaf.out_features, bias=bias is not None)
        )
    layer.weight = nn.Parameter(weight.t().contiguous() if transposed else weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
    return layer.train(leaf.training)


def plain_embedding(leaf: Any, padding_idx: int | None, dtype: torch.dtype | None) -> nn.Module:
    """Return the embedding that a quantized one stands for.

    Args:
        leaf: The layer.
        padding_idx: As torch's.
        dtype: Of the weight; None for what it would have been loaded as.
    """
    weight = leaf.dequantized(dtype)
    layer = nn.Embedding(leaf.shape[0], leaf.shape[1], padding_idx=padding_idx, _weight=weight)
    return layer.train(leaf.training)
