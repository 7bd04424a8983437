# SPDX-License-Identifier: Apache-2.0
"""Importing is free: what gets loaded, how long it takes, and that nothing unasked for is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretrained

SOURCE = Path(pretrained.__file__).parent.parent
FRAMEWORKS = {"torch", "jax", "flax", "tensorflow", "keras"}
OPTIONAL = {"huggingface_hub", "transformers", "accelerate", "tqdm", "jinja2", "tokenizers", "gguf"}

MEASURE = """
import json, sys, time
{before}
known = set(sys.modules)
started = time.process_time()
{statement}
seconds = time.process_time() - started
print(json.dumps({{"seconds": seconds, "modules": sorted(set(sys.modules) - known)}}))
"""


def run(code: str, *paths: Path, check: bool = True) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that keeps bytecode, as interpreters do unless told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, SOURCE)))
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=check,
        timeout=120,
    )


def measure(statement: str, before: str = "", *, runs: int = 1) -> tuple[float, set[str]]:
    """Return what a statement costs and the top-level packages that it loads.

    Args:
        statement: What to measure.
        before: Run first, not measured.
        runs: How many interpreters to try it in.

    Returns:
        The least seconds of processor time, which other work on the machine does not stretch; packages.
    """
    results = [
        json.loads(run(MEASURE.format(statement=statement, before=before)).stdout) for _ in range(runs)
    ]
    packages = {name.partition(".")[0] for name in results[0]["modules"]}
    return min(result["seconds"] for result in results), packages


def test_importing_the_package_loads_nothing_else():
    seconds, packages = measure("import pretrained", runs=5)
    assert packages == {"pretrained"}
    assert seconds < 0.060, f"{seconds * 1000:.1f} ms"


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "AutoConfig", "AutoModel", "GenerationConfig"])
def test_configs_and_auto_classes_need_no_framework(name):
    _, packages = measure(f"from pretrained import {name}")
    assert not packages & (FRAMEWORKS | OPTIONAL)


def test_first_model_class_costs_little_on_top_of_torch():
    statement = "from pretrained import T5ForConditionalGeneration"
    seconds, packages = measure(statement, before="import torch", runs=2)
    assert not packages & ((FRAMEWORKS - {"torch"}) | OPTIONAL)
    assert seconds <= 0.150, f"{seconds * 1000:.1f} ms"


def test_listing_names_imports_no_framework():
    _, packages = measure("import pretrained; dir(pretrained); pretrained.__all__")
    assert packages == {"pretrained"} | packages & set(sys.stdlib_module_names)


def test_star_import_and_unknown_names():
    with pytest.raises(AttributeError, match="module 'pretrained' has no attribute 'LamaConfig'"):
        pretrained.LamaConfig  # noqa: B018 - the access is the test
    run("import pretrained; from pretrained import LlamaConfig; assert pretrained.LlamaConfig is LlamaConfig")
    run("from pretrained import *; LlamaModel; AutoConfig; PretrainedError; __version__")


LOAD = """
import sys
import torch
from pretrained import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
folder = {folder!r}
config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                     num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
print("loaded", sorted({names!r} & set(sys.modules)))
"""


def test_installed_packages_that_are_not_asked_for_are_not_touched(tmp_path):
    names = {"tensorflow", "jax", "flax", "keras", "deepspeed", "transformers", "accelerate", "wandb", "peft"}
    for name in names:
        package = tmp_path / "planted" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"raise RuntimeError({name!r} + ' was imported')\n")
    code = LOAD.format(folder=str(tmp_path / "model"), names=names)
    assert run(code, tmp_path / "planted").stdout.strip() == "loaded []"
    # The plant works: whoever imports one of them fails.
    failed = run("import deepspeed", tmp_path / "planted", check=False)
    assert "deepspeed was imported" in failed.stderr


def test_missing_framework_is_one_readable_error(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import pretrained\n"
        "pretrained.LlamaConfig\n"
        "try: pretrained.LlamaModel\n"
        "except ImportError as error: print(error)\n"
    )
    assert "LlamaModel needs PyTorch, which is not installed" in run(code).stdout
