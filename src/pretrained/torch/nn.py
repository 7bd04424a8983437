# SPDX-License-Identifier: Apache-2.0
"""Leaves that stock PyTorch lacks: RMSNorm as the checkpoints mean it, rotary tables, Conv1D, activations.

Linear, Embedding, LayerNorm and Dropout stay torch's own, so that adapters, quantizers and sharding
libraries find what they look for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch.rope import RopeTable
from pretrained.errors import ConfigError, did_you_mean


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; the scale is applied in the input's dtype, as in Llama's own code."""
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Show size and epsilon when the module is printed."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines for rotary positions.

    The frequencies are a derived buffer: never saved, always float32, whatever the model is cast to.

    Args:
        table: The frequencies, from the config.
    """

    inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor | None

    def __init__(self, table: RopeTable) -> None:
        super().__init__()
        self.table = table
        self.register_buffer("inv_freq", torch.empty(len(table.inv_freq)), persistent=False)
        long = None if table.long_inv_freq is None else torch.empty(len(table.inv_freq))
        self.register_buffer("long_inv_freq", long, persistent=False)
        if self.inv_freq.device.type != "meta":
            self.init_buffers(self.inv_freq.device)

    def init_buffers(self, device: torch.device) -> None:
        """Compute the derived buffers.

        Args:
            device: Where they live.
        """
        self.inv_freq = torch.from_numpy(self.table.inv_freq).to(device)
        if self.table.long_inv_freq is not None:
            self.long_inv_freq = torch.from_numpy(self.table.long_inv_freq).to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        empty = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        # Cast ones have lost digits, and ones that `to_empty` made out of meta tensors hold nothing yet.
        if (empty or self.inv_freq.dtype != torch.float32) and not self.inv_freq.is_meta:
            self.init_buffers(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, [batch or 1, 1, length, head_dim], in the dtype of `x`.

        Args:
            x: Any tensor with the wanted dtype.
            position_ids: [batch or 1, length], positions.
        """
        angles = position_ids[:, None, :, None].float() * self._frequencies(position_ids)
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self.table.attention_scaling
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)

    def _frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        # Tensor operations rather than Python branches: the length is data, and a branch on it would
        # break the graph and wait for the device.
        if self.long_inv_freq is not None:
            length = position_ids.max() + 1
            return torch.where(length > (self.table.switch_length or 0), self.long_inv_freq, self.inv_freq)
        if self.table.dynamic is not None:
            base, factor, maximum = self.table.dynamic
            size = 2 * self.inv_freq.shape[0]
            length = (position_ids.max() + 1).clamp(min=maximum).float()
            stretched = base * (factor * length / maximum - (factor - 1)) ** (size / (size - 2))
            channel = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32)
            return 1.0 / stretched ** (channel / size)
        return self.inv_freq


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of each head by its position's angles.

    Args:
        x: [batch, heads, length, head_dim].
        cos: [batch or 1, 1, length, head_dim].
        sin: The same shape.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's checkpoints have it.

    Args:
        nf: Output features.
        nx: Input features.
    """

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        # peft (and others) know this layer by the class of another library, which is asked for only where
        # something has imported it: isinstance(layer, theirs) is then true, as it is of ours.
        theirs = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
        return type(self) if theirs is None else theirs

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By its own class: pickle would look at `__class__`.
        return _new_module, (type(self),), self.__getstate__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to the last axis."""
        return F.linear(x, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        """Show the sizes when the module is printed."""
        return f"nf={self.nf}, nx={self.nx}"


def _new_module(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


# Functions with names rather than lambdas, so that a model that holds one can be pickled.


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_10(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x).clamp(-10, 10)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _laplace(x: torch.Tensor) -> torch.Tensor:
    # mu and sigma of Ma et al. 2022, arXiv:2209.10655, appendix B.3, as published code rounds them.
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x).sqrt()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an activation by the name that configs use.

    Args:
        name: For example ``"silu"`` or ``"gelu_new"`` (GELU's tanh approximation, Hendrycks & Gimpel
            2016, arXiv:1606.08415).

    Raises:
        ConfigError: there is no such activation.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(
            f"Unknown activation {name!r}",
            where="hidden_act",
            expected=", ".join(ACTIVATIONS),
            mend=did_you_mean(str(name), ACTIVATIONS),
        )
    return ACTIVATIONS[name]
