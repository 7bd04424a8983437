# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in PyTorch: the stack of `gpt2_layers` and its heads.

Shapes: B batch, T new tokens, S cached and new tokens, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch import gpt2 as arch
from pretrained.errors import ArgumentError
from pretrained.torch.cache import Cache, DynamicCache, EncoderDecoderCache, as_cache
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.heads import (
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
    last_logits,
)
from pretrained.torch.initialise import initialise_module
from pretrained.torch.inputs import embed_tokens, flags, new_positions
from pretrained.torch.losses import causal_lm_loss
from pretrained.torch.masks import causal_mask, padding_mask
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.gpt2_layers import GPT2Block
from pretrained.torch.nn import activation
from pretrained.torch.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    ModelOutput,
    Tensors,
    finish,
)
from pretrained.torch.steps.gpt2 import GPT2Step


class GPT2PreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.GPT2Config
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    _input_embedding = "wte"
    _position_embedding = "wpe"

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module; layers that feed the residual stream are smaller by its number of inputs.

        "We scale the weights of residual layers at initialization by a factor of 1/sqrt(N) where N is the
        number of residual layers" (Radford et al. 2019, section 2.3): two for each block.
        """
        std = self.config.initializer_range
        if getattr(module, "into_residual", False):
            std /= math.sqrt(2 * self.config.n_layer)
        initialise_module(module, std=std)


class GPT2Model(GPT2PreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: arch.GPT2Config) -> None:
        super().__init__(config)
        self.embed_dim = config.n_embd
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run the decoder.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            past_key_values: A cache, extended in place.
            attention_mask: [B, S] with 0 for padding, a ready mask of rank 4, or None for no padding.
            token_type_ids: [B, T] ids of the vocabulary whose embeddings are added; None for none.
            position_ids: [B, T]; None counts on from the cache.
            inputs_embeds: [B, T, D] instead of ids.
            encoder_hidden_states: [B, encoder length, D] to look at with cross-attention.
            encoder_attention_mask: [B, encoder length] with 0 for padding, or None.
            use_cache: Return a cache (a new one if none is given); None for the config's choice.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return each layer's input and the final output; None as above.
            return_dict: False for a plain tuple; None as above.
            cache_position: [T] slots of a static cache to write, for compiled steps; None counts.

        Raises:
            ArgumentError: inputs that contradict each other or the config, or are too long.
        """
        attentions, hidden, use_cache, as_dict = flags(
            self.config,
            output_attentions,
            output_hidden_states,
            self.cache_choice(use_cache, past_key_values),
            return_dict,
        )
        encoder_mask = self._encoder_mask(encoder_hidden_states, encoder_attention_mask)
        x = embed_tokens(self.wte, input_ids, inputs_embeds)
        cache = self._cache(as_cache(past_key_values), use_cache)
        first, positions = new_positions(x, cache, cache_position, position_ids)
        counted = position_ids is None and cache_position is None
        self._check_positions(first + x.shape[1] if counted else None, positions)
        mask = self._mask(x, attention_mask, cache, cache_position, first)
        x = x + self.wpe(positions)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = self.drop(x)
        all_hidden, weights, cross_weights = [], [], []
        for index, block in enumerate(self.h):
            all_hidden.append(x)
            x, own, cross = self.call_layer(
                index, block, x, mask, encoder_hidden_states, encoder_mask, cache, cache_position, attentions
            )
            weights.append(own)
            cross_weights.append(cross)
        x = self.ln_f(x)
        crosses = attentions and encoder_hidden_states is not None
        result = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*all_hidden, x) if hidden else None,
            attentions=tuple(weights) if attentions else None,
            cross_attentions=tuple(cross_weights) if crosses else None,
        )
        return finish(result, as_dict)

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each block to its own tokens."""
        return [block.attn for block in self.h]

    def _cache(self, cache: Cache | None, use_cache: bool) -> Cache | None:
        """Return the cache to fill: with a part for the encoder's tokens where there may be an encoder."""
        if not use_cache:
            return cache
        cache = DynamicCache(config=self.config) if cache is None else cache
        if self.config.add_cross_attention and not isinstance(cache, EncoderDecoderCache):
            return EncoderDecoderCache(cache, DynamicCache(config=self.config))
        return cache

    def _mask(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        cache_position: torch.Tensor | None,
        first: int,
    ) -> torch.Tensor | None:
        kv_length, kv_offset = x.shape[1], 0
        if cache is not None:
            kv_length, kv_offset = cache.get_mask_sizes(x.shape[1], cache_position=cache_position)
        return causal_mask(
            query_length=x.shape[1],
            kv_length=kv_length,
            kv_offset=kv_offset,
            query_positions=first if cache_position is None else cache_position,
            attention_mask=attention_mask,
            device=x.device,
        )

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
                "This GPT-2 has no layers that look at encoder_hidden_states",
                where="encoder_hidden_states",
                mend="Build it from a config with add_cross_attention=True.",
            )
        return padding_mask(mask, kv_length=states.shape[1])

    def _check_positions(self, length: int | None, positions: torch.Tensor) -> None:
        """Raise where there are more tokens than positions, before the lookup fails with less to say.

        Args:
            length: Tokens, cached ones included, where positions are counted from 0; None where they are
                given. Those are looked at on the CPU only: elsewhere that would wait for the device.
            positions: [1 or B, T].

        Raises:
            ArgumentError: there are more.
        """
        if length is None:
            if torch.compiler.is_compiling() or positions.device.type != "cpu" or not positions.numel():
                return
            length = int(positions.max()) + 1
        if length > self.config.n_positions:
            raise ArgumentError(
                "The input is longer than the model has positions for",
                where="input_ids",
                expected=f"at most {self.config.n_positions} tokens, cached ones included",
                found=length,
                mend="Truncate it to its last tokens, or split it.",
            )


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _decode_step = GPT2Step
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: arch.GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
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
            input_ids: As for `GPT2Model.forward`, like all that are not named here.
            past_key_values: As there.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            encoder_hidden_states: As there.
            encoder_attention_mask: As there.
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
        out = self.transformer(
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
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
        result = CausalLMOutputWithCrossAttentions(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions, out.cross_attentions
        )
        return finish(result, as_dict)


class GPT2SequenceSummary(nn.Module):
    """One vector (or score) for a text, from the hidden states of its tokens."""

    def __init__(self, config: arch.GPT2Config) -> None:
        super().__init__()
        self.summary_type = config.checked_summary_type()
        size = config.summary_size()
        self.summary = nn.Identity() if size is None else nn.Linear(config.n_embd, size)
        self.activation = activation(config.summary_activation or "linear")
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, hidden_states: torch.Tensor, cls_index: torch.Tensor | None = None) -> torch.Tensor:
        """Sum texts up.

        Args:
            hidden_states: [..., T, D].
            cls_index: [...] index of each text's token that stands for it; None for the last. For
                ``summary_type="cls_index"`` only.

        Returns:
            [..., D] or [..., 1], as the config's projection has it.
        """
        if self.summary_type == "mean":
            x = hidden_states.mean(dim=-2)
        elif self.summary_type == "first":
            x = hidden_states[..., 0, :]
        elif self.summary_type == "last" or cls_index is None:
            x = hidden_states[..., -1, :]
        else:
            index = cls_index[..., None, None].expand(*cls_index.shape, 1, hidden_states.shape[-1])
            x = hidden_states.gather(-2, index).squeeze(-2)
        return self.last_dropout(self.activation(self.summary(self.first_dropout(x))))


@dataclass
class GPT2DoubleHeadsModelOutput(ModelOutput):
    """Output of `GPT2DoubleHeadsModel`: logits [B, choices, T, vocab], mc_logits [B, choices]."""

    loss: torch.Tensor | None = None
    mc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mc_logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


class GPT2DoubleHeadsModel(GPT2PreTrainedModel, GenerationMixin):
    """The decoder with a language-model head and one that chooses among several texts."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: arch.GPT2Config) -> None:
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = GPT2SequenceSummary(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mc_token_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mc_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run the decoder on every choice, and both heads.

        Args:
            input_ids: [B, choices, T], or [B, T] for one choice. Those that are not named here are as for
                `GPT2Model.forward`, with an axis for the choices before the tokens'.
            past_key_values: A cache over B * choices rows.
            attention_mask: As there.
            token_type_ids: As there.
            position_ids: As there.
            inputs_embeds: As there.
            mc_token_ids: [B, choices] index of the token to classify; None for the last.
            labels: As `input_ids`, ids to predict; -100 to leave out.
            mc_labels: [B] index of the right choice.
            use_cache: As there.
            output_attentions: As there.
            output_hidden_states: As there; the layers' states have B * choices rows.
            return_dict: As there.
            cache_position: As there.
        """
        as_dict = self.config.use_return_dict if return_dict is None else return_dict
        given = inputs_embeds[..., 0] if input_ids is None and inputs_embeds is not None else input_ids
        out = self.transformer(
            _rows(input_ids),
            past_key_values,
            _rows(attention_mask),
            _rows(token_type_ids),
            _rows(position_ids),
            None if inputs_embeds is None else inputs_embeds.flatten(0, -3),
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
        )
        assert given is not None  # the decoder has refused a call without inputs
        states = out.last_hidden_state.view(*given.shape, -1)
        logits = self.lm_head(states)
        mc_logits = self.multiple_choice_head(states, mc_token_ids).squeeze(-1)
        result = GPT2DoubleHeadsModelOutput(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            mc_loss=None if mc_labels is None else _choice_loss(mc_logits, mc_labels),
            logits=logits,
            mc_logits=mc_logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
        return finish(result, as_dict)


def _choice_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.view(-1))


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """Turn [B, choices, T] into [B * choices, T], and leave [B, T] and ready masks as they are."""
    return x.flatten(0, 1) if x is not None and x.dim() == 3 else x


class GPT2ForSequenceClassification(ForSequenceClassification, GPT2PreTrainedModel):
    """The decoder with a classifier on each row's last token."""

    _base_class = GPT2Model


class GPT2ForTokenClassification(ForTokenClassification, GPT2PreTrainedModel):
    """The decoder with a classifier on every token."""

    _base_class = GPT2Model
    _classifier = "classifier"


class GPT2ForQuestionAnswering(ForQuestionAnswering, GPT2PreTrainedModel):
    """The decoder with a classifier for both ends of an answer."""

    _base_class = GPT2Model
