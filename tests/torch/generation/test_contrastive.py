# SPDX-License-Identifier: Apache-2.0
"""Contrastive search against a slow version that runs every candidate by itself, without a cache."""

import math

import pytest
import torch

from pretrained.errors import GenerationError
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.generation.contrastive import Context, contrast
from support.decoders import ENDS, MODELS, VOCAB, build, forbid_forwards, prompts


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def slow(model, prompt, alpha, top_k, new, ends=()):
    """Return one row's tokens: no batch, no cache, one forward for each candidate."""
    encoder = model.config.is_encoder_decoder
    row = [0] if encoder else list(prompt)

    def run(tokens):
        tokens = torch.tensor([tokens])
        with torch.no_grad():
            if encoder:
                out = model(
                    torch.tensor([prompt]),
                    decoder_input_ids=tokens,
                    output_hidden_states=True,
                    use_cache=False,
                )
                return out.logits[0, -1], out.decoder_hidden_states[-1][0].tolist()
            out = model(tokens, output_hidden_states=True, use_cache=False)
        return out.logits[0, -1], out.hidden_states[-1][0].tolist()

    for _ in range(new):
        logits, before = run(row)
        best, values = logits.softmax(-1).topk(top_k), []
        for p, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            state = run([*row, token])[1][-1]
            values.append((1 - alpha) * p - alpha * max(cosine(state, other) for other in before))
        row.append(best.indices[values.index(max(values))].item())
        if row[-1] in ends:
            break
    return row


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.95, 6), (0.2, 2)])
def test_it_is_what_a_slow_version_finds(model, alpha, top_k):
    ids, mask = prompts()
    found = model.generate(
        ids,
        attention_mask=mask,
        penalty_alpha=alpha,
        top_k=top_k,
        max_new_tokens=9,
        eos_token_id=ENDS,
        pad_token_id=0,
        decoder_start_token_id=0 if model.config.is_encoder_decoder else None,
    )
    for row, padded, result in zip(ids.tolist(), (mask == 0).sum(1).tolist(), found.tolist(), strict=True):
        expected = slow(model, row[padded:], alpha, top_k, 9, ENDS)
        begun = 0 if model.config.is_encoder_decoder else padded
        assert result[begun : begun + len(expected)] == expected
        assert set(result[begun + len(expected) :]) <= {0}


def test_alpha_of_almost_0_is_greedy(model):
    ids, _ = prompts(1)
    settings = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, "decoder_start_token_id": 0}
    assert torch.equal(
        model.generate(ids, **settings, penalty_alpha=1e-9, top_k=3), model.generate(ids, **settings)
    )


def test_it_reaches_the_last_position():
    model = build("gpt2")
    found = model.generate(prompts(1)[0], penalty_alpha=0.6, top_k=3, max_new_tokens=500, eos_token_id=None)
    # The last token is run too, so that it needs a position.
    assert found.shape[1] == 64


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_outputs_are_those_of_the_rows_that_were_chosen(implementation):
    model = build("llama")
    ids, mask = prompts()
    out = model.generate(
        ids,
        attention_mask=mask,
        penalty_alpha=0.6,
        top_k=4,
        max_new_tokens=5,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        cache_implementation=implementation,
    )
    whole = out.sequences[:, :-1]
    whole_mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.int64)], 1)
    positions = (whole_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        again = model(whole, whole_mask, position_ids=positions, output_hidden_states=True)
    assert len(out.logits) == len(out.scores) == len(out.hidden_states) == len(out.attentions) == 5
    for step in range(5):
        torch.testing.assert_close(out.logits[step], again.logits[:, 7 + step])
        torch.testing.assert_close(out.hidden_states[step][-1][:, -1], again.hidden_states[-1][:, 7 + step])
        assert out.attentions[step][0].shape == (3, 4, 8 if step == 0 else 1, 8 + step)
    # The cache is as every strategy leaves it: of the right rows, without the last token.
    assert out.past_key_values.batch_size == 3 and out.past_key_values.get_seq_length() == 12
    more = (
        model.generate(
            out.sequences,
            attention_mask=torch.cat([whole_mask, whole_mask[:, -1:]], 1),
            past_key_values=out.past_key_values,
            max_new_tokens=1,
        )
        if implementation == "dynamic"
        else None
    )
    if more is not None:
        fresh = model.generate(
            out.sequences, attention_mask=torch.cat([whole_mask, whole_mask[:, -1:]], 1), max_new_tokens=1
        )
        assert torch.equal(more, fresh)


def test_a_cache_of_ones_own_comes_back_with_its_rows():
    model, cache = build("llama"), DynamicCache()
    model.generate(prompts(2)[0], penalty_alpha=0.6, top_k=4, max_new_tokens=3, past_key_values=cache)
    assert cache.batch_size == 2


def test_a_static_cache_needs_room_for_the_last_token():
    model = build("llama")
    arguments = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 3, "eos_token_id": None}
    model.generate(prompts(2)[0], **arguments, past_key_values=StaticCache(model.config, 11))
    with pytest.raises(GenerationError, match="no room for the whole sequence"):
        model.generate(prompts(2)[0], **arguments, past_key_values=StaticCache(model.config, 10))


def test_forbidden_tokens_are_no_candidates():
    model = build("llama")
    allowed = [5, 9]
    found = model.generate(
        prompts(2)[0],
        penalty_alpha=0.95,
        top_k=8,
        max_new_tokens=8,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda row, ids: allowed,
    )
    assert set(found[:, 8:].flatten().tolist()) <= set(allowed)


def test_rules_and_criteria_run_once_for_each_token():
    model, seen = build("llama"), []

    def rule(input_ids, scores):
        seen.append((tuple(input_ids.shape), tuple(scores.shape)))
        return scores

    model.generate(
        prompts(2)[0],
        penalty_alpha=0.6,
        top_k=4,
        max_new_tokens=3,
        eos_token_id=None,
        logits_processor=[rule],
    )
    assert seen == [((2, 8 + step), (2, VOCAB)) for step in range(3)]


def test_it_looks_a_step_behind(monkeypatch):
    """As on a CUDA device, where the host does not wait for the verdict of a step."""
    from pretrained.torch.generation import mixin

    model = build("llama")
    ids, _ = prompts(2)
    arguments = {
        "penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 12, "eos_token_id": list(range(2, 60, 3)),
        "pad_token_id": 0, "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(ids, **arguments)
    monkeypatch.setattr(mixin, "_may_look_behind", lambda *_: True)
    found = model.generate(ids, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_a_long_context_grows_its_buffer(monkeypatch):
    monkeypatch.setattr(Context, "_FIRST", 1)
    states = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    context = Context(states[:, :2], torch.tensor([[1, 1], [0, 1]]), 100)
    for step in range(2, 8):
        context.add(states[:, step])
    found = context.similarity(states[:, 8:])
    for row in range(2):
        others = states[row, row:8].tolist()
        expected = max(cosine(states[row, 8].tolist(), other) for other in others)
        assert found[row, 0].item() == pytest.approx(expected, abs=1e-6)


def test_the_score_of_a_candidate():
    value = contrast(torch.tensor([[0.5, 0.2]]), torch.tensor([[0.9, -0.1]]), 0.25)
    torch.testing.assert_close(value, torch.tensor([[0.75 * 0.5 - 0.25 * 0.9, 0.75 * 0.2 + 0.25 * 0.1]]))


def test_scores_that_are_not_numbers_are_told():
    model = build("llama")
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(GenerationError, match=r"not numbers \(step 0, row 0\)"):
        model.generate(prompts(2)[0], penalty_alpha=0.6, top_k=4, max_new_tokens=3)


def filled():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"use_cache": False}, "there is none .use_cache.. Leave use_cache=False out"),
        ({"past_key_values": filled()}, "hidden states of the whole prompt, which a cache lacks"),
        ({"past_key_values": filled().to_legacy_cache()}, "which a cache lacks .past_key_values."),
        ({"prefill_chunk_size": 4}, "whole prompt at once .prefill_chunk_size."),
        ({"penalty_alpha": 1.5}, "penalty_alpha cannot be 1.5: expected a number from 0 to 1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would repeat it"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_forward(arguments, text):
    model = forbid_forwards(build("llama"))
    with pytest.raises(GenerationError, match=text):
        model.generate(prompts(1)[0], **{"penalty_alpha": 0.6, "top_k": 4, **arguments})


def test_top_k_has_its_effect(caplog):
    build("llama").generate(prompts(1)[0], penalty_alpha=0.6, top_k=4, max_new_tokens=1)
    assert "no effect" not in caplog.text
