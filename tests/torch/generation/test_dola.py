# SPDX-License-Identifier: Apache-2.0
"""DoLa against a slow version of its formulas; which layers are meant; rows that do not touch each other."""

import math

import pytest
import torch

from pretrained.arch.llama import LlamaConfig
from pretrained.errors import GenerationError
from pretrained.torch.generation.dola import candidate_layers, layer_contrast
from pretrained.torch.models.llama import LlamaForCausalLM
from support.decoders import ENDS, LLAMA, build, forbid_forwards, prompts


def deep(layers=6, **settings):
    torch.manual_seed(5)
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": layers, **settings})
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def log_softmax(values):
    top = max(values)
    total = math.log(sum(math.exp(value - top) for value in values))
    return [value - top - total for value in values]


def slow_contrast(final, earlier):
    """Return one row's scores; `final` and each of `earlier` are lists of the head's scores."""
    mature, premature = log_softmax(final), [log_softmax(values) for values in earlier]

    def distance(values):
        total = 0.0
        for a, b in zip(mature, values, strict=True):
            middle = (math.exp(a) + math.exp(b)) / 2
            total += middle * (math.log(middle) - a) + middle * (math.log(middle) - b)
        return total / len(mature)

    base = max(premature, key=distance)
    least = max(mature) + math.log(0.1)
    return [a - b if a >= least else -math.inf for a, b in zip(mature, base, strict=True)]


def slow(model, row, layers, new, ends=()):
    row = list(row)
    for _ in range(new):
        with torch.no_grad():
            out = model(torch.tensor([row]), output_hidden_states=True, use_cache=False)
            earlier = [model.lm_head(out.hidden_states[layer][0, -1]).tolist() for layer in layers]
        scores = slow_contrast(out.logits[0, -1].tolist(), earlier)
        row.append(scores.index(max(scores)))
        if row[-1] in ends:
            break
    return row


@pytest.mark.parametrize("asked", ["low", "high", [3], [0, 2, 5]])
def test_it_is_what_a_slow_version_finds(asked):
    model = deep()
    ids, mask = prompts()
    layers = {"low": [0, 2], "high": [3, 5]}.get(str(asked), asked)
    found = model.generate(
        ids, attention_mask=mask, dola_layers=asked, max_new_tokens=8, eos_token_id=ENDS, pad_token_id=0
    )
    for row, padded, result in zip(ids.tolist(), (mask == 0).sum(1).tolist(), found.tolist(), strict=True):
        expected = slow(model, row[padded:], layers, 8, ENDS)
        assert result[padded : padded + len(expected)] == expected
        assert set(result[padded + len(expected) :]) <= {0}


def test_the_contrast():
    generator = torch.Generator().manual_seed(0)
    final, earlier = torch.randn(4, 20, generator=generator) * 2, torch.randn(3, 4, 20, generator=generator)
    found = layer_contrast(final, earlier)
    for row in range(4):
        expected = slow_contrast(final[row].tolist(), earlier[:, row].tolist())
        torch.testing.assert_close(found[row], torch.tensor(expected))


@pytest.mark.parametrize(
    ("layers", "tied", "asked", "expected"),
    [
        (6, False, "low", [0, 2]),
        (6, True, "low", [2]),
        (2, True, "low", [0]),
        (32, False, "low", list(range(0, 16, 2))),
        (32, False, "high", list(range(16, 32, 2))),
        (48, True, "low", list(range(2, 20, 2))),
        (48, False, "high", list(range(28, 48, 2))),
        (6, False, [5, 1, 1], [1, 5]),
    ],
)
def test_the_layers_that_are_meant(layers, tied, asked, expected):
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(**{**LLAMA, "num_hidden_layers": layers, "tie_word_embeddings": tied})
        )
    assert candidate_layers(model, asked) == expected


def test_scores_are_the_contrast_and_logits_the_models():
    model = deep()
    ids, _ = prompts(1)
    out = model.generate(
        ids,
        dola_layers=[2],
        max_new_tokens=2,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    with torch.no_grad():
        again = model(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits[0], again.logits[:, -1])
    possible = out.scores[0] > -math.inf
    relative = again.logits[:, -1].log_softmax(-1)
    assert torch.equal(possible, relative >= relative.max() + math.log(0.1))
    assert len(out.hidden_states) == 2 and len(out.hidden_states[0]) == 7


def test_it_can_be_drawn_from():
    model = deep()
    ids, _ = prompts(2)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            ids, dola_layers="low", do_sample=True, max_new_tokens=12, eos_token_id=None, generator=generator
        )

    assert torch.equal(draw(0), draw(0)) and any(not torch.equal(draw(0), draw(n)) for n in range(1, 5))


def test_nothing_of_it_stays():
    model = deep()
    ids, _ = prompts(1)
    before = model.generate(ids, max_new_tokens=6)
    model.generate(ids, dola_layers="high", max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), before)


@pytest.mark.parametrize(
    ("name", "asked", "text"),
    [
        ("llama", [2], r"no layer 2 before the last one \(dola_layers\): expected 0 .* to 1"),
        ("llama", "middle", r"dola_layers cannot be 'middle': expected \"low\", \"high\" or a list"),
        ("llama", [], "dola_layers cannot be "),
        ("llama", [-1], "dola_layers cannot be "),
        ("t5", "low", r"layers of a decoder-only model \(dola_layers\): found T5ForConditionalGeneration"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_forward(name, asked, text):
    model = forbid_forwards(build(name))
    with pytest.raises(GenerationError, match=text):
        model.generate(prompts(1)[0], dola_layers=asked)


def test_a_model_too_shallow_for_a_word():
    with pytest.raises(GenerationError, match=r"1 layers has none that dola_layers='low' means.*Pass a list"):
        candidate_layers(deep(1), "low")
