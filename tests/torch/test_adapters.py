# SPDX-License-Identifier: Apache-2.0
"""Adapters: made, trained, switched, written and read, here and by peft and transformers."""

import copy
import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrained import (
    ArgumentError,
    AutoModelForCausalLM,
    BertForSequenceClassification,
    ConfigError,
    DistilBertForSequenceClassification,
    FileError,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MissingDependencyError,
    NotYetError,
    T5ForConditionalGeneration,
    UnknownArgumentError,
    WeightsError,
)
from pretrained.torch.nn import Conv1D
from support.cases import CASES, TINY_LLAMA

peft = pytest.importorskip("peft")

pytestmark = [
    # peft and what it imports warn of their own surroundings; of a layout that it then mends itself; and of
    # configs that it has found no name of a base model in.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]
IDS = torch.tensor([[5, 6, 7, 8]])
# peft's own table does not know these.
TARGETS = {
    "smollm3": ["q_proj", "v_proj"],
    "umt5": ["q", "v"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
}


def build(cls=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    return cls(cls.config_class(**({**TINY_LLAMA, **config} if cls is LlamaForCausalLM else config))).eval()


def lora(*targets, **options):
    return peft.LoraConfig(r=2, target_modules=list(targets) or None, **options)


def shake(model):
    """Give an adapter values that change the result."""
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return model


def adapted(model=None, name="default", **options):
    model = model or build()
    model.add_adapter(lora("q_proj", "v_proj", **options), name)
    return shake(model)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def one_case_of_each():
    found = {}
    for case in CASES:
        found.setdefault(case.model_class.__name__, case)
    return list(found.values())


@pytest.mark.parametrize("case", one_case_of_each(), ids=str)
def test_plain_peft_wraps_merges_and_unloads_every_class(case):
    model = build(case.model_class, **case.config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = shake(peft.get_peft_model(model, lora(*TARGETS.get(model.config.model_type, ()))))
    trained = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    merged = wrapped.merge_and_unload()
    after = merged.state_dict()
    assert merged is model and after.keys() == before.keys()
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert not merged.has_adapters()


KINDS = [
    (LlamaForCausalLM, {}, ["q_proj", "v_proj"]),
    (
        GPT2LMHeadModel,
        {"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 99, "n_positions": 16},
        ["c_attn"],
    ),
    (
        T5ForConditionalGeneration,
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99},
        ["q", "v"],
    ),
    (
        BertForSequenceClassification,
        {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        ["query", "value", "dense"],
    ),
    (
        DistilBertForSequenceClassification,
        {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 99},
        ["v_lin", "lin1"],
    ),
]


@pytest.mark.parametrize(
    ("cls", "config", "targets"), KINDS, ids=lambda value: getattr(value, "__name__", "")
)
def test_plain_peft_trains_merges_and_saves(cls, config, targets, tmp_path):
    model = build(cls, **config)
    labels = torch.tensor([1]) if "Classification" in cls.__name__ else IDS
    base = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, lora(*targets))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(6):
        loss = wrapped(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    inputs = {"input_ids": IDS, "labels": labels}
    with torch.no_grad():
        expected = wrapped(**inputs).logits
    wrapped.save_pretrained(tmp_path / "peft")
    again = build(cls, **config)
    again.load_state_dict(base)
    again.load_adapter(tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = cls.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits, rtol=1e-5, atol=1e-6)


def test_merging_leaves_the_file_that_the_model_is_mapped_from_alone(tmp_path):
    build().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    plain = logits(model)
    wrapped = shake(peft.get_peft_model(model, lora("q_proj")))
    assert not torch.equal(logits(wrapped.merge_and_unload()), plain)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_adapter_is_added_trained_and_switched():
    model = build()
    plain = logits(model)
    model.add_adapter(lora("q_proj", "v_proj"))
    assert torch.equal(logits(model), plain)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    model(IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    first = logits(shake(model))
    assert not torch.equal(first, plain)
    assert model.active_adapters() == ["default"] and model.active_adapter() == "default"
    model.add_adapter(lora("k_proj"), "second")
    assert model.active_adapters() == ["second"]
    assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter(["default", "second"])
    assert model.active_adapters() == ["default", "second"]
    with pytest.raises(NotYetError, match="2 adapters are active"):
        model.save_pretrained("nowhere")
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)
    assert not model.has_adapters() and model.state_dict().keys() == build().state_dict().keys()
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert all(value.requires_grad for value in model.parameters())


def test_a_head_that_is_trained_along_is_saved_and_read(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = build()
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), expected)
    other.delete_adapter("default")
    assert torch.equal(logits(other), logits(build()))


def test_a_save_writes_the_adapter_only_and_transformers_and_peft_read_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    build().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    names = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "base") and values["inference_mode"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    wrapped = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert torch.equal(logits(wrapped), expected)
    # And back: what transformers writes is read here.
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build()
    ours.load_adapter(tmp_path / "theirs", "mine")
    assert torch.equal(logits(ours), expected) and ours.active_adapters() == ["mine"]


@pytest.mark.parametrize("auto", [True, False])
def test_an_adapter_folder_loads_with_its_base(auto, tmp_path):
    build().save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    cls = AutoModelForCausalLM if auto else LlamaForCausalLM
    loaded, info = cls.from_pretrained(
        tmp_path / "adapter", adapter_name="mine", output_loading_info=True, attn_implementation="eager"
    )
    assert info["missing_keys"] == [] and loaded.active_adapters() == ["mine"]
    assert loaded.config.attn_implementation == "eager" and loaded.name_or_path == str(tmp_path / "base")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not any(value.requires_grad for value in loaded.parameters())
    # Beside whole weights the adapter waits to be asked for.
    build(num_hidden_layers=1).save_pretrained(tmp_path / "adapter")
    assert not cls.from_pretrained(tmp_path / "adapter").has_adapters()


def test_pickled_adapters_are_read_without_executing_them(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    other = build()
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), logits(model))
    adapted().save_pretrained(tmp_path / "other")
    with pytest.raises(FileError, match=r"loaded instead of adapter_model.bin"):
        model.save_pretrained(tmp_path / "other", safe_serialization=False)


def test_names_may_go_without_the_prefix_of_peft(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, save_peft_format=False)
    assert all(k.startswith("model.layers") for k in load_file(tmp_path / "adapter_model.safetensors"))
    other = build()
    other.load_adapter(tmp_path)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_adapters_train_on_quantized_models_and_merge_after_dequantize(bits, tmp_path):
    build(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", **{bits: True})
    plain = logits(model)
    model.add_adapter(lora("q_proj", "v_proj"))
    assert torch.equal(logits(model), plain)
    shake(model)
    model(IDS, labels=IDS).loss.backward()
    grads = [name for name, value in model.named_parameters() if value.grad is not None]
    assert grads and all("lora_" in name for name in grads)
    expected = logits(model)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "adapter", **{bits: True})
    assert again.is_quantized and torch.equal(logits(again), expected)
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(NotYetError, match="cannot be merged into int"):
        layer.merge()
    model.dequantize()
    dense = logits(model)
    layer.merge()
    torch.testing.assert_close(logits(model), dense, rtol=1e-4, atol=1e-4)


def test_what_needs_dense_weights_is_refused_on_quantized_layers(tmp_path):
    build(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, load_in_8bit=True)
    keys = model.state_dict().keys()
    with pytest.raises(NotYetError, match="computes with the dense weight"):
        model.add_adapter(lora("q_proj", use_dora=True))
    assert model.state_dict().keys() == keys and not model.has_adapters()
    # peft itself knows no such layers, and says so.
    with pytest.raises(ValueError, match=r"QuantizedLinear.* is not supported"):
        peft.get_peft_model(model, lora("q_proj"))


def test_placed_models_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(NotYetError, match="whole model on one device"):
        model.add_adapter(lora("q_proj"))


def test_faults_are_named_and_leave_the_model_as_it_was(tmp_path):
    model = build()
    plain, keys = logits(model), model.state_dict().keys()
    with pytest.raises(ArgumentError, match="has no adapters"):
        model.active_adapters()
    with pytest.raises(ArgumentError, match="made from a configuration of peft"):
        model.add_adapter({"r": 8})
    with pytest.raises(ArgumentError, match=r"peft cannot build this adapter for LlamaForCausalLM.*nowhere"):
        model.add_adapter(lora("nowhere"))
    with pytest.raises(ArgumentError, match="Nothing to load an adapter from"):
        model.load_adapter()
    with pytest.raises(UnknownArgumentError, match=r"'is_trainabel'.*Did you mean 'is_trainable'"):
        model.load_adapter(tmp_path, is_trainabel=True)
    with pytest.raises(NotYetError, match="hotswap=True"):
        model.load_adapter(tmp_path, hotswap=True)
    with pytest.raises(NotYetError, match="in place"):
        model.enable_peft_hotswap()
    adapted().save_pretrained(tmp_path / "good")
    good = load_file(tmp_path / "good" / "adapter_model.safetensors")
    first = next(iter(good))
    for weights in (
        {**good, "x": torch.ones(1)},
        {**good, first: torch.ones(3, 3)},
        dict(list(good.items())[1:]),
    ):
        (tmp_path / "bad").mkdir(exist_ok=True)
        config = (tmp_path / "good" / "adapter_config.json").read_text()
        (tmp_path / "bad" / "adapter_config.json").write_text(config)
        save_file(weights, tmp_path / "bad" / "adapter_model.safetensors")
        with pytest.raises(WeightsError, match="does not fit LlamaForCausalLM"):
            model.load_adapter(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match="no weights of an adapter"):
        model.load_adapter(tmp_path / "bad")
    for values, message in [
        ({}, "does not say of which kind"),
        ({"peft_type": "NONSENSE"}, "cannot be used"),
    ]:
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=message):
            model.load_adapter(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        LlamaForCausalLM.from_pretrained(tmp_path / "bad")
    assert torch.equal(logits(model), plain) and model.state_dict().keys() == keys
    assert all(value.requires_grad for value in model.parameters())
    adapted(model)
    for call in (
        lambda: model.add_adapter(lora("k_proj")),
        lambda: model.load_adapter(tmp_path / "good"),
    ):
        with pytest.raises(ArgumentError, match="an adapter 'default' already"):
            call()
    with pytest.raises(ArgumentError, match=r"no adapter 'defautl'.*Did you mean 'default'"):
        model.set_adapter("defautl")
    with pytest.raises(ArgumentError, match="no adapter 'x' to delete"):
        model.delete_adapter("x")
    with pytest.raises(ArgumentError, match="becomes a part of its weights' names"):
        model.add_adapter(lora("k_proj"), "a.b")


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'peft"):
        build().add_adapter(object())


def test_the_layer_of_gpt2_is_copied_and_pickled_as_itself():
    layer = Conv1D(3, 2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is Conv1D and torch.equal(twin.weight, layer.weight)
    assert isinstance(layer, sys.modules["transformers.pytorch_utils"].Conv1D)


@pytest.mark.realweights
@pytest.mark.slow
def test_adapters_train_on_packed_gguf_blocks(smollm2_gguf):
    packed = {"quant_method": "gguf"}
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf, quantization_config=packed, dtype="bfloat16")
    plain = logits(model)
    model.add_adapter(lora("q_proj"))
    assert torch.equal(logits(model), plain)
    model(IDS, labels=IDS).loss.backward()
    grads = [name for name, value in model.named_parameters() if value.grad is not None]
    assert grads and all("lora_" in name for name in grads)
