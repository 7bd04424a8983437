# SPDX-License-Identifier: Apache-2.0
"""GenerationConfig: effective values, real files, round trips, checks when set and when used."""

import copy
import json
import pickle

import numpy as np
import pytest
import transformers

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.core.generation_fields import FIELDS
from pretrained.errors import ArgumentError, ConfigError, FileError, GenerationError, UnknownArgumentError

# generation_config.json files as published with these models.
REAL = {
    "gpt2": {
        "_from_model_config": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "transformers_version": "4.26.0.dev0",
    },
    "t5": {
        "_from_model_config": True,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "transformers_version": "4.27.0.dev0",
    },
    "llama-3-instruct": {
        "bos_token_id": 128000,
        "do_sample": True,
        "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": "4.45.0.dev0",
    },
    "qwen2.5": {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "repetition_penalty": 1.1,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    },
    "bart-cnn": {
        "_from_model_config": True,
        "bos_token_id": 0,
        "decoder_start_token_id": 2,
        "early_stopping": True,
        "eos_token_id": 2,
        "forced_bos_token_id": 0,
        "forced_eos_token_id": 2,
        "length_penalty": 2.0,
        "max_length": 142,
        "min_length": 56,
        "no_repeat_ngram_size": 3,
        "num_beams": 4,
        "pad_token_id": 1,
        "transformers_version": "4.31.0.dev0",
    },
    "whisper": {
        "alignment_heads": [[1, 0], [2, 0]],
        "begin_suppress_tokens": [220, 50257],
        "bos_token_id": 50257,
        "forced_decoder_ids": [[1, None], [2, 50359]],
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 50259},
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "no_timestamps_token_id": 50363,
        "return_timestamps": False,
        "suppress_tokens": [],
        "transformers_version": "4.31.0.dev0",
    },
    "llama-1": {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": -1,
        "temperature": 0,
        "transformers_version": "4.28.0",
    },
    "llama-2-chat": {
        "bos_token_id": 1,
        "do_sample": True,
        "eos_token_id": 2,
        "max_length": 4096,
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": "4.32.0.dev0",
    },
    "mistral": {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "transformers_version": "4.34.0.dev0",
    },
    "marian": {
        "_from_model_config": True,
        "bad_words_ids": [[58100]],
        "bos_token_id": 0,
        "decoder_start_token_id": 58100,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
        "max_length": 512,
        "num_beams": 4,
        "pad_token_id": 58100,
        "transformers_version": "4.27.0.dev0",
    },
    "gemma-2": {
        "_from_model_config": True,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "pad_token_id": 0,
        "transformers_version": "4.42.0.dev0",
    },
    "phi-3": {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [32000, 32001, 32007],
        "pad_token_id": 32000,
        "transformers_version": "4.39.3",
    },
    "pegasus": {
        "_from_model_config": True,
        "bos_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "forced_eos_token_id": 1,
        "length_penalty": 0.6,
        "max_length": 64,
        "num_beams": 8,
        "pad_token_id": 0,
        "transformers_version": "4.27.0.dev0",
    },
    "nulls": {"temperature": None, "top_k": 0, "pad_token_id": None, "max_new_tokens": 512},
}


@pytest.mark.parametrize("content", REAL.values(), ids=REAL.keys())
def test_real_files_round_trip(content, tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(content))
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == content
    config.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == content
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert again == config and again.to_diff_dict() == content


SOUND = [name for name in REAL if name not in ("llama-1", "whisper", "nulls")]


@pytest.mark.parametrize("name", [*SOUND, "whisper"])
def test_files_pass_through_transformers_and_back(name, tmp_path):
    """What we write they read, and what they write of it we read, with the same meaning."""
    ours = GenerationConfig.from_dict(REAL[name])
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = GenerationConfig.from_pretrained(tmp_path / "theirs")
    for key, value in REAL[name].items():
        if key not in ("transformers_version", "_from_model_config"):
            assert getattr(theirs, key) == value and getattr(again, key) == value, key
    for field in FIELDS:
        assert getattr(again, field) == getattr(ours, field), field


# Objects of any class may stand in these; the backend looks at them when it is called.
OBJECTS = ("constraints", "cache_config")


@pytest.mark.parametrize("field", [name for name in FIELDS if name not in OBJECTS])
def test_every_field_is_checked_when_it_is_set(field):
    with pytest.raises(GenerationError, match=field):
        GenerationConfig(**{field: object()})


def test_strategies_that_exclude_each_other():
    with pytest.raises(GenerationError, match=r"dola_layers is for one .*Pass num_beams=1"):
        GenerationConfig(dola_layers="low", num_beams=2)
    for others in ({"do_sample": True}, {"num_beams": 2}, {"top_k": 1}):
        assert (
            "contrastive search is neither"
            in GenerationConfig(penalty_alpha=0.5, **others).hints()["penalty_alpha"]
        )
    assert GenerationConfig(penalty_alpha=0.5, top_k=4).hints() == {}


@pytest.mark.parametrize("name", SOUND)
def test_real_files_mean_what_transformers_reads(name):
    ours, theirs = GenerationConfig.from_dict(REAL[name]), transformers.GenerationConfig.from_dict(REAL[name])
    for field, default in theirs._get_default_generation_params().items():
        expected = getattr(theirs, field)
        assert getattr(ours, field) == (default if expected is None else expected), field


def test_defaults_are_those_of_the_ecosystem():
    for field, default in transformers.GenerationConfig()._get_default_generation_params().items():
        assert getattr(GenerationConfig(), field) == default, field


def test_every_field_of_transformers_is_known():
    theirs = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert theirs - set(FIELDS) == {"transformers_version"}


def test_unset_differs_from_default():
    config = GenerationConfig(temperature=1.0, top_k=None)
    assert config.is_set("temperature") and not config.is_set("top_p") and not config.is_set("top_k")
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (1.0, 1.0, 50, None)
    assert config.to_diff_dict() == {"temperature": 1.0, "top_k": None}
    assert config.to_dict()["top_p"] == 1.0
    config.temperature = None
    assert not config.is_set("temperature") and config.temperature == 1.0
    del config.temperature
    with pytest.raises(AttributeError, match="no set field 'temperature'"):
        del config.temperature


def test_values_of_other_libraries_become_plain_ones():
    config = GenerationConfig(
        max_new_tokens=np.int64(5),
        temperature=np.float32(0.5),
        eos_token_id=(np.int32(1), 2),
        do_sample=np.True_,
    )
    assert config.to_diff_dict() == {
        "max_new_tokens": 5, "temperature": 0.5, "eos_token_id": [1, 2], "do_sample": True
    }  # fmt: skip
    assert all(type(v) in (int, float, list, bool) for v in config.to_diff_dict().values())


def test_biases_with_tuples_are_written_as_lists():
    config = GenerationConfig(sequence_bias={(5, 6): -2.0})
    assert json.loads(config.to_json_string())["sequence_bias"] == [[[5, 6], -2.0]]


def test_copies_and_pickles():
    config = GenerationConfig.from_dict(REAL["whisper"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config and twin.no_timestamps_token_id == 50363
        twin.max_length = 3
        twin.no_timestamps_token_id = 1
        assert config.max_length == 448 and config.no_timestamps_token_id == 50363
    assert config != GenerationConfig() and config != "x"
    assert GenerationConfig(top_k=50) == GenerationConfig()


# -- unknown names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda: GenerationConfig(temprature=0.5),
        lambda: setattr(GenerationConfig(), "temprature", 0.5),
        lambda: GenerationConfig.from_dict({}, temprature=0.5),
    ],
)
def test_an_unknown_field_names_the_nearest(use):
    with pytest.raises(UnknownArgumentError, match=r"no field 'temprature' .*Did you mean 'temperature'\?"):
        use()


def test_reading_an_unknown_field_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"no field 'max_new_token'\. Did you mean 'max_new_tokens'"):
        GenerationConfig().max_new_token  # noqa: B018
    assert not hasattr(GenerationConfig(), "no_timestamps_token_id")


def test_an_argument_of_generate_is_no_field():
    with pytest.raises(
        UnknownArgumentError, match=r"streamer is an argument of generate.*generate\(\.\.\., streamer="
    ):
        GenerationConfig(streamer=1)


def test_update_returns_what_is_no_field():
    config = GenerationConfig(top_k=5)
    assert config.update(top_k=7, top_p=0.5, foo=1) == {"foo": 1}
    assert (config.top_k, config.top_p) == (7, 0.5)
    assert config.update(defaults_only=True, top_k=9, min_p=0.1) == {}
    assert (config.top_k, config.min_p) == (7, 0.1)
    assert config.update(allow_custom_entries=True, foo=1) == {} and config.foo == 1
    with pytest.raises(GenerationError):
        config.update(top_p=0.9, top_k=-1)
    assert config.top_p == 0.5


# -- values that cannot work ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"temperature": -1}, r"temperature cannot be -1: expected a number of 0 or more\. Leave it out"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"temperature": float("nan")}, "temperature cannot be nan"),
        ({"temperature": 0.0, "do_sample": True}, r"temperature cannot be 0 when sampling.*do_sample=False"),
        ({"top_p": 0.0}, r"top_p cannot be 0\.0: expected a number above 0 and up to 1.*do_sample=False"),
        ({"top_p": 1.2}, "top_p cannot be 1.2"),
        ({"top_k": -1}, "top_k cannot be -1: expected a whole number of 0 or more"),
        ({"top_k": 1.5}, "top_k cannot be 1.5"),
        ({"min_p": 2}, "min_p cannot be 2"),
        ({"max_length": -3}, "max_length cannot be -3"),
        ({"max_new_tokens": 0}, "max_new_tokens cannot be 0: expected a whole number of 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens cannot be True"),
        ({"min_length": -1}, "min_length cannot be -1"),
        ({"max_time": 0}, "max_time cannot be 0"),
        ({"num_beams": 0}, "num_beams cannot be 0"),
        ({"early_stopping": "maybe"}, "early_stopping cannot be 'maybe': expected one of True, False"),
        ({"do_sample": "yes"}, "do_sample cannot be 'yes'"),
        ({"repetition_penalty": 0}, "repetition_penalty cannot be 0"),
        ({"bad_words_ids": [3]}, r"bad_words_ids cannot be \[3\]: expected a list of words"),
        ({"sequence_bias": {(): 1.0}}, "sequence_bias cannot be"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id cannot be \[1, -2\]"),
        ({"pad_token_id": "<pad>"}, "pad_token_id cannot be '<pad>'"),
        ({"stop_strings": [""]}, "stop_strings cannot be"),
        ({"exponential_decay_length_penalty": (1,)}, "exponential_decay_length_penalty cannot be"),
        ({"min_length": 9, "max_length": 5}, r"min_length=9 is more than max_length=5.*Lower min_length"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens=9 is more than max_new_tokens=5"),
        ({"num_return_sequences": 2}, r"=2 would repeat it.*do_sample=True"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 is more than num_beams=2"),
        ({"forced_eos_token_id": 2, "suppress_tokens": [2]}, r"forced_eos_token_id=\[2\] is also in"),
        ({"low_memory": True}, "low_memory is gone"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_when_it_is_set(fields, text):
    with pytest.raises(GenerationError, match=text):
        GenerationConfig(**fields)


def test_a_bad_file_is_read_and_refused_only_when_used(tmp_path, caplog):
    config = GenerationConfig.from_dict({"top_k": -5, "do_sample": True, "eos_token_id": 2})
    assert "cannot be used as it is (top_k cannot be -5)" in caplog.text
    with pytest.raises(GenerationError, match="top_k cannot be -5"):
        config.validate()
    config.save_pretrained(tmp_path)
    assert "Saving a generation config that needs a look: top_k cannot be -5" in caplog.text
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_k"] == -5
    config.top_k = 5
    config.validate()


def test_what_plays_no_part_does_not_disturb():
    GenerationConfig.from_dict({"temperature": 0.0, "top_p": 0.0, "pad_token_id": -1}).validate()


def test_fields_without_effect_are_told_and_refused_only_if_strict():
    config = GenerationConfig(temperature=0.7, length_penalty=2.0, output_scores=True, max_cache_len=9)
    assert set(config.hints()) == {"temperature", "length_penalty", "output_scores", "max_cache_len"}
    config.validate()
    with pytest.raises(GenerationError, match=r"temperature has no effect.*set do_sample=True"):
        GenerationConfig(temperature=0.7).validate(strict=True)
    assert set(GenerationConfig(use_cache=False, cache_implementation="static").hints()) == {
        "cache_implementation"
    }


# -- files ---------------------------------------------------------------------------------------


def test_overrides_and_unused_arguments(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    config, unused = GenerationConfig.from_pretrained(tmp_path, return_unused_kwargs=True, top_k=4, foo=5)
    assert config.top_k == 4 and unused == {"foo": 5}
    with pytest.raises(UnknownArgumentError, match="no field 'foo'"):
        GenerationConfig.from_pretrained(tmp_path, foo=5)
    (tmp_path / "other.json").write_text('{"top_k": 8}')
    assert GenerationConfig.from_pretrained(tmp_path, "other.json").top_k == 8


def test_absent_and_broken_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="saved into a folder"):
        GenerationConfig().save_pretrained(tmp_path / "generation_config.json")


def test_from_an_old_config_json():
    old = {
        "model_type": "t5", "max_length": 50, "eos_token_id": 1, "pad_token_id": 0, "num_beams": 1,
        "task_specific_params": {"summarization": {"num_beams": 4}}, "decoder": {"bos_token_id": 7},
    }  # fmt: skip
    config = GenerationConfig.from_model_config(old)
    assert config.to_diff_dict() == {
        "max_length": 50, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 7, "_from_model_config": True
    }  # fmt: skip


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "greedy_search"),
        ({"do_sample": True}, "sample"),
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "group_beam_search"),
        ({"num_beams": 2, "force_words_ids": [[1]]}, "constrained_beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"dola_layers": "low"}, "dola_generation"),
    ],
)
def test_modes_are_those_of_transformers(fields, mode):
    assert GenerationConfig(**fields).get_generation_mode() == mode
    assert GenerationConfig(**fields).get_generation_mode() is GenerationMode(mode)
    assert transformers.GenerationConfig(**fields).get_generation_mode().value == mode


def test_an_assistant_makes_it_assisted():
    assert GenerationConfig().get_generation_mode(object()) == "assisted_generation"
