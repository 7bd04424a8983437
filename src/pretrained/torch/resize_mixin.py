# SPDX-License-Identifier: Apache-2.0
"""`ResizeMixin`: other numbers of tokens and positions, and ties made and undone; doors to `resize`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pretrained.errors import ArgumentError, NotYetError
from pretrained.torch.resize import positive, resize_positions, resize_vocabulary, untie, wanted_size
from pretrained.torch.ties import head_tie


class ResizeMixin:
    """Resizes the tables of a model.

    `_position_embedding` is the path, below the headless model, of a table of learned positions; an
    architecture without one says in `_positions_instead` what its users do instead.
    """

    _position_embedding: ClassVar[str] = ""
    _positions_instead: ClassVar[str] = "Its class says where one is as _position_embedding."

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give the model another number of tokens: embedding, head, its bias and the configs, or nothing.

        Rows are added and cut off at the end. Tensors that are shared stay shared, those that are not stay
        apart; dtype, device and `requires_grad` stay. The layers remain, with new parameters: build an
        optimizer after this, for an older one still holds the old parameters. Of a weight that was on disk
        the new tensor stays in memory. Settings of the configs that name a token which is cut off are
        unset, with a warning.

        Args:
            new_num_tokens: Rows; None for as many as there are.
            pad_to_multiple_of: Round up to a multiple of this.
            mean_resizing: New rows lie close to the mean of the old ones
                (`pretrained.torch.new_rows.rows_near_mean`); False initialises them as a new model's.

        Returns:
            The input embedding; as it was where neither number is given.

        Raises:
            ArgumentError: a number that is no whole number above 0, a layer whose rows cannot be changed
                (quantized other than int8, of an adapter, sharded by another library), or a config that
                does not allow the size; nothing has changed then, nor after any other error.
            NotYetError: the model is sharded by FSDP.
            PlacementError: the new tensors do not fit into memory.
        """
        embedding: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding  # type: ignore[no-any-return]
        if not isinstance(mean_resizing, bool):
            raise ArgumentError(
                "mean_resizing is True or False", where="mean_resizing", found=repr(mean_resizing)[:100]
            )
        rows = int(embedding.weight.shape[0])
        size = wanted_size(rows, new_num_tokens, pad_to_multiple_of)
        resize_vocabulary(self, size, near_mean=mean_resizing)
        return embedding  # type: ignore[no-any-return]

    # -- positions -----------------------------------------------------------------------------

    def get_position_embeddings(self) -> nn.Module:
        """Return the table of learned positions.

        Raises:
            NotYetError: the architecture has none (a NotImplementedError); the text says what it has.
        """
        return self.get_submodule(self._position_path("get_position_embeddings"))  # type: ignore[attr-defined,no-any-return]

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Give the model another number of positions, in the table and the config, or nothing.

        The first rows keep their values. New ones are initialised as a new model's and have to be trained;
        those of sines and cosines are computed. RoBERTa's table has rows before the first position, which
        count: texts of n tokens take ``n + pad_token_id + 1``.

        Args:
            new_num_position_embeddings: Rows of the table, which is `config.max_position_embeddings`.

        Raises:
            ArgumentError: no whole number above 0, or too few for the padding's row; nothing has changed
                then, nor after any other error.
            NotYetError: the architecture has no such table, or the model is sharded by FSDP.
        """
        path = self._position_path("resize_position_embeddings")
        size = positive(
            new_num_position_embeddings, "new_num_position_embeddings", "Pass the longest text's tokens."
        )
        resize_positions(self, path, size)

    def _position_path(self, asked: str) -> str:
        below, instead = self._position_embedding, self._positions_instead
        # BERT's older kinds of positions are tables inside each attention.
        if getattr(self.config, "relative_positions", False):  # type: ignore[attr-defined]
            below, instead = "", "Its positions are distances inside attention, a table in each layer."
        if not below:
            raise NotYetError(
                f"{type(self).__name__} has no table of learned positions", where=asked, mend=instead
            )
        is_base = self.base_model is self  # type: ignore[attr-defined]
        return below if is_base else f"{self.base_model_prefix}.{below}"  # type: ignore[attr-defined]

    def _new_positions(self, start: int, stop: int) -> torch.Tensor | None:
        """Return rows of the table that follow from a formula; None where they are learned.

        Args:
            start: First row.
            stop: The one after the last.
        """
        return None

    # -- ties ----------------------------------------------------------------------------------

    def untie_weights(self) -> None:
        """Give the head memory of its own, with the values it has, and set `tie_word_embeddings` to False.

        To tie it again, set ``model.config.tie_word_embeddings = True`` and call `tie_weights`: the head is
        the embedding then, and its own values are lost. An optimizer is built after this.

        Raises:
            ArgumentError: the model has no head that the config can tie.
        """
        alias, owner = head_tie(self)
        if alias is None:
            raise ArgumentError(
                f"{type(self).__name__} has no head that its embedding can be tied to",
                where="untie_weights",
            )
        untie(self, alias, owner)
