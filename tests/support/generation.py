# SPDX-License-Identifier: Apache-2.0
"""Tiny generating models beside transformers' of the same weights, and prompts for them."""

import torch

from support.oracle import transformers_twin

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES = {
    "vocab_size": 61,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
ENDS = [2, 7, 11, 30, 41, 52]


def build(cls, config):
    """Return a model of random weights whose scores differ clearly, and transformers' twin."""
    torch.manual_seed(3)
    model = cls(config).eval()
    for parameter in model.parameters():
        # Wide enough that the scores of random weights differ clearly.
        parameter.data.normal_(0, 0.3)
    return model, transformers_twin(model)


def prompt(rows=3, length=8, seed=0, low=3):
    """Return random ids."""
    return torch.randint(low, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows=3, length=8):
    """Return random ids padded on the left, and their mask."""
    ids = prompt(rows, length)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask
