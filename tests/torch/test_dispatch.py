# SPDX-License-Identifier: Apache-2.0
"""Models over several homes: same outputs, exact undo, bounded memory, clear refusals."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrained.errors import ArgumentError, CheckpointError, PlacementError
from pretrained.torch.dispatch import Homes, attach, moved, remove_hooks
from pretrained.torch.models.bert import BertForMaskedLM
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from pretrained.torch.offload import DiskWeights
from support.cases import TINY_LLAMA
from support.cases_bert import TINY_BERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5

# Wider than the other tiny configs, so that weights span whole pages that can be let go of.
FAMILIES = {
    "llama": (LlamaForCausalLM, {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 96}),
    "t5": (T5ForConditionalGeneration, {**TINY_T5, "d_model": 64, "d_ff": 96}),
    "bert": (BertForMaskedLM, {**TINY_BERT, "hidden_size": 64, "intermediate_size": 96}),
    "gpt2": (GPT2LMHeadModel, {**TINY_GPT2, "n_embd": 64}),
}
MIXED = {
    "llama": {"model.embed_tokens": "disk", "model.layers.0": "disk", "model": "cpu", "lm_head": "disk"},
    "t5": {"": "cpu", "decoder": "disk"},
    "bert": {"bert.embeddings": "disk", "bert": "cpu", "cls": "disk"},
    "gpt2": {"": "disk", "transformer.h.0": "cpu"},
}


def config_of(family, **changes):
    cls, values = FAMILIES[family]
    return cls.config_class(**{**values, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that returns a folder with a saved model, each made once."""
    folders = {}

    def make(family, dtype="float32", tied=False):
        name = f"{family}-{dtype}-{tied}"
        if name not in folders:
            torch.manual_seed(7)
            cls = FAMILIES[family][0]
            model = cls.from_config(config_of(family, tie_word_embeddings=tied), dtype=dtype)
            folders[name] = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(folders[name])
        return folders[name]

    return make


def inputs_of(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def logits_of(model):
    with torch.no_grad():
        return model(**inputs_of(model)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("homes", ["cpu", "disk", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_the_resident_models_bit_for_bit(saved, tmp_path, family, homes, dtype, tied):
    folder = saved(family, dtype, tied)
    cls = FAMILIES[family][0]
    expected = logits_of(cls.from_pretrained(folder, dtype="auto"))
    device_map = MIXED[family] if homes == "mixed" else {"": homes}
    model = cls.from_pretrained(folder, dtype="auto", device_map=device_map, offload_folder=tmp_path)
    assert model.dtype == getattr(torch, dtype)
    for _ in range(2):
        assert torch.equal(logits_of(model), expected)
    assert ("disk" in model.hf_device_map.values()) == (homes != "cpu")
