# SPDX-License-Identifier: Apache-2.0
"""Token healing: the text stays, its last token becomes the likeliest that begins like it."""

import pytest
import torch

from pretrained.errors import GenerationError
from pretrained.torch.cache import DynamicCache
from pretrained.torch.generation.healing import Extensions
from pretrained.torch.models.llama import LlamaForCausalLM
from support.decoders import build, forbid_forwards
from support.oracle import transformers_twin
from support.toy import Toy

WORDS = ["<pad>", "<s>", "a", "ab", "abc", "b", "ba", "http", "https", "httpd", "c", "<0x41>", "<x"]


class Spelling:
    """A tokenizer of a few words; one id for each, spelled as they are."""

    pad_token_id, all_special_ids = 0, (0, 1)

    def get_vocab(self):
        return {**{word: index for index, word in enumerate(WORDS)}, "<tool>": 13}

    def get_added_vocab(self):
        return {"<tool>": 13}


@pytest.fixture
def toy():
    return Toy()


def test_the_tokens_that_begin_alike():
    extensions = Extensions(Spelling())
    assert [sorted(extensions.of(i)) for i in (2, 5, 7, 10)] == [[2, 3, 4], [5, 6], [7, 8, 9], [10]]
    # What is no text is neither healed nor healed to.
    assert [extensions.of(i) for i in (0, 1, 11, 13, 99)] == [[]] * 5
    assert extensions.of(12) == [12]


def test_the_likeliest_of_them_is_taken(toy):
    # After 3, 5 the toy wants 8, which begins like 7; after 3, 1 it wants 4, which does not.
    found = toy.heal_tokens(torch.tensor([[3, 5, 7], [5, 3, 7], [3, 1, 7]]), Spelling())
    assert found.tolist() == [[3, 5, 8], [5, 3, 8], [3, 1, 7]]
    assert len(toy.calls) == 1 and toy.calls[0]["input_ids"].tolist() == [[3, 5], [5, 3], [3, 1]]


def test_a_word_is_not_changed_without_need(toy):
    def level(**kwargs):
        output = Toy.forward(toy, **kwargs)
        output.logits[..., 8] = output.logits[..., 7] + 0.9
        return output

    toy.forward = level
    assert toy.heal_tokens(torch.tensor([[10, 10, 7]]), Spelling()).tolist() == [[10, 10, 7]]


def test_rows_that_stay_as_they_are(toy):
    # One token; nothing longer; a special token at the end; padding at the end.
    ids = torch.tensor([[0, 0, 7], [3, 5, 10], [3, 5, 1]])
    assert torch.equal(toy.heal_tokens(ids, Spelling()), ids) and toy.calls == []
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = toy.generate(
        torch.tensor([[3, 5, 7], [3, 5, 7]]),
        attention_mask=mask,
        token_healing=True,
        tokenizer=Spelling(),
        max_new_tokens=1,
    )
    assert found[:, :3].tolist() == [[3, 5, 7], [3, 5, 8]]


def test_generation_goes_on_from_healed_prompts(toy):
    ids = torch.tensor([[3, 5, 7]])
    found = toy.generate(ids, token_healing=True, tokenizer=Spelling(), max_new_tokens=2)
    assert found.tolist() == [[3, 5, 8, 13, 21]]
    assert ids.tolist() == [[3, 5, 7]]
    assert toy.generate(ids, max_new_tokens=1).tolist() == [[3, 5, 7, 12]]


def test_padding_is_hidden(toy):
    ids = torch.tensor([[0, 0, 3, 5, 7], [3, 5, 3, 5, 7]])
    assert toy.heal_tokens(ids, Spelling())[:, -1].tolist() == [8, 8]
    assert toy.calls[0]["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert toy.calls[0]["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.realweights
def test_tokens_equal_transformers(smollm2_gguf):
    """One row at a time: there, padded rows are given a context of padding."""
    from pretrained import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    model = LlamaForCausalLM.from_pretrained(smollm2_gguf)
    theirs = transformers_twin(model)
    for text in ('The link is <a href="http', "I like chocol", "The capital of Fran", "It is an examp"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        healed = model.heal_tokens(ids, tokenizer)
        assert tokenizer.decode(healed[0]).startswith(text)
        wanted = theirs(healed[:, :-1]).logits[0, -1] + 0.0
        # The slow definition: every token whose text begins like the last one's.
        last = tokenizer.convert_ids_to_tokens(int(ids[0, -1]))
        special = set(tokenizer.all_special_ids)
        alike = [i for t, i in tokenizer.get_vocab().items() if t.startswith(last) and i not in special]
        wanted[ids[0, -1]] += 1.0
        assert int(healed[0, -1]) == max(alike, key=lambda i: wanted[i].item())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "token_healing looks at the text of tokens, and there is no tokenizer.*Pass tokenizer="),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 32), "tokenizer": Spelling()},
            "whole prompt as ids .token_healing.: found inputs_embeds",
        ),
        ({"tokenizer": Spelling(), "max_length": 2}, "leaves no room"),
        ({"token_healing": 3}, "token_healing cannot be 3"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_forward(arguments, text):
    model = forbid_forwards(build("llama"))
    with pytest.raises(GenerationError, match=text):
        model.generate(**{"input_ids": torch.ones(1, 3).long(), "token_healing": True, **arguments})


def test_a_cache_and_new_tokens_alone_are_refused(toy):
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 0)
    with pytest.raises(GenerationError, match="found a cache and its new tokens"):
        toy.generate(
            torch.tensor([[7]]),
            attention_mask=torch.ones(1, 3).long(),
            past_key_values=cache,
            token_healing=True,
            tokenizer=Spelling(),
        )


def test_what_cannot_be_healed_by_hand(toy):
    with pytest.raises(GenerationError, match=r"no tokenizer to make it .*Pass tokenizer=... to heal_tokens"):
        toy.heal_tokens(torch.ones(1, 3).long())
    with pytest.raises(GenerationError, match=r"expected a tokenizer with get_vocab\(\), found int"):
        toy.heal_tokens(torch.ones(1, 3).long(), 3)
    with pytest.raises(GenerationError, match=r"read by an encoder \(token_healing\)"):
        build("t5").heal_tokens(torch.ones(1, 3).long(), Spelling())
