# SPDX-License-Identifier: Apache-2.0
"""Contrastive search (Su et al. 2022, arXiv:2202.06417): likely tokens that do not repeat what was said.

Each step takes the `top_k` likeliest tokens and runs all of them ahead in one forward. Of a candidate with
probability p, whose hidden state is at most as similar (by cosine) as s to one of the tokens before it, the
score is (1 - alpha) p - alpha s.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from pretrained.torch.generation.loop import last_logits
from pretrained.torch.generation.stopping import MaxLengthCriteria, StopCheck, StoppingCriteriaList
from pretrained.torch.generation.strategies import Run


def contrastive(run: Run) -> None:
    """Take, of the likeliest tokens, the one whose hidden state is most unlike those before it.

    Args:
        run: The call; its `sequences` and `recorder` are filled.

    Raises:
        GenerationError: scores that are not numbers.
    """
    decoder, batch = run.decoder, run.sequences.ids.shape[0]
    decoder.ask(output_hidden_states=True)
    output = decoder.prefill()
    width = min(run.config.top_k, output.logits.shape[-1])
    decoder.widen(width)
    try:
        _search(run, output, width)
    finally:
        if decoder.cache is not None and decoder.cache.batch_size == batch * width:
            decoder.cache.batch_select_indices(torch.arange(0, batch * width, width))


def _search(run: Run, output: Any, width: int) -> None:
    sequences, recorder, decoder = run.sequences, run.recorder, run.decoder
    rules = StoppingCriteriaList(rule for rule in run.criteria if not isinstance(rule, MaxLengthCriteria))
    rows, device = sequences.ids.shape[0], sequences.ids.device
    check = StopCheck(rows, device, behind=run.behind)
    pad = run.pad_token_id if rules and (rows > 1 or run.behind) else None
    context = Context(hidden_state(output), run.inputs.attention_mask, run.lengths.new_tokens)
    first_of_row = torch.arange(0, rows * width, width, device=device)
    logits = last_logits(output)
    while True:
        scores = run.processors(sequences.ids, recorder.keep(logits)) if run.processors else logits
        recorder.add(output, logits, scores)
        best, candidates = scores.topk(width, dim=-1)
        probabilities = scores.softmax(-1).gather(1, candidates)
        ahead = decoder.step(candidates.flatten(), Ahead(sequences, candidates))
        states = hidden_state(ahead)[:, -1].unflatten(0, (rows, width))
        value = contrast(probabilities, context.similarity(states), run.config.penalty_alpha)
        # A token that the rules forbid is none of the candidates, however unlike the rest it is.
        value = value.masked_fill((best == -math.inf) & ~value.isnan(), -math.inf)
        confidence, choice = value.max(dim=-1)
        tokens = candidates.gather(1, choice[:, None])[:, 0]
        if pad is not None:
            tokens = torch.where(check.unfinished, tokens, pad)
        sequences.append(tokens)
        if run.streamer is not None:
            run.streamer.put(tokens.cpu())
        kept = first_of_row + choice
        finished = rules(sequences.ids, recorder.scores) if rules else None
        if check(confidence, finished) or sequences.length >= run.max_length:
            break
        context.add(hidden_state(ahead)[kept, -1])
        decoder.reorder(kept.repeat_interleave(width))
        logits = last_logits(ahead)[kept]
        output = _of_rows(ahead, kept) if recorder.keeps_layers else None
    decoder.reorder(kept.repeat_interleave(width))
    needed = check.finish()
    # The last token was run ahead too; other strategies leave it to the next call.
    decoder.take_back(check.steps - needed + 1)
    sequences.cut(needed)
    recorder.cut(needed)


def contrast(probabilities: torch.Tensor, similarity: torch.Tensor, penalty_alpha: float) -> torch.Tensor:
    """Return what candidates are worth: likely ones more, similar ones less.

    Args:
        probabilities: [rows, candidates].
        similarity: [rows, candidates] greatest cosine with a token before.
        penalty_alpha: 0 for the likeliest token, 1 for the most unlike one.
    """
    return (1.0 - penalty_alpha) * probabilities - penalty_alpha * similarity


class Context:
    """Directions of the hidden states of all tokens so far.

    Args:
        states: [rows, length, hidden] of the prompt.
        mask: [rows, length], 0 at padding, which nothing is compared with; None where nothing is padded.
        new_tokens: How many more there may be.
    """

    # A limit is often only a bound, so the buffer starts small and doubles.
    _FIRST = 1024

    def __init__(self, states: torch.Tensor, mask: torch.Tensor | None, new_tokens: int) -> None:
        rows, self._length, size = states.shape
        self._padded = None if mask is None else mask[:, -self._length :] == 0
        room = self._length + min(new_tokens, self._FIRST)
        self._buffer = torch.empty((rows, room, size), dtype=torch.float32, device=states.device)
        self._buffer[:, : self._length] = _direction(states)

    def add(self, states: torch.Tensor) -> None:
        """Add each row's new token.

        Args:
            states: [rows, hidden].
        """
        if self._length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)], dim=1)
        self._buffer[:, self._length] = _direction(states)
        self._length += 1

    def similarity(self, states: torch.Tensor) -> torch.Tensor:
        """Return the greatest cosine of each candidate with a token of its row, [rows, candidates].

        Args:
            states: [rows, candidates, hidden].
        """
        cosine = self._buffer[:, : self._length] @ _direction(states).transpose(1, 2)
        if self._padded is not None:
            cosine[:, : self._padded.shape[1]].masked_fill_(self._padded[:, :, None], -math.inf)
        return cosine.amax(dim=1)


class Ahead:
    """What a decoder sees of the tokens: those of each row, once for each candidate, and the candidate.

    Args:
        sequences: Tokens so far.
        candidates: [rows, candidates].
    """

    def __init__(self, sequences: Any, candidates: torch.Tensor) -> None:
        self._sequences = sequences
        self._candidates = candidates
        self.prompt_length = sequences.prompt_length

    @property
    def ids(self) -> torch.Tensor:
        """[rows * candidates, length + 1]; only models that prepare their own inputs look at it."""
        repeated = self._sequences.ids.repeat_interleave(self._candidates.shape[1], dim=0)
        return torch.cat([repeated, self._candidates.reshape(-1, 1)], dim=1)


def hidden_state(output: Any) -> torch.Tensor:
    """Return the decoder's last hidden states, [rows, length, hidden].

    Args:
        output: Of a model, with its hidden states.
    """
    states = getattr(output, "decoder_hidden_states", None)
    states = output.hidden_states if states is None else states
    last: torch.Tensor = states[-1]
    return last


def _direction(states: torch.Tensor) -> torch.Tensor:
    states = states.float()
    return states / states.norm(dim=-1, keepdim=True)


def _of_rows(output: Any, kept: torch.Tensor) -> Any:
    """Return an output with some rows only, as a step without candidates would have given it."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[kept]
        return tuple(map(of, value)) if isinstance(value, tuple) else value

    steps = {name: of(value) for name, value in output.items() if name != "past_key_values"}
    return type(output)(**steps)
