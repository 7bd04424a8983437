# SPDX-License-Identifier: Apache-2.0
"""`EmbeddingAccessMixin`: embedding, head, encoder and decoder, wherever an architecture keeps them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from pretrained.errors import ArgumentError

logger = logging.getLogger(__name__)


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

        The config stays as it is; `resize_token_embeddings` changes both.

        Args:
            value: The new embedding.

        Raises:
            ArgumentError: there is none to replace, or it is no module, or of another width.
        """
        _check_table(value, self.get_input_embeddings(), "value", "embedding_dim")
        rows, known = getattr(value, "num_embeddings", None), getattr(self.config, "vocab_size", None)  # type: ignore[attr-defined]
        if rows is not None and known is not None and rows != known:
            logger.warning(
                "The new embedding has %s rows and config.vocab_size is %s; set it too before you save.",
                rows,
                known,
            )
        _set_submodule(self.base_model, self._input_embedding, value)  # type: ignore[attr-defined]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the language-model head, or None where there is none."""
        return _find(self, self._output_embedding)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language-model head.

        Args:
            new_embeddings: The new head.

        Raises:
            ArgumentError: there is none to replace, or it is no module, or of another width.
        """
        old = self.get_output_embeddings()
        if old is None:
            raise _absent(self, "language-model head", "_output_embedding")
        _check_table(new_embeddings, old, "new_embeddings", "in_features")
        _set_submodule(self, self._output_embedding, new_embeddings)

    # -- stacks --------------------------------------------------------------------------------

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the part that reads: the encoder, or the model itself where none is set apart.

        Args:
            modality: None for text, the only kind here.

        Raises:
            ArgumentError: another modality.
        """
        _check_text(self, modality)
        holder = self._holder("encoder")
        return self if holder is None else holder.encoder  # type: ignore[return-value]

    def set_encoder(self, encoder: nn.Module, modality: str | None = None) -> None:
        """Replace the encoder.

        Args:
            encoder: The new one.
            modality: As for `get_encoder`.

        Raises:
            ArgumentError: there is none to replace, or it is no module.
        """
        _check_module(encoder, "encoder")
        _check_text(self, modality)
        holder = self._holder("encoder")
        if holder is None:
            raise ArgumentError(f"{type(self).__name__} has no encoder to replace", where="set_encoder")
        holder.encoder = encoder

    def get_decoder(self) -> nn.Module:
        """Return the part that writes: the decoder, or the headless model where none is set apart."""
        holder = self._holder("decoder")
        return self.base_model if holder is None else holder.decoder  # type: ignore[attr-defined,no-any-return]

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace what `get_decoder` returns. Call `tie_weights` after it where the head is tied.

        Args:
            decoder: The new one.

        Raises:
            ArgumentError: there is none to replace, or it is no module.
        """
        _check_module(decoder, "decoder")
        holder = self._holder("decoder")
        if holder is not None:
            holder.decoder = decoder
        elif self.base_model is self:  # type: ignore[attr-defined]
            raise ArgumentError(
                f"{type(self).__name__} is the decoder itself, and nothing holds it", where="set_decoder"
            )
        else:
            setattr(self, self.base_model_prefix, decoder)  # type: ignore[attr-defined]

    def _holder(self, name: str) -> Any:
        """Return the module that holds a stack: this one, the headless one, or None."""
        holders: tuple[Any, ...] = (self, self.base_model)  # type: ignore[attr-defined]
        return next((held for held in holders if name in held._modules), None)


def _absent(model: Any, what: str, fact: str) -> ArgumentError:
    return ArgumentError(
        f"{type(model).__name__} has no {what}",
        where=getattr(model, fact),
        mend=f"If it has one elsewhere, its class says where as {fact}.",
    )


def _check_text(model: Any, modality: str | None) -> None:
    if modality is not None:
        raise ArgumentError(
            f"{type(model).__name__} reads text only", where="modality", expected="None", found=modality
        )


def _check_module(value: Any, name: str) -> None:
    if not isinstance(value, nn.Module):
        raise ArgumentError(f"{name} is no module", where=name, found=type(value).__name__)


def _check_table(new: Any, old: nn.Module, name: str, width: str) -> None:
    """Raise for a layer that cannot stand where another stands."""
    _check_module(new, name)
    ours, theirs = getattr(old, width, None), getattr(new, width, None)
    if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
        raise ArgumentError(
            "The new layer has another width than the model",
            where=f"{name}.{width}",
            expected=ours,
            found=theirs,
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
