# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings as facts: reading both spellings, and the frequencies of every scaling.

Frequencies are computed once in float64 and rounded to float32; they depend on the config alone, so
the backends share them and none is ever stored in a checkpoint or cast with the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ConfigError, did_you_mean

_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_LENGTH_AWARE = ("llama3", "yarn", "longrope")
_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "partial_rotary_factor",
)
# Real heads have up to 512 channels; a table of more than this is a lie that costs memory.
_LARGEST_HEAD = 2**16


@dataclass(frozen=True, slots=True)
class RopeTable:
    """The frequencies of one rotary embedding.

    Attributes:
        inv_freq: float32 [rotary_size / 2], radians a position for each pair of channels.
        attention_scaling: Factor on cos and sin (YaRN, LongRoPE); 1.0 otherwise.
        long_inv_freq: Frequencies to use once a sequence is longer than `switch_length` (LongRoPE).
        switch_length: Longest sequence, in tokens, that uses `inv_freq`.
        dynamic: ``(base, factor, length)`` of dynamic NTK scaling, whose frequencies depend on the
            current sequence length once it passes `length`; None for fixed frequencies.
    """

    inv_freq: np.ndarray
    attention_scaling: float = 1.0
    long_inv_freq: np.ndarray | None = None
    switch_length: int | None = None
    dynamic: tuple[float, float, int] | None = None


class RopeConfig(PreTrainedConfig):
    """A config with rotary positions: reads ``rope_theta``/``rope_scaling`` and ``rope_parameters``.

    `rope_parameters` is the one truth; `rope_theta` and `rope_scaling` read it and can be set. A file
    is written back in the spelling it had.
    """

    default_rope_theta = 10000.0

    hidden_size: int = 4096
    num_attention_heads: int = 32
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None

    @property
    def rope_theta(self) -> float:
        """Base of the geometric progression of wavelengths."""
        return float((self.rope_parameters or {}).get("rope_theta", self.default_rope_theta))

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling in the old spelling, None when there is none."""
        parameters = {k: v for k, v in (self.rope_parameters or {}).items() if k != "rope_theta"}
        return None if parameters.get("rope_type", "default") == "default" else parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = {**_renamed(value or {}), "rope_theta": self.rope_theta}

    def normalise(self, values: dict[str, Any]) -> dict[str, Any]:
        """Fold the old spelling into `rope_parameters`.

        Args:
            values: As given to the constructor or read from a file.
        """
        values = super().normalise(values)
        current = self.__dict__.get("rope_parameters") or {}
        parameters = values.get("rope_parameters", current)
        theta, scaling = values.pop("rope_theta", None), values.pop("rope_scaling", None)
        for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict | None):
                raise ConfigError(
                    f"{name} is not an object",
                    where=name,
                    expected="an object or null",
                    found=repr(value)[:200],
                    mend=f"Correct {name!r} in config.json or in the call.",
                )
        if scaling is not None:
            # Private, so never written: only how to spell the kind again, as files have one name or both.
            object.__setattr__(self, "_two_names_for_kind", {"type", "rope_type"} <= scaling.keys())
        parameters = _renamed({**(parameters or {}), **(scaling or {})})
        if theta is not None:
            parameters["rope_theta"] = theta
        if parameters.get("rope_theta") is None:
            parameters["rope_theta"] = self.default_rope_theta
        values["rope_parameters"] = parameters
        return values

    def spell(self, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Write the old spelling, which every reader knows, unless the file had the new one.

        Args:
            values: What is about to be written.
            given: The keys that this config was made from.
        """
        values = super().spell(values, given)
        if "rope_parameters" in given or "rope_parameters" not in values:
            return values
        parameters = dict(values.pop("rope_parameters") or {})
        values["rope_theta"] = parameters.pop("rope_theta", self.default_rope_theta)
        if "type" in parameters and not getattr(self, "_two_names_for_kind", False):
            parameters.pop("rope_type", None)
        plain = parameters.get("rope_type", parameters.get("type")) in (None, "default")
        if not plain or "rope_scaling" in given:
            values["rope_scaling"] = None if plain else parameters
        return values

    def check(self) -> None:
        """Raise `ConfigError` for an unknown scaling or one that lacks a number it needs."""
        super().check()
        self.rope_table()

    def rope_table(self) -> RopeTable:
        """Compute the frequencies this config asks for."""
        head_size = self.head_dim or self.hidden_size // self.num_attention_heads
        return rope_table(
            self.rope_parameters or {},
            head_size=head_size,
            max_position_embeddings=self.max_position_embeddings,
            original_max_position_embeddings=getattr(self, "original_max_position_embeddings", None),
        )


def _renamed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Give ``rope_type``, which old files call ``type`` (and LongRoPE ``su``)."""
    parameters = dict(parameters)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    parameters["rope_type"] = "longrope" if kind == "su" else kind
    return parameters


def rope_table(
    parameters: dict[str, Any],
    *,
    head_size: int,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None = None,
) -> RopeTable:
    """Compute rotary frequencies.

    Args:
        parameters: ``rope_parameters`` of a config.
        head_size: Channels of one attention head, all of which rotate.
        max_position_embeddings: Longest sequence the model is configured for, in tokens.
        original_max_position_embeddings: Longest sequence before scaling, where the config says so
            beside `parameters`; wins over the value inside.

    Raises:
        ConfigError: an unknown scaling, or one that lacks a number.
    """
    kind = parameters.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise ConfigError(
            f"Unknown RoPE scaling {kind!r}",
            where="rope_parameters.rope_type",
            expected=", ".join(_REQUIRED),
            mend=did_you_mean(str(kind), _REQUIRED) or None,
        )
    _check_numbers(parameters)
    absent = [name for name in _REQUIRED[kind] if parameters.get(name) is None]
    if kind == "yarn" and original_max_position_embeddings:
        absent = []
    if absent:
        raise ConfigError(
            f"RoPE scaling {kind!r} lacks {', '.join(absent)}",
            where="rope_parameters",
            found=sorted(parameters),
            mend=f"Add {absent[0]!r} to rope_parameters (rope_scaling in older files).",
        )
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(
            "Only a part of each head would rotate, which this architecture does not do",
            where="rope_parameters.partial_rotary_factor",
            expected=1.0,
            found=parameters["partial_rotary_factor"],
        )
    base = float(parameters.get("rope_theta", 10000.0))
    if base <= 0 or head_size < 2 or head_size % 2 or head_size > _LARGEST_HEAD:
        raise ConfigError(
            "Rotary positions need a positive rope_theta and an even head size",
            where="rope_theta, head_dim",
            expected=f"head_dim from 2 to {_LARGEST_HEAD}",
            found=f"{base}, {head_size}",
        )
    exponents = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    inv_freq = base**-exponents
    if max_position_embeddings < 1:
        raise ConfigError(
            "max_position_embeddings must be positive",
            where="max_position_embeddings",
            found=max_position_embeddings,
        )
    original = (
        original_max_position_embeddings
        or parameters.get("original_max_position_embeddings")
        or max_position_embeddings
    )
    if kind not in _LENGTH_AWARE:
        original = max_position_embeddings
    return _SCALINGS[kind](parameters, inv_freq, int(original), max_position_embeddings)


def _check_numbers(parameters: dict[str, Any]) -> None:
    """Raise where a number that some scaling divides by or multiplies with cannot be one."""
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(
            "rope_parameters differ by kind of layer, which this architecture's do not",
            where="rope_parameters",
            expected="one set of numbers",
            found=", ".join(map(repr, nested)),
        )
    for name in _NUMBERS:
        value = parameters.get(name)
        if value is not None and not _is_positive(value):
            raise ConfigError(
                f"{name} is not a positive number",
                where=f"rope_parameters.{name}",
                found=repr(value)[:200],
                mend=f"Correct {name!r} in config.json (rope_scaling in older files) or in the call.",
            )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ConfigError(
            "low_freq_factor is not below high_freq_factor",
            where="rope_parameters",
            found=f"{low} and {high}",
        )


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _rounded(inv_freq: np.ndarray) -> np.ndarray:
    return inv_freq.astype(np.float32)


def _default(_: dict[str, Any], inv_freq: np.ndarray, __: int, ___: int) -> RopeTable:
    """Su et al. 2021, https://arxiv.org/abs/2104.09864, section 3.4."""
    return RopeTable(_rounded(inv_freq))


def _linear(parameters: dict[str, Any], inv_freq: np.ndarray, _: int, __: int) -> RopeTable:
    """Position interpolation, Chen et al. 2023, https://arxiv.org/abs/2306.15595."""
    return RopeTable(_rounded(inv_freq / parameters["factor"]))


def _dynamic(parameters: dict[str, Any], inv_freq: np.ndarray, _: int, maximum: int) -> RopeTable:
    """Dynamic NTK-aware scaling, Peng et al. 2023, https://arxiv.org/abs/2309.00071, appendix B.2."""
    if len(inv_freq) < 2:
        raise ConfigError("Dynamic scaling needs heads of 4 channels or more", where="head_dim", found=2)
    dynamic = (float(parameters.get("rope_theta", 10000.0)), float(parameters["factor"]), maximum)
    return RopeTable(_rounded(inv_freq), dynamic=dynamic)


def _yarn(parameters: dict[str, Any], inv_freq: np.ndarray, original: int, maximum: int) -> RopeTable:
    """YaRN, Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2 and 3.4."""
    size = 2 * len(inv_freq)
    base = float(parameters.get("rope_theta", 10000.0))
    if base <= 1:
        raise ConfigError("YaRN needs a rope_theta above 1", where="rope_parameters.rope_theta", found=base)
    factor = parameters.get("factor") or maximum / original

    def channel_of(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = channel_of(parameters.get("beta_fast") or 32)
    high = channel_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # A ramp of no width would divide by zero; the published code widens it by this much.
    width = (high - low) or 0.001
    interpolated = np.clip((np.arange(size // 2) - low) / width, 0, 1)
    scaled = inv_freq / factor * interpolated + inv_freq * (1 - interpolated)
    return RopeTable(_rounded(scaled), attention_scaling=_yarn_attention_scaling(parameters, factor))


def _yarn_attention_scaling(parameters: dict[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)


def _llama3(parameters: dict[str, Any], inv_freq: np.ndarray, original: int, _: int) -> RopeTable:
    """Llama 3.1's `apply_scaling`, https://github.com/meta-llama/llama-models, models/llama3/model.py."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    periods = original * inv_freq / (2 * math.pi)
    kept = np.clip((periods - low) / (high - low), 0, 1)
    return RopeTable(_rounded((1 - kept) * inv_freq / parameters["factor"] + kept * inv_freq))


def _longrope(parameters: dict[str, Any], inv_freq: np.ndarray, original: int, maximum: int) -> RopeTable:
    """LongRoPE, Ding et al. 2024, https://arxiv.org/abs/2402.13753."""
    factor = parameters.get("factor") or maximum / original
    scaling = parameters.get("attention_factor")
    if scaling is None and factor > 1 and original < 2:
        raise ConfigError(
            "LongRoPE needs an original length above 1",
            where="rope_parameters.original_max_position_embeddings",
            found=original,
        )
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    tables = {}
    for name in ("short_factor", "long_factor"):
        given = parameters[name]
        if not isinstance(given, list | tuple) or not all(map(_is_positive, given)):
            raise ConfigError(
                f"{name} is not a list of positive numbers",
                where=f"rope_parameters.{name}",
                found=repr(given)[:200],
            )
        factors = np.asarray(given, dtype=np.float64)
        if factors.shape != inv_freq.shape:
            raise ConfigError(
                f"{name} has the wrong length",
                where=f"rope_parameters.{name}",
                expected=f"{len(inv_freq)} numbers, half of head_dim",
                found=factors.size,
            )
        tables[name] = _rounded(inv_freq / factors)
    return RopeTable(
        tables["short_factor"],
        attention_scaling=float(scaling),
        long_inv_freq=tables["long_factor"],
        switch_length=original,
    )


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
