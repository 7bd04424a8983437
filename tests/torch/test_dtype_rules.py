# SPDX-License-Identifier: Apache-2.0
"""What dtype each tensor gets, whatever way it comes: by load, by cast, from mixed files, on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrained.torch.models.llama import LlamaForCausalLM
from support.cases import CASES
from support.checkpoints import Folder, tiny_llama

IDS = torch.tensor([[3, 4, 5]])
FAMILIES = {case.model_class.__name__.partition("For")[0]: case for case in CASES if "For" in case.name}


def dtypes_of(model):
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_load_in_a_dtype_is_a_load_and_a_cast(tmp_path, family, dtype):
    """Bit for bit, buffers too. Only T5's float16 differs: a cast that was asked for is done to all of it."""
    case = FAMILIES[family]
    if dtype == torch.float16 and case.model_class._keep_in_fp32_modules:
        pytest.skip("a load keeps some weights in float32")
    torch.manual_seed(0)
    model = case.model_class(case.model_class.config_class(**case.config))
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    cast = case.model_class.from_pretrained(tmp_path).to(dtype)
    assert dtypes_of(loaded) == dtypes_of(cast)
    held = {**dict(cast.named_parameters()), **dict(cast.named_buffers())}
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert torch.equal(tensor, held[name]), name


STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("asked", [None, "auto", "float32", "bfloat16", torch.float16])
@pytest.mark.parametrize("said", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("first", STORED)
def test_which_dtype_comes_out(tmp_path, first, said, asked):
    """Files that mix dtypes, a config that says one of its own, and what the call asks for."""
    folder = Folder(tmp_path / "model")
    keys = sorted(load_file(folder.weights))
    start = STORED.index(first)
    stored = {key: STORED[(start + at) % 4] for at, key in enumerate(keys)}
    values = {key: value.to(stored[key]) for key, value in load_file(folder.weights).items()}
    save_file(values, folder.weights, {"format": "pt"})
    folder.config("dtype", "torch_dtype")
    if said is not None:
        folder.config(dtype=said)
    model = LlamaForCausalLM.from_pretrained(folder.path, dtype=asked)
    # safetensors writes the widest first.
    in_file = torch.float64
    wanted = {
        None: torch.float32,
        "auto": in_file if said is None else getattr(torch, said),
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        torch.float16: torch.float16,
    }[asked]
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model.config.dtype == str(wanted).removeprefix("torch.")
    for key, value in values.items():
        assert torch.equal(model.get_parameter(key), value.to(wanted)), key
    report = model.load_report.dtypes
    assert {stored for stored, _ in report} == {"float32", "bfloat16", "float16", "float64"}
    assert sum(report.values()) == len(keys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_go_straight_from_the_file_to_their_dtype(tmp_path, dtype):
    """A float64 weight just above a tie rounds otherwise by way of float32."""
    folder = Folder(tmp_path / "model")
    ulp = torch.finfo(getattr(torch, dtype)).eps
    value = torch.tensor(1 + ulp / 2 + 2.0**-40, dtype=torch.float64)
    folder.tensors(**{"model__norm__weight": value.expand(16).clone()})
    model = LlamaForCausalLM.from_pretrained(folder.path, dtype=dtype)
    assert model.model.norm.weight[0].double() == value.to(getattr(torch, dtype)).double()


def test_rotary_tables_are_float32_whatever_happens(tmp_path):
    folder = Folder(tmp_path / "model")
    wanted = tiny_llama().model.rotary_emb.inv_freq
    model = LlamaForCausalLM.from_pretrained(folder.path, dtype="bfloat16")
    for change in (lambda m: m, lambda m: m.half(), lambda m: m.bfloat16().float(), lambda m: m.to("cpu")):
        model = change(model)
        assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = LlamaForCausalLM(tiny_llama().config)
        loaded = LlamaForCausalLM.from_pretrained(folder.path)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (built, loaded):
        assert torch.equal(model.model.rotary_emb.inv_freq, wanted)


# -- nothing is done twice -------------------------------------------------------------------------


def test_nothing_is_written_where_nothing_changes(tmp_path):
    folder, offload = Folder(tmp_path / "model"), tmp_path / "off"
    LlamaForCausalLM.from_pretrained(folder.path, device_map="disk", offload_folder=offload)(IDS)
    assert not offload.exists() or not any(offload.iterdir())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_was_rounded_once_is_not_rounded_again(tmp_path, monkeypatch, scheme):
    """Not until the source changes, which is refused, or the scheme does."""
    from pretrained.torch.quantizers import rounding

    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder, rounded = Folder(tmp_path / "model", tiny_llama(**wide)), []
    real = rounding.quantize
    monkeypatch.setattr(rounding, "quantize", lambda *a, **k: (rounded.append(k), real(*a, **k))[1])

    def load(**config):
        rounded.clear()
        return LlamaForCausalLM.from_pretrained(
            folder.path,
            device_map="disk",
            offload_folder=tmp_path / "off",
            quantization_config={"quant_method": scheme, **config},
        )

    first = load()
    assert len(rounded) == 14
    again = load()
    assert rounded == []
    assert torch.equal(first(IDS).logits, again(IDS).logits)
    assert first.load_report.quantized == again.load_report.quantized
    load(skip_modules=["o_proj"])
    assert rounded == []
    if scheme == "int4":
        load(group_size=64)
        assert len(rounded) == 14


def test_a_weight_on_disk_is_a_tensor_like_any_other(tmp_path):
    folder = Folder(tmp_path / "model")
    disk = LlamaForCausalLM.from_pretrained(folder.path, device_map="disk")
    for key, value in tiny_llama().named_parameters():
        weight = disk.get_parameter(key)
        assert torch.equal(weight[1:3], value[1:3])
        assert torch.equal(weight + 1, value + 1)
        assert torch.equal(weight.sum(-1), value.sum(-1))
        assert weight.tolist() == value.tolist()
        if value.ndim == 2:
            x = torch.ones(2, value.shape[1])
            assert torch.equal(nn_linear(x, weight), nn_linear(x, value))
    assert json.dumps(disk.hf_device_map) == '{"": "disk"}'


def nn_linear(x, weight):
    return torch.nn.functional.linear(x, weight)
