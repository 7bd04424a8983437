# SPDX-License-Identifier: Apache-2.0
"""Quantization left to bitsandbytes and torchao, and what is said where they are absent."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrained import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from pretrained.core.library_quantization import TorchAoScheme
from pretrained.errors import ArgumentError, MissingDependencyError, NotYetError, WeightsError
from pretrained.torch.quantized import QuantizedLinear
from pretrained.torch.quantizers import library

IDS = torch.arange(10)[None]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


# -- bitsandbytes --------------------------------------------------------------------------------


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_the_librarys_own(bnb, plain, tmp_path, kind, double):
    if kind == "fp4" and not double:
        # The library's defaults, which say nothing: this one's int4 is meant.
        model = LlamaForCausalLM.from_pretrained(plain, quantization_config={"load_in_4bit": True})
        assert type(model.get_submodule(LAYER)) is QuantizedLinear
        return
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted)
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.extra_repr() == f"64, 128, scheme={kind}"
    weight = load_file(plain / "model.safetensors")[f"{LAYER}.weight"]
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=64, quant_type=kind, compress_statistics=double
    )
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.dequantized(), bnb.functional.dequantize_4bit(codes, state))
    assert model.quantization_method == "bitsandbytes"
    assert model.num_parameters() == LlamaForCausalLM.from_pretrained(plain).num_parameters()
    assert 0.05 < model.load_report.worst_quantized[1] < 0.15
    with pytest.raises(ArgumentError, match="cannot be cast"):
        model.half()

    before = logits(model)
    model.save_pretrained(tmp_path / "a")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), before)
    assert again.get_memory_footprint() == model.get_memory_footprint() < 160_000
    again.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    restored = again.dequantize()
    assert type(restored.get_submodule(LAYER)) is nn.Linear and not restored.is_quantized
    assert relative(logits(restored), before) < 1e-5


def test_files_of_another_writer(bnb, plain, tmp_path):
    transformers = pytest.importorskip("transformers")
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        plain, quantization_config=wanted, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        # On some CPUs the library would multiply in bfloat16, by a kernel of its own.
        module.support_avx512bf16_for_cpu = False
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert isinstance(ours.get_submodule(LAYER), bnb.nn.Linear4bit)
    assert torch.equal(ours.get_submodule(LAYER).dequantized(), ours.get_submodule(LAYER).plain().weight)
    values = bnb.functional.dequantize_4bit(
        theirs.get_submodule(LAYER).weight.data, theirs.get_submodule(LAYER).weight.quant_state
    )
    assert torch.equal(ours.get_submodule(LAYER).dequantized(), values)
    assert relative(logits(ours), logits(theirs)) < 1e-4


def test_skipped_modules_and_transposed_layers(bnb, tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    wanted = {**NF4, "llm_int8_skip_modules": ["attn"], "bnb_4bit_compute_dtype": "bfloat16"}
    model = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=wanted)
    block = model.transformer.h[0]
    assert isinstance(block.mlp.c_fc, bnb.nn.Linear4bit) and block.mlp.c_fc.compute_dtype == torch.bfloat16
    assert type(block.attn.c_attn).__name__ == type(block.attn.c_proj).__name__ == "Conv1D"
    expected = logits(GPT2LMHeadModel.from_pretrained(tmp_path))
    assert relative(logits(model), expected) < 0.1
    model.dequantize()
    assert type(block.mlp.c_fc).__name__ == "Conv1D" and relative(logits(model), expected) < 0.1


def test_budgets_know_the_size(bnb, plain):
    whole = LlamaForCausalLM.from_pretrained(plain, quantization_config=NF4).get_memory_footprint()
    arguments = {"quantization_config": NF4, "device_map": "auto"}
    placed = LlamaForCausalLM.from_pretrained(plain, **arguments, max_memory={"cpu": whole + 10_000})
    assert placed.hf_device_map == {"": "cpu"}
    with pytest.raises(NotYetError, match=r"bitsandbytes has quantized cannot be offloaded.*cpu, disk"):
        LlamaForCausalLM.from_pretrained(plain, **arguments, max_memory={"cpu": whole - 10_000})


def test_numbers_that_are_none(bnb, plain, tmp_path):
    weights = load_file(plain / "model.safetensors")
    weights[f"{LAYER}.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(WeightsError, match=rf"infinities or NaN \({LAYER}.weight\)"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=NF4)


@pytest.fixture
def stored(bnb, plain, tmp_path):
    wanted = {**NF4, "bnb_4bit_use_double_quant": True}
    LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted).save_pretrained(tmp_path)
    return tmp_path


def _settings(weights, **changes):
    key = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(weights[key].tolist()))
    weights[key] = torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


DAMAGES = {
    "another shape": (lambda w: _settings(w, shape=[32, 256]), "another shape than the layer needs"),
    "huge blocks": (lambda w: _settings(w, blocksize=1 << 40), "settings .* cannot be understood"),
    "small blocks": (lambda w: _settings(w, blocksize=32), "'weight.absmax' .* another shape"),
    "no dtype": (lambda w: _settings(w, dtype="compile"), "settings .* cannot be understood"),
    "another type": (lambda w: _settings(w, quant_type="fp4"), "settings .* cannot be understood"),
    "no JSON": (
        lambda w: w.update({f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.ones(9).byte()}),
        "settings .* cannot be understood",
    ),
    "no settings": (
        lambda w: w.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"),
        "no readable settings",
    ),
    "short scales": (
        lambda w: w.update({f"{LAYER}.weight.absmax": w[f"{LAYER}.weight.absmax"][:-1].clone()}),
        "'weight.absmax' .* another shape",
    ),
    "short codes": (
        lambda w: w.update({f"{LAYER}.weight": w[f"{LAYER}.weight"][:-1].clone()}),
        "'weight' .* another shape",
    ),
    "no table": (lambda w: w.pop(f"{LAYER}.weight.nested_quant_map"), "no 'weight.nested_quant_map'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(stored, damage):
    weights = load_file(stored / "model.safetensors")
    change, text = DAMAGES[damage]
    change(weights)
    save_file(weights, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=text):
        LlamaForCausalLM.from_pretrained(stored)


# -- 8 bits in files: no library -----------------------------------------------------------------


@pytest.fixture
def stored8(plain, tmp_path):
    """As the library writes it: int8 rows, the largest magnitude of each, and a mark of the layout."""
    weights = load_file(plain / "model.safetensors")
    for key in [key for key in weights if "_proj" in key]:
        largest = weights[key].abs().amax(1)
        path = key.removesuffix(".weight")
        weights |= {
            key: (weights[key] * (127 / largest[:, None])).round().to(torch.int8),
            f"{path}.SCB": largest,
            f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": True,
        "_load_in_4bit": False,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": None,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_eight_bit_files_need_no_library(stored8, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    model = LlamaForCausalLM.from_pretrained(stored8)
    weights = load_file(stored8 / "model.safetensors")
    values = weights[f"{LAYER}.weight"].float() * (weights[f"{LAYER}.SCB"] / 127)[:, None]
    assert torch.equal(model.get_submodule(LAYER).dequantized(), values)
    assert model.quantization_method == "int8"
    assert relative(logits(model), logits(LlamaForCausalLM.from_pretrained(plain))) < 0.02
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_the_library_means_the_same_by_them(bnb, plain):
    weight = load_file(plain / "model.safetensors")[f"{LAYER}.weight"]
    made = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    values = made.data.float() * (made.SCB / 127)[:, None]
    assert torch.allclose(values, weight, atol=float(weight.abs().max()) / 100)


def test_layouts_of_kernels_are_refused(stored8):
    weights = load_file(stored8 / "model.safetensors")
    weights[f"{LAYER}.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(weights, stored8 / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotYetError, match=rf"layout of a kernel are not read \({LAYER}\).*weight_format 2"):
        LlamaForCausalLM.from_pretrained(stored8)


# -- torchao -------------------------------------------------------------------------------------


@pytest.fixture
def quantization():
    pytest.importorskip("torchao")
    library.maker_for(TORCHAO)
    return pytest.importorskip("torchao.quantization")


TORCHAO = TorchAoScheme(quant_type="int8_weight_only", arguments={})


def spellings(quantization):
    made = quantization.Int8WeightOnlyConfig()
    as_dict = pytest.importorskip("torchao.core.config").config_to_dict(made)
    return {
        "a name": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        "the library's object": made,
        "an object in a dictionary": {"quant_method": "torchao", "quant_type": made},
        "config.json": {"quant_method": "torchao", "quant_type": {"default": as_dict}},
        "transformers": pytest.importorskip("transformers").TorchAoConfig(made),
    }


@pytest.mark.parametrize(
    "spelling",
    ["a name", "the library's object", "an object in a dictionary", "config.json", "transformers"],
)
def test_torchao_quantizes(quantization, plain, spelling):
    wanted = spellings(quantization)[spelling]
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted)
    reference = nn.Linear(64, 128, bias=False)
    reference.weight.data = load_file(plain / "model.safetensors")[f"{LAYER}.weight"]
    quantization.quantize_(reference, quantization.Int8WeightOnlyConfig())
    layer = model.get_submodule(LAYER)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.dequantized(), reference.weight.dequantize())
    assert (model.quantization_method, layer.scheme) == ("torchao", "Int8WeightOnlyConfig")
    expected = logits(LlamaForCausalLM.from_pretrained(plain))
    assert relative(logits(model), expected) < 0.02
    plain_bytes = 4 * model.num_parameters()
    assert model.get_memory_footprint() < 0.45 * plain_bytes
    with pytest.raises(NotYetError, match=r"torchao has quantized cannot be saved \(.*and 13 more\)"):
        model.save_pretrained("nowhere")
    assert json.dumps(model.config.quantization_config)
    assert relative(logits(model.dequantize()), expected) < 0.02


def test_torchao_says_what_it_cannot_do_here(quantization, plain):
    if torch.cuda.is_available():
        pytest.skip("what is refused depends on the GPU")
    wanted = {"quant_method": "torchao", "quant_type": "float8_dynamic_activation_float8_weight"}
    text = r"torchao cannot quantize by Float8DynamicActivationFloat8WeightConfig here.*on cpu.*CUDA"
    with pytest.raises(NotYetError, match=text):
        LlamaForCausalLM.from_pretrained(plain, quantization_config=wanted)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"quant_type": "int7_weight_only"}, ArgumentError, "torchao has no such scheme"),
        ({"quant_type": {"_type": "NoConfig", "_data": {}}}, ArgumentError, "torchao has no such scheme"),
        ({"quant_type": 8}, ArgumentError, r"no config of torchao .*int"),
    ],
)
def test_no_such_scheme(quantization, plain, fields, error, text):
    with pytest.raises(error, match=text):
        LlamaForCausalLM.from_pretrained(plain, quantization_config={"quant_method": "torchao", **fields})


# -- absent --------------------------------------------------------------------------------------

WANTED = {"bitsandbytes": NF4, "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}


@pytest.mark.parametrize("name", WANTED)
def test_an_absent_library_is_named_before_anything_is_read(plain, monkeypatch, name):
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    text = rf"need the package {name}, which is not installed.*pip install {name}.*'quant_method': 'int4'"
    with pytest.raises(MissingDependencyError, match=text):
        LlamaForCausalLM.from_pretrained(plain, quantization_config=WANTED[name])


@pytest.mark.parametrize("name", WANTED)
def test_a_library_that_does_not_import(plain, monkeypatch, name):
    monkeypatch.setattr(library, "find_spec", lambda name: object())
    monkeypatch.delitem(sys.modules, f"pretrained.torch.quantizers.{name}", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=rf"package {name} is installed and cannot be imported"):
        LlamaForCausalLM.from_pretrained(plain, quantization_config=WANTED[name])


def test_files_that_need_an_absent_library(plain, tmp_path, monkeypatch):
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="need the package bitsandbytes"):
        LlamaForCausalLM.from_pretrained(tmp_path)
