# SPDX-License-Identifier: Apache-2.0
"""Configs of the T5 family as real repositories have them, and the skeletons that follow."""

import json

import pytest

from pretrained.arch.t5 import MT5Config, T5Config, UMT5Config, skeleton
from pretrained.errors import ConfigError

# google-t5/t5-small, as first published.
T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
    "vocab_size": 32128,
}
# google/flan-t5-base: v1.1.
FLAN = {
    **T5_SMALL,
    "d_model": 768,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.23.1",
}
# The same, loaded and saved by transformers 5.
FLAN_BY_5 = {
    **{key: value for key, value in FLAN.items() if key != "torch_dtype"},
    "dense_act_fn": "gelu_new",
    "dtype": "float32",
    "is_gated_act": True,
    "scale_decoder_outputs": False,
    "tie_word_embeddings": True,
}
# google/byt5-small: twelve blocks read, four write.
BYT5 = {
    "d_ff": 3584,
    "d_kv": 64,
    "d_model": 1472,
    "feed_forward_proj": "gated-gelu",
    "gradient_checkpointing": False,
    "model_type": "t5",
    "num_decoder_layers": 4,
    "num_heads": 6,
    "num_layers": 12,
    "tie_word_embeddings": False,
    "tokenizer_class": "ByT5Tokenizer",
    "vocab_size": 384,
}
# google/umt5-small has no model_type.
UMT5 = {
    "architectures": ["UMT5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_model": 512,
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "vocab_size": 256384,
}


def test_v1_0_scales_and_has_a_plain_network():
    config = T5Config.from_dict(T5_SMALL)
    assert (config.scale_decoder_outputs, config.is_gated_act, config.dense_act_fn) == (True, False, "relu")
    assert config.num_decoder_layers == 6
    assert config.task_specific_params["summarization"]["num_beams"] == 4


@pytest.mark.parametrize("values", [FLAN, FLAN_BY_5], ids=["old", "by transformers 5"])
def test_v1_1_does_not_scale_and_gates(values):
    config = T5Config.from_dict(values)
    assert (config.scale_decoder_outputs, config.is_gated_act, config.dense_act_fn) == (
        False,
        True,
        "gelu_new",
    )


def test_an_encoder_deeper_than_its_decoder():
    config = T5Config.from_dict(BYT5)
    keys = skeleton(config, "ForConditionalGeneration").params
    assert "encoder.block.11.layer.1.DenseReluDense.wi_1.weight" in keys
    assert "decoder.block.3.layer.2.DenseReluDense.wo.weight" in keys
    assert not any(key.startswith("decoder.block.4.") for key in keys)


def test_common_names_are_the_familys_own():
    config = T5Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=12)
    assert (config.d_model, config.num_layers, config.num_heads, config.d_kv) == (48, 3, 4, 12)
    assert config.hidden_size == 48 and config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("cls", "values"),
    [(T5Config, T5_SMALL), (T5Config, FLAN), (T5Config, FLAN_BY_5), (T5Config, BYT5), (UMT5Config, UMT5)],
    ids=["t5-small", "flan", "flan-by-5", "byt5", "umt5"],
)
def test_every_key_is_written_back(cls, values):
    written = json.loads(cls.from_dict(values).to_json_string())
    assert {key: written[key] for key in values if key != "torch_dtype"} == {
        key: value for key, value in values.items() if key != "torch_dtype"
    }
    assert cls.from_dict(written) == cls.from_dict(values)


def test_the_start_token_is_padding_where_the_file_has_none():
    assert T5Config().decoder_start_token_id == 0
    assert T5Config(pad_token_id=7).decoder_start_token_id == 7
    assert T5Config(decoder_start_token_id=3).decoder_start_token_id == 3


@pytest.mark.parametrize(
    ("name", "gated", "act"),
    [
        ("relu", False, "relu"),
        ("gelu", False, "gelu"),
        ("gated-gelu", True, "gelu_new"),
        ("gated-silu", True, "silu"),
        ("gated-relu", True, "relu"),
    ],
)
def test_what_a_feed_forward_name_means(name, gated, act):
    config = T5Config(feed_forward_proj=name)
    assert (config.is_gated_act, config.dense_act_fn) == (gated, act)
    changed = T5Config(feed_forward_proj="tanh")
    changed.update({"feed_forward_proj": name})
    assert (changed.is_gated_act, changed.dense_act_fn) == (gated, act)


def test_an_activation_in_the_file_counts():
    assert T5Config(feed_forward_proj="gated-gelu", dense_act_fn="gelu").dense_act_fn == "gelu"


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize(
    ("cls", "scales"),
    [
        (T5Config, {None: True, True: True, False: False}),
        (MT5Config, {None: False, True: False, False: False}),
        (UMT5Config, {None: True, True: True, False: True}),
    ],
)
def test_who_scales_the_decoders_output(cls, scales, tied):
    values = {} if tied is None else {"tie_word_embeddings": tied}
    assert cls(**values).scale_decoder_outputs is scales[tied]
    assert cls(**values, scale_decoder_outputs=True).scale_decoder_outputs is True
    assert cls(**values, scale_decoder_outputs=False).scale_decoder_outputs is False


def test_only_umt5_has_position_biases_in_every_block():
    tiny = {"num_layers": 2, "d_model": 8, "vocab_size": 9}
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert bias in skeleton(UMT5Config(**tiny)).params
    assert bias not in skeleton(MT5Config(**tiny)).params
    assert skeleton(T5Config(**tiny, num_heads=3)).params[bias.replace("block.1", "block.0")].shape == (32, 3)


def test_ties_of_every_head():
    tied, untied = T5Config(num_layers=0), T5Config(num_layers=0, tie_word_embeddings=False)
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(skeleton(tied, "ForConditionalGeneration").ties) == {*aliases, "lm_head.weight"}
    assert set(skeleton(untied, "ForConditionalGeneration").ties) == aliases
    assert set(skeleton(tied, "EncoderModel").ties) == {"encoder.embed_tokens.weight"}
    assert skeleton(tied, "ForTokenClassification").ties == {
        "transformer.encoder.embed_tokens.weight": "transformer.shared.weight"
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model must be 1 or more"),
        ({"num_layers": -1}, "num_layers must be 0 or more"),
        ({"feed_forward_proj": "fancy-gelu"}, "gated-<activation>"),
        ({"feed_forward_proj": "gated-"}, "gated-<activation>"),
        ({"feed_forward_proj": "gated-gelu-new"}, "gated-<activation>"),
        ({"relative_attention_num_buckets": 3}, "4 buckets or more"),
        ({"relative_attention_max_distance": 16}, "more than 16"),
        ({"d_kv": "64"}, "d_kv has a value of the wrong type"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        T5Config(**values)


def test_a_config_of_a_sister_family_is_refused():
    with pytest.raises(ConfigError, match="not a MT5Config"):
        MT5Config.from_dict(T5_SMALL)
