# SPDX-License-Identifier: Apache-2.0
"""Collects, step by step, what `generate` returns beside the tokens."""

from __future__ import annotations

from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

_FIELDS = ("attentions", "hidden_states", "decoder_attentions", "decoder_hidden_states", "cross_attentions")


class Recorder:
    """Keeps scores, logits, attentions and hidden states where they are asked for.

    Args:
        config: The settled config; it records nothing without `return_dict_in_generate`.
        own_rules: Whether the user's own rules run, which may change scores in place.
    """

    def __init__(self, config: GenerationConfig, *, own_rules: bool = False) -> None:
        asked = config.return_dict_in_generate
        self._legacy = bool(config.return_legacy_cache)
        self._returns_scores = asked and config.output_scores
        # A drafting model stops by its scores.
        keeps_scores = self._returns_scores or config.is_assistant
        self.scores: tuple[torch.Tensor, ...] | None = () if keeps_scores else None
        self._logits: list[torch.Tensor] | None = [] if asked and config.output_logits else None
        self._copy = own_rules and self._logits is not None
        kinds = {"attentions": config.output_attentions, "hidden_states": config.output_hidden_states}
        self._kinds = [kind for kind, on in kinds.items() if on and asked]
        self._layers: dict[str, list[Any]] = {
            name: [] for name in _FIELDS if any(name.endswith(kind) for kind in self._kinds)
        }
        self._beams: dict[str, Any] = {}
        self.idle = self.scores is None and self._logits is None and not self._layers

    @property
    def layers(self) -> tuple[str, ...]:
        """The outputs of layers that are recorded, by the names that models give them."""
        return tuple(self._layers)

    @property
    def keeps_layers(self) -> bool:
        """Whether attentions or hidden states are recorded."""
        return bool(self._layers)

    def keep(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits that rules may change.

        Args:
            logits: [rows, vocab].
        """
        return logits.clone() if self._copy else logits

    def add(self, output: Any, logits: torch.Tensor, scores: torch.Tensor, beams: int = 1) -> None:
        """Record a step.

        Args:
            output: Of the model.
            logits: [rows, vocab] scores of the model.
            scores: [rows, vocab] scores after all rules.
            beams: How many rows go on from each row of `output`, where it is the prompt's.
        """
        if self.idle:
            return
        if self.scores is not None:
            self.scores += (scores,)
        if self._logits is not None:
            self._logits.append(logits)
        for name, steps in self._layers.items():
            value = getattr(output, name, None)
            if value is not None and beams > 1:
                value = tuple(layer.repeat_interleave(beams, dim=0) for layer in value)
            if value is not None:
                steps.append(value)

    def cut(self, steps: int) -> None:
        """Keep the first steps.

        Args:
            steps: How many.
        """
        if self.scores is not None:
            self.scores = self.scores[:steps]
        for kept in (self._logits, *self._layers.values()):
            if kept is not None:
                del kept[steps:]

    def add_beams(self, scores: torch.Tensor, indices: torch.Tensor) -> None:
        """Note what only beam search has; it makes the output one of a beam search.

        Args:
            scores: [rows] score of each returned sequence.
            indices: [rows, new] which row of a step's scores each token came from; -1 after the end.
        """
        self._beams = {
            "sequences_scores": scores if self._returns_scores else None,
            "beam_indices": indices.to(torch.int32),
        }

    def output(self, sequences: torch.Tensor, inputs: GenerationInputs, cache: Any) -> Any:
        """Return the output object.

        Args:
            sequences: [rows, length].
            inputs: The prepared inputs.
            cache: The cache as it is now, or None; `return_legacy_cache` makes tuples of it.
        """
        if self._legacy and cache is not None:
            cache = cache.to_legacy_cache()
        layers = {name: tuple(steps) for name, steps in self._layers.items() if steps}
        common: dict[str, Any] = {
            "sequences": sequences,
            "scores": self.scores if self._returns_scores else None,
            "logits": None if self._logits is None else tuple(self._logits),
            "past_key_values": cache,
            **self._beams,
        }
        beams = bool(self._beams)
        if inputs.encoder_outputs is None:
            alone: Any = GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput
            return alone(
                **common, attentions=layers.get("attentions"), hidden_states=layers.get("hidden_states")
            )
        encoder = inputs.encoder_outputs
        of_encoder: dict[str, Any] = {f"encoder_{kind}": getattr(encoder, kind, None) for kind in self._kinds}
        both: Any = GenerateBeamEncoderDecoderOutput if beams else GenerateEncoderDecoderOutput
        return both(
            **common,
            **of_encoder,
            decoder_attentions=layers.get("decoder_attentions"),
            cross_attentions=layers.get("cross_attentions"),
            decoder_hidden_states=layers.get("decoder_hidden_states"),
        )
