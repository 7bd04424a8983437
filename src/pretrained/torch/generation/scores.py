# SPDX-License-Identifier: Apache-2.0
"""Scores of generated tokens, read off the scores of each step."""

from __future__ import annotations

import torch


def transition_scores(
    sequences: torch.Tensor,
    scores: tuple[torch.Tensor, ...],
    beam_indices: torch.Tensor | None = None,
    normalize_logits: bool = False,
) -> torch.Tensor:
    """Return the score of each generated token.

    Args:
        sequences: [rows, length] token ids.
        scores: For each new token, [rows (or beams), vocab].
        beam_indices: [rows, new] which row of `scores` each token came from; negative after a row's end.
            None where each row goes on from itself.
        normalize_logits: Apply a log-softmax first.

    Returns:
        [rows, new]; 0 after a row's end where `beam_indices` tell of it.
    """
    if beam_indices is None:
        own = torch.arange(sequences.shape[0], device=sequences.device)
        beam_indices = own[:, None].expand(-1, len(scores))
    over = beam_indices < 0
    longest = int((~over).sum(-1).max())
    over, beam_indices = over[:, :longest], beam_indices[:, :longest].clamp(min=0)
    tokens = sequences[:, sequences.shape[1] - longest :]
    columns = []
    for step in range(longest):
        of_step = scores[step].log_softmax(-1) if normalize_logits else scores[step]
        columns.append(of_step[beam_indices[:, step], tokens[:, step]])
    return torch.stack(columns, dim=1).masked_fill(over, 0.0)
