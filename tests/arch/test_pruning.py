# SPDX-License-Identifier: Apache-2.0
"""What a config may say of pruned heads, and what a call of prune_heads may ask for."""

import json

import pytest

from pretrained.arch.bert import BertConfig
from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.pruning import heads_kept, heads_left, merged_heads
from pretrained.arch.skeletons import kv_cache_bytes
from pretrained.arch.t5 import T5Config
from pretrained.errors import ArgumentError, ConfigError

BERT = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}


def bert(**values):
    return BertConfig(**BERT, **values)


def llama(**values):
    return LlamaConfig(**{**LLAMA, **values})


def test_keys_of_a_file_are_texts_and_come_back_so(tmp_path):
    config = bert(pruned_heads={"2": [3, 1], "0": [2]})
    assert config.pruned_heads == {2: [1, 3], 0: [2]}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["pruned_heads"] == {"0": [2], "2": [1, 3]} and written["num_attention_heads"] == 4
    assert BertConfig.from_pretrained(tmp_path).pruned_heads == config.pruned_heads


def test_numbers_stay_those_from_before_any_cut():
    config = bert(pruned_heads={1: [0, 2]})
    assert heads_kept(config, 1) == (1, 3) and heads_kept(config, 0) == (0, 1, 2, 3)
    assert merged_heads(config, {1: [3], 0: (0,)}) == {0: [0], 1: [0, 2, 3]}


@pytest.mark.parametrize("asked", [{}, {1: []}, {1: [0]}, {1: [2, 0]}, {1: set()}], ids=str)
def test_what_is_gone_may_be_named_again(asked):
    config = bert(pruned_heads={1: [0, 2]})
    assert merged_heads(config, asked) == {1: [0, 2]}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ([0, 1], r"Heads are pruned by layer \(prune_heads\): expected a mapping such as .*found list"),
        ({3: [0]}, r"no such layers to prune \(prune_heads\): expected whole numbers from 0 to 2, found 3"),
        ({-1: [0]}, r"no such layers .*found -1"),
        ({"0": [0]}, r"no such layers .*found '0'"),
        ({True: [0]}, r"no such layers .*found True"),
        (
            {0: [4]},
            r"no such heads to prune \(prune_heads\[0\]\): expected whole numbers from 0 to 3, found 4",
        ),
        ({0: [-1]}, r"no such heads .*found -1"),
        ({0: [1.0]}, r"no such heads .*found 1\.0"),
        ({0: 1}, r"The heads of a layer are a list \(prune_heads\[0\]\).*found 1"),
        ({0: "1"}, r"The heads of a layer are a list .*found '1'"),
        ({1: [2, 2]}, r"A head is named twice \(prune_heads\[1\]\): found \[2, 2\]"),
        ({0: [0, 1, 2, 3]}, r"without any head .*at most 3 of its 4 heads.*Keep one head at least"),
    ],
    ids=str,
)
def test_calls_that_cannot_be_meant(asked, text):
    with pytest.raises(ArgumentError, match=text):
        merged_heads(bert(), asked)


def test_the_last_heads_of_several_calls_stay():
    with pytest.raises(ArgumentError, match=r"without any head .*found \[1, 3\]"):
        merged_heads(bert(pruned_heads={1: [0, 2]}), {1: [1, 3]})


def test_groups_go_whole():
    config = llama(pruned_heads={1: [2, 3]})
    assert (config.heads_left(1), config.kv_heads_left(1), config.kv_heads_left(0)) == (4, 2, 3)
    assert merged_heads(config, {1: [1, 0], 0: [4, 5]}, 2) == {0: [4, 5], 1: [0, 1, 2, 3]}
    text = (
        r"Query heads 2 to 3 share key-value head 1; all go or stay \(prune_heads\[0\]\): "
        r"expected whole groups of 2, such as \[2, 3\], found \[0, 1, 3\]"
    )
    with pytest.raises(ArgumentError, match=text):
        merged_heads(config, {0: [0, 1, 3]}, 2)
    with pytest.raises(ArgumentError, match=r"at most 4 of its 6 heads.*Keep one group of 2 heads at least"):
        merged_heads(config, {1: [0, 1, 4, 5]}, 2)


def test_multi_query_attention_has_no_groups_to_cut():
    with pytest.raises(ArgumentError, match=r"share one key-value head \(multi-query attention\)"):
        merged_heads(llama(num_key_value_heads=1), {0: [1]}, 6)
    with pytest.raises(ArgumentError, match=r"without any head"):
        merged_heads(llama(num_key_value_heads=1), {0: range(6)}, 6)


@pytest.mark.parametrize(
    ("build", "pruned", "text"),
    [
        (llama, {0: [1]}, r"cuts through groups .*pruned_heads\[0\]\): expected whole groups of 2"),
        (llama, {2: [0, 1]}, "a head that the model does not have"),
        (llama, {0: list(range(6))}, "without any head"),
        (T5Config, {6: [0]}, "a head that the model does not have"),
        (T5Config, {0: list(range(8))}, "without any head"),
    ],
    ids=["llama-groups", "llama-absent", "llama-all", "t5-absent", "t5-all"],
)
def test_configs_that_cannot_be(build, pruned, text):
    with pytest.raises(ConfigError, match=text):
        build(pruned_heads=pruned)


def test_caches_are_as_small_as_the_layers():
    whole = kv_cache_bytes(llama(), 1, 10, "float32")
    assert whole == (2 * 3 * 8 * 10 * 4,) * 2
    assert kv_cache_bytes(llama(pruned_heads={1: [0, 1]}), 1, 10, "float32") == (whole[0], whole[0] * 2 // 3)
    gpt2 = GPT2Config(n_layer=2, n_head=4, n_embd=32, pruned_heads={0: [1]})
    assert kv_cache_bytes(gpt2, 1, 10, "float32") == (2 * 3 * 8 * 10 * 4, 2 * 4 * 8 * 10 * 4)


@pytest.mark.parametrize("build", [BertConfig, GPT2Config, LlamaConfig, T5Config])
def test_a_config_that_claims_any_number_of_heads_takes_no_memory(build):
    claims = {"num_attention_heads": 10**18, "hidden_size": 2 * 10**18, "pruned_heads": {0: [10**17]}}
    if build is LlamaConfig:
        claims["num_key_value_heads"] = 10**18
    config = build(**claims)
    assert heads_left(config, 0) == 10**18 - 1
    with pytest.raises(ConfigError):
        build(**{**claims, "pruned_heads": {0: [10**18]}})
