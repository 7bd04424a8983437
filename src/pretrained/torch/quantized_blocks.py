# SPDX-License-Identifier: Apache-2.0
"""Leaves on GGML's blocks: weights of a GGUF file that stay packed.

`weight` is the file's own bytes. It is decoded a tile at a time when it is used; or, where the model computes
in bfloat16 on a CPU, repacked once for the 4-bit kernel, and looked at again only to save or to dequantize.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from pretrained.torch.blocks import decode, kernel_form, kernel_packs, repack
from pretrained.torch.offload import release_clean
from pretrained.torch.quantized import (
    INT4_ROWS,
    QuantizedLeaf,
    QuantizedLinear,
    apply_dense,
    fixed,
    plain_dense,
    plain_embedding,
)
from pretrained.torch.quantized_ops import KERNEL_ROWS, Dense, kernel_block, linear_by_tiles, row_bytes
from pretrained.torch.rounding import TILE


class GgufLeaf(QuantizedLeaf):
    """Rows of GGML's blocks, as they lie in the file; usually a view of the mapped file itself.

    Llama's converter stores the rows of two projections in another order than the model has them. `weight`
    then keeps the file's order, so that it can stay the file's own pages; rows are put in order when they are
    decoded, and in state dicts.

    Args:
        shape: (out, in).
        block_type: GGML's name.
        dtype: As `QuantizedLeaf.logical_dtype`.
    """

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, int], block_type: str, dtype: torch.dtype) -> None:
        super().__init__(shape, block_type, dtype)
        self._fixed("weight", (shape[0], row_bytes(block_type, shape[1])), torch.uint8)
        # Where in `weight` each row of the model lies; None where all are in order.
        self._order: torch.Tensor | None = None

    def rows(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return rows of the weight, decoded as GGML does."""
        where = part.reshape(-1) if isinstance(part, torch.Tensor) else part
        if self._order is not None:
            where = self._order[where]
        values = decode(self.weight[where], self.scheme, self.shape[1]).to(dtype)
        return values.view(*part.shape, -1) if isinstance(part, torch.Tensor) else values

    def lies_in_order(self, order: torch.Tensor) -> None:
        """Note that the rows of `weight` lie in another order than the model's.

        Args:
            order: int64 [out], for each of the model's rows where it lies.
        """
        self._order = order

    def use_stored_layout(self) -> None:
        """Put the rows in order, in memory of their own where they are not."""
        if self._order is not None:
            self.weight = fixed(self.weight.detach()[self._order])
            self._order = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._order is not None:
            destination[f"{prefix}weight"] = self.weight.detach()[self._order]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.use_stored_layout()
        super()._load_from_state_dict(*args, **kwargs)


class GgufLinear(GgufLeaf, Dense):
    """A dense layer on GGML's blocks.

    Args:
        in_features: Columns of the weight.
        out_features: Its rows.
        block_type: GGML's name.
        bias: Whether there is one.
        dtype: As `QuantizedLeaf.logical_dtype`.
        transposed: Whether a `Conv1D` stood here, for `plain`.

    Attributes:
        computes_in: Dtype of the multiplication; None for that of the input, which multiplies with exactly
            the file's values.
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
        self.computes_in: torch.dtype | None = None
        self._lays_out_at_call = False
        # The weight for the 4-bit kernel, as one matrix or the sum of two; no modules of the model.
        self._repacked: tuple[QuantizedLinear, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis; the result has the dtype of `x`."""
        return apply_dense(self, x, self.bias)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``, [rows, out]: by the kernel, or with the weight decoded tile by tile."""
        if x.device.type == "cpu" and (self._repacked or (self._lays_out_at_call and self._has_kernel())):
            # Repacking at a call gives weights on disk the results of resident ones.
            first, *rest = self._repacked or self._repack()
            result = first.multiply(x)
            for other in rest:
                result += other.multiply(x)
            return result
        # A few rows wait for the weight, which is best multiplied while it is in the cache.
        size = TILE if len(x) <= KERNEL_ROWS[4] else 16 * TILE
        if self.computes_in is None:
            return linear_by_tiles(x, self, size)
        return linear_by_tiles(x.to(self.computes_in), self, size).to(x.dtype)

    def use_kernel_layout(self) -> bool:
        """Repack the weight for the 4-bit kernel of this CPU, if it is to be used; `weight` stays.

        Returns:
            Whether the leaf is ready for a packed kernel.
        """
        self._lays_out_at_call = False
        if self._has_kernel() and not self._repacked:
            self._repacked = self._repack()
            # The file's pages come back when something asks for them.
            release_clean(self.weight.detach())
        return bool(self._repacked)

    def lay_out_at_call(self) -> None:
        """Keep the weight where and as it is, and repack it for each call: for weights that move."""
        self._repacked = ()
        self._lays_out_at_call = True

    def use_stored_layout(self) -> None:
        """Forget the repacked weight, and put the rows in order."""
        self._repacked = ()
        super().use_stored_layout()

    @property
    def repacked(self) -> tuple[QuantizedLinear, ...]:
        """The matrices for the 4-bit kernel whose sum the weight is; none where it is decoded instead."""
        return self._repacked

    @property
    def hidden_nbytes(self) -> int:
        """Bytes that no parameter shows."""
        return sum(part.kernel_nbytes for part in self._repacked)

    def _has_kernel(self) -> bool:
        wanted = (self.computes_in or self.logical_dtype) == torch.bfloat16
        fits = self.out_features % INT4_ROWS == 0 and kernel_packs(self.scheme) > 0
        return wanted and fits and self.weight.device.type == "cpu" and kernel_block() is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        again = bool(self._repacked)
        super()._load_from_state_dict(*args, **kwargs)
        if again:
            self.use_kernel_layout()

    def _repack(self) -> tuple[QuantizedLinear, ...]:
        rows = self.weight.detach()
        found = []
        for packed in repack(rows, self.scheme, self.in_features, self._order):
            with torch.device("meta"):
                part = QuantizedLinear(self.in_features, self.out_features, kernel_form(), bias=False)
            part.fill(packed)
            found.append(part)
        return tuple(found)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        again, self._repacked = bool(self._repacked), ()
        super()._apply(fn, recurse)
        if again:
            self.use_kernel_layout()
        return self

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a dense layer (or `Conv1D`) with the decoded weight."""
        return plain_dense(self, self.bias, self.transposed, dtype)


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
        return plain_embedding(self, self.padding_idx, dtype)
