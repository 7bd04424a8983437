# SPDX-License-Identifier: Apache-2.0
"""Which tensors a save writes and under which names: wrappers, shards, shared memory, odd views."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import device_mesh, fsdp
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrained.errors import ArgumentError
from pretrained.torch.models.llama import LlamaForCausalLM
from support.checkpoints import Folder, tiny_llama


def saved(model, folder, **options):
    """Save, check that it loads with nothing missing or left over, and return the file's keys."""
    model.save_pretrained(folder, **options)
    return set(load_file(folder / "model.safetensors"))


def loads_as(folder, state, cls=LlamaForCausalLM):
    loaded, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    own = loaded.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in state)
    return loaded


# -- wrappers --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_models(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.compile(model).save_pretrained(tmp_path / "whole")
    loads_as(tmp_path / "whole", state)
    model.save_pretrained(tmp_path / "given", state_dict=torch.compile(model).state_dict())
    loads_as(tmp_path / "given", state)
    model.model = torch.compile(model.model)
    assert not any("_orig_mod" in key or key == "lm_head.weight" for key in saved(model, tmp_path / "part"))
    loads_as(tmp_path / "part", state)
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_names_that_data_parallel_gives(tmp_path):
    model = tiny_llama()
    given = nn.DataParallel(model).state_dict()
    assert all(key.startswith("module.") for key in given)
    model.save_pretrained(tmp_path, state_dict=given)
    loads_as(tmp_path, model.state_dict())


def test_names_that_collide(tmp_path):
    one = torch.ones(1)
    with pytest.raises(ArgumentError, match=r"one name once.*found w"):
        tiny_llama().save_pretrained(tmp_path / "x", state_dict={"w": one, "_orig_mod.w": one})
    assert not (tmp_path / "x").exists()


@pytest.fixture
def processes(request):
    """A group of processes of which only this one exists."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield device_mesh.init_device_mesh("cpu", (request.param,))
    torch.distributed.destroy_process_group()


def sharded(model, mesh):
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("processes", [1], indirect=True)
@pytest.mark.parametrize("tied", [True, False])
def test_models_sharded_over_one_process(tmp_path, processes, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    keys = saved(sharded(model, processes), tmp_path)
    assert ("lm_head.weight" in keys) != tied
    loads_as(tmp_path, state)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] == tied


@pytest.mark.parametrize("processes", [2], indirect=True)
def test_parts_of_weights_are_no_state_dict(tmp_path, processes):
    model = sharded(tiny_llama(), processes)
    with pytest.raises(ArgumentError, match=r"sharded over several.*found a DTensor over 2.*every process"):
        model.save_pretrained(tmp_path / "x", state_dict=model.state_dict())
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path, state_dict=tiny_llama().state_dict())
    loads_as(tmp_path, tiny_llama().state_dict())


def test_distributed_data_parallel(tmp_path):
    """A process of its own: gloo keeps threads."""
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import torch
import torch.distributed as dist
from support.checkpoints import tiny_llama
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
wrapped = torch.nn.parallel.DistributedDataParallel(tiny_llama())
wrapped.module.save_pretrained(sys.argv[1] + "/a")
wrapped.module.save_pretrained(sys.argv[1] + "/b", state_dict=wrapped.state_dict())
wrapped.module.save_pretrained(sys.argv[1] + "/c", is_main_process=False)
dist.destroy_process_group()
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True)
    loads_as(tmp_path / "a", tiny_llama().state_dict())
    loads_as(tmp_path / "b", tiny_llama().state_dict())
    assert not (tmp_path / "c").exists()


# -- shared memory ---------------------------------------------------------------------------------


class Sharing(LlamaForCausalLM):
    """Shares a module and a weight, and says nothing of it in `ties`."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Linear(16, 16)
        self.again = self.extra
        self.third = nn.Linear(16, 16)
        self.third.weight = self.extra.weight
        self.post_init()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", 3000])
def test_what_a_class_shares_is_written_once_and_shared_again(tmp_path, tied, size):
    model = tiny_llama(Sharing, tie_word_embeddings=tied)
    for _ in range(2):
        model.save_pretrained(tmp_path, max_shard_size=size)
        names = (
            json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
            if (size == 3000)
            else load_file(tmp_path / "model.safetensors")
        )
        own = {key for key in names if not key.startswith(("model.", "lm_head"))}
        assert own == {"extra.weight", "extra.bias", "third.bias"}
        model = loads_as(tmp_path, model.state_dict(), Sharing)
        assert model.third.weight is model.extra.weight
        assert model.again is model.extra
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_came_apart_is_written_twice(tmp_path):
    model = tiny_llama(Sharing)
    model.third.weight = nn.Parameter(model.extra.weight.detach() + 1)
    assert {"extra.weight", "third.weight"} <= saved(model, tmp_path)


def test_a_module_that_was_added_and_shares(tmp_path):
    """Its class does not know it, so nothing is lost by writing the weight once, under the class's name."""
    model = tiny_llama()
    model.added = nn.Linear(16, 32, bias=False)
    model.added.weight = model.lm_head.weight
    assert "added.weight" not in saved(model, tmp_path)
    loads_as(tmp_path, tiny_llama().state_dict())


def test_two_weights_of_the_class_that_a_user_ties(tmp_path):
    """Every reader expects both, so both are written."""
    model = tiny_llama()
    first, second = (layer.mlp.gate_proj for layer in model.model.layers)
    second.weight = first.weight
    saved(model, tmp_path)
    loads_as(tmp_path, model.state_dict())


# -- odd tensors -----------------------------------------------------------------------------------

BASE = torch.arange(240, dtype=torch.float32)
ODD = {
    "sliced": BASE[3:40:2],
    "transposed": BASE.view(12, 20).T,
    "expanded": torch.arange(3.0)[:, None].expand(3, 4),
    "broadcast scalar": torch.tensor(2.0).expand(5),
    "flipped": BASE.view(12, 20).flip(0)[:, ::3],
    "window": BASE.unfold(0, 4, 2),
    "zero-size": torch.empty(0, 3),
    "0-dim": torch.tensor(1.5),
    "0-dim of a row": BASE[7],
    "half": BASE.bfloat16()[1:4],
    "float8": BASE[1:4].to(torch.float8_e4m3fn),
    "bool": BASE[:4] > 1,
    "int64": torch.arange(5)[1:],
    "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "trained": nn.Parameter(BASE[5:9]),
}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_are_written_as_what_they_show(tmp_path, name, safe):
    tensor = ODD[name]
    tiny_llama().save_pretrained(tmp_path, state_dict={"w": tensor, "v": tensor}, safe_serialization=safe)
    if safe:
        found = load_file(tmp_path / "model.safetensors")
    else:
        found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in found.values())
    for got in found.values():
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert got.tolist() == tensor.tolist()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), r"not a plain tensor \(w\).*dense tensor, found torch\.sparse_coo"),
        (torch.empty(2, device="meta"), "1 weights have no values to save, such as 'w'"),
    ],
)
def test_tensors_that_no_file_holds(tmp_path, tensor, message):
    with pytest.raises(ArgumentError, match=message):
        tiny_llama().save_pretrained(tmp_path / "x", state_dict={"w": tensor})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 0, -1, True, "5 Gigs", "", None, []])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ArgumentError, match=r'not a size \(max_shard_size\): expected bytes .* "5GB".*found'):
        tiny_llama().save_pretrained(tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


# -- names -----------------------------------------------------------------------------------------


def test_what_a_key_mapping_renamed_loads_without_it(tmp_path):
    folder = Folder(tmp_path / "m").rename(lambda key: key.replace("model.", "backbone."))
    model = LlamaForCausalLM.from_pretrained(folder.path, key_mapping={"^backbone": "model"})
    saved(model, tmp_path / "again")
    loads_as(tmp_path / "again", tiny_llama().state_dict())
