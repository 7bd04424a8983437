# SPDX-License-Identifier: Apache-2.0
"""Reading both spellings of rotary positions, the frequencies of every scaling, and what is refused."""

import json

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrained.arch.llama import LlamaConfig, SmolLM3Config
from pretrained.arch.rope import rope_table
from pretrained.errors import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 100 for i in range(32)],
    "long_factor": [2 + i / 8 for i in range(32)],
    "original_max_position_embeddings": 512,
}


# Half the channels of a head.
PAIRS = 32


FACTORS = ("short_factor", "long_factor")


def config(**values):
    sizes = {"hidden_size": 8 * PAIRS, "num_attention_heads": 4, "max_position_embeddings": 2048}
    return LlamaConfig(**{**sizes, **values})


# -- frequencies ---------------------------------------------------------------------------------


def test_plain_frequencies_by_hand():
    table = rope_table({"rope_theta": 10000.0}, head_size=8, max_position_embeddings=64)
    assert table.inv_freq.dtype == np.float32
    assert np.allclose(table.inv_freq, [1.0, 0.1, 0.01, 0.001], rtol=1e-7)
    assert (table.attention_scaling, table.long_inv_freq, table.dynamic) == (1.0, None, None)


def test_linear_frequencies_by_hand():
    table = rope_table({"rope_type": "linear", "factor": 4}, head_size=8, max_position_embeddings=64)
    assert np.allclose(table.inv_freq, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-7)


def test_dynamic_frequencies_depend_on_the_length():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    table = rope_table(parameters, head_size=8, max_position_embeddings=64)
    assert table.dynamic == (100.0, 2.0, 64)
    assert np.allclose(table.inv_freq, 100.0 ** -np.arange(0, 1, 0.25), rtol=1e-7)


def test_longrope_switches_after_the_original_length():
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]}
    table = rope_table({**LONGROPE, **factors}, head_size=8, max_position_embeddings=2048)
    assert table.switch_length == 512
    plain = [1.0, 0.1, 0.01, 0.001]
    assert np.allclose(table.inv_freq * factors["short_factor"], plain, rtol=1e-6)
    assert np.allclose(table.long_inv_freq * factors["long_factor"], plain, rtol=1e-6)
    assert table.attention_scaling == pytest.approx((1 + np.log(4) / np.log(512)) ** 0.5)


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3-32": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 100},
    "yarn": YARN,
    "yarn-attention": {**YARN, "attention_factor": 0.7},
    "yarn-betas": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn-whole": {**YARN, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-one": {**YARN, "factor": 1.0},
    "yarn-short": {**YARN, "original_max_position_embeddings": 4},
    "longrope": {**LONGROPE, "factor": 4.0},
    "longrope-derived": LONGROPE,
    "longrope-attention": {**LONGROPE, "attention_factor": 1.5, "factor": 4.0},
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name, theta):
    ours = config(rope_scaling=SCALINGS[name], rope_theta=theta)
    theirs = transformers.LlamaConfig.from_dict(ours.to_dict())
    table = ours.rope_table()
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](theirs, "cpu")
    # Theirs is computed in float32.
    np.testing.assert_allclose(table.inv_freq, inv_freq.numpy(), rtol=1e-6)
    assert table.attention_scaling == pytest.approx(scaling, rel=1e-6)
    if table.long_inv_freq is not None:
        long, _ = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=513)
        np.testing.assert_allclose(table.long_inv_freq, long.numpy(), rtol=1e-6)


def test_a_length_beside_the_parameters_wins():
    parameters = {**YARN, "original_max_position_embeddings": 64}
    inside = config(rope_scaling=parameters).rope_table()
    beside = config(rope_scaling=parameters, original_max_position_embeddings=512).rope_table()
    assert np.array_equal(beside.inv_freq, config(rope_scaling=YARN).rope_table().inv_freq)
    assert not np.array_equal(beside.inv_freq, inside.inv_freq)


# -- spellings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 1e4, "rope_scaling": {k.replace("rope_", ""): v for k, v in LONGROPE.items()}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "su", **{k: LONGROPE[k] for k in FACTORS}}},
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["theta", "null", "llama3", "linear", "longrope", "su", "both", "new", "new llama3"],
)
def test_a_config_is_written_in_the_spelling_it_had(values, tmp_path):
    written = config(**values).to_diff_dict()
    mentioned = {key: written[key] for key in written if key.startswith("rope")}
    assert mentioned == values
    first = config(**values)
    first.save_pretrained(tmp_path)
    again = LlamaConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == first.rope_parameters
    assert json.loads(again.to_json_string()) == json.loads(first.to_json_string())


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
def test_both_spellings_mean_the_same(scaling):
    old = config(rope_theta=5e5, rope_scaling=scaling)
    new = config(rope_parameters={"rope_theta": 5e5, "rope_type": "default", **(scaling or {})})
    assert old.rope_parameters == new.rope_parameters
    assert (old.rope_theta, old.rope_scaling) == (new.rope_theta, new.rope_scaling) == (5e5, scaling)
    assert np.array_equal(old.rope_table().inv_freq, new.rope_table().inv_freq)


def test_defaults_without_any_spelling():
    assert config().rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert SmolLM3Config().rope_theta == 2000000.0
    assert "rope_parameters" not in config().to_diff_dict()


def test_the_old_attributes_can_be_set():
    ours = config(rope_scaling=YARN)
    ours.rope_theta = 123.0
    assert ours.rope_parameters == {**YARN, "rope_theta": 123.0}
    ours.rope_scaling = {"type": "linear", "factor": 3.0}
    assert ours.rope_theta == 123.0 and ours.rope_scaling["factor"] == 3.0
    ours.rope_scaling = None
    assert ours.rope_scaling is None and ours.rope_parameters == {"rope_theta": 123.0, "rope_type": "default"}


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, r"Unknown RoPE scaling 'yarm'.*'yarn'\?"),
        ({"rope_scaling": {"type": ["yarn"]}}, "Unknown RoPE scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"'linear' lacks factor .*Add 'factor' to rope"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' lacks low_freq_factor, high_freq_factor",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "lacks short_factor, long_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks factor"),
        ({"rope_scaling": "linear"}, r"rope_scaling is not an object .*found 'linear'"),
        ({"rope_parameters": [1]}, r"rope_parameters"),
        ({"rope_theta": 0.0}, "rope_theta is not a positive number"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"head_dim": 7}, r"positive rope_theta and an even head size .*found 10000\.0, 7"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, r"wrong length.*expected 32.*found 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "Only a part of each head"),
        ({"rope_scaling": SCALINGS["dynamic"], "head_dim": 2}, r"heads of 4 channels .*found 2"),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}}, "original length above 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_rotary_positions_that_cannot_be(values, text):
    with pytest.raises(ConfigError, match=text):
        config(**values)
