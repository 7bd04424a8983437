# SPDX-License-Identifier: Apache-2.0
"""What a forward refuses, and the positions it counts."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrained.errors import ArgumentError
from pretrained.testing.battery import Case
from pretrained.torch.cache import DynamicCache
from pretrained.torch.inputs import embed_tokens, flags, new_positions
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.cases import CASES, TINY_LLAMA

EMBEDDING = nn.Embedding(10, 4)
IDS = torch.tensor([[1, 2], [3, 9]])


def test_ids_and_embeddings():
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(embed_tokens(EMBEDDING, IDS.to(dtype), None), EMBEDDING.weight[IDS])
    embeds = torch.ones(2, 3, 4)
    assert embed_tokens(EMBEDDING, None, embeds) is embeds


@pytest.mark.parametrize(("both", "found"), [(True, "both"), (False, "neither")])
@pytest.mark.parametrize("prefix", ["", "decoder_"])
def test_one_of_ids_and_embeddings(both, found, prefix):
    ids, embeds = (IDS, torch.ones(2, 2, 4)) if both else (None, None)
    where = f"{prefix}input_ids, {prefix}inputs_embeds"
    with pytest.raises(
        ArgumentError, match=rf"Give either token ids or embeddings \({where}\): found {found}\."
    ):
        embed_tokens(EMBEDDING, ids, embeds, prefix=prefix)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.tensor([1, 2]), "found torch.int64 [2]. Add the batch axis with ids[None]"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "found torch.int64 [1, 2, 3]"),
        (torch.ones(1, 2), "expected an int64 or int32 tensor [batch, length], found torch.float32 [1, 2]"),
        (torch.ones(1, 2, dtype=torch.bool), "found torch.bool [1, 2]"),
        (torch.ones(1, 2, dtype=torch.uint8), "found torch.uint8 [1, 2]"),
        ([[1, 2]], "Token ids are a tensor (input_ids): found list. Write torch.tensor(ids)"),
        ({"input_ids": IDS}, "found dict. Pass what the tokenizer returned as model(**inputs)."),
        (torch.ones(2, 0, dtype=torch.int64), "The prompt is empty (input_ids): found [2, 0]. Pass at least"),
    ],
    ids=["rank 1", "rank 3", "float", "bool", "uint8", "list", "dict", "empty"],
)
def test_what_are_no_ids(ids, text):
    with pytest.raises(ArgumentError, match=re.escape(text)):
        embed_tokens(EMBEDDING, ids, None)


@pytest.mark.parametrize(
    ("shape", "text"),
    [((2, 4), r"batch of rows of vectors \(inputs_embeds\).*found \[2, 4\]"), ((2, 0, 4), "prompt is empty")],
)
def test_what_are_no_embeddings(shape, text):
    with pytest.raises(ArgumentError, match=text):
        embed_tokens(EMBEDDING, None, torch.ones(shape))


@pytest.mark.parametrize("wrong", [10, -1, 2**40])
@pytest.mark.parametrize("prefix", ["", "decoder_"])
def test_an_id_outside_the_vocabulary_is_named(wrong, prefix):
    ids = IDS.clone()
    ids[1, 0] = wrong
    text = rf"Token id {wrong} is outside .* \({prefix}input_ids, row 1, position 0\): expected 0 to 9"
    with pytest.raises(ArgumentError, match=text) as caught:
        embed_tokens(EMBEDDING, ids, None, prefix=prefix)
    assert isinstance(caught.value.__cause__, IndexError)


def test_another_index_error_stays_what_it_is():
    class Broken(nn.Embedding):
        def forward(self, ids):
            raise IndexError("of its own")

    with pytest.raises(IndexError, match="of its own"):
        embed_tokens(Broken(10, 4), IDS, None)
    with pytest.raises(IndexError, match="of its own"):
        embed_tokens(nn.Sequential(Broken(10, 4)), IDS, None)


@pytest.mark.parametrize("prefix", ["", "decoder_"])
def test_models_name_an_id_outside_the_vocabulary(prefix):
    case = next(case for case in CASES if case.model_class is T5ForConditionalGeneration)
    model = case.build()
    inputs = case.inputs(model.config)
    size = model.config.vocab_size
    inputs[f"{prefix}input_ids"][1, 2] = size
    text = rf"Token id {size} is outside the vocabulary \({prefix}input_ids, row 1, position 2\)"
    with pytest.raises(ValueError, match=text):
        model(**inputs)


def test_the_check_breaks_no_graph():
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7]])
    options = {"use_cache": False, "labels": ids}
    compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, **options)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled.logits, model(ids, **options).logits)
    torch.testing.assert_close(compiled.loss, model(ids, **options).loss)


def test_a_label_outside_the_classes_is_named():
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[5, -100, 99]])
    text = r"A label is none of the classes \(labels\): expected 0 to 98, or -100 to leave one out, found 99"
    with pytest.raises(ArgumentError, match=text):
        model(ids, labels=labels)


def test_a_call_wins_over_the_config():
    config = SimpleNamespace(
        output_attentions=True, output_hidden_states=False, use_cache=True, use_return_dict=False
    )
    assert flags(config, None, None, None, None) == (True, False, True, False)
    assert flags(config, False, True, False, True) == (False, True, False, True)


def test_positions_count_on_from_a_cache():
    x, cache = torch.zeros(2, 3, 4), DynamicCache()
    first, ids = new_positions(x, None, None, None)
    assert (first, ids.tolist()) == (0, [[0, 1, 2]])
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    first, ids = new_positions(x, cache, None, None)
    assert (first, ids.tolist()) == (5, [[5, 6, 7]])
    own = torch.tensor([[0, 1, 2], [4, 5, 6]])
    assert new_positions(x, cache, None, own) == (5, own)
    slots = torch.tensor([5, 6, 7])
    first, ids = new_positions(x, cache, slots, None)
    assert (first, ids.tolist()) == (0, [[5, 6, 7]])
    assert new_positions(x, cache, slots, own)[1] is own
