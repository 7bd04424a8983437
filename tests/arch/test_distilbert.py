# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from pretrained.arch.distilbert import BASE_MODEL_PREFIX, KEY_RULES, DistilBertConfig, skeleton
from pretrained.core.keys import match_keys
from pretrained.errors import ConfigError

# The published config.json of distilbert-base-uncased.
BASE = """{
  "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": 768,
  "dropout": 0.1, "hidden_dim": 3072, "initializer_range": 0.02, "max_position_embeddings": 512,
  "model_type": "distilbert", "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
  "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": false, "tie_weights_": true,
  "transformers_version": "4.10.0.dev0", "vocab_size": 30522
}"""


def test_a_published_config_is_read_and_written_back():
    values = json.loads(BASE)
    config = DistilBertConfig.from_dict(values)
    assert json.loads(config.to_json_string()) == values
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (768, 12, 6)


def test_common_names_set_its_own():
    config = DistilBertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    assert (config.dim, config.n_layers, config.n_heads) == (64, 2, 4)


def test_base_promises_as_many_weights_as_published():
    config = DistilBertConfig.from_dict(json.loads(BASE))
    assert skeleton(config).num_parameters == 66_362_880
    assert skeleton(config, "ForMaskedLM").num_parameters == 66_985_530
    assert skeleton(config, "ForSequenceClassification").num_parameters == 66_955_010


def test_pruned_layers_are_smaller():
    config = DistilBertConfig(dim=64, n_heads=4, n_layers=2, pruned_heads={"1": [0, 3]})
    params = skeleton(config).params
    assert params["transformer.layer.0.attention.out_lin.weight"].shape == (64, 64)
    assert params["transformer.layer.1.attention.out_lin.weight"].shape == (64, 32)
    assert params["transformer.layer.1.attention.k_lin.bias"].shape == (32,)


def test_position_numbers_of_old_files_are_dropped():
    promised = skeleton(DistilBertConfig(dim=64, n_heads=4, n_layers=1))
    keys = [f"distilbert.{key}" for key in promised.params] + ["distilbert.embeddings.position_ids"]
    match = match_keys(keys, promised.params, base_prefix=BASE_MODEL_PREFIX, rules=KEY_RULES)
    assert not match.missing and not match.unexpected and len(match.dropped) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 30, "n_heads": 4}, "dim is not a multiple of n_heads"),
        ({"n_layers": -1}, "num_hidden_layers is too small .*n_layers"),
        ({"hidden_dim": 0}, "hidden_dim is too small"),
        ({"pruned_heads": {"6": [0]}}, "a head that the model does not have"),
        ({"sinusoidal_pos_embds": "no"}, "sinusoidal_pos_embds has a value of the wrong type"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        DistilBertConfig(**values)
