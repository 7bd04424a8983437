# SPDX-License-Identifier: Apache-2.0
"""Resizing weights that several processes hold parts of: every one gets the rows that one alone would get."""

import pytest
import torch
from torch import distributed, multiprocessing, nn

from pretrained.testing.battery import Case
from pretrained.torch.models.llama import LlamaForCausalLM
from support.cases import TINY_LLAMA


def build():
    return Case(LlamaForCausalLM, TINY_LLAMA).build()


def resize_on(rank, store):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for size, near_mean in ((60, True), (121, True), (121, False)):
        model, alone = build(), build()
        for layer in (model.lm_head, model.model.embed_tokens):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        # Each would draw other rows: those of the first count.
        torch.manual_seed(rank)
        model.resize_token_embeddings(size, mean_resizing=near_mean)
        torch.manual_seed(0)
        alone.resize_token_embeddings(size, mean_resizing=near_mean)
        assert len(model.lm_head.weight.to_local()) == (size + 1 - rank) // 2
        assert torch.equal(model.lm_head.weight.full_tensor(), alone.lm_head.weight)
        whole = model.model.embed_tokens.weight.full_tensor()
        assert torch.equal(whole, alone.model.embed_tokens.weight)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree(tmp_path):
    multiprocessing.spawn(resize_on, (str(tmp_path / "store"),), nprocs=2)
