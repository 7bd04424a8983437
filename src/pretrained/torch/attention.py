# SPDX-License-Identifier: Apache-2.0
"""Scaled dot-product attention behind one signature, by name and registrable.

An implementation is ``f(module, query, key, value, attention_mask, *, scaling, dropout, is_causal)``
with query [batch, heads, q, head_dim], key and value [batch, kv_heads, k, head_dim]. The mask is
boolean (True: may look) or additive, broadcastable to [batch, heads, q, k]; None with `is_causal` means
plain causal, the last query seeing every key; None without it means no masking. `dropout` is 0 outside
training. It returns ``(output [batch, q, heads, head_dim], weights [batch, heads, q, k] or None)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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


class OwnAttention(ABC):
    """What a cache hands back in place of keys and values where only it knows how to attend to them."""

    @abstractmethod
    def attend(self, module: Any, config: Any, query: torch.Tensor, *, scaling: float) -> torch.Tensor:
        """Return what the queries see, [batch, q, heads, head_dim].

        Args:
            module: The calling layer.
            config: The model's config.
            query: [batch, heads, q, head_dim].
            scaling: Factor on the scores.
        """


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
        attention_mask = _causal(query, key)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        # Added in float32: float16's most negative number and a negative score make -inf, and a row of
        # nothing else makes NaN.
        scores = scores.float() + attention_mask
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
    heads, grouped = query.shape[1], _as_queries(query, key, attention_mask)
    query = query if grouped is None else grouped
    causal = is_causal and attention_mask is None and query.shape[2] > 1 and grouped is None
    if causal and query.shape[2] != key.shape[2]:
        # torch's own flag would let the first query see the first key alone, not all that are cached.
        attention_mask, causal = _causal(query, key), False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=additive(attention_mask, query.dtype),
        dropout_p=dropout if module.training else 0.0,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if grouped is not None:
        output = output.reshape(output.shape[0], heads, 1, -1)
    return output.transpose(1, 2), None


def _as_queries(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Return one query's heads as so many queries of the key heads that they share, where that is quicker.

    On CPUs torch's kernel reads keys and values anew for each head, several times more slowly in bfloat16.
    """
    shared = query.shape[1] != key.shape[1] and query.shape[2] == 1 and query.device.type == "cpu"
    by_head = attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[1] != 1)
    if not shared or by_head:
        return None
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def _causal(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return [q, k] booleans that let the last query see every key."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)


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

    Raises:
        ArgumentError: neither the model nor autocast computes in float16 or bfloat16.
    """
    if attention_mask is not None:
        return sdpa_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
        )
    # Imported here: an optional package that loads CUDA libraries.
    from flash_attn import flash_attn_func  # noqa: PLC0415

    dtype = _half(query)
    output = flash_attn_func(
        query.transpose(1, 2).to(dtype),
        key.transpose(1, 2).to(dtype),
        value.transpose(1, 2).to(dtype),
        dropout_p=dropout if module.training else 0.0,
        softmax_scale=scaling,
        causal=is_causal,
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
    )
    return output, None


def _half(query: torch.Tensor) -> torch.dtype:
    """Return the 16-bit dtype to compute in: that of the query, or of autocast."""
    if query.dtype in (torch.float16, torch.bfloat16):
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    raise ArgumentError(
        "flash_attention_2 computes in 16 bits only",
        where="attn_implementation",
        expected="float16 or bfloat16",
        found=query.dtype,
        mend="Load with dtype=torch.bfloat16, run under torch.autocast, or use 'sdpa'.",
    )


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
_WITHOUT_WEIGHTS = ("sdpa", "flash_attention_2")


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
    if not isinstance(name, str) or name not in ALL_ATTENTION_FUNCTIONS:
        raise ArgumentError(
            f"Unknown attention implementation {name!r}",
            where="attn_implementation",
            expected=", ".join(ALL_ATTENTION_FUNCTIONS),
            mend=_elsewhere(str(name))
            or did_you_mean(str(name), ALL_ATTENTION_FUNCTIONS)
            or "Register your own with AttentionInterface.register(name, function).",
        )
    if name == "flash_attention_2" and find_spec("flash_attn") is None:
        raise MissingDependencyError(
            "flash_attention_2 needs the package flash_attn",
            where="attn_implementation",
            mend="Install flash-attn, or use attn_implementation='sdpa'.",
        )


def _elsewhere(name: str) -> str:
    """Say what to do about a name that the ecosystem knows."""
    if name not in ("flash_attention_3", "flash_attention_4", "flex_attention"):
        return ""
    return "It is not offered so far: use 'sdpa', or register one with AttentionInterface.register."


def attend(
    module: nn.Module,
    config: PreTrainedConfig,
    query: torch.Tensor,
    key: torch.Tensor | OwnAttention,
    value: torch.Tensor | OwnAttention,
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
        key: [batch, kv_heads, k, head_dim], or what a cache handed back in place of it.
        value: [batch, kv_heads, k, head_dim], or the same.
        attention_mask: Boolean or additive mask, or None.
        scaling: Factor on the scores.
        dropout: Probability of dropping a weight while training.
        is_causal: Whether None as a mask means causal.
        output_attentions: Weights are wanted. The fused implementations have none, so eager computes
            them; a registered function is asked for its own.
        **kwargs: Passed on, for example `sliding_window`.
    """
    if isinstance(key, OwnAttention):
        return key.attend(module, config, query, scaling=scaling), None
    name = config.attn_implementation or "sdpa"
    if output_attentions and name in _WITHOUT_WEIGHTS:
        name = "eager"
    function = ALL_ATTENTION_FUNCTIONS[name]
    output, weights = function(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        # Functions written for the ecosystem apply it as given.
        dropout=dropout if module.training else 0.0,
        is_causal=is_causal,
        **kwargs,
    )
    return output, weights if output_attentions else None
