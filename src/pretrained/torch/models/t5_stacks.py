# SPDX-License-Identifier: Apache-2.0
"""The base of the T5 family's models and their two stacks, encoder and decoder.

Shapes: B batch, T new tokens, S keys (cached and new ones, or the encoder's), D hidden (`d_model`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch import t5 as arch
from pretrained.errors import ConfigError
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache
from pretrained.torch.initialise import initialise_module
from pretrained.torch.inputs import embed_tokens, flags
from pretrained.torch.masks import causal_mask, padding_mask
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.t5_layers import T5Block, T5LayerNorm, add_mask
from pretrained.torch.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
    detuple,
    finish,
)


class T5PreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.T5Config
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ("wo",)
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {}
    _input_embedding = "shared"
    _positions_instead = "T5 reads distances, which reach any length: pass longer texts as they are."
    # Files of this family say tie_word_embeddings: false to mean "do not scale", head or no head.
    _ties_absent_head = True

    def ties(self) -> dict[str, str]:
        """Return which parameters share one tensor: the embeddings always, the head by the config."""
        tied = dict(self._tied_weights_keys)
        if not self.config.tie_word_embeddings:
            tied.pop("lm_head.weight", None)
        return tied

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding, in the stacks too.

        Args:
            value: The new embedding.
        """
        super().set_input_embeddings(value)
        for name in ("encoder", "decoder"):
            stack = getattr(self.base_model, name, None)
            if stack is not None:
                stack.embed_tokens = value

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each block of the encoder; the decoder keeps its heads."""
        encoder = getattr(self.base_model, "encoder", None)
        return [] if encoder is None else encoder.prunable_attentions()

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Small valid inputs, 3 rows of 5 tokens."""
        ids = super().dummy_inputs["input_ids"]
        return {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the decoder's inputs for these labels: the start token, then all labels but the last.

        Args:
            labels: [B, T] ids; -100 becomes padding.

        Raises:
            ConfigError: the config has no start or no padding token.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ConfigError(
                "Decoder inputs are made of labels with a start and a padding token",
                where="decoder_start_token_id, pad_token_id",
                found=f"{start}, {pad}",
                mend="Set both on model.config; T5 has 0 for both.",
            )
        return F.pad(labels[..., :-1].masked_fill(labels[..., :-1] == -100, pad), (1, 0), value=start)

    def _shift_right(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Do the same as `prepare_decoder_input_ids_from_labels`; the name in older code."""
        return self.prepare_decoder_input_ids_from_labels(input_ids)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module with its own standard deviation (Mesh TensorFlow's), times the factor."""
        factor = self.config.initializer_factor
        std = getattr(module, "initial_std", 1.0)
        if isinstance(module, T5LayerNorm):
            nn.init.constant_(module.weight, factor)
        elif std is not None:
            initialise_module(module, std=factor * std)


class T5Stack(T5PreTrainedModel):
    """What encoder and decoder have in common: embedding, blocks, final norm.

    Args:
        config: The model's configuration, shared with the whole model.
        shared: The token embedding of the whole model; None for a stack that stands alone.
    """

    is_decoder: ClassVar[bool]
    _input_embedding = "embed_tokens"

    def __init__(self, config: arch.T5Config, shared: nn.Embedding | None = None) -> None:
        super().__init__(config)
        if shared is None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        else:
            self.embed_tokens = nn.Embedding.from_pretrained(shared.weight, freeze=False)
            # The owner of the tensor initialises it.
            self.embed_tokens.initial_std = None  # type: ignore[assignment]
        count = config.num_decoder_layers if self.is_decoder else config.num_layers
        self.block = nn.ModuleList(T5Block(config, i, is_decoder=self.is_decoder) for i in range(count or 0))
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.post_init()

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each block to its own tokens, in an encoder."""
        blocks: Iterable[Any] = () if self.is_decoder else self.block
        return [block.layer[0].SelfAttention for block in blocks]

    def _blocks(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        last_position: int | torch.Tensor,
        kv_length: int,
        output_attentions: bool,
        output_hidden_states: bool,
        *rest: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the blocks and the final norm; `rest` are the further arguments of `T5Block.forward`."""
        x = self.dropout(x)
        all_hidden: tuple[torch.Tensor, ...] = ()
        all_weights: tuple[Any, ...] = ()
        all_cross: tuple[Any, ...] = ()
        biased_mask = None
        blocks: Iterable[Any] = self.block
        for index, block in enumerate(blocks):
            all_hidden += (x,)
            attention = block.layer[0].SelfAttention
            if attention.relative_attention_bias is not None:
                biased_mask = add_mask(attention.position_bias(last_position, x.shape[1], kv_length), mask)
            x, weights, cross = self.call_layer(index, block, x, biased_mask, output_attentions, *rest)
            all_weights, all_cross = (*all_weights, weights), (*all_cross, cross)
        x = self.dropout(self.final_layer_norm(x))
        crosses = output_attentions and any(cross is not None for cross in all_cross)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x,
            hidden_states=(*all_hidden, x) if output_hidden_states else None,
            attentions=all_weights if output_attentions else None,
            cross_attentions=all_cross if crosses else None,
        )


class T5Encoder(T5Stack):
    """The stack that reads the input."""

    is_decoder = False

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the encoder.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            attention_mask: [B, T] with 0 for padding, [B, T, T], a ready mask of rank 4, or None.
            inputs_embeds: [B, T, D] instead of ids.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return each layer's input and the final output; None as above.
            return_dict: False for a plain tuple; None as above.
        """
        attentions, hidden, _, as_dict = flags(
            self.config, output_attentions, output_hidden_states, False, return_dict
        )
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds)
        length = x.shape[1]
        mask = padding_mask(attention_mask, kv_length=length)
        out = self._blocks(x, mask, length - 1, length, attentions, hidden)
        return finish(BaseModelOutput(out.last_hidden_state, out.hidden_states, out.attentions), as_dict)


class T5Decoder(T5Stack):
    """The stack that writes the output."""

    is_decoder = True

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> Any:
        """Run the decoder.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            attention_mask: [B, cached and new tokens] with 0 for padding, a ready mask of rank 4, or None.
            encoder_hidden_states: [B, S, D] to look at; None for no cross-attention.
            encoder_attention_mask: [B, S] with 0 for padding, [B, T, S], a ready mask, or None.
            inputs_embeds: [B, T, D] instead of ids.
            past_key_values: A cache, extended in place.
            use_cache: Return a cache (a new one if none is given); None for the config's choice.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return each layer's input and the final output; None as above.
            return_dict: False for a plain tuple; None as above.
            cache_position: [T] slots of a static cache to write, each one on from the other, for compiled
                steps; None counts.
        """
        attentions, hidden, use_cache, as_dict = flags(
            self.config,
            output_attentions,
            output_hidden_states,
            self.cache_choice(use_cache, past_key_values),
            return_dict,
        )
        x = embed_tokens(self.embed_tokens, input_ids, inputs_embeds, prefix="decoder_")
        cache = self._cache(past_key_values, use_cache)
        first = 0 if cache is None else cache.get_seq_length()
        length, kv_length = x.shape[1], x.shape[1]
        if cache is not None:
            kv_length, _ = cache.get_mask_sizes(length, 0, cache_position)
        last = first + length - 1 if cache_position is None else cache_position[-1]
        mask = causal_mask(
            query_length=length,
            kv_length=kv_length,
            query_positions=first if cache_position is None else cache_position,
            attention_mask=attention_mask,
            device=x.device,
        )
        if mask is None and length > 1:
            # Kernels take either a mask or "causal", and the biases are a mask.
            mask = torch.ones(length, kv_length, dtype=torch.bool, device=x.device).tril(kv_length - length)
        encoder_mask = None
        if encoder_hidden_states is not None:
            encoder_mask = padding_mask(encoder_attention_mask, kv_length=encoder_hidden_states.shape[1])
        out = self._blocks(
            x,
            mask,
            last,
            kv_length,
            attentions,
            hidden,
            cache,
            cache_position,
            encoder_hidden_states,
            encoder_mask,
        )
        out.past_key_values = cache if use_cache else None
        return finish(out, as_dict)

    def _cache(self, given: Any, use_cache: bool) -> EncoderDecoderCache | None:
        if given is None:
            own = DynamicCache(config=self.config) if use_cache else None
            return None if own is None else EncoderDecoderCache(own, DynamicCache())
        if isinstance(given, Sequence):
            return EncoderDecoderCache.from_legacy_cache(given)
        return given if isinstance(given, EncoderDecoderCache) else EncoderDecoderCache(given, DynamicCache())


class T5EncoderDecoder(T5PreTrainedModel):
    """Both stacks on one embedding, at the top level of a model."""

    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: arch.T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Encoder(config, self.shared)
        self.decoder = T5Decoder(config, self.shared)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: arch.T5Config) -> None:
        """Build the head's layers; here there is no head.

        Args:
            config: The model's configuration.
        """

    def _run(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None,
        encoder_outputs: Any,
        past_key_values: Any,
        inputs_embeds: torch.Tensor | None,
        decoder_inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        cache_position: torch.Tensor | None = None,
    ) -> Seq2SeqModelOutput:
        encoded = detuple(encoder_outputs, BaseModelOutput)
        if encoded is None:
            encoded = self.encoder(
                input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states, True
            )
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoded.last_hidden_state,
            attention_mask,
            decoder_inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            True,
            cache_position,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
        )


def rest_of(out: Seq2SeqModelOutput) -> tuple[Any, ...]:
    """Return an output's fields from the cache on, in the order that all seq2seq outputs have."""
    return (
        out.past_key_values,
        out.decoder_hidden_states,
        out.decoder_attentions,
        out.cross_attentions,
        out.encoder_last_hidden_state,
        out.encoder_hidden_states,
        out.encoder_attentions,
    )
