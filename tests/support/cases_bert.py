# SPDX-License-Identifier: Apache-2.0
"""The rows of BERT, RoBERTa and DistilBERT in the battery's table."""

import torch

from pretrained.testing.battery import BATCH, LENGTH, Case
from pretrained.torch.models import bert, camembert, distilbert, roberta, xlm_roberta

TINY_BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "classifier_dropout": 0.3,
}
TINY_DISTILBERT = {
    "vocab_size": 99,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 24,
}
DECODER = {"is_decoder": True}
CROSS = {"is_decoder": True, "add_cross_attention": True}


def segments(config):
    """Segments other than the default, and positions out of order."""
    generator = torch.Generator().manual_seed(5)
    types = torch.randint(0, config.type_vocab_size, (BATCH, LENGTH), generator=generator)
    return {"token_type_ids": types, "position_ids": torch.arange(LENGTH).flip(0).expand(BATCH, -1)}


def encoder_output(config):
    """An encoder's output, longer than the decoder's input and padded in its last row."""
    states = torch.randn(BATCH, 13, config.hidden_size, generator=torch.Generator().manual_seed(6))
    mask = torch.ones(BATCH, 13, dtype=torch.int64)
    mask[-1, 9:] = 0
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def bert_case(cls, name="", *, base=TINY_BERT, inputs=None, labels="", **config):
    return Case(
        cls,
        {**base, **config},
        kind="decoder" if config.get("is_decoder") else "encoder",
        name=f"{cls.__name__}{'-' + name if name else ''}",
        extra_inputs=inputs,
        labels=labels,
    )


def distilbert_case(cls, name="", **config):
    return bert_case(cls, name, base=TINY_DISTILBERT, **config)


BERT_CASES = [
    bert_case(bert.BertModel),
    bert_case(bert.BertModel, "relu", hidden_act="relu", pad_token_id=None),
    bert_case(bert.BertModel, "segments", inputs=segments),
    bert_case(bert.BertForPreTraining, labels="none"),
    bert_case(bert.BertLMHeadModel, **DECODER),
    bert_case(bert.BertLMHeadModel, "cross", inputs=encoder_output, **CROSS),
    bert_case(bert.BertForMaskedLM),
    bert_case(bert.BertForMaskedLM, "chunked", chunk_size_feed_forward=1, hidden_act="gelu_new"),
    # Which of the two names of the bias has the gradient differs, so the loss is tested elsewhere.
    bert_case(bert.BertForMaskedLM, "untied", labels="none", tie_word_embeddings=False),
    bert_case(bert.BertForNextSentencePrediction, labels="classes"),
    bert_case(bert.BertForSequenceClassification, num_labels=3),
    bert_case(bert.BertForMultipleChoice),
    bert_case(bert.BertForTokenClassification, num_labels=3),
    bert_case(bert.BertForQuestionAnswering),
    bert_case(roberta.RobertaModel),
    bert_case(roberta.RobertaForCausalLM, **DECODER),
    bert_case(roberta.RobertaForCausalLM, "cross", inputs=encoder_output, **CROSS),
    bert_case(roberta.RobertaForMaskedLM),
    bert_case(roberta.RobertaForMaskedLM, "untied", labels="none", tie_word_embeddings=False),
    bert_case(roberta.RobertaForSequenceClassification, num_labels=3),
    bert_case(roberta.RobertaForMultipleChoice),
    bert_case(roberta.RobertaForTokenClassification, num_labels=3),
    bert_case(roberta.RobertaForQuestionAnswering),
    bert_case(xlm_roberta.XLMRobertaModel),
    # Transformers lists these heads before the stack, so the tied gradient has another name there.
    bert_case(xlm_roberta.XLMRobertaForMaskedLM, labels="none"),
    bert_case(xlm_roberta.XLMRobertaForSequenceClassification, num_labels=3),
    bert_case(camembert.CamembertForCausalLM, labels="none", **DECODER),
    bert_case(camembert.CamembertForTokenClassification, num_labels=3),
    distilbert_case(distilbert.DistilBertModel),
    distilbert_case(distilbert.DistilBertModel, "sinusoidal", sinusoidal_pos_embds=True, activation="relu"),
    distilbert_case(distilbert.DistilBertForMaskedLM),
    distilbert_case(distilbert.DistilBertForMaskedLM, "untied", tie_word_embeddings=False),
    distilbert_case(distilbert.DistilBertForMaskedLM, "chunked", chunk_size_feed_forward=1),
    distilbert_case(distilbert.DistilBertForSequenceClassification, num_labels=3),
    distilbert_case(distilbert.DistilBertForMultipleChoice),
    distilbert_case(distilbert.DistilBertForTokenClassification, num_labels=3),
    distilbert_case(distilbert.DistilBertForQuestionAnswering),
]
