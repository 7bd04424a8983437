# SPDX-License-Identifier: Apache-2.0
"""What `generate(return_dict_in_generate=True)` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrained.torch.outputs import ModelOutput

Steps = tuple[torch.Tensor, ...]
"""One tensor for each new token."""

LayerSteps = tuple[tuple[torch.Tensor, ...], ...]
"""For each new token, one tensor for each layer."""


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """What a decoder generated.

    Attributes:
        sequences: [rows, length] token ids, prompt included.
        scores: For each new token, [rows, vocab] scores after all rules.
        logits: For each new token, [rows, vocab] scores of the model.
        attentions: For each new token and layer, [rows, heads, new, seen].
        hidden_states: For each new token and layer (and the embeddings), [rows, new, hidden].
        past_key_values: The cache, to go on from.
    """

    sequences: torch.Tensor | None = None
    scores: Steps | None = None
    logits: Steps | None = None
    attentions: LayerSteps | None = None
    hidden_states: LayerSteps | None = None
    past_key_values: Any = None


@dataclass
class GenerateEncoderDecoderOutput(ModelOutput):
    """What a decoder generated from an encoder's output.

    Attributes:
        sequences: [rows, length] token ids, start token included.
        scores: For each new token, [rows, vocab] scores after all rules.
        logits: For each new token, [rows, vocab] scores of the model.
        encoder_attentions: For each layer, [rows, heads, input, input].
        encoder_hidden_states: For each layer (and the embeddings), [rows, input, hidden].
        decoder_attentions: For each new token and layer, [rows, heads, new, seen].
        cross_attentions: For each new token and layer, [rows, heads, new, input].
        decoder_hidden_states: For each new token and layer (and the embeddings), [rows, new, hidden].
        past_key_values: The cache, to go on from.
    """

    sequences: torch.Tensor | None = None
    scores: Steps | None = None
    logits: Steps | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: LayerSteps | None = None
    cross_attentions: LayerSteps | None = None
    decoder_hidden_states: LayerSteps | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """What beam search over a decoder generated. Beams are rows: batch * num_beams.

    Attributes:
        sequences: [rows, length] token ids, prompt included.
        sequences_scores: [rows] sum of the log-probabilities of each sequence, over its length to the power
            of the length penalty.
        scores: For each new token, [beams, vocab] log-probabilities of the beams after all rules.
        logits: For each new token, [beams, vocab] scores of the model.
        beam_indices: [rows, new] which beam each token was chosen in; negative after a row's end.
        attentions: For each new token and layer, [beams, heads, new, seen].
        hidden_states: For each new token and layer (and the embeddings), [beams, new, hidden].
        past_key_values: The cache.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: Steps | None = None
    logits: Steps | None = None
    beam_indices: torch.Tensor | None = None
    attentions: LayerSteps | None = None
    hidden_states: LayerSteps | None = None
    past_key_values: Any = None


@dataclass
class GenerateBeamEncoderDecoderOutput(ModelOutput):
    """What beam search generated from an encoder's output. Beams are rows: batch * num_beams.

    Attributes:
        sequences: [rows, length] token ids, start token included.
        sequences_scores: [rows] sum of the log-probabilities of each sequence, over its length to the power
            of the length penalty.
        scores: For each new token, [beams, vocab] log-probabilities of the beams after all rules.
        logits: For each new token, [beams, vocab] scores of the model.
        beam_indices: [rows, new] which beam each token was chosen in; negative after a row's end.
        encoder_attentions: For each layer, [batch, heads, input, input].
        encoder_hidden_states: For each layer (and the embeddings), [batch, input, hidden].
        decoder_attentions: For each new token and layer, [beams, heads, new, seen].
        cross_attentions: For each new token and layer, [beams, heads, new, input].
        decoder_hidden_states: For each new token and layer (and the embeddings), [beams, new, hidden].
        past_key_values: The cache.
    """

    sequences: torch.Tensor | None = None
    sequences_scores: torch.Tensor | None = None
    scores: Steps | None = None
    logits: Steps | None = None
    beam_indices: torch.Tensor | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: LayerSteps | None = None
    cross_attentions: LayerSteps | None = None
    decoder_hidden_states: LayerSteps | None = None
    past_key_values: Any = None


# Names of older scripts, one for each strategy.
GreedySearchDecoderOnlyOutput = GenerateDecoderOnlyOutput
SampleDecoderOnlyOutput = GenerateDecoderOnlyOutput
ContrastiveSearchDecoderOnlyOutput = GenerateDecoderOnlyOutput
GreedySearchEncoderDecoderOutput = GenerateEncoderDecoderOutput
SampleEncoderDecoderOutput = GenerateEncoderDecoderOutput
ContrastiveSearchEncoderDecoderOutput = GenerateEncoderDecoderOutput
BeamSearchDecoderOnlyOutput = GenerateBeamDecoderOnlyOutput
BeamSampleDecoderOnlyOutput = GenerateBeamDecoderOnlyOutput
BeamSearchEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
BeamSampleEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
