# SPDX-License-Identifier: Apache-2.0
"""What every forward does with its inputs first: defaults, embeddings, positions."""

from __future__ import annotations

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
        ArgumentError: both or neither are given, or the ids have another rank or dtype.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ArgumentError(
            "Give either token ids or embeddings",
            where=f"{prefix}input_ids, {prefix}inputs_embeds",
            found="both" if input_ids is not None else "neither",
        )
    if inputs_embeds is not None:
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ArgumentError(
            "Token ids are a batch of rows of whole numbers",
            where=f"{prefix}input_ids",
            expected="an integer tensor [batch, length]",
            found=f"{input_ids.dtype} {list(input_ids.shape)}",
            mend="Add the batch axis with ids[None], or tokenize with return_tensors='pt'.",
        )
    return embedding(input_ids)


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
