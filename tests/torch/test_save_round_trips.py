# SPDX-License-Identifier: Apache-2.0
"""Folders go round: every class saved here loads in transformers and the other way, to the same outputs.

And every residency: placed, on disk, quantized; and what a save takes in memory at its peak.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pretrained.torch.models.llama import LlamaForCausalLM
from support.cases import CASES
from support.checkpoints import tiny_llama

# One of each class; what differs in one config fact has its tests in the battery.
CLASSES = {case.model_class.__name__: case for case in reversed(CASES)}


def first_output(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_there_and_back(tmp_path, name):
    case = CLASSES[name]
    ours = case.build().eval()
    inputs = case.inputs(ours.config)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    expected = first_output(ours, inputs)
    torch.testing.assert_close(first_output(theirs, inputs), expected, atol=5e-5, rtol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    again, info = case.model_class.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()), info
    state, other = ours.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    torch.testing.assert_close(first_output(again, inputs), expected, atol=1e-6, rtol=1e-5)


# -- residencies -----------------------------------------------------------------------------------

MAPS = {
    "cpu": {"": "cpu"},
    "disk": {"model": "disk", "lm_head": "cpu"},
    "mixed": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", 3000])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("where", MAPS)
def test_placed_models(tmp_path, where, safe, size, dtype):
    """From any place, in any format; also onto the folder whose pages are the weights."""
    tiny_llama().save_pretrained(tmp_path / "m", safe_serialization=safe)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
    options = {"device_map": MAPS[where], "offload_folder": tmp_path / "offload", "dtype": dtype}
    placed = LlamaForCausalLM.from_pretrained(tmp_path / "m", **options)
    for folder in ("to", "m"):
        placed.save_pretrained(tmp_path / folder, safe_serialization=safe, max_shard_size=size)
        again = LlamaForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in plain.state_dict().items())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models_from_disk(tmp_path, scheme):
    tiny_llama(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path / "m")
    quantization = {"quant_method": scheme} | ({"group_size": 32} if scheme == "int4" else {})
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "m", quantization_config=quantization)
    plain.save_pretrained(tmp_path / "q")
    placed = LlamaForCausalLM.from_pretrained(
        tmp_path / "q", device_map=MAPS["mixed"], offload_folder=tmp_path / "o"
    )
    placed.save_pretrained(tmp_path / "again", max_shard_size=6000)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert again.is_quantized
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in plain.state_dict().items())


PEAK = """
import json, sys
from pathlib import Path
import torch
from pretrained.arch.llama import LlamaConfig
from pretrained.torch.models.llama import LlamaForCausalLM

def memory(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) / 1024

sizes = dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8)
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096, max_position_embeddings=32))
tiny = sizes | dict(hidden_size=16, intermediate_size=16, vocab_size=9)
small = LlamaForCausalLM(LlamaConfig(**tiny, max_position_embeddings=32))
options = {"safe_serialization": sys.argv[2] == "True"}
small.save_pretrained(sys.argv[1] + "/small", **options)
if sys.argv[3] == "strided":
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight = torch.nn.Parameter(part.weight.detach().T.contiguous().T)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model.save_pretrained(sys.argv[1] + "/m", max_shard_size="200MB", **options)
print(json.dumps([memory("VmHWM") - before, sum(p.nbytes for p in model.parameters()) / 2**20]))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the peak"
)
@pytest.mark.parametrize(
    ("safe", "kind", "most"), [(True, "plain", 4), (True, "strided", 12), (False, "plain", 12)]
)
def test_the_peak_of_a_save(tmp_path, safe, kind, most):
    """MiB above the model of over 100 MiB: nothing for plain tensors; one of eight strided ones of 8 MiB."""
    command = [sys.executable, "-c", PEAK, tmp_path, str(safe), kind]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    above, whole = json.loads(done.stdout)
    assert whole > 100
    assert above < most
