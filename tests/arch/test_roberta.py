# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from pretrained.arch.roberta import CamembertConfig, RobertaConfig, XLMRobertaConfig, skeleton
from pretrained.errors import ConfigError

# The published config.json of roberta-base.
BASE = """{
  "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0,
  "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
  "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
  "max_position_embeddings": 514, "model_type": "roberta", "num_attention_heads": 12,
  "num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 1, "vocab_size": 50265
}"""


def test_a_published_config_is_read_and_written_back():
    values = json.loads(BASE)
    written = json.loads(RobertaConfig.from_dict(values | {"adapters": {"a": 1}}).to_json_string())
    assert written == values | {"adapters": {"a": 1}}


def test_base_promises_as_many_weights_as_published():
    config = RobertaConfig.from_dict(json.loads(BASE))
    assert skeleton(config).num_parameters == 124_645_632
    assert skeleton(config, "ForMaskedLM").num_parameters == 124_697_433


def test_ties_of_the_language_head():
    ties = skeleton(RobertaConfig.from_dict(json.loads(BASE)), "ForCausalLM").ties
    assert ties == {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


@pytest.mark.parametrize("pad", [None, -1, 600])
def test_positions_need_a_padding_token(pad):
    with pytest.raises(ConfigError, match="RoBERTa counts positions from its padding token's id"):
        RobertaConfig(pad_token_id=pad)


@pytest.mark.parametrize(
    ("cls", "model_type"), [(XLMRobertaConfig, "xlm-roberta"), (CamembertConfig, "camembert")]
)
def test_relatives_are_robertas_of_another_name(cls, model_type):
    config = cls.from_dict(json.loads(BASE) | {"model_type": model_type})
    assert isinstance(config, RobertaConfig) and config.to_dict()["model_type"] == model_type
    with pytest.raises(ConfigError, match=f"This config is not a {cls.__name__}"):
        cls.from_dict(json.loads(BASE))
