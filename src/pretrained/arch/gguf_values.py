# SPDX-License-Identifier: Apache-2.0
"""Typed access to a GGUF file's metadata, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrained.core.checkpoint import TensorInfo
from pretrained.errors import ConfigError

_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True)
class Values:
    """A GGUF file's facts.

    Attributes:
        metadata: Its key-value section.
        tensors: Its tensors.
        arch: ``general.architecture``, the prefix of the model's own keys.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    arch: str

    def integer(self, name: str, *, default: int | None = None, least: int = 1) -> int:
        """Return a count.

        Args:
            name: The key, without the architecture's prefix.
            default: What an absent key means; None makes it required.
            least: The smallest value that makes sense.

        Raises:
            ConfigError: it is absent, or no integer from `least` to 2**31. Arrays with one value for
                each layer are accepted where all are equal.
        """
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key)
        if value is None:
            if default is None:
                raise self._absent(key)
            return default
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, np.ndarray):
            raise ConfigError(
                "Layers that differ in size cannot be loaded", where=key, expected="one number", found=value
            )
        if type(value) is not int or not least <= value <= _LARGEST:
            raise ConfigError(
                "A GGUF key has a value that cannot be",
                where=key,
                expected=f"an integer from {least} to {_LARGEST}",
                found=repr(value),
            )
        return value

    def layers(self, name: str, *, default: int | None = None) -> int:
        """Return a number of layers, each of which must have tensors: it sizes what is built from it.

        Args:
            name: The key, without the architecture's prefix.
            default: What an absent key means; None makes it required.

        Raises:
            ConfigError: as `integer`, and where the file has fewer tensors than layers.
        """
        count = self.integer(name, default=default)
        if count > len(self.tensors):
            raise ConfigError(
                "The GGUF file promises more layers than it has tensors",
                where=f"{self.arch}.{name}",
                expected=f"at most {len(self.tensors)}",
                found=count,
            )
        return count

    def number(self, name: str, *, default: float | None = None) -> float:
        """Return a number as the shortest decimal that it rounds from: 1e-05, not 9.999999747378752e-06.

        Args:
            name: The key, without the architecture's prefix.
            default: What an absent key means; None makes it required.

        Raises:
            ConfigError: it is absent, or no finite number.
        """
        key = f"{self.arch}.{name}"
        value = self.metadata.get(key, default)
        if value is None:
            raise self._absent(key)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise ConfigError(
                "A GGUF key has a value that cannot be", where=key, expected="a number", found=repr(value)
            )
        return shortest(value)

    def text(self, key: str) -> str:
        """Return a string, or an empty one where the key is absent or something else.

        Args:
            key: The whole key.
        """
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def has(self, name: str) -> bool:
        """Tell whether the architecture's key `name` is there."""
        return f"{self.arch}.{name}" in self.metadata

    def has_tensor(self, name: str) -> bool:
        """Tell whether the file holds a tensor."""
        return name in self.tensors

    def vocab_size(self) -> int:
        """Return the number of rows of the token embedding, which metadata may round or leave out.

        Raises:
            ConfigError: the file holds no token embedding.
        """
        info = self.tensors.get("token_embd.weight")
        if info is None or len(info.shape) != 2:
            raise ConfigError(
                "The GGUF file holds no model",
                where="token_embd.weight",
                expected="a matrix of token embeddings",
                found=f"{len(self.tensors)} tensors without it" if info is None else f"shape {info.shape}",
                mend="Vocabularies, adapters and projectors are no models: take the model's own file.",
            )
        return info.shape[0]

    def token_ids(self) -> dict[str, Any]:
        """Return ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``; None where the file has none.

        Chat models end a turn with another token than a text; both then end a generation.
        """
        ids = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            ids[f"{name}_token_id"] = self._token_id(key)
        turn = self._token_id("eot")
        if turn is not None and turn != ids["eos_token_id"]:
            ids["eos_token_id"] = turn if ids["eos_token_id"] is None else [ids["eos_token_id"], turn]
        return ids

    def _token_id(self, name: str) -> Any:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= 2 * _LARGEST):
            raise ConfigError(
                "A GGUF key has a value that cannot be", where=key, expected="a token id", found=repr(value)
            )
        return value

    def _absent(self, key: str) -> ConfigError:
        return ConfigError(
            "The GGUF file lacks a key that describes its model",
            where=key,
            mend="Convert the model again with a current llama.cpp.",
        )


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to a float32, as a Python float.

    Args:
        value: A number; one that is no float32 is returned as it is.
    """
    single = np.float32(value)
    return float(str(single)) if float(single) == value else float(value)
