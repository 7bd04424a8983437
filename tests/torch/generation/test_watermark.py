# SPDX-License-Identifier: Apache-2.0
"""Watermarks: scores, tokens and verdicts equal the slow version's and transformers', and marks are found."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as oracle
from transformers.generation import watermarking as oracle_detection

import pretrained
from pretrained.arch.llama import LlamaConfig
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.watermarking import SynthIDTextWatermarkingConfig, WatermarkingConfig
from pretrained.errors import GenerationError
from pretrained.testing import reference
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.rules import build_processors
from pretrained.torch.generation.settings import Lengths
from pretrained.torch.generation.watermark import (
    WatermarkLogitsProcessor,
)
from pretrained.torch.generation.watermark_detection import (
    SynthIDTextWatermarkDetector,
    WatermarkDetector,
    mean_z_score,
)
from pretrained.torch.models.llama import LlamaForCausalLM
from support.oracle import transformers_twin

VOCAB = 97
SCHEMES = [("lefthash", 1), ("lefthash", 3), ("selfhash", 1), ("selfhash", 4)]
KEYS = [654, 400, 836, 123, 340]
SYNTHID = {"ngram_len": 3, "keys": KEYS, "sampling_table_size": 512, "sampling_table_seed": 0}


def make(seed=0, rows=4, length=9, high=VOCAB):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, high, (rows, length), generator=gen)
    scores = torch.randn(rows, VOCAB, generator=gen) * 3
    scores[0, 5] = -torch.inf
    return ids, scores


def slow_green(ids, scores, rule):
    def green(window):
        seed = rule.seeds(torch.tensor([window]))[0]
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
        return set(order[: int(VOCAB * 0.25)].tolist())

    own = rule.seeding_scheme == "selfhash"
    return reference.green_tokens(ids, scores, green, rule.bias, own, rule.context_width)


@pytest.mark.parametrize(("scheme", "width"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_green_tokens(scheme, width, dtype):
    settings = {"bias": 1.7, "seeding_scheme": scheme, "context_width": width}
    rule, theirs = (
        m(VOCAB, "cpu", **settings) for m in (WatermarkLogitsProcessor, oracle.WatermarkLogitsProcessor)
    )
    for seed in (0, 1, 0):
        ids, scores = make(seed)
        scores = scores.to(dtype)
        before = scores.clone()
        found = rule(ids, scores)
        if dtype == torch.float32:
            slow = slow_green(ids.numpy(), scores.numpy().astype(np.float64), rule)
            np.testing.assert_allclose(found.numpy(), slow, rtol=1e-6)
        assert found.dtype == dtype and torch.equal(found, theirs(ids, scores))
        assert torch.equal(scores, before) and not torch.equal(found, before)


def test_a_context_too_short_is_left_without_a_mark(caplog):
    ids, scores = make(length=2)
    rule = WatermarkLogitsProcessor(VOCAB, "cpu", context_width=3)
    with caplog.at_level(logging.WARNING):
        assert rule(ids, scores) is scores and rule(ids, scores) is scores
    assert caplog.text.count("No watermark until there are context_width=3 tokens") == 1


@pytest.mark.parametrize("scores_width", [VOCAB - 4, VOCAB + 4])
def test_a_head_that_is_narrower_or_wider_than_the_vocabulary(scores_width):
    ids, _ = make()
    scores = torch.zeros(4, scores_width)
    for scheme in ("lefthash", "selfhash"):
        found = WatermarkLogitsProcessor(VOCAB, "cpu", seeding_scheme=scheme)(ids, scores)
        assert found.shape == scores.shape and set(found.unique().tolist()) == {0.0, 2.0}


def synthid(module, history=16, **more):
    settings = {**SYNTHID, "context_history_size": history, "device": "cpu", **more}
    return module.SynthIDTextWatermarkLogitsProcessor(**settings)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"skip_first_ngram_calls": True},
        {"debug_mode": True},
        {"sampling_table_size": 300},
        {"history": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tournament(more, dtype):
    ours, theirs = synthid(pretrained, **more), synthid(oracle, **more)
    # Few different tokens, so that contexts repeat.
    ids, _ = make(length=24, high=3)
    marked = 0
    for length in range(4, 24):
        scores = make(length)[1].to(dtype)
        found, expected = ours(ids[:, :length], scores), theirs(ids[:, :length], scores)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.state.context, theirs.state.context)
        assert ours.state.num_calls == theirs.state.num_calls
        marked += int((found != scores).any(-1).sum())
    assert marked > 0 and (marked == 80 if "debug_mode" in more else marked < 80)


def test_tournament_equals_the_slow_version():
    rule = synthid(pretrained)
    ids, _ = make(length=16, high=3)
    table = rule.sampling_table.tolist()
    for length in range(4, 16):
        scores = make(length)[1]
        found = rule(ids[:, :length], scores)
        slow = reference.tournament(
            ids[:, :length].numpy(), scores.numpy().astype(np.float64), 4, 3, KEYS, table, 16
        )
        np.testing.assert_allclose(found.numpy(), slow, rtol=1e-4, atol=1e-5)


def test_beams_may_change_places():
    """Rows hold nothing but their tokens: a row moved elsewhere gets the scores that it would have got."""
    rule, moved = synthid(pretrained), synthid(pretrained)
    ids, scores = make(length=12, high=3)
    order = torch.tensor([2, 0, 3, 1])
    for length in range(4, 11):
        rule(ids[:, :length], scores), moved(ids[:, :length], scores)
    assert torch.equal(rule(ids, scores)[order], moved(ids[order], scores[order]))


def test_a_rule_can_be_used_for_another_batch():
    rule, fresh = synthid(pretrained), synthid(pretrained)
    ids, scores = make(length=12)
    rule(ids[:2], scores[:2])
    assert torch.equal(rule(ids[:, :5], scores), fresh(ids[:, :5], scores))


def test_pieces_of_detection_equal_transformers():
    ours, theirs = synthid(pretrained), synthid(oracle)
    ids, scores = make(length=20, high=3)
    assert torch.equal(ours.sampling_table, theirs.sampling_table)
    assert torch.equal(ours.compute_g_values(ids), theirs.compute_g_values(ids))
    ngrams = ids.unfold(1, 3, 1)
    assert torch.equal(ours.compute_ngram_keys(ngrams), theirs.compute_ngram_keys(ngrams))
    for history in (2, 16):
        mask = synthid(pretrained, history).compute_context_repetition_mask(ids)
        assert torch.equal(mask, synthid(oracle, history).compute_context_repetition_mask(ids))
        assert not mask.all()
    assert torch.equal(ours.compute_eos_token_mask(ids, 2), theirs.compute_eos_token_mask(ids, 2))
    assert torch.equal(ours.compute_eos_token_mask(ids, 50), theirs.compute_eos_token_mask(ids, 50))
    g_values = torch.randint(0, 2, (*scores.shape, 5))
    torch.testing.assert_close(ours.update_scores(scores, g_values), theirs.update_scores(scores, g_values))
    assert ours.expected_mean_g_value(50) == theirs.expected_mean_g_value(50)
    start = torch.ones(4, dtype=torch.int64)
    assert torch.equal(ours.accumulate_hash(start, ids), theirs.accumulate_hash(start, ids))


# -- in generate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.12)
    return model, transformers_twin(model)


def prompt(rows=3, length=6):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


MARKS = {
    "left": {"greenlist_ratio": 0.4, "bias": 3.0},
    "self": {"bias": 2.5, "seeding_scheme": "selfhash", "context_width": 2},
    "synthid": {"ngram_len": 3, "keys": KEYS},
}


def theirs_of(mark):
    return (
        transformers.SynthIDTextWatermarkingConfig if "keys" in mark else transformers.WatermarkingConfig
    )(**mark)


def ours_of(mark):
    return (SynthIDTextWatermarkingConfig if "keys" in mark else WatermarkingConfig)(**mark)


@pytest.mark.parametrize("name", MARKS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}, {"repetition_penalty": 1.3}],
    ids=["greedy", "sample", "penalty"],
)
def test_tokens_equal_transformers(pair, name, settings):
    if name == "synthid":
        settings = {**settings, "do_sample": True}
        if "num_return_sequences" not in settings:
            settings["top_k"] = 0
    settings = {**settings, "max_new_tokens": 24}
    torch.manual_seed(0)
    expected = pair[1].generate(**prompt(), watermarking_config=theirs_of(MARKS[name]), **settings)
    for config in (ours_of(MARKS[name]), MARKS[name]):
        torch.manual_seed(0)
        assert torch.equal(pair[0].generate(**prompt(), watermarking_config=config, **settings), expected)
    torch.manual_seed(0)
    assert not torch.equal(pair[0].generate(**prompt(), **settings), expected)


@pytest.mark.parametrize("name", ["left", "self"])
@pytest.mark.parametrize("once", [False, True])
def test_marks_are_found(pair, name, once):
    model, theirs = pair
    settings = {"do_sample": True, "max_new_tokens": 120, "eos_token_id": None}
    torch.manual_seed(0)
    marked = model.generate(**prompt(), watermarking_config=MARKS[name], **settings)[:, 6:]
    plain = model.generate(**prompt(), **settings)[:, 6:]
    detector = WatermarkDetector(model.config, "cpu", ours_of(MARKS[name]), ignore_repeated_ngrams=once)
    expected = oracle_detection.WatermarkDetector(
        theirs.config, "cpu", theirs_of(MARKS[name]), ignore_repeated_ngrams=once
    )
    assert detector(marked).all() and not detector(plain).any()
    for ids in (marked, plain, torch.cat([torch.ones(3, 1, dtype=torch.int64), marked], 1)):
        for field, value in vars(expected(ids, return_dict=True)).items():
            np.testing.assert_allclose(getattr(detector(ids, return_dict=True), field), value, err_msg=field)
    lenient = WatermarkDetector(model.config, "cpu", MARKS[name])
    assert lenient(plain, z_threshold=-9.0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_tournaments_are_found_without_training(pair, weighted):
    model = pair[0]
    settings = {"do_sample": True, "max_new_tokens": 200, "eos_token_id": None, "top_k": 0}
    torch.manual_seed(0)
    marked = model.generate(**prompt(), watermarking_config=MARKS["synthid"], **settings)[:, 6:]
    plain = model.generate(**prompt(), **settings)[:, 6:]
    rule = ours_of(MARKS["synthid"]).construct_processor(VOCAB, "cpu")

    class Tokenizer:
        eos_token_id = 2

    def score(g_values, mask):
        return mean_z_score(g_values, mask, weighted)

    detector = SynthIDTextWatermarkDetector(score, rule, Tokenizer())
    assert (detector(marked) > 3).all() and (detector(plain).abs() < 3).all()
    theirs = oracle_detection.SynthIDTextWatermarkDetector(
        score, theirs_of(MARKS["synthid"]).construct_processor(VOCAB, "cpu"), Tokenizer()
    )
    assert torch.equal(detector(marked), theirs(marked))


def test_no_tokens_have_no_score():
    assert mean_z_score(torch.ones(2, 3, 4), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_the_mark_comes_after_the_filters_and_before_the_normalisation():
    config = GenerationConfig(
        do_sample=True, temperature=0.5, renormalize_logits=True, watermarking_config=WatermarkingConfig()
    )
    rules = build_processors(config, Lengths(30, 18, 0, 0), GenerationInputs(make()[0]), vocab_size=VOCAB)
    names = [type(rule).__name__ for rule in rules]
    assert names[-3:] == ["TopKLogitsWarper", "WatermarkLogitsProcessor", "LogitNormalization"]


# -- configs and bad values --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MARKS)
def test_configs(name, tmp_path):
    ours, theirs = ours_of(MARKS[name]), theirs_of(MARKS[name])
    assert ours.to_dict() == theirs.to_dict() == dict(iter(ours))
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    ours.to_json_file(tmp_path / "ours.json"), theirs.to_json_file(tmp_path / "theirs.json")
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "theirs.json").read_text()
    config = GenerationConfig(watermarking_config=ours)
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert type(ours).from_dict(again.watermarking_config) == ours
    assert again == config


def test_a_config_can_be_changed():
    config = WatermarkingConfig()
    config.update(bias=1.0, context_width=2)
    assert (config.bias, config.context_width) == (1.0, 2)
    with pytest.raises(GenerationError, match="bias of the watermark cannot be 'x'"):
        config.update(context_width=4, bias="x")
    assert config.context_width == 2


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ({"greenlist_ratio": 1.0}, r"greenlist_ratio of the watermark cannot be 1.0.*between 0 and 1"),
        ({"seeding_scheme": "left"}, r'expected "lefthash" or "selfhash"'),
        ({"context_width": 0}, "context_width of the watermark cannot be 0"),
        ({"hashing_key": -3}, "hashing_key of the watermark cannot be -3"),
        ({"bias": float("inf")}, "bias of the watermark cannot be inf"),
        ({"greenlist": 0.5}, "no field 'greenlist'.*Did you mean 'greenlist_ratio'"),
        ({"keys": [1]}, "The watermark lacks ngram_len"),
        ({"ngram_len": 1, "keys": [1]}, "ngram_len of the watermark cannot be 1"),
        ({"ngram_len": 3, "keys": []}, r"keys of the watermark cannot be \[\]"),
        ({"ngram_len": 3, "keys": [1], "sampling_table_size": 2**25}, "from 1 to 2\\*\\*24"),
        ({"ngram_len": 3, "keys": [1], "context_history_size": 0}, "context_history_size of the watermark"),
        (5, "watermarking_config has the wrong type"),
    ],
)
def test_bad_marks_are_refused_before_the_first_forward(pair, mark, text):
    with pytest.raises(GenerationError, match=text):
        pair[0].generate(**prompt(), watermarking_config=mark)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (torch.tensor([[1, 5, 6, 7], [5, 6, 7, 8]]), "Only some rows begin with the start token"),
        (torch.tensor([[1, 5]]), "no token to look for a watermark in.*context_width=1"),
        (torch.tensor([5, 6]), "in a batch of sequences"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(pair, ids, text):
    with pytest.raises(GenerationError, match=text):
        WatermarkDetector(pair[0].config, "cpu", WatermarkingConfig())(ids)


def test_other_bad_input(pair):
    with pytest.raises(GenerationError, match="Use SynthIDTextWatermarkDetector"):
        WatermarkDetector(pair[0].config, "cpu", MARKS["synthid"])
    rule = synthid(pretrained)
    with pytest.raises(GenerationError, match=r"expected \[batch, n-grams, 3\], found \(1, 2, 4\)"):
        rule.compute_ngram_keys(torch.ones(1, 2, 4, dtype=torch.int64))
    with pytest.raises(GenerationError, match="in a batch of sequences"):
        rule.compute_g_values(torch.ones(4, dtype=torch.int64))
