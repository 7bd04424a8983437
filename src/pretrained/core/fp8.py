# SPDX-License-Identifier: Apache-2.0
"""``quant_method: "fp8"``: weights as 8-bit floats, with a scale for each block of 128 x 128 or each tensor.

The form of DeepSeek-V3's checkpoints and their successors, and of older ones that vLLM reads. The scale
beside a weight is called ``weight_scale_inv`` or ``weight_scale``; the floats are multiplied by either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pretrained.core.quantization import names_module
from pretrained.core.stored_layers import WeightScheme
from pretrained.errors import ConfigError, NotYetError, did_you_mean

METHOD: Final = "fp8"
_WHERE: Final = "quantization_config"
# What the ecosystem writes beside these and what changes nothing in how weights are read.
_IDLE: Final = frozenset({"quant_method", "is_checkpoint_fp8_serialized", "kv_cache_scheme", "version"})
_KNOWN: Final = (
    "activation_scheme", "weight_block_size", "modules_to_not_convert", "ignored_layers", "scale_fmt", "fmt",
    "modules_to_convert", "expert_dtype", "dequantize", "compute_dtype",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    """What config.json says of fp8 weights.

    Attributes:
        weight_block_size: (rows, columns) that share a scale; None for a scale for each tensor or output.
        activation_scheme: ``"dynamic"`` or ``"static"``; activations are not rounded here.
        modules_to_not_convert: Layers that are stored plain.
        stored: The whole entry as it stands in config.json, written back by a save.
    """

    weight_block_size: tuple[int, int] | None
    activation_scheme: str = "dynamic"
    modules_to_not_convert: tuple[str, ...] = ()
    stored: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """``"fp8"``."""
        return METHOD

    @property
    def rounds_activations(self) -> bool:
        """Whether the library that wrote the file rounds activations too."""
        return True

    def scheme_for(self, names: tuple[str, ...], classes: tuple[str, ...]) -> WeightScheme:
        """Return how a layer is stored that has a scale in the file; the same for all.

        Args:
            names: What the layer is called.
            classes: Names of its class and bases.
        """
        strategy = None if self.weight_block_size is None else "block"
        return WeightScheme(kind="float", bits=8, strategy=strategy, block=self.weight_block_size)

    def is_plain(self, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
        """Tell whether the config says that a layer is not quantized.

        Args:
            names: What the layer is called.
            classes: Names of its class and bases.
        """
        return any(names_module(self.modules_to_not_convert, name) is not None for name in names)


def parse_fp8(values: Mapping[str, Any], *, where: object = None) -> Fp8Config:
    """Read the entry of config.json.

    Args:
        values: ``quantization_config``.
        where: What to name in errors; None for the entry itself.

    Raises:
        ConfigError: a value that cannot be.
        NotYetError: a form that is known and not read.
    """
    at = f"{_WHERE}, {where}" if where else _WHERE
    for name in values:
        if name not in _KNOWN and name not in _IDLE:
            raise NotYetError(
                f"An fp8 checkpoint says {name!r}, and what that changes is not known here",
                where=at,
                expected=", ".join(_KNOWN),
                found=f"{name} = {values[name]!r}"[:200],
                mend=did_you_mean(str(name), _KNOWN) or None,
            )
    if values.get("modules_to_convert") or str(values.get("expert_dtype") or "fp8") != "fp8":
        which = "modules_to_convert" if values.get("modules_to_convert") else "expert_dtype"
        raise NotYetError(
            f"fp8 checkpoints with {which} are not read yet", where=at, found=repr(values[which])
        )
    scale_format = values.get("scale_fmt") or "float"
    if scale_format not in ("float", "ue8m0"):
        raise ConfigError(
            "Unknown format of scales", where=at, expected="'float' or 'ue8m0'", found=repr(scale_format)
        )
    activation = str(values.get("activation_scheme") or "dynamic").lower()
    if activation not in ("dynamic", "static"):
        raise ConfigError(
            "Unknown activation_scheme", where=at, expected="'dynamic' or 'static'", found=repr(activation)
        )
    if values.get("fmt", "e4m3") not in ("e4m3", "e5m2"):
        raise ConfigError("Unknown 8-bit floats", where=at, expected="'e4m3'", found=repr(values["fmt"]))
    skipped = values.get("modules_to_not_convert") or values.get("ignored_layers") or ()
    if not isinstance(skipped, list | tuple) or not all(isinstance(name, str) for name in skipped):
        raise ConfigError(
            "modules_to_not_convert is a list of module names", where=at, found=repr(skipped)[:200]
        )
    return Fp8Config(
        weight_block_size=_block_size(values.get("weight_block_size"), at),
        activation_scheme=activation,
        modules_to_not_convert=tuple(skipped),
        stored=dict(values),
    )


def _block_size(value: Any, at: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
        raise ConfigError(
            "weight_block_size is a pair of sizes", where=at, expected="[128, 128] or null", found=repr(value)
        )
    return pair[0], pair[1]
