# SPDX-License-Identifier: Apache-2.0
"""The planner's promises on random module trees and real shapes: nothing forgotten, split or overdrawn."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrained.arch.skeletons import config_of, skeleton_for, workload_for
from pretrained.core.budgets import accelerators_of, parse_budgets
from pretrained.core.placement import STRATEGIES, Workload, plan_placement
from pretrained.core.plan import LoadPolicy
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.core.units import covering, units_of, weight_sizes
from pretrained.errors import ArgumentError, PlacementError

T0PP = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
MB = 10**6


def planned(values, budgets, dtype="bfloat16", **arguments):
    config = config_of(values)
    skeleton = skeleton_for(config)
    sizes = weight_sizes(skeleton, LoadPolicy(dtype=dtype))
    return plan_placement(skeleton, sizes, parse_budgets(budgets), **arguments)


def row(*loads, blocks=True):
    """Return a skeleton and sizes of single-weight blocks."""
    keys = [f"b.{index}.w" for index in range(len(loads))]
    specs = {key: ParamSpec(key, (1,), key[:-2] if blocks else None) for key in keys}
    return Skeleton(specs), dict(zip(keys, loads, strict=True))


# -- properties ----------------------------------------------------------------------------------


@st.composite
def models(draw):
    """Draw a module tree with blocks, loose weights, buffers and ties, and its sizes."""
    specs, derived, sizes = {}, {}, {}
    for name in draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)):
        if draw(st.booleans()):
            sizes[f"{name}.loose"] = draw(st.integers(0, 20))
            specs[f"{name}.loose"] = ParamSpec(f"{name}.loose", (1,))
        for index in range(draw(st.integers(0, 3))):
            block = f"{name}.{index}" if draw(st.booleans()) else None
            for leaf in ("x.weight", "x.bias", "y.z.weight")[: draw(st.integers(1, 3))]:
                key = f"{name}.{index}.{leaf}"
                sizes[key] = draw(st.integers(0, 20))
                specs[key] = ParamSpec(key, (1,), block, is_buffer=leaf == "x.bias")
        if draw(st.booleans()):
            derived[f"{name}.rope.freq"] = ParamSpec(f"{name}.rope.freq", (2,), is_buffer=True)
    keys = list(specs)
    ties = {}
    for _ in range(draw(st.integers(0, 2))):
        if len(keys) > 1:
            alias, owner = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
            if alias != owner and owner not in ties and alias not in {*ties, *ties.values()}:
                ties[alias] = owner
                sizes[alias] = sizes[owner]
    return Skeleton(specs, ties, derived), sizes


BUDGETS = st.dictionaries(
    st.sampled_from([0, 1, 2, "cpu", "disk"]), st.one_of(st.none(), st.integers(0, 160)), max_size=5
)


@given(models(), BUDGETS, st.sampled_from(STRATEGIES), st.integers(0, 10), st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_every_placement_promises(model, budgets, strategy, activations, cached):
    skeleton, sizes = model
    budgets = parse_budgets(budgets)
    blocks = dict.fromkeys(spec.block for spec in skeleton.params.values() if spec.block)
    workload = Workload(dict.fromkeys(blocks, 3) if cached else {}, activations)
    try:
        found = plan_placement(skeleton, sizes, budgets, strategy=strategy, workload=workload)
    except PlacementError as error:
        assert error.mend
        return
    everything = {*skeleton.params, *skeleton.derived}
    # Every parameter and buffer has one home, and the short map says the same.
    assert set(found.homes) == everything
    assert {key: found.device_map[covering(key, found.device_map)] for key in everything} == found.homes
    # Blocks are whole, ties together.
    for block in blocks:
        assert len({home for key, home in found.homes.items() if key.startswith(f"{block}.")}) == 1
    assert all(found.homes[alias] == found.homes[owner] for alias, owner in skeleton.ties.items())
    # Weights are priced once, and no budget is overdrawn, with all that is kept free.
    own = sum(size for key, size in sizes.items() if key not in skeleton.ties)
    assert sum(room.weights for room in found.rooms) == own + 8 * len(skeleton.derived)
    assert all(room.free is None or room.free >= 0 for room in found.rooms)
    assert set(found.homes.values()) <= set(budgets)
    # What must come back has a place to come to.
    if found.offloaded:
        largest = max(block.nbytes for block in found.offloaded)
        fast = accelerators_of(found.homes.values())
        assert all(found.room(home).returning >= largest for home in {*fast, found.main})
    assert json.loads(json.dumps(found.to_dict()))["main"] == found.main
    assert all(block.reason for block in found.blocks)
    assert str(found)


@given(models(), st.lists(st.integers(20, 90), min_size=1, max_size=3), st.sampled_from(STRATEGIES))
@settings(max_examples=150, deadline=None)
def test_nothing_is_offloaded_that_would_have_fitted(model, rooms, strategy):
    skeleton, sizes = model
    budgets = parse_budgets(dict(enumerate(rooms)))
    try:
        found = plan_placement(skeleton, sizes, budgets, strategy=strategy)
    except PlacementError:
        return
    left = [found.room(home).free for home in range(len(rooms))]
    for block in found.offloaded:
        # Beside what is kept for the largest that returns; a device that cannot keep that takes nothing.
        assert block.nbytes > max(free for home, free in enumerate(left) if found.room(home).peak)


@given(models(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_all_on_one_device_is_one_entry(model, count):
    skeleton, sizes = model
    if not skeleton.params:
        return
    found = plan_placement(skeleton, sizes, {0: None}, strategy="auto")
    assert dict(found.device_map) == {"": 0}


# -- strategies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", [0, 0, 1, 1]),
        ("balanced", [0, 0, 1, 1]),
        ("sequential", [0, 0, 0, 1]),
        ("balanced_low_0", [1, 1, 1, 1]),
    ],
)
def test_strategies(strategy, expected):
    skeleton, sizes = row(2, 2, 2, 2)
    found = plan_placement(skeleton, sizes, {0: 7, 1: 9, "cpu": 99}, strategy=strategy)
    assert list(found.homes.values()) == expected
    assert found.strategy == ("balanced" if strategy == "auto" else strategy)


def test_balanced_low_0_puts_only_the_overflow_on_the_first():
    skeleton, sizes = row(2, 2, 2, 2, 2)
    found = plan_placement(skeleton, sizes, {0: 9, 1: 5, 2: 5}, strategy="balanced_low_0")
    assert list(found.homes.values()) == [0, 1, 1, 2, 2]
    assert found.blocks[0].reason == "the others are full; 2 B left over"


def test_a_device_without_budget_is_not_used():
    skeleton, sizes = row(2, 2)
    found = plan_placement(skeleton, sizes, {0: 0, 1: 9})
    assert dict(found.device_map) == {"": 1}
    assert plan_placement(skeleton, sizes, {0: 0, "cpu": 9}).device_map == {"": "cpu"}


def test_a_first_block_too_large_for_the_first_device_does_not_waste_it():
    skeleton, sizes = row(6, 2, 2, 2)
    found = plan_placement(skeleton, sizes, {0: 4, 1: 14})
    assert list(found.homes.values()) == [1, 1, 1, 1]
    found = plan_placement(skeleton, sizes, {0: 4, 1: 10, "cpu": 99}, strategy="sequential")
    # Two bytes are kept for what returns; the third block fills what is left on the first device.
    assert list(found.homes.values()) == [1, 1, 0, "cpu"]


def test_only_the_largest_that_is_offloaded_is_kept_room_for():
    skeleton, sizes = row(10, 1, 1, 1)
    found = plan_placement(skeleton, sizes, {0: 12, "cpu": 99})
    assert list(found.homes.values()) == [0, 0, "cpu", "cpu"]
    assert found.room(0).returning == 1
    assert found.runs_on("b.3") == 0
    assert found.home_of("b.3") == "cpu"
    assert plan_placement(skeleton, sizes, {0: 12, "cpu": 99}, returning=2).homes["b.1.w"] == "cpu"


def test_main_memory_before_disk_and_blocks_run_on_the_cpu_without_accelerator():
    skeleton, sizes = row(4, 4, 4, 4)
    found = plan_placement(skeleton, sizes, {"cpu": 13, "disk": None})
    assert list(found.homes.values()) == ["cpu", "cpu", "disk", "disk"]
    assert (found.main, found.room("cpu").returning) == ("cpu", 4)
    assert found.runs_on("b.3") == "cpu"
    found = plan_placement(skeleton, sizes, {0: 8, "cpu": 4, "disk": None})
    assert list(found.homes.values()) == [0, "cpu", "disk", "disk"]


def test_cache_and_activations_are_kept_free():
    skeleton, sizes = row(2, 2, 2, 2)
    workload = Workload({f"b.{index}": 3 for index in range(4)}, 5)
    found = plan_placement(skeleton, sizes, {0: 15, 1: 15}, workload=workload)
    assert [room.reserved for room in found.rooms] == [11, 11]
    # The cache of what is offloaded stays with the device that runs it, so that here no block fits beside it.
    found = plan_placement(skeleton, sizes, {0: 20, "cpu": 99}, workload=workload)
    assert found.room(0).cache == 12
    assert list(found.homes.values()) == ["cpu"] * 4


# -- what cannot be ------------------------------------------------------------------------------


def test_an_unknown_strategy():
    skeleton, sizes = row(1)
    with pytest.raises(ArgumentError, match=r"'balance'.*Did you mean 'balanced'\?"):
        plan_placement(skeleton, sizes, {0: 1}, strategy="balance")


@pytest.mark.parametrize("budgets", [{0: 5, "cpu": 99}, {"cpu": 5, "disk": None}, {0: 0, "disk": None}])
def test_budgets_that_cannot_hold_the_largest_block(budgets):
    skeleton, sizes = row(2, 7, 2)
    with pytest.raises(PlacementError, match=r"can hold the largest block, b\.1 .* raise the budget of"):
        plan_placement(skeleton, sizes, budgets)


def test_a_model_that_is_larger_than_everything():
    skeleton, sizes = row(4, 4, 4, 4)
    with pytest.raises(PlacementError, match=r"2 of 4 blocks have no home .*room for 8 B more, from b\.2 on"):
        plan_placement(skeleton, sizes, {0: 8, "cpu": 5, "disk": 0})


def test_a_cache_that_leaves_no_room():
    skeleton, sizes = row(4, 4)
    with pytest.raises(
        PlacementError, match=r"The key-value cache leaves no room .*smaller batch or context"
    ):
        plan_placement(skeleton, sizes, {0: 9, "cpu": 99}, workload=Workload({"b.0": 9, "b.1": 9}))


# -- models as they are --------------------------------------------------------------------------


def test_t0pp_is_planned_from_its_config_in_no_time():
    started = time.perf_counter()
    found = planned(T0PP, {0: "7GiB", 1: "7GiB", "cpu": "2GiB"})
    seconds = time.perf_counter() - started
    assert seconds < 0.2
    assert set(found.device_map.values()) == {0, 1, "cpu", "disk"}
    assert sum(room.weights for room in found.rooms) == 2 * 11_135_332_352 == found.bytes_to_read
    assert list(found.device_map)[:2] == ["shared", "encoder.embed_tokens"]
    assert found.homes["decoder.embed_tokens.weight"] == found.homes["shared.weight"] == 0
    assert found.room(0).returning == 520_118_272
    assert all(room.free is None or room.free < 521 * MB for room in found.rooms if room.home != "disk")


def test_t0pp_in_halves():
    found = planned(T0PP, {0: "15GiB", 1: "15GiB"})
    shares = [room.weights for room in found.rooms[:2]]
    assert abs(shares[0] - shares[1]) < 521 * MB
    assert found.device_map["encoder"] == found.device_map["shared"] == 0
    assert not found.offloaded


def test_int4_fits_where_bfloat16_does_not():
    skeleton = skeleton_for(config_of(T0PP))
    budgets = parse_budgets({0: "8GiB"})
    plain = weight_sizes(skeleton, LoadPolicy(dtype="bfloat16"))
    assert plan_placement(skeleton, plain, budgets).offloaded

    def packed(key, shape):
        rows, columns = (*shape, 0)[:2]
        return (
            rows * columns // 2 + rows * columns // 32 * 2 if ".block." in key and len(shape) == 2 else None
        )

    small = weight_sizes(skeleton, LoadPolicy(dtype="bfloat16"), nbytes=packed)
    assert plan_placement(skeleton, small, budgets).device_map == {"": 0}


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def test_derived_buffers_are_covered_in_module_order():
    found = planned(LLAMA, {0: 23_000, 1: 26_000}, dtype="float32")
    assert list(found.device_map.items()) == [
        ("model.embed_tokens", 0),
        ("model.layers.0", 0),
        ("model.layers.1", 0),
        ("model.layers.2", 1),
        ("model.layers.3", 1),
        ("model.norm", 1),
        ("model.rotary_emb", 1),
        ("lm_head", 1),
    ]


def test_a_tied_head_lives_with_the_embedding_and_is_priced_once():
    tied = planned({**LLAMA, "tie_word_embeddings": True}, {0: 15_000, 1: 30_000}, dtype="float32")
    untied = planned(LLAMA, {0: 15_000, 1: 30_000}, dtype="float32")
    weights = [sum(room.weights for room in found.rooms) for found in (tied, untied)]
    assert weights[1] - weights[0] == 64 * 16 * 4
    assert tied.homes["lm_head.weight"] == tied.homes["model.embed_tokens.weight"]
    assert tied.blocks[0].tied == ("lm_head",)


def test_a_longer_context_pushes_blocks_out():
    config = config_of(LLAMA)
    skeleton = skeleton_for(config)
    sizes = weight_sizes(skeleton, LoadPolicy(dtype="float32"))
    budgets = parse_budgets({0: 60_000, "cpu": None})
    assert not plan_placement(skeleton, sizes, budgets).offloaded
    workload = workload_for(config, skeleton, batch=1, context=32, dtype="float32")
    found = plan_placement(skeleton, sizes, budgets, workload=workload)
    assert found.offloaded
    assert found.room(0).cache == 4 * 2 * 32 * 16 * 4


def test_the_table(capsys):
    found = planned(T0PP, {0: "10GiB", 1: "10GiB", "cpu": "30GiB"})
    print(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1].startswith(
        "shared = encoder.embed_tokens = decoder.embed_tokens GPU 0 263.2 MB filled first"
    )
    assert "decoder.block.{20..23} cpu 2.1 GB GPU 0 and GPU 1 full; runs on GPU 0" in lines
    assert "GPU 0 10.7 GB 10.0 GB 520.1 MB 172.6 MB 10.6 GB" in lines
    assert "reserved on GPU 1: 520.1 MB for blocks that return" in lines
    assert lines[-1] == "to read: 22.3 GB"


# -- accelerate as an oracle for what it promises ------------------------------------------------


@pytest.mark.parametrize("rooms", [(9000, 9000), (7000, 20000), (5000, 5000)])
def test_no_more_is_offloaded_than_accelerate_offloads(rooms):
    accelerate = pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(20)))
    budgets = {**dict(enumerate(rooms)), "cpu": 10**9}
    theirs = accelerate.infer_auto_device_map(model, max_memory=dict(budgets))
    specs = {key: ParamSpec(key, tuple(value.shape)) for key, value in model.state_dict().items()}
    ours = plan_placement(
        Skeleton(specs), dict.fromkeys(specs, 1024), parse_budgets(budgets), strategy="sequential"
    )
    # One more may be: accelerate keeps room for what comes back on the first device only.
    on_cpu = sum(1 for key in specs if theirs[covering(key, theirs)] == "cpu")
    assert sum(1 for home in ours.homes.values() if home == "cpu") <= on_cpu + 1


def test_units_are_as_the_planner_sees_them():
    skeleton = skeleton_for(config_of(T0PP))
    units = units_of(skeleton, weight_sizes(skeleton, LoadPolicy(dtype="bfloat16")))
    assert len(units) == 1 + 24 + 1 + 24 + 1 + 1
