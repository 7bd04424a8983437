# SPDX-License-Identifier: Apache-2.0
"""`pretrained doctor`: every fault of a folder at once, each with what to do about it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrained
from pretrained.cli import doctor
from pretrained.cli.main import main
from support.checkpoints import Folder, tiny_llama
from support.gguf_files import write_gguf
from support.tokenizers import write_json_tokenizer


@pytest.fixture
def folder(tmp_path):
    found = Folder(tmp_path / "model", tiny_llama(bos_token_id=1, eos_token_id=2))
    write_json_tokenizer(found.path)
    return found


def run(capsys, *words):
    code = main(["doctor", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def findings(capsys, *words):
    """Return (level, what) of what was found about a model; the machine's own state is left out."""
    code, out, err = run(capsys, *words, "--json")
    assert not err
    facts = json.loads(out)
    assert code == (0 if facts["ok"] else 1)
    machine = {finding.what for finding in doctor.core.check_environment(doctor.environment())}
    return [f for f in facts["findings"] if f["what"] not in machine]


def only(capsys, folder, level, what, mend="", *words):
    """Assert that one thing is found, and what is said to do about it."""
    found = findings(capsys, folder.path, *words)
    assert [(f["level"], what in f["what"]) for f in found] == [(level, True)], found
    assert mend in found[0]["mend"]
    return found[0]


def test_a_whole_model_has_nothing_wrong(capsys, folder):
    assert findings(capsys, folder.path, "--values") == []
    code, out, _ = run(capsys, folder.path)
    assert code == 0
    assert f"pretrained {pretrained.__version__}, Python" in out
    assert "safetensors, 21 tensors, " in out and "LlamaForCausalLM" in out
    assert "looked at: files, headers, config, weights against the architecture" in out


def test_the_machine_alone(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert f"torch {torch.__version__}" in out
    assert "memory: " in out and "cache: " in out


def test_passwords_are_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:3128")
    for words in ((), ("--json",)):
        out = run(capsys, *words)[1]
        assert "secret" not in out and "http://...@proxy:3128" in out


def test_a_conversion_that_was_cut_off(capsys, folder):
    (folder.path.parent / ".model.converting").mkdir()
    only(capsys, folder, "notice", "A conversion to this folder was cut off", "Run it again")


# Weights


def test_a_truncated_file(capsys, folder):
    folder.weights.write_bytes(folder.weights.read_bytes()[:-10])
    only(capsys, folder, "fault", "The safetensors file is truncated", "Fetch the file again")


def test_every_broken_shard_is_named(capsys, folder):
    folder.shards()
    for name in ("a.safetensors", "b.safetensors"):
        (folder.path / name).write_bytes(b"garbage")
    found = findings(capsys, folder.path)
    assert len(found) == 2
    assert {Path(f["where"]).name for f in found} == {"a.safetensors", "b.safetensors"}


def test_an_index_that_lies(capsys, folder):
    folder.shards(lambda weight_map: weight_map.update({"model.norm.weight": "a.safetensors"}))
    only(
        capsys,
        folder,
        "fault",
        "The weights index says that tensor 'model.norm.weight' is in 'a.safetensors'",
    )


def test_a_shard_that_is_not_there(capsys, folder):
    folder.shards()
    (folder.path / "b.safetensors").unlink()
    only(capsys, folder, "fault", "names the file 'b.safetensors', which does not exist", "incomplete")


def test_overlapping_tensors(capsys, folder):
    def overlap(header):
        keys = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
        header[keys[1]]["data_offsets"] = header[keys[0]]["data_offsets"]
        header[keys[1]]["shape"] = header[keys[0]]["shape"]

    only(capsys, folder.header(overlap), "fault", "overlap")


def test_missing_and_unexpected_weights(capsys, folder):
    folder.tensors("model.norm.weight", extra__weight=torch.ones(2))
    found = findings(capsys, folder.path)
    assert [(f["level"], f["what"], f["where"]) for f in found] == [
        ("fault", "Weights that are not in the files: 1 of 21", "model.norm.weight"),
        ("notice", "Tensors of the files that serve nothing in this architecture: 1", "extra.weight"),
    ]


def test_shapes_that_the_config_does_not_say(capsys, folder):
    found = only(
        capsys,
        folder.config(intermediate_size=32),
        "fault",
        "Weights with another shape than config.json says: 6",
    )
    assert "model.layers.{0..1}.mlp.gate_proj.weight: file [24, 16], model [32, 16]" in found["where"]


def test_ties_that_the_files_contradict(capsys, folder):
    folder.config(tie_word_embeddings=True)
    only(capsys, folder, "notice", "The config ties lm_head.weight to model.embed_tokens.weight", "to false")
    same = load_file(folder.weights)["model.embed_tokens.weight"]
    folder.tensors(lm_head__weight=same)
    assert findings(capsys, folder.path) == []


def test_values_are_read_only_when_asked(capsys, folder):
    bad = torch.ones(16)
    bad[3], bad[4], bad[5] = float("nan"), float("inf"), -float("inf")
    folder.tensors(model__norm__weight=bad)
    assert findings(capsys, folder.path) == []
    only(
        capsys,
        folder,
        "fault",
        "'model.norm.weight' holds 1 NaN and 2 infinite of 16 numbers",
        "",
        "--values",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_in_half_precision(capsys, folder, dtype):
    content = {key: value.to(dtype) for key, value in load_file(folder.weights).items()}
    content["model.norm.weight"][0] = float("nan")
    save_file(content, folder.weights, {"format": "pt"})
    folder.config(dtype=str(dtype).removeprefix("torch."))
    only(capsys, folder, "fault", "'model.norm.weight' holds 1 NaN of 16 numbers", "", "--values")


# What lies around


def test_pickles_and_leftovers(capsys, folder):
    torch.save({}, folder.path / "pytorch_model.bin")
    (folder.path / ".tmp-0123abcd-model.safetensors").write_bytes(b"x" * 100)
    found = {f["what"]: (f["level"], f["where"]) for f in findings(capsys, folder.path)}
    assert found == {
        "A save that was cut off left 100 B": ("notice", ".tmp-0123abcd-model.safetensors"),
        "Pickles can run code in libraries that unpickle them; this one reads them without executing": (
            "notice",
            "pytorch_model.bin",
        ),
    }


def test_a_partial_download(capsys, folder):
    (folder.path / "model-2.safetensors.incomplete").write_bytes(b"x")
    only(capsys, folder, "fault", "A download was not finished", "Fetch these files again")


def test_stale_shards_and_an_index_that_is_passed_over(capsys, folder):
    content = load_file(folder.weights)
    save_file(content, folder.path / "model-00001-of-00001.safetensors")
    save_file(content, folder.path / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(content, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = {f["what"]: f["where"] for f in findings(capsys, folder.path)}
    assert found.popitem()[0].startswith("Shards that no index names take")
    assert list(found) == ["model.safetensors is loaded, and model.safetensors.index.json passed over"]


# Configs and tokenizers


def test_a_config_that_is_no_json(capsys, folder):
    (folder.path / "config.json").write_text("{")
    only(capsys, folder, "fault", "This file is not valid JSON", "Download or write it again")


def test_an_architecture_that_is_not_known(capsys, folder):
    only(
        capsys,
        folder.config(model_type="lama"),
        "fault",
        "The architecture 'lama' is not known here",
        "llama",
    )


def test_a_model_type_that_is_no_text(capsys, folder):
    only(capsys, folder.config(model_type={}), "fault", "The architecture {} is not known here")


def test_a_config_that_contradicts_itself(capsys, folder):
    only(capsys, folder.config(num_key_value_heads=3), "fault", "num_attention_heads is not a multiple")


def test_ids_outside_the_vocabulary(capsys, folder):
    only(
        capsys,
        folder.config(eos_token_id=[2, 32]),
        "fault",
        "eos_token_id 32 is outside the vocabulary of 32",
    )


def test_a_dtype_that_the_files_do_not_have(capsys, folder):
    only(
        capsys,
        folder.config(dtype="bfloat16"),
        "notice",
        "config.json says bfloat16, and the weights are float32",
    )


def test_a_generation_config_that_cannot_work(capsys, folder):
    values = {"temperature": 0.0, "do_sample": True, "eos_token_id": 77}
    (folder.path / "generation_config.json").write_text(json.dumps(values))
    found = findings(capsys, folder.path)
    assert [(f["level"], f["what"]) for f in found] == [
        ("fault", "temperature cannot be 0 when sampling"),
        ("fault", "eos_token_id 77 is outside the vocabulary of 32"),
    ]
    (folder.path / "generation_config.json").write_text('{"temperature": 0.5}')
    only(capsys, folder, "notice", "temperature has no effect: it is used only when sampling")


def test_tokenizers(capsys, folder):
    file = folder.path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["id"] = 40
    file.write_text(json.dumps(content))
    only(
        capsys,
        folder,
        "fault",
        "The tokenizer has ids up to 40, and the embedding 32 rows",
        "resize_token_embeddings(41)",
    )
    file.write_text("[]")
    only(capsys, folder, "fault", "tokenizer.json cannot be read")
    file.unlink()
    only(capsys, folder, "notice", "There is no tokenizer")


def test_a_folder_without_weights(capsys, folder):
    folder.weights.unlink()
    only(capsys, folder, "fault", "There are no weights")


# Other formats, and what it costs


def test_a_gguf_file(capsys, tmp_path):
    file = write_gguf(tiny_llama(hidden_size=32, intermediate_size=64), tmp_path / "model.gguf")
    assert [f["what"] for f in findings(capsys, file, "--values")] == ["The GGUF file has no tokenizer"]


def test_a_quantized_folder(capsys, folder, tmp_path):
    assert main(["convert", str(folder.path), str(tmp_path / "int8"), "--quantize", "int8"]) == 0
    capsys.readouterr()
    assert findings(capsys, tmp_path / "int8", "--values") == []


def test_nothing_there_is_an_error(capsys, tmp_path):
    code, _, err = run(capsys, tmp_path / "absent")
    assert code == 1 and err.startswith("error: No such file or folder")


def test_no_framework_and_little_time(folder):
    program = (
        "import sys, time; start = time.perf_counter();"
        "from pretrained.cli.main import main;"
        f"main(['doctor', {str(folder.path)!r}]);"
        "print({'torch', 'huggingface_hub', 'tokenizers'} & set(sys.modules), time.perf_counter() - start)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pretrained.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    loaded, seconds = done.stdout.splitlines()[-1].rsplit(None, 1)
    assert loaded == "set()"
    assert float(seconds) < 2  # 0.3 s on an idle machine; tests share theirs
