# SPDX-License-Identifier: Apache-2.0
"""The Llama family's published configs: what they say, what is promised for them, and what is refused."""

import json

import pytest

from pretrained.arch.llama import (
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    skeleton,
)
from pretrained.errors import ConfigError

# config.json of published models, as far as they matter here, with their counts of parameters.
LLAMA_2_7B = """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
 "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
 "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
 "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
 "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
 "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""
LLAMA_3_1_8B = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
 "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
 "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
 "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
 "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
 "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}"""
LLAMA_3_2_1B = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 128000, "eos_token_id": 128001,
 "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
 "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
 "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
 "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256}"""
MISTRAL_7B = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
 "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
 "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
 "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
 "use_cache": true, "vocab_size": 32000}"""
QWEN2_5_HALF = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
 "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
 "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
 "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
 "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3_0_6B = """{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
 "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
 "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
 "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
 "sliding_window": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
 "use_sliding_window": false, "vocab_size": 151936}"""
SMOLLM2_135M = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
 "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
 "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
 "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
 "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
 "vocab_size": 49152}"""
SMOLLM3_3B = """{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 11008, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false,
 "model_type": "smollm3", "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
 "num_key_value_heads": 4, "pad_token_id": 128004, "rms_norm_eps": 1e-06, "rope_scaling": null,
 "rope_theta": 5000000.0, "sliding_window": null, "torch_dtype": "bfloat16", "use_cache": false,
 "use_sliding_window": false, "vocab_size": 128256}"""

PUBLISHED = {
    "Llama-2-7B": (LlamaConfig, LLAMA_2_7B, 6_738_415_616),
    "Llama-3.1-8B": (LlamaConfig, LLAMA_3_1_8B, 8_030_261_248),
    "Llama-3.2-1B": (LlamaConfig, LLAMA_3_2_1B, 1_235_814_400),
    "Mistral-7B-v0.1": (MistralConfig, MISTRAL_7B, 7_241_732_096),
    "Qwen2.5-0.5B": (Qwen2Config, QWEN2_5_HALF, 494_032_768),
    "Qwen3-0.6B": (Qwen3Config, QWEN3_0_6B, 596_049_920),
    "SmolLM2-135M": (LlamaConfig, SMOLLM2_135M, 134_515_008),
    "SmolLM3-3B": (SmolLM3Config, SMOLLM3_3B, 3_075_098_624),
}
ALL = pytest.mark.parametrize("name", PUBLISHED)
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 9}


def published(name):
    cls, text, count = PUBLISHED[name]
    return cls.from_dict(json.loads(text)), json.loads(text), count


@ALL
def test_published_counts(name):
    config, _, count = published(name)
    promised = skeleton(config, "ForCausalLM")
    assert promised.num_parameters == count
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert skeleton(config, "Model").num_parameters == count - head


@ALL
def test_published_configs_are_written_back_as_they_were(name, tmp_path):
    config, values, _ = published(name)
    # What only says which folder or library a file came from has no place in another file.
    own = {"_name_or_path", "transformers_version"}
    written = json.loads(config.to_json_string())
    dtype = written.get("torch_dtype", written.get("dtype"))
    assert dtype == values.pop("torch_dtype")
    for key in values.keys() - own:
        assert written[key] == values[key], key
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path) == config


@ALL
def test_blocks_are_never_split_and_hold_the_same(name):
    config, _, _ = published(name)
    params = skeleton(config, "ForCausalLM").params.values()
    blocks = {}
    for spec in params:
        blocks.setdefault(spec.block, []).append(spec.num_elements)
    outside = {spec.key for spec in params if spec.block is None}
    assert outside == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    layers = [blocks[f"model.layers.{index}"] for index in range(config.num_hidden_layers)]
    assert len(blocks) == len(layers) + 1 and all(layer == layers[0] for layer in layers)


@pytest.mark.parametrize(
    ("head", "extra", "prefix"),
    [
        ("Model", {}, ""),
        ("ForCausalLM", {"lm_head.weight": (9, 32)}, "model."),
        ("ForSequenceClassification", {"score.weight": (3, 32)}, "model."),
        ("ForTokenClassification", {"score.weight": (3, 32), "score.bias": (3,)}, "model."),
        ("ForQuestionAnswering", {"qa_outputs.weight": (2, 32), "qa_outputs.bias": (2,)}, "transformer."),
    ],
)
def test_heads(head, extra, prefix):
    promised = skeleton(LlamaConfig(**SMALL, num_labels=3), head).params
    assert {key: spec.shape for key, spec in promised.items() if key in extra} == extra
    body = {key.removeprefix(prefix) for key in promised if key not in extra}
    assert body == skeleton(LlamaConfig(**SMALL)).params.keys()


def test_question_answering_has_the_name_that_files_have():
    for cls, prefix in ((LlamaConfig, "transformer."), (MistralConfig, "model.")):
        keys = skeleton(cls(**SMALL, num_key_value_heads=4), "ForQuestionAnswering").params
        assert sum(key.startswith(prefix) for key in keys) == len(keys) - 2


def test_a_block_by_hand():
    config = LlamaConfig(
        **SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=48, attention_bias=True, mlp_bias=True
    )
    block = {
        key.removeprefix("layers.0."): spec.shape
        for key, spec in skeleton(config).params.items()
        if key.startswith("layers.0.")
    }
    assert block == {
        "self_attn.q_proj.weight": (64, 32),
        "self_attn.q_proj.bias": (64,),
        "self_attn.k_proj.weight": (32, 32),
        "self_attn.k_proj.bias": (32,),
        "self_attn.v_proj.weight": (32, 32),
        "self_attn.v_proj.bias": (32,),
        "self_attn.o_proj.weight": (32, 64),
        "self_attn.o_proj.bias": (32,),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.gate_proj.bias": (48,),
        "mlp.up_proj.weight": (48, 32),
        "mlp.up_proj.bias": (48,),
        "mlp.down_proj.weight": (32, 48),
        "mlp.down_proj.bias": (32,),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
    }


@pytest.mark.parametrize(
    ("cls", "values", "biased", "norms"),
    [
        (Qwen2Config, {}, {"q_proj", "k_proj", "v_proj"}, False),
        (Qwen2Config, {"attention_bias": False}, {"q_proj", "k_proj", "v_proj"}, False),
        (Qwen3Config, {}, set(), True),
        (Qwen3Config, {"attention_bias": True}, {"q_proj", "k_proj", "v_proj", "o_proj"}, True),
        (MistralConfig, {}, set(), False),
        (SmolLM3Config, {"mlp_bias": True}, {"gate_proj", "up_proj", "down_proj"}, False),
    ],
)
def test_biases_and_norms_of_the_family(cls, values, biased, norms):
    config = cls(**{**SMALL, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": None, **values})
    keys = [key for key in skeleton(config).params if key.startswith("layers.1.")]
    assert {key.split(".")[-2] for key in keys if key.endswith(".bias")} == biased
    assert any("q_norm" in key for key in keys) is any("k_norm" in key for key in keys) is norms


# -- the facts that configs answer ---------------------------------------------------------------


def test_head_sizes():
    assert LlamaConfig(hidden_size=64, num_attention_heads=4).head_dim == 16
    assert LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=32).head_size == 32
    assert LlamaConfig(hidden_size=65, num_attention_heads=4, head_dim=8).head_size == 8
    assert Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4).head_size == 128
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=None)
    assert config.head_size == 16


def test_key_value_heads():
    assert LlamaConfig(num_attention_heads=8, hidden_size=64).num_key_value_heads == 8
    assert LlamaConfig(num_attention_heads=8, hidden_size=64, num_key_value_heads=2).kv_heads == 2


@pytest.mark.parametrize(
    ("cls", "values", "windows"),
    [
        (LlamaConfig, {}, [None] * 4),
        (MistralConfig, {"sliding_window": 7}, [7] * 4),
        (MistralConfig, {"sliding_window": None}, [None] * 4),
        (Qwen2Config, {"sliding_window": 7, "max_window_layers": 3}, [None] * 4),
        (
            Qwen2Config,
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 3},
            [None, None, None, 7],
        ),
        (
            Qwen3Config,
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [7, None, 7, None],
        ),
        (SmolLM3Config, {"sliding_window": 7, "use_sliding_window": True}, [None, None, None, 7]),
    ],
)
def test_windows(cls, values, windows):
    config = cls(**{**SMALL, "num_key_value_heads": 4, "pad_token_id": None, **values})
    assert [config.window(layer) for layer in range(4)] == windows


def test_layers_without_rotation():
    config, _, _ = published("SmolLM3-3B")
    assert [config.rotates(layer) for layer in range(8)] == [True, True, True, False] * 2
    config.update({"no_rope_layers": [0, 1] * 18})
    assert [config.rotates(layer) for layer in range(4)] == [False, True] * 2
    assert all(LlamaConfig(**SMALL).rotates(layer) for layer in range(4))


@pytest.mark.parametrize(
    ("cls", "values", "text"),
    [
        (LlamaConfig, {"hidden_size": 33}, "hidden_size is not a multiple.*Set head_dim"),
        (LlamaConfig, {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        (LlamaConfig, {"num_attention_heads": 0}, "num_attention_heads"),
        (LlamaConfig, {"vocab_size": 0}, "vocab_size"),
        (LlamaConfig, {"hidden_size": -32}, "hidden_size"),
        (LlamaConfig, {"num_hidden_layers": -1}, "num_hidden_layers"),
        (LlamaConfig, {"pad_token_id": 9}, r"not in the vocabulary .*below vocab_size, 9.*found 9"),
        (
            Qwen2Config,
            {"layer_types": ["full_attention"] * 3},
            r"layer_types does not describe every layer.*expected 4 of full_attention or sliding.*found 3",
        ),
        (Qwen2Config, {"layer_types": ["full_attention", "linear"] * 2}, "layer_types does not describe"),
        (SmolLM3Config, {"no_rope_layers": [1, 0]}, r"no_rope_layers.*expected 4 numbers, found 2"),
    ],
)
def test_configs_that_contradict_themselves(cls, values, text):
    with pytest.raises(ConfigError, match=text):
        cls(**{**SMALL, "num_key_value_heads": 4, "pad_token_id": None, **values})


def test_a_model_without_layers_is_its_embedding_and_norm():
    assert skeleton(LlamaConfig(**{**SMALL, "num_hidden_layers": 0})).num_parameters == 9 * 32 + 32
