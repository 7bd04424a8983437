# SPDX-License-Identifier: Apache-2.0
"""Drafts for a trained model: its tokens, in fewer forwards, also through real tokenizers."""

import pytest
import torch
import transformers

from pretrained import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from pretrained.torch.generation.assisted import DraftLength
from pretrained.torch.generation.candidates import Draft
from pretrained.torch.generation.universal import AssistedCandidateGeneratorDifferentTokenizers
from support.oracle import transformers_twin

pytestmark = [pytest.mark.realweights, pytest.mark.slow]
TEXT = "The quick brown fox jumps over the lazy dog near the river bank. " * 3


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf, padding_side="left")


def counted(model, **given):
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = model.generate(**given)
    hook.remove()
    return found, len(calls)


@pytest.fixture(scope="module")
def plain(model, tokenizer):
    inputs = tokenizer(TEXT, return_tensors="pt")
    return inputs, model.generate(**inputs, max_new_tokens=32)


def test_lookup_in_a_repetitive_text(model, plain):
    inputs, tokens = plain
    found, forwards = counted(model, **inputs, max_new_tokens=32, prompt_lookup_num_tokens=10)
    assert torch.equal(found, tokens) and forwards <= 12


def test_a_padded_batch_of_unlike_rows(model, tokenizer):
    batch = tokenizer([TEXT, "Once upon a time", "1 2 3 4 1 2 3 4 1 2"], padding=True, return_tensors="pt")
    given = {**batch, "max_new_tokens": 12}
    assert torch.equal(model.generate(**given, prompt_lookup_num_tokens=6), model.generate(**given))
    assert torch.equal(model.generate(**given, assistant_early_exit=10), model.generate(**given))


def test_transformers_says_the_same(model, plain):
    inputs, tokens = plain
    twin = transformers_twin(model)
    found = twin.generate(**inputs, max_new_tokens=32, do_sample=False, prompt_lookup_num_tokens=10)
    assert isinstance(twin, transformers.LlamaForCausalLM) and torch.equal(found, tokens)


@pytest.mark.parametrize("do_sample", [False, True])
def test_an_assistant_with_another_vocabulary(model, tokenizer, minilm_dir, do_sample):
    its_tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(its_tokenizer.get_vocab()), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    assistant = LlamaForCausalLM(config).eval()
    inputs = tokenizer("Grüße from the café: one, two, three, one, two", return_tensors="pt")
    drafts = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": its_tokenizer}
    drafts |= {"assistant_confidence_threshold": 0, "num_assistant_tokens": 3}
    found = model.generate(**inputs, max_new_tokens=16, do_sample=do_sample, **drafts)
    if not do_sample:
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=16))
    assert found.shape[1] == inputs["input_ids"].shape[1] + 16


def test_text_survives_the_way_through_text(tokenizer):
    """The model's own tokenizer on both sides: what is drafted through text comes back as it was."""

    class Echo:
        """Continues a text as it is known to go on."""

        def __init__(self, ids):
            self.length, self.whole = DraftLength(4), ids

        def get_candidates(self, ids, known, limit, is_open):
            assert ids[0].tolist() == self.whole[: ids.shape[1]]
            return Draft(torch.tensor([self.whole[ids.shape[1] : ids.shape[1] + 4]]))

    whole = tokenizer.encode(
        "Grüße, 世界! The  quick\nbrown fox 🦊 jumps over 12345 dogs.", add_special_tokens=False
    )
    drafts = AssistedCandidateGeneratorDifferentTokenizers(lambda ids: Echo(whole), tokenizer, tokenizer)
    right = 0
    for length in range(3, len(whole) - 4):
        ids = torch.tensor([whole[:length]])
        draft = drafts.get_candidates(ids, ids.new_empty((1, 0)), 9, [True]).tokens[0].tolist()
        # Half a character at the end is left out, which can change the token before it; after half of one
        # nothing comes.
        assert draft[:-1] == whole[length : length + len(draft) - 1] if draft else True
        right += len(draft) > 1
    assert right >= 0.6 * (len(whole) - 7)
