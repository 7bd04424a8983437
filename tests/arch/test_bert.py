# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from pretrained.arch.bert import BASE_MODEL_PREFIX, KEY_RULES, BertConfig, language_head_ties, skeleton
from pretrained.core.keys import match_keys
from pretrained.errors import ConfigError

# The published config.json of bert-base-uncased, and one that transformers 5 writes.
OLD = """{
  "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
  "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
  "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
  "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
  "position_embedding_type": "absolute",
  "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522
}"""
NEW = """{
  "add_cross_attention": false, "architectures": ["BertForSequenceClassification"], "bos_token_id": null,
  "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0, "dtype": "float32", "eos_token_id": null,
  "hidden_act": "gelu", "hidden_dropout_prob": 0, "hidden_size": 64, "id2label": {"0": "no", "1": "yes"},
  "initializer_range": 0.02, "intermediate_size": 96, "is_decoder": false, "label2id": {"no": 0, "yes": 1},
  "layer_norm_eps": 1e-12, "max_position_embeddings": 32, "model_type": "bert", "num_attention_heads": 4,
  "num_hidden_layers": 3, "pad_token_id": 0, "problem_type": "single_label_classification",
  "tie_word_embeddings": true, "transformers_version": "5.2.0", "type_vocab_size": 2, "use_cache": true,
  "vocab_size": 100
}"""
# What transformers 4 writes after model.prune_heads({0: [1, 3], 2: [0]}).
PRUNED = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100}
PRUNED |= {"intermediate_size": 96, "pruned_heads": {"0": [1, 3], "2": [0]}}


@pytest.mark.parametrize("text", [OLD, NEW], ids=["old", "new"])
def test_a_published_config_is_read_and_written_back(text):
    values = json.loads(text)
    config = BertConfig.from_dict(values)
    written = json.loads(config.to_json_string())
    for name, value in values.items():
        assert written[name] == value, name
    again = BertConfig.from_dict(written)
    assert again == config


def test_unknown_keys_are_kept():
    config = BertConfig.from_dict(json.loads(OLD) | {"directionality": "bidi", "pooler_fc_size": 768})
    assert config.directionality == "bidi"
    assert json.loads(config.to_json_string())["pooler_fc_size"] == 768


def test_a_classifier_falls_back_to_the_hidden_dropout():
    assert BertConfig(hidden_dropout_prob=0.25).head_dropout == 0.25
    assert BertConfig(hidden_dropout_prob=0.25, classifier_dropout=0.0).head_dropout == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size is too small"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is too small"),
        ({"chunk_size_feed_forward": -2}, "chunk_size_feed_forward is too small"),
        ({"vocab_size": 10, "pad_token_id": 10}, "padding token is not in the vocabulary"),
        ({"position_embedding_type": "relative_keys"}, "Did you mean 'relative_key'"),
        ({"add_cross_attention": True}, "Only a decoder looks at an encoder"),
        ({"pruned_heads": {"12": [0]}}, "a head that the model does not have"),
        ({"pruned_heads": {"0": [12]}}, "a head that the model does not have"),
        ({"pruned_heads": {"0": list(range(12))}}, "without any head"),
        ({"hidden_act": 3}, "hidden_act has a value of the wrong type"),
        ({"hidden_size": "768"}, "hidden_size has a value of the wrong type"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message):
        BertConfig(**values)


def test_base_promises_as_many_weights_as_published():
    config = BertConfig.from_dict(json.loads(OLD))
    assert skeleton(config).num_parameters == 109_482_240
    # With the head of masked language modelling, whose decoder is the word embedding, and no pooler.
    head = 768 * 768 + 768 + 2 * 768 + 30522
    assert skeleton(config, "ForMaskedLM").num_parameters == 109_482_240 - (768 * 768 + 768) + head


def test_pruned_layers_are_smaller():
    params = skeleton(BertConfig.from_dict(PRUNED)).params
    shapes = [params[f"encoder.layer.{i}.attention.self.query.weight"].shape for i in range(3)]
    assert shapes == [(32, 64), (64, 64), (48, 64)]
    assert params["encoder.layer.2.attention.output.dense.weight"].shape == (64, 48)


def test_relative_positions_add_a_table_of_distances_to_each_layer():
    config = BertConfig(**PRUNED | {"pruned_heads": {}}, position_embedding_type="relative_key")
    spec = skeleton(config).params["encoder.layer.1.attention.self.distance_embedding.weight"]
    assert spec.shape == (2 * 512 - 1, 16) and spec.block == "encoder.layer.1"


def test_a_cross_attention_keeps_every_head_and_no_distances():
    facts = {"is_decoder": True, "add_cross_attention": True, "position_embedding_type": "relative_key"}
    params = skeleton(BertConfig(**PRUNED, **facts), "LMHeadModel").params
    path = "bert.encoder.layer.0.crossattention.self"
    assert params[f"{path}.query.weight"].shape == (64, 64)
    assert f"{path}.distance_embedding.weight" not in params


@pytest.mark.parametrize("pooler", [True, False])
def test_a_pooler_only_where_it_is_wanted(pooler):
    config = BertConfig(**PRUNED)
    assert ("pooler.dense.weight" in skeleton(config, add_pooling_layer=pooler).params) is pooler
    assert "bert.pooler.dense.weight" in skeleton(config, "ForSequenceClassification").params
    assert "bert.pooler.dense.weight" not in skeleton(config, "ForTokenClassification").params


def test_names_of_old_files_find_their_weights():
    promised = skeleton(BertConfig(**PRUNED), "ForMaskedLM")
    old = [key.replace("LayerNorm.weight", "LayerNorm.gamma") for key in promised.params]
    old = [key.replace("LayerNorm.bias", "LayerNorm.beta") for key in old]
    old = [key for key in old if key != "cls.predictions.decoder.bias"] + ["bert.embeddings.position_ids"]
    match = match_keys(
        old, promised.params, ties=promised.ties, base_prefix=BASE_MODEL_PREFIX, rules=KEY_RULES
    )
    assert not match.missing and not match.unexpected
    assert match.sources["bert.embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert match.sources["cls.predictions.decoder.bias"] == "cls.predictions.bias"
    assert list(match.dropped) == ["bert.embeddings.position_ids"]


def test_the_bias_is_tied_whatever_the_config_says():
    tied = language_head_ties("cls.predictions", "bert", True)
    assert tied == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert language_head_ties("lm_head", "roberta", False) == {"lm_head.bias": "lm_head.decoder.bias"}
