# SPDX-License-Identifier: Apache-2.0
"""BERT's headless model, which RoBERTa's is too: inputs, masks and distances settled, then the blocks.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from pretrained.arch.bert import BertConfig
from pretrained.errors import ArgumentError
from pretrained.torch.cache import Cache, DynamicCache, EncoderDecoderCache, as_cache
from pretrained.torch.inputs import embed_tokens, flags
from pretrained.torch.masks import causal_mask, padding_mask
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.bert_layers import BertEmbeddings, BertEncoder, BertPooler
from pretrained.torch.outputs import BaseModelOutputWithPoolingAndCrossAttentions, finish


class BertStack(PreTrainedModel):
    """The stack without a head; a family mixes it with its base class and names its layers' classes."""

    embeddings_class: ClassVar[type[BertEmbeddings]] = BertEmbeddings
    encoder_class: ClassVar[type[BertEncoder]] = BertEncoder
    pooler_class: ClassVar[type[BertPooler]] = BertPooler

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = self.encoder_class(config)
        self.pooler = self.pooler_class(config) if add_pooling_layer else None
        self.post_init()

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each layer to its own tokens."""
        return [layer.attention for layer in self.encoder.layer]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run the stack.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            attention_mask: [B, S] with 0 for padding, a ready mask of rank 4, or None for no padding.
            token_type_ids: [B, T] segments; None for 0 everywhere.
            position_ids: [B, T]; None counts. Without effect where positions are relative.
            inputs_embeds: [B, T, D] instead of ids.
            encoder_hidden_states: [B, encoder length, D] that a decoder with cross-attention looks at.
            encoder_attention_mask: [B, encoder length] with 0 for padding, or None.
            past_key_values: A cache, extended in place.
            use_cache: Return a cache, in a decoder; None for the config's choice.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return the embeddings and each layer's output; None as above.
            return_dict: False for a plain tuple; None as above.
            cache_position: [T] slots of a static cache to write, for compiled steps; None counts.

        Raises:
            ArgumentError: inputs that contradict each other or the config, or are too long.
        """
        attentions, hidden, use_cache, as_dict = flags(
            self.config,
            output_attentions,
            output_hidden_states,
            self.cache_choice(use_cache, past_key_values) if self.config.is_decoder else False,
            return_dict,
        )
        encoder_mask = self._encoder_mask(encoder_hidden_states, encoder_attention_mask)
        embeds = embed_tokens(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        past_key_values = as_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache(encoder_hidden_states is not None)
        mask, distances = self._mask(embeds, attention_mask, past_key_values, cache_position)
        if position_ids is None:
            position_ids = self.embeddings.positions(embeds, input_ids, past_key_values, cache_position)
        x = self.embeddings(embeds, token_type_ids, position_ids)
        all_hidden, weights, cross_weights = [x], [], []
        for index, layer in enumerate(self.encoder.layer):
            x, own, cross = self.call_layer(
                index,
                layer,
                x,
                mask,
                distances,
                encoder_hidden_states,
                encoder_mask,
                past_key_values,
                cache_position,
                attentions,
            )
            all_hidden.append(x)
            weights.append(own)
            cross_weights.append(cross)
        result = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=x,
            pooler_output=None if self.pooler is None else self.pooler(x),
            hidden_states=tuple(all_hidden) if hidden else None,
            past_key_values=past_key_values if use_cache else None,
            attentions=tuple(weights) if attentions else None,
            cross_attentions=tuple(cross_weights)
            if attentions and encoder_hidden_states is not None
            else None,
        )
        return finish(result, as_dict)

    def _new_cache(self, crosses: bool) -> Cache:
        if crosses:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return DynamicCache(config=self.config)

    def _encoder_mask(self, states: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Return which of the encoder's tokens may be looked at, after checking that something looks."""
        if states is None and mask is not None:
            raise ArgumentError(
                "encoder_attention_mask masks encoder_hidden_states, which are not given",
                where="encoder_attention_mask",
            )
        if states is None:
            return None
        if not self.config.add_cross_attention:
            raise ArgumentError(
                f"This {type(self).__name__} has no layers that look at encoder_hidden_states",
                where="encoder_hidden_states",
                mend="Build it from a config with is_decoder=True and add_cross_attention=True.",
            )
        return padding_mask(mask, kv_length=states.shape[1])

    def _mask(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return who may look at whom and, where positions are relative, [T, S] query minus key positions."""
        length, first, kv_length, kv_offset = x.shape[1], 0, x.shape[1], 0
        if cache is not None:
            kv_length, kv_offset = cache.get_mask_sizes(length, cache_position=cache_position)
            first = cache.get_seq_length()
        if self.config.is_decoder:
            mask = causal_mask(
                query_length=length,
                kv_length=kv_length,
                kv_offset=kv_offset,
                query_positions=first if cache_position is None else cache_position,
                attention_mask=attention_mask,
                device=x.device,
            )
        else:
            mask = padding_mask(attention_mask, kv_length=kv_length)
        if not self.config.relative_positions:
            return mask, None
        keys = torch.arange(kv_offset, kv_offset + kv_length, device=x.device)
        queries = (
            torch.arange(first, first + length, device=x.device) if cache_position is None else cache_position
        )
        return mask, queries[:, None] - keys[None, :]
