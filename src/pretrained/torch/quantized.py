# SPDX-License-Identifier: Apache-2.0
"""Leaves with quantized weights: what stands where a dense layer or an embedding was.

Their weights are plain, named, fixed tensors in the forms of `pretrained.core.quantization`, so that
state dicts, safetensors files and placement handle them like any other. A leaf picks the way to multiply
at each call: a packed kernel of torch's core where there is one, otherwise the reference, which
dequantizes and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import WeightsError
from pretrained.torch.empty import no_memory
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized_ops import (
    KERNEL_ROWS,
    Dense,
    QuantizedMatmul,
    dequantize_blocks,
    from_kernel_layout,
    kernel_block,
    linear_by_tiles,
    row_bytes,
    tiles,
    to_kernel_layout,
    unpack_nibbles,
)
from pretrained.torch.rounding import Packed

# What int8pack reads at a time: with other widths it reads past the end of a row, and at addresses that do
# not divide by 16 it kills the process, without a check for either (torch 2.13, x86).
_INT8_COLUMNS = 32
_INT8_ALIGNMENT = 16
# What int4pack packs at a time.
_INT4_ROWS = 16


class QuantizedLeaf(nn.Module):
    """What every quantized layer has.

    Attributes:
        scheme: ``"int8"``, ``"int4"`` or a GGML type such as ``"q4_1"``.
        shape: (out, in) of a dense layer, (rows, size) of an embedding.
        logical_dtype: What the weight would be loaded as if it were not quantized.

    Args:
        shape: As the attribute.
        scheme: As the attribute.
        dtype: As `logical_dtype`.
    """

    def __init__(self, shape: tuple[int, int], scheme: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.scheme, self.logical_dtype = shape, scheme, dtype

    @property
    def num_weights(self) -> int:
        """How many numbers the weight holds."""
        return self.shape[0] * self.shape[1]

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
    """Weights as int8 or int4 with bfloat16 scales.

    Args:
        shape: (out, in).
        config: The scheme.
        dtype: As `QuantizedLeaf.logical_dtype`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], config: QuantizationConfig, dtype: torch.dtype) -> None:
        super().__init__(shape, config.quant_method, dtype)
        self.config = config
        rows, columns = shape
        if config.bits == 8:
            self._fixed("weight", (rows, columns), torch.int8)
            self._fixed("weight_scale", (rows,), torch.bfloat16)
        else:
            assert config.group_size is not None
            self._fixed("weight", (rows, columns // 2), torch.uint8)
            self._fixed("weight_scale", (rows, columns // config.group_size), torch.bfloat16)
        if config.symmetric:
            self.weight_zero = None
        else:
            self._fixed("weight_zero", (rows, columns // (config.group_size or columns)), torch.bfloat16)
        # Scale and zero side by side, [groups, out, 2], while `weight` is in the kernel's layout.
        self._scales: torch.Tensor | None = None

    def fill(self, packed: Packed) -> None:
        """Take a quantized weight.

        Args:
            packed: Of this leaf's shape and scheme.
        """
        self._scales = packed.kernel_scales
        for name, tensor in (
            ("weight", packed.weight),
            ("weight_scale", packed.scale),
            ("weight_zero", packed.zero),
        ):
            if tensor is not None:
                self._parameters[name] = _fixed(tensor)

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, dequantized in `dtype`."""
        if self.config.bits == 8:
            return self.weight[part].to(dtype) * self.weight_scale[part][..., None].to(dtype)
        integers = self._integers(part)
        grouped = integers.to(dtype).view(*integers.shape[:-1], self.weight_scale.shape[1], -1)
        values = grouped.mul_(self.weight_scale[part][..., None].to(dtype))
        if self.weight_zero is not None:
            values += self.weight_zero[part][..., None].to(dtype)
        return values.view(integers.shape)

    def _integers(self, part: Any) -> torch.Tensor:
        """Return rows of 4-bit integers as -8..7."""
        if self._scales is None:
            return unpack_nibbles(self.weight[part]).sub_(8)
        block = kernel_block()
        if isinstance(part, slice) and block is not None:
            start, stop, _ = part.indices(self.shape[0])
            first, last = start // block * block, min(-(-stop // block) * block, self.shape[0])
            return from_kernel_layout(self.weight[first:last])[start - first : stop - first].sub_(8)
        return from_kernel_layout(self.weight)[part].sub_(8)

    # -- layouts -------------------------------------------------------------------------------

    def takes_kernel_layout(self) -> bool:
        """Return whether 4-bit weights on a CPU are kept in the layout of its kernel."""
        suits = self.config.bits == 4 and self.config.compute_dtype != "float32"
        return suits and self.shape[0] % _INT4_ROWS == 0 and kernel_block() is not None

    def use_kernel_layout(self) -> bool:
        """Put 4-bit weights into the layout of this CPU's kernel, in place of the stored one.

        Both take as many bytes. Symmetric forms gain a column of zeros that the kernel wants.

        Returns:
            Whether the leaf is ready for a packed kernel.
        """
        if self.weight.device.type != "cpu" or self.config.compute_dtype == "float32":
            return False
        if self.config.bits == 8:
            if self.shape[1] % _INT8_COLUMNS == 0 and not _is_aligned(self.weight):
                # A view of a file, which packs tensors closely.
                self.weight.data = self.weight.detach().clone()
            return self.shape[1] % _INT8_COLUMNS == 0
        if self._scales is not None:
            return True
        if not self.takes_kernel_layout():
            return False
        scales = torch.zeros(self.weight_scale.shape[1], self.shape[0], 2, dtype=torch.bfloat16)
        scales[..., 0] = self.weight_scale.t()
        self._parameters["weight"] = _fixed(to_kernel_layout(self.weight.detach()))
        self._parameters["weight_scale"] = _fixed(scales[..., 0].t())
        if self.weight_zero is not None:
            scales[..., 1] = self.weight_zero.t()
            self._parameters["weight_zero"] = _fixed(scales[..., 1].t())
        self._scales = scales
        return True

    def use_stored_layout(self) -> None:
        """Undo `use_kernel_layout`."""
        if self._scales is None:
            return
        tensors = self.stored()
        self._scales = None
        for name, tensor in tensors.items():
            self._parameters[name] = _fixed(tensor)

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
    def hidden_nbytes(self) -> int:
        """Bytes that no parameter shows: the kernel's column of zeros."""
        if self._scales is None or self.weight_zero is not None:
            return 0
        return self.weight_scale.numel() * self.weight_scale.element_size()

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
        config: QuantizationConfig,
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
        return _apply_dense(self, x, self.bias)

    def kernel(self, x: torch.Tensor) -> str | None:
        """Return the packed kernel for an input, or None for the reference; the one place that decides.

        Args:
            x: [rows, in].
        """
        if x.device.type != "cpu" or len(x) > KERNEL_ROWS or self.compute_dtype(x) != torch.bfloat16:
            return None
        if self.config.bits == 8:
            fits = self.in_features % _INT8_COLUMNS == 0 and _is_aligned(self.weight)
            return "int8pack" if fits else None
        return "int4pack" if self._scales is not None else None

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype that a multiplication with `x` runs in.

        Args:
            x: The input.
        """
        wanted = self.config.compute_dtype
        if wanted is not None:
            return getattr(torch, wanted)
        return torch.bfloat16 if x.device.type == "cpu" else x.dtype

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` in the dtype of `x`, [rows, out]."""
        kernel, dtype = self.kernel(x), self.compute_dtype(x)
        inner = x.to(dtype)
        if kernel == "int8pack":
            result = torch._weight_int8pack_mm(inner.contiguous(), self.weight, self.weight_scale)
        elif kernel == "int4pack":
            group = self.in_features // self.weight_scale.shape[1]
            result = torch.ops.aten._weight_int4pack_mm_for_cpu(
                inner.contiguous(), self.weight, group, self._scales
            )
        elif self.config.bits == 8:
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
        return _plain_dense(self, self.bias, self.transposed, dtype)


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
        config: QuantizationConfig,
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
        return _plain_embedding(self, self.padding_idx, dtype)


class GgufLeaf(QuantizedLeaf):
    """Rows of GGML's blocks, as they lie in the file; usually a view of the mapped file itself.

    Args:
        shape: (out, in).
        block_type: GGML's name.
        dtype: As `QuantizedLeaf.logical_dtype`.
    """

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, int], block_type: str, dtype: torch.dtype) -> None:
        super().__init__(shape, block_type, dtype)
        self._fixed("weight", (shape[0], row_bytes(block_type, shape[1])), torch.uint8)

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, decoded as GGML does."""
        if isinstance(part, torch.Tensor):
            flat = self.weight[part.reshape(-1)]
            return dequantize_blocks(flat, self.scheme, self.shape[1]).to(dtype).view(*part.shape, -1)
        return dequantize_blocks(self.weight[part], self.scheme, self.shape[1]).to(dtype)


class GgufLinear(GgufLeaf, Dense):
    """A dense layer on GGML's blocks.

    Args:
        in_features: Columns of the weight.
        out_features: Its rows.
        block_type: GGML's name.
        bias: Whether there is one.
        dtype: As `QuantizedLeaf.logical_dtype`.
        transposed: Whether a `Conv1D` stood here, for `plain`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_type: str,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), block_type, dtype)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis; the result has the dtype of `x`."""
        return _apply_dense(self, x, self.bias)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``, [rows, out], the weight decoded tile by tile."""
        return linear_by_tiles(x, self)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense layer (or `Conv1D`) with the decoded weight."""
        return _plain_dense(self, self.bias, self.transposed, dtype)


class GgufEmbedding(GgufLeaf):
    """An embedding on GGML's blocks; rows are decoded when they are looked up.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        block_type: GGML's name.
        dtype: Of what a lookup returns.
        padding_idx: As torch's, for `plain`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        block_type: str,
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), block_type, dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up: [...] ids -> [..., size]."""
        return self.rows(ids, self.logical_dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return an embedding with the decoded weight."""
        return _plain_embedding(self, self.padding_idx, dtype)


def _is_aligned(weight: torch.Tensor) -> bool:
    return weight.data_ptr() % _INT8_ALIGNMENT == 0 and weight.is_contiguous()


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _apply_dense(leaf: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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


def _plain_dense(
    leaf: Any, bias: torch.Tensor | None, transposed: bool, dtype: torch.dtype | None
) -> nn.Module:
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


def _plain_embedding(leaf: Any, padding_idx: int | None, dtype: torch.dtype | None) -> nn.Module:
    weight = leaf.dequantized(dtype)
    layer = nn.Embedding(leaf.shape[0], leaf.shape[1], padding_idx=padding_idx, _weight=weight)
    return layer.train(leaf.training)
