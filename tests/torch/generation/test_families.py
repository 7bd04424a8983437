# SPDX-License-Identifier: Apache-2.0
"""Greedy and sampled tokens of every generating class equal transformers', padded or not, with each cache."""

import pytest
import torch

import pretrained
from support.oracle import transformers_twin

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
T5 = {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
FAMILIES = {
    "GPT2LMHeadModel": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "BertLMHeadModel": {**SIZES, "is_decoder": True},
    "Qwen2ForCausalLM": {**GROUPED, **WINDOWED},
    "Qwen3ForCausalLM": {**GROUPED, "head_dim": 16},
    "SmolLM3ForCausalLM": GROUPED,
    "MT5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
    "UMT5ForConditionalGeneration": {**T5, "decoder_start_token_id": 0},
}
SETTINGS = [
    {"max_new_tokens": 15},
    {"max_new_tokens": 15, "cache_implementation": "static"},
    {"max_new_tokens": 9, "use_cache": False},
    {"max_new_tokens": 15, "do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_transformers(name):
    cls = getattr(pretrained, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**FAMILIES[name])).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    twin = transformers_twin(model)
    ids = torch.randint(3, 61, (3, 8))
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row in range(3):
        padded[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    for settings in SETTINGS:
        for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
            torch.manual_seed(1)
            expected = twin.generate(**inputs, **settings)
            torch.manual_seed(1)
            found = model.generate(**inputs, **settings)
            assert torch.equal(found, expected), (settings, "attention_mask" in inputs)
