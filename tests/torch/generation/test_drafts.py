# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: the text is the model's own, whoever drafts it, and fewer forwards are run."""

import copy

import pytest
import torch

from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.watermarking import SynthIDTextWatermarkingConfig, WatermarkingConfig
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache import DynamicCache
from pretrained.torch.generation.assisted import DraftLength, first_layers
from pretrained.torch.generation.candidates import PromptLookupCandidateGenerator
from pretrained.torch.generation.logits import LogitsProcessor
from pretrained.torch.generation.speculative import accept_or_draw
from pretrained.torch.generation.stopping import StoppingCriteria
from pretrained.torch.generation.streamers import BaseStreamer
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.oracle import transformers_twin

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
ENDS = [2, 7, 11, 30, 41, 52]


def build(cls, config, seed=3, spread=0.3):
    torch.manual_seed(seed)
    model = cls(config).eval()
    for parameter in model.parameters():
        # Wide enough that the scores of random weights differ clearly.
        parameter.data.normal_(0, spread)
    return model


def nearly(model, noise=0.02):
    """Return a model that agrees with another one often, and not always."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter) * noise)
    return other


def prompt(rows=3, length=8, seed=0):
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows=3, length=8):
    ids = prompt(rows, length)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


def ways(model):
    return {
        "lookup": {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
        "assistant": {"assistant_model": nearly(model), "assistant_confidence_threshold": 0.1},
        "itself": {
            "assistant_model": model,
            "num_assistant_tokens": 4,
            "assistant_confidence_threshold": 0.0,
        },
        "early": {
            "assistant_early_exit": 2,
            "num_assistant_tokens": 3,
            "assistant_confidence_threshold": 0.0,
        },
    }


@pytest.fixture(scope="module")
def llama():
    return build(LlamaForCausalLM, LlamaConfig(**LLAMA))


@pytest.fixture(scope="module")
def gpt2():
    return build(GPT2LMHeadModel, GPT2Config(**GPT2))


@pytest.fixture(scope="module")
def mistral():
    return build(MistralForCausalLM, MistralForCausalLM.config_class(**LLAMA, sliding_window=6))


@pytest.fixture(scope="module")
def t5():
    return build(T5ForConditionalGeneration, T5Config(**T5))


class Counted:
    """Counts a model's forwards, and how many tokens each of them runs."""

    def __init__(self, model):
        self.widths = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        ids = kwargs.get("input_ids", kwargs.get("decoder_input_ids"))
        self.widths.append(ids.shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._hook.remove()


SETTINGS = {
    "plain": {},
    "ends": {"eos_token_id": ENDS, "pad_token_id": 0},
    "rules": {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "eos_token_id": ENDS,
    },
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("way", ["lookup", "assistant", "itself", "early"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_tokens_are_those_of_greedy_decoding(request, name, way, settings):
    model = request.getfixturevalue(name)
    for given in (left_padded(), {"inputs": prompt(1)}):
        plain = model.generate(**given, max_new_tokens=24, **settings)
        found = model.generate(**given, max_new_tokens=24, **settings, **ways(model)[way])
        assert torch.equal(found, plain)


@pytest.mark.parametrize("way", ["lookup", "assistant", "itself", "early"])
@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_encoder_decoders(t5, way, settings):
    ids = prompt(3)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    for more in ({}, {"decoder_input_ids": prompt(3, 4, seed=5)}):
        given = {"inputs": ids, "attention_mask": mask, "max_new_tokens": 20, **settings, **more}
        assert torch.equal(t5.generate(**given, **ways(t5)[way]), t5.generate(**given))


def test_a_smaller_encoder_decoder_drafts(t5):
    smaller = build(T5ForConditionalGeneration, T5Config(**T5 | {"num_layers": 1, "d_model": 16}), seed=4)
    given = {"inputs": prompt(2), "max_new_tokens": 16}
    assert torch.equal(t5.generate(**given, assistant_model=smaller), t5.generate(**given))


# -- how much is run -----------------------------------------------------------------------------


def test_a_right_draft_is_checked_in_one_forward(llama):
    way = {"assistant_model": llama, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0}
    with Counted(nearly(llama, 0)) as unused, Counted(llama) as both:
        llama.generate(prompt(1), max_new_tokens=11, **way)
    # The prompt; then, twice: the assistant's turns, and five tokens at once.
    assert not unused.widths
    assert both.widths == [8, 9, 1, 1, 1, 5, 2, 1, 1, 1, 5]


def test_rows_wait_for_the_slowest_only(llama):
    way = {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 3}
    alone = []
    for row in range(3):
        with Counted(llama) as counted:
            llama.generate(prompt(3)[row : row + 1], max_new_tokens=40, **way)
        alone.append(len(counted.widths))
    with Counted(llama) as counted:
        llama.generate(prompt(3), max_new_tokens=40, **way)
    assert max(alone) <= len(counted.widths) < 40


def test_a_wrong_draft_costs_one_forward_a_token_at_most(llama):
    other = build(LlamaForCausalLM, LlamaConfig(**LLAMA), seed=8)
    with Counted(llama) as counted:
        llama.generate(prompt(1), max_new_tokens=20, assistant_model=other)
    assert len(counted.widths) <= 20


def test_the_first_layers_share_the_cache(llama):
    settings = {"assistant_early_exit": 1, "num_assistant_tokens": 2, "assistant_confidence_threshold": 0}
    result = llama.generate(prompt(1), max_new_tokens=12, return_dict_in_generate=True, **settings)
    lengths = {result.past_key_values.get_seq_length(layer) for layer in range(3)}
    assert lengths == {8 + 12 - 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_leaving_early_changes_nothing_of_the_model(request, name):
    model = request.getfixturevalue(name)
    config, state = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(n, id(m)) for n, m in model.named_modules()]
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    own = model.generation_config.to_dict()
    model.generate(prompt(2), max_new_tokens=8, assistant_early_exit=2)
    with pytest.raises(GenerationError):
        model.generate(prompt(2), max_new_tokens=8, assistant_early_exit=3)
    assert model.config.to_dict() == config and model.generation_config.to_dict() == own
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_first_layers_are_those_of_a_shorter_model(llama):
    shorter = LlamaForCausalLM(LlamaConfig(**LLAMA | {"num_hidden_layers": 2})).eval()
    shorter.load_state_dict(llama.state_dict(), strict=False)
    ids = prompt(2)
    with torch.no_grad():
        assert torch.equal(first_layers(llama, 2)(ids).logits, shorter(ids).logits)


# -- prompt lookup -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known", "guess"),
    [
        ([1, 2, 3, 4, 1, 2], [], [3, 4, 1, 2]),
        # A repeating text goes on from its own copy.
        ([5, 6, 5, 6, 5], [], [6, 5, 6, 5]),
        ([7, 7], [], [7, 7, 7, 7]),
        # The longest run, then the latest place.
        ([1, 2, 3, 9, 2, 8, 1, 2], [], [3, 9, 2, 8]),
        ([1, 3, 1, 4, 1], [], [4, 1, 4, 1]),
        ([1, 2, 3], [], []),
        # What a row has decided beyond its text comes first.
        ([1, 2, 3, 4, 9], [1, 2], [1, 2, 3, 4, 9, 1]),
        ([1, 2, 3], [3], [3]),
        # Nothing follows an end.
        ([1, 2, 0, 4, 1, 2], [], [0]),
    ],
)
def test_what_is_looked_up(text, known, guess):
    lookup = PromptLookupCandidateGenerator(4, 2, eos_token_id=[0])
    draft = lookup.get_candidates(torch.tensor([text]), torch.tensor([known], dtype=torch.int64), 10, [True])
    assert draft.tokens[0].tolist() == guess and draft.probs is None


def test_lookup_of_several_rows():
    lookup = PromptLookupCandidateGenerator(3, 2, padding=[0, 2])
    nothing = torch.empty((2, 0), dtype=torch.int64)
    ids = torch.tensor([[1, 2, 3, 1], [0, 0, 5, 0]])
    # The padding of the second row is no text: its 0 is new.
    assert lookup.get_candidates(ids, nothing, 9, [True, True]).tokens.tolist() == [[2, 3, 1], [-1, -1, -1]]
    ids = torch.tensor([[1, 2, 3, 1, 2], [0, 0, 5, 0, 5]])
    assert lookup.get_candidates(ids, nothing, 2, [True, True]).tokens.tolist() == [[3, 1], [0, 5]]
    assert lookup.get_candidates(ids, nothing, 2, [False, False]).tokens.shape == (2, 0)


def test_an_encoders_input_is_looked_in():
    lookup = PromptLookupCandidateGenerator(3, encoder_input_ids=torch.tensor([[4, 5, 6, 7]]))
    nothing = torch.empty((1, 0), dtype=torch.int64)
    assert lookup.get_candidates(torch.tensor([[0, 5]]), nothing, 9, [True]).tokens.tolist() == [[6, 7, 0]]


def test_a_repetitive_text_takes_a_fraction_of_the_forwards(llama):
    class Seven(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([7]), 99.0)

    with Counted(llama) as counted:
        found = llama.generate(
            prompt(1), max_new_tokens=30, prompt_lookup_num_tokens=9, logits_processor=[Seven()]
        )
    assert found[0, 8:].tolist() == [7] * 30
    # Once for the prompt, until the text repeats itself, and then ten tokens at a time.
    assert len(counted.widths) <= 7


# -- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}])
def test_lookup_draws_what_is_drawn_without_it(llama, filters):
    def run(**way):
        source = torch.Generator().manual_seed(5)
        return llama.generate(
            prompt(1), max_new_tokens=30, do_sample=True, generator=source, **filters, **way
        )

    assert torch.equal(run(prompt_lookup_num_tokens=4, max_matching_ngram_size=1), run())


def frequencies(tokens, vocab):
    cells = (tokens * torch.tensor([vocab**2, vocab, 1])).sum(-1)
    return torch.bincount(cells, minlength=vocab**3).double()


def joint(model, ids, vocab, rule=lambda scores: scores):
    """Return the probability of each triple of new tokens, [vocab ** 3]."""
    triples = torch.cartesian_prod(*[torch.arange(vocab)] * 3)
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(len(triples), -1), triples], 1)).logits.double()
    probs = rule(logits[:, ids.shape[1] - 1 : -1]).softmax(-1)
    return probs.gather(-1, triples[..., None])[..., 0].prod(-1)


def chi_square(counts, probs):
    expected = probs * counts.sum()
    seen = expected > 0
    if counts[~seen].any():
        return float("inf"), int(seen.sum()) - 1
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-30))[seen].sum()), int(seen.sum()) - 1


@pytest.mark.parametrize("way", ["assistant", "assistant filtered", "early", "lookup"])
def test_samples_have_the_models_distribution(way):
    vocab, rows = 5, 6000
    sizes = LLAMA | {"vocab_size": vocab, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    target = build(LlamaForCausalLM, LlamaConfig(**sizes | {"bos_token_id": None}), seed=1, spread=0.35)
    draft = build(LlamaForCausalLM, LlamaConfig(**sizes | {"bos_token_id": None}), seed=2, spread=0.35)
    settings = {"num_assistant_tokens": 2, "assistant_confidence_threshold": 0, "top_k": 0}
    settings |= {
        "assistant": {"assistant_model": draft},
        "assistant filtered": {"assistant_model": draft, "temperature": 0.8, "top_k": 3},
        "early": {"assistant_early_exit": 1},
        "lookup": {"prompt_lookup_num_tokens": 2},
    }[way]
    if way == "lookup":
        settings.pop("num_assistant_tokens"), settings.pop("assistant_confidence_threshold")
    ids = torch.tensor([[3, 4, 3]])
    source = torch.Generator().manual_seed(0)
    found = target.generate(
        ids.expand(rows, -1), max_new_tokens=3, do_sample=True, generator=source, **settings
    )
    counts = frequencies(found[:, 3:], vocab)

    def rule(scores):
        if way != "assistant filtered":
            return scores
        scores = scores / 0.8
        return scores.masked_fill(scores < scores.topk(3).values[..., -1:], -torch.inf)

    statistic, degrees = chi_square(counts, joint(target, ids, vocab, rule))
    # Mean and spread of the statistic are `degrees` and its doubled root.
    bound = degrees + 4 * (2 * degrees) ** 0.5
    assert statistic < bound
    # The test can tell: against the drafting model's distribution it fails by far.
    other = draft if way.startswith("assistant") else first_layers(target, 1)
    counts_of_other = joint(other, ids, vocab, rule) * rows
    assert chi_square(counts_of_other, joint(target, ids, vocab, rule))[0] > bound


def test_rejection_of_one_token():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).expand(40000, -1)
    q = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).expand(40000, -1)
    source = torch.Generator().manual_seed(0)
    guess = torch.multinomial(q, 1, generator=source)[:, 0]
    guess[:10000] = -1
    _, tokens = accept_or_draw(p, guess, q, source)
    for part in (tokens[:10000], tokens[10000:]):
        share = torch.bincount(part, minlength=4) / len(part)
        assert torch.allclose(share, p[0], atol=0.015) and share[3] == 0
    # What both agree on is never refused, whatever rounding does.
    agreed = torch.multinomial(p, 1, generator=source)[:, 0]
    assert torch.equal(accept_or_draw(p, agreed, p.clone(), source)[1], agreed)


# -- rules, stopping, streams, results -----------------------------------------------------------


class Avoid(LogitsProcessor):
    """A rule that looks at all tokens so far."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids.sum(1) % 61, -5.0)


class Sum(StoppingCriteria):
    """A row ends where its tokens add up to something."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None or len(scores) == input_ids.shape[1] - 8
        return input_ids.sum(1) % 13 == 0


class Kept(BaseStreamer):
    def __init__(self):
        self.pieces = []
        self.ended = 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("way", ["lookup", "itself", "early"])
def test_users_rules_criteria_and_streamers(llama, way):
    def run(rows, **more):
        streamer = Kept()
        found = llama.generate(
            **rows, max_new_tokens=20, logits_processor=[Avoid()], stopping_criteria=[Sum()],
            streamer=streamer, pad_token_id=0, **more,
        )  # fmt: skip
        return found.tolist(), streamer.pieces, streamer.ended

    for rows in (left_padded(), {"inputs": prompt(1, seed=2)}):
        assert run(rows, **ways(llama)[way]) == run(rows)


@pytest.mark.parametrize("way", ["lookup", "itself", "early"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_returned_values_are_those_of_plain_decoding(request, name, way):
    model = request.getfixturevalue(name)
    wanted = {f"output_{kind}": True for kind in ("scores", "logits", "attentions", "hidden_states")}
    given = {
        "inputs": prompt(2),
        "max_new_tokens": 12,
        "repetition_penalty": 1.1,
        "return_dict_in_generate": True,
    }
    plain = model.generate(**given, **wanted)
    found = model.generate(**given, **wanted, **ways(model)[way])
    assert list(found) == list(plain) and type(found) is type(plain)
    torch.testing.assert_close(
        {k: v for k, v in found.items() if k != "past_key_values"},
        {k: v for k, v in plain.items() if k != "past_key_values"},
        atol=2e-4,
        rtol=1e-4,
    )
    assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    for ours, theirs in zip(found.past_key_values, plain.past_key_values, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_cache_goes_on(llama):
    whole = llama.generate(prompt(1), max_new_tokens=20)
    for way in ways(llama).values():
        cache = DynamicCache(config=llama.config)
        begun = llama.generate(prompt(1), max_new_tokens=9, past_key_values=cache, **way)
        assert torch.equal(llama.generate(begun, max_new_tokens=11, past_key_values=cache, **way), whole)


@pytest.mark.parametrize("name", ["offloaded", "sliding_window", "offloaded_static", "dynamic_full"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_every_cache(request, kind, name):
    model = request.getfixturevalue(kind)
    if (kind, name) == ("llama", "sliding_window"):
        pytest.skip("nothing of it slides")
    for way in ways(model).values():
        given = {**left_padded(), "max_new_tokens": 20, "cache_implementation": name}
        assert torch.equal(model.generate(**given, **way), model.generate(**given))


def test_a_cache_that_rounds_is_refused(llama):
    with pytest.raises(GenerationError, match=r"rounds depends .*cache_implementation.*Leave the draft out"):
        llama.generate(prompt(1), cache_implementation="quantized", prompt_lookup_num_tokens=3)


def test_prompts_as_vectors(llama):
    embeds = llama.get_input_embeddings()(prompt(2))
    plain = llama.generate(inputs_embeds=embeds, max_new_tokens=16)
    for way in ("lookup", "early"):
        assert torch.equal(llama.generate(inputs_embeds=embeds, max_new_tokens=16, **ways(llama)[way]), plain)


def test_chunks_and_stop_lengths(llama):
    plain = llama.generate(prompt(1), max_new_tokens=7)
    for way in ways(llama).values():
        assert torch.equal(llama.generate(prompt(1), max_length=15, prefill_chunk_size=3, **way), plain)
        assert torch.equal(llama.generate(prompt(1), max_new_tokens=1, **way), plain[:, :9])


def test_hooked_models():
    class Hooked(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model = build(Hooked, LlamaConfig(**LLAMA))
    for settings in ({}, {"use_cache": False}):
        plain = model.generate(**left_padded(), max_new_tokens=16, **settings)
        for way in ways(model).values():
            assert torch.equal(model.generate(**left_padded(), max_new_tokens=16, **settings, **way), plain)


def test_several_sequences_of_a_prompt(llama):
    found = llama.generate(
        prompt(2), max_new_tokens=8, do_sample=True, num_return_sequences=3, assistant_model=nearly(llama)
    )
    assert found.shape == (6, 16)


def test_an_assistant_with_fewer_positions(gpt2):
    small = build(GPT2LMHeadModel, GPT2Config(**GPT2 | {"n_positions": 12, "n_layer": 1}), seed=5)
    given = {"inputs": prompt(1), "max_new_tokens": 20}
    assert torch.equal(gpt2.generate(**given, assistant_model=small), gpt2.generate(**given))


def test_nan_names_the_step(llama):
    def broken(input_ids, scores):
        return scores * float("nan") if input_ids.shape[1] == 11 else scores

    for way in ways(llama).values():
        with pytest.raises(GenerationError, match=r"not numbers \(step 3, row 0\)"):
            llama.generate(prompt(2), max_new_tokens=9, logits_processor=[broken], **way)


# -- how many tokens -----------------------------------------------------------------------------


def test_schedules():
    fixed, moving = DraftLength(5), DraftLength(5, "heuristic_transient")
    for length in (fixed, moving):
        length.update(5, 5)
    assert (fixed.tokens, moving.tokens) == (5, 7)
    for _ in range(9):
        moving.update(7, 6)
    assert moving.tokens == 1


@pytest.mark.parametrize(
    ("schedule", "first"), [("heuristic", 7), ("heuristic_transient", 3), ("constant", 3)]
)
def test_what_a_schedule_keeps_between_calls(llama, schedule, first):
    assistant = copy.deepcopy(llama)
    before = assistant.generation_config.to_dict()
    settings = {
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": schedule,
        "assistant_confidence_threshold": 0,
    }
    widths = []
    for _ in range(2):
        with Counted(llama) as counted:
            llama.generate(prompt(1), max_new_tokens=12, assistant_model=assistant, **settings)
        widths.append(counted.widths)
    assert widths[1][1] == first + 1
    assert assistant.generation_config.to_dict() == before


def test_an_assistants_own_settings_count_where_the_call_says_nothing(llama):
    assistant = copy.deepcopy(llama)
    assistant.generation_config = GenerationConfig(num_assistant_tokens=2, assistant_confidence_threshold=0)
    for more, width in (({}, 3), ({"num_assistant_tokens": 5}, 6)):
        with Counted(llama) as counted:
            llama.generate(prompt(1), max_new_tokens=12, assistant_model=assistant, **more)
        assert counted.widths[1] == width


def test_an_unsure_assistant_stops_early(llama):
    settings = {"assistant_model": copy.deepcopy(llama), "num_assistant_tokens": 6}
    with Counted(llama) as counted:
        llama.generate(prompt(1), max_new_tokens=12, **settings, assistant_confidence_threshold=1.0)
    # The unsure token itself is checked.
    assert set(counted.widths[1:-1]) == {2}


def test_a_model_as_an_assistant_stops_where_it_is_unsure(llama):
    given = {"inputs": prompt(1), "max_new_tokens": 20, "return_dict_in_generate": True}
    plain = llama.generate(**given, output_scores=True)
    chances = [
        float(scores.softmax(-1)[0, token])
        for scores, token in zip(plain.scores, plain.sequences[0, 8:], strict=True)
    ]
    threshold = sorted(chances)[4]
    first = next(step for step, chance in enumerate(chances) if chance < threshold)
    found = llama.generate(**given, is_assistant=True, assistant_confidence_threshold=threshold)
    assert found.sequences.shape[1] == 8 + first + 1 and found.scores is None


# -- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("do_rules", [False, True])
def test_tokens_equal_transformers(llama, do_rules):
    rules = {"repetition_penalty": 1.3, "eos_token_id": ENDS} if do_rules else {}
    small = build(LlamaForCausalLM, LlamaConfig(**LLAMA | {"num_hidden_layers": 1}), seed=5)
    twin, small_twin = transformers_twin(llama), transformers_twin(small)
    given = {"max_new_tokens": 24, "do_sample": False, **rules}
    for seed in range(3):
        ids = prompt(1, seed=seed)
        theirs = twin.generate(ids, prompt_lookup_num_tokens=4, **given)
        assert torch.equal(llama.generate(ids, prompt_lookup_num_tokens=4, **given), theirs)
        theirs = twin.generate(ids, assistant_model=small_twin, **given)
        assert torch.equal(llama.generate(ids, assistant_model=small, **given), theirs)


def test_a_bare_encoder_decoder_against_transformers(t5):
    twin = transformers_twin(t5)
    theirs = twin.generate(prompt(1), prompt_lookup_num_tokens=3, max_new_tokens=16, do_sample=False)
    assert torch.equal(t5.generate(prompt(1), prompt_lookup_num_tokens=3, max_new_tokens=16), theirs)


# -- bad input -----------------------------------------------------------------------------------

BAD = {
    "beams": ({"num_beams": 2}, "num_beams"),
    "contrast": ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
    "guidance": ({"guidance_scale": 2.0}, "guidance_scale"),
    "two": (
        {"prompt_lookup_num_tokens": 3},
        "One draft at a time .*assistant_model, prompt_lookup_num_tokens",
    ),
    "no model": ({"assistant_model": "small"}, "must be a model .*found str.* AutoModelForCausalLM"),
    "vectors": (
        {"inputs": None, "inputs_embeds": torch.zeros(1, 3, 32)},
        "ids, and here .* vectors.*input_ids",
    ),
    "one tokenizer": ({"assistant_tokenizer": object()}, r"One tokenizer is missing \(tokenizer\)"),
}


@pytest.mark.parametrize(("arguments", "text"), BAD.values(), ids=BAD.keys())
def test_what_cannot_work_is_refused_before_the_first_forward(llama, arguments, text):
    given = {"inputs": prompt(1), "assistant_model": nearly(llama), "max_new_tokens": 4} | arguments
    with Counted(llama) as counted, pytest.raises((GenerationError, NotYetError), match=text):
        llama.generate(**given)
    assert not counted.widths


def test_assistants_that_do_not_fit(llama, t5):
    other = build(LlamaForCausalLM, LlamaConfig(**LLAMA | {"vocab_size": 70}))
    with pytest.raises(
        GenerationError, match=r"another vocabulary .*expected 61 tokens, found 70.* Pass both"
    ):
        llama.generate(prompt(1), assistant_model=other)
    with pytest.raises(
        GenerationError, match="The assistant is an encoder-decoder and the model a decoder alone"
    ):
        llama.generate(prompt(1), assistant_model=t5)
    with pytest.raises(GenerationError, match="a decoder alone and the model an encoder-decoder"):
        t5.generate(prompt(1), assistant_model=llama)
    with pytest.raises(NotYetError, match="assistant_ensemble_weight"):
        llama.generate(prompt(1), assistant_model=llama, assistant_ensemble_weight=0.5)
    with pytest.raises(GenerationError, match="assistant_tokenizer belongs to an assistant"):
        llama.generate(prompt(1), assistant_tokenizer=object())


def test_an_assistant_on_another_device(llama, monkeypatch):
    other = copy.deepcopy(llama)
    places = {id(llama): torch.device("cpu"), id(other): torch.device("cuda", 1)}
    monkeypatch.setattr("pretrained.torch.generation.drafting._place", lambda model: places[id(model)])
    with pytest.raises(GenerationError, match=r"on cuda:1 and the model on cpu.*assistant.to\('cpu'\)"):
        llama.generate(prompt(1), assistant_model=other)


@pytest.mark.parametrize("layers", [3, 9])
def test_an_exit_that_is_none(llama, layers):
    with pytest.raises(
        GenerationError, match=r"leaves no layer out .*expected 1 to 2: the model has 3 layers"
    ):
        llama.generate(prompt(1), assistant_early_exit=layers)


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "assistant_early_exit", "num_assistant_tokens"])
def test_numbers_below_one(llama, name):
    with pytest.raises(GenerationError, match=f"{name} cannot be 0: expected a whole number of 1 or more"):
        llama.generate(prompt(1), **{name: 0})
    with pytest.raises(GenerationError, match="num_output_tokens must be 1 or more"):
        PromptLookupCandidateGenerator(0)


def test_a_cache_that_an_assistant_has_not_seen(llama):
    cache = DynamicCache(config=llama.config)
    llama.generate(prompt(1), max_new_tokens=4, past_key_values=cache)
    new = prompt(1, 3, seed=4)
    mask = torch.ones((1, cache.get_seq_length() + 3), dtype=torch.int64)
    with pytest.raises(GenerationError, match=r"not seen .*past_key_values.*assistant_early_exit"):
        llama.generate(new, attention_mask=mask, past_key_values=cache, assistant_model=llama)


def test_watermarks(llama):
    green = WatermarkingConfig(bias=2.0)
    plain = llama.generate(prompt(2), max_new_tokens=12, watermarking_config=green)
    for way in ways(llama).values():
        assert torch.equal(
            llama.generate(prompt(2), max_new_tokens=12, watermarking_config=green, **way), plain
        )
    mark = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 8])
    with pytest.raises(GenerationError, match=r"every token once and in order.*watermarking_config"):
        llama.generate(prompt(1), do_sample=True, watermarking_config=mark, prompt_lookup_num_tokens=3)


def test_settings_without_drafts_are_told(llama, caplog):
    llama.generate(prompt(1), max_new_tokens=2, num_assistant_tokens=5)
    assert "num_assistant_tokens=5 has no effect: it is used only where tokens are drafted" in caplog.text


def test_layers_that_are_not_to_be_found(llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: self.lm_head)
    with pytest.raises(NotYetError, match="The layers of LlamaForCausalLM are not to be found"):
        llama.generate(prompt(1), assistant_early_exit=1)
