# SPDX-License-Identifier: Apache-2.0
"""What a model promises to hold: every weight's key, shape, block and ties, without a framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One weight of a model.

    Attributes:
        key: Its name in a state dict.
        shape: Its shape in the checkpoint's layout.
        block: The module path that a placement never splits (``"model.layers.3"``), or None for
            weights outside any block.
        is_buffer: A saved buffer rather than a trainable parameter.
    """

    key: str
    shape: tuple[int, ...]
    block: str | None = None
    is_buffer: bool = False

    @property
    def num_elements(self) -> int:
        """How many numbers the weight holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Every weight a model promises.

    Attributes:
        params: By key, in module order; a tie group's aliases are listed too.
        ties: Alias key -> the key that owns the tensor.
        derived: Buffers that no file holds, for they follow from the config (rotary frequencies); float32.
    """

    params: Mapping[str, ParamSpec]
    ties: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, ParamSpec] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """How many trainable numbers there are, tied ones counted once."""
        return sum(
            spec.num_elements
            for spec in self.params.values()
            if spec.key not in self.ties and not spec.is_buffer
        )


class SkeletonBuilder:
    """Collects the weights of stock layers under dotted prefixes, in module order.

    Args:
        prefix: Put before every key, for example ``"model."`` in a model with a head.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self._params: dict[str, ParamSpec] = {}
        self._ties: dict[str, str] = {}
        self._derived: dict[str, ParamSpec] = {}
        self._block: str | None = None

    def block(self, path: str | None) -> None:
        """Say that what follows belongs to the module at `path`, which is never split.

        Args:
            path: Module path below the prefix, or None to leave the block.
        """
        self._block = None if path is None else self.prefix + path

    def weight(self, key: str, *shape: int) -> None:
        """Add one parameter.

        Args:
            key: Name below the prefix.
            *shape: Its sizes.
        """
        self._params[self.prefix + key] = ParamSpec(self.prefix + key, shape, self._block)

    def buffer(self, key: str, *shape: int) -> None:
        """Add a buffer that is derived, not loaded.

        Args:
            key: Name below the prefix.
            *shape: Its sizes.
        """
        name = self.prefix + key
        self._derived[name] = ParamSpec(name, shape, self._block, is_buffer=True)

    def linear(self, path: str, out_features: int, in_features: int, *, bias: bool = False) -> None:
        """Add a dense layer's weight (out, in) and, if asked, its bias.

        Args:
            path: Module path below the prefix.
            out_features: Rows of the weight.
            in_features: Columns of the weight.
            bias: Whether it has one.
        """
        self.weight(f"{path}.weight", out_features, in_features)
        if bias:
            self.weight(f"{path}.bias", out_features)

    def norm(self, path: str, size: int, *, bias: bool = False) -> None:
        """Add a normalisation layer's scale and, if asked, its bias.

        Args:
            path: Module path below the prefix.
            size: Its only axis.
            bias: Whether it has one (LayerNorm) or not (RMSNorm).
        """
        self.weight(f"{path}.weight", size)
        if bias:
            self.weight(f"{path}.bias", size)

    def tie(self, alias: str, owner: str) -> None:
        """Say that two keys name one tensor. Neither gets the prefix.

        Args:
            alias: The key that a save leaves out.
            owner: The key that a save writes.
        """
        self._ties[alias] = owner

    def build(self) -> Skeleton:
        """Return the finished skeleton."""
        return Skeleton(dict(self._params), dict(self._ties), dict(self._derived))
