# SPDX-License-Identifier: Apache-2.0
"""The Llama family in PyTorch: Llama, Mistral, Qwen2, Qwen3, SmolLM3 and their heads.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden, H query heads, G key-value heads,
K channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrained.arch import llama as arch
from pretrained.torch.attention import attend
from pretrained.torch.cache import Cache, DynamicCache, as_cache
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
    last_logits,
)
from pretrained.torch.inputs import embed_tokens, flags, new_positions
from pretrained.torch.losses import causal_lm_loss
from pretrained.torch.masks import causal_mask
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.nn import RMSNorm, RotaryEmbedding, activation, rotate
from pretrained.torch.outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, finish
from pretrained.torch.pruning import HeadParts
from pretrained.torch.steps.llama import LlamaStep, LlamaWindow


class LlamaMLP(nn.Module):
    """Gated feed-forward network (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: arch.LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network to [B, T, D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: arch.LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_size
        self.scaling = self.head_dim**-0.5
        # Attention functions written for the ecosystem read it from the module.
        self.num_key_value_groups = config.num_attention_heads // config.kv_heads
        self.rotates = config.rotates(layer_idx)
        self.window = config.window(layer_idx)
        hidden, queries, keys = (
            config.hidden_size,
            config.heads_left(layer_idx) * self.head_dim,
            config.kv_heads_left(layer_idx) * self.head_dim,
        )
        self.q_proj = nn.Linear(hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.query_key_norm else None

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each new token to the cached and new ones it may see."""
        heads = (*hidden_BTD.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_BTD).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTK, k_BGSK, v_BGSK = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotates:
            q_BHTK, k_BGSK = rotate(q_BHTK, *rotary), rotate(k_BGSK, *rotary)
        if cache is not None:
            k_BGSK, v_BGSK = cache.update(k_BGSK, v_BGSK, self.layer_idx, cache_position)
        out, weights = attend(
            self,
            self.config,
            q_BHTK,
            k_BGSK,
            v_BGSK,
            mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout or 0.0,
            is_causal=True,
            output_attentions=output_attentions,
            sliding_window=self.window,
        )
        return self.o_proj(out.reshape(*hidden_BTD.shape[:-1], -1)), weights

    def head_parts(self) -> HeadParts:
        """Return the layers with a slice for each head; nothing here counts them."""
        keys_values = (self.k_proj, self.v_proj)
        return HeadParts((self.q_proj,), keys_values, self.o_proj, self.head_dim, self, lambda kept: {})


class LlamaDecoderLayer(nn.Module):
    """One block: attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: arch.LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the block's output [B, T, D] and, if asked, its attention weights."""
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), rotary, mask, cache, cache_position, output_attentions
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights


class LlamaPreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.LlamaConfig
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    _positions_instead = (
        "Its positions are rotary, computed for any length: raise config.max_position_embeddings, and set "
        "config.rope_scaling for texts longer than it was trained on."
    )


class LlamaModel(LlamaPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: arch.LlamaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.windows = tuple(config.window(i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope_table())
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run the decoder.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            attention_mask: [B, S] with 0 for padding, a ready mask of rank 4, or None for no padding.
            position_ids: [B, T]; None counts on from the cache.
            past_key_values: A cache, extended in place.
            inputs_embeds: [B, T, D] instead of ids.
            use_cache: Return a cache (a new one if none is given); None for the config's choice.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return each layer's input and the final output; None as above.
            return_dict: False for a plain tuple; None as above.
            cache_position: [T] slots of a static cache to write, for compiled steps; None counts.
        """
        attentions, hidden, use_cache, as_dict = flags(
            self.config,
            output_attentions,
            output_hidden_states,
            self.cache_choice(use_cache, past_key_values),
            return_dict,
        )
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds)
        past_key_values = as_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        first, position_ids = new_positions(x, past_key_values, cache_position, position_ids)
        rotary = self.rotary_emb(x, position_ids)
        masks = self._masks(x, attention_mask, past_key_values, cache_position, first)
        all_hidden: tuple[torch.Tensor, ...] | None = () if hidden else None
        all_weights: tuple[Any, ...] | None = () if attentions else None
        for index, (layer, window) in enumerate(zip(self.layers, self.windows, strict=True)):
            if all_hidden is not None:
                all_hidden += (x,)
            x, weights = self.call_layer(
                index, layer, x, rotary, masks[window], past_key_values, cache_position, attentions
            )
            if all_weights is not None:
                all_weights += (weights,)
        x = self.norm(x)
        if all_hidden is not None:
            all_hidden += (x,)
        cache = past_key_values if use_cache else None
        return finish(BaseModelOutputWithPast(x, cache, all_hidden, all_weights), as_dict)

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each layer."""
        return [layer.self_attn for layer in self.layers]

    def _masks(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        first: int,
    ) -> dict[int | None, torch.Tensor | None]:
        """Return one mask for each kind of layer: window size (or None) -> mask."""
        masks: dict[int | None, torch.Tensor | None] = {}
        for layer_idx, window in enumerate(self.windows):
            if window in masks:
                continue
            kv_length, kv_offset = x.shape[1], 0
            if cache is not None:
                kv_length, kv_offset = cache.get_mask_sizes(x.shape[1], layer_idx, cache_position)
            masks[window] = causal_mask(
                query_length=x.shape[1],
                kv_length=kv_length,
                kv_offset=kv_offset,
                query_positions=first if cache_position is None else cache_position,
                attention_mask=attention_mask,
                window=window,
                device=x.device,
            )
        return masks


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _base_class = LlamaModel
    _decode_step = LlamaStep
    _decode_window = LlamaWindow
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: arch.LlamaConfig) -> None:
        super().__init__(config)
        self.model = self._base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Run the decoder and the head.

        Args:
            input_ids: As for `LlamaModel.forward`, like all that are not named here.
            attention_mask: As there.
            position_ids: As there.
            past_key_values: As there.
            inputs_embeds: As there.
            labels: [B, T] ids to predict, each at the position before; -100 to leave out.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
            cache_position: As there.
            logits_to_keep: Last positions to compute logits for, or their indices; 0 for all.
            num_items_in_batch: Labels in the whole accumulated batch, to divide the loss by.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
        )
        logits = self.lm_head(last_logits(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_by(causal_lm_loss)(logits, labels, num_items_in_batch=num_items_in_batch)
        result = CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states, out.attentions)
        return finish(result, as_dict)


class LlamaForSequenceClassification(ForSequenceClassification, LlamaPreTrainedModel):
    """The decoder with a classifier on each row's last token."""

    _base_class = LlamaModel


class LlamaForTokenClassification(ForTokenClassification, LlamaPreTrainedModel):
    """The decoder with a classifier on every token."""

    _base_class = LlamaModel


class LlamaForQuestionAnswering(ForQuestionAnswering, LlamaPreTrainedModel):
    """The decoder with a classifier for both ends of an answer."""

    base_model_prefix = "transformer"
    _base_class = LlamaModel
