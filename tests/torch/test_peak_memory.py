# SPDX-License-Identifier: Apache-2.0
"""What a load costs in memory at its peak, for every format and everything weights can become.

Each load runs in a process of its own, after a load of a tiny model has paid for what first calls cost. The
system keeps the highest resident memory (VmHWM, reset before the load); memory of the process's own (RssAnon)
and pages of files (RssFile) are told apart at the end, after the weights have been looked at.
"""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pretrained.arch.llama import LlamaConfig
from pretrained.torch.load import skeleton_of
from pretrained.torch.models.llama import LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the peak"
)

MIB = 1 << 20
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 1},
    "hundred": {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32000, "num_hidden_layers": 2},
    # A wide embedding too: one tensor of a third of the file.
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 64000, "num_hidden_layers": 6},
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 64}


def config_of(size):
    return LlamaConfig(**SIZES[size], **HEADS, tie_word_embeddings=True)


def weights_of(config, dtype):
    with torch.device("meta"):
        model = LlamaForCausalLM.from_config(config)
    skeleton = skeleton_of(model)
    pattern = (torch.arange(4096) % 255 - 127).float() / 1000
    for key, spec in skeleton.params.items():
        if key not in skeleton.ties:
            yield (
                key,
                pattern.repeat(-(-spec.num_elements // 4096))[: spec.num_elements].view(spec.shape).to(dtype),
            )


def write(path, size, kind, dtype):
    """Write a checkpoint of some kind; tensors are made one at a time where the format allows."""
    config = config_of(size)
    if kind == "gguf":
        write_gguf(path / "model.gguf", config)
        return
    config.save_pretrained(path)
    state = dict(weights_of(config, dtype))
    if kind == "single":
        save_file(state, path / "model.safetensors", {"format": "pt"})
    elif kind == "sharded":
        keys = list(state)
        third = -(-len(keys) // 3)
        names = {key: f"model-0000{at // third + 1}-of-00003.safetensors" for at, key in enumerate(keys)}
        for name in set(names.values()):
            part = {key: state[key] for key in keys if names[key] == name}
            save_file(part, path / name, {"format": "pt"})
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")


def write_gguf(file, config):
    """Write Q8_0 blocks (norms as float32), as llama.cpp's converter names them."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(64)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in weights_of(config, torch.float32):
        name = names.get_name(key.removesuffix(".weight"), try_suffixes=()) + ".weight"
        array = value.numpy()
        if array.ndim == 2:
            packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


MEASURE = """
import ctypes, gc, json, sys
sys.path[:0] = {path}
import torch
torch.set_num_threads(1)
from pretrained.torch.models.llama import LlamaForCausalLM

def status():
    lines = open("/proc/self/status").read().splitlines()
    found = dict(line.split(":", 1) for line in lines if line[:3] in ("VmH", "Rss", "VmR"))
    return {{name: int(text.split()[0]) * 1024 for name, text in found.items()}}

def measure(path, options):
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # free memory of the load before is not to hide this one's
    before = status()
    open("/proc/self/clear_refs", "w").write("5")  # the highest resident memory is counted anew from here
    model = LlamaForCausalLM.from_pretrained(path, **options)
    loaded = status()
    weights = {{}}
    for tensor in (*model.parameters(), *model.buffers()):
        weights[tensor.data_ptr()] = tensor.nbytes
        for piece in tensor.detach().split(256):
            piece.ne(0).any()
    touched = status()
    return {{
        "weights": sum(weights.values()),
        "peak": loaded["VmHWM"] - before["VmRSS"],
        "anonymous": touched["RssAnon"] - before["RssAnon"],
        "file": touched["RssFile"] - before["RssFile"],
    }}

tiny, path = sys.argv[1:3]
for options in json.loads(sys.argv[3]):
    LlamaForCausalLM.from_pretrained(tiny, **options)  # what first calls cost
    print(json.dumps(measure(path, options)))
"""


def measure(folders, size, kind, stored, *options):
    """Return what each of some loads took, one after the other in one process."""
    tail = "model.gguf" if kind == "gguf" else ""
    paths = [str(folders(name, kind, stored) / tail) for name in ("tiny", size)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(path=sys.path), *paths, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a checkpoint; the one before is removed unless it is the same."""
    made = {}

    def folder(size, kind, dtype):
        for other in [key for key in made if key[0] != "tiny" and key != (size, kind, dtype)]:
            if size != "tiny":
                for file in made.pop(other).iterdir():
                    file.unlink()
        if (size, kind, dtype) not in made:
            path = tmp_path_factory.mktemp(f"{size}-{kind}")
            write(path, size, kind, dtype)
            made[size, kind, dtype] = path
        return made[size, kind, dtype]

    return folder


INT8, INT4 = (
    {"dtype": "bfloat16", "quantization_config": {"quant_method": name}} for name in ("int8", "int4")
)
NARROW = {"same": {"dtype": "bfloat16"}, "up": {"dtype": "float32"}, "int8": INT8, "int4": INT4}
WIDE = {"down": {"dtype": "bfloat16"}}
BLOCKS = {
    "decoded": {},
    "decoded-bf16": {"dtype": "bfloat16"},
    "packed": {"quantization_config": {"quant_method": "gguf"}},
    "int8": INT8,
    "int4": INT4,
}
KINDS = ["single", "sharded", "zip", "legacy"]
CASES = [
    (kind, dtype, options)
    for dtype, options in ((torch.bfloat16, NARROW), (torch.float32, WIDE))
    for kind in KINDS
]
CASES.append(("gguf", torch.float32, BLOCKS))


def check(name, found, ring):
    # The allocator's, which keeps what rounding used between, and pages of libraries touched the first time.
    slack = ring // 2 if name.startswith("int") else 32 * MIB
    assert found["peak"] <= found["weights"] + ring, found
    # Nothing is held twice afterwards: what the weights are, in memory or as pages of the file.
    assert found["anonymous"] + found["file"] <= found["weights"] + slack, found
    if name in ("same", "packed"):
        assert found["anonymous"] < 24 * MIB, found


def in_turn(case):
    """Some of the cases belong to every run, the others to the long one: each takes seconds."""
    often = (case[0], case[1]) in (
        ("single", torch.bfloat16),
        ("legacy", torch.float32),
        ("gguf", torch.float32),
    )
    return pytest.param(*case, marks=pytest.mark.slow if often else pytest.mark.long)


@pytest.mark.parametrize(("kind", "stored", "targets"), [in_turn(case) for case in CASES])
def test_a_hundred_megabytes(folders, kind, stored, targets):
    """At this size what is allowed beside the weights is less, so that a second copy would show."""
    for name, found in zip(
        targets, measure(folders, "hundred", kind, stored, *targets.values()), strict=True
    ):
        assert found["weights"] > 40 * MIB
        check(name, found, 80 * MIB)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "stored", "targets"), CASES)
def test_the_promise(folders, kind, stored, targets):
    """Resident weights plus at most 256 MiB, each load in a process of its own."""
    for name, options in targets.items():
        (found,) = measure(folders, "large", kind, stored, options)
        assert found["weights"] > 120 * MIB
        check(name, found, 256 * MIB)
