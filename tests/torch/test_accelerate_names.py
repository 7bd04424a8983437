# SPDX-License-Identifier: Apache-2.0
"""The functions named after accelerate's: their arguments, one by one, on a plain module and on one of
transformers, with accelerate as the oracle."""

import copy
import inspect
from collections import Counter

import accelerate
import pytest
import torch
import transformers
from accelerate import utils as oracle_utils
from safetensors.torch import save_file
from torch import nn

import pretrained
from pretrained.errors import PlacementError, WeightsError
from pretrained.torch.dispatch import disk_weights_of

NAMES = (
    "init_empty_weights",
    "infer_auto_device_map",
    "compute_module_sizes",
    "get_max_memory",
    "get_balanced_memory",
    "load_checkpoint_in_model",
    "load_checkpoint_and_dispatch",
    "dispatch_model",
    "cpu_offload",
    "disk_offload",
)
IDS = torch.arange(12).view(2, 6)


class Layer(nn.Module):
    """Uses a child's weight without calling the child."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.wo = nn.Linear(width, width)
        self.register_buffer("shift", torch.full((width,), 0.5))

    def forward(self, x):
        hidden = nn.functional.linear(x, self.inner.weight, self.inner.bias) + self.shift
        return x + self.wo(hidden.to(self.wo.weight.dtype)).to(x.dtype)


class Plain(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.embed = nn.Embedding(60, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(3))
        # One module under two names, and one parameter in two modules.
        self.again = self.layers[0]
        self.head = nn.Linear(width, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in (*self.layers, self.again):
            x = layer(x)
        return self.head(x)


def plain():
    return Plain().eval()


def theirs():
    config = transformers.T5Config(
        vocab_size=60, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


CASES = {"plain": (plain, "Layer"), "transformers": (theirs, "T5Block")}


class Case:
    def __init__(self, name, folder):
        self.build, self.block = CASES[name]
        torch.manual_seed(0)
        self.full, self.folder = self.build(), folder
        if name == "transformers":
            self.full.save_pretrained(folder)
        else:
            weights = self.full.state_dict()
            kept = {k: v for k, v in weights.items() if k != "head.weight" and not k.startswith("again.")}
            save_file(kept, folder / "model.safetensors")

    def empty(self):
        with pretrained.init_empty_weights():
            return self.build()

    def run(self, model):
        is_theirs = hasattr(model, "config")
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits if is_theirs else model(IDS)

    def matches(self, model):
        return torch.equal(self.run(model), self.run(self.full))


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    return Case(request.param, tmp_path)


def oracle(name):
    return getattr(accelerate, name, None) or getattr(oracle_utils, name)


# -- the surface ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_defaults_are_accelerates(name):
    def shape(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(pretrained, name)) == shape(oracle(name))


# -- plans ---------------------------------------------------------------------------------------


def test_an_empty_model_has_the_sizes_and_ties_of_the_full_one(case):
    empty = case.empty()
    assert all(parameter.is_meta for parameter in empty.parameters())
    sizes = pretrained.compute_module_sizes(case.full)
    assert (
        pretrained.compute_module_sizes(empty) == sizes == dict(oracle_utils.compute_module_sizes(case.full))
    )
    assert len(list(empty.parameters())) == len(list(case.full.parameters()))


def test_shared_parameters_count_once_and_share_a_home(case):
    sizes = pretrained.compute_module_sizes(case.full)
    unique = {id(t): t.nbytes for t in (*case.full.parameters(), *case.full.buffers())}
    assert sizes[""] == sum(unique.values())
    budgets = {0: sizes[""] * 2 // 3, "cpu": sizes[""]}
    device_map = pretrained.infer_auto_device_map(case.empty(), budgets, [case.block])
    assert set(device_map.values()) == {0, "cpu"}
    homes = {}
    for key, tensor in case.full.named_parameters(remove_duplicate=False):
        entry = max((path for path in device_map if f"{key}.".startswith(f"{path}.")), key=len)
        homes.setdefault(id(tensor), set()).add(device_map[entry])
    assert all(len(found) == 1 for found in homes.values())
    # No block is split, and what is offloaded could come back.
    assert not any(
        case.block in type(case.full.get_submodule(p.rpartition(".")[0])).__name__ for p in device_map
    )


def test_dtypes_change_the_plan(case):
    sizes = pretrained.compute_module_sizes(case.full)
    budgets = {0: sizes[""] * 6 // 10, "cpu": sizes[""]}
    model = case.empty()
    assert pretrained.infer_auto_device_map(model, budgets, [case.block], dtype=torch.float16) == {"": 0}
    special = {key: torch.float32 for key, _ in model.named_parameters(remove_duplicate=False)}
    wide = pretrained.infer_auto_device_map(
        model, budgets, [case.block], dtype="float16", special_dtypes=special
    )
    assert set(wide.values()) == {0, "cpu"}


def test_balanced_budgets_keep_their_bounds_as_accelerates_do(case):
    sizes = pretrained.compute_module_sizes(case.full)
    limits = {0: sizes[""], 1: sizes[""], "cpu": sizes[""]}
    ours = pretrained.get_balanced_memory(case.full, limits, [case.block])
    shares = oracle_utils.get_balanced_memory(case.full, dict(limits), no_split_module_classes=[case.block])
    assert set(ours) == set(shares) == set(limits)
    assert all(ours[home] <= limits[home] for home in ours)
    low = pretrained.get_balanced_memory(case.full, limits, [case.block], low_zero=True)
    assert low[0] == 0


def test_verbose_says_why(case, caplog):
    pretrained.infer_auto_device_map(case.full, verbose=True)
    assert "there is no accelerator, and everything fits" in caplog.text


# -- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, ["wo"]])
@pytest.mark.parametrize("dtype", [None, torch.float16, "bfloat16"])
def test_what_is_loaded_is_what_accelerate_loads(case, dtype, keep):
    ours, reference = case.empty(), copy.deepcopy(case.full)
    known = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    oracle("load_checkpoint_in_model")(
        reference, str(case.folder), {"": "cpu"}, dtype=known, keep_in_fp32_modules=keep
    )
    pretrained.load_checkpoint_in_model(
        ours, case.folder, {"": "cpu"}, dtype=dtype, keep_in_fp32_modules=keep, offload_state_dict=True
    )
    found, expected = ours.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    # A tied weight keeps its old dtype in the oracle where another name of it was not in the file.
    tied = Counter(id(tensor) for _, tensor in case.full.named_parameters(remove_duplicate=False))
    for key, tensor in case.full.named_parameters():
        kept = keep and known == torch.float16 and ".wo." in key
        assert found[key].dtype == (torch.float32 if kept else known or tensor.dtype), key
        assert torch.equal(found[key], tensor.to(found[key].dtype)), key
        if tied[id(tensor)] == 1:
            assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]), key
    assert len(list(ours.parameters())) == len(list(case.full.parameters()))


@pytest.mark.parametrize(
    ("homes", "offload_buffers"),
    [
        ("cpu", False),
        ("disk", True),
        ("mixed", False),
        ("mixed", True),
        ("auto", False),
        ("sequential", True),
    ],
)
def test_load_and_dispatch(case, homes, offload_buffers):
    first = next(path for path, m in case.full.named_modules() if type(m).__name__ == case.block)
    device_map = {"mixed": {"": "cpu", first: "disk"}, "cpu": {"": "cpu"}, "disk": {"": "disk"}}.get(
        homes, homes
    )
    total = pretrained.compute_module_sizes(case.full)[""]
    model = pretrained.load_checkpoint_and_dispatch(
        case.empty(),
        str(case.folder),
        device_map,
        {"cpu": total * 3 // 4} if isinstance(device_map, str) else None,
        no_split_module_classes=[case.block],
        offload_buffers=offload_buffers,
        offload_state_dict=True,
        preload_module_classes=[case.block],
        skip_keys="past_key_values",
        force_hooks=True,
    )
    assert case.matches(model) and case.matches(model)
    assert (disk_weights_of(model).nbytes > 0) == (homes != "cpu")


def test_strict_and_missing_values(case):
    model = case.empty()
    pretrained.load_checkpoint_in_model(model, case.folder, strict=True)
    assert case.matches(model)
    part = {"other": torch.zeros(1), **dict(list(case.full.state_dict().items())[:1])}
    save_file({key: value.clone() for key, value in part.items()}, case.folder / "part.safetensors")
    with pytest.raises(WeightsError, match="do not have the same weights"):
        pretrained.load_checkpoint_in_model(case.empty(), case.folder / "part.safetensors", strict=True)
    with pytest.raises(WeightsError, match="weights of the model have no values"):
        pretrained.load_checkpoint_and_dispatch(case.empty(), case.folder / "part.safetensors", {"": "cpu"})


# -- models that have their values ---------------------------------------------------------------


def test_dispatch_and_offload(case, tmp_path):
    model = pretrained.dispatch_model(
        copy.deepcopy(case.full), {"": "disk"}, main_device="cpu", offload_dir=tmp_path / "a"
    )
    assert case.matches(model) and model.hf_device_map == {"": "disk"}
    model = pretrained.disk_offload(
        copy.deepcopy(case.full), tmp_path / "b", offload_buffers=True, preload_module_classes=[case.block]
    )
    assert case.matches(model) and disk_weights_of(model).nbytes
    model = pretrained.cpu_offload(case.empty(), torch.device("cpu"), state_dict=case.full.state_dict())
    assert case.matches(model)


@pytest.mark.parametrize("call", ["dispatch_model", "cpu_offload", "disk_offload"])
def test_a_device_that_is_not_there(case, tmp_path, call):
    before = {key: value.clone() for key, value in case.full.state_dict().items()}
    words = {
        "dispatch_model": ({"": "cpu"}, "cuda:7"),
        "cpu_offload": (torch.device("cuda:7"),),
        "disk_offload": (tmp_path / "c", 7),
    }[call]
    where = "main_device" if call == "dispatch_model" else "execution_device"
    with pytest.raises(PlacementError, match=rf"There is no such device here \({where}\)"):
        getattr(pretrained, call)(case.full, *words)
    assert all(torch.equal(value, before[key]) for key, value in case.full.state_dict().items())
