# SPDX-License-Identifier: Apache-2.0
"""`EmbeddingAccessMixin`: the input embedding and the output head, wherever an architecture keeps them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrained.errors import ArgumentError


class EmbeddingAccessMixin:
    """Finds and replaces the token embedding and the language-model head.

    `_input_embedding` and `_output_embedding` are module paths below the headless model and the whole
    model; architectures that differ from the defaults set them.
    """

    _input_embedding = "embed_tokens"
    _output_embedding = "lm_head"

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding.

        Raises:
            ArgumentError: it is not where `_input_embedding` says.
        """
        found = _find(self.base_model, self._input_embedding)  # type: ignore[attr-defined]
        if found is None:
            raise _absent(self, "token embedding", "_input_embedding")
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding.

        Args:
            value: The new embedding.

        Raises:
            ArgumentError: there is none to replace.
        """
        self.get_input_embeddings()
        _set_submodule(self.base_model, self._input_embedding, value)  # type: ignore[attr-defined]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-model head, or None where there is none."""
        return _find(self, self._output_embedding)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language-model head.

        Args:
            new_embeddings: The new head.

        Raises:
            ArgumentError: there is none to replace.
        """
        if self.get_output_embeddings() is None:
            raise _absent(self, "language-model head", "_output_embedding")
        _set_submodule(self, self._output_embedding, new_embeddings)


def _absent(model: Any, what: str, fact: str) -> ArgumentError:
    return ArgumentError(
        f"{type(model).__name__} has no {what}",
        where=getattr(model, fact),
        mend=f"If it has one elsewhere, its class says where as {fact}.",
    )


def _find(module: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module if isinstance(module, nn.Module) else None


def _set_submodule(module: Any, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
