# SPDX-License-Identifier: Apache-2.0
"""What decoders' heads share: which token counts, and what they pass on."""

import pytest
import torch

from pretrained.errors import ArgumentError
from pretrained.testing.battery import Case
from pretrained.torch.heads import last_logits, last_tokens
from pretrained.torch.models.llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from support.cases import TINY_LLAMA

PAD = 0


def test_last_logits_keeps_what_is_wanted():
    states = torch.arange(2 * 5 * 3).view(2, 5, 3)
    assert last_logits(states, 0) is states
    assert torch.equal(last_logits(states, 2), states[:, 3:])
    assert torch.equal(last_logits(states, 9), states)
    assert torch.equal(last_logits(states, torch.tensor([0, 3])), states[:, [0, 3]])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])], ids=["1", "3", "indices"])
def test_a_model_computes_the_wanted_logits_alone(keep):
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole, some = model(ids).logits, model(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(some, last_logits(whole, keep))


def test_last_tokens_on_either_side_of_padding():
    ids = torch.tensor(
        [
            [5, 6, 7, 8],
            [5, 6, PAD, PAD],
            [PAD, PAD, 5, 6],
            [5, PAD, 6, PAD],
            [PAD, PAD, PAD, PAD],
        ]
    )
    # A row of nothing but padding has no last token; its first position stands in.
    assert last_tokens(ids, PAD, 5).tolist() == [3, 1, 3, 2, 0]


def test_last_tokens_where_ids_or_padding_are_unknown():
    ids = torch.tensor([[5, 6, 7]])
    assert last_tokens(ids, None, 1) == -1
    assert last_tokens(None, None, 1) == -1
    assert last_tokens(None, PAD, 3) == -1


def test_last_tokens_needs_padding_to_tell_rows_apart():
    text = (
        r"The last token of each row cannot be told without a padding token \(config.pad_token_id\): "
        r"found None, with 3 rows\. Set model.config.pad_token_id = tokenizer.pad_token_id\."
    )
    with pytest.raises(ArgumentError, match=text):
        last_tokens(torch.ones(3, 2, dtype=torch.long), None, 3)
    model = Case(LlamaForSequenceClassification, {**TINY_LLAMA, "pad_token_id": None}).build()
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=text.replace("3 rows", "2 rows")):
        model(torch.tensor([[5, 6], [7, 8]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_classified_as_if_alone(side):
    model = Case(LlamaForSequenceClassification, {**TINY_LLAMA, "num_labels": 3}).build()
    row, pads = [5, 6, 7], [PAD, PAD]
    padded = pads + row if side == "left" else row + pads
    ids = torch.tensor([padded, [8, 9, 10, 11, 12]])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(torch.tensor([row])).logits
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[:1], alone)


def test_embeddings_are_classified_by_their_last_position():
    model = Case(LlamaForSequenceClassification, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(found, model(ids).logits)


@pytest.mark.parametrize(
    ("cls", "rates", "rate"),
    [
        (LlamaForTokenClassification, {}, 0.1),
        (LlamaForTokenClassification, {"hidden_dropout": 0.3}, 0.3),
        (LlamaForTokenClassification, {"classifier_dropout": 0.0, "hidden_dropout": 0.3}, 0.0),
        (LlamaForTokenClassification, {"classifier_dropout": None, "hidden_dropout": 0.3}, 0.3),
    ],
)
def test_the_classifiers_dropout(cls, rates, rate):
    assert Case(cls, {**TINY_LLAMA, **rates}).build().dropout.p == rate


@pytest.mark.parametrize(
    "cls", [LlamaForSequenceClassification, LlamaForTokenClassification, LlamaForQuestionAnswering]
)
def test_heads_pass_the_base_models_switches_on(cls):
    model = Case(cls, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7]])
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert type(model(ids, return_dict=False)) is tuple
    model.config.return_dict = False
    assert type(model(ids)) is tuple
    with pytest.raises(TypeError, match="nonsense"):
        model(ids, nonsense=1)


def test_one_end_of_a_span_is_no_label():
    model = Case(LlamaForQuestionAnswering, TINY_LLAMA).build()
    ids, ends = torch.tensor([[5, 6, 7]]), torch.tensor([1])
    assert model(ids, start_positions=ends).loss is None
    assert model(ids, start_positions=ends, end_positions=ends).loss.ndim == 0
    assert model(ids).start_logits.shape == model(ids).end_logits.shape == (1, 3)
