# SPDX-License-Identifier: Apache-2.0
"""Guidance: the processors and the tokens equal transformers', rows are what each is alone."""

import pytest
import torch
import transformers

from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.errors import GenerationError
from pretrained.torch.generation.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from pretrained.torch.generation.model_rules import ClassifierFreeGuidanceLogitsProcessor
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from support.decoders import ENDS, LLAMA, build, forbid_forwards, prompts
from support.oracle import transformers_twin
from support.toy import Toy

NEGATIVE = torch.tensor([[4, 8, 15, 16], [23, 42, 5, 9]])


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model, transformers_twin(model)


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_equal_transformers(pair, scale, negative, use_cache):
    ids, mask = prompts(2)
    arguments = {
        "attention_mask": mask,
        "guidance_scale": scale,
        "negative_prompt_ids": NEGATIVE if negative else None,
        "max_new_tokens": 10,
        "eos_token_id": ENDS,
        "pad_token_id": 0,
        "use_cache": use_cache,
    }
    found, expected = (model.generate(ids, **arguments) for model in pair)
    assert torch.equal(found, expected)


def test_draws_equal_transformers(pair):
    ids, _ = prompts(2, 5)
    ids[ids == 0] = 3
    found = []
    for model in pair:
        torch.manual_seed(0)
        found.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                guidance_scale=1.5,
                negative_prompt_ids=NEGATIVE,
                do_sample=True,
                temperature=0.7,
                repetition_penalty=1.2,
                max_new_tokens=10,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
    assert torch.equal(*found)


def test_the_processor_equals_transformers(pair):
    ours, theirs = pair
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    scores = torch.randn(2, 61, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for unconditional in (None, NEGATIVE):
            mine = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, ours, unconditional)
            other = transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, theirs, unconditional)
            for length in range(5, 10):
                torch.testing.assert_close(mine(ids[:, :length], scores), other(ids[:, :length], scores))


def test_a_scale_of_1_gives_log_probabilities():
    scores = torch.randn(2, 7)
    found = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.0, Toy())(torch.ones(2, 3).long(), scores)
    torch.testing.assert_close(found, scores.log_softmax(-1))


def test_a_batch_of_both_halves_equals_transformers():
    scores, ids = torch.randn(4, 7), torch.ones(2, 3).long()
    ours = ClassifierFreeGuidanceLogitsProcessor(1.7)(ids, scores)
    torch.testing.assert_close(ours, transformers.ClassifierFreeGuidanceLogitsProcessor(1.7)(ids, scores))
    with pytest.raises(GenerationError, match=r"with and without the prompt .*expected 4 rows, found 3"):
        ClassifierFreeGuidanceLogitsProcessor(1.7)(ids, scores[:3])
    with pytest.raises(GenerationError, match=r"cannot be 1\.0 .*a number above 1"):
        ClassifierFreeGuidanceLogitsProcessor(1.0)


def gpt2():
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("make", [gpt2, lambda: build("llama")])
def test_each_row_gets_what_it_gets_alone(make):
    model = make()
    ids, mask = prompts(2)
    negative, negative_mask = NEGATIVE.clone(), torch.ones_like(NEGATIVE)
    negative[0, :2], negative_mask[0, :2] = 0, 0
    arguments = {"guidance_scale": 2.0, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        ids,
        attention_mask=mask,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=negative_mask,
        **arguments,
    )
    derived = model.generate(ids, attention_mask=mask, negative_prompt_ids=negative, **arguments)
    assert torch.equal(found, derived)
    for row in range(2):
        alone = model.generate(
            ids[row : row + 1, 2 * row :],
            negative_prompt_ids=NEGATIVE[row : row + 1, 2 - 2 * row :],
            **arguments,
        )
        assert torch.equal(found[row, 2 * row :], alone[0])


def test_one_negative_prompt_serves_all_rows_and_their_copies():
    model = build("llama")
    ids, mask = prompts(2)
    arguments = {
        "attention_mask": mask, "guidance_scale": 2.0, "do_sample": True, "num_return_sequences": 3,
        "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    found = []
    for negative in (NEGATIVE[:1], NEGATIVE[:1].expand(2, -1)):
        torch.manual_seed(0)
        found.append(model.generate(ids, negative_prompt_ids=negative, **arguments))
    assert torch.equal(*found) and len(found[0]) == 6


def test_rows_that_change_places_and_drafts_that_are_taken_back():
    model = build("llama")
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    scores = torch.zeros(3, 61)

    def fresh(rows):
        return UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, prompt_length=5)(rows, scores)

    with torch.no_grad():
        rule = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, prompt_length=5)
        for rows in (ids[:, :5], ids[:, :6], ids[:, :7], ids[[1, 0, 2], :8], ids[:, :6], ids[:, :9]):
            torch.testing.assert_close(rule(rows, scores), fresh(rows))
        other = ids[:, 2:7]
        torch.testing.assert_close(rule(other, scores), fresh(other))


def test_beams_are_guided_each_by_its_own_text():
    """A rule without a cache knows nothing of what was there before."""
    model = build("llama")
    ids, mask = prompts(2)
    negative, negative_mask = NEGATIVE.clone(), torch.ones_like(NEGATIVE)
    negative[0, :2], negative_mask[0, :2] = 0, 0
    arguments = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "pad_token_id": 0}
    found = model.generate(
        ids,
        guidance_scale=2.0,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=negative_mask,
        **arguments,
    )
    slow = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        2.0, model, negative, negative_mask, use_cache=False, prompt_length=8
    )
    assert torch.equal(found, model.generate(ids, logits_processor=[slow], **arguments))


def test_ones_own_guidance_takes_the_place():
    model = build("llama")
    ids, _ = prompts(1)
    own = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, model, NEGATIVE[:1])
    found = model.generate(ids, guidance_scale=1.5, logits_processor=[own], max_new_tokens=6)
    expected = model.generate(ids, guidance_scale=3.0, negative_prompt_ids=NEGATIVE[:1], max_new_tokens=6)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"negative_prompt_ids": NEGATIVE},
            "no effect without guidance .*Pass guidance_scale=",
        ),
        (
            {"negative_prompt_attention_mask": NEGATIVE},
            "belongs to negative_prompt_ids, which are not there",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_ids": [[1]]},
            "negative_prompt_ids must be a tensor",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_ids": NEGATIVE + 30},
            r"Token id 34 is outside the vocabulary \(negative_prompt_ids, row 0, position 0\)",
        ),
        (
            {"guidance_scale": 2, "negative_prompt_ids": torch.ones(3, 2).long()},
            r"another batch size than the prompt \(negative_prompt_ids\): expected 2, found 3",
        ),
        (
            {
                "guidance_scale": 2,
                "negative_prompt_ids": torch.ones(2, 2).long(),
                "negative_prompt_attention_mask": torch.ones(2, 3).long(),
            },
            "negative_prompt_attention_mask does not fit",
        ),
        ({"guidance_scale": -1.0}, "guidance_scale cannot be -1.0: expected a number above 0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_forward(arguments, text):
    toy = Toy()
    with pytest.raises(GenerationError, match=text):
        toy.generate(torch.tensor([[1, 1], [2, 3]]), **arguments)
    assert toy.calls == []


def test_encoder_decoders_are_refused():
    model = forbid_forwards(build("t5"))
    with pytest.raises(GenerationError, match=r"read by an encoder \(guidance_scale\): found T5For"):
        model.generate(prompts(1)[0], guidance_scale=2.0)
