# SPDX-License-Identifier: Apache-2.0
"""A real BERT, all-MiniLM-L6-v2: sentence embeddings as transformers computes them, and what they mean."""

import pytest
import torch
import transformers

from pretrained.testing.battery import assert_close
from pretrained.text.tokenizer import AutoTokenizer
from pretrained.torch.models.bert import BertModel

pytestmark = pytest.mark.realweights

QUERY = "How do I bake bread at home?"
SENTENCES = (
    "A recipe for a simple loaf: flour, water, salt and yeast, an hour in the oven.",
    "The bakery around the corner sells croissants.",
    "The stock market fell by two percent on Monday.",
    "Volcanoes form where tectonic plates meet.",
)


def embed(model, tokenizer, texts):
    """Return the mean of the tokens' states, of length 1, as the model was trained to be used."""
    batch = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def model(minilm_dir):
    return BertModel.from_pretrained(minilm_dir)


@pytest.fixture(scope="module")
def tokenizer(minilm_dir):
    return AutoTokenizer.from_pretrained(minilm_dir)


def test_every_weight_of_the_file_is_used(model):
    assert model.load_report.is_plain
    assert model.load_report.dropped == {"embeddings.position_ids": "counted when they are needed"}
    assert model.num_parameters() == 22_713_216


def test_embeddings_equal_transformers(model, tokenizer, minilm_dir):
    texts = (QUERY, *SENTENCES)
    twin = transformers.BertModel.from_pretrained(minilm_dir)
    expected = embed(twin, transformers.AutoTokenizer.from_pretrained(minilm_dir), texts)
    ours = embed(model, tokenizer, texts)
    assert_close(ours, expected, "sentence embeddings")
    # Alone or in a padded batch, a sentence means the same.
    alone = torch.cat([embed(model, tokenizer, [text]) for text in texts])
    assert float((alone - ours).abs().max()) < 1e-5


def test_related_sentences_rank_first(model, tokenizer):
    similar = (embed(model, tokenizer, [QUERY]) @ embed(model, tokenizer, SENTENCES).T)[0]
    assert similar.argsort(descending=True).tolist()[:2] == [0, 1]
    assert similar[0] > 0.5 and similar[2:].max() < 0.2


def test_pooled_rows_equal_transformers(model, tokenizer, minilm_dir):
    batch = dict(tokenizer([QUERY, SENTENCES[2]], padding=True, return_tensors="pt"))
    with torch.no_grad():
        ours = model(**batch).pooler_output
        theirs = transformers.BertModel.from_pretrained(minilm_dir)(**batch).pooler_output
    assert_close(ours, theirs, "pooled")
