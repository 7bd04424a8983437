# SPDX-License-Identifier: Apache-2.0
"""Who decides which weights are one tensor where the config and the files disagree."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrained.core.files import open_checkpoint
from pretrained.testing.battery import Case
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from pretrained.torch.ties import same_bytes
from support.cases import TINY_LLAMA

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    Case(LlamaForCausalLM, TINY_LLAMA).build().save_pretrained(tmp_path)
    return tmp_path


def say_tied(folder, tied):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))


def test_another_head_in_the_file_is_not_tied(folder):
    say_tied(folder, True)
    stored = load_file(folder / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, stored[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, stored[EMBEDDING])
    assert model.config.tie_word_embeddings is False


def test_a_copy_in_the_file_is_tied(folder):
    say_tied(folder, True)
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_equal_weights_that_the_config_keeps_apart_stay_apart(folder):
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {HEAD: stored[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_an_absent_head_follows_the_config(folder):
    stored = load_file(folder / "model.safetensors")
    del stored[HEAD]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    _, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == [HEAD]
    say_tied(folder, True)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_headless_model_has_nothing_to_settle(folder):
    say_tied(folder, True)
    assert LlamaModel.from_pretrained(folder).config.tie_word_embeddings is True


def test_same_bytes(tmp_path):
    big = torch.arange(600_000, dtype=torch.float32)
    late = big.clone()
    late[-1] = -1
    save_file(
        {"a": big, "b": big.clone(), "c": late, "d": big.reshape(2, -1).clone()}, tmp_path / "x.safetensors"
    )
    tensors = open_checkpoint(tmp_path / "x.safetensors").tensors
    assert same_bytes(tensors["a"], tensors["a"])
    assert same_bytes(tensors["a"], tensors["b"])
    assert not same_bytes(tensors["a"], tensors["c"])
    assert not same_bytes(tensors["a"], tensors["d"])
    assert not same_bytes(tensors["a"], replace(tensors["b"], dtype="int32"))
