# SPDX-License-Identifier: Apache-2.0
"""What packed steps cost in accuracy, on trained weights: against the file's exact values, teacher-forced."""

import pytest
import torch

from pretrained import AutoModelForCausalLM
from pretrained.torch.quantized_ops import kernel_block

pytestmark = [
    pytest.mark.realweights,
    pytest.mark.slow,
    pytest.mark.skipif(kernel_block() is None, reason="this CPU's int4pack layout is not known"),
]


@pytest.fixture(scope="module")
def exact(smollm2_gguf):
    """Tokens that the file's exact values choose in float32, and the logits of each step."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf, dtype="float32")
    ids = torch.randint(1000, 20000, (1, 16), generator=torch.Generator().manual_seed(0))
    tokens = model.generate(ids, max_new_tokens=128, min_new_tokens=128, do_sample=False)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0, 15:]
    return tokens, logits


def forced(model, tokens):
    """Return the logits of each decoding step while the tokens are given, and not chosen."""

    def only_the_next(row, ids):
        return tokens[0, ids.shape[0]].tolist()

    result = model.generate(
        tokens[:, :16],
        max_new_tokens=128,
        min_new_tokens=128,
        prefix_allowed_tokens_fn=lambda row, ids: [only_the_next(row, ids)],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(result.sequences, tokens)
    return torch.cat(result.logits)


@pytest.mark.parametrize(
    ("settings", "agreed", "error"),
    [
        # The packed road: scales and offsets rounded to bfloat16, activations in bfloat16.
        ({"dtype": "bfloat16", "quantization_config": {"quant_method": "gguf"}}, 126, 0.015),
        # The exact road: the file's values, decoded at each use, in float32.
        ({"dtype": "float32", "quantization_config": {"quant_method": "gguf"}}, 128, 1e-4),
    ],
    ids=["packed", "exact"],
)
def test_steps_agree_with_the_exact_values(smollm2_gguf, exact, settings, agreed, error):
    tokens, want = exact
    count = 24 if settings["dtype"] == "float32" else 128
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf, **settings)
    if count < 128:
        # It is slow, and exact from the first step on.
        with torch.no_grad():
            got = model(tokens[:, : 15 + count]).logits[0, 15:]
    else:
        got = forced(model, tokens)
    want = want[:count]
    print((got.argmax(-1) == want.argmax(-1)).sum(), (got.float() - want).norm() / want.norm())
    assert (got.argmax(-1) == want.argmax(-1)).sum() >= agreed - (128 - count)
    assert (got.float() - want).norm() / want.norm() < error
