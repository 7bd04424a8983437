# SPDX-License-Identifier: Apache-2.0
"""The arguments of from_pretrained and from_config: obeyed, or refused by name; none is swallowed."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn

from pretrained.arch.llama import LlamaConfig
from pretrained.auto import AutoModelForCausalLM
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.options import _LATER
from pretrained.errors import (
    ArgumentError,
    ConfigError,
    FileError,
    MissingDependencyError,
    NotYetError,
    PlacementError,
    PretrainedError,
    UnknownArgumentError,
    WeightsError,
)
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaForSequenceClassification
from support.checkpoints import TINY, Folder, tiny_llama

BOTH = pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that no test changes."""
    return Folder(tmp_path_factory.mktemp("saved") / "model").path


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def load(path, cls=LlamaForCausalLM, **arguments):
    return cls.from_pretrained(path, **arguments)


def dtypes(model):
    return {tensor.dtype for tensor in model.state_dict().values()}


# -- names -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 1}, "does not know the argument 'foo' .*neither an option of from_pretrained"),
        ({"foo": 1, "bar": 2}, r"the argument 'foo' \(foo, bar\)"),
        ({"divice_map": "cpu"}, "Did you mean 'device_map'"),
        ({"num_hiden_layers": 1}, "Did you mean 'num_hidden_layers'"),
        ({"max_new_tokens": 5}, "It is a generation setting: pass it to generate"),
        ({"use_auth_token": "x"}, "use_auth_token is no longer an argument .*called token now"),
        ({"resume_download": True}, "Downloads are always resumed"),
        ({"mirror": "x"}, "HF_ENDPOINT"),
        ({"model_type": "bert"}, "'model_type'"),
        ({"_given": 3}, "'_given'"),
        ({"name_or_path": "x"}, "'name_or_path'"),
        ({"to_dict": 3}, "'to_dict'"),
    ],
)
def test_unknown_and_retired_names(saved, cls, arguments, message):
    with pytest.raises(UnknownArgumentError, match=message):
        load(saved, cls, **arguments)
    with pytest.raises(TypeError):
        load(saved, cls, **arguments)


def test_names_that_belong_elsewhere(saved):
    with pytest.raises(UnknownArgumentError, match=r"'return_unused_kwargs'.*belongs to configs"):
        load(saved, return_unused_kwargs=True)
    with pytest.raises(UnknownArgumentError, match="'path'"):
        LlamaForCausalLM.from_pretrained(saved, path="x")
    message = r"attribute of the config: set config\.output_attentions on the config that you pass"
    with pytest.raises(UnknownArgumentError, match=message):
        load(saved, config=LlamaConfig(**TINY), output_attentions=True)
    with pytest.raises(UnknownArgumentError, match=r"from these arguments .*too many positional"):
        LlamaForCausalLM.from_pretrained(saved, "extra")


def test_what_reaches_the_base_class_is_not_swallowed(saved):
    class Sloppy(LlamaForCausalLM):
        def __init__(self, config, **kwargs):
            nn.Module.__init__(self)
            super(LlamaForCausalLM, self).__init__(config, **kwargs)

    with pytest.raises(UnknownArgumentError, match=r"has no use for some arguments \(foo\)"):
        Sloppy(LlamaConfig(**TINY), foo=1)


def test_constructor_arguments_arrive(saved):
    class Scaled(LlamaForCausalLM):
        def __init__(self, config, scale=1.0):
            super().__init__(config)
            self.scale = scale

    assert load(saved, Scaled, scale=3.0).scale == 3.0
    assert Scaled.from_pretrained(saved, 4.0).scale == 4.0
    assert Scaled._from_config(LlamaConfig(**TINY), scale=5.0).scale == 5.0
    with pytest.raises(UnknownArgumentError, match=r"'scal'.*Did you mean 'scale'"):
        load(saved, Scaled, scal=3.0)


@BOTH
@pytest.mark.parametrize("name", ["low_cpu_mem_usage", "offload_state_dict", "_fast_init", "_from_auto"])
def test_names_without_effect(saved, cls, name):
    assert load(saved, cls, **{name: True}).config.vocab_size == 32


ASKING = {
    "max_memory": {0: "1GB"},
    "quantization_config": {"quant_method": "gptq"},
    "tp_plan": "auto",
}


@BOTH
@pytest.mark.parametrize("name", sorted(_LATER))
def test_names_of_later_releases(saved, cls, name):
    idle, release = _LATER[name]
    for value in idle:
        assert load(saved, cls, **{name: value}).config.vocab_size == 32
    with pytest.raises(NotYetError, match=f"{name}=.* is not offered yet") as caught:
        load(saved, cls, **{name: ASKING.get(name, True)})
    assert release in str(caught.value)
    with pytest.raises(NotImplementedError):
        LlamaForCausalLM.from_config(LlamaConfig(**TINY), **{name: ASKING.get(name, True)})


@BOTH
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("variant", 5, "a text, found int 5"),
        ("use_safetensors", "yes", "True, False or None, found str 'yes'"),
        ("gguf_file", 5, "the name of a file"),
        ("state_dict", [1], "tensors by name"),
        ("key_mapping", 5, "a dictionary of regular expressions"),
        ("ignore_mismatched_sizes", "x", "True or False"),
        ("allow_missing", 5, "True or False"),
        ("output_loading_info", "x", "True or False"),
        ("attn_implementation", {}, "the name of an attention implementation"),
        ("attn_implementation", ["eager"], "the name of an attention implementation"),
        ("disable_mmap", 1, "True or False"),
        ("progress", 5, r"True, False, or a function of \(bytes, total, stage\)"),
        ("revision", 5, "a branch, tag or commit"),
        ("subfolder", 5, "the name of a folder"),
        ("token", 5, "a token, True or False"),
        ("cache_dir", 5, "a path"),
        ("local_files_only", "x", "True or False"),
        ("force_download", "x", "True or False"),
    ],
)
def test_values_of_the_wrong_type(saved, cls, name, value, expected):
    with pytest.raises(ArgumentError, match=f"{name} has a value of the wrong type .*expected {expected}"):
        load(saved, cls, **{name: value})


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"local_files_only": True, "force_download": True}, ArgumentError, "Pass only one of them"),
        ({"proxies": {"http": "x"}}, ArgumentError, "HTTP_PROXY"),
        ({"variant": "fp16"}, FileError, r"expected model\.fp16\.safetensors .*Drop variant"),
        ({"use_safetensors": False}, FileError, r"found model\.safetensors.*Drop use_safetensors"),
        ({"gguf_file": "x.gguf"}, FileError, "There is no GGUF file 'x.gguf'"),
        ({"gguf_file": "../x.gguf"}, ArgumentError, "must lie in the model's folder"),
        ({"weights_only": False}, ArgumentError, "never does"),
        ({"generation_config": 5}, ArgumentError, "expected a GenerationConfig or a dictionary, found int 5"),
        ({"generation_config": "x"}, ArgumentError, r"GenerationConfig\.from_pretrained"),
        ({"output_attentions": "x"}, ConfigError, "output_attentions has a value of the wrong type"),
    ],
)
def test_values_that_cannot_work(saved, cls, arguments, error, message):
    with pytest.raises(error, match=message):
        load(saved, cls, **arguments)


# -- config ----------------------------------------------------------------------------------------


@BOTH
def test_the_config_argument(saved, cls):
    config = LlamaConfig(**TINY, rms_norm_eps=0.5)
    model = load(saved, cls, config=config)
    assert model.config.rms_norm_eps == 0.5
    assert model.config is not config
    assert config.dtype is None
    assert load(saved, cls, config=saved).config.rms_norm_eps == 1e-6
    assert load(saved, cls, config=str(saved / "config.json"), num_labels=5).config.num_labels == 5
    with pytest.raises(FileError, match="No such file or folder"):
        load(saved, cls, config="/nothing")
    for nonsense in ({"vocab_size": 3}, 5, LlamaConfig):
        with pytest.raises(ArgumentError, match=r"config has a value of the wrong type .*config object"):
            load(saved, cls, config=nonsense)


def test_attributes_of_the_config(saved):
    assert load(saved, output_attentions=True).config.output_attentions
    assert load(saved, num_labels=7).config.num_labels == 7
    with pytest.raises(WeightsError, match="another shape"):
        load(saved, hidden_size=32)


def test_nothing_to_load_from():
    config, state = LlamaConfig(**TINY), tiny_llama().state_dict()
    for arguments in ({}, {"config": config}, {"state_dict": state}):
        with pytest.raises(ArgumentError, match=r"Nothing to load from .*both config= and state_dict="):
            load(None, **arguments)


# -- dtype -----------------------------------------------------------------------------------------


def test_the_table_of_dtypes(tmp_path, caplog):
    """API.md section 3, with float32 as this library's default, on a bfloat16 file that says so."""
    path = Folder(tmp_path / "bf16", tiny_llama().to(torch.bfloat16)).path
    config = LlamaConfig.from_pretrained(path)
    assert config.dtype == "bfloat16"
    table = [
        ({}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "fp16"}, torch.float16),
        ({"dtype": "torch.float64"}, torch.float64),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float64, "torch_dtype": torch.float16}, torch.float64),
    ]
    for arguments, dtype in table:
        for cls in (LlamaForCausalLM, AutoModelForCausalLM):
            model = load(path, cls, **arguments)
            assert dtypes(model) == {dtype}, arguments
            assert "torch." + model.config.dtype == str(dtype)
            assert not model.training
    for arguments, dtype in [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float64"}, torch.float64),
    ]:
        for cls in (LlamaForCausalLM, AutoModelForCausalLM):
            model = cls.from_config(config, **arguments)
            assert dtypes(model) == {dtype}, arguments
            assert "torch." + model.config.dtype == str(dtype)
            assert model.training
    assert config.dtype == "bfloat16"
    assert dtypes(LlamaForCausalLM(config)) == {torch.float32}
    assert "pass dtype='auto' to keep them" in caplog.text


@pytest.mark.parametrize(
    ("said", "stored", "dtype"),
    [
        ("float16", torch.bfloat16, torch.float16),
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float32, torch.float32),
        ("auto", torch.float16, torch.float16),
    ],
)
def test_auto_asks_the_config_then_the_file(tmp_path, said, stored, dtype):
    folder = Folder(tmp_path / "m", tiny_llama().to(stored)).config(dtype=said)
    assert dtypes(load(folder.path, dtype="auto")) == {dtype}


def test_auto_takes_the_first_tensor_that_weights_can_have(tmp_path):
    folder = Folder(tmp_path / "m", tiny_llama().to(torch.float16)).config("dtype")
    keys = [key for key in tiny_llama().state_dict() if "layernorm" in key]
    folder.tensors(**{key: torch.ones(16).to(torch.float8_e4m3fn) for key in keys})
    assert dtypes(load(folder.path, dtype="auto")) == {torch.float16}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("foo", "Unknown dtype 'foo' .*expected a floating dtype such as 'float32'"),
        ("floot16", "Did you mean 'float16'"),
        ("int8", "Weights cannot be loaded as int8 .*quantization_config"),
        (torch.int8, "Weights cannot be loaded as int8"),
        (torch.bool, "Weights cannot be loaded as bool"),
        (torch.complex64, "Weights cannot be loaded as complex64"),
        (torch.float8_e4m3fn, "Weights cannot be loaded as float8_e4m3fn .*16 bits or more"),
        (5, "Unknown dtype '5'"),
        ("", "Unknown dtype ''"),
        (True, "Unknown dtype 'True'"),
        (float, "Unknown dtype"),
    ],
)
def test_dtypes_that_cannot_be(saved, name, dtype, message):
    for call in (
        lambda: load(saved, **{name: dtype}),
        lambda: load(saved, AutoModelForCausalLM, **{name: dtype}),
        lambda: LlamaForCausalLM.from_config(LlamaConfig(**TINY), **{name: dtype}),
    ):
        with pytest.raises(ArgumentError, match=message) as caught:
            call()
        assert isinstance(caught.value, ValueError)


def test_a_dictionary_of_dtypes(saved):
    with pytest.raises(ArgumentError, match=r"dtype is a dictionary.*pass a single dtype"):
        load(saved, dtype={"": "float16"})


def test_a_config_whose_dtype_cannot_be(folder):
    folder.config(dtype="int8")
    assert dtypes(load(folder.path)) == {torch.float32}
    with pytest.raises(ConfigError, match=r"config's dtype is int8.*Pass dtype='float32'"):
        load(folder.path, dtype="auto")
    with pytest.raises(ConfigError, match="config's dtype is int8"):
        LlamaForCausalLM.from_config(LlamaConfig(**TINY, dtype="int8"))


# -- devices ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("device_map", ["cpu", "auto", torch.device("cpu"), "cpu:0", {"": "cpu"}])
def test_device_maps_on_one_cpu(saved, cls, device_map):
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto means the accelerator here")
    model = load(saved, cls, device_map=device_map)
    assert model.hf_device_map == {"": "cpu"}
    assert model.device.type == "cpu"


def test_no_map_leaves_no_map(saved):
    assert not hasattr(load(saved), "hf_device_map")


def test_a_dictionary_that_covers_everything(saved):
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    assert load(saved, device_map=device_map).hf_device_map == device_map


@pytest.mark.parametrize(
    ("device_map", "error", "message"),
    [
        ("cqu", PlacementError, "Unknown device 'cqu' .*expected 'auto', 'cpu'"),
        ("mps", PlacementError, "no such device here"),
        (3.5, PlacementError, "Unknown device 3.5"),
        (-1, PlacementError, "from 0 on"),
        (True, PlacementError, "from 0 on"),
        ([], PlacementError, r"Unknown device \[\]"),
        ({}, PlacementError, r"names modules and their homes .*found \{\}"),
        ({1: "cpu"}, PlacementError, "keys are module paths .*found 1"),
        ({"": None}, PlacementError, "Unknown device None"),
        ({"": "cqu"}, PlacementError, "Unknown device 'cqu'"),
        ("meta", PlacementError, "'meta' holds no values.*from_config"),
        ({"": "meta"}, PlacementError, "'meta' holds no values"),
        (
            {"modle": "cpu", "lm_head": "cpu"},
            PlacementError,
            "does not have .*found 'modle'.*Did you mean 'model'",
        ),
        (
            {"model.layers.0": "cpu", "lm_head": "cpu"},
            PlacementError,
            r"is incomplete: .*none for model\.embed_tokens, model\.layers\.1\.",
        ),
        ({"model": "cpu", "lm_head": "meta"}, PlacementError, "device that is not there .*'lm_head': 'meta'"),
    ],
)
def test_device_maps_that_cannot_be(saved, device_map, error, message):
    with pytest.raises(error, match=message):
        load(saved, device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", 0, {"": 0}])
def test_an_accelerator_that_is_not_there(saved, device_map):
    message = r"There is no such device here \(device_map\): expected cpu, found cuda.*device_map='cpu'"
    with pytest.raises(PlacementError, match=message):
        load(saved, device_map=device_map)


def test_the_meta_context(saved):
    with torch.device("meta"):
        with pytest.raises(ArgumentError, match=r"inside torch\.device\('meta'\).*device_map"):
            load(saved)
        assert load(saved, device_map="cpu").device.type == "cpu"
        model = LlamaForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.float16)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.dtype == torch.float16


# -- attention -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_by_name(saved, cls, name):
    assert load(saved, cls, attn_implementation=name).config.attn_implementation == name
    assert cls.from_config(LlamaConfig(**TINY), attn_implementation=name).config.attn_implementation == name


def test_attention_that_is_not_there(saved, monkeypatch):
    for call in (
        lambda name: load(saved, attn_implementation=name),
        lambda name: LlamaForCausalLM.from_config(LlamaConfig(**TINY), attn_implementation=name),
        lambda name: LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation=name)),
    ):
        with pytest.raises(ArgumentError, match=r"Unknown attention.*'eagre'.*Did you mean 'eager'"):
            call("eagre")
        monkeypatch.setattr("pretrained.torch.attention.find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"needs the package flash_attn.*'sdpa'"):
            call("flash_attention_2")


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4", "flex_attention"])
def test_attention_of_other_libraries(saved, name):
    with pytest.raises(ArgumentError, match=f"Unknown attention implementation '{name}'.*not offered so far"):
        load(saved, attn_implementation=name)


def test_attention_is_a_name():
    model = tiny_llama()
    for nonsense in (5, [], {}):
        with pytest.raises(ArgumentError, match="Unknown attention implementation"):
            model.set_attn_implementation(nonsense)


# -- weights given by hand -------------------------------------------------------------------------


def test_a_state_dict(saved):
    model = tiny_llama()
    state = model.state_dict()
    loaded, info = load(None, config=model.config, state_dict=state, output_loading_info=True)
    assert not any(info.values())
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key])
        assert tensor.data_ptr() != state[key].data_ptr()
    with pytest.raises(ArgumentError, match=r"state_dict and the path both give the weights.*pass None"):
        load(saved, state_dict=state)
    with pytest.raises(ArgumentError, match="state_dict and gguf_file both give the weights"):
        load(saved, state_dict=state, gguf_file="x.gguf")


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({HEAD: 1}, ArgumentError, r"state_dict\['lm_head\.weight'\].*found int"),
        ({HEAD: torch.ones(32, 16).numpy()}, ArgumentError, "found ndarray"),
        ({3: torch.ones(2)}, ArgumentError, r"state_dict\[3\].*a key of type int"),
        ({HEAD: torch.ones(32, 16, device="meta")}, ArgumentError, "'meta', which has no values"),
        ({HEAD: torch.ones(32, 16).to_sparse()}, ArgumentError, "layout torch.sparse_coo"),
        ({HEAD: torch.ones(2)}, WeightsError, r"1 weight has another shape .*\(state_dict\).*file \[2\]"),
        ({HEAD: torch.ones(32, 16, dtype=torch.int8)}, WeightsError, "stored as no floating numbers"),
    ],
)
def test_state_dicts_that_cannot_be(change, error, message):
    model = tiny_llama()
    with pytest.raises(error, match=message):
        load(None, config=model.config, state_dict={**model.state_dict(), **change})


def test_an_empty_state_dict():
    with pytest.raises(WeightsError, match="20 of 21 weights of the model are not in the checkpoint"):
        load(None, config=LlamaConfig(**TINY), state_dict={})


# -- key_mapping -----------------------------------------------------------------------------------


def test_a_key_mapping(folder):
    folder.rename(lambda key: key.replace("model.layers", "blocks.layer_"))
    mapping = {r"^blocks\.layer_\.(\d+)": r"model.layers.\1"}
    model, info = load(folder.path, key_mapping=mapping, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize(
    ("mapping", "error", "message"),
    [
        ({"(": "x"}, ArgumentError, r"'\(' is not a regular expression .*backslash"),
        ({5: "x"}, ArgumentError, "not a dictionary of regular expressions"),
        ({"a": 5}, ArgumentError, "not a dictionary of regular expressions .*'a': 5"),
        ({"^model": r"\9"}, ArgumentError, "is not a replacement for '\\^model'"),
        ({r"layers\.\d": "layers.0"}, ArgumentError, "Two keys of the file would fill .*layers.0.*so narrow"),
        ({"^modle": "x", "^model": "y"}, WeightsError, "key_mapping's '\\^modle' fits no key of the file"),
        ({"^model": "x"}, WeightsError, "key_mapping was applied first, to keys such as"),
    ],
)
def test_key_mappings_that_cannot_be(saved, mapping, error, message):
    with pytest.raises(error, match=message):
        load(saved, key_mapping=mapping)


# -- the report ------------------------------------------------------------------------------------


def test_the_loading_info(folder):
    """Sorted lists; mismatches as (name, shape in the file, shape in the model)."""
    folder.tensors(
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        zz=torch.ones(1),
        aa=torch.ones(1),
        model__norm__weight=torch.ones(3),
        lm_head__weight=torch.ones(32, 3),
    )
    model, info = load(
        folder.path, allow_missing=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info == {
        "missing_keys": ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"],
        "unexpected_keys": ["aa", "zz"],
        "mismatched_keys": [("lm_head.weight", (32, 3), (32, 16)), ("model.norm.weight", (3,), (16,))],
        "error_msgs": [],
    }
    assert torch.equal(model.model.norm.weight, torch.ones(16))
    text = str(model.load_report)
    assert "model.layers.{0..1}.mlp.up_proj.weight" in text
    assert "lm_head.weight: file [32, 3], model [32, 16]" in text


def test_the_log(folder, caplog):
    load(folder.path)
    assert not caplog.records
    folder.tensors(zz=torch.ones(1))
    with caplog.at_level(logging.WARNING):
        load(folder.path, LlamaForSequenceClassification)
    assert "newly initialised (train them before use):\n    score.weight" in caplog.text
    assert "not used (another head or architecture):\n" in caplog.text
    assert "    lm_head.weight" in caplog.text
    assert "    zz" in caplog.text


def test_a_generation_config(saved):
    given = GenerationConfig(max_new_tokens=7)
    model = load(saved, generation_config=given)
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config is not given
    assert load(saved, generation_config={"max_new_tokens": 8}).generation_config.max_new_tokens == 8


def test_a_broken_generation_config(folder):
    (folder.path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not valid JSON .*generation_config\.json"):
        load(folder.path)
    assert load(folder.path, generation_config=GenerationConfig()).config.vocab_size == 32


def test_progress(saved):
    seen = []
    load(saved, progress=lambda *step: seen.append(step), dtype=torch.float16)
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert {step[1:] for step in seen} == {(done[-1], "loading")}
    assert done[-1] == sum(tensor.nbytes for tensor in tiny_llama().state_dict().values())


def test_errors_can_be_pickled_and_copied(saved):
    with pytest.raises(PretrainedError) as caught:
        load(saved, device_map="cqu")
    assert str(copy.copy(caught.value)) == str(caught.value)


def test_variants(tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path, variant="b")
    with pytest.raises(FileError, match="Pass variant='b'"):
        load(tmp_path)
    tiny_llama(seed=2).save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, variant="b").lm_head.weight, tiny_llama(seed=1).lm_head.weight)
    assert torch.equal(load(tmp_path).lm_head.weight, tiny_llama(seed=2).lm_head.weight)


def test_the_oracle_says_the_same_about_dtypes(tmp_path):
    """The rows of the table in which this library and transformers agree."""
    path = Folder(tmp_path / "bf16", tiny_llama().to(torch.bfloat16)).path
    for dtype in ("auto", torch.float16, "float16", torch.float32):
        theirs = transformers.LlamaForCausalLM.from_pretrained(path, dtype=dtype)
        assert dtypes(load(path, dtype=dtype)) == dtypes(theirs)
