# SPDX-License-Identifier: Apache-2.0
"""Files that are no files, that nobody may read, or that contradict each other: an error that names them."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from pretrained import AutoModelForCausalLM
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import ArgumentError, PretrainedError, WeightsError
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.quantize_model import quantize_model
from support.checkpoints import Folder, tiny_llama

pytestmark = [pytest.mark.skipif(sys.platform == "win32", reason="POSIX files"), pytest.mark.timeout(60)]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def anew(make):
    def change(path):
        path.unlink(missing_ok=True)
        make(path)

    return change


KINDS = {
    "pipe": anew(os.mkfifo),
    "folder": anew(os.mkdir),
    "dangling": anew(lambda path: path.symlink_to("nowhere")),
    "loop": anew(lambda path: path.symlink_to(path.name)),
    "device": anew(lambda path: path.symlink_to("/dev/zero")),
    "empty": lambda path: path.write_bytes(b""),
}
SAYS = {
    "pipe": "neither a file nor a folder",
    "folder": "a folder|no weights",
    "dangling": "a link that leads nowhere",
    "loop": "Too many levels",
    "device": "neither a file nor a folder|leads out of the (model.s )?folder",
    "empty": "empty file|too short|Expecting value",
}
SHAPES = {
    "model.safetensors": lambda folder: folder,
    "config.json": lambda folder: folder,
    "b.safetensors": lambda folder: folder.shards(),
    "model.safetensors.index.json": lambda folder: folder.shards(),
    "pytorch_model.bin": lambda folder: folder.pickle(),
}


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(folder, kind, name, cls):
    """A pipe must not be waited for, and a device not read to its end."""
    SHAPES[name](folder)
    KINDS[kind](folder.path / name)
    with pytest.raises(PretrainedError, match=SAYS[kind]) as caught:
        cls.from_pretrained(folder.path)
    assert str(folder.path) in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
@pytest.mark.parametrize("suffix", [".gguf", ".safetensors", ""])
def test_a_path_that_is_no_file(tmp_path, kind, suffix):
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / f"thing{suffix}"
    KINDS[kind](path)
    with pytest.raises(PretrainedError) as caught:
        AutoModelForCausalLM.from_pretrained(path)
    assert "Did you mean" not in str(caught.value)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("total", [-1, "lots", 10**30, None, {}, float("nan")])
def test_a_total_size_that_lies_decides_nothing(folder, total):
    folder.shards()
    index = folder.path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"] = {"total_size": total}
    index.write_text(json.dumps(content))
    model = LlamaForCausalLM.from_pretrained(folder.path)
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


UNREADABLE = """
import os, sys
sys.path[:0] = {path}
import torch
from pretrained.errors import PretrainedError
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained import AutoModelForCausalLM
LlamaForCausalLM.from_pretrained(sys.argv[1])  # everything is imported while Python's files can be read
AutoModelForCausalLM.from_pretrained(sys.argv[1])
os.setgid(12345), os.setuid(12345)
for path in sys.argv[2:]:
    for cls in (LlamaForCausalLM, AutoModelForCausalLM):
        try:
            cls.from_pretrained(path)
        except PretrainedError as error:
            print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to become another")
def test_what_nobody_may_read(tmp_path):
    for parent in tmp_path.parents:
        if "pytest" in str(parent):
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    cases = {}
    for name in ("model.safetensors", "config.json", "b.safetensors", "model.safetensors.index.json"):
        folder = Folder(tmp_path / f"no-{name}")
        SHAPES[name](folder)
        (folder.path / name).chmod(0)
        cases[str(folder.path)] = name
    for mode in (0, 0o444, 0o111):
        folder = Folder(tmp_path / f"mode-{mode:o}")
        folder.path.chmod(mode)
        cases[str(folder.path)] = ""
    good = Folder(tmp_path / "good")
    done = subprocess.run(
        [sys.executable, "-c", UNREADABLE.format(path=sys.path), str(good.path), *cases],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * len(cases), done.stdout
    for line, (path, name) in zip(lines, [case for case in cases.items() for _ in range(2)], strict=True):
        assert path in line, line
        assert name in line, line
        assert "Permission denied" in line, line


# -- quantization ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "int5"}, r"Unknown quantization method.*'int8' or 'int4'.*Did you mean 'int\d'"),
        ({"quant_method": "gptqq"}, "Did you mean 'gptq'"),
        ({"quant_method": "Int4"}, "Did you mean 'int4'"),
        ({"quant_method": "int4", "bits": 3}, "'bits' is no setting of 'int4'"),
        ({"quant_method": "int4", "group_size": 48}, "expected 32, 64 or 128, found 48"),
        ({"quant_method": "int4", "group_size": True}, "expected 32, 64 or 128, found True"),
        ({"quant_method": "int4", "group_size": 0}, "expected 32, 64 or 128, found 0"),
        ({"quant_method": "int4", "group_size": 64}, r"do not divide into groups of 64 .*q_proj \(16\)"),
        ({"quant_method": "int8", "group_size": 32}, "group_size means nothing for 'int8'"),
        ({"quant_method": "int8", "compute_dtype": "int8"}, "compute_dtype|Weights cannot be loaded as int8"),
        ({}, "No quantization method is named"),
        ([], "This does not describe a quantization"),
        ("int8", "This does not describe a quantization"),
    ],
)
def test_schemes_that_are_none(folder, config, message):
    before = folder.weights.stat().st_atime_ns
    with pytest.raises(ArgumentError, match=message):
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config=config)
    assert before <= folder.weights.stat().st_atime_ns


@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit", "offload_buffers"])
def test_switches_are_yes_or_no(folder, name):
    with pytest.raises(ArgumentError, match=f"{name} has a value of the wrong type.*True or False"):
        LlamaForCausalLM.from_pretrained(folder.path, **{name: "yes"})


def wide_folder(tmp_path, **config):
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    folder = Folder(tmp_path / "plain", model)
    quantized = LlamaForCausalLM.from_pretrained(folder.path, quantization_config=config)
    quantized.save_pretrained(tmp_path / "quantized")
    folder.path = tmp_path / "quantized"
    return folder


@pytest.mark.parametrize(
    "wish",
    [
        {"quant_method": "int8"},
        {"quant_method": "int4", "group_size": 64},
        {"quant_method": "int4", "symmetric": False},
        {"quant_method": "int4", "skip_modules": ["o_proj"]},
        {"quant_method": "int4", "quantize_head": True},
        {"quant_method": "int4", "quantize_embeddings": True},
    ],
)
def test_a_scheme_that_contradicts_the_checkpoint(tmp_path, wish):
    folder = wide_folder(tmp_path, quant_method="int4", group_size=32)
    with pytest.raises(ArgumentError, match="The checkpoint is quantized already"):
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config=wish)
    for same in ({"quant_method": "int4"}, {"quant_method": "int4", "group_size": 32}):
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config=same)


@pytest.mark.parametrize(("held", "said"), [("int8", "int4"), ("int4", "int8")])
def test_a_config_that_contradicts_the_files(tmp_path, held, said):
    folder = wide_folder(tmp_path, quant_method=held)
    folder.config(quantization_config={"quant_method": said})
    with pytest.raises(WeightsError, match=rf"different quantizations .*expected {said}, found {held}"):
        LlamaForCausalLM.from_pretrained(folder.path)


def test_only_a_head_in_8_bits_is_an_int4_model_too(tmp_path):
    config = {"quant_method": "int4", "skip_modules": ["layers"], "quantize_head": True}
    folder = wide_folder(tmp_path, **config)
    assert LlamaForCausalLM.from_pretrained(folder.path).is_quantized


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "int8"},
        {"quant_method": "int4"},
        {"quant_method": "int4", "symmetric": False},
        {"quant_method": "int8", "quantize_embeddings": True, "quantize_head": True},
    ],
    ids=["int8", "int4", "int4-zeros", "all"],
)
def test_numbers_that_are_none(tmp_path, bad, dtype, config):
    """The tensor, the row and the column are named, in whatever is quantized."""
    model = tiny_llama(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    everything = "quantize_head" in config
    key = "model.embed_tokens.weight" if everything else "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        model.to(dtype).get_parameter(key)[7, 33] = bad
    folder = Folder(tmp_path / "model", model)
    with pytest.raises(
        WeightsError, match=rf"no finite numbers.*{re.escape(key)}, output 7, input 33.*{bad}"
    ):
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config=config)
    if not everything:
        skipping = config | {"skip_modules": ["up_proj"]}
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config=skipping)


def test_a_model_without_values(folder):
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(WeightsError, match=r"without values cannot be quantized .*q_proj\.weight"):
        quantize_model(model, QuantizationConfig(quant_method="int8"))
    assert not any(type(module).__name__.startswith("Quantized") for module in model.modules())
    with torch.device("meta"), pytest.raises(PretrainedError, match="cannot be loaded inside"):
        LlamaForCausalLM.from_pretrained(folder.path, quantization_config={"quant_method": "int8"})
    state = {key: value.to("meta") for key, value in tiny_llama().state_dict().items()}
    with pytest.raises(ArgumentError, match=r"state_dict\['model\.embed_tokens\.weight'\].*has no values"):
        LlamaForCausalLM.from_pretrained(
            None, config=tiny_llama().config, state_dict=state, load_in_8bit=True
        )
