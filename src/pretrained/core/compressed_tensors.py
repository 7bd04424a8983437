# SPDX-License-Identifier: Apache-2.0
"""``quant_method: "compressed-tensors"``: what llm-compressor writes, and vLLM reads.

The entry of config.json holds groups of layers, each with a scheme for weights and perhaps for activations.
Names, formats and defaults: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pretrained.core.stored_layers import WeightScheme
from pretrained.errors import ConfigError, NotYetError, did_you_mean

METHOD: Final = "compressed-tensors"
PACKED: Final = "pack-quantized"
FORMATS: Final = (PACKED, "int-quantized", "naive-quantized", "float-quantized")
_MIXED: Final = "mixed-precision"

# Formats by name that are not read, and what they are.
_NOT_READ: Final[Mapping[str, str]] = {
    "dense": "plain weights that each run rounds again",
    "fakequant": "plain weights that each run rounds again",
    "sparse-bitmask": "a sparsity format",
    "sparse-24-bitmask": "a sparsity format",
    "marlin-24": "a sparsity format",
    "nvfp4-pack-quantized": "4-bit floats",
    "mxfp4-pack-quantized": "4-bit floats",
    "mxfp6-pack-quantized": "6-bit floats",
    "mxfp8-quantized": "8-bit floats with exponents for scales",
}
STRATEGIES: Final = ("tensor", "channel", "group", "block")
_OTHER_STRATEGIES: Final = ("token", "tensor_group", "attn_head")

_SETTINGS: Final = frozenset({
    "config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "quant_method",
    "quantization_status", "sparsity_config", "transform_config", "version", "moe_sparsity_config",
})  # fmt: skip
_GROUP_SETTINGS: Final = frozenset(
    {"targets", "weights", "input_activations", "output_activations", "format"}
)
# Those that say how the numbers were found, not how they are read, are left alone.
_WEIGHT_SETTINGS: Final = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
})  # fmt: skip

# A stranger's expression runs on every module's name: no repetition inside a repetition, whose time can
# double with every letter.
_LONGEST_PATTERN: Final = 500
_NESTED: Final = re.compile(r"\((?:[^()\\]|\\.)*[*+}](?:[^()\\]|\\.)*\)[*+{]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that are stored in one way.

    Attributes:
        name: Its name in the config.
        targets: Module names, class names, or ``"re:"`` and a regular expression.
        scheme: How the weights are stored; None where only activations are rounded.
        rounds_activations: Whether the library also rounds inputs or outputs.
    """

    name: str
    targets: tuple[str, ...]
    scheme: WeightScheme | None
    rounds_activations: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedConfig:
    """What config.json says.

    Attributes:
        groups: In the config's order.
        ignore: Layers that are stored plain, as `Group.targets`.
        rounds_cache: Whether the library rounds the key-value cache.
        stored: The whole entry as it stands in config.json, written back by a save.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    rounds_cache: bool = False
    stored: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """``"compressed-tensors"``."""
        return METHOD

    @property
    def rounds_activations(self) -> bool:
        """Whether the library rounds activations or the cache."""
        return self.rounds_cache or any(group.rounds_activations for group in self.groups)

    def scheme_for(self, names: tuple[str, ...], classes: tuple[str, ...]) -> WeightScheme | None:
        """Return how a layer is stored, or None where the config says that it is plain.

        A target that is the layer's name comes before one that is an expression, and both before a class.

        Args:
            names: What the layer is called, in the file and in the model.
            classes: Names of its class and bases.
        """
        if any(_fits(target, names, classes) for target in self.ignore):
            return None
        best: tuple[int, WeightScheme | None] = (4, None)
        for group in self.groups:
            ranks = [rank for target in group.targets if (rank := _fits(target, names, classes))]
            if ranks and group.scheme is not None and min(ranks) < best[0]:
                best = (min(ranks), group.scheme)
        return best[1]

    def is_plain(self, names: tuple[str, ...], classes: tuple[str, ...]) -> bool:
        """Tell whether the config says that a layer is not quantized.

        Args:
            names: What the layer is called.
            classes: Names of its class and bases.
        """
        return self.scheme_for(names, classes) is None


def _fits(target: str, names: tuple[str, ...], classes: tuple[str, ...]) -> int:
    """Return 0 where a target is another layer's, else how well it fits, 1 the best."""
    if target in names:
        return 1
    if target.startswith("re:"):
        return 2 if any(re.match(target[3:], name) for name in names) else 0
    return 3 if target in classes else 0


def parse_compressed_tensors(values: Mapping[str, Any], *, where: object = None) -> CompressedConfig:
    """Read the entry of config.json.

    Args:
        values: ``quantization_config``.
        where: What to name in errors; None for the entry itself.

    Raises:
        ConfigError: a value that cannot be.
        NotYetError: a form that is known and not read.
    """
    at = f"quantization_config, {where}" if where else "quantization_config"
    _check_names(values, _SETTINGS, "settings", at)
    _check_sparsity(values, at)
    status = values.get("quantization_status")
    if status not in (None, "compressed"):
        raise NotYetError(
            f"The checkpoint's quantization_status is {status!r}: its weights are not compressed",
            where=at,
            mend="Take the checkpoint that llm-compressor writes with save_compressed=True.",
        )
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(
            "config_groups says which layers are quantized and how",
            where=at,
            expected="a dictionary of groups",
            found=repr(groups)[:200],
        )
    default = values.get("format")
    parsed = tuple(_group(str(name), group, default, f"{at}.{name}") for name, group in groups.items())
    if all(group.scheme is None for group in parsed):
        raise ConfigError("No group of the checkpoint has quantized weights", where=at)
    ignore = values.get("ignore")
    return CompressedConfig(
        groups=parsed,
        ignore=() if ignore is None else _targets(ignore, f"{at}.ignore"),
        rounds_cache=bool(values.get("kv_cache_scheme")),
        stored=dict(values),
    )


def _check_sparsity(values: Mapping[str, Any], at: str) -> None:
    sparsity = values.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if form not in (None, "dense"):
        raise NotYetError(
            f"Sparse weights ({form}) are not read yet",
            where=f"{at}.sparsity_config",
            mend="Take a checkpoint of the model that is not sparse.",
        )
    for name, what in (
        ("transform_config", "Weights behind rotations"),
        ("moe_sparsity_config", "Pruned experts"),
    ):
        if values.get(name):
            raise NotYetError(f"{what} ({name}) are not read yet", where=at, found=repr(values[name])[:200])


def _group(name: str, values: Any, default: Any, at: str) -> Group:
    if isinstance(values, list):
        raise NotYetError(
            f"The group {name!r} names a preset instead of a scheme",
            where=at,
            mend="A checkpoint that the library itself has saved spells its schemes out.",
        )
    if not isinstance(values, Mapping):
        raise ConfigError("A group is a dictionary", where=at, found=repr(values)[:200])
    _check_names(values, _GROUP_SETTINGS, "settings of a group", at)
    weights = values.get("weights")
    form = values.get("format")
    if form is None and default != _MIXED:
        form = default
    return Group(
        name=name,
        targets=_targets(values.get("targets"), f"{at}.targets"),
        scheme=None if weights is None else _weight_scheme(weights, form, f"{at}.weights"),
        rounds_activations=bool(values.get("input_activations") or values.get("output_activations")),
    )


def _weight_scheme(values: Any, form: Any, at: str) -> WeightScheme:
    if not isinstance(values, Mapping):
        raise ConfigError("A scheme is a dictionary", where=at, found=repr(values)[:200])
    _check_names(values, _WEIGHT_SETTINGS, "settings of weights", at)
    if form not in FORMATS:
        raise _unknown_format(form, at)
    kind, bits = str(values.get("type") or "int").lower(), values.get("num_bits", 8)
    if kind not in ("int", "float"):
        raise ConfigError("Unknown type of weights", where=at, expected="'int' or 'float'", found=repr(kind))
    if type(bits) is not int:
        raise ConfigError("num_bits is a number", where=at, found=repr(bits))
    if bits not in ((4, 8) if kind == "int" else (8,)):
        raise NotYetError(f"Weights of {bits} bits ({kind}) are not read yet", where=at)
    packed = form == PACKED
    if kind == "float" and (packed or form == "int-quantized"):
        raise ConfigError(f"{form!r} holds integers", where=at, found="type 'float'")
    if kind == "int" and form == "float-quantized":
        raise ConfigError("'float-quantized' holds 8-bit floats", where=at, found="type 'int'")
    strategy, group_size = _strategy(values, at)
    symmetric = values.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ConfigError("symmetric is a yes or a no", where=at, found=repr(symmetric))
    if values.get("dynamic"):
        raise ConfigError("Weights cannot be rounded anew at each run", where=at, found="dynamic")
    return WeightScheme(
        kind=kind,
        bits=bits,
        strategy=strategy,
        group_size=group_size,
        block=_block(values.get("block_structure"), at) if strategy == "block" else None,
        symmetric=symmetric or kind == "float",
        packed=packed,
        has_order=_has_order(values.get("actorder"), at),
    )


def _strategy(values: Mapping[str, Any], at: str) -> tuple[str, int | None]:
    size, strategy = values.get("group_size"), values.get("strategy")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ConfigError(
            "group_size is a number of inputs", where=at, expected="1 or more, or -1", found=repr(size)
        )
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(strategy).lower()
    if strategy in _OTHER_STRATEGIES:
        raise NotYetError(f"Weights with the strategy {strategy!r} are not read yet", where=at)
    if strategy not in STRATEGIES:
        raise ConfigError(
            "Unknown strategy for weights",
            where=at,
            expected=" or ".join(repr(name) for name in STRATEGIES),
            found=repr(strategy),
            mend=did_you_mean(strategy, STRATEGIES) or None,
        )
    if strategy == "group" and (size is None or size < 1):
        raise ConfigError("The strategy 'group' needs a group_size", where=at, found=repr(size))
    return strategy, size if strategy == "group" else None


def _block(value: Any, at: str) -> tuple[int, int]:
    if isinstance(value, str):
        parts = value.split("x")
        value = [int(part) for part in parts] if all(part.isdigit() for part in parts) else value
    sizes = tuple(value) if isinstance(value, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigError(
            "block_structure is a pair of sizes", where=at, expected="[128, 128]", found=repr(value)
        )
    return sizes[0], sizes[1]


def _has_order(value: Any, at: str) -> bool:
    if value in (None, False):
        return False
    name = "group" if value is True else str(value).lower()
    if name not in ("group", "dynamic", "weight", "static"):
        raise ConfigError(
            "Unknown actorder", where=at, expected="'group', 'weight' or null", found=repr(value)
        )
    # "weight" sorts columns while the scales are sought, and puts them back.
    return name in ("group", "dynamic")


def _unknown_format(form: Any, at: str) -> ConfigError | NotYetError:
    if form in _NOT_READ:
        return NotYetError(
            f"The format {form!r} is not read yet: {_NOT_READ[form]}",
            where=at,
            expected=", ".join(FORMATS),
        )
    return ConfigError(
        "Unknown format of compressed weights" if form is not None else "No format of the weights is named",
        where=at,
        expected=", ".join(FORMATS),
        found=repr(form),
        mend=did_you_mean(str(form), FORMATS) or None,
    )


def _targets(value: Any, at: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ConfigError("Layers are named by a list of texts", where=at, found=repr(value)[:200])
    for name in value:
        if name.startswith("re:"):
            _check_pattern(name[3:], at)
    return tuple(value)


def _check_pattern(pattern: str, at: str) -> None:
    found = None
    if len(pattern) > _LONGEST_PATTERN or _NESTED.search(pattern):
        found = "one that could take for ever"
    else:
        try:
            re.compile(pattern)
        except re.error as error:
            found = str(error)
    if found is not None:
        raise ConfigError(
            "Layers are named by a regular expression that cannot be used",
            where=at,
            found=f"{pattern[:200]!r}: {found}",
        )


def _check_names(values: Mapping[str, Any], known: frozenset[str], what: str, at: str) -> None:
    for name, value in values.items():
        if name not in known and value is not None:
            raise NotYetError(
                f"compressed-tensors' {what} have grown by {name!r}, which is not known here",
                where=at,
                found=repr(value)[:200],
                mend=did_you_mean(str(name), known) or None,
            )
