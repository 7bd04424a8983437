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


# -- maps ----------------------------------------------------------------------------------------


def test_one_device_sets_a_map_too(saved):
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = LlamaForCausalLM.from_pretrained(saved("llama"), device_map=device_map)
        assert model.hf_device_map == {"": "cpu"}
        assert not model._forward_hooks
    assert not hasattr(LlamaForCausalLM.from_pretrained(saved("llama")), "hf_device_map")


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_planned_maps_keep_the_budget(saved, device_map):
    model = LlamaForCausalLM.from_pretrained(
        saved("llama"), device_map=device_map, max_memory={"cpu": "150KB"}
    )
    homes = model.hf_device_map
    assert set(homes.values()) == {"cpu", "disk"}
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    assert list(homes) == sorted(homes, key=names.index)
    with torch.no_grad():
        assert model(**inputs_of(model)).logits.isfinite().all()


def test_a_map_for_disk_alone(saved):
    model = LlamaForCausalLM.from_pretrained(saved("llama"), device_map="disk")
    assert model.hf_device_map == {"": "disk"}
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"model": "disk"}}, "lm_head"),
        ({"device_map": {"": "cpu", "modle": "disk"}}, "modle"),
        ({"device_map": {"": "cpu", "lm_head": 7}}, "7"),
        ({"device_map": "auto", "max_memory": {"cpu": 10}}, "hold the largest block"),
        ({"device_map": "auto", "max_memory": {0: "1MB", "cpu": "1MB"}}, "max_memory names a device"),
        ({"device_map": "blanced", "max_memory": {"cpu": 10}}, "Unknown device 'blanced'"),
        ({"device_map": "cpu", "max_memory": {"cpu": 10}}, "more on cpu than its budget"),
        ({"max_memory": {"cpu": "1GB"}}, "no device_map asks for a plan"),
        ({"device_map": {"": "disk"}, "disable_mmap": True}, "used from the map of their file"),
        ({"device_map": {"": "disk"}, "dtype": "bfloat16"}, "need a converted copy there .*offload_folder"),
    ],
)
def test_maps_that_cannot_work_are_refused(saved, arguments, message):
    with pytest.raises((PlacementError, ArgumentError), match=message):
        LlamaForCausalLM.from_pretrained(saved("llama"), **arguments)


# -- what a placed model can do ------------------------------------------------------------------


@pytest.fixture
def disk_llama(saved):
    return LlamaForCausalLM.from_pretrained(saved("llama"), device_map=MIXED["llama"])


@pytest.fixture
def resident_llama(saved):
    return LlamaForCausalLM.from_pretrained(saved("llama"))


def test_weights_and_state_dict_have_their_values(disk_llama, resident_llama):
    expected = resident_llama.state_dict()
    found = disk_llama.state_dict()
    assert found.keys() == expected.keys()
    logits_of(disk_llama)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(disk_llama.lm_head.weight + 1, resident_llama.lm_head.weight + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_writes_what_the_resident_model_writes(saved, tmp_path, dtype):
    cls = LlamaForCausalLM
    model = cls.from_pretrained(
        saved("llama"), dtype=dtype, device_map={"": "disk"}, offload_folder=tmp_path / "off"
    )
    model.save_pretrained(tmp_path / "a")
    cls.from_pretrained(saved("llama"), dtype=dtype).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_saving_over_the_files_it_runs_from(saved, tmp_path):
    LlamaForCausalLM.from_pretrained(saved("llama")).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate(saved, family):
    cls = FAMILIES[family][0]
    ids = torch.arange(3, 11)[None]
    expected = cls.from_pretrained(saved(family)).generate(ids, max_new_tokens=6, do_sample=False)
    model = cls.from_pretrained(saved(family), device_map={"": "disk"})
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_cast_copies_are_reused(saved, tmp_path):
    arguments = {"device_map": {"": "disk"}, "dtype": "bfloat16", "offload_folder": tmp_path}
    expected = logits_of(LlamaForCausalLM.from_pretrained(saved("llama"), dtype="bfloat16"))
    for _ in range(2):
        model = LlamaForCausalLM.from_pretrained(saved("llama"), **arguments)
        assert torch.equal(logits_of(model), expected)
    (written,) = tmp_path.glob("*.safetensors")
    assert written.stat().st_size > 100_000
    with pytest.raises(PlacementError, match="another model"):
        LlamaForCausalLM.from_pretrained(saved("llama", tied=True), **arguments)


def test_a_state_dict_goes_to_disk_through_the_folder(saved, tmp_path):
    weights = load_file(saved("llama") / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(
        None, config=config_of("llama"), state_dict=weights, device_map="disk", offload_folder=tmp_path
    )
    assert torch.equal(logits_of(model), logits_of(LlamaForCausalLM.from_pretrained(saved("llama"))))


def test_new_weights_go_to_disk_through_the_folder(saved, tmp_path):
    def load(**arguments):
        torch.manual_seed(3)
        return GPT2LMHeadModel.from_pretrained(saved("gpt2"), n_layer=3, allow_missing=True, **arguments)

    model = load(device_map="disk", offload_folder=tmp_path)
    new = [key for key, _ in model.named_parameters() if key.startswith("transformer.h.2.")]
    assert len(new) == 12
    assert all(model._dispatch.store.span_of(model.get_parameter(key).data) for key in new)
    assert torch.equal(logits_of(model), logits_of(load()))
    del model
    gc.collect()
    assert not list(tmp_path.glob("*.safetensors"))


def test_new_weights_on_disk_without_a_folder_are_refused(saved):
    arguments = {"n_layer": 3, "allow_missing": True}
    message = r"12 weights placed on disk are in no file.*Pass offload_folder=.*map 'transformer.h.2.ln_1' to"
    with pytest.raises(PlacementError, match=message):
        GPT2LMHeadModel.from_pretrained(saved("gpt2"), device_map="disk", **arguments)
    device_map = {"": "disk", "transformer.h.2": "cpu"}
    model = GPT2LMHeadModel.from_pretrained(saved("gpt2"), device_map=device_map, **arguments)
    assert logits_of(model).isfinite().all()


# -- leaving -------------------------------------------------------------------------------------


def hooks_of(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    tables += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [len(getattr(module, table)) for module in model.modules() for table in tables]


def test_hooks_are_undone_exactly(disk_llama, resident_llama):
    expected = logits_of(disk_llama)
    assert sum(hooks_of(disk_llama))
    remove_hooks(disk_llama)
    assert hooks_of(disk_llama) == hooks_of(resident_llama)
    assert "_dispatch" not in disk_llama.__dict__
    assert torch.equal(logits_of(disk_llama), expected)
    remove_hooks(disk_llama)


def test_moving_reads_everything_in(disk_llama, resident_llama):
    disk_llama.to("cpu")
    assert not sum(hooks_of(disk_llama))
    assert disk_llama.hf_device_map == {"": "cpu"}
    assert torch.equal(logits_of(disk_llama), logits_of(resident_llama))


def test_casting_reads_everything_in(disk_llama, resident_llama):
    disk_llama.half()
    resident_llama.half()
    assert disk_llama.dtype == torch.float16
    assert torch.equal(logits_of(disk_llama), logits_of(resident_llama))


def test_casting_what_does_not_fit_is_refused_before_anything_changes(disk_llama, monkeypatch):
    monkeypatch.setattr("pretrained.torch.dispatch.available_host_memory", lambda: 1000)
    expected, hooks = logits_of(disk_llama), hooks_of(disk_llama)
    with pytest.raises(PlacementError, match=r"do not fit into memory.*found 1.0 kB.*Load the model"):
        disk_llama.double()
    assert hooks_of(disk_llama) == hooks and disk_llama.dtype == torch.float32
    assert torch.equal(logits_of(disk_llama), expected)
    disk_llama.to("cpu")


def test_training_a_weight_on_disk_is_refused(disk_llama):
    disk_llama.train()
    with pytest.raises(ArgumentError, match=r"placed on disk cannot be trained .*requires_grad_\(False\)"):
        disk_llama(**inputs_of(disk_llama))
    logits_of(disk_llama)


def test_what_is_in_memory_can_be_trained(disk_llama):
    disk_llama.train()
    disk_llama.requires_grad_(False)
    layer = disk_llama.model.layers[1].requires_grad_(True)
    before = layer.mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    inputs = inputs_of(disk_llama)
    disk_llama(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    logits_of(disk_llama)
    assert not torch.equal(layer.mlp.up_proj.weight, before)


def test_an_edit_of_a_weight_on_disk_is_kept(disk_llama):
    with torch.no_grad():
        disk_llama.lm_head.weight.zero_()
    assert not logits_of(disk_llama).any()
    assert not logits_of(disk_llama).any()


@pytest.mark.parametrize("copy_it", [copy.deepcopy, pickle.dumps])
def test_copies_as_an_object_are_refused(disk_llama, copy_it):
    with pytest.raises(ArgumentError, match=r"placed over several homes cannot be .*model\.to\('cpu'\)"):
        copy_it(disk_llama)


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "touch"])
def test_a_file_that_changes_under_the_model_is_named(saved, tmp_path, change):
    LlamaForCausalLM.from_pretrained(saved("llama")).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    logits_of(model)
    file = tmp_path / "model.safetensors"
    if change == "cut":
        os.truncate(file, 4096)
    else:
        os.utime(file, (1, 1))
    for act in (logits_of, lambda model: model.save_pretrained(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match=r"under a model that runs from it .*model\.safetensors"):
            act(model)


def test_an_error_in_the_forward_leaves_the_model_whole(disk_llama):
    expected = logits_of(disk_llama)

    def fail(module, args):
        raise ZeroDivisionError

    hook = disk_llama.model.layers[0].mlp.up_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        logits_of(disk_llama)
    hook.remove()
    assert torch.equal(logits_of(disk_llama), expected)


# -- resources -----------------------------------------------------------------------------------


def census():
    gc.collect()
    maps = Path("/proc/self/maps").read_text().count("model.safetensors")
    return len(os.listdir("/proc/self/fd")), maps, threading.active_count()


def test_nothing_outlives_the_model(saved):
    folder = saved("llama")
    logits_of(LlamaForCausalLM.from_pretrained(folder))
    before = census()
    model = LlamaForCausalLM.from_pretrained(folder, device_map="disk")
    logits_of(model)
    assert census() > before
    del model
    assert census() == before


def test_two_threads_at_once(saved):
    model = LlamaForCausalLM.from_pretrained(saved("llama"), device_map="disk")
    expected, found = logits_of(model), []

    def run():
        found.extend(torch.equal(logits_of(model), expected) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40


CHILD = """
import re, sys, torch
from pathlib import Path
from pretrained.torch.models.llama import LlamaForCausalLM

def rss():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Rss:\\s+(\\d+)", text, re.MULTILINE)[1]) * 1024

torch.set_num_threads(1)
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="auto", **eval(sys.argv[2]))
ids, peak = torch.arange(8)[None], 0
before = rss()

def look(module, args, output):
    global peak
    peak = max(peak, rss())

for module in model.modules():
    if not list(module.children()):
        # Registered first, so that it sees a layer's pages before they are let go.
        module.register_forward_hook(look, prepend=True)
with torch.no_grad():
    for _ in range(2):
        model(ids)
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3])
    peak = max(peak, rss())
print(peak - before)
"""


def growth(folder, arguments, *more):
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), repr(arguments), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_memory_stays_inside_the_budget(tmp_path):
    config = LlamaForCausalLM.config_class(
        vocab_size=1000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=12,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    weights = {name: torch.full(value.shape, 0.01) for name, value in empty.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert growth(tmp_path, {}) > 260e6
    limited = {"device_map": "auto", "max_memory": {"cpu": "100MB"}}
    assert growth(tmp_path, limited) < 100e6 + (64 << 20)
    assert growth(tmp_path, {"device_map": "disk"}, tmp_path / "saved") < 64 << 20


# -- hooks, with homes that this machine lacks ---------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x, extra=None):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return {"out": x, "extra": extra}


def test_weights_come_for_the_forward_and_go_after():
    # "meta" stands for an accelerator: what arrives there shows in the device, and computes nothing.
    model = Two().eval()
    seen = []
    homes = Homes({"": "cpu"}, torch.device("meta"))
    attach(model, homes, DiskWeights())
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(module.weight.device.type))
    weight = model.layers[0].weight
    output = model(torch.zeros(2, 4, device="meta"))["out"]
    assert output.is_meta
    assert seen == ["cpu"] and model.layers[0].weight is weight
    hook = model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(module.weight.device.type), prepend=True
    )
    model(torch.zeros(2, 4, device="meta"))
    hook.remove()
    assert seen[1] == "meta"
    remove_hooks(model)
    assert torch.equal(model(torch.ones(1, 4))["out"], model(torch.ones(1, 4))["out"])


def test_inputs_move_at_each_border_and_skipped_keys_do_not():
    model = Two()
    model.layers[1].to("meta")
    homes = Homes({"first": "cpu", "layers.0": "cpu", "layers.1": "meta"}, torch.device("cpu"))
    attach(model, homes, DiskWeights(), skip_keys="extra")
    devices = []
    model.layers[1].register_forward_hook(lambda module, args, output: devices.append(args[0].device.type))
    with pytest.raises(NotImplementedError):
        # The way back out of "meta" is the one move that cannot be played through here.
        model(torch.zeros(1, 4))
    assert devices == ["meta"]


def test_moving_keeps_structure():
    class Cache:
        pass

    cache, tensor = Cache(), torch.zeros(2)
    value = ([tensor], {"a": (tensor, 3)}, cache)
    found = moved(value, torch.device("meta"))
    assert found[0][0].is_meta and found[1]["a"][0].is_meta and found[1]["a"][1] == 3
    assert found[2] is cache
    assert moved(tensor, torch.device("cpu")) is tensor
