# SPDX-License-Identifier: Apache-2.0
"""Assistants with another vocabulary: the text is the model's own, and good drafts are taken."""

import copy

import pytest
import torch

from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.generation.universal import shared_tokens
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration

LETTERS = [chr(0x100 + i) for i in range(48)]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Words:
    """A tokenizer of given pieces, longest first; ids are places in the list."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.calls = []

    def get_vocab(self):
        return {piece: index for index, piece in enumerate(self.pieces)}

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def encode(self, text, add_special_tokens=True):
        self.calls.append(len(text))
        ids, vocab = [], self.get_vocab()
        while text:
            piece = next((text[:n] for n in (2, 1) if text[:n] in vocab), None)
            if piece is not None:
                ids.append(vocab[piece])
            text = text[len(piece or "?") :]
        return ids


def build(seed=3, **sizes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | sizes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def prompt(rows=1, length=8, seed=0):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def shuffled(model):
    """The same model with its tokens in another order, and the tokenizer of that order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    other = copy.deepcopy(model)
    for weight in (other.model.embed_tokens.weight, other.lm_head.weight):
        weight.data = weight.data[order].clone()
    return other, Words([LETTERS[i] for i in order.tolist()])


def forwards(model):
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    return calls


@pytest.mark.parametrize("lookbehind", [1, 10])
def test_text_is_translated_both_ways(model, shuffled, lookbehind):
    target = copy.deepcopy(model)
    assistant, its_words = shuffled
    words = Words(LETTERS)
    calls = forwards(target)
    settings = {
        "assistant_model": assistant, "tokenizer": words, "assistant_tokenizer": its_words,
        "num_assistant_tokens": 4, "assistant_confidence_threshold": 0,
        "target_lookbehind": lookbehind, "assistant_lookbehind": lookbehind,
    }  # fmt: skip
    found = target.generate(prompt(), max_new_tokens=26, **settings)
    assert torch.equal(found, model.generate(prompt(), max_new_tokens=26))
    # Every draft is right: the prompt, and five tokens a forward.
    assert len(calls) == 6
    # What is translated does not grow with the text.
    assert max(its_words.calls[-3:]) <= lookbehind + 5


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seed", [1, 2])
def test_any_assistant_leaves_the_text_as_it_is(model, rows, seed):
    pairs = [a + b for a in LETTERS[:6] for b in LETTERS[:6]]
    assistant = build(seed, vocab_size=70, num_hidden_layers=1)
    given = {"inputs": prompt(rows, seed=seed), "max_new_tokens": 20}
    found = model.generate(
        **given,
        assistant_model=assistant,
        tokenizer=Words(LETTERS),
        assistant_tokenizer=Words(pairs + LETTERS[:34]),
    )
    assert torch.equal(found, model.generate(**given))


def test_padded_rows_and_ends(model, shuffled):
    assistant, its_words = shuffled
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for row in range(3):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    given = {"attention_mask": mask, "max_new_tokens": 20, "eos_token_id": [3, 9, 17, 30], "pad_token_id": 0}
    drafts = {"assistant_model": assistant, "tokenizer": Words(LETTERS), "assistant_tokenizer": its_words}
    assert torch.equal(model.generate(ids, **given, **drafts), model.generate(ids, **given))


def test_the_same_vocabulary_needs_no_translation(model):
    words = Words(LETTERS)
    drafts = {
        "assistant_model": copy.deepcopy(model),
        "tokenizer": words,
        "assistant_tokenizer": Words(LETTERS),
    }
    plain = model.generate(prompt(), max_new_tokens=8)
    assert torch.equal(model.generate(prompt(), max_new_tokens=8, **drafts), plain)
    assert words.calls == []


# -- sampling ------------------------------------------------------------------------------------


def test_shared_tokens_are_found_by_their_text():
    first, second = Words(["a", "b", "\u2581c", "d", "e"]), Words(["x", "\u0120c", "a", "e", "b"])
    assert shared_tokens(first, second, 4, 4) == [(0, 2), (2, 1)]


def test_a_draft_from_the_same_distribution_is_always_taken(model, shuffled):
    target = copy.deepcopy(model)
    assistant, its_words = shuffled
    calls = forwards(target)
    target.generate(
        prompt(2), max_new_tokens=26, do_sample=True, assistant_model=assistant, tokenizer=Words(LETTERS),
        assistant_tokenizer=its_words, num_assistant_tokens=4, assistant_confidence_threshold=0,
    )  # fmt: skip
    assert len(calls) == 6


def test_samples_have_the_models_distribution():
    """The assistant knows some of the model's tokens only, and likes others."""
    torch.manual_seed(0)
    rows, vocab = 6000, 6
    target, assistant = build(1, vocab_size=vocab), build(2, vocab_size=5)
    words, its_words = Words(LETTERS[:vocab]), Words([LETTERS[4], "?", LETTERS[0], LETTERS[1], LETTERS[20]])
    ids = torch.tensor([[3, 5, 1]])
    found = target.generate(
        ids.expand(rows, -1), max_new_tokens=2, do_sample=True, top_k=0, assistant_model=assistant,
        tokenizer=words, assistant_tokenizer=its_words, num_assistant_tokens=2,
        assistant_confidence_threshold=0,
        generator=torch.Generator().manual_seed(1),
    )[:, 3:]  # fmt: skip
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    with torch.no_grad():
        logits = target(torch.cat([ids.expand(len(pairs), -1), pairs], 1)).logits.double()[:, 2:-1]
    probs = logits.softmax(-1).gather(-1, pairs[..., None])[..., 0].prod(-1)
    counts = torch.bincount(found[:, 0] * vocab + found[:, 1], minlength=vocab**2).double()
    expected = probs * rows
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = vocab**2 - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_nothing_shared_is_no_draft(model):
    words = Words(["!", "?"] + ["#"] * 68)
    given = {"inputs": prompt(), "max_new_tokens": 6, "do_sample": True}
    found = model.generate(
        **given, assistant_model=build(vocab_size=70), tokenizer=Words(LETTERS), assistant_tokenizer=words,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert torch.equal(found, model.generate(**given, generator=torch.Generator().manual_seed(0)))


# -- bad input -----------------------------------------------------------------------------------


def test_tokenizers_that_are_missing(model):
    assistant = build(vocab_size=70)
    for given, name in (
        ({}, "tokenizer and assistant_tokenizer"),
        ({"tokenizer": Words(LETTERS)}, "assistant_"),
    ):
        with pytest.raises(GenerationError, match=f"another vocabulary .*{name}.*Pass both tokenizers"):
            model.generate(prompt(), assistant_model=assistant, **given)


def test_encoder_decoders_need_the_same_vocabulary():
    sizes = {
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 4,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    one, other = (T5ForConditionalGeneration(T5Config(vocab_size=size, **sizes)) for size in (48, 50))
    with pytest.raises(
        NotYetError, match="encoder-decoder cannot have an assistant with another vocabulary yet"
    ):
        one.generate(
            prompt(), assistant_model=other, tokenizer=Words(LETTERS), assistant_tokenizer=Words(LETTERS)
        )
