# SPDX-License-Identifier: Apache-2.0
"""DistilBERT in PyTorch: BERT's block under names of its own, without segments and pooler.

Shapes: B batch, T tokens, D hidden, H heads, K channels of a head, V vocabulary, C choices, N labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch import distilbert as arch
from pretrained.torch.attention import attend
from pretrained.torch.inputs import embed_tokens, flags
from pretrained.torch.masks import padding_mask
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models import bert_heads, bert_outputs
from pretrained.torch.models.bert_layers import check_length, in_chunks
from pretrained.torch.nn import activation
from pretrained.torch.outputs import BaseModelOutput, finish
from pretrained.torch.pruning import HeadParts


class Embeddings(nn.Module):
    """Sum of token and position embeddings, normalised."""

    def __init__(self, config: arch.DistilBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.dim)
        # Sines and cosines are not trained.
        self.position_embeddings.weight.requires_grad_(not config.sinusoidal_pos_embds)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=arch.LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, embeds_BTD: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Return what the first block reads, [B, T, D].

        Args:
            embeds_BTD: Token embeddings.
            position_ids: [1 or B, T]; None counts from 0.

        Raises:
            ArgumentError: there are more tokens than positions.
        """
        if position_ids is None:
            check_length(embeds_BTD.shape[1], self.position_embeddings.num_embeddings)
            position_ids = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device)[None]
        return self.dropout(self.LayerNorm(embeds_BTD + self.position_embeddings(position_ids)))


def sinusoids(positions: int, channels: int) -> torch.Tensor:
    """Return the position embeddings of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5).

    Args:
        positions: Rows.
        channels: Columns: sines at even ones, cosines at odd ones.

    Returns:
        [positions, channels], float32.
    """
    wavelengths = np.power(10000, 2 * (np.arange(channels) // 2) / channels)
    angles = np.arange(positions)[:, None] / wavelengths
    angles[:, 0::2], angles[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return torch.from_numpy(angles.astype(np.float32))


class DistilBertSelfAttention(nn.Module):
    """Attention of the tokens among themselves; pruned heads are absent."""

    def __init__(self, config: arch.DistilBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.n_heads = config.heads_left(layer_idx)
        self.attention_head_size = config.head_size
        self.dim = self.n_heads * self.attention_head_size
        self.q_lin = nn.Linear(config.dim, self.dim)
        self.k_lin = nn.Linear(config.dim, self.dim)
        self.v_lin = nn.Linear(config.dim, self.dim)
        self.out_lin = nn.Linear(self.dim, config.dim)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        mask: torch.Tensor | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from each token to those it may see; [B, T, D] and, if asked, the weights."""
        q_BHTK, k_BHTK, v_BHTK = (
            proj(hidden_BTD).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for proj in (self.q_lin, self.k_lin, self.v_lin)
        )
        out, weights = attend(
            self,
            self.config,
            q_BHTK,
            k_BHTK,
            v_BHTK,
            mask,
            scaling=self.attention_head_size**-0.5,
            dropout=self.config.attention_dropout,
            output_attentions=output_attentions,
        )
        return self.out_lin(out.flatten(-2)), weights

    def head_parts(self) -> HeadParts:
        """Return the layers with a slice for each head."""
        size = self.attention_head_size
        return HeadParts(
            (self.q_lin,),
            (self.k_lin, self.v_lin),
            self.out_lin,
            size,
            self,
            lambda kept: {"n_heads": len(kept), "dim": len(kept) * size},
        )


class FFN(nn.Module):
    """Feed-forward network."""

    def __init__(self, config: arch.DistilBertConfig) -> None:
        super().__init__()
        self.chunk_size = config.chunk_size_feed_forward
        self.dropout = nn.Dropout(config.dropout)
        self.lin1 = nn.Linear(config.dim, config.hidden_dim)
        self.lin2 = nn.Linear(config.hidden_dim, config.dim)
        self.activation = activation(config.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the network to [B, T, D]."""
        return in_chunks(
            lambda part: self.dropout(self.lin2(self.activation(self.lin1(part)))), x, self.chunk_size
        )


class TransformerBlock(nn.Module):
    """One block: attention and feed-forward, each added and normalised after."""

    def __init__(self, config: arch.DistilBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = DistilBertSelfAttention(config, layer_idx)
        self.sa_layer_norm = nn.LayerNorm(config.dim, eps=arch.LAYER_NORM_EPS)
        self.ffn = FFN(config)
        self.output_layer_norm = nn.LayerNorm(config.dim, eps=arch.LAYER_NORM_EPS)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the block's output [B, T, D] and, if asked, its attention weights."""
        attended, weights = self.attention(hidden_states, mask, output_attentions)
        x = self.sa_layer_norm(attended + hidden_states)
        return self.output_layer_norm(self.ffn(x) + x), weights


class Transformer(nn.Module):
    """The blocks."""

    def __init__(self, config: arch.DistilBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layers))


class DistilBertPreTrainedModel(PreTrainedModel):
    """What all classes of the family share."""

    config_class = arch.DistilBertConfig
    base_model_prefix = arch.BASE_MODEL_PREFIX
    key_rules = arch.KEY_RULES
    _no_split_modules = arch.NO_SPLIT
    supports_gradient_checkpointing = True
    _input_embedding = "embeddings.word_embeddings"
    _position_embedding = "embeddings.position_embeddings"
    _output_embedding = "vocab_projector"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        embeddings = getattr(self.base_model, "embeddings", None)
        if self.config.sinusoidal_pos_embds and module is getattr(embeddings, "position_embeddings", None):
            with torch.no_grad():
                module.weight.copy_(sinusoids(*module.weight.shape))

    def _new_positions(self, start: int, stop: int) -> torch.Tensor | None:
        """Return rows of sines and cosines where the config has them."""
        return sinusoids(stop, self.config.dim)[start:] if self.config.sinusoidal_pos_embds else None


class DistilBertModel(DistilBertPreTrainedModel):
    """The stack without a head."""

    def __init__(self, config: arch.DistilBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.transformer = Transformer(config)
        self.post_init()

    def prunable_attentions(self) -> list[Any]:
        """Return the attention of each layer."""
        return [layer.attention for layer in self.transformer.layer]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Run the stack.

        Args:
            input_ids: [B, T] token ids; or give `inputs_embeds`.
            attention_mask: [B, T] with 0 for padding, a ready mask of rank 4, or None for no padding.
            inputs_embeds: [B, T, D] instead of ids.
            position_ids: [B, T]; None counts from 0.
            output_attentions: Return each layer's weights; None for the config's choice.
            output_hidden_states: Return the embeddings and each layer's output; None as above.
            return_dict: False for a plain tuple; None as above.

        Raises:
            ArgumentError: inputs that contradict each other, or are too long.
        """
        attentions, hidden, _, as_dict = flags(
            self.config, output_attentions, output_hidden_states, False, return_dict
        )
        embeds = embed_tokens(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        mask = padding_mask(attention_mask, kv_length=embeds.shape[1])
        x = self.embeddings(embeds, position_ids)
        all_hidden, all_weights = [x], []
        for index, layer in enumerate(self.transformer.layer):
            x, weights = self.call_layer(index, layer, x, mask, attentions)
            all_hidden.append(x)
            all_weights.append(weights)
        result = BaseModelOutput(
            x, tuple(all_hidden) if hidden else None, tuple(all_weights) if attentions else None
        )
        return finish(result, as_dict)


class _Head(bert_heads.Head, DistilBertPreTrainedModel):
    """A DistilBERT with a head."""

    distilbert: DistilBertModel
    _base_class = DistilBertModel

    def build_base(self, config: arch.DistilBertConfig) -> nn.Module:
        """Return the headless model."""
        return DistilBertModel(config)


class DistilBertForMaskedLM(_Head):
    """The stack with a head that fills in masked tokens."""

    _tied_weights_keys = {  # noqa: RUF012
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"
    }

    def add_head(self, config: arch.DistilBertConfig) -> None:
        """Build the head's layers, which stand beside the stack."""
        self.activation = activation(config.activation)
        self.vocab_transform = nn.Linear(config.dim, config.dim)
        self.vocab_layer_norm = nn.LayerNorm(config.dim, eps=arch.LAYER_NORM_EPS)
        self.vocab_projector = nn.Linear(config.dim, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score the vocabulary at each token.

        Args:
            input_ids: As for `DistilBertModel.forward`, like all that are not named here.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: [B, T] ids of the masked tokens, -100 to leave out.
            position_ids: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        inputs = (input_ids, attention_mask, inputs_embeds, position_ids)
        out, as_dict = self.run(*inputs, output_attentions, output_hidden_states, return_dict=return_dict)
        x = self.vocab_layer_norm(self.activation(self.vocab_transform(out.last_hidden_state)))
        return finish(bert_outputs.masked_lm_output(self, out, self.vocab_projector(x), labels), as_dict)


class _FirstTokenHead(_Head):
    """A head of two layers on the first token."""

    def add_layers(self, config: arch.DistilBertConfig, outputs: int) -> None:
        """Build `pre_classifier`, `classifier` and `dropout`.

        Args:
            config: The model's configuration.
            outputs: Scores for each row.
        """
        self.pre_classifier = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, outputs)
        self.dropout = nn.Dropout(config.seq_classif_dropout)

    def score(self, out: Any) -> torch.Tensor:
        """Turn the stack's output into [B, outputs]."""
        return self.classifier(self.dropout(F.relu(self.pre_classifier(out.last_hidden_state[:, 0]))))


class DistilBertForSequenceClassification(_FirstTokenHead):
    """The stack with a classifier on each row."""

    def add_head(self, config: arch.DistilBertConfig) -> None:
        """Build the classifier."""
        self.add_layers(config, config.num_labels)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each row.

        Args:
            input_ids: As for `DistilBertModel.forward`, like all that are not named here.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: [B] classes, or numbers, as `config.problem_type` has it.
            position_ids: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        inputs = (input_ids, attention_mask, inputs_embeds, position_ids)
        out, as_dict = self.run(*inputs, output_attentions, output_hidden_states, return_dict=return_dict)
        result = bert_outputs.sequence_classifier_output(self, out, self.score(out), labels)
        return finish(result, as_dict)


class DistilBertForQuestionAnswering(_Head):
    """The stack with a classifier for both ends of an answer in the text."""

    def add_head(self, config: arch.DistilBertConfig) -> None:
        """Build `qa_outputs` and `dropout`."""
        self.qa_outputs = bert_outputs.span_layer(config, config.dim)
        self.dropout = nn.Dropout(config.qa_dropout)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score each token as the first and as the last of the answer.

        Args:
            input_ids: As for `DistilBertModel.forward`, like all that are not named here.
            attention_mask: As there.
            inputs_embeds: As there.
            start_positions: [B] index of the answer's first token.
            end_positions: [B] index of its last.
            position_ids: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        inputs = (input_ids, attention_mask, inputs_embeds, position_ids)
        out, as_dict = self.run(*inputs, output_attentions, output_hidden_states, return_dict=return_dict)
        logits = self.qa_outputs(self.dropout(out.last_hidden_state))
        result = bert_outputs.question_answering_output(self, out, logits, start_positions, end_positions)
        return finish(result, as_dict)


class DistilBertForTokenClassification(_Head):
    """The stack with a classifier on every token."""

    def add_head(self, config: arch.DistilBertConfig) -> None:
        """Build `dropout` and `classifier`."""
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.dim, config.num_labels)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify each token.

        Args:
            input_ids: As for `DistilBertModel.forward`, like all that are not named here.
            attention_mask: As there.
            inputs_embeds: As there.
            labels: [B, T] classes, -100 to leave out.
            position_ids: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        inputs = (input_ids, attention_mask, inputs_embeds, position_ids)
        out, as_dict = self.run(*inputs, output_attentions, output_hidden_states, return_dict=return_dict)
        logits = self.classifier(self.dropout(out.last_hidden_state))
        return finish(bert_outputs.token_classifier_output(self, out, logits, labels), as_dict)


class DistilBertForMultipleChoice(_FirstTokenHead):
    """The stack with a head that scores each of several continuations."""

    def add_head(self, config: arch.DistilBertConfig) -> None:
        """Build the classifier, of one score for each choice."""
        self.add_layers(config, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Score each choice.

        Args:
            input_ids: [B, C, T]; as for `DistilBertModel.forward` with an axis for the choices, like all
                that are not named here.
            attention_mask: As there.
            inputs_embeds: As there, [B, C, T, D].
            labels: [B] index of the right choice.
            position_ids: As there.
            output_attentions: As there.
            output_hidden_states: As there.
            return_dict: As there.
        """
        choices, inputs = bert_outputs.flat_choices(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )
        out, as_dict = self.run(
            **inputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        result = bert_outputs.multiple_choice_output(self, out, self.score(out), labels, choices)
        return finish(result, as_dict)
