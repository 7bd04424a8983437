# SPDX-License-Identifier: Apache-2.0
"""Processes that generate in step: each runs as many forwards as the one that runs most."""

import pytest
import torch
from torch import distributed, multiprocessing

from pretrained.errors import GenerationError
from support.decoders import build, prompts
from support.toy import Toy, fibonacci

PROMPT = torch.tensor([[1, 1]])


def generate_on(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    toy = Toy()
    # The first is finished after 3 tokens, the second after 7.
    found = toy.generate(PROMPT, synced_gpus=True, eos_token_id=(5, 2, 34 % 32)[rank], max_new_tokens=7)
    assert found.tolist() == [fibonacci(1, 1, 3 if rank == 0 else 1)]
    assert len(toy.calls) == 3
    toy.calls.clear()
    toy.generate(PROMPT, synced_gpus=True, max_new_tokens=2 + 3 * rank)
    assert len(toy.calls) == 5
    last = toy.calls[-1]
    assert last["input_ids"].shape == (1, 1) and (last["past_key_values"] is None) == (rank == 0)
    # One that fails lets the other end.
    toy.calls.clear()
    toy.nan_at = (1, 0) if rank == 0 else None
    try:
        toy.generate(PROMPT, synced_gpus=True, max_new_tokens=4)
        assert rank == 1
    except GenerationError as error:
        assert rank == 0 and "not numbers" in str(error)
    assert len(toy.calls) == 4
    toy.nan_at = None
    toy.calls.clear()
    # Not asked for, and not spread: each for itself.
    toy.generate(PROMPT, max_new_tokens=2 + 3 * rank)
    assert len(toy.calls) == 2 + 3 * rank
    with pytest.raises(GenerationError, match="Drafts take another number of forwards"):
        toy.generate(PROMPT, synced_gpus=True, prompt_lookup_num_tokens=2)
    model = build("t5")
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(0))
    model.generate(
        prompts(1)[0], synced_gpus=True, max_new_tokens=2 + rank, eos_token_id=None, decoder_start_token_id=0
    )
    assert len(runs) == 3
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_wait_for_the_last(tmp_path):
    multiprocessing.spawn(generate_on, (str(tmp_path / "store"),), nprocs=2)


def test_alone():
    toy = Toy()
    for value in (None, False):
        assert toy.generate(PROMPT, synced_gpus=value, max_new_tokens=1).tolist() == [[1, 1, 2]]
    toy.calls.clear()
    with pytest.raises(GenerationError, match=r"this one is alone \(synced_gpus\)\. Call torch\.distributed"):
        toy.generate(PROMPT, synced_gpus=True)
    with pytest.raises(GenerationError, match="expected True, False or None, found yes"):
        toy.generate(PROMPT, synced_gpus="yes")
    assert toy.calls == []
