# SPDX-License-Identifier: Apache-2.0
"""`pretrained plan`: from a config, a folder with weights and a GGUF file, without a framework."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import constants

from pretrained import LlamaConfig, LlamaForCausalLM
from pretrained.cli import placing
from pretrained.cli.main import main
from pretrained.core.files import open_checkpoint

T0PP = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
BUDGETS = "0=10GiB,1=10GiB,cpu=30GiB"


@pytest.fixture(scope="module")
def t0pp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t0pp")
    (folder / "config.json").write_text(json.dumps(T0PP))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama64")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_plan(capsys, *words):
    code = main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def facts(capsys, *words):
    code, out, err = run_plan(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_table_from_a_config_alone(capsys, t0pp):
    code, out, _ = run_plan(capsys, t0pp, "--max-memory", BUDGETS, "--dtype", "bf16")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "T5ForConditionalGeneration, 11,135,332,352 parameters, bfloat16, balanced" in lines[0]
    assert any(line.startswith("decoder.block.{20..23} cpu 2.1 GB") for line in lines)
    assert lines[-2:] == [
        "to read: 22.3 GB",
        "note: no weights are here: they are taken to be stored as bfloat16",
    ]


def test_a_config_file_by_its_path_and_json(capsys, t0pp):
    found = facts(capsys, t0pp / "config.json", "--max-memory", BUDGETS, "--dtype", "bf16")
    assert found["device_map"]["shared"] == 0
    assert found["device_map"]["decoder.block.23"] == "cpu"
    assert found["bytes_to_read"] == 2 * 11_135_332_352
    assert found["architecture"] == "T5ForConditionalGeneration"
    assert sum(device["weights"] for device in found["devices"]) == found["bytes_to_read"]


def test_quantization_and_dtype_change_the_sizes_but_not_what_is_read(capsys, t0pp):
    plain = facts(capsys, t0pp, "--max-memory", "cpu=100GiB")
    half = facts(capsys, t0pp, "--max-memory", "cpu=100GiB", "--dtype", "float16")
    assert plain["devices"][0]["weights"] == 4 * 11_135_332_352
    # T5 keeps its output projections in float32 beside float16.
    wo = 48 * 4096 * 10240
    assert half["devices"][0]["weights"] == 2 * 11_135_332_352 + 2 * wo
    packed = facts(capsys, t0pp, "--max-memory", "0=8GiB", "--dtype", "bf16", "--quantize", "int4")
    assert packed["device_map"] == {"": 0}
    assert packed["bytes_to_read"] == 2 * 11_135_332_352


def test_headers_say_what_is_read(capsys, llama):
    found = facts(capsys, llama, "--max-memory", "cpu=1GiB")
    assert found["devices"][0]["weights"] - 4 * 4 == 2 * found["bytes_to_read"]
    found = facts(capsys, llama, "--max-memory", "cpu=1GiB", "--dtype", "auto")
    assert found["devices"][0]["weights"] - 4 * 4 == found["bytes_to_read"]


def test_another_class_and_what_the_files_lack(capsys, llama):
    code, out, _ = run_plan(
        capsys, llama, "--max-memory", "cpu=1GiB", "--architecture", "LlamaForSequenceClassification"
    )
    assert code == 0
    assert "note: the files lack score.weight" in out


def test_context_keeps_room(capsys, llama):
    found = facts(capsys, llama, "--max-memory", "0=1MB", "--context", "32", "--batch", "2")
    assert found["devices"][0]["cache"] == 4 * 2 * 2 * 32 * 16 * 4
    assert found["devices"][0]["activations"] > 0
    code, _, err = run_plan(capsys, llama, "--batch", "2")
    assert code == 1
    assert "Rows of how many tokens? (--batch). Say it with --context" in err


def test_without_budgets_this_machines_memory(capsys, llama):
    code, out, _ = run_plan(capsys, llama)
    assert code == 0
    assert "note: planned for what is free on this machine now: cpu " in out
    assert "and the disk\n" in out


def test_without_budgets_this_machines_accelerators(capsys, llama, monkeypatch):
    monkeypatch.setattr(placing, "_may_have_accelerators", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10**10 * (index + 1), 10**11))
    found = facts(capsys, llama)
    assert found["notes"][0].startswith("planned for what is free on this machine now: GPU 0 ")
    shown = {device["home"]: device["budget"] for device in found["devices"]}
    assert shown[1] > shown[0] > 10**9
    assert {block["home"] for block in found["blocks"]} == {0, 1}


def test_without_a_framework_accelerators_are_not_looked_for(capsys, llama, monkeypatch):
    monkeypatch.setattr(placing, "_may_have_accelerators", lambda: True)
    monkeypatch.setitem(sys.modules, "pretrained.torch.place", None)
    assert facts(capsys, llama)["notes"][0].endswith("without PyTorch accelerators are not looked for")


def test_what_is_to_read_is_what_the_config_says_is_stored(capsys, t0pp, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(T0PP | {"torch_dtype": "bfloat16"}))
    found = facts(capsys, tmp_path, "--max-memory", "cpu=100GiB")
    assert found["devices"][0]["weights"] == 4 * 11_135_332_352
    assert found["bytes_to_read"] == 2 * 11_135_332_352
    assert found["notes"] == ["no weights are here: they are taken to be stored as bfloat16"]


@pytest.fixture
def cached(llama, tmp_path, monkeypatch):
    """A repository in the download cache."""
    commit = "a" * 40
    cache = tmp_path / "models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(llama, cache / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return cache / "snapshots" / commit


def test_a_hub_id_in_the_cache(capsys, cached):
    words = ("me/tiny", "--offline", "--max-memory", "cpu=1GB")
    whole = facts(capsys, *words)
    assert whole["notes"] == []
    (cached / "model.safetensors").unlink()
    bare = facts(capsys, *words)
    assert bare["notes"] == ["no weights are here: they are taken to be stored as bfloat16"]
    assert bare["bytes_to_read"] == whole["bytes_to_read"]
    assert bare["blocks"] == whole["blocks"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_folder_that_is_quantized_already(capsys, llama64, tmp_path, scheme):
    wanted = {"quant_method": scheme}
    LlamaForCausalLM.from_pretrained(llama64, quantization_config=wanted).save_pretrained(tmp_path)
    planned = facts(capsys, llama64, "--quantize", scheme, "--max-memory", "cpu=1GB")
    found = facts(capsys, tmp_path, "--max-memory", "cpu=1GB")
    assert found["blocks"] == planned["blocks"]
    stored = open_checkpoint(tmp_path / "model.safetensors").nbytes
    assert found["bytes_to_read"] == stored == found["devices"][0]["weights"] - 4 * 8
    assert found["notes"] == ["14 weights are quantized in the files, and counted as they lie there"]
    code, _, err = run_plan(capsys, tmp_path, "--quantize", "int4", "--max-memory", "cpu=1GB")
    assert code == 1
    assert "The checkpoint is quantized already (--quantize)" in " ".join(err.split())


def test_packed_needs_blocks(capsys, llama, t0pp):
    for folder in (llama, t0pp):
        code, _, err = run_plan(capsys, folder, "--packed", "--max-memory", "cpu=1GB")
        assert code == 1
        assert "There are no blocks to keep packed (--packed)" in " ".join(err.split())


def test_a_gguf_file_that_is_not_in_the_cache(capsys, cached):
    code, _, err = run_plan(capsys, "me/tiny", "--offline", "--gguf-file", "x.gguf")
    assert code == 1
    assert "The weights are not in the download cache" in " ".join(err.split())


def test_a_map_of_ones_own(capsys, t0pp):
    given = {"shared": 0, "encoder": 0, "decoder": 1, "lm_head": "cpu"}
    found = facts(
        capsys,
        t0pp,
        "--dtype",
        "bf16",
        "--max-memory",
        "0=14GiB,1=14GiB,cpu=1GiB",
        "--device-map",
        json.dumps(given),
    )
    assert found["device_map"] == given
    assert "decoder.embed_tokens.weight is tied" in found["notes"][0]
    assert facts(capsys, t0pp, "--max-memory", "cpu=99GiB", "--device-map", "cpu")["device_map"] == {
        "": "cpu"
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device-map", "balance"], "Did you mean 'balanced'?"),
        (["--device-map", "{shared: 0}"], "The device map is not JSON"),
        (["--device-map", '{"encoder": 0}'], "The device map is incomplete"),
        (["--device-map", '{"": 5}'], "a device that is not there"),
        (["--max-memory", "0=10Gb"], "Write 10GB for bytes"),
        (["--max-memory", "10GiB"], "This is not a list of budgets"),
        (["--max-memory", "0=100MB"], "can hold the largest block"),
        (["--dtype", "int8"], "Weights cannot be loaded as int8"),
        (["--architecture", "T5Model2"], "Did you mean 'T5Model'?"),
    ],
)
def test_mistakes_are_one_paragraph(capsys, t0pp, words, message):
    words = words if "--max-memory" in words else [*words, "--max-memory", BUDGETS]
    code, out, err = run_plan(capsys, t0pp, *words)
    assert (code, out) == (1, "")
    assert message in " ".join(err.split())


def test_the_picture(capsys, t0pp, tmp_path):
    file = tmp_path / "plan.svg"
    code, out, _ = run_plan(capsys, t0pp, "--max-memory", BUDGETS, "--dtype", "bf16", "--svg", file)
    assert code == 0
    assert f"picture: {file}" in out
    words = [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert {"GPU 0", "GPU 1", "cpu"} <= set(words)
    assert any(word.startswith("encoder.block.{0..23}") for word in words)


@pytest.mark.realweights
def test_a_gguf_file(capsys, smollm2_gguf):
    found = facts(capsys, smollm2_gguf, "--max-memory", "0=300MB,cpu=1GB", "--dtype", "bf16")
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["blocks"][0]["tied"] == ["lm_head"]
    assert found["bytes_to_read"] == open_checkpoint(smollm2_gguf).nbytes
    assert sum(block["nbytes"] for block in found["blocks"]) == 2 * 134_515_008 + 4 * 32


@pytest.mark.realweights
def test_a_gguf_file_kept_packed(capsys, smollm2_gguf):
    found = facts(capsys, smollm2_gguf, "--max-memory", "cpu=1GB", "--packed")
    packed = LlamaForCausalLM.from_pretrained(smollm2_gguf, quantization_config={"quant_method": "gguf"})
    assert found["devices"][0]["weights"] == packed.get_memory_footprint()
    assert found["bytes_to_read"] == open_checkpoint(smollm2_gguf).nbytes


def test_it_needs_no_framework_and_little_time(t0pp):
    program = (
        "import sys, time; start = time.perf_counter();"
        "from pretrained.cli.main import main;"
        f"main(['plan', {str(t0pp)!r}, '--max-memory', {BUDGETS!r}, '--quantize', 'int4']);"
        "print('torch' in sys.modules, time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert has_torch == "False"
    assert float(seconds) < 2  # 0.3 s on an idle machine; tests share theirs


def test_the_picture_in_the_docs_is_the_one_that_is_drawn(capsys, tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    words = ["--max-memory", "0=7GiB,1=9GiB,cpu=3GiB", "--dtype", "bf16", "--svg", tmp_path / "plan.svg"]
    run_plan(capsys, "tests/data/t0pp", *words)
    drawn, shown = (tmp_path / "plan.svg").read_text(), (root / "docs" / "placement.svg").read_text()
    assert drawn == shown, "draw it anew with the first command of docs/PLACEMENT.md"
