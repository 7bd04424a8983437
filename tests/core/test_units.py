# SPDX-License-Identifier: Apache-2.0
"""What moves as one: exact cover, blocks whole, ties joined, sizes after dtype and quantization."""

import pytest

from pretrained.core.plan import LoadPolicy
from pretrained.core.skeleton import ParamSpec, Skeleton, SkeletonBuilder
from pretrained.core.units import compact, covering, module_order, units_of, weight_sizes, with_blocks
from pretrained.errors import ArgumentError


def bert_like():
    """Return a skeleton with blocks, a loose weight beside a submodule, and ties into a block."""
    build = SkeletonBuilder()
    build.block("body.embeddings")
    build.weight("body.embeddings.word.weight", 10, 4)
    build.norm("body.embeddings.norm", 4)
    for index in range(2):
        build.block(f"body.layer.{index}")
        build.linear(f"body.layer.{index}.dense", 4, 4, bias=True)
    build.block(None)
    build.buffer("body.rotary.inv_freq", 2)
    build.weight("head.bias", 10)
    build.linear("head.transform", 4, 4)
    build.linear("head.decoder", 10, 4, bias=True)
    build.tie("head.decoder.weight", "body.embeddings.word.weight")
    build.tie("head.decoder.bias", "head.bias")
    return build.build()


def sizes_of(skeleton, itemsize=1):
    return {key: spec.num_elements * itemsize for key, spec in skeleton.params.items()}


def test_units_cover_everything_once_and_join_ties():
    skeleton = bert_like()
    units = units_of(skeleton, sizes_of(skeleton))
    assert [unit.paths for unit in units] == [
        ("body.embeddings", "head.bias", "head.decoder"),
        ("body.layer.0",),
        ("body.layer.1",),
        ("body.rotary",),
        ("head.transform",),
    ]
    keys = [key for unit in units for key in unit.keys]
    assert sorted(keys) == sorted([*skeleton.params, *skeleton.derived])
    # The tied matrix and the tied bias count once; the derived buffer is two float32 numbers.
    assert [unit.nbytes for unit in units] == [40 + 4 + 10, 20, 20, 8, 16]


def test_a_derived_buffer_ends_the_module_that_holds_it():
    keys = [spec.key for spec in module_order(bert_like())]
    assert keys.index("body.rotary.inv_freq") == keys.index("head.bias") - 1
    alone = Skeleton({}, derived={"freq": ParamSpec("freq", (2,))})
    assert [spec.key for spec in module_order(alone)] == ["freq"]


def test_cache_comes_with_its_block():
    skeleton = bert_like()
    units = units_of(skeleton, sizes_of(skeleton), {"body.layer.1": 99})
    assert [unit.cache_bytes for unit in units] == [0, 0, 99, 0, 0]
    with pytest.raises(ArgumentError, match="blocks that are not in the model"):
        units_of(skeleton, sizes_of(skeleton), {"body.layer.7": 1})


def test_sizes_of_another_model_are_refused():
    sizes = sizes_of(bert_like())
    del sizes["head.bias"]
    with pytest.raises(ArgumentError, match=r"expected such as head\.bias, found 1 weights without a size"):
        units_of(bert_like(), sizes)


def test_a_model_that_is_one_layer():
    units = units_of(Skeleton({"weight": ParamSpec("weight", (2, 2))}), {"weight": 4})
    assert [unit.paths for unit in units] == [("weight",)]
    assert compact({"weight": 0}) == {"": 0}


def test_sizes_follow_dtype_policy_and_scheme():
    skeleton = bert_like()
    policy = LoadPolicy(dtype="float16", keep_fp32=("transform",))
    sizes = weight_sizes(skeleton, policy)
    assert sizes["body.layer.0.dense.weight"] == 32
    assert sizes["head.transform.weight"] == 64
    assert sizes["head.decoder.weight"] == sizes["body.embeddings.word.weight"] == 80
    assert sizes["body.rotary.inv_freq"] == 8
    kept = weight_sizes(skeleton, LoadPolicy(dtype=None), stored={"head.bias": "bfloat16"})
    assert (kept["head.bias"], kept["head.transform.weight"]) == (20, 64)
    whole = weight_sizes(skeleton, LoadPolicy(dtype="float16"), stored={"head.bias": "int64"})
    assert whole["head.bias"] == 80
    packed = weight_sizes(
        skeleton, policy, nbytes=lambda key, shape: 7 if key.endswith("dense.weight") else None
    )
    assert packed["body.layer.0.dense.weight"] == 7
    assert packed["body.layer.0.dense.bias"] == 8


def test_blocks_can_be_marked_afterwards_and_the_outermost_counts():
    plain = Skeleton({key: ParamSpec(key, (1,)) for key in ("a.b.c.weight", "a.b.weight", "a.d.weight")})
    marked = with_blocks(plain, ["a.b", "a.b.c"])
    assert [spec.block for spec in marked.params.values()] == ["a.b", "a.b", None]


def test_compact_maps_say_the_same_in_fewer_words():
    homes = {"a.x.w": 0, "a.y.w": 0, "b.x.w": 0, "b.y.w": 1, "b.y.v": 1, "c.w": "cpu"}
    assert list(compact(homes).items()) == [("a", 0), ("b.x", 0), ("b.y", 1), ("c", "cpu")]
    assert compact(dict.fromkeys(homes, "disk")) == {"": "disk"}
    assert compact({}) == {}


def test_the_longest_path_covers():
    paths = {"": 0, "a": 1, "a.b": 2}
    assert covering("a.b.c", paths) == "a.b"
    assert covering("a.bc.d", paths) == "a"
    assert covering("x", paths) == ""
    assert covering("x", {"a": 1}) is None
