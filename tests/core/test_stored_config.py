# SPDX-License-Identifier: Apache-2.0
"""What the configs of compressed-tensors and fp8 checkpoints say, and what they may not."""

import pytest

from pretrained.core.stored_config import METHODS, ReadWish, method_of, parse_stored, read_wish
from pretrained.core.stored_layers import WeightScheme
from pretrained.errors import ArgumentError, ConfigError, NotYetError
from support.stored import compressed, fp8, weights

PACK, INT, NAIVE, FLOAT = "pack-quantized", "int-quantized", "naive-quantized", "float-quantized"
GROUP = weights(4, strategy="group", group_size=128)


def scheme_of(config, names=("model.layers.0.mlp.up_proj",), classes=("Linear", "Module")):
    return parse_stored(config).scheme_for(names, classes)


SCHEMES = [
    (GROUP, PACK, WeightScheme(kind="int", bits=4, strategy="group", group_size=128, packed=True)),
    ({**GROUP, "actorder": "group"}, PACK, WeightScheme(
        kind="int", bits=4, strategy="group", group_size=128, packed=True, has_order=True
    )),
    ({**GROUP, "actorder": "static"}, PACK, WeightScheme(
        kind="int", bits=4, strategy="group", group_size=128, packed=True
    )),
    ({"num_bits": 8}, INT, WeightScheme(kind="int", bits=8, strategy="tensor")),
    ({"num_bits": 8, "group_size": -1}, INT, WeightScheme(kind="int", bits=8, strategy="channel")),
    ({"num_bits": 4, "group_size": 64}, PACK, WeightScheme(
        kind="int", bits=4, strategy="group", group_size=64, packed=True
    )),
    (weights(8, symmetric=False), NAIVE, WeightScheme(
        kind="int", bits=8, strategy="channel", symmetric=False
    )),
    (weights(8, "FLOAT", "CHANNEL"), FLOAT, WeightScheme(kind="float", bits=8, strategy="channel")),
    (weights(8, "float", "block", block_structure="128x64"), FLOAT, WeightScheme(
        kind="float", bits=8, strategy="block", block=(128, 64)
    )),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "form", "scheme"), SCHEMES)
def test_schemes(settings, form, scheme):
    assert scheme_of(compressed(settings, form)) == scheme
    alone = compressed(settings, "mixed-precision")
    alone["config_groups"]["group_0"]["format"] = form
    assert scheme_of(alone) == scheme


def test_a_name_comes_before_an_expression_and_that_before_a_class():
    config = compressed(weights(8), INT)
    config["config_groups"] = {
        "all": {"targets": ["Linear"], "weights": GROUP, "format": PACK},
        "some": {"targets": ["re:.*self_attn.*"], "weights": weights(8)},
        "one": {"targets": ["model.layers.0.self_attn.q_proj"], "weights": weights(8, strategy="tensor")},
        "inputs": {"targets": ["re:.*"], "weights": None, "input_activations": weights(8)},
    }
    config["ignore"] = ["lm_head", "re:.*gate", "Router"]
    parsed = parse_stored(config)

    def strategy(name, *classes):
        found = parsed.scheme_for((name,), classes or ("Linear", "Module"))
        return None if found is None else found.strategy

    assert strategy("model.layers.0.self_attn.q_proj") == "tensor"
    assert strategy("model.layers.1.self_attn.q_proj") == "channel"
    assert strategy("model.layers.1.mlp.up_proj") == "group"
    assert strategy("model.layers.1.mlp.gate") is None and strategy("lm_head") is None
    assert strategy("router", "Router", "Linear") is None and strategy("embed", "Embedding") is None
    assert parsed.rounds_activations and not parsed.rounds_cache
    assert parsed.stored == config and parsed.method == "compressed-tensors"
    # A name in the file and another in the model: either will do.
    assert parsed.scheme_for(("language_model.x", "lm_head"), ("Linear",)) is None


def test_activations_and_the_cache():
    assert not parse_stored(compressed(GROUP, PACK)).rounds_activations
    assert parse_stored(compressed(GROUP, PACK, inputs=weights(8))).rounds_activations
    assert parse_stored(compressed(GROUP, PACK, kv_cache_scheme=weights(8))).rounds_activations
    assert parse_stored(fp8()).rounds_activations


REFUSED = {
    "preset": (
        {"config_groups": {"W4A16": ["Linear"]}},
        NotYetError,
        "'W4A16' names a preset instead of a scheme",
    ),
    "no groups": ({"config_groups": {}}, ConfigError, r"config_groups says which.*found \{\}"),
    "group": ({"config_groups": {"a": 3}}, ConfigError, r"A group is a dictionary.*config.a\): found 3"),
    "no weights": (
        {"config_groups": {"a": {"targets": ["Linear"], "weights": None}}},
        ConfigError,
        "No group of the checkpoint has quantized weights",
    ),
    "no targets": (
        {"config_groups": {"a": {"weights": GROUP}}},
        ConfigError,
        r"named by a list of texts.*a.targets",
    ),
    "dense": (
        {"format": "dense"},
        NotYetError,
        "'dense' is not read yet: plain weights that each run rounds",
    ),
    "nvfp4": ({"format": "nvfp4-pack-quantized"}, NotYetError, "4-bit floats.*expected pack-quantized"),
    "marlin": ({"format": "marlin-24"}, NotYetError, "'marlin-24' is not read yet: a sparsity format"),
    "unknown format": ({"format": "pack-quantised"}, ConfigError, "Did you mean 'pack-quantized'"),
    "no format": ({"format": None}, ConfigError, "No format of the weights is named"),
    "mixed": ({"format": "mixed-precision"}, ConfigError, "No format of the weights is named"),
    "status": ({"quantization_status": "frozen"}, NotYetError, "'frozen': its weights are not compressed"),
    "sparse": (
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        NotYetError,
        r"Sparse weights \(sparse-24-bitmask",
    ),
    "rotated": ({"transform_config": {"u": 1}}, NotYetError, "behind rotations"),
    "pruned": ({"moe_sparsity_config": {"u": 1}}, NotYetError, "Pruned experts"),
    "setting": ({"new_field": 1}, NotYetError, "have grown by 'new_field'"),
    "ignore": ({"ignore": "lm_head"}, ConfigError, r"named by a list of texts.*config.ignore"),
    "expression": ({"ignore": ["re:(a"]}, ConfigError, "cannot be used.*unterminated"),
    "slow expression": ({"ignore": ["re:(a+)+$"]}, ConfigError, "could take for ever"),
    "long expression": ({"ignore": ["re:" + "a" * 600]}, ConfigError, "could take for ever"),
}
BAD_WEIGHTS = {
    "text": ("int4", PACK, ConfigError, "A scheme is a dictionary"),
    "setting": ({**GROUP, "extra": 1}, PACK, NotYetError, "settings of weights have grown by 'extra'"),
    "strategy": (
        {**GROUP, "strategy": "groups"},
        PACK,
        ConfigError,
        "Unknown strategy.*Did you mean 'group'",
    ),
    "token": ({**GROUP, "strategy": "token"}, PACK, NotYetError, "strategy 'token' are not read yet"),
    "tensor group": ({**GROUP, "strategy": "tensor_group"}, PACK, NotYetError, "'tensor_group'"),
    "no size": ({**GROUP, "group_size": None}, PACK, ConfigError, "'group' needs a group_size"),
    "bad size": ({**GROUP, "group_size": 0}, PACK, ConfigError, r"number of inputs.*found 0"),
    "bits": ({**GROUP, "num_bits": 3}, PACK, NotYetError, r"Weights of 3 bits \(int\) are not read yet"),
    "float bits": (weights(4, "float"), NAIVE, NotYetError, r"Weights of 4 bits \(float\)"),
    "bits text": ({**GROUP, "num_bits": "4"}, PACK, ConfigError, "num_bits is a number"),
    "type": ({**GROUP, "type": "posit"}, PACK, ConfigError, "Unknown type of weights"),
    "packed floats": (weights(8, "float"), PACK, ConfigError, "'pack-quantized' holds integers"),
    "float integers": (weights(8), FLOAT, ConfigError, "holds 8-bit floats"),
    "symmetric": ({**GROUP, "symmetric": "no"}, PACK, ConfigError, "symmetric is a yes or a no"),
    "dynamic": ({**GROUP, "dynamic": True}, PACK, ConfigError, "rounded anew at each run"),
    "actorder": ({**GROUP, "actorder": "columns"}, PACK, ConfigError, "Unknown actorder"),
    "block": (
        weights(8, "float", "block", block_structure=[128]),
        FLOAT,
        ConfigError,
        r"pair of sizes.*\[128\]",
    ),
    "no block": (weights(8, "float", "block"), FLOAT, ConfigError, "pair of sizes"),
}
BAD_FP8 = {
    "block": ({"weight_block_size": [128]}, ConfigError, r"pair of sizes.*found \[128\]"),
    "zero block": ({"weight_block_size": [0, 128]}, ConfigError, "pair of sizes"),
    "activations": ({"activation_scheme": "none"}, ConfigError, "Unknown activation_scheme"),
    "scales": ({"scale_fmt": "log"}, ConfigError, "Unknown format of scales"),
    "floats": ({"fmt": "e3m4"}, ConfigError, "Unknown 8-bit floats"),
    "experts": ({"expert_dtype": "fp4"}, NotYetError, "with expert_dtype are not read yet.*'fp4'"),
    "more": ({"modules_to_convert": ["embed"]}, NotYetError, "with modules_to_convert are not read yet"),
    "less": ({"modules_to_not_convert": "lm_head"}, ConfigError, "is a list of module names"),
    "setting": ({"weight_blocks": [1, 2]}, NotYetError, "what that changes is not known.*weight_block_size"),
}


@pytest.mark.parametrize(("values", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_configs_that_are_refused(values, error, text):
    with pytest.raises(error, match=text):
        parse_stored({**compressed(GROUP, PACK), **values})


@pytest.mark.parametrize(("settings", "form", "error", "text"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_are_refused(settings, form, error, text):
    with pytest.raises(error, match=text):
        parse_stored(compressed(settings, form), where="folder")


@pytest.mark.parametrize(("values", "error", "text"), BAD_FP8.values(), ids=BAD_FP8)
def test_fp8_configs_that_are_refused(values, error, text):
    with pytest.raises(error, match=text):
        parse_stored({**fp8(), **values})


def test_fp8():
    parsed = parse_stored(fp8((128, 64), modules_to_not_convert=["lm_head", "mlp.gate"], scale_fmt="ue8m0"))
    assert parsed.scheme_for(("x",), ("Linear",)) == WeightScheme(
        kind="float", bits=8, strategy="block", block=(128, 64)
    )
    assert parsed.is_plain(("model.layers.0.mlp.gate",), ()) and not parsed.is_plain(("mlp.gate_proj",), ())
    assert parse_stored(fp8(None, ignored_layers=["a"])).modules_to_not_convert == ("a",)
    assert parse_stored(fp8(None)).scheme_for(("x",), ()).strategy is None


# -- the call -------------------------------------------------------------------------------------


class Object:
    quant_method = "fp8"
    weight_block_size = (128, 128)

    def __init__(self, **values):
        self.__dict__.update(values)


def test_wishes():
    stored = fp8((64, 64))
    assert read_wish(None, stored) == ReadWish()
    assert read_wish({"quant_method": "fp8", "dequantize": True}, stored) == ReadWish(dequantize=True)
    assert read_wish({"quant_method": "fp8", "run_compressed": False}, stored) == ReadWish(dequantize=True)
    assert read_wish({**stored, "weight_block_size": (64, 64), "compute_dtype": "torch.float32"}, stored) == (
        ReadWish(compute_dtype="float32")
    )
    # An object of another library holds defaults that nobody asked for.
    assert read_wish(Object(dequantize=True), stored) == ReadWish(dequantize=True)
    assert read_wish(Object(run_compressed=True), stored) == ReadWish()
    assert method_of(Object()) == "fp8" and method_of({}) is None and method_of(None) is None
    assert METHODS == ("compressed-tensors", "fp8")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"dequantize": "yes"}, r"dequantize is a yes or a no.*'yes'"),
        ({"dequantize": True, "run_compressed": True}, "contradict each other"),
        ({"compute_dtype": "int8"}, "multiply in a floating dtype.*'int8'"),
        ({"weight_block_size": [128, 128]}, r"says another weight_block_size.*expected \[64, 64\]"),
        ({"group_size": 3}, "'group_size' is no setting for reading a fp8 checkpoint.*Leave it out"),
        ({"dequantise": True}, "Did you mean 'dequantize'"),
    ],
)
def test_wishes_that_cannot_be(values, text):
    with pytest.raises(ArgumentError, match=text):
        read_wish({"quant_method": "fp8", **values}, fp8((64, 64)))
