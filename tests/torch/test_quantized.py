# SPDX-License-Identifier: Apache-2.0
"""Quantized models: rounding, kernels, loading, saving, and the way back."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from pretrained import (
    ArgumentError,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    T5ForConditionalGeneration,
    WeightsError,
)
from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantize import quantized_leaves, select
from pretrained.torch.quantize_model import quantize_model
from pretrained.torch.quantized import QuantizedLinear
from pretrained.torch.quantized_ops import (
    from_kernel_layout,
    kernel_block,
    pack_nibbles,
    to_kernel_layout,
    unpack_nibbles,
)
from pretrained.torch.quantizers import rounding as quantizing
from pretrained.torch.rounding import quantize

SIZES = {
    LlamaForCausalLM: {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    T5ForConditionalGeneration: {
        "vocab_size": 99,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    BertForMaskedLM: {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
    GPT2LMHeadModel: {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
}
FAMILIES = list(SIZES)
INT8 = {"quant_method": "int8"}
INT4 = {"quant_method": "int4"}
SCHEMES = [
    INT8,
    INT4,
    {**INT4, "symmetric": False},
    {**INT8, "quantize_head": True, "quantize_embeddings": True},
    {**INT4, "quantize_head": True},
]
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
EXACT = {"compute_dtype": "float32"}


def scheme(method="int4", **values):
    return QuantizationConfig(quant_method=method, **values)


def family(cls, **config):
    torch.manual_seed(0)
    return cls(cls.config_class(**SIZES[cls], **config)).eval()


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda cls: cls.__name__)
def saved(request, tmp_path_factory):
    model = family(request.param)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def llama(tmp_path):
    model = family(LlamaForCausalLM)
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


@torch.no_grad()
def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :5]
    return model(**inputs).logits


def distance(ours, theirs):
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


# A reading of the table in core/quantization.py that shares no code with the backend.
def by_the_book(leaf):
    state = {
        name: value.float().numpy() if value.is_floating_point() else value.numpy()
        for name, value in leaf.state_dict().items()
    }
    weight, scale = state["weight"], state["weight_scale"].astype(np.float32)
    if weight.dtype == np.int8:
        return weight.astype(np.float32) * scale[:, None]
    integers = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1).astype(np.float32) - 8
    group = integers.shape[1] // scale.shape[1]
    values = integers * np.repeat(scale, group, axis=1)
    if "weight_zero" in state:
        values = values + np.repeat(state["weight_zero"], group, axis=1)
    return values


# -- rounding -------------------------------------------------------------------------------------

# Root-mean-square errors of normal weights, from the distance of the largest of n normal numbers (about
# 3.2 of 1024, 2.07 and 2.4 in size of 32) over the number of steps, over the square root of 12.
BOUNDS = [
    (scheme("int8"), 0.01),
    (scheme("int4", group_size=32), 0.10),
    (scheme("int4", group_size=32, symmetric=False), 0.085),
    (scheme("int4", group_size=64), 0.105),
    (scheme("int4", group_size=128), 0.115),
    (scheme("int4", group_size=128, symmetric=False), 0.11),
]


@pytest.mark.parametrize(("config", "bound"), BOUNDS)
def test_error_of_normal_weights_is_bounded_and_reported_truly(config, bound):
    weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(1))
    leaf = QuantizedLinear(1024, 96, config, bias=False)
    packed = quantize(weight, config)
    leaf.fill(packed)
    assert packed.error == pytest.approx(distance(leaf.dequantized(), weight), rel=1e-4)
    assert bound / 2 < packed.error < bound


@pytest.mark.parametrize("config", [config for config, _ in BOUNDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_and_layouts_change_nothing(config, dtype, monkeypatch):
    weight = torch.randn(80, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = quantize(weight, config)
    monkeypatch.setattr("pretrained.torch.rounding.TILE", 1024)
    pieces = quantize(weight.t().contiguous(), config, transposed=True)
    assert torch.equal(whole.weight, pieces.weight)
    assert torch.equal(whole.scale, pieces.scale)


@pytest.mark.parametrize("config", [config for config, _ in BOUNDS])
def test_every_number_is_within_half_a_step(config):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)) + 10
    leaf = QuantizedLinear(256, 64, config, bias=False)
    leaf.fill(quantize(weight, config))
    step = leaf.weight_scale.float().abs().view(64, -1, 1)
    lost = (leaf.dequantized() - weight).view(64, step.shape[1], -1).abs() / step
    # The symmetric 4-bit form has no +8, so the numbers at its far end may lose a whole step.
    assert float(lost.max()) <= (1.05 if config.bits == 4 and config.symmetric else 0.52)


def test_zeros_and_tiny_numbers():
    weight = torch.zeros(32, 64)
    weight[1, 3] = 1e-42
    for config, _ in BOUNDS[:3]:
        leaf = QuantizedLinear(64, 32, config, bias=False)
        leaf.fill(quantize(weight, config))
        assert torch.equal(leaf.dequantized(), torch.zeros(32, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("config", [config for config, _ in BOUNDS[:3]])
def test_numbers_that_are_none_are_named(bad, config):
    weight = torch.randn(64, 64)
    weight[40, 7] = bad
    with pytest.raises(WeightsError, match=r"no finite numbers \(a.b.weight, output 40, input 7\)"):
        quantize(weight, config, key="a.b.weight")


def test_a_tensor_without_values_is_refused():
    with pytest.raises(WeightsError, match=r"without values.*a.weight.*meta"):
        quantize(torch.empty(64, 64, device="meta"), scheme(), key="a.weight")


# -- layouts and kernels --------------------------------------------------------------------------


def test_nibbles():
    q = torch.randint(0, 16, (6, 10), dtype=torch.uint8)
    packed = pack_nibbles(q)
    assert packed.tolist() == [[int(a) | int(b) << 4 for a, b in row.view(-1, 2)] for row in q]
    assert torch.equal(unpack_nibbles(packed), q.view(torch.int8))


needs_kernel = pytest.mark.skipif(kernel_block() is None, reason="this CPU's int4pack layout is not known")


@needs_kernel
@pytest.mark.parametrize("rows", [16, 48, 64, 80, 144, 256])
def test_kernel_layout_and_back(rows):
    q = torch.randint(0, 16, (rows, 64), dtype=torch.uint8)
    packed = to_kernel_layout(pack_nibbles(q))
    assert packed.shape == (rows, 32)
    assert torch.equal(from_kernel_layout(packed), q.view(torch.int8))
    # Torch's own packer, from whose results the layout is recognised.
    want = torch._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    assert torch.equal(packed.view(-1), want.view(-1))


@needs_kernel
@pytest.mark.parametrize("config", [config for config, _ in BOUNDS if config.bits == 4])
@pytest.mark.parametrize("rows", [16, 144, 256])
@pytest.mark.parametrize("tile", [1 << 12, 1 << 18])
def test_quantizing_into_the_kernels_layout(config, rows, tile, monkeypatch):
    monkeypatch.setattr("pretrained.torch.rounding.TILE", tile)
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    stored, ready = quantize(weight, config), quantize(weight, config, for_kernel=True)
    assert torch.equal(ready.weight, to_kernel_layout(stored.weight))
    assert torch.equal(ready.scale, stored.scale)
    assert stored.zero is None or torch.equal(ready.zero, stored.zero)
    leaf = QuantizedLinear(256, rows, config, bias=False)
    leaf.fill(ready)
    assert leaf.kernel(torch.ones(1, 256)) == "int4pack"
    state = leaf.state_dict()
    assert torch.equal(state["weight"], stored.weight) and torch.equal(state["weight_scale"], stored.scale)


@pytest.mark.parametrize("config", [config for config, _ in BOUNDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_layer_is_its_dequantized_weight(config, dtype, rows):
    torch.manual_seed(0)
    plain = nn.Linear(256, 80).to(dtype)
    leaf = QuantizedLinear(256, 80, config, dtype=dtype)
    leaf.fill(quantize(plain.weight, config))
    leaf.bias.data = plain.bias.data
    x = torch.randn(2, rows, 256).to(dtype)
    want = nn.functional.linear(x.float(), torch.from_numpy(by_the_book(leaf)), plain.bias.float())
    for ready in (False, True):
        if ready:
            leaf.use_kernel_layout()
        out = leaf(x)
        assert out.dtype == dtype and out.shape == (2, rows, 80)
        # Numbers of 8 significant bits lose 0.2% on average; weights, inputs and results are rounded.
        assert distance(out, want) < 0.006
    exact = QuantizedLinear(256, 80, QuantizationConfig(**config.to_dict() | EXACT), dtype=dtype)
    exact.load_state_dict(leaf.state_dict())
    assert distance(exact(x), want) < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("config", [config for config, _ in BOUNDS[:3]])
def test_kernels_are_used_where_they_can_be(config):
    leaf = QuantizedLinear(256, 80, config)
    leaf.fill(quantize(torch.randn(80, 256), config))
    x = torch.randn(4, 256)
    assert leaf.kernel(x) == ("int8pack" if config.bits == 8 else None)
    assert leaf.use_kernel_layout() == (config.bits == 8 or kernel_block() is not None)
    assert leaf.kernel(x) == ("int8pack" if config.bits == 8 else "int4pack" if kernel_block() else None)
    assert leaf.kernel(torch.randn(100, 256)) is None
    leaf.use_stored_layout()
    assert not QuantizedLinear(24, 80, scheme("int8")).use_kernel_layout()


def test_the_int8_kernel_is_given_no_address_that_it_cannot_read():
    config = scheme("int8")
    packed = quantize(torch.randn(64, 64), config)
    leaf = QuantizedLinear(64, 64, config, bias=False)
    leaf.fill(packed)
    raw = torch.empty(64 * 64 + 64, dtype=torch.int8)
    start = (-raw.data_ptr()) % 16 + 1
    odd = raw[start : start + 64 * 64].view(64, 64).copy_(packed.weight)
    leaf.weight.data = odd
    x = torch.randn(2, 64)
    assert leaf.kernel(x) is None
    slow = leaf(x)
    assert leaf.use_kernel_layout() and leaf.kernel(x) == "int8pack"
    assert distance(leaf(x), slow) < 0.006


@needs_kernel
@pytest.mark.parametrize("config", [config for config, _ in BOUNDS[1:3]])
def test_kernel_layout_shows_nowhere(config):
    leaf = QuantizedLinear(64, 80, config, bias=False)
    leaf.fill(quantize(torch.randn(80, 64), config))
    before = {name: value.clone() for name, value in leaf.state_dict().items()}
    dense = leaf.dequantized()
    assert leaf.use_kernel_layout()
    assert all(torch.equal(before[name], value) for name, value in leaf.state_dict().items())
    assert torch.equal(leaf.dequantized(), dense)
    assert torch.equal(leaf.rows(slice(10, 70), torch.float32), dense[10:70])
    assert torch.equal(leaf.rows(torch.tensor([3, 79]), torch.float32), dense[[3, 79]])
    leaf.load_state_dict(before)
    assert torch.equal(leaf.dequantized(), dense) and leaf.kernel(torch.ones(1, 64)) == "int4pack"
    nn.Sequential(leaf).half()
    assert leaf.weight_scale.dtype == torch.bfloat16
    assert torch.equal(leaf.dequantized(), dense)


@pytest.mark.parametrize("config", [config for config, _ in BOUNDS[:3]])
def test_gradients_flow_through_to_the_input(config):
    leaf = QuantizedLinear(64, 32, config)
    leaf.fill(quantize(torch.randn(32, 64), config))
    leaf.bias.data.zero_()
    leaf.use_kernel_layout()
    x = torch.randn(5, 64, requires_grad=True)
    seed = torch.randn(5, 32)
    leaf(x).backward(seed)
    assert torch.allclose(x.grad, seed @ torch.from_numpy(by_the_book(leaf)), atol=1e-5)
    assert torch.allclose(leaf.bias.grad, seed.sum(0), atol=1e-5)
    assert leaf.weight.grad is None


# -- which layers ---------------------------------------------------------------------------------


def test_the_body_is_quantized_and_nothing_else(saved):
    model, _ = saved
    chosen = select(model, scheme("int8"))
    dense = [p for p, m in model.base_model.named_modules() if type(m) in (nn.Linear, Conv1D)]
    head = model.get_output_embeddings()
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    assert set(chosen) == {prefix + path for path in dense if model.get_submodule(prefix + path) is not head}
    assert not any("norm" in path.lower() for path in chosen)


def test_skipping(llama, caplog):
    model, _ = llama
    chosen = select(model, scheme("int4", skip_modules=("layers.0", "*.o_proj", "nothing")))
    assert sorted({path.split(".")[2] for path in chosen}) == ["1"]
    assert not any(path.endswith("o_proj") for path in chosen)
    assert "no module of LlamaForCausalLM is called 'nothing'" in caplog.text


def test_groups_that_do_not_divide_are_named(llama):
    _, folder = llama
    with pytest.raises(
        ArgumentError, match=r"2 layers do not divide into groups of 64.*mlp.down_proj \(96\)"
    ):
        LlamaForCausalLM.from_pretrained(folder, quantization_config={**INT4, "group_size": 64})
    config = {**INT4, "group_size": 64, "skip_modules": ["down_proj"]}
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear


def test_a_new_head_is_not_quantized(tmp_path):
    family(BertForMaskedLM).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config={**INT8, "quantize_head": True}, num_labels=3
    )
    assert type(model.classifier) is nn.Linear
    assert model.is_quantized


def test_weights_kept_in_float32_stay_so(tmp_path):
    family(T5ForConditionalGeneration).save_pretrained(tmp_path)
    half = T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=INT8, dtype=torch.float16)
    wo = half.encoder.block[0].layer[-1].DenseReluDense.wo
    assert type(wo) is nn.Linear and wo.weight.dtype == torch.float32
    whole = T5ForConditionalGeneration.from_pretrained(tmp_path, quantization_config=INT8)
    assert type(whole.encoder.block[0].layer[-1].DenseReluDense.wo) is QuantizedLinear


# -- whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SCHEMES, ids=lambda config: "-".join(map(str, config.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_reload_dequantize(saved, tmp_path, config, dtype, monkeypatch):
    plain, folder = saved
    cls = type(plain)
    model = cls.from_pretrained(folder, quantization_config=config, dtype=dtype)
    assert model.is_quantized and model.quantization_method == config["quant_method"]
    assert model.dtype == dtype and not model.training
    assert model.num_parameters() == plain.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.get_memory_footprint() < plain.get_memory_footprint() / (4 / dtype.itemsize)
    out = logits(model)
    # The worst layer loses 10%; the error of a stack of two blocks is of the same order.
    assert distance(out, logits(plain)) < (0.03 if config["quant_method"] == "int8" else 0.25)
    path, error = model.load_report.worst_quantized
    assert path in quantized_leaves(model) and error < (0.01 if config["quant_method"] == "int8" else 0.1)
    assert f"largest relative error {error:.2%}" in str(model.load_report)

    model.save_pretrained(tmp_path / "q", max_shard_size="40kB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 1
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == config["quant_method"]
    with monkeypatch.context() as patched:
        patched.setattr(quantizing, "quantize", lambda *_, **__: pytest.fail("quantized again"))
        again = cls.from_pretrained(tmp_path / "q", dtype=dtype)
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    for name, value in again.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    assert torch.equal(logits(again), out)
    again.save_pretrained(tmp_path / "q2", max_shard_size="40kB")
    for file in (tmp_path / "q").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "q2" / file.name).read_bytes()

    leaves = {path: by_the_book(leaf) for path, leaf in quantized_leaves(model).items()}
    assert model.dequantize(torch.float32) is model and not model.is_quantized
    for path, weight in leaves.items():
        module = model.get_submodule(path)
        assert type(module) is type(plain.get_submodule(path))
        got = module.weight.t() if isinstance(module, Conv1D) else module.weight
        assert np.array_equal(got.detach().numpy(), weight), path
    for alias, owner in model.ties().items():
        assert model.get_parameter(alias) is model.get_parameter(owner)
    assert "quantization_config" not in model.config.to_dict()
    assert distance(logits(model), out) < 0.03


@pytest.mark.parametrize("config", [INT8, INT4, {**INT4, "symmetric": False}])
def test_computing_in_float32_is_the_dequantized_model(saved, config):
    plain, folder = saved
    model = type(plain).from_pretrained(folder, quantization_config={**config, **EXACT})
    out = logits(model)
    assert distance(out, logits(model.dequantize())) < 1e-5


def test_generation(saved):
    plain, folder = saved
    if not plain.can_generate():
        pytest.skip("encoder")
    model = type(plain).from_pretrained(folder, quantization_config=INT4)
    out = model.generate(IDS, max_new_tokens=6, do_sample=False)
    twin = type(plain).from_pretrained(folder, quantization_config=INT4).dequantize()
    assert out.shape == twin.generate(IDS, max_new_tokens=6, do_sample=False).shape
    assert torch.equal(out, model.generate(IDS, max_new_tokens=6, do_sample=False))


def test_a_tied_head_goes_with_its_embedding(tmp_path):
    model = family(GPT2LMHeadModel)
    model.save_pretrained(tmp_path / "plain")
    kept = GPT2LMHeadModel.from_pretrained(tmp_path / "plain", quantization_config=INT4)
    assert kept.lm_head.weight is kept.transformer.wte.weight and kept.lm_head.weight.is_floating_point()
    model = GPT2LMHeadModel.from_pretrained(
        tmp_path / "plain", quantization_config={**INT4, "quantize_head": True}
    )
    head, embedding = model.lm_head, model.transformer.wte
    assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
    assert head.weight.dtype == torch.int8
    with pytest.raises(ArgumentError, match=r"quantized in one place and skipped in another.*lm_head"):
        select(family(GPT2LMHeadModel), scheme("int8", quantize_head=True, skip_modules=("lm_head",)))


def test_the_headless_class_of_a_quantized_checkpoint(llama, tmp_path):
    _, folder = llama
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=INT4)
    model.save_pretrained(tmp_path / "q")
    body = LlamaModel.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(body(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_aliases_state_dicts_and_device_maps(llama):
    plain, folder = llama
    four = LlamaForCausalLM.from_pretrained(folder, load_in_4bit=True)
    eight = LlamaForCausalLM.from_pretrained(folder, load_in_8bit=True, device_map="auto")
    assert (four.quantization_method, eight.quantization_method) == ("int4", "int8")
    assert eight.hf_device_map == {"": "cpu"}
    given = LlamaForCausalLM.from_pretrained(
        None, config=plain.config, state_dict=plain.state_dict(), quantization_config=INT4
    )
    assert torch.equal(logits(given), logits(four))


def test_quantizing_a_model_that_is_there(llama):
    plain, folder = llama
    errors = quantize_model(plain, scheme("int4"))
    assert set(errors) == set(quantized_leaves(plain))
    twin = LlamaForCausalLM.from_pretrained(folder, quantization_config=INT4)
    assert torch.equal(logits(plain), logits(twin))


# -- refusals -------------------------------------------------------------------------------------


def test_casts_are_refused_and_moves_are_not(llama):
    _, folder = llama
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=INT4)
    out = logits(model)
    for cast in (
        model.half,
        model.float,
        model.bfloat16,
        model.double,
        lambda: model.to(torch.float16),
        lambda: model.to("cpu", torch.float32),
        lambda: model.to(dtype=torch.bfloat16),
        lambda: model.type(torch.float32),
    ):
        with pytest.raises(ValueError, match=r"cannot be cast.*Pass dtype= to.*dequantize\(\)"):
            cast()
    assert torch.equal(logits(model.to("cpu")), out)
    assert model.dequantize().half().dtype == torch.float16
    with pytest.raises(ArgumentError, match=r"LlamaForCausalLM is not quantized"):
        model.dequantize()


def test_nan_in_a_file_is_named(llama, tmp_path):
    plain, _ = llama
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    plain.save_pretrained(tmp_path / "nan")
    with pytest.raises(WeightsError, match=r"layers.1.mlp.up_proj.weight, output 3, input 4"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nan", quantization_config=INT8)


def test_quantized_checkpoints_that_do_not_hold_together(llama, tmp_path):
    _, folder = llama
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=INT4)
    model.save_pretrained(tmp_path / "q")
    with pytest.raises(ArgumentError, match=r"quantized already.*expected int4, found int8.*dequantize"):
        LlamaForCausalLM.from_pretrained(tmp_path / "q", quantization_config=INT8)
    state = dict(model.state_dict())
    state["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(96, dtype=torch.bfloat16)
    with pytest.raises(WeightsError, match=r"in no form that a quantized layer is saved in.*up_proj.weight"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    text = (tmp_path / "q" / "config.json").read_text()
    (folder / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"says that the weights are quantized \(int4\).*plain ones"):
        LlamaForCausalLM.from_pretrained(folder)


def test_a_gguf_scheme_needs_a_gguf_file(llama):
    _, folder = llama
    with pytest.raises(
        ArgumentError, match=r"keeps the blocks of a GGUF file, and this is none.*safetensors"
    ):
        LlamaForCausalLM.from_pretrained(folder, quantization_config={"quant_method": "gguf"})


# -- real weights ---------------------------------------------------------------------------------


def slow_and_real(test):
    return pytest.mark.realweights(pytest.mark.slow(test))


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def packed(smollm2_gguf):
    return AutoModelForCausalLM.from_pretrained(smollm2_gguf, quantization_config={"quant_method": "gguf"})


@pytest.fixture(scope="module")
def inputs(smollm2_gguf):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return tokenizer, ids


@slow_and_real
def test_blocks_stay_as_they_are(packed, smollm2_gguf):
    assert packed.num_parameters() == 134_515_008
    assert packed.get_memory_footprint() < smollm2_gguf.stat().st_size
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert packed.model.layers[3].mlp.up_proj.scheme == "q4_1"


@slow_and_real
def test_logits_are_those_of_the_dequantized_load(packed, inputs, smollm2_gguf):
    plain = AutoModelForCausalLM.from_pretrained(smollm2_gguf)
    with torch.no_grad():
        assert torch.allclose(packed(**inputs[1]).logits, plain(**inputs[1]).logits, atol=1e-4, rtol=1e-5)
    for path, leaf in list(quantized_leaves(packed).items())[:8]:
        assert torch.equal(leaf.dequantized(), plain.get_submodule(path).weight), path


@slow_and_real
def test_it_knows_the_capital_of_france(packed, inputs):
    tokenizer, ids = inputs
    output = packed.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


@slow_and_real
def test_in_bfloat16_it_runs_on_the_kernel(packed, inputs, smollm2_gguf, tmp_path):
    config = {"quant_method": "gguf"}
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf, quantization_config=config, dtype="bfloat16")
    if kernel_block() is not None:
        assert model.get_memory_footprint() > 1.8 * packed.get_memory_footprint()
        assert all(leaf.hidden_nbytes for leaf in quantized_leaves(model).values() if hasattr(leaf, "bias"))
    plain = AutoModelForCausalLM.from_pretrained(smollm2_gguf, dtype="bfloat16")
    with torch.no_grad():
        want = packed(**inputs[1]).logits
        assert (
            distance(model(**inputs[1]).logits, want) < 1.5 * distance(plain(**inputs[1]).logits, want) + 0.01
        )
    tokenizer, ids = inputs
    output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    model.save_pretrained(tmp_path / "kernel")
    packed.save_pretrained(tmp_path / "exact")
    for file in (tmp_path / "exact").glob("*.safetensors"):
        # Norms are saved in the model's dtype.
        assert abs((tmp_path / "kernel" / file.name).stat().st_size - file.stat().st_size) < 200_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kernel", dtype="bfloat16")
    with torch.no_grad():
        assert torch.equal(again(**inputs[1]).logits, model(**inputs[1]).logits)


@slow_and_real
def test_it_is_saved_and_comes_back(packed, inputs, tmp_path):
    packed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.quantization_method == "gguf"
    with torch.no_grad():
        assert torch.equal(again(**inputs[1]).logits, packed(**inputs[1]).logits)
