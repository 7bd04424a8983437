# SPDX-License-Identifier: Apache-2.0
"""Attention masks: who may look at whom, as booleans, built only where a kernel needs one."""

from __future__ import annotations

import torch

from pretrained.errors import ArgumentError


def causal_mask(
    *,
    query_length: int,
    kv_length: int,
    kv_offset: int = 0,
    query_positions: torch.Tensor | int,
    attention_mask: torch.Tensor | None,
    window: int | None = None,
    device: torch.device,
) -> torch.Tensor | None:
    """Return which keys each query of a decoder may look at.

    Args:
        query_length: New tokens.
        kv_length: Keys that the attention will see, cached ones included.
        kv_offset: Position of the first key (a sliding cache has let go of those before it).
        query_positions: Position of the first query, or the positions of all as a [length] tensor.
        attention_mask: [batch, total length] with 0 for padding; a ready [batch, 1 or heads, query,
            key] mask, boolean or additive, is passed through; None where nothing is padded.
        window: How many tokens back a query sees, itself included; None for all.
        device: Where the mask is made.

    Returns:
        [batch or 1, 1, query, key] booleans, True where a query may look; or None where plain causal
        attention (or, for a single query, no masking at all) says the same.

    Raises:
        ArgumentError: `attention_mask` has another rank or length, or is a ready one of whole numbers.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _ready(attention_mask)
    static = isinstance(query_positions, torch.Tensor)
    first = 0 if isinstance(query_positions, torch.Tensor) else query_positions
    narrow = window is not None and (static or first + query_length > window)
    if attention_mask is None and not static and not narrow:
        whole = kv_offset == 0 and kv_length == first + query_length
        if whole and (query_length == 1 or first == 0):
            return None
    keys = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    if isinstance(query_positions, torch.Tensor):
        queries = query_positions
    else:
        queries = torch.arange(first, first + query_length, device=device)
    allowed = keys[None, :] <= queries[:, None]
    if window is not None and narrow:
        allowed = allowed & (keys[None, :] > queries[:, None] - window)
    allowed = allowed[None, None]
    if attention_mask is None:
        return allowed
    return allowed & _padding(attention_mask, kv_offset, kv_length, static)[:, None, None, :]


def padding_mask(attention_mask: torch.Tensor | None, *, kv_length: int) -> torch.Tensor | None:
    """Return which keys an encoder's (or a cross-attention's) queries may look at.

    Args:
        attention_mask: [batch, key] with 0 for padding, [batch, query, key], or a ready 4-D mask.
        kv_length: Keys that the attention will see.

    Returns:
        [batch, 1, 1 or query, key] booleans, or None where nothing is masked.

    Raises:
        ArgumentError: another rank or length, or a ready mask of whole numbers.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        return _ready(attention_mask)
    if attention_mask.dim() == 3:
        if attention_mask.shape[-1] != kv_length:
            raise _wrong_length(kv_length, attention_mask.shape[-1])
        return attention_mask[:, None].bool()
    return _padding(attention_mask, 0, kv_length, False)[:, None, None, :]


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask that kernels for scores of `dtype` take: booleans as they are, numbers in that dtype.

    Args:
        mask: Booleans, an additive mask, or None.
        dtype: Floating dtype of the scores.
    """
    if mask is None or mask.dtype in (torch.bool, dtype):
        return mask
    # Within the narrower dtype's range: its -inf would make NaN of a row that sees nothing.
    return mask.clamp(min=torch.finfo(dtype).min).to(dtype)


def _ready(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        # Added to scores, ones and zeros would mask next to nothing.
        raise ArgumentError(
            "A mask of rank 4 is used as it is, so it cannot hold whole numbers",
            where="attention_mask",
            expected="booleans (True: may look), or floating numbers to add to the scores",
            found=mask.dtype,
            mend="Pass attention_mask.bool() if it holds ones and zeros.",
        )
    return mask


def _padding(mask: torch.Tensor, kv_offset: int, kv_length: int, static: bool) -> torch.Tensor:
    if mask.dim() != 2:
        raise ArgumentError(
            "attention_mask has the wrong rank",
            where="attention_mask",
            expected="[batch, length], or a ready mask of rank 4",
            found=list(mask.shape),
        )
    needed = kv_offset + kv_length
    if static and mask.shape[1] < needed:
        # Slots of a static cache that are still to be filled; causality hides them.
        mask = torch.nn.functional.pad(mask, (0, needed - mask.shape[1]))
    if mask.shape[1] != needed:
        raise _wrong_length(needed, mask.shape[1])
    return mask[:, kv_offset:].bool()


def _wrong_length(needed: int, found: int) -> ArgumentError:
    return ArgumentError(
        "attention_mask does not cover the keys",
        where="attention_mask",
        expected=f"length {needed} (cached and new tokens)",
        found=f"length {found}",
        mend="Pass a mask over the cached and the new tokens, or none if nothing is padded.",
    )
