# SPDX-License-Identifier: Apache-2.0
"""The rotary settings of a GGUF file as ``rope_theta`` and ``rope_scaling`` of a config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrained.arch.gguf_values import Values, shortest
from pretrained.core.gguf import load_tensor
from pretrained.errors import ConfigError

_DEFAULT_THETA = 10000.0  # llama.cpp's, for files without the key
_FACTORS = "rope_freqs.weight"
Doubles = npt.NDArray[np.float64]


def rope_fields(values: Values, *, head_dim: int, context: int) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling``.

    Args:
        values: The file's facts.
        head_dim: Channels of a head, all of which rotate.
        context: Longest sequence the model is configured for, in tokens.

    Raises:
        ConfigError: the scaling is of an unknown kind, lacks a number, or contradicts itself.
    """
    theta = values.number("rope.freq_base", default=_DEFAULT_THETA)
    if theta <= 0:
        raise ConfigError(
            "The rotary base must be positive", where=f"{values.arch}.rope.freq_base", found=theta
        )
    scaling = _scaling(values)
    if values.has_tensor(_FACTORS):
        factors = _read_factors(values, head_dim)
        if (factors != 1).any():
            if scaling is not None:
                raise ConfigError(
                    "The GGUF file scales rotary positions in two ways at once",
                    where=f"{_FACTORS}, {values.arch}.rope.scaling.type",
                    found=scaling["rope_type"],
                )
            scaling = _from_factors(factors, theta, context)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _scaling(values: Values) -> dict[str, Any] | None:
    key = f"{values.arch}.rope.scaling.type"
    # Files from before there was a type say a factor only, under one of two names: linear scaling.
    factor = values.number("rope.scaling.factor", default=0.0) or values.number(
        "rope.scale_linear", default=0.0
    )
    kind = values.text(key) or ("linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(values, factor)
    raise ConfigError(
        "GGUF files with this rotary scaling cannot be loaded",
        where=key,
        expected="none, linear or yarn",
        found=repr(kind),
    )


def _yarn(values: Values, factor: float) -> dict[str, Any]:
    if factor <= 0:
        raise ConfigError(
            "YaRN needs a factor",
            where=f"{values.arch}.rope.scaling.factor",
            expected="more than 0",
            found=factor,
        )
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": values.integer("rope.scaling.original_context_length"),
    }
    for ours, theirs in (
        ("attention_factor", "yarn_attn_factor"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        if values.has(f"rope.scaling.{theirs}"):
            scaling[ours] = values.number(f"rope.scaling.{theirs}")
    return scaling


def _read_factors(values: Values, head_dim: int) -> Doubles:
    info = values.tensors[_FACTORS]
    if info.shape != (head_dim // 2,):
        raise ConfigError(
            "The rotary factors do not fit the heads",
            where=_FACTORS,
            expected=f"shape {(head_dim // 2,)}",
            found=f"shape {info.shape}",
        )
    factors = load_tensor(info).astype(np.float64)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ConfigError("The rotary factors must be positive numbers", where=_FACTORS)
    return factors


def _from_factors(factors: Doubles, theta: float, context: int) -> dict[str, Any]:
    """Return the scaling that divides frequency i by ``factors[i]``.

    The converter writes these factors for Llama 3.1's scaling, so its numbers are looked for first.
    Any other factors are said as LongRoPE with one set of factors for all lengths, which is exact.
    """
    found = _llama3(factors, theta)
    if found is not None:
        return found
    listed = [shortest(float(factor)) for factor in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3(factors: Doubles, theta: float) -> dict[str, Any] | None:
    """Solve Llama 3.1's scaling for its parameters, or return None where the factors are not its own.

    A frequency f is kept by ``k = (original * f / 2 pi - low) / (high - low)``, clipped to 0..1, and
    divided by ``1 / ((1 - k) / factor + k)``: linear in f between the clips. Only ratios to `low` are
    determined, so `low` is 1, which all published models have.
    """
    exponents = np.arange(len(factors)) / len(factors)
    frequencies = theta**-exponents
    factor = shortest(float(np.float32(factors.max())))
    candidates = [(1.0, 4.0, 8192)]
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    inside = (kept > 1e-3) & (kept < 1 - 1e-3)
    if inside.sum() >= 2 and theta > 1:
        slope, start = np.polyfit(frequencies[inside], kept[inside], 1)
        if slope > 0 > start:
            width = -1 / start
            candidates.append((1.0, round(1 + width, 3), round(slope * width * 2 * math.pi)))
    for low, high, original in candidates:
        kept = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - kept) / factor + kept), factors, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None
