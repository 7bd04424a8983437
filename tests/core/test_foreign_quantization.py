# SPDX-License-Identifier: Apache-2.0
"""What config.json may say of weights that other libraries have quantized."""

import pytest

from pretrained import ConfigError, NotYetError
from pretrained.core.awq import AwqScheme
from pretrained.core.gptq import GptqLayer, GptqScheme
from pretrained.core.quantization import stored_quantization


def gptq(**values):
    return stored_quantization({"quant_method": "gptq", "bits": 4, **values})


def awq(**values):
    return stored_quantization({"quant_method": "awq", **values})


def test_gptq_settings():
    assert gptq() == GptqScheme(default=GptqLayer(4, 128, symmetric=True))
    # As AutoGPTQ 0.7 writes it, with how it was made.
    made = {"damp_percent": 0.01, "desc_act": True, "static_groups": False, "true_sequential": True}
    found = gptq(group_size=-1, sym=False, checkpoint_format="gptq_v2", **made)
    assert found == GptqScheme(default=GptqLayer(4, None, symmetric=False), zeros_less_one=False)


def test_gptq_settings_of_single_layers():
    dynamic = {
        r"+:.*\.18\.mlp": {"bits": 8, "group_size": 64},
        r"-:lm_head": False,
        r".*\.k_proj": {"sym": False},
    }
    found = gptq(group_size=32, dynamic=dynamic)
    assert found.layer("model.layers.18.mlp.up_proj") == GptqLayer(8, 64, symmetric=True)
    assert found.layer("model.layers.1.self_attn.k_proj") == GptqLayer(4, 32, symmetric=False)
    assert found.layer("model.layers.1.mlp.up_proj") == GptqLayer(4, 32, symmetric=True)


def test_awq_settings():
    assert awq() == AwqScheme(group_size=128)
    assert awq(q_group_size=64, w_bit=4, version="GEMM") == AwqScheme(group_size=64)
    assert awq(group_size=-1, bits=4, modules_to_not_convert=None) == AwqScheme(group_size=None)


@pytest.mark.parametrize(
    ("read", "values", "error", "text"),
    [
        (gptq, {"checkpoint_format": "marlin"}, NotYetError, r"GPTQ in the format 'marlin' is not read yet"),
        (gptq, {"is_marlin_format": True}, NotYetError, r"GPTQ in the format 'marlin'"),
        (gptq, {"checkpoint_format": "bitblas"}, NotYetError, r"GPTQ in the format 'bitblas'"),
        (gptq, {"pack_dtype": "int8"}, NotYetError, r"GPTQ packed into int8"),
        (gptq, {"rotation": "hadamard"}, NotYetError, r"GPTQ with the rotation 'hadamard'"),
        (
            gptq,
            {"bits": 5},
            NotYetError,
            r"GPTQ with 5 bits is not read yet \(quantization_config, config.json",
        ),
        (gptq, {"bits": "4"}, ConfigError, r"no whole number as 'bits'.*'4'"),
        (gptq, {"bits": None}, ConfigError, r"no whole number as 'bits'.*nothing"),
        (gptq, {"group_size": 0}, ConfigError, r"no groups of this size.*-1 for one group, found 0"),
        (gptq, {"sym": "yes"}, ConfigError, r"sym is true or false.*'yes'"),
        (gptq, {"dynamic": [1]}, ConfigError, r"dynamic is a dictionary"),
        (gptq, {"dynamic": {"+:(": {}}}, ConfigError, r"not a regular expression"),
        (gptq, {"dynamic": {"a": 3}}, ConfigError, r"settings of 'a' are no dictionary"),
        (gptq, {"dynamic": {"a": {"bits": 6}}}, NotYetError, r"GPTQ with 6 bits"),
        (awq, {"version": "gemv"}, NotYetError, r"AWQ of the version 'gemv' is not read yet.*unquantized"),
        (awq, {"bits": 8}, NotYetError, r"AWQ with 8 bits"),
        (awq, {"zero_point": False}, NotYetError, r"AWQ without zero points"),
        (awq, {"group_size": -2}, ConfigError, r"no groups of this size"),
    ],
)
def test_what_is_not_read_is_named(read, values, error, text):
    with pytest.raises(error, match=text):
        read(**values)
