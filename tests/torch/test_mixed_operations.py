# SPDX-License-Identifier: Apache-2.0
"""What can be done to a model in each state: it works, or is refused before anything is touched.

The table is in docs/PLACEMENT.md.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pretrained import ArgumentError, LlamaForCausalLM, PlacementError
from pretrained.torch import load as loading
from pretrained.torch.dispatch import Homes, attach
from pretrained.torch.offload import DiskWeights
from pretrained.torch.quantize import quantized_leaves
from support import gguf_files

CONFIG = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
INT8 = {"quant_method": "int8", "quantize_head": True}
SCHEMES = {"plain": None, "int8": INT8, "int4": {"quant_method": "int4"}, "gguf": {"quant_method": "gguf"}}
PLACES = {"resident": None, "disk": "disk", "mixed": {"": "cpu", "model.layers.0": "disk"}}
AWAY = ("disk", "mixed")
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
FITS_NOT = r"weights on disk do not fit into memory.*found 10 B.*Load the model again"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaForCausalLM.config_class(**CONFIG)).eval()
    model.save_pretrained(folder / "plain")
    return {"gguf": gguf_files.write_gguf(model, folder / "m.gguf"), "": folder / "plain", "copies": folder}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture
def load(sources):
    def make(scheme, place):
        return LlamaForCausalLM.from_pretrained(
            sources.get(scheme, sources[""]),
            quantization_config=SCHEMES[scheme],
            device_map=PLACES[place],
            offload_folder=sources["copies"] / "copies",
        )

    return make


@pytest.fixture
def model(load, scheme, place):
    return load(scheme, place)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def facts(model):
    """What a refusal must leave as it was."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return state, flags, hooks(model), getattr(model, "hf_device_map", None), logits(model)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and one and isinstance(next(iter(one.values())), torch.Tensor):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return one == other


def unchanged(model, before):
    return all(same(one, other) for one, other in zip(facts(model), before, strict=True))


# -- moves and casts -----------------------------------------------------------------------------


def test_moving_reads_everything_in(model, place):
    expected = logits(model)
    assert model.to("cpu") is model
    assert not hooks(model)
    assert getattr(model, "hf_device_map", None) == ({"": "cpu"} if place in AWAY else None)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


CASTS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "to": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts(load, scheme, place, cast):
    model = load(scheme, place)
    if scheme == "plain":
        assert torch.equal(logits(CASTS[cast](model)), logits(CASTS[cast](load(scheme, "resident"))))
        assert not hooks(model)
        return
    before = facts(model)
    with pytest.raises(ArgumentError, match=r"quantized model cannot be cast.*dequantize\(\) first"):
        CASTS[cast](model)
    assert unchanged(model, before)


@pytest.mark.parametrize("place", AWAY)
@pytest.mark.parametrize("move", [CASTS["double"], lambda model: model.dequantize()], ids=["double", "plain"])
def test_what_does_not_fit_is_refused(load, place, move, monkeypatch):
    model = load("int4" if move is not CASTS["double"] else "plain", place)
    before = facts(model)
    monkeypatch.setattr("pretrained.torch.dispatch.available_host_memory", lambda: 10)
    with pytest.raises(PlacementError, match=FITS_NOT):
        move(model)
    assert unchanged(model, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to move to")
def test_a_device_that_is_not_there_changes_nothing(model):
    before = facts(model)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        model.cuda()
    assert unchanged(model, before)


def test_dequantizing(load, scheme, place):
    if scheme == "plain":
        with pytest.raises(ArgumentError, match="is not quantized"):
            load(scheme, place).dequantize()
        return
    model, resident = load(scheme, place), load(scheme, "resident").dequantize()
    assert model.dequantize() is model
    assert not model.is_quantized and not hooks(model)
    assert getattr(model, "hf_device_map", None) == ({"": "cpu"} if place in AWAY else None)
    assert same(model.state_dict(), resident.state_dict())
    assert torch.equal(logits(model), logits(resident))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.half().dtype == torch.float16


# -- training ------------------------------------------------------------------------------------


def test_training(model, scheme, place):
    before = facts(model)
    assert model.train().training
    assert torch.equal(logits(model), before[-1])
    if place in AWAY:
        with pytest.raises(ArgumentError, match=r"placed on disk cannot be trained.*requires_grad_\(False\)"):
            model(IDS)
    model.requires_grad_(False)
    assert torch.equal(model(IDS).logits, before[-1])
    if scheme != "plain":
        with pytest.raises(
            ArgumentError, match=r"integers of a quantized model cannot be trained.*Call it on"
        ):
            model.requires_grad_(True)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model.model.norm.requires_grad_(True)
    if place != "disk":
        model(IDS).logits.sum().backward()
        assert model.model.norm.weight.grad.any()


# -- values --------------------------------------------------------------------------------------


def test_state_dicts_come_and_go(load, scheme, place):
    model = load(scheme, place)
    state = model.state_dict()
    assert same(state, load(scheme, "resident").state_dict())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = {key: value.clone() for key, value in torch.load(file).items()}
    norm = "model.layers.0.input_layernorm.weight"
    other[norm] += 1
    assert not model.load_state_dict(other).missing_keys
    expected = load(scheme, "resident")
    expected.load_state_dict(other)
    assert torch.equal(logits(model), logits(expected))
    # Twice: what was edited is kept when its layer has run.
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(model.state_dict()[norm], other[norm])


@pytest.mark.parametrize("scheme", ["int8", "int4", "gguf"])
def test_plain_values_for_a_quantized_model_are_refused(load, scheme, place):
    model, plain = load(scheme, place), load("plain", "resident").state_dict()
    before = facts(model)
    with pytest.raises(
        ArgumentError, match=r"state dict is not.*expected torch.u?int8.*quantization_config="
    ):
        model.load_state_dict({key: value + 1 for key, value in plain.items()})
    assert unchanged(model, before)


# -- copies --------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.save(model, io.BytesIO()) or model,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(model, place, way):
    before = facts(model)
    if place == "resident":
        again = COPIES[way](model)
        assert unchanged(again, before)
        assert len(quantized_leaves(again)) == len(quantized_leaves(model))
    else:
        with pytest.raises(ArgumentError, match=r"placed over several homes cannot be .*model\.to\('cpu'\)"):
            COPIES[way](model)
    assert unchanged(model, before)


# -- sizes ---------------------------------------------------------------------------------------


def test_a_plan_counts_what_is_stored_and_ties_once(load, scheme, monkeypatch):
    seen = []

    def spy(device_map, skeleton, sizes, **arguments):
        seen.append(dict(sizes))
        return place_it(device_map, skeleton, sizes, **arguments)

    place_it = loading.place
    monkeypatch.setattr(loading, "place", spy)
    model = load(scheme, "disk")
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sum(seen[0].values()) == sum(stored.values())
    assert seen[0]["model.embed_tokens.weight"] == model.model.embed_tokens.weight.nbytes


# -- ties over several devices -------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)))


def test_a_tied_weight_runs_where_its_owner_lives():
    # "meta" stands for an accelerator that the map gives to the head, whose weight lives on the CPU.
    model, devices = Tied(), []
    homes = Homes({"": "cpu", "head": "meta"}, torch.device("cpu"), ties={"head.weight": "embed.weight"})
    assert homes.home("head.weight") == "cpu" and homes.execution("head.weight") == torch.device("cpu")
    attach(model, homes, DiskWeights())
    model.head.register_forward_pre_hook(lambda module, args: devices.append(args[0].device.type))
    assert model(torch.arange(3)[None]).device.type == "cpu"
    assert devices == ["cpu"]
