# SPDX-License-Identifier: Apache-2.0
"""What the battery does not reach in RoBERTa: positions around padding, generation, its head's bias."""

import pytest
import torch

from pretrained.arch.roberta import RobertaConfig
from pretrained.errors import ArgumentError
from pretrained.testing.battery import Case, assert_close
from pretrained.torch.models import roberta
from support.cases_bert import TINY_BERT, encoder_output
from support.oracle import transformers_twin

PAD = 1


def build(cls, **config):
    return Case(cls, {**TINY_BERT, **config}).build()


def ids(length=11, rows=3, seed=1):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def seen_positions(model, **inputs):
    """Return the positions that a forward looks up."""
    seen = []
    model.roberta.embeddings.position_embeddings.register_forward_hook(
        lambda m, args, out: seen.append(args[0])
    )
    with torch.no_grad():
        model(**inputs)
    return seen[0].tolist()


def test_positions_start_after_the_padding_token_and_skip_padding():
    model = build(roberta.RobertaForMaskedLM)
    tokens = torch.tensor([[PAD, PAD, 5, 6, 7], [5, 6, 7, PAD, PAD]])
    assert seen_positions(model, input_ids=tokens) == [[1, 1, 2, 3, 4], [2, 3, 4, 1, 1]]


def test_positions_of_embeddings_count_all_tokens():
    model = build(roberta.RobertaForMaskedLM)
    assert seen_positions(model, inputs_embeds=torch.zeros(2, 4, 32)) == [[2, 3, 4, 5]]


def test_positions_given_are_taken():
    model = build(roberta.RobertaForMaskedLM)
    given = torch.tensor([[9, 8, 7]])
    assert seen_positions(model, input_ids=ids(3, 1), position_ids=given) == [[9, 8, 7]]


def test_padding_may_reach_beyond_the_positions():
    """24 rows of positions hold 22 tokens, for two are below the first; padding needs none."""
    model = build(roberta.RobertaForMaskedLM)
    tokens = torch.cat([ids(22), torch.full((3, 4), PAD)], dim=1)
    with torch.no_grad():
        padded = model(tokens, attention_mask=(tokens != PAD).long()).logits[:, :22]
        assert_close(padded, model(tokens[:, :22]).logits, "padded")
    with pytest.raises(ArgumentError, match=r"(?s)at most 22 tokens.*23 tokens"):
        model(ids(23))
    with pytest.raises(ArgumentError, match=r"(?s)at most 22 tokens.*23 tokens"):
        model(inputs_embeds=torch.zeros(1, 23, 32))


def test_the_padding_row_of_positions_is_not_trained():
    model = build(roberta.RobertaForMaskedLM)
    tokens = torch.cat([ids(4), torch.full((3, 2), PAD)], dim=1)
    model(tokens, labels=tokens).loss.backward()
    gradient = model.roberta.embeddings.position_embeddings.weight.grad
    assert not gradient[PAD].any() and gradient[2].any()


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("cross", [False, True], ids=["alone", "with-encoder"])
def test_greedy_tokens_follow_the_oracles_forward(cross, padding):
    """Against the oracle's forward, token by token: its own generate counts positions from 0 instead."""
    model = build(roberta.RobertaForCausalLM, is_decoder=True, add_cross_attention=cross)
    twin, extra = transformers_twin(model), encoder_output(model.config) if cross else {}
    tokens = ids(6)
    mask = torch.ones_like(tokens)
    tokens[0, :padding], mask[0, :padding] = PAD, 0
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": mask,
        **extra,
    }
    found = model.generate(tokens, **settings)
    expected = tokens
    with torch.no_grad():
        for _ in range(6):
            more = {"attention_mask": torch.nn.functional.pad(mask, (0, expected.shape[1] - 6), value=1)}
            logits = twin(expected, use_cache=False, **more, **extra).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), expected)


def test_the_bias_is_one_tensor(tmp_path):
    model = build(roberta.RobertaForMaskedLM)
    assert model.lm_head.decoder.bias is model.lm_head.bias
    model.save_pretrained(tmp_path)
    loaded = roberta.RobertaForMaskedLM.from_pretrained(tmp_path)
    assert loaded.lm_head.decoder.bias is loaded.lm_head.bias
    assert torch.equal(loaded.lm_head.bias, model.lm_head.bias)


def test_relative_positions_are_bert_s():
    model = build(roberta.RobertaModel, position_embedding_type="relative_key_query")
    with torch.no_grad():
        before = model(ids()).last_hidden_state
        model.embeddings.position_embeddings.weight.add_(1.0)
        assert torch.equal(model(ids()).last_hidden_state, before)
        model.encoder.layer[0].attention.self.distance_embedding.weight.add_(torch.arange(47.0)[:, None])
        assert not torch.allclose(model(ids()).last_hidden_state, before)


def test_multiple_choice_does_not_know_classifier_dropout():
    config = RobertaConfig(**TINY_BERT, hidden_dropout_prob=0.25)
    assert roberta.RobertaForMultipleChoice(config).dropout.p == 0.25
    assert roberta.RobertaForTokenClassification(config).dropout.p == 0.3
