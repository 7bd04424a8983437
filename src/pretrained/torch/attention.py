# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention behind one signature, by name and registrable.

An implementation is ``f(module, query, key, value, attention_mask, *, scaling, dropout, is_causal)``
with query [batch, heads, q, head_dim], key and value [batch, kv_heads, k, head_dim]. The mask is
boolean (True: may look) or additive, broadcastable to [batch, heads, q, k]; None with `is_causal` means
plain causal, None without it means no masking. It returns ``(output [batch, q, heads, head_dim],
weights [batch, heads, q, k] or None)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError, MissingDependencyError, did_you_mean
from pretrained.torch.masks import additive

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention step by step, the reference and the one that returns its weights.

    The softmax runs in float32, as every published implementation of these families does.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = torch.ones(
            query.shape[2], key.shape[2], dtype=torch.bool, device=query.device
        ).tril()
    mask = additive(attention_mask, scores.dtype)
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention through torch's fused kernels (the default)."""
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def flash_attention_2(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention through the ``flash_attn`` package; where there is a mask, through sdpa.

    flash_attn 2 takes no mask, so batches with padding fall back to torch's kernels, which are exact.
    """
    if attention_mask is not None:
        return sdpa_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
        )
    # Imported here: an optional package that loads CUDA libraries.
    from flash_attn import flash_attn_func  # noqa: PLC0415

    output = flash_attn_func(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        dropout_p=dropout if module.training else 0.0,
        softmax_scale=scaling,
        causal=is_causal,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    )
    return output, None


class AttentionInterface(Mapping[str, AttentionFunction]):
    """The attention implementations by name; `register` adds one for every model of the process."""

    _registered: dict[str, AttentionFunction] = {  # noqa: RUF012 - the registry itself
        "eager": eager_attention,
        "sdpa": sdpa_attention,
        "flash_attention_2": flash_attention_2,
    }

    @classmethod
    def register(cls, name: str, function: AttentionFunction) -> None:
        """Make an implementation available as ``attn_implementation=name``.

        Args:
            name: What configs and calls will say.
            function: See the module's docstring for its signature.
        """
        cls._registered[name] = function

    def __getitem__(self, name: str) -> AttentionFunction:
        return self._registered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registered)

    def __len__(self) -> int:
        return len(self._registered)


ALL_ATTENTION_FUNCTIONS = AttentionInterface()


def check_attn_implementation(name: str | None) -> None:
    """Raise where an implementation is unknown or its package is not installed.

    Args:
        name: As given by the user; None for the default.

    Raises:
        ArgumentError: there is none by that name.
        MissingDependencyError: its package is not installed.
    """
    if name is None:
        return
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ArgumentError(
            f"Unknown attention implementation {name!r}",
            where="attn_implementation",
            expected=", ".join(ALL_ATTENTION_FUNCTIONS),
            mend=did_you_mean(str(name), ALL_ATTENTION_FUNCTIONS)
            or "Register your own with AttentionInterface.register(name, function).",
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise MissingDependencyError(
            "flash_attention_2 needs the package flash_attn",
            where="attn_implementation",
            mend="Install flash-attn, or use attn_implementation='sdpa'.",
        )


def attend(
    module: nn.Module,
    config: PreTrainedConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the implementation that the config names; see the module's docstring for the arguments.

    Args:
        module: The calling layer; its `training` decides about dropout.
        config: Names the implementation, None meaning ``"sdpa"``.
        query: [batch, heads, q, head_dim].
        key: [batch, kv_heads, k, head_dim].
        value: [batch, kv_heads, k, head_dim].
        attention_mask: Boolean or additive mask, or None.
        scaling: Factor on the scores.
        dropout: Probability of dropping a weight while training.
        is_causal: Whether None as a mask means causal.
        output_attentions: Weights are wanted, which only the eager implementation has.
        **kwargs: Passed on, for example `sliding_window`.
    """
    name = "eager" if output_attentions else (config.attn_implementation or "sdpa")
    function = ALL_ATTENTION_FUNCTIONS[name]
    return function(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        dropout=dropout,
        is_causal=is_causal,
        **kwargs,
    )
