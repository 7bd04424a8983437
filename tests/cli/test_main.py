# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: help, errors in one paragraph, exit codes, what is not imported."""

import json
import subprocess
import sys

import pytest

from pretrained import LlamaConfig, LlamaForCausalLM, __version__
from pretrained.cli.console import Figures, paragraph
from pretrained.cli.main import main
from pretrained.errors import ArgumentError

TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**TINY, num_attention_heads=2)).save_pretrained(path)
    return path


def run_main(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_without_a_verb_it_prints_help(capsys):
    code, out, _ = run_main(capsys)
    assert code == 0
    assert all(verb in out for verb in ("demo", "run", "inspect", "examples:"))


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"pretrained {__version__}"


@pytest.mark.parametrize("verb", ["demo", "run", "inspect"])
def test_every_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: pretrained {verb}" in capsys.readouterr().out


def test_an_error_is_one_paragraph_and_code_1(capsys, tmp_path):
    code, out, err = run_main(capsys, "inspect", str(tmp_path / "absent"))
    assert (code, out) == (1, "")
    assert err.startswith("error: No such file or folder")
    assert str(tmp_path / "absent") in err.replace("\n", "")
    assert "Traceback" not in err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(OSError, match="No such file or folder"):
        main(["inspect", str(tmp_path / "absent"), "--debug"])


def test_inspect_needs_no_framework_and_little_time(folder):
    program = (
        "import sys, time; start = time.perf_counter();"
        "from pretrained.cli.main import main;"
        f"main(['inspect', {str(folder)!r}]);"
        "print('torch' in sys.modules, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert has_torch == "False"
    assert float(seconds) < 2  # 0.5 s on an idle machine; tests share theirs


def test_inspect_shows_blocks_dtypes_and_files(capsys, folder):
    code, out, _ = run_main(capsys, "inspect", str(folder))
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "model.layers.{0..2}" in out
    assert "float32 (30 tensors)" in out
    assert "model.safetensors" in out


def test_inspect_json_counts_every_parameter(capsys, folder):
    code, out, _ = run_main(capsys, "inspect", str(folder), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["num_parameters"] == LlamaForCausalLM.from_pretrained(folder).num_parameters()
    assert facts["nbytes"] == 4 * facts["num_parameters"]
    assert sum(block["num_parameters"] for block in facts["blocks"]) == facts["num_parameters"]
    assert facts["model_type"] == "llama"


def test_inspect_lists_tensors(capsys, folder):
    _, out, _ = run_main(capsys, "inspect", str(folder), "--tensors")
    assert "lm_head.weight  [64, 16]  float32" in out


def test_a_word_that_is_no_verb(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["rum"])
    assert "invalid choice: 'rum'" in capsys.readouterr().err


def test_options_may_stand_between_model_and_prompt(capsys, folder):
    code, _, err = run_main(capsys, "run", str(folder), "--max-new-tokens", "1", " ")
    assert code == 1
    assert "The prompt is empty" in err


def test_run_refuses_an_empty_prompt(capsys, folder):
    code, _, err = run_main(capsys, "run", str(folder), "  ")
    assert code == 1
    assert "The prompt is empty" in err


def test_paragraph_folds_long_messages():
    text = paragraph(ArgumentError("What failed " * 20, where="here", mend="Mend it."))
    assert text.startswith("error: What failed")
    assert max(map(len, text.splitlines())) <= 100


def test_figures_read_well():
    figures = Figures(load_s=0.5, first_token_s=0.25, num_tokens=11, decode_s=2.0)
    assert str(figures).startswith("loaded in 0.50 s, first token after 0.25 s, 11 tokens at 5.0 a second, ")
    assert "tokens at" not in str(Figures(num_tokens=1))
