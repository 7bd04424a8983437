# SPDX-License-Identifier: Apache-2.0
"""A real language model from its quantized file: the right answer, and the oracle's tokens."""

import pytest
import torch
import transformers

from pretrained import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

pytestmark = [pytest.mark.realweights, pytest.mark.slow]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_it_is_the_model_that_the_file_says(model):
    assert type(model) is LlamaForCausalLM
    assert model.num_parameters() == 134_515_008
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


def test_it_knows_the_capital_of_france(model, tokenizer, inputs):
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


def test_greedy_tokens_equal_the_oracles(model, inputs):
    # The oracle takes our dequantized weights; tests/arch proves those equal its own reading of the file.
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(model.config.to_diff_dict())
    ).eval()
    twin.load_state_dict(model.state_dict())
    ours = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    theirs = twin.generate(
        **inputs, max_new_tokens=32, do_sample=False, pad_token_id=model.config.pad_token_id or 2
    )
    assert ours.tolist() == theirs.tolist()


def test_a_padded_batch_answers_as_each_row_alone(model, tokenizer):
    tokenizer.padding_side = "left"
    texts = ["The capital of France is", "Water boils at a temperature of about one hundred"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, do_sample=False)
        assert together[row, -6:].tolist() == alone[0, -6:].tolist()


def test_it_is_saved_as_safetensors_and_comes_back(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
