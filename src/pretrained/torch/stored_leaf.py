# SPDX-License-Identifier: Apache-2.0
"""Leaves whose tensors are those of another library's checkpoint, under its names and as they lie.

`pretrained.core.stored_layers` says what they mean. On a CPU they are views of the mapped file, can be left
on disk, and are saved as they came. Dense layers of 4- and 8-bit integers go through torch's packed kernels
where their groups allow it; everything else is decoded tile by tile and multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.core.quantization import GROUP_SIZES
from pretrained.core.stored_layers import LayerForm
from pretrained.torch.quantized import (
    _INT8_COLUMNS,
    INT4_ROWS,
    QuantizedLeaf,
    _is_aligned,
    apply_dense,
    fixed,
    plain_dense,
    plain_embedding,
)
from pretrained.torch.quantized_ops import (
    CHUNK,
    KERNEL_ROWS,
    Dense,
    from_kernel_layout,
    kernel_block,
    linear_by_tiles,
    pack_nibbles,
    tiles,
    to_kernel_layout,
    unpack_nibbles,
)
from pretrained.torch.tensors import TORCH_DTYPES


class StoredLeaf(QuantizedLeaf):
    """A weight in the form of another library.

    Attributes:
        form: How its tensors are read.

    Args:
        form: As the attribute.
        dtype: As `QuantizedLeaf.logical_dtype`.
        compute_dtype: What it multiplies in, or None.
    """

    def __init__(self, form: LayerForm, dtype: torch.dtype, compute_dtype: str | None = None) -> None:
        super().__init__(form.shape, form.name, dtype)
        self.form, self.wanted_dtype = form, compute_dtype
        for name, (kind, shape) in form.tensors.items():
            # Not register_parameter: `weight` is a name of every leaf, whatever its tensor is called.
            self._parameters[name] = fixed(torch.empty(shape, dtype=TORCH_DTYPES[kind]))
        # Scales for a packed kernel, bfloat16, while the integers are ready for it; the stored ones stay.
        self._kernel_scales: torch.Tensor | None = None
        # Which input each column belongs to while the columns are sorted by their groups.
        self._columns: torch.Tensor | None = None
        # Whether the integers stay as they are stored, and are laid out for the kernel at each call.
        self._lays_out_at_call = False

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The tensor of integers or 8-bit floats, in the stored form or a kernel's; as many bytes."""
        return self._tensor(self.form.data)

    def _tensor(self, name: str) -> nn.Parameter:
        found = self._parameters[name]
        assert found is not None
        return found

    # -- values --------------------------------------------------------------------------------

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, computed in float32 and then rounded to `dtype`."""
        values = self._numbers(part).to(torch.float32)
        if self.form.zero is not None:
            values = self._combine(torch.sub, values, self._zeros(part).to(torch.float32))
        return self._combine(torch.mul, values, self._grid_rows(self.form.scale, part)).to(dtype)

    def dequantized(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the whole weight: computed in float32, a piece at a time, then rounded."""
        result = torch.empty(self.shape, dtype=dtype or self.logical_dtype, device=self.weight.device)
        self.decode_into(result)
        return result

    def decode_into(self, target: torch.Tensor) -> None:
        """Write the whole weight, in pieces that stay in the cache.

        Args:
            target: [out, in], of any floating dtype.
        """
        step = max(1, CHUNK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            target[part].copy_(self.rows(part, torch.float32))

    def _numbers(self, part: Any) -> torch.Tensor:
        """Return rows of 8-bit floats, or of integers as int8."""
        form, data = self.form, self.weight.detach()
        if not form.packed:
            return data[part]
        if form.bits == 8:
            stored = data[part].contiguous().view(torch.uint8)
            signed = stored if self._kernel_scales is not None else stored ^ 0x80
            return signed.view(torch.int8)[..., : self.shape[1]]
        if self._kernel_scales is None:
            packed = data[part].contiguous().view(torch.uint8)
            return unpack_nibbles(packed)[..., : self.shape[1]].sub_(8)
        return self._from_kernel(part)

    def _from_kernel(self, part: Any) -> torch.Tensor:
        block, rows = kernel_block(), self.weight.detach().view(torch.uint8)
        assert block is not None
        if isinstance(part, slice):
            start, stop, _ = part.indices(self.shape[0])
            first, last = start // block * block, min(-(-stop // block) * block, self.shape[0])
            found = from_kernel_layout(rows[first:last])[start - first : stop - first]
        else:
            found = from_kernel_layout(rows)[part]
        if self._columns is not None:
            found = torch.empty_like(found).index_copy_(-1, self._columns, found)
        return found.sub_(8)

    def _order(self) -> torch.Tensor | None:
        """Return the group of each input, or None where they are in their usual order (or say -1)."""
        if self.form.order is None:
            return None
        order = self._tensor(self.form.order).detach().long()
        return order if int(order.min()) >= 0 else None

    def _row_numbers(self, part: Any) -> torch.Tensor:
        if isinstance(part, slice):
            return torch.arange(*part.indices(self.shape[0]), device=self.weight.device)
        return part

    def _grid_rows(self, name: str, part: Any) -> torch.Tensor:
        """Return rows [..., across] of scales or plain zeros, float32; one row where all share it."""
        down, across = self.form.grid
        grid = self._tensor(name).detach().view(down, across)
        if down == 1:
            return grid[0].to(torch.float32)
        if self.form.block[0] == 1:
            return grid[part].to(torch.float32)
        return grid[self._row_numbers(part) // self.form.block[0]].to(torch.float32)

    def _zeros(self, part: Any) -> torch.Tensor:
        assert self.form.zero is not None
        if not self.form.zero_is_packed:
            return self._grid_rows(self.form.zero, part)
        bits, numbers = self.form.bits, self._row_numbers(part)
        if self.form.grid[0] == 1:
            numbers = torch.zeros_like(numbers)
        words = self._tensor(self.form.zero).detach()[numbers * bits // 32]
        return ((words >> (numbers * bits % 32)[..., None]) & ((1 << bits) - 1)) - (1 << (bits - 1))

    def _combine(
        self, apply: Callable[..., torch.Tensor], values: torch.Tensor, grid: torch.Tensor
    ) -> torch.Tensor:
        """Apply scales or zeros [..., across] to values [..., in], which are overwritten."""
        across, size = grid.shape[-1], self.form.block[1]
        order = self._order()
        if order is not None:
            return apply(values, grid[..., order], out=values)
        if across == 1:
            return apply(values, grid, out=values)
        if across * size == self.shape[1]:
            grouped = values.unflatten(-1, (across, size))
            apply(grouped, grid[..., None], out=grouped)
            return values
        return apply(values, grid.repeat_interleave(size, -1)[..., : self.shape[1]], out=values)

    # -- layouts -------------------------------------------------------------------------------

    def use_kernel_layout(self) -> bool:
        """Make integers ready for this CPU's packed kernel; False where there is none for them."""
        return False

    def lay_out_at_call(self) -> None:
        """Keep the integers where and as they are, and copy them into the kernel's layout for each call."""

    def use_stored_layout(self) -> None:
        """Undo `use_kernel_layout`."""
        if self._kernel_scales is not None:
            data = self.stored()[self.form.data]
            self._kernel_scales = self._columns = None
            self._parameters[self.form.data] = fixed(data)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name as the file has them; views where nothing needs to be undone."""
        tensors = {name: self._tensor(name).detach() for name in self.form.tensors}
        if self._kernel_scales is None or not self.form.packed:
            return tensors
        whole = self._numbers(slice(None))
        if self.form.bits == 8:
            packed = whole.view(torch.uint8) ^ 0x80
        else:
            packed = pack_nibbles((whole + 8).view(torch.uint8))
        return tensors | {self.form.data: packed.view(torch.int32)}

    @property
    def hidden_nbytes(self) -> int:
        """Bytes that no parameter shows: a kernel's scales and the order of its columns."""
        hidden = (self._kernel_scales, self._columns)
        return sum(tensor.nbytes for tensor in hidden if tensor is not None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel_scales is not None and self.form.packed:
            destination.update({prefix + name: tensor for name, tensor in self.stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        again = self._kernel_scales is not None
        self.use_stored_layout()
        super()._load_from_state_dict(*args, **kwargs)
        if again:
            self.use_kernel_layout()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        again = self._kernel_scales is not None
        self.use_stored_layout()
        before = {name: self._tensor(name).detach() for name in self.form.tensors}
        super()._apply(fn, recurse)
        for name, old in before.items():
            # Numbers keep their digits through half() or float() of a module around this one.
            value = self._tensor(name)
            if value.dtype != old.dtype:
                value.data = old.to(value.device)
        if again:
            self.use_kernel_layout()
        return self


class StoredLinear(StoredLeaf, Dense):
    """A dense layer whose weight another library has quantized.

    Args:
        form: How its tensors are read.
        dtype: As `QuantizedLeaf.logical_dtype`.
        compute_dtype: What it multiplies in; None for bfloat16 with integers on a CPU, where the packed
            kernels are, and otherwise for the dtype of the input.
    """

    def __init__(self, form: LayerForm, dtype: torch.dtype, compute_dtype: str | None = None) -> None:
        super().__init__(form, dtype, compute_dtype)
        self.out_features, self.in_features = form.shape
        self.bias: nn.Parameter | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis; the result has the dtype of `x`."""
        return apply_dense(self, x, self.bias)

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Return the dtype that a multiplication with `x` runs in.

        Args:
            x: The input.
        """
        if self.wanted_dtype is not None:
            return TORCH_DTYPES[self.wanted_dtype]
        return torch.bfloat16 if self.form.kind == "int" and x.device.type == "cpu" else x.dtype

    def kernel(self, x: torch.Tensor) -> str | None:
        """Return the packed kernel for an input, or None for the reference; the one place that decides.

        Args:
            x: [rows, in].
        """
        few = KERNEL_ROWS.get(self.form.bits, 0)
        if x.device.type != "cpu" or len(x) > few or self.compute_dtype(x) != torch.bfloat16:
            return None
        is_ready = self._kernel_scales is not None or (self._lays_out_at_call and self._has_kernel())
        return f"int{self.form.bits}pack" if is_ready else None

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` in the dtype of `x`, [rows, out]."""
        kernel, dtype = self.kernel(x), self.compute_dtype(x)
        inner = x.to(dtype)
        if kernel is None and self._scales_outputs(dtype):
            result = self._scaled_outputs(inner)
        elif kernel is None:
            result = linear_by_tiles(inner, self)
        else:
            data, scales, columns = self._laid_out()
            inner = (inner if columns is None else inner[:, columns]).contiguous()
            if kernel == "int8pack":
                result = torch._weight_int8pack_mm(inner, data.view(torch.int8), scales)
            else:
                group = self.in_features // len(scales)
                result = torch.ops.aten._weight_int4pack_mm_for_cpu(
                    inner, data.view(torch.uint8), group, scales
                )
        return result.to(x.dtype)

    def _scales_outputs(self, dtype: torch.dtype) -> bool:
        """Tell whether the outputs can be scaled instead of the weight, which costs less.

        Integers up to 128 and 8-bit floats are exact in bfloat16; in float16 their sums may overflow.
        """
        form = self.form
        alone = form.grid[1] == 1 and form.block[0] in (1, self.shape[0]) and form.zero is None
        return alone and form.order is None and dtype != torch.float16

    def _scaled_outputs(self, x: torch.Tensor) -> torch.Tensor:
        parts = [F.linear(x, self._numbers(part).to(x.dtype)) for part in tiles(*self.shape)]
        scale = self._grid_rows(self.form.scale, slice(None)).reshape(-1)
        return torch.cat(parts, dim=-1).mul_(scale.to(x.dtype))

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense layer with the decoded weight."""
        return plain_dense(self, self.bias, False, dtype)

    # -- layouts -------------------------------------------------------------------------------

    def use_kernel_layout(self) -> bool:
        """Put integers into the layout of this CPU's kernel, in place of the stored one; as many bytes.

        Scales are rounded to bfloat16 for the kernel; the stored ones stay for everything else.

        Returns:
            Whether the leaf is ready for a packed kernel.
        """
        self._lays_out_at_call = False
        if self._kernel_scales is None and self._has_kernel():
            data, scales, columns = self._laid_out()
            self._parameters[self.form.data] = fixed(data)
            self._kernel_scales, self._columns = scales, columns
        return self._kernel_scales is not None

    def lay_out_at_call(self) -> None:
        """Keep the integers where and as they are, and copy them into the kernel's layout for each call.

        For weights on disk, whose results are then those of resident ones, bit for bit.
        """
        self.use_stored_layout()
        self._lays_out_at_call = True

    def _has_kernel(self) -> bool:
        """Tell whether this CPU has a packed kernel for the form."""
        form = self.form
        allowed = form.kind == "int" and self.wanted_dtype in (None, "bfloat16")
        if not allowed or self.weight.device.type != "cpu" or form.block[0] not in (1, self.shape[0]):
            return False
        if form.bits == 8:
            return form.zero is None and form.grid[1] == 1 and self.shape[1] % _INT8_COLUMNS == 0
        if not form.packed or self.shape[0] % INT4_ROWS or self._kernel_group() is None:
            return False
        order = self._order()
        size = min(form.block[1], self.shape[1])
        is_even = order is None or bool((order.bincount(minlength=form.grid[1]) == size).all())
        return is_even and kernel_block() is not None

    def _kernel_group(self) -> int | None:
        """Return the largest of the kernel's groups that the form's own are made of."""
        size = min(self.form.block[1], self.shape[1])
        return next((group for group in reversed(GROUP_SIZES) if size % group == 0), None)

    def _laid_out(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the integers, the scales and the order of the inputs as the packed kernel takes them."""
        form, data = self.form, self.weight.detach()
        if self._kernel_scales is not None:
            return data, self._kernel_scales, self._columns
        rows = self.shape[0]
        scale = self._grid_rows(form.scale, slice(None)).expand(rows, -1).to(torch.bfloat16)
        if form.bits == 8:
            if form.packed:
                data = (data.contiguous().view(torch.uint8) ^ 0x80).view(torch.int32)
            elif not _is_aligned(data):
                # A view of a file, which packs tensors closely.
                data = data.clone(memory_format=torch.contiguous_format)
            return data, scale.reshape(-1).contiguous(), None
        group = self._kernel_group()
        assert group is not None
        nibbles = data.contiguous().view(torch.uint8)
        columns = order = self._order()
        if order is not None:
            columns = order.argsort(stable=True)
            nibbles = _sorted_columns(nibbles, columns)
        times = min(form.block[1], self.shape[1]) // group
        scales = torch.zeros(self.shape[1] // group, rows, 2, dtype=torch.bfloat16)
        scales[..., 0] = scale.repeat_interleave(times, -1).t()
        if form.zero is not None:
            # From the rounded scale, so that a zero stays as near to zero as bfloat16 has it.
            offset = self._zeros(slice(None)).to(torch.float32).neg() * scale.to(torch.float32)
            scales[..., 1] = offset.repeat_interleave(times, -1).t()
        return to_kernel_layout(nibbles).view(torch.int32), scales, columns


class StoredEmbedding(StoredLeaf):
    """An embedding that another library has quantized; rows are decoded when they are looked up.

    Args:
        form: How its tensors are read.
        dtype: Of what a lookup returns.
        padding_idx: As torch's, for `plain`.
    """

    def __init__(self, form: LayerForm, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(form, dtype)
        self.num_embeddings, self.embedding_dim = form.shape
        self.padding_idx = padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up: [...] ids -> [..., size]."""
        return self.rows(ids, self.logical_dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return an embedding with the decoded weight."""
        return plain_embedding(self, self.padding_idx, dtype)


def stored_leaf(
    module: nn.Module, form: LayerForm, dtype: torch.dtype, compute_dtype: str | None = None
) -> StoredLeaf:
    """Return an empty leaf for a layer, on the meta device; it shares the layer's bias.

    Args:
        module: A `Linear` or `Embedding`.
        form: How its tensors are read.
        dtype: What its weight would be loaded as.
        compute_dtype: What it multiplies in, or None.
    """
    leaf: Any
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            leaf = StoredEmbedding(form, dtype, module.padding_idx)
        else:
            leaf = StoredLinear(form, dtype, compute_dtype)
    if getattr(module, "bias", None) is not None:
        leaf.bias = module.bias
    leaf._initialised = True
    return leaf.train(module.training)


def _sorted_columns(nibbles: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(nibbles)
    for part in tiles(len(nibbles), 2 * nibbles.shape[1]):
        integers = unpack_nibbles(nibbles[part])[:, order].contiguous()
        result[part] = pack_nibbles(integers.view(torch.uint8))
    return result
