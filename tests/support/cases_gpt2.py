# SPDX-License-Identifier: Apache-2.0
"""The rows of GPT-2 in the battery's table."""

import torch

from pretrained.testing.battery import BATCH, LENGTH, Case
from pretrained.torch.models import gpt2

TINY_GPT2 = {
    "vocab_size": 99,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def types(config):
    """Second ids for each token, whose embeddings are added, and positions out of order."""
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))
    return {"token_type_ids": ids, "position_ids": torch.arange(LENGTH).flip(0).expand(BATCH, -1)}


def encoder_output(config):
    """An encoder's output, longer than the decoder's input and padded in its last row."""
    states = torch.randn(BATCH, 13, config.n_embd, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(BATCH, 13, dtype=torch.int64)
    mask[-1, 9:] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def gpt2_case(cls, name="", *, inputs=None, cached=None, **config):
    return Case(
        cls,
        {**TINY_GPT2, **config},
        name=f"{cls.__name__}{'-' + name if name else ''}",
        extra_inputs=inputs,
        cached=cached,
    )


LM = gpt2.GPT2LMHeadModel

GPT2_CASES = [
    gpt2_case(gpt2.GPT2Model),
    gpt2_case(LM),
    gpt2_case(LM, "types", inputs=types, cached=False),
    gpt2_case(LM, "untied", tie_word_embeddings=False),
    gpt2_case(LM, "unscaled", scale_attn_weights=False),
    gpt2_case(LM, "by-layer", scale_attn_by_inverse_layer_idx=True, n_layer=3),
    gpt2_case(LM, "upcast", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    gpt2_case(LM, "inner", n_inner=40, activation_function="relu"),
    gpt2_case(LM, "cross", add_cross_attention=True, inputs=encoder_output),
    gpt2_case(LM, "cross-absent", add_cross_attention=True),
    gpt2_case(
        LM,
        "cross-by-layer",
        add_cross_attention=True,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        inputs=encoder_output,
    ),
    gpt2_case(gpt2.GPT2DoubleHeadsModel),
    gpt2_case(
        gpt2.GPT2DoubleHeadsModel,
        "last",
        summary_type="last",
        summary_proj_to_labels=False,
        summary_activation="tanh",
    ),
    gpt2_case(gpt2.GPT2ForSequenceClassification, num_labels=3),
    gpt2_case(gpt2.GPT2ForTokenClassification, num_labels=3),
    gpt2_case(gpt2.GPT2ForQuestionAnswering),
]
