# SPDX-License-Identifier: Apache-2.0
"""`pretrained convert`: what arrives is what was there, whatever interrupts it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import pretrained
from pretrained import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from pretrained.cli.main import main
from pretrained.core import convert as core
from pretrained.core import disk_space
from pretrained.core.files import open_checkpoint
from pretrained.core.reader import MappedFiles
from support.checkpoints import Folder, tiny_llama
from support.dying import Killed, dying
from support.gguf_files import write_gguf
from support.tokenizers import byte_alphabet, write_json_tokenizer


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "src"
    Folder(folder)
    write_json_tokenizer(folder)
    (folder / "README.md").write_text("a card")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    return folder


def run(*words):
    return main(["convert", *map(str, words)])


def values(folder):
    """Return all tensors of a folder, read by safetensors itself."""
    return {
        key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first
    )


def logits(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits


def left(folder):
    """Return what is in a folder beside SRC and DST."""
    return {path.name for path in folder.iterdir()} - {"src", "dst"}


# Formats, dtypes, shards


def test_shards_hold_the_same_bytes_and_everything_goes_along(capsys, source, tmp_path):
    assert run(source, tmp_path / "dst", "--max-shard-size", "8KB") == 0
    out = capsys.readouterr().out
    assert same(values(tmp_path / "dst"), load_file(source / "model.safetensors"))
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    files = {name for name in names if name.endswith(".safetensors")}
    assert len(files) > 1 and "model.safetensors.index.json" in names
    carried = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert names - files == carried | {"model.safetensors.index.json"}
    for name in carried:
        assert (tmp_path / "dst" / name).read_bytes() == (source / name).read_bytes()
    assert "note: code is left behind: modeling_x.py" in out
    assert out.endswith("verified: keys, shapes, dtypes and every byte were read back and compared\n")
    assert not left(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_is_what_a_load_and_a_save_would_write(source, tmp_path, dtype):
    assert run(source, tmp_path / "dst", "--dtype", dtype) == 0
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(tmp_path / "saved")
    assert same(values(tmp_path / "dst"), values(tmp_path / "saved"))
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["dtype"] == dtype
    before = json.loads((source / "config.json").read_text())
    assert config | {"dtype": before["dtype"]} == before


def test_what_a_family_keeps_in_float32_stays_so(tmp_path):
    config = T5Config(vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "dst", "--dtype", "fp16") == 0
    kinds = {key: value.dtype for key, value in values(tmp_path / "dst").items()}
    assert {kind for key, kind in kinds.items() if ".wo." in key} == {torch.float32}
    assert {kind for key, kind in kinds.items() if ".wo." not in key} == {torch.float16}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_becomes_safetensors_with_views_and_ties_in_order(capsys, source, tmp_path, zipped):
    content = load_file(source / "model.safetensors")
    embedding = content["model.embed_tokens.weight"]
    content["lm_head.weight"] = embedding
    content["model.norm.weight"] = torch.arange(32.0)[::2]
    content["model.layers.0.mlp.up_proj.weight"] = (
        content["model.layers.0.mlp.up_proj.weight"].t().contiguous().t()
    )
    expected = {key: value.contiguous() for key, value in content.items() if key != "lm_head.weight"}
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    assert run(source, tmp_path / "dst") == 0
    assert same(values(tmp_path / "dst"), expected)
    assert (
        "lm_head.weight is model.embed_tokens.weight in the old files, and is written once"
        in capsys.readouterr().out
    )
    assert torch.equal(logits(source), logits(tmp_path / "dst"))


def test_pytorch_is_a_target(source, tmp_path):
    assert run(source, tmp_path / "dst", "--to", "pytorch", "--dtype", "bf16") == 0
    found = torch.load(tmp_path / "dst" / "pytorch_model.bin", weights_only=True)
    expected = {key: value.bfloat16() for key, value in load_file(source / "model.safetensors").items()}
    assert same(found, expected)
    assert run(tmp_path / "dst", tmp_path / "back", "--max-shard-size", "4KB") == 0
    assert same(values(tmp_path / "back"), expected)


def test_several_pickles_with_an_index(source, tmp_path):
    assert run(source, tmp_path / "dst", "--to", "pytorch", "--max-shard-size", "8KB") == 0
    assert (tmp_path / "dst" / "pytorch_model.bin.index.json").is_file()
    assert torch.equal(logits(source), logits(tmp_path / "dst"))


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_gguf_file_becomes_a_folder_with_config_and_tokenizer(source, tmp_path, kind):
    model = tiny_llama(hidden_size=32, intermediate_size=64)
    file = write_gguf(model, tmp_path / "model.gguf", kind)
    assert run(file, tmp_path / "dst") == 0
    assert torch.equal(logits(file, dtype="auto"), logits(tmp_path / "dst").to(torch.float32))
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["dtype"] == "float32"
    kinds = {value.dtype for value in values(tmp_path / "dst").values()}
    assert torch.float32 in kinds and (kind == "Q8_0" or torch.float16 in kinds)


def test_the_tokenizer_of_a_gguf_file_comes_along(tmp_path):
    alphabet = byte_alphabet()
    tokens = [*alphabet, "<s>", "</s>", "he", "ll"]
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name in ("context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{name}", 32)
    for name in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{name}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(alphabet) + [3, 3, 1, 1])
    writer.add_token_merges(["h e", "l l"])
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(file, tmp_path / "dst") == 0
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "dst"), AutoTokenizer.from_pretrained(file)
    assert ours("hello there").input_ids == theirs("hello there").input_ids


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_quantizing_is_what_a_quantized_load_would_save(source, tmp_path, method):
    shutil.rmtree(source)
    Folder(source, tiny_llama(hidden_size=32, intermediate_size=64))
    assert run(source, tmp_path / "dst", "--quantize", method) == 0
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", quantization_config={"quant_method": method}
    )
    model.save_pretrained(tmp_path / "saved")
    assert same(values(tmp_path / "dst"), values(tmp_path / "saved"))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dst", "saved"))
    assert ours == theirs
    assert torch.equal(logits(tmp_path / "dst"), logits(tmp_path / "saved"))
    assert not left(tmp_path) - {"saved"}


def test_a_hub_id_in_the_cache(capsys, source, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    (cache / "snapshots").mkdir()
    shutil.copytree(source, cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run("me/tiny", tmp_path / "dst", "--offline", "--dtype", "fp16") == 0
    expected = {key: value.half() for key, value in load_file(source / "model.safetensors").items()}
    assert same(values(tmp_path / "dst"), expected)
    assert (tmp_path / "dst" / "tokenizer.json").is_file()
    assert main(["doctor", "me/tiny", "--offline"]) == 0
    assert "me/tiny: LlamaForCausalLM, safetensors" in capsys.readouterr().out


def test_transformers_reads_what_was_written(source, tmp_path):
    words = ("--to", "pytorch"), ("--max-shard-size", "8KB"), ("--max-shard-size", "8KB", "--to", "pytorch")
    for number, each in enumerate(words):
        assert run(source, tmp_path / f"dst{number}", *each) == 0
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"dst{number}").eval()
        with torch.no_grad():
            found = model(torch.arange(1, 9)[None]).logits
        torch.testing.assert_close(found, logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["no-such", [1]])
def test_an_unknown_architecture_is_taken_as_it_is(capsys, source, tmp_path, model_type):
    config = {"model_type": model_type, "torch_dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    assert run(source, tmp_path / "dst", "--dtype", "bf16") == 0
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert f"the architecture {model_type!r} is not known here" in capsys.readouterr().out
    expected = {key: value.bfloat16() for key, value in load_file(source / "model.safetensors").items()}
    assert same(values(tmp_path / "dst"), expected)


def test_a_file_without_a_config(capsys, tmp_path):
    content = {
        "b": torch.arange(6).view(2, 3),
        "a": torch.rand(3).half(),
        "e": torch.empty(0, 4),
        "s": torch.tensor(1.5),
    }
    save_file(content, tmp_path / "x.safetensors", {"made": "by hand"})
    assert run(tmp_path / "x.safetensors", tmp_path / "dst") == 0
    assert same(values(tmp_path / "dst"), content)
    assert open_checkpoint(tmp_path / "dst").metadata == {"made": "by hand"}
    assert "there is no config.json beside the weights" in capsys.readouterr().out


# What is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onnx"], "Unknown format 'onnx' (--to): expected safetensors, pytorch, gguf."),
        (["--to", "safetensor"], "Did you mean 'safetensors'?"),
        (["--to", "msgpack"], "Conversion to msgpack is not offered yet"),
        (["--to", "h5"], "Conversion to h5 is not offered yet"),
        (["--dtype", "bf17"], "Unknown dtype 'bf17'"),
        (
            ["--quantize", "int3"],
            "safetensors files are not quantized to 'int3' (--quantize): expected int8 or int4",
        ),
        (["--quantize", "int8", "--to", "pytorch"], "pytorch files are not quantized to 'int8'"),
        (["--max-shard-size", "5XB"], "This is not a size"),
    ],
)
def test_words_that_are_not_understood(capsys, source, tmp_path, words, said):
    assert run(source, tmp_path / "dst", *words) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dst").exists() and not left(tmp_path)


def test_where_a_conversion_does_not_write(capsys, source, tmp_path):
    target = tmp_path / "dst"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert run(source, target) == 1
    assert "DST exists already" in capsys.readouterr().err
    assert run(source, source, "--force") == 1
    assert "not converted in place" in capsys.readouterr().err
    assert run(source, source / "inner") == 1
    assert "DST lies inside SRC" in capsys.readouterr().err
    assert run(source, target, "--force") == 0
    assert (target / "mine.txt").read_text() == "mine"
    assert same(values(target), load_file(source / "model.safetensors"))
    assert run(source, target, "--to", "pytorch", "--force") == 1
    assert "DST holds model.safetensors, which is loaded instead" in " ".join(capsys.readouterr().err.split())


def test_an_empty_folder_is_taken(source, tmp_path):
    (tmp_path / "dst").mkdir()
    assert run(source, tmp_path / "dst") == 0


def test_values_that_do_not_fit_the_dtype(capsys, source, tmp_path):
    Folder.tensors(_at(source), model__norm__weight=torch.full((16,), 1e6))
    assert run(source, tmp_path / "dst", "--dtype", "float16") == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "Values of 'model.norm.weight' are too large for float16" in err and "found 1e+06" in err
    assert not (tmp_path / "dst").exists() and not left(tmp_path)
    assert run(source, tmp_path / "dst", "--dtype", "bfloat16") == 0


def _at(path):
    folder = Folder.__new__(Folder)
    folder.path = path
    return folder


def test_a_quantized_checkpoint_keeps_its_dtypes(capsys, source, tmp_path):
    shutil.rmtree(source)
    model = tiny_llama()
    model.save_pretrained(source)
    assert run(source, tmp_path / "packed", "--quantize", "int8") == 0
    assert run(tmp_path / "packed", tmp_path / "dst", "--dtype", "bf16") == 1
    assert "The checkpoint is quantized already" in capsys.readouterr().err
    assert run(tmp_path / "packed", tmp_path / "dst", "--max-shard-size", "4KB") == 0
    assert same(values(tmp_path / "dst"), values(tmp_path / "packed"))
    assert torch.equal(logits(tmp_path / "dst"), logits(tmp_path / "packed"))


def test_a_full_disk_is_told_before_anything_is_written(capsys, source, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 10)
    assert run(source, tmp_path / "dst") == 1
    assert "The disk has no room" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_links_out_of_the_folder_are_left_behind(capsys, source, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (source / "vocab.txt").symlink_to(secret)
    assert run(source, tmp_path / "dst") == 0
    assert not (tmp_path / "dst" / "vocab.txt").exists()
    assert "left behind, for they are links out of the folder: vocab.txt" in capsys.readouterr().out


def test_a_broken_source_says_so(capsys, source, tmp_path):
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(raw[:-8])
    assert run(source, tmp_path / "dst") == 1
    assert "truncated" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()


def test_what_was_written_wrong_is_found(capsys, source, tmp_path, monkeypatch):
    write = core.write_tensor

    def wrong(opened, key, tensor):
        write(opened, key, tensor)
        if key == "model.norm.weight":
            opened.seek(-1, os.SEEK_CUR)
            opened.write(b"\x55")

    monkeypatch.setattr(core, "write_tensor", wrong)
    assert run(source, tmp_path / "dst") == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "What was written is not what was meant: the bytes of 'model.norm.weight' differ" in err
    assert not (tmp_path / "dst").exists()


# Interrupted


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_killed_anywhere_it_leaves_nothing_that_loads_as_if_whole(
    source, tmp_path, monkeypatch, force, capsys
):
    expected = {key: value.bfloat16() for key, value in load_file(source / "model.safetensors").items()}
    old = {key: value + 1 for key, value in load_file(source / "model.safetensors").items()}
    target, words = tmp_path / "dst", [source, tmp_path / "dst", "--dtype", "bf16", "--max-shard-size", "8KB"]
    words += ["--force"] if force else []
    for after in range(200):
        shutil.rmtree(target, ignore_errors=True)
        if force:
            target.mkdir()
            save_file(old, target / "model.safetensors")
        with monkeypatch.context() as patched:
            calls = dying(patched, after)
            with contextlib.suppress(Killed):
                assert run(*words) == 0
        if target.exists() and (force or any(target.iterdir())):
            checkpoint = open_checkpoint(target)
            with MappedFiles() as files:
                found = {
                    key: files.array(info).astype(np.float32) for key, info in checkpoint.tensors.items()
                }
            assert any(
                found.keys() == each.keys() and all((found[k] == each[k].float().numpy()).all() for k in each)
                for each in ((expected, old) if force else (expected,))
            ), after
        elif len(calls) <= after:
            raise AssertionError("it ended and left nothing")
        if len(calls) <= after:
            break
        # Without --force what is there by now is the whole result.
        if not (target.exists() and not force):
            assert run(*words) == 0
        assert same(values(target), expected)
        shutil.rmtree(core.work_path(target), ignore_errors=True)
        capsys.readouterr()
    assert after > 20
    assert not left(tmp_path)


@pytest.mark.parametrize("after", [2, 6, 10, 14, 18])
def test_killed_while_it_quantizes(source, tmp_path, monkeypatch, after):
    words = [source, tmp_path / "dst", "--quantize", "int8"]
    with monkeypatch.context() as patched:
        dying(patched, after)
        with contextlib.suppress(Killed):
            run(*words)
    if not (tmp_path / "dst").exists():
        assert run(*words) == 0
        assert not left(tmp_path)
    wish = {"quantization_config": {"quant_method": "int8"}}
    AutoModelForCausalLM.from_pretrained(source, dtype="auto", **wish).save_pretrained(tmp_path / "saved")
    assert same(values(tmp_path / "dst"), values(tmp_path / "saved"))


def test_the_folder_of_the_moment_is_a_place(source, tmp_path, monkeypatch):
    (tmp_path / "dst").mkdir()
    monkeypatch.chdir(tmp_path / "dst")
    (tmp_path / "dst" / "mine.txt").write_text("mine")
    assert run(source, ".", "--force") == 0
    assert same(values(tmp_path / "dst"), load_file(source / "model.safetensors"))
    assert not left(tmp_path)


def test_what_a_killed_run_has_finished_is_kept(capsys, source, tmp_path, monkeypatch):
    words = [source, tmp_path / "dst", "--max-shard-size", "8KB"]
    with monkeypatch.context() as patched:
        dying(patched, 7)
        with pytest.raises(Killed):
            run(*words)
    parts = core.work_path(tmp_path / "dst") / "parts"
    done = sorted(file.name for file in parts.iterdir() if not file.name.startswith("."))
    assert done
    # One that is damaged meanwhile is written again.
    raw = bytearray((parts / done[-1]).read_bytes())
    raw[-1] ^= 1
    (parts / done[-1]).write_bytes(raw)
    capsys.readouterr()
    assert run(*words) == 0
    kept = [line for line in capsys.readouterr().out.splitlines() if "kept from the run before" in line]
    assert len(kept) == len(done) - 1
    assert same(values(tmp_path / "dst"), load_file(source / "model.safetensors"))


def test_other_words_after_a_killed_run_start_over(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        dying(patched, 7)
        with pytest.raises(Killed):
            run(source, tmp_path / "dst", "--max-shard-size", "8KB")
    assert run(source, tmp_path / "dst", "--max-shard-size", "8KB", "--dtype", "float16") == 0
    expected = {key: value.half() for key, value in load_file(source / "model.safetensors").items()}
    assert same(values(tmp_path / "dst"), expected)
    assert not left(tmp_path)


def test_two_at_once(capsys, source, tmp_path):
    with core.work_folder(tmp_path / "dst"):
        assert run(source, tmp_path / "dst") == 1
    assert "Another process is converting to this place" in capsys.readouterr().err


def test_a_real_kill(source, tmp_path):
    code = (
        "import sys, time\n"
        "from pretrained.core import convert as core\n"
        "from pretrained.cli.main import main\n"
        "write = core.write_tensor\n"
        "def slow(*words):\n    write(*words); print('.', flush=True); time.sleep(0.2)\n"
        "core.write_tensor = slow\n"
        f"main(['convert', {str(source)!r}, {str(tmp_path / 'dst')!r}])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pretrained.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout.readline() == b".\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "dst").exists()
    assert run(source, tmp_path / "dst") == 0
    assert not left(tmp_path)


# What it costs

MEASURE = """
import json, sys
from pathlib import Path
from pretrained.cli.main import main

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

tiny, large, target, *words = sys.argv[1:]
main(["convert", tiny, target + "-tiny", *words])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
main(["convert", large, target, *words])
print(json.dumps({"peak": status("VmHWM") - before, "torch": "torch" in sys.modules}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the peak"
)
@pytest.mark.parametrize("words", [(), ("--dtype", "bf16")], ids=["as it is", "cast"])
def test_memory_holds_one_tensor_at_a_time(tmp_path, words):
    # The old file's pages of a tensor, the new bytes, the new file's pages and pieces between: of 12 tensors.
    size = 8 << 20
    save_file({"a": torch.ones(4)}, tmp_path / "tiny.safetensors")
    content = {f"layer.{i}.weight": torch.full((size // 4,), float(i)) for i in range(12)}
    save_file(content, tmp_path / "large.safetensors")
    del content
    environment = os.environ | {"PYTHONPATH": str(Path(pretrained.__file__).parents[1])}
    names = [str(tmp_path / name) for name in ("tiny.safetensors", "large.safetensors", "dst")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *names, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["torch"]
    assert found["peak"] < 4 * size, found["peak"] / size
