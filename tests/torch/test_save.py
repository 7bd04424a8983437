# SPDX-License-Identifier: Apache-2.0
"""What a save writes, in which order, and that it reads back: here and in transformers."""

import json
import logging
import os

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pretrained.arch.bert import BertConfig
from pretrained.arch.t5 import T5Config
from pretrained.errors import ArgumentError, ConfigError, FileError, NotYetError, UnknownArgumentError
from pretrained.torch.models.bert import BertForMaskedLM
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.checkpoints import Folder, tiny_llama

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def build(name):
    torch.manual_seed(5)
    if name == "bert":
        return BertForMaskedLM(BertConfig(**SIZES)).eval()
    if name == "t5":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
        ).eval()
    return tiny_llama(tie_word_embeddings=name == "tied")


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


CONFIGS = ["config.json", "generation_config.json"]


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "untied", "bert", "t5"])
@pytest.mark.parametrize("size", ["5GB", 3000])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_saved_reads_back(tmp_path, name, size, safe, variant):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=safe, variant=variant)
    loaded, info = type(model).from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not any(info.values())
    assert same_state(loaded, model)
    assert not any(file.startswith(".tmp") for file in os.listdir(tmp_path))
    sharded = any("index" in file for file in os.listdir(tmp_path))
    assert sharded == (size == 3000)
    if safe:
        for file in tmp_path.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["tied", "untied", "bert", "t5"])
@pytest.mark.parametrize(("size", "safe"), [("5GB", True), (3000, True), ("5GB", False), (3000, False)])
def test_transformers_reads_what_is_saved(tmp_path, name, size, safe):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size=size, safe_serialization=safe)
    cls = getattr(transformers, type(model).__name__)
    theirs, info = cls.from_pretrained(tmp_path, output_loading_info=True, use_safetensors=safe)
    assert not any(info.values())
    state = theirs.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", ["tied", "untied", "bert", "t5"])
@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_what_transformers_saves_reads_here(tmp_path, name, size):
    ours = build(name)
    cls = getattr(transformers, type(ours).__name__)
    theirs = cls(cls.config_class.from_dict(ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    loaded, info = type(ours).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same_state(loaded, ours)


def test_tied_weights_are_written_once(tmp_path):
    build("tied").save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    build("t5").save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert "shared.weight" in keys
    assert not {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} & keys


def test_a_head_that_came_apart_is_written_and_said(tmp_path, caplog):
    model = build("tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight is no longer tied to model.embed_tokens.weight" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path), model)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


def test_the_config_says_what_was_saved(tmp_path):
    model = build("untied").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert saved["dtype"] == "bfloat16"
    assert model.config.dtype == "bfloat16"


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_the_spelling_of_dtype_is_kept(tmp_path, spelling):
    folder = Folder(tmp_path / "m").config("dtype", **{spelling: "float32"})
    LlamaForCausalLM.from_pretrained(folder.path, dtype="float16").save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved[spelling] == "float16"
    assert not {"dtype", "torch_dtype"} - {spelling} & saved.keys()


def test_weights_given_by_hand(tmp_path):
    model = build("untied")
    state = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight, state["lm_head.weight"])


def test_views_are_written_as_what_they_show(tmp_path):
    model = build("untied")
    big = torch.randn(64, 32)
    model.lm_head.weight = nn.Parameter(big[::2, ::2])
    model.model.embed_tokens.weight = nn.Parameter(big[:16].view(32, 16))
    for safe in (True, False):
        model.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
        assert same_state(LlamaForCausalLM.from_pretrained(tmp_path / str(safe)), model)
    raw = torch.load(tmp_path / "False" / "pytorch_model.bin", weights_only=True)
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in raw.values())


# -- pickles ---------------------------------------------------------------------------------------


def test_the_names_of_pickles(tmp_path):
    model = build("untied")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert names(tmp_path) == [*CONFIGS, "pytorch_model.bin"]
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=8000)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert names(tmp_path) == sorted([*CONFIGS, "pytorch_model.bin.index.json", *shards])
    assert shards[0] == f"pytorch_model-00001-of-{len(shards):05d}.bin"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert set(torch.load(tmp_path / shards[0], weights_only=True)) == {
        key for key, shard in index["weight_map"].items() if shard == shards[0]
    }
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert names(tmp_path) == [*CONFIGS, "pytorch_model.bin"]
    model.save_pretrained(tmp_path, safe_serialization=False, variant="b", max_shard_size=8000)
    assert (tmp_path / "pytorch_model.bin.index.b.json").exists()


def test_save_function(tmp_path, caplog):
    calls = []

    def save_function(tensors, path):
        calls.append((sorted(tensors), path))
        torch.save(tensors, path, _use_new_zipfile_serialization=False)

    model = build("untied")
    model.save_pretrained(
        tmp_path, safe_serialization=False, save_function=save_function, max_shard_size=8000
    )
    assert len(calls) > 1
    assert {key for keys, _ in calls for key in keys} == model.state_dict().keys()
    assert all(isinstance(path, str) and path.startswith(str(tmp_path)) for _, path in calls)
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path / "safe", save_function=torch.save)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "safe", save_function=save_function)
    assert "save_function writes pickles; safetensors files are written without it" in caplog.text


def test_a_save_function_that_fails_leaves_the_old_checkpoint(tmp_path):
    model = build("untied")
    model.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=8000)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    done = []

    def broken(tensors, path):
        if len(done) == 2:
            raise RuntimeError("PytorchStreamWriter failed writing file")
        done.append(torch.save(tensors, path))

    changed = tiny_llama(seed=1)
    with pytest.raises(FileError, match=r"Writing failed.*intact.*PytorchStreamWriter"):
        changed.save_pretrained(tmp_path, safe_serialization=False, save_function=broken, max_shard_size=8000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(ArgumentError, match="save_function did not write the file that it was given"):
        changed.save_pretrained(tmp_path, safe_serialization=False, save_function=lambda tensors, path: None)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_pickle_that_no_load_would_find(tmp_path):
    model = build("untied")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"holds model\.safetensors, which is loaded.*remove that file"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert names(tmp_path) == [*CONFIGS, "model.safetensors"]
    model.save_pretrained(tmp_path, safe_serialization=False, variant="b")
    assert (tmp_path / "pytorch_model.b.bin").exists()


# -- what can go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"foo": 1}, UnknownArgumentError, "save_pretrained does not know the argument 'foo'"),
        ({"max_shard": 1}, UnknownArgumentError, r"Did you mean 'max_shard_size'"),
        ({"repo_id": "me/x"}, UnknownArgumentError, r"belongs to push_to_hub=True"),
        ({"distributed_checkpoint": True}, NotYetError, "release for several machines"),
        ({"max_shard_size": "many"}, ArgumentError, r"not a size.*found 'many'"),
        ({"max_shard_size": 0}, ArgumentError, "not a size"),
        ({"variant": "../x"}, ArgumentError, "The variant cannot be part of a file name"),
        ({"variant": 5}, ArgumentError, "The variant cannot be part of a file name"),
        ({"save_function": 5}, ArgumentError, "save_function is not a function"),
        ({"state_dict": 5}, ArgumentError, "state_dict is not a dictionary"),
        ({"state_dict": {"w": 1}}, ArgumentError, r"state_dict\['w'\]"),
        ({"state_dict": {1: torch.ones(1)}}, ArgumentError, r"state_dict\[1\]"),
        ({"state_dict": {"w": torch.ones(1, dtype=torch.complex128)}}, ArgumentError, "cannot be stored"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        build("untied").save_pretrained(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_arguments_without_effect(tmp_path):
    build("untied").save_pretrained(tmp_path, save_peft_format=True, distributed_checkpoint=False)
    build("untied").save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()


def test_folders_that_are_none(tmp_path):
    model = build("untied")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match=r"saved into a folder .*found a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(FileError, match=r"Writing failed.*A part of the path is a file"):
        model.save_pretrained(tmp_path / "file" / "below")
    for nonsense in ("", None, 5):
        with pytest.raises(ArgumentError, match=r"saved into a folder \(save_directory\)"):
            model.save_pretrained(nonsense)


def test_a_model_without_memory(tmp_path):
    with torch.device("meta"):
        model = LlamaModel.from_config(build("untied").config)
    with pytest.raises(ArgumentError, match=r"20 weights have no values to save.*state_dict="):
        model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", state_dict=build("untied").model.state_dict())
    assert same_state(LlamaModel.from_pretrained(tmp_path / "out"), build("untied").model)


def test_faults_in_configs_cost_no_weights(tmp_path, caplog):
    """Weights come first; a config that contradicts itself is written, one that is no JSON is named."""
    model = build("untied")
    model.config.num_key_value_heads = 3
    model.save_pretrained(tmp_path / "contradicts")
    assert names(tmp_path / "contradicts") == [*CONFIGS, "model.safetensors"]
    model = build("untied")
    model.config.notes = {1, 2}
    with pytest.raises(ConfigError, match=r"LlamaConfig\.notes cannot be written as JSON .*set"):
        model.save_pretrained(tmp_path / "set")
    assert load_file(tmp_path / "set" / "model.safetensors").keys() == model.state_dict().keys()
