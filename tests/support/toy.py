# SPDX-License-Identifier: Apache-2.0
"""A decoder small enough to know what it must say: its next token depends on the last two."""

from types import SimpleNamespace

import torch
from torch import nn

from pretrained.core.generation_config import GenerationConfig
from pretrained.torch.generation.mixin import GenerationMixin
from pretrained.torch.outputs import CausalLMOutputWithPast

VOCAB = 32


class Toy(GenerationMixin, nn.Module):
    """Scores next = (last + before last) mod VOCAB highest; keeps its ids in the cache as keys."""

    def __init__(self, **config):
        super().__init__()
        values = {"is_encoder_decoder": False, "vocab_size": VOCAB, "num_hidden_layers": 1, **config}
        self.config = SimpleNamespace(**values)
        self.generation_config = GenerationConfig()
        self.embedding = nn.Embedding(VOCAB, 4)
        self.calls = []
        self.nan_at = None

    def get_input_embeddings(self):
        return self.embedding

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
        logits_to_keep=0,
    ):
        self.calls.append(
            {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        )
        ids = input_ids
        if past_key_values is not None:
            states = input_ids[:, None, :, None].float()
            ids = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()
        last, before = ids[:, -1], ids[:, -2] if ids.shape[1] > 1 else torch.zeros_like(ids[:, -1])
        logits = torch.zeros(len(ids), 1, VOCAB)
        logits[torch.arange(len(ids)), 0, (last + before) % VOCAB] = 5.0
        if self.nan_at is not None and len(self.calls) == self.nan_at[0] + 1:
            logits[self.nan_at[1]] = float("nan")
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def fibonacci(first, second, count):
    """What the toy says after two tokens."""
    row = [first, second]
    for _ in range(count):
        row.append((row[-1] + row[-2]) % VOCAB)
    return row


class Letters:
    """A tokenizer of letters: 1 is a, 2 is b, ...; 0 is nothing, 27 a space, 28 a line's end."""

    def decode(self, ids, **kwargs):
        return "".join(" " if i == 27 else "\n" if i == 28 else chr(96 + i) for i in ids if 0 < i < 29)
