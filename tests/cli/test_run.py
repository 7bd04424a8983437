# SPDX-License-Identifier: Apache-2.0
"""`pretrained run` and `pretrained demo` on real weights."""

import io
import sys

import pytest

from pretrained.cli.main import main

pytestmark = [pytest.mark.realweights, pytest.mark.slow]


def test_run_answers_with_the_chat_template(capsys, smollm2_gguf):
    code = main(["run", str(smollm2_gguf), "What is the capital of France?", "--max-new-tokens", "8"])
    out, err = capsys.readouterr()
    assert code == 0
    assert "Paris" in out
    assert "loaded in" in err and "tokens at" in err and "of memory at most" in err


def test_run_reads_standard_input_and_is_quiet_on_request(capsys, monkeypatch, smollm2_gguf):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The capital of France is"))
    code = main(
        ["run", str(smollm2_gguf), "--raw", "--quiet", "--max-new-tokens", "1", "--dtype", "bfloat16"]
    )
    out, err = capsys.readouterr()
    assert (code, out.strip(), err) == (0, "Paris", "")


def test_sampling_repeats_with_a_seed(capsys, smollm2_gguf):
    words = [
        "run",
        str(smollm2_gguf),
        "Say something.",
        "--temperature",
        "0.8",
        "--max-new-tokens",
        "6",
        "--quiet",
    ]
    answers = []
    for _ in range(2):
        assert main([*words, "--seed", "7"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("words", "logged"),
    [
        (["--quantize", "int8", "--max-memory", "cpu=1GB"], "there is no accelerator, and everything fits"),
        (["--packed", "--device-map", '{"": "cpu"}'], ""),
    ],
)
def test_run_quantizes_and_places(capsys, caplog, smollm2_gguf, words, logged):
    question = "What is the capital of France?"
    code = main(["run", "-v", str(smollm2_gguf), question, "--quiet", "--max-new-tokens", "7", *words])
    assert code == 0
    assert "Paris" in capsys.readouterr().out
    assert logged in caplog.text
    assert "LlamaForCausalLM from" in caplog.text and "read 96.6 MB in" in caplog.text


def test_run_says_what_cannot_be(capsys, smollm2_gguf):
    code = main(["run", str(smollm2_gguf), "Hello", "--max-memory", "cpu=150MB"])
    assert code == 1
    assert "offload_folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", str(smollm2_gguf), "Hello", "--packed", "--quantize", "int8"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_run_refuses_a_model_that_has_nothing_to_say(capsys, minilm_dir):
    code = main(["run", str(minilm_dir), "hello"])
    assert code == 1
    assert "no trained language-model head" in " ".join(capsys.readouterr().err.split())


def test_demo_finds_the_model_and_answers(capsys, smollm2_gguf):
    folder = smollm2_gguf.parent.parent
    code = main(["demo", "What is the capital of France?", "--models", str(folder), "--max-new-tokens", "8"])
    out, err = capsys.readouterr()
    assert code == 0
    assert "> What is the capital of France?" in out and "Paris" in out
    assert "135 M parameters" in err
