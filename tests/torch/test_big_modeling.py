# SPDX-License-Identifier: Apache-2.0
"""Loading and placing modules that are not this library's, against accelerate where it says the same."""

import gc
import threading

import accelerate
import pytest
import torch
import transformers
from accelerate import utils as oracle
from safetensors.torch import save_file
from torch import nn

from pretrained.errors import ArgumentError, NotYetError, PlacementError, WeightsError
from pretrained.torch import big_modeling as ours
from pretrained.torch.device_maps import skeleton_of_any


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A user's module: a list of blocks, a tie, buffers of both kinds, a weight used by its parent."""

    def __init__(self, width=64, vocabulary=50):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width))])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 2.0))
        self.register_buffer("positions", torch.arange(width).float() / width, persistent=False)

    def forward(self, ids):
        x = self.embed(ids) * self.scale + self.positions + self.bias[0]
        for block in self.blocks:
            x = block(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


IDS = torch.arange(12).view(2, 6)
MAPS = {
    "cpu": {"": "cpu"},
    "disk": {"": "disk"},
    "mixed": {"": "cpu", "blocks.1": "disk", "attention": "disk", "bias": "disk", "scale": "disk"},
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def checkpoint(net, tmp_path):
    tensors = net.state_dict()
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def empty_net():
    with ours.init_empty_weights():
        return Net().eval()


# -- building without memory ---------------------------------------------------------------------


def test_empty_weights_have_no_memory_and_buffers_keep_their_values():
    model = empty_net()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.positions, torch.arange(64).float() / 64)


def test_include_buffers_builds_them_without_memory():
    with ours.init_empty_weights(include_buffers=True):
        model = Net()
    assert all(buffer.is_meta for buffer in model.buffers())


def test_building_empty_leaves_other_threads_alone():
    made = {}

    def build():
        made["there"] = nn.Linear(2, 2).weight.device

    with ours.init_empty_weights():
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert made["there"].type == "cpu"
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_building_empty_ends_after_an_error():
    with pytest.raises(ZeroDivisionError), ours.init_empty_weights():
        raise ZeroDivisionError
    assert not nn.Linear(2, 2).weight.is_meta


# -- sizes and maps ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float16", torch.float16, torch.float64])
@pytest.mark.parametrize("buffers_only", [False, True])
def test_module_sizes_are_accelerates(net, dtype, buffers_only):
    for model in (net, nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))):
        expected = oracle.compute_module_sizes(model, dtype=dtype, buffers_only=buffers_only)
        assert ours.compute_module_sizes(model, dtype, buffers_only=buffers_only) == dict(expected)


def test_special_dtypes_are_accelerates(net):
    special = {"blocks.0.up.weight": torch.float32}
    expected = oracle.compute_module_sizes(net, dtype=torch.float16, special_dtypes=special)
    assert ours.compute_module_sizes(net, torch.float16, special) == dict(expected)


def test_max_memory_reads_amounts():
    assert ours.get_max_memory({"cpu": "1GB", 0: "3GiB", "cuda:1": 5}) == {0: 3 << 30, 1: 5, "cpu": 10**9}
    assert ours.get_max_memory()["cpu"] > 1 << 20


def test_inferred_maps_keep_budgets_and_blocks(net):
    sizes = ours.compute_module_sizes(net)
    block = sizes["blocks.0"]
    limit = sizes[""] // 2
    found = ours.infer_auto_device_map(net, {0: limit, "cpu": sizes[""]}, no_split_module_classes=["Block"])
    placed = [key for key, home in found.items() if home == 0]
    assert placed and sum(sizes.get(key, 0) for key in placed) + block <= limit
    assert not any(key.startswith("blocks.") and key.count(".") > 1 for key in found)
    assert "cpu" in found.values()


def test_inferred_map_of_what_fits_is_one_entry(net):
    assert ours.infer_auto_device_map(net) == {"": "cpu"} == oracle.infer_auto_device_map(net)


def test_an_unclean_map_has_an_entry_for_each_block(net):
    found = ours.infer_auto_device_map(net, clean_result=False, no_split_module_classes="Block")
    assert {"embed", "head", "blocks.0", "blocks.1", "blocks.2"} <= set(found)


def test_balanced_memory_gives_even_shares(net):
    total = ours.compute_module_sizes(net)[""]
    found = ours.get_balanced_memory(net, {0: total, 1: total, "cpu": total}, ["Block"])
    assert total / 2 <= found[0] < 0.8 * total
    assert found[1] == total
    low = ours.get_balanced_memory(net, {0: total, 1: total, "cpu": total}, ["Block"], low_zero=True)
    assert low[0] == 0
    device_map = ours.infer_auto_device_map(net, found, ["Block"])
    assert set(device_map.values()) == {0, 1}


def test_ties_are_found_by_identity(net):
    assert skeleton_of_any(net).ties == {"head.weight": "embed.weight"}


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("homes", MAPS)
def test_a_user_module_runs_from_a_checkpoint(net, checkpoint, homes):
    model = ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, device_map=MAPS[homes])
    assert model.hf_device_map == MAPS[homes] or homes == "mixed"
    with torch.no_grad():
        assert torch.equal(model(IDS), net(IDS))
        assert torch.equal(model(IDS), net(IDS))
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.blocks[1].up.weight, net.blocks[1].up.weight)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_planned_maps_run(net, checkpoint, device_map):
    budget = ours.compute_module_sizes(net)[""] * 2 // 3
    model = ours.load_checkpoint_and_dispatch(
        empty_net(), checkpoint, device_map, {"cpu": budget}, no_split_module_classes=["Block"]
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(model(IDS), net(IDS))


def test_weights_are_cast_into_the_offload_folder(net, checkpoint, tmp_path):
    folder = tmp_path / "offload"
    model = ours.load_checkpoint_and_dispatch(
        empty_net(), checkpoint, {"": "disk"}, offload_folder=folder, dtype=torch.bfloat16
    )
    assert model.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.embed.weight, net.embed.weight.bfloat16())
    with pytest.raises(PlacementError, match="need a converted copy"):
        ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, {"": "disk"}, dtype=torch.bfloat16)


def test_weights_take_the_models_dtype_where_none_is_asked(checkpoint):
    model = empty_net().half()
    ours.load_checkpoint_in_model(model, checkpoint)
    assert model.embed.weight.dtype == torch.float16
    assert model.embed.weight.device.type == "cpu"


def test_a_file_is_a_checkpoint_too(net, checkpoint):
    model = empty_net()
    ours.load_checkpoint_in_model(model, checkpoint / "model.safetensors", {"": "cpu"}, strict=True)
    assert torch.equal(model(IDS), net(IDS))


def test_strict_names_what_differs(net, tmp_path):
    save_file(
        {"blocks.0.up.weight": net.blocks[0].up.weight.detach(), "old": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(WeightsError, match=r"missing: .*blocks.*unexpected: old"):
        ours.load_checkpoint_in_model(empty_net(), tmp_path / "a.safetensors", strict=True)


def test_a_weight_without_values_is_an_error(net, tmp_path, caplog):
    save_file({"blocks.0.up.weight": net.blocks[0].up.weight.detach()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"weights of the model have no values .*embed.weight"):
        ours.load_checkpoint_and_dispatch(empty_net(), tmp_path / "a.safetensors", {"": "cpu"})
    assert "missing: " in caplog.text and "blocks.{1..2}.up.weight" in caplog.text


def test_incomplete_and_unknown_maps_are_refused_before_reading(checkpoint):
    with pytest.raises(PlacementError, match=r"attention"):
        ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, {"embed": "cpu", "blocks": "disk"})
    with pytest.raises(PlacementError, match="blokcs"):
        ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, {"": "cpu", "blokcs": "disk"})
    with pytest.raises(PlacementError, match="3"):
        ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, {"": 3})


@pytest.mark.parametrize(
    "argument", [{"offload_8bit_bnb": True}, {"broadcast_from_rank0": True}, {"full_state_dict": False}]
)
def test_what_is_not_offered_is_refused_by_name(checkpoint, argument):
    with pytest.raises(NotYetError, match=next(iter(argument))):
        ours.load_checkpoint_in_model(empty_net(), checkpoint, **argument)


# -- placing what is loaded ----------------------------------------------------------------------


def test_a_loaded_module_goes_to_disk_and_its_files_go_with_it(net, tmp_path):
    expected = net(IDS)
    model = ours.disk_offload(net, tmp_path / "offload")
    assert torch.equal(model(IDS), expected)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*memory*")) > 1000
    del model, net
    gc.collect()


def test_offloaded_files_are_removed_with_the_model(tmp_path):
    model = ours.disk_offload(Net().eval(), tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    del model
    gc.collect()
    assert not list(tmp_path.glob("*.safetensors"))


def test_cpu_offload_on_the_cpu_changes_nothing(net):
    expected = net(IDS)
    assert torch.equal(ours.cpu_offload(net)(IDS), expected)
    assert not net._forward_hooks


def test_dispatch_takes_values_from_a_state_dict(net):
    model = ours.dispatch_model(empty_net(), {"": "cpu"}, state_dict=net.state_dict())
    assert torch.equal(model(IDS), net(IDS))


def test_dispatch_can_be_repeated_with_another_map(net, checkpoint, tmp_path):
    model = ours.load_checkpoint_and_dispatch(empty_net(), checkpoint, {"": "disk"})
    ours.dispatch_model(model, {"": "cpu", "blocks": "disk"})
    assert torch.equal(model(IDS), net(IDS))
    assert model.hf_device_map == {"": "cpu", "blocks": "disk"}


def test_disk_without_a_folder_is_refused_before_anything_moves(net):
    with pytest.raises(ArgumentError, match=r"in memory now \(offload_dir\)"):
        ours.dispatch_model(net, {"": "disk"})
    assert not hasattr(net, "hf_device_map")


def test_an_offload_index_is_refused(net):
    with pytest.raises(NotYetError, match="offload_index"):
        ours.dispatch_model(net, {"": "cpu"}, offload_index={"a": "b"})


# -- a model of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"": "cpu", "model.layers.1": "disk"}, "auto"])
def test_a_transformers_model_runs_from_disk(tmp_path, device_map):
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    with ours.init_empty_weights():
        model = transformers.LlamaForCausalLM(config).eval()
    limit = {"cpu": 300_000} if device_map == "auto" else None
    ours.load_checkpoint_and_dispatch(
        model, tmp_path, device_map, limit, no_split_module_classes=model._no_split_modules
    )
    assert "disk" in model.hf_device_map.values()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, theirs(IDS).logits)
    sizes = accelerate.utils.compute_module_sizes(theirs)
    assert ours.compute_module_sizes(model) == dict(sizes)
