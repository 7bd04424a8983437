# SPDX-License-Identifier: Apache-2.0
"""Configs: real files of the Llama family against transformers, and what a base config promises."""

import copy
import json
import math
import pickle

import pytest
import torch
import transformers

from pretrained.arch.llama import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from pretrained.auto import AutoConfig
from pretrained.core.config import PreTrainedConfig, PretrainedConfig, read_config, read_json_object
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import ArgumentError, ConfigError, FileError

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}

# As these models' files are spelt, one or two of each generation of the format.
FILES = {
    "llama 1, converted early": {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "initializer_range": 0.02,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "llama 2": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "llama 2, position interpolation": {
        "model_type": "llama",
        "max_position_embeddings": 32768,
        "rope_scaling": {"factor": 8.0, "type": "linear"},
        "torch_dtype": "float16",
        "num_attention_heads": 32,
    },
    "llama 3.1": LLAMA_31,
    "llama 3.2, tied": {
        **LLAMA_31,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "rope_scaling": {**LLAMA3_SCALING, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama 3.3": {
        **LLAMA_31,
        "head_dim": 128,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "llama 3.1, written by transformers 5": {
        **{key: value for key, value in LLAMA_31.items() if key not in ("rope_theta", "rope_scaling")},
        "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500000.0},
        "dtype": "bfloat16",
        "head_dim": 128,
        "transformers_version": "5.0.0",
    },
    "mistral v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "mistral v0.3": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen2.5, yarn": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "use_sliding_window": True,
        "sliding_window": 131072,
        "max_window_layers": 20,
        "torch_dtype": "bfloat16",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "use_cache": True,
        "vocab_size": 49152,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}
CLASSES = {
    "llama": (LlamaConfig, transformers.LlamaConfig),
    "mistral": (MistralConfig, transformers.MistralConfig),
    "qwen2": (Qwen2Config, transformers.Qwen2Config),
    "qwen3": (Qwen3Config, transformers.Qwen3Config),
    "smollm3": (SmolLM3Config, transformers.SmolLM3Config),
}
FACTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp",
    "tie_word_embeddings", "attention_bias", "attention_dropout", "mlp_bias", "architectures",
    "num_labels", "id2label", "label2id", "is_encoder_decoder", "chunk_size_feed_forward", "problem_type",
    "return_dict", "output_hidden_states", "no_rope_layer_interval", "max_window_layers",
    "use_sliding_window", "transformers_version",
)  # fmt: skip


def write(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_real_files_say_what_transformers_reads(tmp_path, name):
    content = FILES[name]
    ours = AutoConfig.from_pretrained(write(tmp_path, content))
    own, their_class = CLASSES[content["model_type"]]
    assert type(ours) is own
    theirs = their_class.from_dict(copy.deepcopy(content))
    compared = [fact for fact in FACTS if hasattr(theirs, fact) and hasattr(ours, fact)]
    assert len(compared) > 20
    for fact in compared:
        # Transformers writes its own version over the file's as soon as it reads it.
        if fact != "transformers_version" and (fact in content or getattr(theirs, fact) is not None):
            assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert {k: v for k, v in ours.rope_parameters.items() if k != "type"} == {
        k: v for k, v in theirs.rope_parameters.items() if k not in ("type", "partial_rotary_factor")
    }
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))
    if hasattr(theirs, "layer_types"):
        for layer, kind in enumerate(theirs.layer_types):
            assert ours.window(layer) == (theirs.sliding_window if kind == "sliding_attention" else None)
    elif "sliding_window" in content:
        assert ours.window(0) == content["sliding_window"]


@pytest.mark.parametrize("name", FILES)
def test_real_files_are_written_back_whole(tmp_path, name):
    """Every key in its own spelling with its own value, unknown ones too; only the origin is left out."""
    content = FILES[name]
    config = AutoConfig.from_pretrained(write(tmp_path, content))
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = {key: value for key, value in content.items() if key != "_name_or_path"}
    if content.get("head_dim", 0) is None:
        expected["head_dim"] = 128  # as transformers: derived, not "null"
    if "torch_dtype" not in content or "dtype" not in content:
        assert ("torch_dtype" in saved, "dtype" in saved) == ("torch_dtype" in content, "dtype" in content)
    for key, value in expected.items():
        assert saved[key] == value, key
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert again == config
    assert again.to_json_string() == config.to_json_string()
    their_class = CLASSES[content["model_type"]][1]
    ours, theirs = their_class.from_dict(config.to_dict()), their_class.from_dict(copy.deepcopy(content))
    for fact in (*FACTS, "rope_parameters", "dtype", "layer_types", "sliding_window"):
        if fact in content or fact == "rope_parameters":
            assert getattr(ours, fact, None) == getattr(theirs, fact, None), fact


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_the_published_ones(model_type):
    own, theirs = CLASSES[model_type]
    ours, theirs = own(), theirs()
    for fact in FACTS:
        if hasattr(theirs, fact) and hasattr(ours, fact):
            assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


# -- rope in both spellings ------------------------------------------------------------------------


def test_rope_reads_and_sets_in_both_spellings():
    config = LlamaConfig(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_theta == 5e5
    assert config.rope_scaling["factor"] == 2.0
    config.rope_theta = 1e6
    assert config.rope_parameters == {
        "type": "linear",
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 1e6,
    }
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert LlamaConfig().rope_scaling is None


@pytest.mark.parametrize(
    ("content", "change", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            {"rope_theta": 1e6},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
        (
            {"rope_theta": 5e5},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
    ],
)
def test_rope_overrides_win_over_the_file(tmp_path, content, change, expected):
    config = LlamaConfig.from_pretrained(write(tmp_path, content), **change)
    assert config.rope_parameters == expected


# -- nothing is lost -------------------------------------------------------------------------------


def test_unknown_keys_are_attributes_and_come_back(tmp_path):
    odd = {
        "my_note": [1, {"a": None}],
        "with.dot": 2,
        "_private": 3,
        "auto_map": {"AutoModel": "x.Y"},
        "ünï": "cödé",
    }
    config = LlamaConfig.from_pretrained(write(tmp_path, {"model_type": "llama", **odd}))
    assert config.my_note == [1, {"a": None}]
    assert odd.items() <= config.to_dict().items()
    assert odd.items() <= json.loads(config.to_json_string()).items()
    config.my_note[1]["a"] = 5
    assert config.to_dict()["my_note"][1]["a"] == 5
    assert odd["my_note"][1]["a"] is None


def test_generation_fields_of_old_files_stay_and_are_used(tmp_path):
    old = {
        "max_length": 50,
        "do_sample": True,
        "temperature": 0.7,
        "task_specific_params": {"x": {"max_length": 9}},
    }
    config = LlamaConfig.from_pretrained(write(tmp_path, {"model_type": "llama", **old}))
    assert old.items() <= config.to_diff_dict().items()
    generation = GenerationConfig.from_model_config(config)
    assert (generation.max_length, generation.do_sample, generation.temperature) == (50, True, 0.7)


@pytest.mark.parametrize("given", ["torch_dtype", "dtype", "both", "none"])
def test_the_spelling_of_dtype(given):
    keys = {"both": ["torch_dtype", "dtype"], "none": []}.get(given, [given])
    config = LlamaConfig(**dict.fromkeys(keys, "float16"))
    assert config.dtype == config.torch_dtype == ("float16" if keys else None)
    for spelling in ("bfloat16", torch.bfloat16, "torch.bfloat16", "bf16"):
        config.dtype = spelling
        assert config.dtype == config.torch_dtype == "bfloat16"
    config.torch_dtype = torch.float32
    written = config.to_diff_dict()
    assert {key for key in ("torch_dtype", "dtype") if key in written} == set(keys or ["dtype"])
    assert set(keys or ["dtype"]) <= {key for key, value in written.items() if value == "float32"}


def test_only_what_differs_or_was_given_is_written():
    config = LlamaConfig(hidden_size=64, vocab_size=32000)
    written = config.to_diff_dict()
    assert written["hidden_size"] == 64
    assert written["vocab_size"] == 32000
    assert "rms_norm_eps" not in written
    assert config.to_dict()["rms_norm_eps"] == 1e-6
    assert written["model_type"] == "llama"
    assert LlamaConfig.from_dict(written) == config


# -- labels ----------------------------------------------------------------------------------------


def test_labels_follow_each_other():
    assert LlamaConfig().num_labels == 2
    config = LlamaConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config = LlamaConfig(id2label={"0": "bad", "1": "fair", "2": "good"})
    assert (config.num_labels, config.label2id["good"], config.id2label[2]) == (3, 2, "good")
    config.num_labels = 3
    assert config.id2label[2] == "good"
    config.num_labels = 4
    assert config.id2label[2] == "LABEL_2"
    assert json.loads(config.to_json_string())["id2label"]["3"] == "LABEL_3"
    with pytest.raises(ConfigError, match="num_labels cannot be a number of labels"):
        config.num_labels = -1


def test_asking_for_the_labels_that_are_there_keeps_their_names(tmp_path):
    write(tmp_path, {"model_type": "llama", "id2label": {"0": "no", "1": "yes", "2": "maybe"}})
    assert LlamaConfig.from_pretrained(tmp_path, num_labels=3).id2label[1] == "yes"
    assert LlamaConfig.from_pretrained(tmp_path, num_labels=2).id2label[1] == "LABEL_1"
    named = LlamaConfig.from_pretrained(tmp_path, id2label={0: "a", 1: "b"})
    assert (named.num_labels, named.label2id) == (2, {"a": 0, "b": 1})


# -- classes of one's own --------------------------------------------------------------------------


class OldStyle(PretrainedConfig):
    """As configs were written before fields had annotations."""

    model_type = "old-style"
    attribute_map = {"num_hidden_layers": "depth"}  # noqa: RUF012

    def __init__(self, hidden=3, depth=2, tie_word_embeddings=False, **kwargs):
        self.hidden = hidden
        self.depth = depth
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def test_configs_in_the_older_style(tmp_path):
    config = OldStyle(hidden=5, pad_token_id=7, note="x")
    assert (config.hidden, config.depth, config.pad_token_id, config.note) == (5, 2, 7, "x")
    assert config.num_hidden_layers == 2
    assert not config.tie_word_embeddings
    config.num_hidden_layers = 4
    assert config.depth == 4
    config.save_pretrained(tmp_path)
    again = OldStyle.from_pretrained(tmp_path)
    assert again == config
    assert again.to_dict() == config.to_dict()
    again, rest = OldStyle.from_pretrained(tmp_path, hidden=6, other=1, return_unused_kwargs=True)
    assert (again.hidden, again.depth, rest) == (6, 4, {"other": 1})


class NewStyle(PreTrainedConfig):
    """With annotations."""

    model_type = "new-style"
    attribute_map = {"hidden_size": "width"}  # noqa: RUF012

    width: int = 8
    ratio: float = 0.5
    names: list[str] | None = None
    table: dict[str, int] = {}  # noqa: RUF012

    def check(self):
        if self.width % 2:
            raise ConfigError("width must be even", where="width", found=self.width)


def test_common_names():
    config = NewStyle(hidden_size=16)
    assert config.width == config.hidden_size == 16
    config.hidden_size = 32
    assert config.to_dict()["width"] == 32
    assert "hidden_size" not in config.to_dict()
    with pytest.raises(AttributeError, match="NewStyle has no attribute 'heads'"):
        _ = config.heads


def test_values_are_widened_where_that_loses_nothing():
    config = NewStyle(width=4.0, ratio=1, names=("a", "b"))
    assert (config.width, config.ratio, config.names) == (4, 1.0, ["a", "b"])
    assert isinstance(config.width, int)
    assert isinstance(config.ratio, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 4.5}, r"NewStyle\.width has a value of the wrong type .*expected int, found float 4\.5"),
        ({"width": True}, "found bool True"),
        ({"width": 10**19}, "at most 63 bits"),
        ({"ratio": "x"}, "expected float, found str 'x'"),
        ({"ratio": math.nan}, r"NewStyle\.ratio has a value that no model can have .*a finite number"),
        ({"ratio": -math.inf}, "a finite number"),
        ({"names": "a"}, r"expected list\[str\] \| None"),
        ({"names": ["a", 1]}, r"expected list\[str\] \| None"),
        ({"table": [1]}, "expected dict"),
        ({"width": 3}, r"width must be even \(width\): found 3"),
        ({"hidden_size": "8"}, r"NewStyle\.width has a value of the wrong type"),
        ({"dtype": "flaot16"}, r"Unknown dtype 'flaot16'.*Did you mean 'float16'"),
        ({"problem_type": "x"}, r"Unknown problem_type 'x'.*regression, single_label_classification"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ConfigError, match=message):
        NewStyle(**values)
    config = NewStyle()
    before = config.to_dict()
    with pytest.raises(ConfigError, match=message):
        config.update(values | {"note": 1})
    assert config.to_dict() == before


def test_defaults_are_not_shared():
    NewStyle().table["x"] = 1
    assert NewStyle().table == {}
    NewStyle().id2label[0] = "x"
    assert NewStyle().id2label[0] == "LABEL_0"


def test_update():
    config = NewStyle()
    config.update({"hidden_size": 4, "note": "x", "num_labels": 5, "attn_implementation": "eager"})
    assert (config.width, config.note, config.num_labels) == (4, "x", 5)
    assert config.attn_implementation == "eager"
    assert "attn_implementation" not in config.to_dict()


def test_copies_and_equality():
    config = NewStyle(width=4, note=[1], attn_implementation="eager")
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.attn_implementation == "eager"
        assert other.to_json_string() == config.to_json_string()
    other = copy.deepcopy(config)
    other.note.append(2)
    assert other != config
    assert config != OldStyle()
    assert config != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)
    assert repr(config).startswith('NewStyle {\n  "')


# -- files -----------------------------------------------------------------------------------------


def test_reading(tmp_path):
    file = write(tmp_path, {"model_type": "new-style", "width": 6}) / "config.json"
    for place in (tmp_path, str(tmp_path), file):
        assert NewStyle.from_pretrained(place).width == 6
    assert NewStyle.from_json_file(file).width == 6
    assert NewStyle.get_config_dict(tmp_path, revision="main", other=1) == (
        {"model_type": "new-style", "width": 6},
        {"other": 1},
    )
    assert read_config(tmp_path)[1] == file
    config = NewStyle.from_pretrained(tmp_path, width=8)
    assert config.width == 8
    assert config.name_or_path == str(tmp_path)
    assert PreTrainedConfig.from_pretrained(tmp_path).model_type == "new-style"


def test_writing(tmp_path):
    config = NewStyle(width=6)
    config.save_pretrained(tmp_path / "a" / "b")
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["width"] == 6
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["config.json"]
    config.to_json_file(tmp_path / "x.json", use_diff=False)
    assert NewStyle.from_json_file(tmp_path / "x.json") == config
    with pytest.raises(ArgumentError, match=r"saved into a folder .*found a file"):
        config.save_pretrained(tmp_path / "x.json")
    with pytest.raises(ArgumentError, match="saved into a folder"):
        config.save_pretrained("")
    config.note = object()
    with pytest.raises(ConfigError, match=r"NewStyle\.note cannot be written as JSON .*object"):
        config.save_pretrained(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="This file cannot be read"):
        read_json_object(tmp_path / "nothing.json")
    with pytest.raises(FileError, match=r"This file cannot be read .*Is a directory"):
        read_json_object(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new-style", "width": "6"}')
    with pytest.raises(ConfigError, match="width has a value of the wrong type") as caught:
        NewStyle.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert NewStyle.from_pretrained(tmp_path, width=6).width == 6


def test_a_config_of_another_architecture(tmp_path):
    write(tmp_path, {"model_type": "new-style"})
    with pytest.raises(
        ConfigError, match=r"not a LlamaConfig .*expected 'llama', found 'new-style'.*AutoConfig"
    ):
        LlamaConfig.from_pretrained(tmp_path)
