# SPDX-License-Identifier: Apache-2.0
"""The load plan is pure: from headers and wishes to steps, or to one error that names everything."""

from pathlib import Path

import pytest

from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.keys import Drop
from pretrained.core.plan import LoadPolicy, MappedTensor, check_depth, plan_load
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.errors import WeightsError

FILE = Path("folder/model.safetensors")


def checkpoint(**tensors):
    """A checkpoint of (dtype, shape) or a shape by name, dots written as two underscores."""
    infos, offset = {}, 100
    for name, fact in tensors.items():
        key = name.replace("__", ".")
        dtype, shape = fact if isinstance(fact[0], str) else ("float32", fact)
        nbytes = 4
        for size in shape:
            nbytes *= size
        infos[key] = TensorInfo(key, dtype, tuple(shape), FILE, offset, nbytes)
        offset += nbytes
    return Checkpoint(infos, (FILE,), "safetensors")


def skeleton(ties=None, buffers=(), **shapes):
    keys = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return Skeleton({k: ParamSpec(k, shape, is_buffer=k in buffers) for k, shape in keys.items()}, ties or {})


def test_a_plain_load():
    plan = plan_load(checkpoint(b=(2, 3), a=(4,)), skeleton(a=(4,), b=(2, 3)), LoadPolicy())
    assert [step.key for step in plan.steps] == ["b", "a"]  # as they lie in the file
    assert all(step.is_view for step in plan.steps)
    assert plan.nbytes_to_read == plan.nbytes_resident == 40
    assert plan.dtypes == {("float32", "float32"): 2}
    assert plan.initialise == plan.missing == plan.unexpected == plan.mismatched == ()


@pytest.mark.parametrize(
    ("wanted", "stored", "loaded"),
    [
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "float32", "bfloat16"),
        (None, "float16", "float16"),
        (None, "q4_1", "float32"),
        ("float16", "q8_0", "float16"),
    ],
)
def test_dtypes(wanted, stored, loaded):
    plan = plan_load(checkpoint(w=(stored, (4,))), skeleton(w=(4,)), LoadPolicy(dtype=wanted))
    assert plan.steps[0].dtype == loaded
    assert plan.steps[0].is_view == (stored == loaded)


def test_buffers_keep_their_whole_numbers():
    plan = plan_load(checkpoint(ids=("int64", (4,))), skeleton(buffers={"ids"}, ids=(4,)), LoadPolicy())
    assert plan.steps[0].dtype == "int64"


@pytest.mark.parametrize(
    ("dtype", "policy", "kept"),
    [
        ("float16", {"keep_fp32": ("wo",)}, {"layer.wo.weight"}),
        ("bfloat16", {"keep_fp32": ("wo",)}, set()),
        ("bfloat16", {"keep_fp32_strict": ("wo",)}, {"layer.wo.weight"}),
        ("float64", {"keep_fp32": ("wo",), "keep_fp32_strict": ("wo",)}, set()),
        ("float16", {"keep_fp32": ("layer.wo",)}, {"layer.wo.weight"}),
        ("float16", {"keep_fp32": ("*.weight",)}, {"layer.wo.weight", "word_embeddings.weight"}),
        ("float16", {"keep_fp32": ("w",)}, set()),
    ],
)
def test_weights_that_stay_float32(dtype, policy, kept):
    """A pattern names whole parts of a path: "wo" is no part of "word_embeddings"."""
    facts = {"layer__wo__weight": (2,), "word_embeddings__weight": (2,)}
    plan = plan_load(checkpoint(**facts), skeleton(**facts), LoadPolicy(dtype=dtype, **policy))
    assert {step.key for step in plan.steps if step.dtype == "float32"} == kept


def test_tied_weights_are_read_once():
    facts = {"model__embed": (2, 2), "lm_head": (2, 2)}
    ties = {"lm_head": "model.embed"}
    for held in ({"model__embed": (2, 2)}, {"lm_head": (2, 2)}, facts):
        plan = plan_load(checkpoint(**held), skeleton(ties, **facts), LoadPolicy(base_prefix="model"))
        assert [step.key for step in plan.steps] == ["model.embed"]
        assert plan.ties == ties
        assert plan.missing == ()


def test_layouts_of_other_formats():
    layouts = {
        "blk.0.w": MappedTensor("layers.0.w", apply=lambda x: x.T, shape=(3, 2)),
        "norm": MappedTensor("n"),
    }
    files = checkpoint(blk__0__w=(2, 3), norm=(2,), left_out=(1,))
    plan = plan_load(files, skeleton(layers__0__w=(3, 2), n=(2,)), LoadPolicy(), layouts=layouts)
    assert [(step.key, step.shape, step.is_view) for step in plan.steps] == [
        ("layers.0.w", (3, 2), False),
        ("n", (2,), True),
    ]
    assert plan.renamed == {}
    assert plan.unexpected == ()


def test_findings():
    files = checkpoint(model__a=(2,), extra=(1,), noise__x=(1,), model__inv_freq=(1,), head=(3,))
    wanted = skeleton(model__a=(2,), model__pooler=(2,), model__quiet=(2,), head=(4,), new=(1,))
    plan = plan_load(
        files,
        wanted,
        LoadPolicy(
            base_prefix="model",
            optional=("pooler", "quiet"),
            silent_missing=(r"quiet",),
            silent_unexpected=(r"^noise\.",),
            ignore_mismatched_sizes=True,
            rules=(Drop("*inv_freq", "derived"),),
        ),
    )
    assert plan.missing == ("model.pooler", "new")
    assert set(plan.initialise) == {"model.pooler", "model.quiet", "new", "head"}
    assert plan.unexpected == ("extra",)
    assert plan.mismatched == (("head", (3,), (4,)),)
    assert plan.dropped == {"model.inv_freq": "derived"}


def test_a_missing_body_weight():
    wanted = skeleton(model__a=(2,), model__layers__0__b=(2,), model__layers__1__b=(2,), head=(2,))
    with pytest.raises(WeightsError) as caught:
        plan_load(checkpoint(model__a=(2,)), wanted, LoadPolicy(base_prefix="model"), source="here")
    assert str(caught.value) == (
        "2 of 4 weights of the model are not in the checkpoint (here): expected model.layers.{0..1}.b, found "
        "1 matching and 0 other keys. Check that config.json describes these weights, map the names with "
        "key_mapping, or pass allow_missing=True to initialise what is missing."
    )
    plan = plan_load(checkpoint(model__a=(2,)), wanted, LoadPolicy(base_prefix="model", allow_missing=True))
    assert plan.missing == ("model.layers.0.b", "model.layers.1.b", "head")
    plan = plan_load(checkpoint(a=(2,)), skeleton(model__a=(2,), head=(2,)), LoadPolicy(base_prefix="model"))
    assert plan.missing == ("head",)


@pytest.mark.parametrize(
    ("policy", "hint"),
    [
        ({}, r"The file has keys that nothing uses, such as 'other'\. Did you mean 'weigth'\? Check"),
        ({"key_mapping": {"^nothing": "x"}}, r"key_mapping's '\^nothing' fits no key of the file\. Check"),
        ({"key_mapping": {"^other": "x"}}, r"key_mapping was applied first, to keys such as 'other'\. Check"),
    ],
)
def test_hints_about_a_missing_weight(policy, hint):
    with pytest.raises(WeightsError, match=f"1 of 1 weights of the model is not.*{hint}"):
        plan_load(checkpoint(other=(1,), weigth=(1,)), skeleton(weight=(1,)), LoadPolicy(**policy))


def test_shapes_that_differ():
    facts = {f"layers__{i}__w": (2, 3) for i in range(40)}
    wanted = {f"layers__{i}__w": (2, 5) for i in range(40)}
    with pytest.raises(WeightsError) as caught:
        plan_load(checkpoint(**facts, n=(7,)), skeleton(**wanted, n=()), LoadPolicy())
    assert str(caught.value) == (
        f"41 weights have another shape in the file than in the model ({FILE}): found layers.{{0..39}}.w: "
        "file [2, 3], model [2, 5]; n: file [7], model []. Check that config.json describes these weights, "
        "or pass ignore_mismatched_sizes=True to initialise them anew."
    )


def test_long_lists_are_cut():
    facts = {f"w{chr(97 + i)}": (i + 1,) for i in range(25)}
    with pytest.raises(WeightsError, match=r"wt: file \[20\], model \[99\]; and 5 more\."):
        plan_load(checkpoint(**facts), skeleton(**dict.fromkeys(facts, (99,))), LoadPolicy())


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "complex64"])
def test_numbers_that_are_no_weights(dtype):
    with pytest.raises(WeightsError, match=f"1 weight is stored as no floating numbers.*w \\({dtype}\\)"):
        plan_load(checkpoint(w=(dtype, (2,))), skeleton(w=(2,)), LoadPolicy())


@pytest.mark.parametrize(
    "name", ["qweight", "qzeros", "SCB", "weight_scale", "weight_scale_inv", "weight_packed", "weight.absmax"]
)
def test_quantized_weights(name):
    files = checkpoint(**{"q__weight": (2,), f"q.{name}": (1,)})
    message = r"The weights are quantized: 1 keys hold scales or packed numbers.*config.json must say how"
    with pytest.raises(WeightsError, match=message):
        plan_load(files, skeleton(q__weight=(2,)), LoadPolicy(allow_missing=True))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LlamaConfig(num_hidden_layers=10**7), "num_hidden_layers"),
        (T5Config(num_layers=10**7), "num_layers"),
        (T5Config(num_layers=2, num_decoder_layers=10**7), "num_decoder_layers"),
    ],
)
def test_more_layers_than_the_files_can_fill(config, key):
    message = f"asks for 10000000 layers; the files hold 1 tensors .*Correct '{key}' in config.json"
    with pytest.raises(WeightsError, match=message):
        check_depth(config, checkpoint(a=(1,)))


def test_a_depth_that_may_be_true():
    check_depth(LlamaConfig(num_hidden_layers=999), checkpoint(a=(1,)))
    check_depth(LlamaConfig(num_hidden_layers=1001), checkpoint(**{f"w{i}": (1,) for i in range(1001)}))
