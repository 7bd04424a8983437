# SPDX-License-Identifier: Apache-2.0
"""Weights that a load quantizes and that live on disk: copied once, checked, and run from their pages."""

import errno
import gc
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from pretrained import FileError, LlamaForCausalLM, PlacementError, WeightsError
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import NotYetError
from pretrained.torch.offload_folder import INDEX
from pretrained.torch.quantize import quantized_leaves
from pretrained.torch.quantizers import rounding
from pretrained.torch.quantizers.base import Quantizing
from support import gguf_files

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
INT8 = {"quant_method": "int8"}
INT4 = {"quant_method": "int4"}
ZEROS = {**INT4, "symmetric": False, "quantize_head": True}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))


def built(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaForCausalLM.config_class(**CONFIG)).eval()


@pytest.fixture
def plain(tmp_path):
    built().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(source, folder=None, config=INT4, **arguments):
    arguments.setdefault("device_map", "disk")
    return LlamaForCausalLM.from_pretrained(
        source, quantization_config=config, offload_folder=folder, **arguments
    )


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def rounded(monkeypatch):
    """The keys of the weights that are quantized while a test runs."""
    keys, quantize = [], rounding.quantize

    def counting(*args, key, **kwargs):
        keys.append(key)
        return quantize(*args, key=key, **kwargs)

    monkeypatch.setattr(rounding, "quantize", counting)
    return keys


def copies(folder):
    return sorted(folder.glob("*.safetensors"))


# -- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [INT8, INT4, ZEROS], ids=["int8", "int4", "zeros"])
def test_copies_are_made_once_and_said_to_be_what_they_are(plain, tmp_path, rounded, config):
    folder = tmp_path / "copies"
    resident = LlamaForCausalLM.from_pretrained(plain, quantization_config=config)
    count = len(quantized_leaves(resident))
    rounded.clear()
    for times in (1, 1):
        model = load(plain, folder, config)
        assert len(rounded) == times * count
        assert torch.equal(logits(model), logits(resident))
        assert model.load_report.worst_quantized == resident.load_report.worst_quantized
        assert model.load_report.quantized == resident.load_report.quantized
    rounded.clear()
    assert len(copies(folder)) == 1
    nbytes = sum(leaf.num_weights for leaf in quantized_leaves(resident).values())
    assert copies(folder)[0].stat().st_size < nbytes * (1.2 if config is INT8 else 0.9)


def test_schemes_lie_side_by_side(plain, tmp_path, rounded):
    folder = tmp_path / "copies"
    for config in (INT4, INT8, {**INT4, "group_size": 64, "skip_modules": ["down_proj"]}, ZEROS):
        load(plain, folder, config)
    assert len(copies(folder)) == 4
    rounded.clear()
    for config in (INT4, INT8, ZEROS):
        again = load(plain, folder, config)
        assert torch.equal(logits(again), logits(load(plain, None, config, device_map=None)))
    assert rounded.count("model.layers.0.mlp.up_proj.weight") == 3  # the resident ones


def test_another_map_finds_what_is_there(plain, tmp_path, rounded):
    folder = tmp_path / "copies"
    load(plain, folder, device_map={"": "cpu", "model.layers.0": "disk"})
    assert len(rounded) == 14
    rounded.clear()
    load(plain, folder)
    # The layer that was there is not made again.
    assert sorted({key.split(".")[2] for key in rounded}) == ["1"]


def test_without_a_folder_it_is_refused_with_the_mend(plain):
    message = r"14 of 21 weights .* converted copy .*quantized by this load.*Pass offload_folder="
    with pytest.raises(PlacementError, match=message):
        load(plain)


def test_the_copies_of_another_model_are_refused(plain, tmp_path):
    built(1).save_pretrained(tmp_path / "other")
    load(plain, tmp_path / "copies")
    with pytest.raises(PlacementError, match="made from another model"):
        load(tmp_path / "other", tmp_path / "copies")


def test_copies_of_an_older_state_are_refused(plain, tmp_path):
    load(plain, tmp_path / "copies")
    built(1).save_pretrained(plain)
    with pytest.raises(PlacementError, match="older state of this model's files"):
        load(plain, tmp_path / "copies")


@pytest.mark.parametrize("damage", ["gone", "cut", "overwritten", "scale lost"])
def test_damaged_copies_are_made_again(plain, tmp_path, rounded, damage):
    folder = tmp_path / "copies"
    expected = logits(load(plain, folder))
    gc.collect()
    (file,) = copies(folder)
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "overwritten":
        with file.open("r+b") as opened:
            opened.seek(-1000, os.SEEK_END)
            opened.write(b"\xff" * 500)
    else:
        save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 32, dtype=torch.uint8)}, file)
    rounded.clear()
    assert torch.equal(logits(load(plain, folder)), expected)
    assert len(rounded) == 14


def test_an_index_from_before_is_made_anew(plain, tmp_path, rounded):
    folder = tmp_path / "copies"
    load(plain, folder)
    index = json.loads((folder / INDEX).read_text())
    for entry in index["weights"].values():
        del entry["written"]
    (folder / INDEX).write_text(json.dumps(index))
    rounded.clear()
    load(plain, folder)
    assert len(rounded) == 14


def test_a_load_that_was_killed_leaves_nothing_in_the_way(plain, tmp_path, monkeypatch):
    folder = tmp_path / "copies"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os._exit(0))
        if os.fork() == 0:
            load(plain, folder)
        os.wait()
    assert [name for name in os.listdir(folder) if name.startswith(".tmp-")]
    assert torch.equal(logits(load(plain, folder)), logits(load(plain, device_map=None)))
    assert not [name for name in os.listdir(folder) if name.startswith(".tmp-")]


def test_a_full_disk_leaves_nothing_half_written(plain, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pretrained.core.writer.write_tensor", full)
    with pytest.raises(FileError, match=r"converted copy.*room for \d+ bytes.*No space.*offload_folder"):
        load(plain, tmp_path / "copies")
    assert not [name for name in os.listdir(tmp_path / "copies") if not name.endswith(".lock")]


def test_nan_is_named_and_leaves_nothing(tmp_path):
    model = built()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.up_proj.weight, output 3, input 4"):
        load(tmp_path / "nan", tmp_path / "copies")
    assert not copies(tmp_path / "copies")


def test_a_state_dict_is_quantized_onto_the_disk(tmp_path):
    plain = built()
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=plain.config,
        state_dict=plain.state_dict(),
        quantization_config=INT4,
        device_map="disk",
        offload_folder=tmp_path,
    )
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(model), logits(load(tmp_path / "plain", device_map=None)))
    assert len(copies(tmp_path)) == 1
    del model
    gc.collect()
    assert not copies(tmp_path)


def test_forms_of_other_libraries_do_not_go_there_yet():
    quantizer = Quantizing(QuantizationConfig(quant_method="int8"), "float32")
    quantizer.check_homes(["cpu", 0])
    with pytest.raises(NotYetError, match=r"another library's form cannot .* yet.*save_pretrained, and load"):
        quantizer.check_homes(["cpu", "disk"])


# -- what is there already -----------------------------------------------------------------------


@pytest.mark.parametrize("config", [INT8, INT4, ZEROS], ids=["int8", "int4", "zeros"])
def test_saved_ones_run_from_their_own_files(plain, tmp_path, config):
    resident = load(plain, None, config, device_map=None)
    resident.save_pretrained(tmp_path / "q")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "q", device_map="disk")
    assert torch.equal(logits(model), logits(resident))
    model.to("cpu")
    assert torch.equal(logits(model), logits(resident))
    assert not any(leaf._lays_out_at_call for leaf in quantized_leaves(model).values())


def test_packed_blocks_are_the_files_own_pages(tmp_path):
    file = gguf_files.write_gguf(built(), tmp_path / "m.gguf")
    for device_map in (None, "disk"):
        model = load(file, None, {"quant_method": "gguf"}, device_map=device_map)
        start, end = _mapped(file)
        leaves = quantized_leaves(model)
        assert len(leaves) == 16
        for path, leaf in leaves.items():
            # Also the two whose rows the converter has reordered.
            assert start <= leaf.weight.data_ptr() < end, path
    q = leaves["model.layers.0.self_attn.q_proj"]
    assert not torch.equal(q.weight, model.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    model.load_state_dict(state)
    assert torch.equal(q.weight, state["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(logits(model), expected)


def _mapped(file):
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split("-", 1) for line in maps if line.rstrip().endswith(str(file))]
    first = min(int(start, 16) for start, _ in spans)
    return first, max(int(rest.split()[0], 16) for _, rest in spans)


# -- memory --------------------------------------------------------------------------------------

CHILD = """
import re, sys, torch
from pathlib import Path
from pretrained import LlamaForCausalLM
from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.quantized_ops import kernel_block
from pretrained.torch.rounding import quantize

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
kernel_block()
quantize(torch.randn(64, 64), QuantizationConfig(quant_method="int4"))
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = LlamaForCausalLM.from_pretrained(
    sys.argv[1],
    dtype="auto",
    device_map="disk",
    offload_folder=sys.argv[2],
    quantization_config={"quant_method": sys.argv[3]},
)
with torch.no_grad():
    model(torch.arange(8)[None])
print(peak() - before)
"""


@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
def test_the_peak_is_a_tensor_and_not_the_model(tmp_path, config):
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 12}
    given = LlamaForCausalLM.config_class(**{**CONFIG, **sizes, "num_key_value_heads": 12})
    given.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(given)
    weights = {name: torch.full(value.shape, 0.01) for name, value in empty.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        tmp_path,
        tmp_path / "copies",
        config["quant_method"],
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    nbytes = sum(value.nbytes for value in weights.values())
    assert nbytes > 130e6
    # The largest tensor has 6 MB; the rest is what a first forward takes, and the map's page tables.
    assert int(done.stdout) < 48 << 20
