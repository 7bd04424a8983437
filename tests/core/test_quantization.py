# SPDX-License-Identifier: Apache-2.0
"""Schemes as data: what may be asked for, in which spellings, and how many bytes it takes."""

import importlib

import pytest

from pretrained import ArgumentError, ConfigError, NotYetError
from pretrained.core.library_quantization import BitsAndBytesScheme
from pretrained.core.quantization import (
    QuantizationConfig,
    names_module,
    planned_nbytes,
    requested_quantization,
    stored_quantization,
)
from support.cases import TINY_LLAMA
from support.cases_t5 import TINY_T5


def config(method="int4", **values):
    return QuantizationConfig(quant_method=method, **values)


@pytest.mark.parametrize(
    ("value", "method", "group"),
    [
        ({"quant_method": "int8"}, "int8", None),
        ({"quant_method": "int4"}, "int4", 32),
        ({"quant_method": "int4", "group_size": 128}, "int4", 128),
        ({"load_in_8bit": True}, "int8", None),
        ({"load_in_4bit": True, "load_in_8bit": False}, "int4", 32),
        ({"quant_method": "gguf"}, "gguf", None),
    ],
)
def test_spellings_of_a_wish(value, method, group):
    found = requested_quantization(value)
    assert (found.quant_method, found.group_size) == (method, group)


def test_short_spellings():
    assert requested_quantization(None) is None
    assert requested_quantization(None, load_in_8bit=True) == config("int8")
    assert requested_quantization(None, load_in_4bit=True) == config("int4")
    assert requested_quantization(config("int4"), load_in_4bit=True) == config("int4")
    assert requested_quantization({"quant_method": "gguf", "dequantize": True}) is None
    with pytest.raises(ArgumentError, match=r"8 bits or 4"):
        requested_quantization(None, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(
        ArgumentError, match=r"ask for different things.*int8.*Pass quantization_config alone"
    ):
        requested_quantization(config("int8"), load_in_4bit=True)


def test_the_config_object_of_bitsandbytes():
    BitsAndBytesConfig = importlib.import_module("transformers").BitsAndBytesConfig
    plain = requested_quantization(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]))
    assert plain == config("int8", skip_modules=("lm_head",))
    assert requested_quantization(BitsAndBytesConfig(load_in_4bit=True)) == config("int4")
    for threshold in (5.0, 0.0):
        wanted = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        with pytest.raises(NotYetError, match=rf"llm_int8_threshold={threshold} belongs to bitsandbytes"):
            requested_quantization(wanted)


def test_what_only_bitsandbytes_has_is_for_that_library():
    BitsAndBytesConfig = importlib.import_module("transformers").BitsAndBytesConfig
    wanted = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    found = requested_quantization(wanted)
    assert found == BitsAndBytesScheme(bits=4, quant_type="nf4", compute_dtype="bfloat16")
    assert stored_quantization(found.to_dict()) == found == stored_quantization(wanted.to_dict())
    double = requested_quantization(
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    )
    assert double == BitsAndBytesScheme(quant_type="fp4", double_quant=True, skip_modules=("lm_head",))
    assert stored_quantization(double.to_dict()) == double


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"bnb_4bit_quant_type": "nf5"}, ConfigError, r"no such 4-bit type.*'nf4' or 'fp4', found 'nf5'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, NotYetError, "bnb_4bit_quant_storage='bfloat16' is not"),
        ({"llm_int8_threshold": 4.0}, NotYetError, "llm_int8_threshold=4.0 is not passed on"),
        ({"llm_int8_skip_modules": [3]}, ArgumentError, "llm_int8_skip_modules is a list of module names"),
        ({"bnb_4bit_use_double_quant": 3}, ConfigError, "bnb_4bit_use_double_quant is true or false"),
    ],
)
def test_what_bitsandbytes_is_not_asked(fields, error, text):
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **fields}
    with pytest.raises(error, match=text):
        requested_quantization(wanted)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({}, ArgumentError, "torchao is asked for without a scheme"),
        ({"quant_type": "a", "group_size": 3}, ArgumentError, "'group_size' is no setting of 'torchao'"),
        ({"quant_type": {"default": 1, "lm_head": 2}}, NotYetError, "differ between modules"),
        ({"quant_type": "a", "include_input_output_embeddings": True}, NotYetError, "is not offered with"),
        ({"quant_type": "a", "modules_to_not_convert": [1]}, ArgumentError, "list of module names"),
    ],
)
def test_what_torchao_is_not_asked(fields, error, text):
    with pytest.raises(error, match=text):
        requested_quantization({"quant_method": "torchao", **fields})


def test_what_torchao_has_saved_is_not_read():
    with pytest.raises(NotYetError, match=r"What torchao has saved is not read yet \(quantization_config"):
        stored_quantization({"quant_method": "torchao", "quant_type": {}})


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (
            {"quant_method": "int5"},
            ArgumentError,
            "Unknown quantization.*'int8' or 'int4' or 'gguf'.*int5",
        ),
        ({}, ArgumentError, "No quantization method is named"),
        ({"quant_method": "gptq"}, NotYetError, "Quantizing with gptq is not offered yet"),
        ({"quant_method": "int4", "group_size": 48}, ArgumentError, "groups of this size.*32, 64 or 128.*48"),
        ({"quant_method": "int8", "group_size": 32}, ArgumentError, "group_size means nothing for 'int8'"),
        ({"quant_method": "int8", "symmetric": False}, ArgumentError, "symmetric means nothing for 'int8'"),
        ({"quant_method": "int4", "read_from": "gptq"}, ArgumentError, "read_from is written by a save"),
        ({"quant_method": "gguf", "skip_modules": ["a"]}, ArgumentError, "skip_modules means nothing"),
        ({"quant_method": "int4", "block_types": {"a": "q8_0"}}, ArgumentError, "block_types means nothing"),
        ({"quant_method": "int4", "symetric": False}, ArgumentError, "Did you mean 'symmetric'"),
        ({"quant_method": "int4", "symmetric": "no"}, ArgumentError, "symmetric is a yes or a no"),
        ({"quant_method": "int4", "skip_modules": [3]}, ArgumentError, "list of module names"),
        (
            {"quant_method": "int4", "compute_dtype": "float16"},
            ArgumentError,
            "in bfloat16 or float32",
        ),
        (17, ArgumentError, "does not describe a quantization.*int"),
    ],
)
def test_what_cannot_be_is_refused(value, error, text):
    with pytest.raises(error, match=text):
        requested_quantization(value)


def test_the_dictionary_comes_back():
    for scheme in (
        config("int8", quantize_head=True),
        config("int4", group_size=64, symmetric=False, skip_modules=("a", "b.c")),
        config("gguf", block_types={"model.norm": "q4_1"}),
    ):
        assert stored_quantization(scheme.to_dict()) == scheme
    assert config("int4").to_dict() == {"quant_method": "int4", "group_size": 32}
    assert stored_quantization(None) is None


@pytest.mark.parametrize("value", [{"quant_method": "hqq"}, {"quant_method": "fp8"}])
def test_checkpoints_of_other_libraries(value):
    with pytest.raises(NotYetError, match=r"weights are quantized \((hqq|fp8)\).*unquantized"):
        stored_quantization(value)


def test_bytes():
    assert config("int8").nbytes((64, 128)) == 64 * 128 + 64 * 2
    assert config("int4").nbytes((64, 128)) == 64 * 64 + 64 * 4 * 2
    assert config("int4", symmetric=False, group_size=64).nbytes((64, 128)) == 64 * 64 + 64 * 2 * 4
    with pytest.raises(ArgumentError, match=r"packed blocks is the file's"):
        config("gguf").nbytes((2, 2))


def test_names_of_modules():
    assert names_module(("lm_head",), "lm_head") == "lm_head"
    assert names_module(("layers.0",), "model.layers.0.mlp.up_proj") == "layers.0"
    assert names_module(("layers.1", "*.o_proj"), "model.layers.11.self_attn.o_proj") == "*.o_proj"
    assert names_module(("head",), "model.heads.0") is None


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_planned_bytes_are_those_of_the_model(family, method):
    torch = pytest.importorskip("torch")
    from pretrained.arch import llama, t5
    from pretrained.torch.empty import no_memory
    from pretrained.torch.models.llama import LlamaForCausalLM
    from pretrained.torch.models.t5 import T5ForConditionalGeneration
    from pretrained.torch.quantize import select
    from pretrained.torch.quantize_model import quantize_model

    sizes = {
        "llama": {"hidden_size": 64, "intermediate_size": 96},
        "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96},
    }
    base = {"llama": TINY_LLAMA, "t5": TINY_T5}[family] | sizes[family]
    cls = {"llama": LlamaForCausalLM, "t5": T5ForConditionalGeneration}[family]
    arch = {"llama": llama, "t5": t5}[family]
    model_config = cls.config_class(**base)
    head = {"llama": "ForCausalLM", "t5": "ForConditionalGeneration"}[family]
    skeleton = arch.skeleton(model_config, head)
    scheme = config(method)
    planned = planned_nbytes(skeleton, scheme, lambda spec: 4 * spec.num_elements)
    with no_memory():
        empty = cls(model_config)
    assert {key for key in planned if planned[key] != 4 * skeleton.params[key].num_elements} == {
        f"{path}.weight" for path in select(empty, scheme)
    }
    model = cls(model_config)
    quantize_model(model, scheme)
    owned = sum(size for key, size in planned.items() if key not in skeleton.ties)
    hidden = sum(getattr(leaf, "hidden_nbytes", 0) for leaf in model.modules())
    assert model.get_memory_footprint(return_buffers=False) - hidden == owned
    assert torch is not None
