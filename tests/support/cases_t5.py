# SPDX-License-Identifier: Apache-2.0
"""The T5 family's rows of the battery's table."""

import torch

from pretrained.testing.battery import Case
from pretrained.torch.models import mt5, t5, umt5

# Fewer encoder than decoder blocks, and heads whose channels do not add up to d_model, as in t5-11b.
TINY_T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # So few that distances of a short test reach the logarithmic and the last bucket.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
}
UNTIED = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}


def ids_with_ends(config):
    """Ids with an end-of-sequence token in each row, the last of two where there are two."""
    ids = torch.randint(3, config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))
    ids[:, 4] = ids[:, 6] = config.eos_token_id
    return {"input_ids": ids}


def decoder_ids(config):
    return {
        "decoder_input_ids": torch.randint(
            3, config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(5)
        )
    }


def t5_case(cls, name="", **config):
    """A row, with the inputs that its head needs."""
    head = cls.__name__.partition("5")[2]
    reads_only = head in ("EncoderModel", "ForTokenClassification")
    extra = {"ForSequenceClassification": ids_with_ends, "ForQuestionAnswering": decoder_ids}
    return Case(
        cls,
        {**TINY_T5, **config},
        kind="encoder" if reads_only else "seq2seq",
        name=f"{cls.__name__}{'-' + name if name else ''}",
        extra_inputs=extra.get(head),
        embeds=head != "ForSequenceClassification",
    )


T5_CASES = [
    t5_case(t5.T5Model),
    t5_case(t5.T5ForConditionalGeneration),
    t5_case(t5.T5ForConditionalGeneration, "v1.1", **UNTIED),
    t5_case(t5.T5ForConditionalGeneration, "silu", feed_forward_proj="gated-silu"),
    t5_case(t5.T5ForConditionalGeneration, "scale-given", scale_decoder_outputs=False),
    t5_case(t5.T5EncoderModel),
    t5_case(t5.T5ForSequenceClassification, num_labels=3),
    t5_case(t5.T5ForTokenClassification, num_labels=3),
    t5_case(t5.T5ForQuestionAnswering),
    t5_case(mt5.MT5Model),
    t5_case(mt5.MT5ForConditionalGeneration),
    t5_case(mt5.MT5ForConditionalGeneration, "untied", **UNTIED),
    t5_case(mt5.MT5EncoderModel),
    t5_case(mt5.MT5ForSequenceClassification, num_labels=3),
    t5_case(mt5.MT5ForTokenClassification, num_labels=3),
    t5_case(mt5.MT5ForQuestionAnswering),
    t5_case(umt5.UMT5Model),
    t5_case(umt5.UMT5ForConditionalGeneration),
    t5_case(umt5.UMT5ForConditionalGeneration, "untied", **UNTIED),
    t5_case(umt5.UMT5EncoderModel),
    t5_case(umt5.UMT5ForSequenceClassification, num_labels=3),
    t5_case(umt5.UMT5ForTokenClassification, num_labels=3),
    t5_case(umt5.UMT5ForQuestionAnswering),
]
