# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that compressed-tensors and fp8 tools have written: kept, decoded, saved, refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrained import (
    ArgumentError,
    AutoModelForCausalLM,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaModel,
    T5ForConditionalGeneration,
    WeightsError,
)
from pretrained.core.stored_layers import LayerForm
from pretrained.errors import ConfigError, NotYetError, PlacementError
from pretrained.torch.quantize import quantized_leaves
from pretrained.torch.quantized_ops import kernel_block
from pretrained.torch.stored_leaf import StoredEmbedding, StoredLinear
from support.stored import compressed, fp8, quantized, rewrite, weights

LLAMA = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
PACK, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
FP8 = {"quant_method": "fp8"}
CT = {"quant_method": "compressed-tensors"}


def group(bits=4, size=32, **values):
    return weights(bits, strategy="group", group_size=size, **values)


def block(rows, columns):
    return weights(kind="float", strategy="block", block_structure=[rows, columns])


# name -> (settings of weights, format, how the maker writes them)
SCHEMES = {
    "int4-g32": (group(), PACK, {}),
    "int4-g32-fp16": (group(), PACK, {"scale_dtype": "float16"}),
    "int4-g32-asymmetric": (group(symmetric=False), PACK, {"scale_dtype": "float16"}),
    "int4-g32-plain-zeros": (group(symmetric=False), PACK, {"flat": True}),
    "int4-g32-order": (group(actorder="group"), PACK, {"scale_dtype": "float32"}),
    "int4-g32-order-asymmetric": (group(actorder="group", symmetric=False), PACK, {}),
    "int4-g16": (group(size=16), PACK, {}),
    "int4-channel": (weights(4), PACK, {}),
    "int8-packed": (weights(8), PACK, {}),
    "int8-packed-g32-asymmetric": (group(8, symmetric=False), PACK, {}),
    "int8": (weights(8), INT, {"scale_dtype": "float32"}),
    "int8-tensor": (weights(8, strategy="tensor"), NAIVE, {}),
    "int8-asymmetric": (weights(8, symmetric=False), INT, {}),
    "fp8-channel": (weights(8, "float"), FLOAT, {}),
    "fp8-tensor": (weights(8, "float", "tensor"), FLOAT, {"flat": True}),
    "fp8-naive": (weights(8, "float", "tensor"), NAIVE, {}),
    "fp8-block": (block(48, 40), FLOAT, {"scale_dtype": "float32"}),
}
FP8_SCHEMES = {
    "blocks": (block(128, 128), (128, 128), {"scale_name": "weight_scale_inv", "scale_dtype": "float32"}),
    "partial": (block(40, 48), (40, 48), {"scale_name": "weight_scale_inv", "scale_dtype": "float32"}),
    "tensor": (weights(8, "float", "tensor"), None, {"scale_dtype": "float32", "flat": True}),
    "inverse-tensor": (weights(8, "float", "tensor"), None, {"scale_name": "weight_scale_inv"}),
    "channel": (weights(8, "float"), None, {"scale_dtype": "float32"}),
}


def family(cls=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    return cls(cls.config_class(**{**LLAMA, **config})).eval()


class Case:
    """A checkpoint, what its weights stand for, and a plain model with those."""

    def __init__(self, folder, config, scheme, form, *, model=None, **how):
        self.folder, self.config = folder, config
        self.plain = family() if model is None else model
        self.plain.save_pretrained(folder)
        self.values = rewrite(folder, config, scheme, form, **how)
        with torch.no_grad():
            for path, value in self.values.items():
                self.plain.get_submodule(path).weight.copy_(torch.from_numpy(value))

    def load(self, cls=None, **options):
        return (cls or type(self.plain)).from_pretrained(self.folder, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("stored")
            if name in SCHEMES:
                scheme, form, how = SCHEMES[name]
                made[name] = Case(folder, compressed(scheme, form), scheme, form, **how)
            else:
                scheme, size, how = FP8_SCHEMES[name]
                made[name] = Case(folder, fp8(size), scheme, FLOAT, **how)
        return made[name]

    return case


@pytest.fixture(params=[*SCHEMES, *FP8_SCHEMES])
def case(request, cases):
    return cases(request.param)


@torch.no_grad()
def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    return model(**inputs).logits


def same(one, other):
    """Tell whether two tensors have the same bytes; 8-bit floats cannot be compared."""
    kinds = one.dtype == other.dtype and one.shape == other.shape
    return kinds and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def distance(ours, theirs):
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


# -- values ---------------------------------------------------------------------------------------


def test_weights_are_what_the_slow_reader_says(case):
    model = case.load()
    method = case.config["quant_method"]
    assert model.is_quantized and model.quantization_method == method
    leaves = quantized_leaves(model)
    assert set(leaves) == set(case.values) and not any("lm_head" in path for path in leaves)
    for path, value in case.values.items():
        assert type(leaves[path]) is StoredLinear
        assert np.array_equal(leaves[path].dequantized().numpy(), value), path
        some = torch.tensor([[0, 5], [len(value) - 1, 17]])
        assert np.array_equal(leaves[path].rows(some, torch.float32).numpy(), value[some.numpy()])
        assert np.array_equal(leaves[path].rows(slice(3, 45), torch.float32).numpy(), value[3:45])
    assert model.num_parameters() == case.plain.num_parameters()
    for path, value in case.values.items():
        assert np.array_equal(leaves[path].dequantized(torch.bfloat16).float().numpy(), rounded(value))
    assert model.dequantize() is model and not model.is_quantized
    for path, value in case.values.items():
        module = model.get_submodule(path)
        assert type(module) is nn.Linear and np.array_equal(module.weight.detach().numpy(), value)
    assert torch.equal(logits(model), logits(case.plain))


def rounded(value):
    return torch.from_numpy(value).to(torch.bfloat16).float().numpy()


def test_a_model_runs_as_its_decoded_weights_do(case):
    exact = case.load(
        quantization_config={"quant_method": case.config["quant_method"], "compute_dtype": "float32"}
    )
    assert distance(logits(exact), logits(case.plain)) < 1e-5
    # Numbers of 8 significant bits lose 0.2% on average; weights, scales, inputs and results are rounded.
    bound = 0.02 if "int" in next(iter(quantized_leaves(exact).values())).scheme else 1e-5
    assert distance(logits(case.load()), logits(case.plain)) < bound
    half = case.load(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and distance(logits(half), logits(case.plain)) < 0.03


def test_decoding_while_loading_is_the_plain_model(case):
    said = {"quant_method": case.config["quant_method"], "dequantize": True}
    model = case.load(quantization_config=said)
    assert not model.is_quantized and "quantization_config" not in model.config.to_dict()
    ours, theirs = model.state_dict(), case.plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "decoded" in str(model.load_report)
    half = case.load(quantization_config=said, dtype=torch.bfloat16)
    theirs = copy.deepcopy(case.plain).to(torch.bfloat16).state_dict()
    for name, value in half.state_dict().items():
        assert value.dtype == torch.bfloat16
        if name.removesuffix(".weight") in case.values:
            assert np.array_equal(value.float().numpy(), rounded(case.values[name.removesuffix(".weight")]))
        else:
            assert torch.equal(value, theirs[name])


def test_a_save_is_the_file_again(case, tmp_path):
    model = case.load(dtype="auto")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (case.folder, tmp_path / "again"))
    assert set(before) == set(after)
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.shape == after[name].shape
        assert same(value, after[name]), name
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"] == case.config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "thrice")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "thrice" / file).read_bytes()


# -- kernels and layouts --------------------------------------------------------------------------

KERNELS = {
    "int4-g32": "int4pack",
    "int4-g32-asymmetric": "int4pack",
    "int4-g32-order": "int4pack",
    "int4-g32-order-asymmetric": "int4pack",
    "int4-channel": "int4pack",
    "int4-g16": None,
    "int8-packed": "int8pack",
    "int8": "int8pack",
    "int8-tensor": "int8pack",
    "int8-asymmetric": None,
    "int8-packed-g32-asymmetric": None,
    "fp8-channel": None,
}


@pytest.mark.parametrize(("name", "kernel"), KERNELS.items())
def test_kernels_are_used_where_they_can_be(cases, name, kernel):
    if kernel == "int4pack" and kernel_block() is None:
        pytest.skip("this CPU's int4pack layout is not known")
    model = cases(name).load()
    leaf = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert leaf.kernel(x) == kernel and leaf.kernel(torch.randn(100, 64)) is None
    want = x @ torch.from_numpy(cases(name).values["model.layers.0.mlp.up_proj"]).t()
    assert distance(leaf(x), want) < 0.01
    state = {key: value.clone() for key, value in leaf.state_dict().items()}
    leaf.load_state_dict(state)
    assert leaf.kernel(x) == kernel and distance(leaf(x), want) < 0.01
    nn.Sequential(leaf).half()
    assert all(same(value, leaf.state_dict()[key]) for key, value in state.items())
    leaf.use_stored_layout()
    assert leaf.kernel(x) is None and distance(leaf(x), want) < 0.01


def test_gradients_flow_through_to_the_input(case):
    leaf = case.load().model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, requires_grad=True)
    seed = torch.randn(5, 96)
    leaf(x).backward(seed)
    weight = torch.from_numpy(case.values["model.layers.0.mlp.up_proj"])
    assert torch.allclose(x.grad, seed @ weight, atol=1e-4)


def test_columns_that_do_not_fill_a_word():
    for bits in (4, 8):
        weight = np.random.default_rng(0).normal(size=(7, 21)).astype(np.float32)
        tensors, values = quantized(weight, weights(bits, symmetric=False), PACK)
        form = LayerForm(
            shape=(7, 21),
            kind="int",
            bits=bits,
            packed=True,
            block=(1, 21),
            data="weight_packed",
            scale="weight_scale",
            zero="weight_zero_point",
            order=None,
            tensors={
                name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()
            },
        )
        leaf = StoredLinear(form, torch.float32, "float32")
        leaf.load_state_dict(tensors)
        assert np.array_equal(leaf.dequantized().numpy(), values)
        x = torch.randn(4, 21)
        assert torch.allclose(leaf(x), x @ torch.from_numpy(values).t(), atol=1e-5)


# -- which layers ---------------------------------------------------------------------------------


def test_targets_and_ignored_layers(tmp_path):
    config = compressed(weights(8), INT, targets=["re:.*mlp.*", "model.layers.0.self_attn.q_proj"], ignore=[])
    other = config["config_groups"]["group_0"] | {"targets": ["Linear"], "weights": group(), "format": PACK}
    config = {**config, "config_groups": {"all": other, **config["config_groups"]}}
    config["ignore"] = ["re:.*down_proj", "lm_head", "model.layers.0.self_attn.o_proj"]
    skip = ("lm_head", "embed", "norm", "down_proj", "o_proj", "k_proj", "v_proj")
    case = Case(tmp_path / "mixed", config, weights(8), INT, skip=skip)
    state = load_file(tmp_path / "mixed/model.safetensors")
    for name in ("k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        tensors, case.values[path] = quantized(state.pop(f"{path}.weight").numpy(), group(), PACK)
        state |= {f"{path}.{part}": value for part, value in tensors.items()}
    save_file(state, tmp_path / "mixed/model.safetensors", {"format": "pt"})
    model = case.load()
    schemes = {path.rpartition(".")[2]: leaf.scheme for path, leaf in quantized_leaves(model).items()}
    assert schemes == {
        "q_proj": "int8",
        "k_proj": "int4-g32",
        "v_proj": "int4-g32",
        "gate_proj": "int8",
        "up_proj": "int8",
    }
    assert "5 quantized layers of compressed-tensors kept: 2 as int4-g32, 3 as int8" in str(model.load_report)
    for path, value in case.values.items():
        assert np.array_equal(model.get_submodule(path).dequantized().numpy(), value)


def test_activations_are_named_and_left_alone(tmp_path):
    config = compressed(weights(8, "float", "tensor"), FLOAT, inputs=weights(8, "float", "tensor"))
    config["kv_cache_scheme"] = weights(8, "float", "tensor")
    extra = {"input_scale": torch.ones(1), "output_scale": torch.ones(1)}
    case = Case(tmp_path / "static", config, weights(8, "float", "tensor"), FLOAT, extra=extra)
    model = case.load()
    assert "has activations or the cache quantized too; here they are not" in str(model.load_report)
    assert not model.load_report.unexpected
    assert "rounding activations" in model.load_report.dropped["model.layers.0.mlp.up_proj.input_scale"]
    assert distance(logits(model), logits(case.plain)) < 1e-5
    static = fp8(None, activation_scheme="static", ignored_layers=["lm_head"])
    extra = {"activation_scale": torch.ones(())}
    case = Case(tmp_path / "fp8", static, weights(8, "float", "tensor"), FLOAT, extra=extra)
    assert "activations" in str(case.load().load_report)
    silent = Case(tmp_path / "w4a16", compressed(group(), PACK), group(), PACK).load()
    assert not any("activations" in note for note in silent.load_report.notes)


def test_layers_that_are_stored_plain_are_named(tmp_path):
    skip = ("lm_head", "embed", "norm", "o_proj")
    case = Case(tmp_path / "a", compressed(group(), PACK), group(), PACK, skip=skip)
    model = case.load()
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert (
        "stored plain, although the config counts them as quantized: model.layers.0.self_attn.o_proj"
        in str(model.load_report)
    )
    listed = fp8((128, 128), modules_to_not_convert=["lm_head", "self_attn.o_proj"])
    how = {"scale_name": "weight_scale_inv", "scale_dtype": "float32"}
    model = Case(tmp_path / "b", listed, block(128, 128), FLOAT, skip=skip, **how).load()
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert "stored plain" not in str(model.load_report)


def test_the_headless_class_and_other_prefixes(cases):
    case = cases("int4-g32-asymmetric")
    body = case.load(LlamaModel)
    with torch.no_grad():
        want = case.load().model(IDS).last_hidden_state
        assert torch.equal(body(IDS).last_hidden_state, want)


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_other_families(name, tmp_path):
    scheme, form, config = {
        "fp8": (block(32, 32), FLOAT, fp8((32, 32))),
        "int4": (group(), PACK, compressed(group(), PACK)),
    }[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5ForConditionalGeneration.config_class(**sizes)).eval()
    skip = ("shared", "lm_head", "embed", "relative_attention_bias")
    case = Case(tmp_path / "t5", config, scheme, form, model=t5, skip=skip)
    assert len(case.values) > 10
    assert distance(logits(case.load()), logits(case.plain)) < 0.02
    half = case.load(
        dtype=torch.float16, quantization_config={"quant_method": config["quant_method"], "dequantize": True}
    )
    assert half.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype == torch.float32
    assert half.shared.weight.dtype == torch.float16
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    bert = BertForMaskedLM(BertForMaskedLM.config_class(**sizes)).eval()
    case = Case(tmp_path / "bert", config, scheme, form, model=bert, skip=("embeddings", "decoder"))
    model = case.load()
    assert distance(logits(model), logits(case.plain)) < 0.02
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_ties(tmp_path):
    plain = family(tie_word_embeddings=True)
    case = Case(tmp_path / "tied", compressed(group(), PACK), group(), PACK, model=plain)
    model = case.load()
    assert (
        model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.is_floating_point()
    )
    # A head that was quantized on its own is not tied, whatever the config says.
    for name, (scheme, form, config) in {
        "int4": (group(), PACK, compressed(group(), PACK, ignore=[])),
        "fp8": (block(32, 32), FLOAT, fp8((32, 32))),
    }.items():
        case = Case(tmp_path / name, config, scheme, form, skip=("embed", "norm"))
        said = json.loads((case.folder / "config.json").read_text())
        (case.folder / "config.json").write_text(json.dumps({**said, "tie_word_embeddings": True}))
        model = case.load()
        assert not model.config.tie_word_embeddings and type(model.lm_head) is StoredLinear
        assert distance(logits(model), logits(case.plain)) < 0.02
        decoded = case.load(quantization_config={"quant_method": config["quant_method"], "dequantize": True})
        assert distance(logits(decoded), logits(case.plain)) < 1e-6


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantized_embedding_with_a_tied_head(name, tmp_path):
    scheme, form = {"int8": (weights(8), INT), "int4": (group(), PACK)}[name]
    config = compressed(scheme, form, targets=["Linear", "Embedding"], ignore=[])
    case = Case(tmp_path / "e", config, scheme, form, model=family(tie_word_embeddings=True), skip=("norm",))
    model = case.load()
    head, embedding = model.lm_head, model.model.embed_tokens
    assert type(embedding) is StoredEmbedding and type(head) is StoredLinear
    assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
    assert distance(logits(model), logits(case.plain)) < 0.02
    model.save_pretrained(tmp_path / "again")
    again = case.load()
    assert torch.equal(logits(again), logits(model))
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(
        load_file(tmp_path / "e/model.safetensors")
    )
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(logits(model), logits(case.plain)) < 1e-6
    decoded = case.load(quantization_config={**CT, "dequantize": True})
    assert decoded.lm_head.weight is decoded.model.embed_tokens.weight
    assert torch.equal(logits(decoded), logits(case.plain))


# -- sources and places ---------------------------------------------------------------------------


def test_places(case, tmp_path):
    exact = {"quant_method": case.config["quant_method"], "compute_dtype": "float32"}
    here = case.load(dtype="auto", quantization_config=exact)
    assert case.load(device_map="cpu").hf_device_map == {"": "cpu"}
    away = case.load(dtype="auto", quantization_config=exact, device_map="disk", offload_folder=tmp_path)
    assert torch.equal(logits(away), logits(here))
    mixed = {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    away = case.load(dtype="auto", quantization_config=exact, device_map=mixed, offload_folder=tmp_path)
    assert torch.equal(logits(away), logits(here))
    # The kernels too: bit for bit what the resident model says.
    away = case.load(dtype="auto", device_map="disk", offload_folder=tmp_path)
    assert torch.equal(logits(away), logits(case.load(dtype="auto")))
    away.save_pretrained(tmp_path / "saved")
    before, after = (
        load_file(case.folder / "model.safetensors"),
        load_file(tmp_path / "saved/model.safetensors"),
    )
    assert all(same(value, after[name]) for name, value in before.items())
    with pytest.raises(
        NotYetError, match=r"this load decodes cannot be placed on disk yet.*Leave dequantize out"
    ):
        case.load(
            quantization_config={**exact, "dequantize": True}, device_map="disk", offload_folder=tmp_path
        )


@pytest.mark.parametrize("name", ["int4-g32", "partial"])
def test_budgets_count_what_will_be_resident(cases, name):
    case = cases(name)
    method = case.config["quant_method"]
    kept, decoded = case.load(dtype="auto"), {"quant_method": method, "dequantize": True}
    size, plain = kept.get_memory_footprint(), case.plain.get_memory_footprint()
    assert size < plain / 2
    # Room for the kept form and its kernel's scales, not for the plain one.
    budget = {"max_memory": {"cpu": int(size * 1.5)}, "device_map": "auto"}
    placed = case.load(**budget)
    assert placed.is_quantized and set(placed.hf_device_map.values()) == {"cpu"}
    # No room for the plain form: the rest would go to disk, or the largest block fits nowhere.
    with pytest.raises((PlacementError, NotYetError)):
        case.load(**budget, quantization_config=decoded)
    roomy = case.load(device_map="auto", max_memory={"cpu": 4 * plain}, quantization_config=decoded)
    assert torch.equal(logits(roomy), logits(case.plain))


def test_state_dicts_and_copies(cases):
    case = cases("int4-g32-order-asymmetric")
    state = load_file(case.folder / "model.safetensors")
    config = case.load().config
    given = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(logits(given), logits(case.load()))
    assert torch.equal(logits(case.load(disable_mmap=True)), logits(given))
    decoded = case.load(disable_mmap=True, quantization_config={**CT, "run_compressed": False})
    assert torch.equal(logits(decoded), logits(case.plain))


def test_generation(cases):
    for name in ("int4-g32", "partial"):
        model = cases(name).load()
        out = model.generate(IDS, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, model.generate(IDS, max_new_tokens=4, do_sample=False))


# -- refusals -------------------------------------------------------------------------------------


def changed(case, tmp_path, change):
    """Return a folder with other tensors: `change` gets those of the checkpoint."""
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / "config.json").write_text((case.folder / "config.json").read_text())
    state = load_file(case.folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj"
BROKEN = {
    "no scale": (
        "int4-g32",
        f"{UP}.weight_scale",
        None,
        rf"has no scale.*{UP}.weight_packed.*expected {UP}.weight_scale",
    ),
    "no fp8 scale": ("blocks", f"{UP}.weight_scale_inv", None, rf"has no scale \({UP}.weight\)"),
    "no zeros": (
        "int4-g32-asymmetric",
        f"{UP}.weight_zero_point",
        None,
        "has no zero points, which a scheme that is not",
    ),
    "no order": (
        "int4-g32-order",
        f"{UP}.weight_g_idx",
        None,
        "has no groups of its inputs, which this actorder",
    ),
    "no weight": (
        "int4-g32",
        f"{UP}.weight_packed",
        None,
        rf"hold scales of a weight, and not the weight \({UP}\)",
    ),
    "plain": (
        "int4-g32",
        f"{UP}.weight_packed",
        torch.zeros(96, 64),
        r"expected int32 \[96, 8\].*found float32 \[96, 64\]",
    ),
    "scale shape": (
        "int4-g32",
        f"{UP}.weight_scale",
        torch.ones(96, 4),
        r"does not fit its layer.*\[96, 2\] \(96 x 2 blocks of 1 x 32\), found float32 \[96, 4\]",
    ),
    "scale dtype": (
        "int4-g32",
        f"{UP}.weight_scale",
        torch.ones(96, 2, dtype=torch.int8),
        "expected float32 or bfloat16 or float16",
    ),
    "block scales": (
        "partial",
        f"{UP}.weight_scale_inv",
        torch.ones(3, 1),
        r"\[3, 2\] \(3 x 2 blocks of 40 x 48\), found float32 \[3, 1\]",
    ),
    "packed shape": (
        "int4-g32",
        f"{UP}.weight_packed",
        torch.zeros(96, 9, dtype=torch.int32),
        r"int32 \[96, 8\] \(a layer of 96 outputs and 64 inputs\)",
    ),
    "zero shape": (
        "int4-g32-asymmetric",
        f"{UP}.weight_zero_point",
        torch.zeros(12, 3, dtype=torch.int32),
        r"or int32 \[12, 2\]",
    ),
    "order shape": (
        "int4-g32-order",
        f"{UP}.weight_g_idx",
        torch.zeros(9, dtype=torch.int32),
        r"expected int32 \[64\] \(a group for each input\)",
    ),
    "order values": (
        "int4-g32-order",
        f"{UP}.weight_g_idx",
        torch.full((64,), 7, dtype=torch.int32),
        r"names a group that is not there.*numbers from 0 to 1, found 7",
    ),
    "said shape": (
        "int4-g32",
        f"{UP}.weight_shape",
        torch.tensor([96, 63]),
        r"another shape of a packed weight.*expected \[96, 64\], found \[96, 63\]",
    ),
    "said dtype": ("int4-g32", f"{UP}.weight_shape", torch.ones(2), r"expected int64 \[2\]"),
    "unknown layer": (
        "int4-g32",
        "lm_head.weight_scale",
        torch.ones(99, 2),
        r"of which the config does not speak \(lm_head\).*no entry in ignore",
    ),
}


@pytest.mark.parametrize(("name", "key", "value", "text"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("dequantize", [False, True])
def test_tensors_that_do_not_fit_are_named(cases, tmp_path, name, key, value, text, dequantize):
    def change(state):
        if value is None:
            del state[key]
        else:
            state[key] = value

    folder = changed(cases(name), tmp_path, change)
    said = {"quant_method": cases(name).config["quant_method"], "dequantize": dequantize}
    with pytest.raises(WeightsError, match=text):
        LlamaForCausalLM.from_pretrained(folder, quantization_config=said)


def test_groups_that_do_not_divide(tmp_path):
    case = Case(tmp_path / "a", compressed(group(), PACK), group(), PACK)
    said = json.loads((case.folder / "config.json").read_text())
    said["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 40
    (case.folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError, match=r"inputs do not divide into groups of 40.*found 64 inputs"):
        case.load()


def test_plain_files_behind_a_quantized_config(tmp_path):
    family().save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for config in (compressed(group(), PACK), fp8()):
        (tmp_path / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
        with pytest.raises(WeightsError, match=r"says that the weights are quantized.*hold plain ones"):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_arguments_that_the_files_contradict(cases):
    with pytest.raises(ArgumentError, match=r"quantized already.*expected fp8, found int8"):
        cases("blocks").load(quantization_config={"quant_method": "int8"})
    with pytest.raises(ArgumentError, match=r"quantized already.*expected compressed-tensors, found int4"):
        cases("int8").load(load_in_4bit=True)
    with pytest.raises(
        ArgumentError, match=r"another weight_block_size.*expected \[128, 128\], found \[64, 64\]"
    ):
        cases("blocks").load(quantization_config={**FP8, "weight_block_size": [64, 64]})


def test_configs_that_cannot_be_are_refused_by_the_load(cases, tmp_path):
    folder = changed(cases("int8"), tmp_path, lambda state: None)
    said = json.loads((folder / "config.json").read_text())
    for values, error, text in (
        (
            {"format": "nvfp4-pack-quantized"},
            NotYetError,
            r"'nvfp4-pack-quantized' is not read yet: 4-bit floats",
        ),
        ({"ignore": ["re:["]}, ConfigError, r"regular expression that cannot be used.*changed"),
    ):
        content = {**said, "quantization_config": {**said["quantization_config"], **values}}
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(error, match=text):
            LlamaForCausalLM.from_pretrained(folder)


def test_casts_are_refused(cases):
    for name in ("int4-g32", "blocks"):
        model = cases(name).load()
        with pytest.raises(ValueError, match=r"cannot be cast.*dequantize\(\)"):
            model.half()


# -- memory ---------------------------------------------------------------------------------------

MEASURE = """
import ctypes, gc, json, sys
sys.path[:0] = {path}
import torch
torch.set_num_threads(1)
from pretrained import LlamaForCausalLM

def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

tiny, path, options = *sys.argv[1:3], json.loads(sys.argv[3])
LlamaForCausalLM.from_pretrained(tiny, **options)  # what first calls cost
gc.collect()
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = LlamaForCausalLM.from_pretrained(path, **options)
print(json.dumps([status("VmHWM") - before, model.get_memory_footprint()]))
"""


def write_large(folder, name, **sizes):
    """Write a checkpoint without quantizing anything: only its sizes matter."""
    model = family(**sizes, max_position_embeddings=64)
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    for path in [path for path, module in model.named_modules() if type(module) is nn.Linear]:
        rows, columns = state[f"{path}.weight"].shape
        if path == "lm_head":
            continue
        if name == "int4":
            del state[f"{path}.weight"]
            state[f"{path}.weight_packed"] = torch.ones(rows, columns // 8, dtype=torch.int32)
            state[f"{path}.weight_scale"] = torch.ones(rows, columns // 32, dtype=torch.bfloat16)
        else:
            state[f"{path}.weight"] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
            state[f"{path}.weight_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = compressed(group(), PACK) if name == "int4" else fp8((128, 128))
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": config}))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset the peak"
)
@pytest.mark.parametrize(("name", "dequantize"), [("int4", False), ("fp8", False), ("fp8", True)])
def test_a_load_takes_what_the_model_takes(tmp_path, name, dequantize):
    big = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
    for folder, sizes in (("tiny", {}), ("big", big)):
        (tmp_path / folder).mkdir()
        write_large(tmp_path / folder, name, **sizes)
    method = "fp8" if name == "fp8" else "compressed-tensors"
    options = {"dtype": "bfloat16", "quantization_config": {"quant_method": method, "dequantize": dequantize}}
    script = MEASURE.format(path=sys.path)
    paths = [str(tmp_path / "tiny"), str(tmp_path / "big")]
    done = subprocess.run(
        [sys.executable, "-c", script, *paths, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, footprint = json.loads(done.stdout)
    numbers = 4 * (2 * 1024 * 1024 + 3 * 1024 * 2816)
    assert footprint > (2 if dequantize else 0.5 if name == "int4" else 1) * numbers
    # The largest tensor, what the decoding of a tile takes, and the allocator's.
    limit = (footprint if dequantize or name == "int4" else 0) + 24 * (1 << 20)
    assert peak < limit, (peak, footprint)
