# SPDX-License-Identifier: Apache-2.0
"""What the battery does not reach in DistilBERT: sinusoids, pruned layers, files, what is refused."""

import math

import pytest
import torch

from pretrained.arch.distilbert import DistilBertConfig
from pretrained.errors import ArgumentError, ConfigError
from pretrained.testing.battery import Case, assert_close
from pretrained.torch.models import distilbert
from support.cases_bert import TINY_DISTILBERT
from support.oracle import transformers_twin


def build(cls, **config):
    return Case(cls, {**TINY_DISTILBERT, **config}).build()


def ids(length=11, rows=3, seed=1):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_sinusoids_are_those_of_the_paper():
    table = distilbert.sinusoids(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert float(table[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_new_model_has_sinusoids_that_are_not_trained():
    config = DistilBertConfig(**TINY_DISTILBERT, sinusoidal_pos_embds=True)
    model = distilbert.DistilBertForSequenceClassification(config)
    positions = model.get_position_embeddings().weight
    assert torch.equal(positions, distilbert.sinusoids(24, 32)) and not positions.requires_grad
    learned = distilbert.DistilBertModel(DistilBertConfig(**TINY_DISTILBERT)).get_position_embeddings()
    assert learned.weight.requires_grad


def test_sinusoids_fill_in_for_a_file_without_them():
    config = DistilBertConfig(**TINY_DISTILBERT, sinusoidal_pos_embds=True)
    state = distilbert.DistilBertModel(config).state_dict()
    del state["embeddings.position_embeddings.weight"]
    model = distilbert.DistilBertModel.from_pretrained(
        None, config=config, state_dict=state, allow_missing=True
    )
    assert torch.equal(model.get_position_embeddings().weight, distilbert.sinusoids(24, 32))


def test_pruned_layers_do_what_silenced_heads_do(tmp_path):
    full, silenced = build(distilbert.DistilBertModel), build(distilbert.DistilBertModel)
    state, path = full.state_dict(), "transformer.layer.1.attention"
    keep = torch.arange(8, 32)
    for name in ("q_lin", "k_lin", "v_lin"):
        for leaf in ("weight", "bias"):
            state[f"{path}.{name}.{leaf}"] = state[f"{path}.{name}.{leaf}"][keep]
    state[f"{path}.out_lin.weight"] = state[f"{path}.out_lin.weight"][:, keep]
    with torch.no_grad():
        silenced.get_parameter(f"{path}.out_lin.weight")[:, :8] = 0
    config = DistilBertConfig(**TINY_DISTILBERT, pruned_heads={"1": [0]})
    distilbert.DistilBertModel.from_pretrained(None, config=config, state_dict=state).save_pretrained(
        tmp_path
    )
    pruned = distilbert.DistilBertModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(pruned(ids())[0], silenced(ids())[0], "pruned")


def test_the_body_loads_from_a_file_with_a_head(tmp_path):
    source = build(distilbert.DistilBertForMaskedLM)
    source.save_pretrained(tmp_path)
    model, info = distilbert.DistilBertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert len(info["missing_keys"]) == 4 and all("classifier" in key for key in info["missing_keys"])
    assert all(key.startswith("vocab_") for key in info["unexpected_keys"])
    ours, theirs = model.distilbert(ids())[0], source.distilbert(ids())[0]
    assert torch.equal(ours, theirs)


def test_positions_given_are_taken():
    model = build(distilbert.DistilBertModel)
    given = torch.arange(11).flip(0).expand(3, -1)
    theirs = transformers_twin(model)(ids(), position_ids=given).last_hidden_state
    assert_close(model(ids(), position_ids=given).last_hidden_state, theirs, "positions")


def test_too_long_an_input_is_refused():
    with pytest.raises(ArgumentError, match=r"(?s)at most 24 tokens.*25 tokens"):
        build(distilbert.DistilBertModel)(ids(25))


def test_question_answering_has_two_outputs():
    with pytest.raises(ConfigError, match="scores the two ends of an answer"):
        distilbert.DistilBertForQuestionAnswering(DistilBertConfig(**TINY_DISTILBERT, num_labels=5))


def test_there_are_no_segments():
    with pytest.raises(TypeError, match="token_type_ids"):
        build(distilbert.DistilBertModel)(ids(), token_type_ids=torch.zeros(3, 11, dtype=torch.int64))
