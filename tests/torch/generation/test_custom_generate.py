# SPDX-License-Identifier: Apache-2.0
"""Decoding loops of one's own: what a function is given, and when a file of a repository may run."""

import pytest
import torch

from pretrained.core import own_code
from pretrained.core.hub import HubOptions, Source
from pretrained.errors import ArgumentError, ConfigError, FileError, GenerationError, MissingDependencyError
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache
from pretrained.torch.generation import custom
from support.decoders import build, prompts
from support.toy import Toy, fibonacci

PROMPT = torch.tensor([[1, 1], [2, 3]])


def greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """A loop as anybody would write it, on the public surface alone."""
    while True:
        output = model(input_ids=input_ids)
        scores = logits_processor(input_ids, output.logits[:, -1])
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        if stopping_criteria(input_ids, None).all():
            return input_ids


def test_a_function_takes_the_place_of_the_strategy():
    found = Toy().generate(PROMPT, custom_generate=greedy, max_new_tokens=5)
    assert found.tolist() == [fibonacci(1, 1, 5), fibonacci(2, 3, 5)]


def recorder(calls):
    def record(model, input_ids, **arguments):
        calls.append((model, input_ids, arguments))
        return "whatever it returns"

    return record


def test_what_a_function_is_given():
    toy, calls = Toy(), []
    mask = torch.tensor([[0, 1], [1, 1]])
    result = toy.generate(
        PROMPT,
        attention_mask=mask,
        custom_generate=recorder(calls),
        max_new_tokens=5,
        eos_token_id=8,
        repetition_penalty=1.2,
        streamer=None,
    )
    assert result == "whatever it returns" and toy.calls == []
    ((model, ids, arguments),) = calls
    assert model is toy and torch.equal(ids, PROMPT)
    assert [type(rule).__name__ for rule in arguments["logits_processor"]] == [
        "RepetitionPenaltyLogitsProcessor"
    ]
    assert [type(rule).__name__ for rule in arguments["stopping_criteria"]] == [
        "MaxLengthCriteria",
        "EosTokenCriteria",
    ]
    assert arguments["generation_config"].max_length == 7 and arguments["use_cache"] is True
    assert torch.equal(arguments["attention_mask"], mask)
    assert isinstance(arguments["past_key_values"], DynamicCache)
    assert "streamer" not in arguments and toy.generation_config.max_length == 20


def test_what_a_function_of_an_encoder_decoder_is_given():
    model, calls = build("t5"), []
    ids, mask = prompts()
    model.generate(ids, attention_mask=mask, decoder_start_token_id=0, custom_generate=recorder(calls))
    _, begun, arguments = calls[0]
    assert begun.tolist() == [[0]] * 3 and torch.equal(arguments["attention_mask"], mask)
    assert arguments["encoder_outputs"].last_hidden_state.shape[:2] == (3, 8)
    assert isinstance(arguments["past_key_values"], EncoderDecoderCache)


def test_arguments_of_its_own_and_the_callers_objects():
    seen = {}

    def own(model, input_ids, *, depth, tokenizer=None, streamer=None, wide=1, **rest):
        seen.update(depth=depth, tokenizer=tokenizer, wide=wide)
        streamer.put(input_ids)
        streamer.end()
        return input_ids

    class Streamer:
        told = ()

        def put(self, ids):
            self.told += (ids.shape,)

        def end(self):
            self.told += ("end",)

    streamer = Streamer()
    Toy().generate(PROMPT, custom_generate=own, depth=3, tokenizer="t", streamer=streamer)
    assert seen == {"depth": 3, "tokenizer": "t", "wide": 1}
    assert streamer.told == ((2, 2), (2, 2), "end")
    with pytest.raises(GenerationError, match=r"Neither generate\(\) nor Toy takes 'deep'"):
        Toy().generate(PROMPT, custom_generate=own, deep=3)


def test_bad_input_is_refused_before_it_runs():
    calls = []
    with pytest.raises(GenerationError, match="Token id 39"):
        Toy().generate(PROMPT + 38, custom_generate=recorder(calls))
    for wrong in (3, "", ["x"]):
        with pytest.raises(GenerationError, match=r"custom_generate cannot generate .*a folder or a hub id"):
            Toy().generate(PROMPT, custom_generate=wrong)
    assert calls == []


# -- from a folder or a repository ---------------------------------------------------------------

CODE = """
from .steps import once

def generate(model, inputs=None, generation_config=None, more=0, **kwargs):
    return once(model, inputs, more), sorted(kwargs)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(CODE)
    (tmp_path / "custom_generate" / "steps.py").write_text(
        "def once(model, ids, more):\n    return type(model).__name__, ids.tolist(), more\n"
    )
    return tmp_path


def test_nothing_runs_without_being_asked(folder, tmp_path):
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('ran')")
    toy = Toy()
    for call in (
        lambda: toy.generate(PROMPT, custom_generate=str(folder)),
        lambda: toy.generate(PROMPT, custom_generate=str(folder), trust_remote_code=False),
        lambda: toy.load_custom_generate(str(folder)),
    ):
        with pytest.raises(
            ConfigError, match=r"function generate in custom_generate/generate\.py.*trust_remote_code=True"
        ):
            call()


def test_a_folder_that_is_trusted(folder, caplog):
    toy = Toy()
    result = toy.generate(
        PROMPT, custom_generate=str(folder), trust_remote_code=True, more=4, max_new_tokens=3, num_beams=2
    )
    assert result == (("Toy", PROMPT.tolist(), 4), ["max_new_tokens", "num_beams"])
    assert "trust_remote_code: running generate.py, steps.py of" in caplog.text
    assert toy.load_custom_generate(str(folder), trust_remote_code=True)(toy, PROMPT)[0][2] == 0
    toy.name_or_path = str(folder)
    assert callable(toy.load_custom_generate(trust_remote_code=True))


def test_a_repository_needs_a_revision(folder, monkeypatch):
    asked = []

    def resolve(name, options):
        asked.append((str(name), options.revision))
        names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py")}
        return Source("hub", "me/x", folder, None, "0" * 40, frozenset(names), options, _fetched=names)

    monkeypatch.setattr(custom, "resolve", resolve)
    monkeypatch.setattr(own_code, "resolve", resolve)
    with pytest.raises(ArgumentError, match=rf"only at a revision that you name.*revision='{'0' * 40}'"):
        Toy().generate(PROMPT, custom_generate="me/x", trust_remote_code=True)
    result = Toy().generate(PROMPT, custom_generate="me/x", trust_remote_code=True, revision="v1")
    assert result[0][0] == "Toy" and asked == [("me/x", "main"), ("me/x", "v1")]
    assert HubOptions().revision == "main"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("x = 1", ConfigError, r"custom_generate/generate\.py has no function generate.*Write def generate"),
        ("import nowhere_to_be_found", MissingDependencyError, "Install nowhere_to_be_found"),
        ("1 / 0", ConfigError, "failed while it was imported.*ZeroDivisionError"),
    ],
)
def test_code_that_cannot_generate(folder, text, error, message):
    (folder / "custom_generate" / "generate.py").write_text(text)
    with pytest.raises(error, match=message):
        Toy().load_custom_generate(str(folder), trust_remote_code=True)


def test_a_folder_without_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"custom_generate/generate\.py"):
        Toy().load_custom_generate(str(tmp_path), trust_remote_code=True)
    with pytest.raises(GenerationError, match="no folder to take custom_generate from"):
        Toy().load_custom_generate(trust_remote_code=True)
