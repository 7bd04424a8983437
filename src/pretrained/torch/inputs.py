# SPDX-License-Identifier: Apache-2.0
"""What every forward does with its inputs first: defaults, embeddings, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError
from pretrained.torch.cache import Cache


def flags(
    config: PreTrainedConfig,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    use_cache: bool | None,
    return_dict: bool | None,
) -> tuple[bool, bool, bool, bool]:
    """Return the four switches of a forward, taking the config's choice where a call has none.

    Args:
        config: The model's configuration.
        output_attentions: The call's choice.
        output_hidden_states: The call's choice.
        use_cache: The call's choice.
        return_dict: The call's choice.
    """
    return (
        config.output_attentions if output_attentions is None else output_attentions,
        config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        config.use_cache if use_cache is None else use_cache,
        config.use_return_dict if return_dict is None else return_dict,
    )


def embed_tokens(
    embedding: nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    *,
    prefix: str = "",
) -> torch.Tensor:
    """Return the embeddings of a call, from ids or as given.

    Args:
        embedding: The token embedding.
        input_ids: [batch, length] token ids.
        inputs_embeds: [batch, length, hidden].
        prefix: Put before the arguments' names in errors (``"decoder_"``).

    Raises:
        ArgumentError: both or neither are given, they have another type, rank or dtype, they are
            empty, or (on a CPU) an id is outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError(
            "Give either token ids or embeddings",
            where=f"{prefix}input_ids, {prefix}inputs_embeds",
            found="both" if input_ids is not None else "neither",
        )
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3:
            raise ArgumentError(
                "Embeddings are a batch of rows of vectors",
                where=f"{prefix}inputs_embeds",
                expected="a tensor [batch, length, hidden]",
                found=list(inputs_embeds.shape),
            )
        _not_empty(inputs_embeds, f"{prefix}inputs_embeds")
        return inputs_embeds
    ids = _checked(input_ids, f"{prefix}input_ids")
    if torch.compiler.is_compiling():
        return embedding(ids)
    try:
        return embedding(ids)
    except IndexError as error:
        outside = _outside(ids, embedding, f"{prefix}input_ids")
        if outside is None:
            raise
        raise outside from error


def _checked(ids: Any, name: str) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor):
        raise ArgumentError(
            "Token ids are a tensor",
            where=name,
            found=type(ids).__name__,
            mend="Pass what the tokenizer returned as model(**inputs)."
            if hasattr(ids, "keys")
            else "Write torch.tensor(ids), or tokenize with return_tensors='pt'.",
        )
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(
            "Token ids are a batch of rows of whole numbers",
            where=name,
            expected="an int64 or int32 tensor [batch, length]",
            found=f"{ids.dtype} {list(ids.shape)}",
            mend="Add the batch axis with ids[None], or tokenize with return_tensors='pt'.",
        )
    _not_empty(ids, name)
    return ids


def _not_empty(tensor: torch.Tensor, name: str) -> None:
    if tensor.shape[1] == 0:
        raise ArgumentError(
            "The prompt is empty",
            where=name,
            found=list(tensor.shape),
            mend="Pass at least one token, such as the tokenizer's bos_token_id, or some text.",
        )


def _outside(ids: torch.Tensor, embedding: nn.Module, name: str) -> ArgumentError | None:
    """Return an error that names the first id outside the vocabulary, or None where there is none.

    Only after a lookup has failed: looking first would cost every step, and on a GPU a wait.
    """
    size = getattr(embedding, "num_embeddings", None)
    if size is None:
        return None
    wrong = (ids < 0) | (ids >= size)
    if not bool(wrong.any()):
        return None
    row, position = wrong.nonzero()[0].tolist()
    return ArgumentError(
        f"Token id {int(ids[row, position])} is outside the vocabulary",
        where=f"{name}, row {row}, position {position}",
        expected=f"0 to {size - 1}",
        mend="Use the tokenizer that belongs to this model.",
    )


def new_positions(
    x: torch.Tensor,
    cache: Cache | None,
    cache_position: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[int, torch.Tensor]:
    """Return the position of the first new token and the position ids of all, counting on from a cache.

    Args:
        x: [batch, length, hidden], the new tokens.
        cache: What came before.
        cache_position: [length] slots of a static cache, which are positions too.
        position_ids: [batch, length] as the user gave them.

    Returns:
        The first position (0 where `cache_position` says it instead) and [1 or batch, length] ids.
    """
    if cache_position is not None:
        return 0, cache_position[None] if position_ids is None else position_ids
    first = 0 if cache is None else cache.get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(first, first + x.shape[1], device=x.device)[None]
    return first, position_ids
