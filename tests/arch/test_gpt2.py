# SPDX-License-Identifier: Apache-2.0
"""GPT-2's config: published files, what they may hold, and what cannot be."""

import json

import pytest

from pretrained.arch.gpt2 import KEY_RULES, GPT2Config, skeleton
from pretrained.core.keys import match_keys
from pretrained.errors import ConfigError

# openai-community/gpt2's config.json, of 2019 and little changed since.
PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
TINY = {"vocab_size": 31, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def test_published_file_is_read_and_written_back_whole():
    config = GPT2Config.from_dict(PUBLISHED)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert config.max_position_embeddings == config.n_ctx == 1024
    assert (config.head_size, config.inner_size) == (64, 3072)
    assert config.tie_word_embeddings
    assert json.loads(config.to_json_string()) == PUBLISHED


def test_common_names_and_own_names_are_one():
    config = GPT2Config(hidden_size=24, num_attention_heads=3, num_hidden_layers=1, max_position_embeddings=9)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (24, 3, 1, 9)
    assert {"n_embd", "n_head", "n_layer", "n_positions"} <= set(config.to_diff_dict())
    assert "hidden_size" not in config.to_diff_dict()


def test_number_of_parameters_of_the_published_model():
    # 124,439,808: as counted by everybody who loads it, the tied head once.
    assert skeleton(GPT2Config.from_dict(PUBLISHED), "LMHeadModel").num_parameters == 124_439_808


def test_blocks_are_never_split():
    params = skeleton(GPT2Config(**TINY), "LMHeadModel").params
    assert params["transformer.h.1.mlp.c_fc.weight"].block == "transformer.h.1"
    assert params["transformer.wte.weight"].block is None


def test_scaling_of_a_layer():
    plain = GPT2Config(**TINY)
    assert plain.attention_scaling(1) == 0.5
    by_layer = GPT2Config(**TINY, scale_attn_by_inverse_layer_idx=True)
    assert [by_layer.attention_scaling(i) for i in range(2)] == [0.5, 0.25]
    assert GPT2Config(**TINY, scale_attn_weights=False).attention_scaling(1) == 1.0


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_masks_that_old_files_carry_are_dropped_by_rule(prefix):
    promised = list(skeleton(GPT2Config(**TINY), "LMHeadModel").params)
    file = [key.replace("transformer.", prefix, 1) for key in promised]
    masks = [f"{prefix}h.{i}.attn.{name}" for i in range(2) for name in ("bias", "masked_bias")]
    match = match_keys([*file, *masks], promised, base_prefix="transformer", rules=KEY_RULES)
    assert set(match.dropped) == set(masks)
    assert not match.missing and not match.unexpected
    assert match.sources["transformer.h.0.attn.c_attn.bias"] == f"{prefix}h.0.attn.c_attn.bias"


def test_a_bias_that_a_rule_does_not_name_is_not_dropped():
    promised = list(skeleton(GPT2Config(**TINY)).params)
    match = match_keys([*promised, "h.9.attn.c_attn.bias"], promised, rules=KEY_RULES)
    assert match.unexpected == ("h.9.attn.c_attn.bias",)


def test_pruned_heads_are_left_out_of_the_projections():
    config = GPT2Config(**TINY, pruned_heads={"1": [0]})
    shapes = {key: spec.shape for key, spec in skeleton(config).params.items()}
    assert shapes["h.0.attn.c_attn.weight"] == (8, 24)
    assert shapes["h.1.attn.c_attn.weight"] == (8, 12)
    assert shapes["h.1.attn.c_proj.weight"] == (4, 8)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"n_head": 3}, "n_embd is not a multiple of n_head .*found 8, 3"),
        ({"n_embd": 0}, "n_embd must be positive"),
        ({"vocab_size": -1}, "vocab_size must be positive"),
        ({"n_layer": -1}, "n_layer must not be negative"),
        (
            {"n_embd": "768"},
            r"n_embd has a value of the wrong type .*expected int, found str '768'",
        ),
        ({"n_inner": 2.5}, "n_inner has a value of the wrong type"),
        (
            {"pruned_heads": {2: [0]}},
            r"heads that the model does not have.*pruned_heads\[2\]",
        ),
        ({"pruned_heads": {0: [0, 1]}}, r"or all of a layer .pruned_heads\[0\]"),
    ],
)
def test_values_that_cannot_be(values, text):
    with pytest.raises(ConfigError, match=text):
        GPT2Config(**{**TINY, **values})


@pytest.mark.parametrize("kind", ["attn", "middle"])
def test_unknown_summary_is_refused_by_the_class_that_sums_up(kind):
    config = GPT2Config(**TINY, summary_type=kind)
    with pytest.raises(ConfigError, match=f"summary_type is not a way.*'cls_index', found '{kind}'"):
        config.checked_summary_type()
