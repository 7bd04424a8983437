# SPDX-License-Identifier: Apache-2.0
"""DoLa (Chuang et al. 2023, arXiv:2309.03883): what the last layer knows that an earlier one did not.

The scores of a step are the log-probabilities of the last layer less those of an earlier one, for the
tokens that the last layer finds at least a tenth as likely as its first choice. Of several earlier layers,
each row takes the one whose distribution is farthest from the last one's (Jensen-Shannon divergence).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import LogitsProcessor, LogitsProcessorList
from pretrained.torch.generation.strategies import Run, greedy, sample

RELATIVE_TOP = 0.1
"""Tokens less likely than this share of the likeliest are left out."""

_LEFT_OUT = -1e-3
# What an earlier layer's score counts as where the last layer's token is left out.


def dola(run: Run) -> None:
    """Decode greedily or by sampling, from scores that are contrasted between layers.

    Args:
        run: The call; its `sequences` and `recorder` are filled.

    Raises:
        GenerationError: scores that are not numbers.
    """
    layers = candidate_layers(run.model, run.config.dola_layers)
    run.decoder.ask(output_hidden_states=True)
    watched = _Watched(run.decoder)
    run.decoder = watched  # type: ignore[assignment]
    head = run.model.get_output_embeddings()
    run.processors = LogitsProcessorList([_LayerContrast(watched, head, layers), *run.processors])
    (sample if run.config.do_sample else greedy)(run)


def candidate_layers(model: Any, dola_layers: Any) -> list[int]:
    """Return the earlier layers to contrast with, as indices into the hidden states (0: the embeddings).

    ``"low"`` is every second layer of the lower half (of the first 20 in models of more than 40 layers),
    ``"high"`` of the upper half (of the last 20), without the last. Embeddings that are tied to the head
    predict the token itself, so there the low half begins at layer 2.

    Args:
        model: The model that will generate.
        dola_layers: "low", "high", or a list of indices.

    Raises:
        GenerationError: an encoder-decoder, a model without a head, or no such layer.
    """
    if model.config.is_encoder_decoder or not callable(getattr(model, "get_output_embeddings", None)):
        raise GenerationError(
            "DoLa contrasts the layers of a decoder-only model",
            where="dola_layers",
            found=type(model).__name__,
            mend="Leave dola_layers out.",
        )
    last: int = model.config.get_text_config().num_hidden_layers
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if dola_layers == "low":
        first = 2 if tied and last > 2 else 0
        return _some(list(range(first, last // 2 if last <= 40 else 20, 2)), last, dola_layers)
    if dola_layers == "high":
        return _some(list(range(last // 2 if last <= 40 else last - 20, last, 2)), last, dola_layers)
    outside = [layer for layer in dola_layers if layer >= last]
    if outside:
        raise GenerationError(
            f"There is no layer {outside[0]} before the last one",
            where="dola_layers",
            expected=f"0 (the embeddings) to {last - 1}",
            found=dola_layers,
        )
    return sorted(set(dola_layers))


def _some(layers: list[int], last: int, asked: str) -> list[int]:
    if not layers:
        raise GenerationError(
            f"A model of {last} layers has none that dola_layers={asked!r} means",
            where="dola_layers",
            mend=f"Pass a list of layers from 0 to {last - 1}.",
        )
    return layers


def layer_contrast(final: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Return the scores of DoLa.

    Args:
        final: [rows, vocab] scores of the last layer.
        earlier: [layers, rows, vocab] scores of earlier ones.

    Returns:
        [rows, vocab], -inf for tokens that are too unlikely.
    """
    mature, premature = final.log_softmax(-1), earlier.log_softmax(-1)
    if len(premature) > 1:
        middle = ((mature.exp() + premature.exp()) / 2).clamp_min(torch.finfo(final.dtype).tiny)
        # Divergence of the mean from each of both, as the published code has it.
        distance = (middle * (middle.log() - mature)).mean(-1) + (middle * (middle.log() - premature)).mean(
            -1
        )
        chosen = distance.argmax(dim=0)
        base = premature.gather(0, chosen[None, :, None].expand(1, *final.shape))[0]
    else:
        base = premature[0]
    unlikely = mature < mature.amax(-1, keepdim=True) + math.log(RELATIVE_TOP)
    return (mature - base.masked_fill(unlikely, _LEFT_OUT)).masked_fill(unlikely, -math.inf)


class _Watched:
    """A decoder whose last output can be looked at."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.output: Any = None

    def prefill(self) -> Any:
        self.output = self._decoder.prefill()
        return self.output

    def step(self, tokens: torch.Tensor, sequences: Any) -> Any:
        self.output = None
        self.output = self._decoder.step(tokens, sequences)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _LayerContrast(LogitsProcessor):
    """Puts the contrast between layers in place of the last layer's scores."""

    def __init__(self, watched: _Watched, head: Any, layers: list[int]) -> None:
        self._watched = watched
        self._head = head
        self._layers = layers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        hidden = self._watched.output.hidden_states
        states = torch.stack([hidden[layer][:, -1].to(hidden[-1].device) for layer in self._layers])
        return layer_contrast(scores, self._head(states).to(scores.device, scores.dtype))
