# SPDX-License-Identifier: Apache-2.0
"""Group and constrained beam search equal a slow version in plain Python; beams with every rule and cache."""

import pytest
import torch

from pretrained import GenerationConfig
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.core.constraints import (
    Constraint,
    ConstraintListState,
    DisjunctiveConstraint,
    PhrasalConstraint,
)
from pretrained.errors import GenerationError
from pretrained.torch.generation.logits import HammingDiversityLogitsProcessor
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.beams_reference import close, constrained_search, group_search
from support.generation import ENDS, SIZES, T5_SIZES, left_padded, prompt


def random_model(cls, config):
    torch.manual_seed(3)
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def llama():
    return random_model(LlamaForCausalLM, LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def t5():
    return random_model(T5ForConditionalGeneration, T5Config(**T5_SIZES))


def next_of(model, ids):
    """Return what the slow searches ask: log-probabilities after a row's prompt and new tokens."""
    known = {}

    @torch.no_grad()
    def log_probs(tokens):
        key = tuple(tokens)
        if key not in known:
            if model.config.is_encoder_decoder:
                start = torch.tensor([[0, *tokens]])
                logits = model(input_ids=ids[None], decoder_input_ids=start).logits
            else:
                logits = model(torch.cat([ids, torch.tensor(tokens, dtype=torch.int64)])[None]).logits
            known[key] = logits[0, -1].log_softmax(-1).tolist()
        return known[key]

    return log_probs


def check(model, ids, search, settings, **generate):
    """Compare a batch with the slow search of each of its rows."""
    wanted = generate.get("num_return_sequences", 1)
    found = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        eos_token_id=settings["ends"] or None,
        **generate,
    )
    start = found.sequences.shape[1] - found.beam_indices.shape[1]
    penalty = settings.get("penalty", 1.0)
    for row, of_row in enumerate(ids):
        expected = search(next_of(model, of_row), row)
        for i, (score, tokens) in enumerate(expected):
            at = row * wanted + i
            length = int((found.beam_indices[at] >= 0).sum())
            assert found.sequences[at, start : start + length].tolist() == tokens, (row, i)
            assert close(float(found.sequences_scores[at]), score)
    parts = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
    lengths = (found.beam_indices >= 0).sum(-1)
    torch.testing.assert_close(parts.sum(-1) / lengths**penalty, found.sequences_scores)
    return found


GROUPS = [
    {"beams": 4, "groups": 2, "diversity": 0.5, "ends": ENDS},
    {"beams": 4, "groups": 4, "diversity": 2.0, "ends": ENDS[:1]},
    {"beams": 6, "groups": 3, "diversity": 0.7, "ends": ENDS, "early": True, "wanted": 4},
    {"beams": 6, "groups": 2, "diversity": 5.0, "ends": ENDS, "early": "never", "penalty": 2.0, "wanted": 6},
    {"beams": 4, "groups": 2, "diversity": 1.0, "ends": ENDS, "early": "never", "penalty": -1.0},
    {"beams": 4, "groups": 2, "diversity": 1.0, "ends": ENDS, "penalty": 0.0, "wanted": 3},
    {"beams": 4, "groups": 2, "diversity": 1.0, "ends": []},
]


@pytest.mark.parametrize("settings", GROUPS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_groups(family, settings, request):
    model = request.getfixturevalue(family)
    settings = {"most": 10, "wanted": 2, **settings}
    check(
        model, prompt(),
        lambda log_probs, row: group_search(log_probs, **settings),
        settings,
        max_new_tokens=10,
        num_beams=settings["beams"],
        num_beam_groups=settings["groups"],
        diversity_penalty=settings["diversity"],
        length_penalty=settings.get("penalty", 1.0),
        early_stopping=settings.get("early", False),
        num_return_sequences=settings["wanted"],
    )  # fmt: skip


def test_groups_with_rules_padding_and_caches(llama, t5):
    ids, mask = left_padded()
    settings = {
        "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "max_new_tokens": 12,
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": ENDS,
        "prefix_allowed_tokens_fn": lambda row, ids: [i for i in range(61) if i % 4 != row],
    }  # fmt: skip
    batch = llama.generate(ids, attention_mask=mask, **settings)
    for row in range(3):
        settings["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: [i for i in range(61) if i % 4 != row]
        alone = llama.generate(ids[row : row + 1, 2 * row :], **settings)[0]
        assert torch.equal(batch[row, 2 * row :][: len(alone)], alone)
    del settings["prefix_allowed_tokens_fn"]
    for model in (llama, t5):
        plain = model.generate(prompt(), **settings)
        for more in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(prompt(), **settings, **more), plain)


def test_groups_differ_from_one_another(llama):
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 6, "eos_token_id": None}
    one = llama.generate(prompt(rows=1), **settings)
    several = llama.generate(prompt(rows=1), **settings, num_beam_groups=4, diversity_penalty=50.0)
    assert len(set(one[:, 8].tolist())) < 4
    assert all(len(set(several[:, position].tolist())) == 4 for position in range(8, 14))


def test_hamming_diversity():
    rule = HammingDiversityLogitsProcessor(0.5, num_beams=4, num_beam_groups=2)
    scores, ids = torch.zeros(4, 6), torch.zeros(4, 3, dtype=torch.int64)
    chosen = torch.tensor([5, 5, 0, 0, 1, 2, 0, 0])
    assert rule(ids, scores, current_tokens=chosen, beam_group_idx=0) is scores
    found = rule(ids, scores, current_tokens=chosen, beam_group_idx=1)
    assert found[0].tolist() == found[1].tolist() == [0, 0, 0, 0, 0, -1.0]
    assert found[2].tolist() == found[3].tolist() == [0, -0.5, -0.5, 0, 0, 0]
    for arguments in ((0.0, 4, 2), (1.0, 1, 2), (1.0, 4, 1), (1.0, 4, 3)):
        with pytest.raises(GenerationError):
            HammingDiversityLogitsProcessor(*arguments)


# -- constraints ---------------------------------------------------------------------------------

PHRASES = {
    "a word": [[[20]]],
    "a phrase": [[[20, 21, 22]]],
    "two phrases": [[[20, 21]], [[33]]],
    "a choice": [[[20, 21], [22, 23, 24]]],
    "a choice within a phrase": [[[20, 21], [20, 22, 23]], [[40, 20]]],
}


@pytest.mark.parametrize("phrases", PHRASES.values(), ids=PHRASES.keys())
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(
    "settings",
    [
        {"beams": 4, "ends": ENDS},
        {"beams": 3, "ends": ENDS[:1], "wanted": 3, "penalty": 0.0},
        {"beams": 5, "ends": ENDS, "early": True, "wanted": 2},
        {"beams": 4, "ends": ENDS, "early": "never", "penalty": 2.0},
    ],
)
def test_constraints(family, phrases, settings, request, caplog):
    model = request.getfixturevalue(family)
    settings = {"most": 9, "wanted": 1, **settings}
    ids = prompt(rows=2)
    forced = [choices[0] if len(choices) == 1 else choices for choices in phrases]

    def search(log_probs, row):
        start = [0] if model.config.is_encoder_decoder else ids[row].tolist()
        return constrained_search(log_probs, phrases, prompt=start, **settings)

    found = check(
        model, ids, search, settings,
        max_new_tokens=9,
        num_beams=settings["beams"],
        force_words_ids=forced,
        length_penalty=settings.get("penalty", 1.0),
        early_stopping=settings.get("early", False),
        num_return_sequences=settings["wanted"],
    )  # fmt: skip
    if "Not all sequences fulfil the constraints" in caplog.text:
        # Nine tokens leave little room; that it can be said is tested below.
        return
    for row in found.sequences.tolist()[:: settings["wanted"]]:
        for choices in phrases:
            assert any(c == row[i : i + len(c)] for c in choices for i in range(len(row)))


def test_constraint_objects_and_words_are_the_same(llama):
    settings = {"num_beams": 4, "max_new_tokens": 10, "eos_token_id": ENDS}
    words = llama.generate(prompt(), force_words_ids=[[20, 21], [[33], [31, 32]]], **settings)
    objects = [PhrasalConstraint([20, 21]), DisjunctiveConstraint([[33], [31, 32]])]
    assert torch.equal(llama.generate(prompt(), constraints=objects, **settings), words)
    config = GenerationConfig(constraints=objects, **settings)
    assert torch.equal(llama.generate(prompt(), generation_config=config), words)
    assert '"constraints"' not in config.to_json_string()
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(llama.generate(prompt(), constraints=objects, **settings, **more), words)


class Even(Constraint):
    """Three tokens of even number, one after the other."""

    seqlen = 3

    def __init__(self):
        self.count = 0
        super().__init__()

    def advance(self):
        return [2 * i for i in range(5, 12)] if self.count < 3 else None

    def does_advance(self, token_id):
        return self.count < 3 and token_id % 2 == 0

    def update(self, token_id):
        if not self.does_advance(token_id):
            self.reset()
            return False, False, True
        self.count += 1
        return True, self.count == 3, False

    def reset(self):
        self.count = 0

    def remaining(self):
        return 3 - self.count

    def copy(self, stateful=False):
        new = object.__new__(Even)
        new.count = self.count if stateful else 0
        return new


def test_a_constraint_of_ones_own(llama):
    odd = prompt() | 1
    found = llama.generate(odd, constraints=[Even()], num_beams=4, max_new_tokens=8, eos_token_id=None)
    for row in found[:, 8:].tolist():
        assert any(all(t % 2 == 0 for t in row[i : i + 3]) for i in range(6)), row


def test_a_broken_constraint_is_refused():
    class Stubborn(Even):
        def does_advance(self, token_id):
            return False

        def copy(self, stateful=False):
            new = object.__new__(Stubborn)
            new.count = 0
            return new

    with pytest.raises(GenerationError, match=r"Stubborn is not a working .*does_advance\(\) denies"):
        Stubborn()


def test_phrases_that_cannot_be():
    for ids in ([], [-1], "text", [1.5], [True]):
        with pytest.raises(GenerationError, match="A phrase is a list of token ids"):
            PhrasalConstraint(ids)
    with pytest.raises(GenerationError, match="A choice of phrases needs phrases"):
        DisjunctiveConstraint([])
    with pytest.raises(GenerationError, match=r"beginning of another one.*\[1\] and \[1, 2\]"):
        DisjunctiveConstraint([[1, 2], [3], [1]])


def test_progress_through_a_list():
    state = ConstraintListState([PhrasalConstraint([5, 6]), DisjunctiveConstraint([[7], [8, 9, 10]])])
    assert state.advance() == [5, 7, 8] and state.get_bank() == 0
    assert state.add(5) == (False, True)
    assert state.advance() == [6] and state.get_bank() == 2
    fork = state.copy()
    assert state.add(4) == (False, False) and state.get_bank() == 0 and len(state.pending_constraints) == 2
    assert fork.add(6) == (True, True) and fork.get_bank() == 3
    fork.add(8)
    assert fork.advance() == [9] and not fork.completed
    fork.reset([5, 6, 1, 7, 2])
    assert fork.completed and fork.advance() is None and fork.add(3) == (True, False)


def test_no_room_for_the_constraint(llama, caplog):
    found = llama.generate(prompt(), force_words_ids=[[20, 21, 22, 23]], num_beams=3, max_new_tokens=3)
    assert found.shape[1] <= 11 and "Not all sequences fulfil the constraints" in caplog.text
    caplog.clear()
    llama.generate(prompt(), force_words_ids=[[20, 21]], num_beams=3, max_new_tokens=5)
    assert "Not all sequences" not in caplog.text


# -- beams with caches ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "sliding_window", "quantized"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_every_cache(family, name, request):
    model = request.getfixturevalue(family)
    settings = {"num_beams": 4, "max_new_tokens": 20, "eos_token_id": None}
    # Everything is kept as it is until residual_length, so that no rounding changes the beams.
    more = {"cache_config": {"residual_length": 64}} if name == "quantized" else {}
    plain = model.generate(prompt(), **settings)
    found = model.generate(prompt(), **settings, cache_implementation=name, **more)
    assert torch.equal(found, plain)


def test_a_quantized_cache_is_reordered(llama):
    """Each beam's rounded past is its own: as if its sequence had been fed alone."""
    settings = {"num_beams": 4, "max_new_tokens": 20, "eos_token_id": None}
    rounded = {"cache_implementation": "quantized", "cache_config": {"nbits": 8, "residual_length": 1}}
    plain = llama.generate(prompt(), **settings, return_dict_in_generate=True, output_scores=True)
    found = llama.generate(prompt(), **settings, **rounded, return_dict_in_generate=True, output_scores=True)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores, rtol=0.05, atol=0.05)


def test_guidance_with_beams(llama):
    settings = {"guidance_scale": 1.5, "num_beams": 3, "max_new_tokens": 8, "eos_token_id": None}
    negative = prompt(length=4, seed=9)
    batch = llama.generate(prompt(), negative_prompt_ids=negative, **settings)
    for row in range(3):
        alone = llama.generate(
            prompt()[row : row + 1], negative_prompt_ids=negative[row : row + 1], use_cache=False, **settings
        )
        assert torch.equal(batch[row], alone[0])
