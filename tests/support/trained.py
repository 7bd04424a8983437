# SPDX-License-Identifier: Apache-2.0
"""A tiny T5 that has learned something: weights that are neither random nor large."""

import functools

import torch

from pretrained.arch.t5 import T5Config
from pretrained.torch.models.t5 import T5ForConditionalGeneration

PAD, END, FIRST, DIGITS, LONGEST = 0, 1, 3, 10, 6


def next_digits(rows, generator):
    """Rows of digits, padded on the right, and the digits that follow them, each row with its end."""
    lengths = torch.randint(2, LONGEST + 1, (rows,), generator=generator)
    digits = torch.randint(0, DIGITS, (rows, LONGEST), generator=generator)
    place = torch.arange(LONGEST + 1)
    ids, labels = torch.full((2, rows, LONGEST + 1), PAD)
    ids[:, :-1], labels[:, :-1] = digits + FIRST, (digits + 1) % DIGITS + FIRST
    for tokens in (ids, labels):
        tokens[place == lengths[:, None]] = END
        tokens[place > lengths[:, None]] = PAD
    return ids, labels


@functools.cache
def trained_t5(steps=300):
    """Return a T5 that counts digits on, mostly right; the same one each time.

    Args:
        steps: How long it is trained.
    """
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 16}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD, dropout_rate=0.0)
    )
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    for _ in range(steps):
        ids, labels = next_digits(32, generator)
        optimizer.zero_grad()
        model(
            input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels.masked_fill(labels == PAD, -100)
        ).loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)
