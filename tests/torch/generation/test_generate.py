# SPDX-License-Identifier: Apache-2.0
"""The loop on a toy whose answers are known: what it is fed, when it stops, what it leaves behind."""

import gc
import os
import signal
import threading
import time
import weakref

import pytest
import torch

from pretrained.core.constraints import PhrasalConstraint
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.generation import inputs as inputs_module
from pretrained.torch.generation.logits import LogitsProcessor
from pretrained.torch.generation.loop import Sequences
from pretrained.torch.generation.stopping import (
    EosTokenCriteria,
    InterruptCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopCheck,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from pretrained.torch.generation.strategies import draw
from pretrained.torch.generation.streamers import TextStreamer
from support.toy import VOCAB, Letters, Toy, fibonacci


@pytest.fixture
def toy():
    return Toy()


def ids(*rows):
    return torch.tensor(rows)


# -- what comes out ------------------------------------------------------------------------------


def test_greedy(toy):
    assert toy.generate(ids([1, 1], [2, 3]), max_new_tokens=9).tolist() == [
        fibonacci(1, 1, 9),
        fibonacci(2, 3, 9),
    ]


def test_a_finished_row_is_padded_and_the_loop_ends_with_the_last(toy):
    found = toy.generate(ids([1, 1], [2, 3]), max_new_tokens=20, eos_token_id=[8], pad_token_id=30)
    assert found.tolist() == [[1, 1, 2, 3, 5, 8], [2, 3, 5, 8, 30, 30]]
    assert len(toy.calls) == 4


def test_padding_falls_back_to_the_end_token(toy, caplog):
    caplog.set_level("INFO")
    found = toy.generate(ids([1, 1], [2, 3]), max_new_tokens=20, eos_token_id=[8, 13])
    assert found[1].tolist() == [2, 3, 5, 8, 8, 8]
    assert [r.message for r in caplog.records] == [
        "There is no pad_token_id; finished rows are filled with eos_token_id=8."
    ]


def test_ids_of_other_integer_types_are_taken(toy):
    assert toy.generate(ids([1, 1]).int(), max_new_tokens=1).dtype == torch.int64


def test_the_returned_tensor_is_an_ordinary_one_without_gradients(toy):
    found = toy.generate(ids([1, 1]), max_new_tokens=3)
    assert not found.is_inference() and found.is_contiguous() and not found.requires_grad
    found[0, 0] = 5
    assert torch.is_grad_enabled()


def test_long_outputs_grow_the_buffer(toy, monkeypatch):
    monkeypatch.setattr(Sequences, "_FIRST", 4)
    assert toy.generate(ids([1, 1]), max_new_tokens=50).tolist() == [fibonacci(1, 1, 50)]


# -- what goes in --------------------------------------------------------------------------------


def test_each_step_is_fed_one_token(toy):
    toy.generate(ids([1, 1, 2], [2, 3, 5]), max_new_tokens=4)
    assert [call["input_ids"].shape[1] for call in toy.calls] == [3, 1, 1, 1]
    assert all(call["attention_mask"] is None and call["position_ids"] is None for call in toy.calls)
    assert all(call["logits_to_keep"] == 1 and call["return_dict"] is True for call in toy.calls)


def test_without_a_cache_everything_is_fed_again(toy):
    found = toy.generate(ids([1, 1, 2]), max_new_tokens=4, use_cache=False)
    assert [call["input_ids"].shape[1] for call in toy.calls] == [3, 4, 5, 6]
    assert found[0, -1] == 13 and all(call["past_key_values"] is None for call in toy.calls)


def test_masks_and_positions_of_padded_rows(toy):
    mask = ids([0, 0, 1, 1], [1, 1, 1, 1])
    toy.generate(ids([0, 0, 1, 1], [1, 1, 2, 3]), attention_mask=mask, max_new_tokens=3)
    assert [call["attention_mask"].shape[1] for call in toy.calls] == [4, 5, 6]
    assert toy.calls[0]["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert toy.calls[1]["position_ids"].tolist() == [[2], [4]]
    assert toy.calls[2]["position_ids"].tolist() == [[3], [5]]
    assert toy.calls[2]["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]


def test_positions_of_ones_own_go_on(toy):
    toy.generate(ids([1, 1, 2]), position_ids=ids([7, 8, 9]), max_new_tokens=3)
    assert [call["position_ids"].tolist() for call in toy.calls] == [[[7, 8, 9]], [[10]], [[11]]]


def test_a_mask_of_ones_is_left_out(toy):
    toy.generate(ids([1, 1]), attention_mask=ids([1, 1]), max_new_tokens=2)
    assert all(call["attention_mask"] is None for call in toy.calls)


@pytest.mark.parametrize(
    ("name", "kind"), [("dynamic", DynamicCache), ("static", StaticCache), (None, DynamicCache)]
)
def test_the_cache_asked_for(toy, name, kind):
    out = toy.generate(ids([1, 1]), cache_implementation=name, max_new_tokens=6, return_dict_in_generate=True)
    assert type(out.past_key_values) is kind
    assert out.past_key_values.get_max_length() == (7 if name == "static" else -1)
    assert out.past_key_values.get_seq_length() == 7


def test_a_static_cache_of_the_size_asked_for(toy):
    out = toy.generate(
        ids([1, 1]),
        cache_implementation="static",
        max_cache_len=40,
        max_new_tokens=6,
        return_dict_in_generate=True,
    )
    assert out.past_key_values.get_max_length() == 40


def test_nothing_stays_on_the_model(toy):
    before = set(vars(toy))

    class Watched(DynamicCache):
        pass

    cache = Watched()
    ref = weakref.ref(cache)
    toy.generate(ids([1, 1]), past_key_values=cache, max_new_tokens=3)
    assert set(vars(toy)) == before and toy.generation_config == GenerationConfig()
    toy.calls.clear()
    del cache
    gc.collect()
    assert ref() is None


# -- a model that prepares its own inputs --------------------------------------------------------


class Hooked(Toy):
    """Runs its tokens plus one."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        self.seen = (*getattr(self, "seen", ()), (input_ids.shape[1], kwargs["cache_position"].tolist()))
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        prepared["input_ids"] = (prepared["input_ids"] + 1) % VOCAB
        return prepared


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_hook_of_the_models_own(use_cache):
    model = Hooked()
    found = model.generate(ids([1, 2]), max_new_tokens=4, use_cache=use_cache)
    row = [1, 2]
    for _ in range(4):
        row.append((row[-1] + row[-2] + 2) % VOCAB)
    assert found.tolist() == [row]
    positions = [[0, 1], [2], [3], [4]] if use_cache else [list(range(n)) for n in (2, 3, 4, 5)]
    assert model.seen == tuple((2 + i, p) for i, p in enumerate(positions))


def test_a_hook_sees_masks_and_positions():
    model = Hooked()
    model.generate(ids([0, 1, 2], [1, 2, 3]), attention_mask=ids([0, 1, 1], [1, 1, 1]), max_new_tokens=2)
    assert model.calls[0]["position_ids"].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert model.calls[1]["position_ids"].tolist() == [[2], [3]]
    assert model.calls[1]["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_a_hook_set_on_one_object(toy):
    toy.prepare_inputs_for_generation = lambda input_ids, **kwargs: {"input_ids": input_ids * 0 + 3}
    assert toy.generate(ids([1, 1]), max_new_tokens=2).tolist() == [[1, 1, 6, 6]]


# -- stopping ------------------------------------------------------------------------------------


def test_time_runs_out(toy):
    start = time.time()
    found = toy.generate(ids([1, 1]), max_new_tokens=10**6, max_time=0.05)
    assert time.time() - start < 5 and 2 < found.shape[1] < 10**6


def test_stop_strings_end_rows_in_the_middle_of_tokens(toy):
    # Letters of the rows: aabceh..., bcehm...
    found = toy.generate(
        ids([1, 1], [2, 3]), max_new_tokens=9, stop_strings=["ceh"], tokenizer=Letters(), pad_token_id=0
    )
    assert found.tolist() == [[1, 1, 2, 3, 5, 8], [2, 3, 5, 8, 0, 0]]


class Pieces:
    """Tokens of several letters, and of bytes of a letter."""

    TOKENS = (
        b"st",
        b"op",
        b"opera",
        b"las",
        b"topper",
        b"x",
        "é".encode()[:1],
        "é".encode()[1:],
        b"stop",
        b"",
    )

    def decode(self, ids):
        return b"".join(self.TOKENS[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("row", "done"),
    [
        ([0, 1], True),
        ([0, 2], True),
        ([3, 4], True),
        ([8], True),
        ([8, 5], False),
        ([8, 9], False),
        ([0], False),
        ([5, 0, 9, 1], True),
        ([8, 0, 1], True),
    ],
)
def test_stop_strings_against_token_borders(row, done):
    rule = StopStringCriteria(Pieces(), "stop")
    assert rule(torch.tensor([[5, 5, *row]]), None).tolist() == [done]


def test_stop_strings_of_incomplete_characters():
    rule = StopStringCriteria(Pieces(), ["é"])
    assert rule(torch.tensor([[5, 6]]), None).tolist() == [False]
    assert rule(torch.tensor([[5, 6, 7]]), None).tolist() == [True]


def test_stopping_rules_and_their_list():
    rows = ids([1, 2, 3], [4, 5, 6])
    assert EosTokenCriteria(3)(rows, None).tolist() == [True, False]
    assert EosTokenCriteria([6, 3])(rows, None).tolist() == [True, True]
    assert MaxLengthCriteria(3)(rows, None).all() and not MaxLengthCriteria(4)(rows, None).any()
    assert (
        MaxTimeCriteria(1, time.time() - 2)(rows, None).all() and not MaxTimeCriteria(100)(rows, None).any()
    )
    both = StoppingCriteriaList([EosTokenCriteria(3), lambda i, s, **k: False, MaxLengthCriteria(9)])
    assert both(rows, None).tolist() == [True, False] and both.max_length == 9
    assert StoppingCriteriaList()(rows, None).tolist() == [False, False]
    assert StoppingCriteriaList().max_length is None
    with pytest.raises(NotImplementedError, match="must define __call__"):
        StoppingCriteria()(rows, None)


def test_a_users_shorter_length_counts(toy):
    found = toy.generate(ids([1, 1]), max_new_tokens=9, stopping_criteria=[MaxLengthCriteria(5)])
    assert found.shape == (1, 5)


def test_rows_that_all_begin_or_end_alike_need_no_mask(toy):
    rows = ids([8, 1, 2, 8], [8, 3, 8, 8], [8, 8, 8, 8])[:1].expand(2, -1)
    assert toy.generate(rows, eos_token_id=8, pad_token_id=8, max_new_tokens=1).shape == (2, 5)
    padded = ids([8, 8, 3], [1, 2, 3])
    found = toy.generate(padded, attention_mask=ids([0, 0, 1], [1, 1, 1]), eos_token_id=8, max_new_tokens=1)
    assert found.shape == (2, 4)


def interrupt_at(length, *, times=1):
    def rule(input_ids, scores, **kwargs):
        if input_ids.shape[1] == length:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.001)
        return False

    return rule


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1}])
def test_ctrl_c_returns_what_there_is(toy, settings):
    before = signal.getsignal(signal.SIGINT)
    told = []
    streamer = TextStreamer(Letters(), skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: told.append(stream_end)
    with InterruptCriteria() as interrupt:
        found = toy.generate(
            ids([1, 1]),
            max_new_tokens=30,
            stopping_criteria=[interrupt_at(5), interrupt],
            streamer=None if settings else streamer,
            **settings,
        )
    assert interrupt.interrupted and found.tolist() == [fibonacci(1, 1, 3)]
    assert settings or told[-1] is True
    assert signal.getsignal(signal.SIGINT) is before
    # The same object serves again.
    with interrupt:
        assert toy.generate(ids([1, 1]), max_new_tokens=4, stopping_criteria=[interrupt]).shape == (1, 6)


def test_a_second_ctrl_c_ends_everything(toy):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), InterruptCriteria() as interrupt:
        toy.generate(ids([1, 1]), max_new_tokens=30, stopping_criteria=[interrupt_at(5, times=2), interrupt])
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        toy.generate(ids([1, 1]), max_new_tokens=30, stopping_criteria=[interrupt_at(5)])


def test_another_thread_can_stop_it(toy):
    interrupt = InterruptCriteria()

    def rule(input_ids, scores, **kwargs):
        if input_ids.shape[1] == 4:
            thread = threading.Thread(target=interrupt.stop)
            thread.start()
            thread.join()
        return False

    found = toy.generate(ids([1, 1]), max_new_tokens=30, stopping_criteria=[rule, interrupt])
    assert found.tolist() == [fibonacci(1, 1, 2)]
    errors = []

    def enter():
        try:
            interrupt.__enter__()
        except GenerationError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "Ctrl-C arrives in the main thread" in errors[0]


def test_users_criteria_see_the_scores(toy):
    seen = []

    def rule(input_ids, scores, **kwargs):
        seen.append((input_ids.shape[1], len(scores)))
        return len(scores) == 3

    toy.generate(ids([1, 1]), stopping_criteria=[rule], output_scores=True, return_dict_in_generate=True)
    assert seen == [(3, 1), (4, 2), (5, 3)]


# -- chance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 7), (3, 501), (5, 40000)])
def test_draws_are_those_of_multinomial(shape):
    probs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(3).softmax(-1)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.multinomial(probs, 1)[:, 0]
        torch.manual_seed(seed)
        assert torch.equal(draw(probs)[1], expected)


def test_draws_have_the_frequencies_of_their_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0]).expand(20000, 4).contiguous()
    counts = draw(probs, torch.Generator().manual_seed(0))[1].bincount(minlength=4) / 20000
    torch.testing.assert_close(counts, probs[0], rtol=0, atol=0.015)


# -- scores that are no numbers ------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [True, False])
def test_nan_names_step_and_row(toy, do_sample):
    toy.nan_at = (2, 1)
    with pytest.raises(GenerationError, match=r"not numbers \(step 2, row 1\).*remove_invalid_values=True"):
        toy.generate(ids([1, 1], [2, 3]), do_sample=do_sample, max_new_tokens=9)


def test_nan_of_a_finished_row_does_not_matter(toy):
    toy.nan_at = (2, 1)
    found = toy.generate(ids([1, 1], [3, 5]), max_new_tokens=6, eos_token_id=8, pad_token_id=0)
    assert found.tolist() == [[1, 1, 2, 3, 5, 8], [3, 5, 8, 0, 0, 0]]


def test_nan_can_be_gone_over(toy):
    toy.nan_at = (1, 0)
    assert toy.generate(ids([1, 1]), max_new_tokens=4, remove_invalid_values=True).shape == (1, 6)


def test_no_token_left_is_told_when_sampling(toy):
    everything = list(range(VOCAB))
    with pytest.raises(GenerationError, match=r"step 0, row 0.*no token left possible"):
        toy.generate(ids([1, 1]), do_sample=True, suppress_tokens=everything)


def test_the_check_counts_steps():
    check = StopCheck(2, torch.device("cpu"))
    assert not check(torch.zeros(2), torch.tensor([True, False]))
    assert check(torch.zeros(2), torch.tensor([False, True]))
    assert check.finish() == 2


# -- refused before the first forward ------------------------------------------------------------

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
BAD_INPUTS = [
    (
        {"input_ids": PROMPT + 27},
        r"Token id 32 is outside the vocabulary \(input_ids, row 1, position 1\): expected 0 to 31",
    ),
    ({"input_ids": PROMPT - 2}, r"Token id -1 is outside the vocabulary \(input_ids, row 0, position 0\)"),
    (
        {"input_ids": PROMPT[:, :0]},
        r"prompt is empty.*Pass at least one token, such as the tokenizer's bos_token_id, or some text",
    ),
    ({"input_ids": PROMPT[:0]}, "prompt is empty"),
    ({}, r"no prompt, and no token to begin with.*Pass input_ids, or bos_token_id="),
    (
        {"input_ids": PROMPT[0]},
        r"wrong rank \(input_ids\): expected \[batch, length\], found \[3\].*unsqueeze\(0\)",
    ),
    ({"input_ids": PROMPT[None]}, "wrong rank"),
    ({"input_ids": PROMPT.float()}, r"must be whole numbers.*expected int64, found torch\.float32"),
    ({"input_ids": PROMPT.bool()}, "must be whole numbers"),
    (
        {"input_ids": [[1, 2]]},
        r"must be a tensor of token ids.*found list\. Write torch\.tensor\(input_ids\)",
    ),
    ({"input_ids": [[1, 2], [3]]}, r"rows are of different lengths: tokenizer\.pad.*padding_side=.left."),
    (
        {"input_ids": torch.tensor([[8, 8, 3], [1, 2, 3]]), "eos_token_id": 8, "pad_token_id": 8},
        r"padded with token 8, which also ends a text.*\(attention_mask\).*or torch\.ones",
    ),
    ({"input_ids": torch.tensor([[3, 8], [1, 2]]), "eos_token_id": [8, 9]}, "seem padded with token 8"),
    ({"input_ids": {"input_ids": PROMPT}}, r"found dict\. Pass \*\*input_ids instead"),
    ({"inputs": PROMPT, "input_ids": PROMPT}, "prompt is given twice"),
    (
        {"input_ids": PROMPT, "max_length": 3},
        r"no room for a new token .*shorter than max_length=3, found 3 tokens.*Pass max_new_tokens",
    ),
    (
        {"input_ids": PROMPT, "attention_mask": PROMPT[:, :2]},
        r"attention_mask does not fit the prompt.*expected \[2, 3\], found \[2, 2\]",
    ),
    ({"input_ids": PROMPT, "attention_mask": [[1]]}, "expected .2, 3., found list"),
    (
        {"input_ids": PROMPT, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        r"hides its whole prompt \(attention_mask, row 1\)",
    ),
    ({"input_ids": PROMPT, "past_key_values": 3}, r"past_key_values has the wrong type.*expected a Cache"),
    (
        {"input_ids": PROMPT, "past_key_values": DynamicCache(), "cache_implementation": "static"},
        "A cache is passed and another one asked for",
    ),
    (
        {"input_ids": PROMPT, "past_key_values": DynamicCache(), "use_cache": False},
        "A cache is passed, and use_cache=False",
    ),
    (
        {"input_ids": PROMPT, "generation_config": {"top_k": 2}},
        r"expected a GenerationConfig, found dict.*GenerationConfig\(\*\*settings\)",
    ),
    (
        {"input_ids": PROMPT, "temprature": 2},
        r"Neither generate\(\) nor Toy takes 'temprature' .*Did you mean 'temperature'",
    ),
    (
        {"input_ids": PROMPT, "token_type_ids": PROMPT},
        r"takes 'token_type_ids'.*inputs\.pop\('token_type_ids'\)",
    ),
    ({"input_ids": PROMPT, "do_sample": True, "temperature": 0.0}, "temperature cannot be 0 when sampling"),
    ({"input_ids": PROMPT, "num_return_sequences": 2}, "num_return_sequences=2 would repeat it"),
    (
        {"input_ids": PROMPT, "min_new_tokens": 9, "max_new_tokens": 4},
        "min_new_tokens=9 is more than max_new_tokens=4",
    ),
    (
        {"input_ids": PROMPT, "min_length": 9, "max_new_tokens": 4},
        "min_length=9 asks for more than the 4 new tokens",
    ),
    (
        {"input_ids": PROMPT, "cache_implementation": "statc"},
        r"no cache_implementation 'statc'.*Did you mean 'static'",
    ),
    ({"input_ids": PROMPT, "stop_strings": ["x"]}, r"no tokenizer to make it.*Pass tokenizer="),
    ({"input_ids": PROMPT, "streamer": print}, r"streamer lacks put and end.*TextStreamer"),
    (
        {"input_ids": PROMPT, "streamer": TextStreamer(Letters()), "num_beams": 2},
        r"A streamer shows tokens that will not change .*found num_beams=2\. Pass num_beams=1",
    ),
    ({"input_ids": PROMPT, "bad_words_ids": [3]}, "bad_words_ids cannot be"),
    (
        {"input_ids": PROMPT, "num_beams": 2, "streamer": TextStreamer(Letters())},
        r"beams change until the end.*Pass num_beams=1",
    ),
    (
        {"input_ids": PROMPT, "num_beams": 2, "num_return_sequences": 3},
        "num_return_sequences=3 is more than num_beams=2",
    ),
    (
        {"input_ids": PROMPT, "num_beams": 20},
        r"num_beams=20 looks at 40 tokens a step, and there are only 32.*num_beams=16 or less",
    ),
    (
        {"input_ids": PROMPT, "num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0},
        r"num_beams=3 cannot be divided into num_beam_groups=2.*Pass num_beams=4",
    ),
    ({"input_ids": PROMPT, "num_beam_groups": 2}, r"num_beams=1 cannot be divided.*Pass num_beams=4"),
    (
        {"input_ids": PROMPT, "num_beams": 4, "num_beam_groups": 2},
        r"would all search alike with diversity_penalty=0.0.*above 0",
    ),
    (
        {
            "input_ids": PROMPT, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0,
            "do_sample": True,
        },
        "Groups of beams are searched, not sampled",
    ),
    ({"input_ids": PROMPT, "force_words_ids": [[1]]}, "force_words_ids are for beam search.*num_beams of 2"),
    (
        {"input_ids": PROMPT, "num_beams": 2, "force_words_ids": [[1]], "do_sample": True},
        "force_words_ids are for beam search, which do_sample=True is not",
    ),
    (
        {
            "input_ids": PROMPT, "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0,
            "constraints": [PhrasalConstraint([3])],
        },
        "constraints cannot be met by groups of beams",
    ),
    (
        {"input_ids": PROMPT, "num_beams": 2, "force_words_ids": [[3, 9]], "eos_token_id": 9},
        r"hold the token that ends a text.*add_special_tokens=False",
    ),
    ({"input_ids": PROMPT, "num_beams": 2, "force_words_ids": [3]}, "force_words_ids cannot be"),
    ({"input_ids": PROMPT, "num_beams": 2, "force_words_ids": [[[3]], []]}, "force_words_ids cannot be"),
    ({"input_ids": PROMPT, "num_beams": 2, "constraints": [[3]]}, "a list of Constraint objects"),
    ({"input_ids": PROMPT, "num_beams": 2, "force_words_ids": [[40]]}, "Token 40 .* outside the vocabulary"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), BAD_INPUTS)
def test_bad_input_is_refused_before_the_first_forward(toy, arguments, text):
    with pytest.raises(GenerationError, match=text):
        toy.generate(**arguments)
    assert toy.calls == []


LATER = {
    "use_mtp": True,
}


@pytest.mark.parametrize(("name", "value"), LATER.items(), ids=LATER.keys())
def test_what_is_not_built_yet_is_refused_by_name(toy, name, value):
    with pytest.raises(
        NotYetError, match=f"{name}=.* cannot be obeyed yet.*comes with the generation release"
    ):
        toy.generate(PROMPT, **{name: value})
    toy.generation_config.update(**{name: value})
    with pytest.raises(NotYetError, match=name):
        toy.generate(PROMPT)
    assert toy.calls == []


def test_neutral_values_of_what_is_not_built_yet_are_fine(toy):
    toy.generate(
        PROMPT, max_new_tokens=1, num_beams=1, guidance_scale=1.0, penalty_alpha=0.0, token_healing=False
    )


# -- lengths and positions -----------------------------------------------------------------------


def test_positions_bound_a_model_that_has_no_more(caplog):
    toy = Toy(max_position_embeddings=6)
    with pytest.raises(
        GenerationError, match=r"longer than the model has positions.*at most 6 tokens, found 7"
    ):
        toy.generate(torch.ones(1, 7, dtype=torch.int64))
    assert toy.generate(ids([1, 1, 2, 3])).shape[1] == 6
    assert toy.generate(ids([1, 1, 2, 3]), max_new_tokens=50).shape[1] == 7
    assert "stops after 3 new tokens, at the model's last position" in caplog.text


def test_rotary_positions_go_on_with_a_warning(caplog):
    toy = Toy(max_position_embeddings=6, rope_theta=10000.0)
    assert toy.generate(torch.ones(1, 7, dtype=torch.int64), max_new_tokens=3).shape[1] == 10
    assert "longer than the 6 positions that this model was trained with" in caplog.text


def test_both_lengths_are_told(toy, caplog):
    assert toy.generate(ids([1, 1]), max_new_tokens=3, max_length=50).shape[1] == 5
    assert "Both max_new_tokens=3 and max_length=50 are set; max_new_tokens counts" in caplog.text


def test_a_models_own_lengths_give_way_quietly(toy, caplog):
    toy.generation_config = GenerationConfig(max_length=50, min_length=30)
    assert toy.generate(ids([1, 1]), max_new_tokens=3).shape[1] == 5
    assert "min_length=30 cannot be reached: only 3 new tokens fit" in caplog.text
    assert "Both" not in caplog.text


def test_a_setting_without_effect_is_told(toy, caplog):
    toy.generate(ids([1, 1]), max_new_tokens=1, temperature=0.5)
    assert "temperature=0.5 has no effect: it is used only when sampling" in caplog.text


def test_right_padding_is_warned_of_once(toy, caplog):
    inputs_module._warn_once.cache_clear()
    mask = ids([1, 1, 1], [1, 1, 0])
    for _ in range(2):
        toy.generate(PROMPT, attention_mask=mask, max_new_tokens=1)
    assert caplog.text.count("A batch is padded on the right") == 1
    assert 'tokenizer.padding_side = "left"' in caplog.text


def test_a_cache_must_leave_something_to_run(toy):
    cache = DynamicCache()
    first = toy.generate(ids([1, 1]), past_key_values=cache, max_new_tokens=3)
    with pytest.raises(
        GenerationError, match=r"already holds the whole prompt.*more than 4 tokens.*found 4 tokens"
    ):
        toy.generate(first[:, :4], past_key_values=cache)
    cache.crop(-1)
    again = toy.generate(first[:, :4], past_key_values=cache, max_new_tokens=1)
    assert torch.equal(again, first)


def test_a_static_cache_without_room_is_refused_at_once(toy):
    cache = StaticCache(toy.config, 6)
    with pytest.raises(
        GenerationError, match=r"no room for the whole sequence.*max_cache_len=11 or more, found 6"
    ):
        toy.generate(ids([1, 1]), past_key_values=cache, max_new_tokens=10)
    assert toy.calls == []


def test_legacy_tuples_are_taken(toy):
    states = ids([1, 1])[:, None, :, None].float()
    found = toy.generate(ids([1, 1, 2]), past_key_values=((states, states),), max_new_tokens=3)
    assert found.tolist() == [fibonacci(1, 1, 4)]
    assert toy.calls[0]["input_ids"].tolist() == [[2]]


def test_a_rule_that_is_any_function(toy):
    class Not2(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor([2]), -1.0)

    for rule in (Not2(), lambda i, s: s.index_fill(1, torch.tensor([2]), -1.0)):
        assert toy.generate(ids([1, 1]), logits_processor=[rule], max_new_tokens=1).tolist() == [[1, 1, 0]]


def test_it_runs_under_inference_mode(toy):
    with torch.inference_mode():
        assert toy.generate(ids([1, 1]), max_new_tokens=9).tolist() == [fibonacci(1, 1, 9)]
