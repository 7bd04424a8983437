# SPDX-License-Identifier: Apache-2.0
"""Saving a model that several processes hold parts of: one whole checkpoint, and nobody waits for ever."""

import json

import pytest
import torch
from torch import distributed, multiprocessing

from pretrained import LlamaForCausalLM
from pretrained.errors import ArgumentError, FileError
from pretrained.torch import save_ranks
from support.cases import TINY_LLAMA

pytestmark = pytest.mark.slow


def build(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaForCausalLM.config_class(**{**TINY_LLAMA, **changes}))


def sharded(**changes):
    from torch.distributed import fsdp

    model = build(**changes)
    for layer in model.model.layers:
        fsdp.fully_shard(layer)
    return fsdp.fully_shard(model)


def start(rank, store, count):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, count), rank=rank, world_size=count
    )


def save_all(rank, store, folder, tied):
    start(rank, store, 2)
    model = sharded(tie_word_embeddings=tied)
    # After a step the weights of the root are still whole in memory.
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    gathered = []
    keep = save_ranks._whole
    save_ranks._whole = lambda tensor: gathered.append(1) or keep(tensor)
    model.save_pretrained(f"{folder}/main", is_main_process=rank == 1)
    assert len(gathered) == len(set(model.parameters()))
    save_ranks._whole = keep
    model.save_pretrained(f"{folder}/all", max_shard_size="40KB")
    model.save_pretrained(f"{folder}/pickle", safe_serialization=False)
    distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_one_whole_checkpoint(tmp_path, tied):
    multiprocessing.spawn(save_all, (str(tmp_path / "store"), str(tmp_path), tied), nprocs=2)
    alone = build(tie_word_embeddings=tied)
    alone.save_pretrained(tmp_path / "alone")
    assert (tmp_path / "main" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert len(list((tmp_path / "all").glob("*.safetensors"))) > 1
    for name in ("main", "all", "pickle"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["tie_word_embeddings"] == tied
        found = LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert found.keys() == alone.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in alone.state_dict().items())


def fail(rank, store, folder):
    start(rank, store, 3)
    model = sharded()
    with pytest.raises(ArgumentError, match=r"One process has to write.*found True in 2 of 3"):
        model.save_pretrained(f"{folder}/two", is_main_process=rank > 0)
    with pytest.raises(ArgumentError, match=r"One process has to write.*found True in 0 of 3"):
        model.save_pretrained(f"{folder}/none", is_main_process=False)

    def full(tensors, path):
        raise OSError(28, "No space left on device")

    error = "disk is full|No space left" if rank == 0 else r"Process 0, which writes.*FileError"
    with pytest.raises(FileError, match=error):
        model.save_pretrained(f"{folder}/full", safe_serialization=False, save_function=full)
    distributed.destroy_process_group()


def test_faults_reach_every_process(tmp_path):
    multiprocessing.spawn(fail, (str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    assert not (tmp_path / "two").exists()
    assert not list(tmp_path.glob("full/*.bin"))
