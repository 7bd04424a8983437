# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding and sampling: one loop over the decoder's step, and two ways to pick a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.torch.generation.candidates import CandidateGenerator
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.logits import LogitsProcessorList
from pretrained.torch.generation.loop import Decoder, Sequences, last_logits
from pretrained.torch.generation.recorder import Recorder
from pretrained.torch.generation.settings import Lengths
from pretrained.torch.generation.stopping import MaxLengthCriteria, StopCheck, StoppingCriteriaList

Pick = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes scores [rows, vocab]; returns (confidence, tokens), [rows] each. Confidence is NaN if a score is."""


@dataclass
class Run:
    """Everything that a strategy needs: the decisions are made, and nothing is left on the model.

    Attributes:
        model: The model that generates.
        config: The settled config.
        inputs: What the model starts from.
        lengths: The settled lengths.
        decoder: Runs the model.
        sequences: Tokens so far; filled by the strategy.
        processors: Rules on the scores.
        criteria: Rules for stopping.
        recorder: Collects what is to be returned beside the tokens.
        pad_token_id: What finished rows are filled with; None where rows cannot finish early.
        streamer: Is given the tokens as they come, or None.
        generator: Source of chance; None for torch's global one.
        behind: Look at the verdict of a step while the next one runs (see `StopCheck`).
        candidates: Guesses the next tokens, for speculative decoding; else None.
    """

    model: Any
    config: GenerationConfig
    inputs: GenerationInputs
    lengths: Lengths
    decoder: Decoder
    sequences: Sequences
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    recorder: Recorder
    pad_token_id: int | None = None
    streamer: Any = None
    generator: torch.Generator | None = None
    behind: bool = False
    candidates: CandidateGenerator | None = None
    max_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.max_length = self.criteria.max_length or 0


def greedy(run: Run) -> None:
    """Take the token with the highest score each time.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
    """
    decode(run, _best)


def sample(run: Run) -> None:
    """Draw each token with the probability that the scores give it.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
    """
    decode(run, lambda scores: draw(scores.softmax(-1), run.generator))


def decode(run: Run, pick: Pick) -> None:
    """Run the prompt, then token after token until every row is finished.

    Args:
        run: The call; its `sequences` and `recorder` are filled.
        pick: How a token is chosen.

    Raises:
        GenerationError: scores that are not numbers.
    """
    sequences, recorder = run.sequences, run.recorder
    # The length is counted on the host; only rules that look at tokens need the device.
    rules = StoppingCriteriaList(rule for rule in run.criteria if not isinstance(rule, MaxLengthCriteria))
    rows, device = sequences.ids.shape[0], sequences.ids.device
    check = StopCheck(rows, device, behind=run.behind)
    # A single row ends the loop when it is finished, unless that is noticed a step later.
    pad = run.pad_token_id if rules and (rows > 1 or run.behind) else None
    output = run.decoder.prefill()
    while True:
        logits = last_logits(output)
        scores = run.processors(sequences.ids, recorder.keep(logits)) if run.processors else logits
        recorder.add(output, logits, scores)
        confidence, tokens = pick(scores)
        if pad is not None:
            tokens = torch.where(check.unfinished, tokens, pad)
        sequences.append(tokens)
        if run.streamer is not None:
            run.streamer.put(tokens.cpu())
        finished = rules(sequences.ids, recorder.scores) if rules else None
        if check(confidence, finished) or sequences.length >= run.max_length:
            break
        # Lets go of the last step's logits before the next ones come.
        del output, logits, scores
        output = run.decoder.step(tokens, sequences)
    needed = check.finish()
    run.decoder.take_back(check.steps - needed)
    sequences.cut(needed)
    recorder.cut(needed)


def _best(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    confidence, tokens = scores.max(dim=-1)
    return confidence, tokens


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token of each row, the same one as ``torch.multinomial(probs, 1)`` with the same seed.

    Of exponential variables with rates p, the i-th is the least with probability p_i; so is p over a
    unit exponential the largest. This leaves out multinomial's checks, which make a device wait.

    Args:
        probs: [rows, vocab] probabilities.
        generator: Source of chance; None for torch's global one.

    Returns:
        The largest ratio, NaN where a probability is, and the tokens; [rows] each.
    """
    ratio, tokens = probs.div(torch.empty_like(probs).exponential_(1.0, generator=generator)).max(dim=-1)
    return ratio, tokens
