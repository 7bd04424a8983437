# SPDX-License-Identifier: Apache-2.0
"""The arguments of a load are sorted: obeyed, harmless, retired, of a later release, or someone else's."""

from pathlib import Path

import pytest

from pretrained.arch.llama import LlamaConfig
from pretrained.core.options import (
    _HARMLESS,
    _LATER,
    _RETIRED,
    LoadOptions,
    check_config,
    refuse,
    unknown_argument,
)
from pretrained.errors import ArgumentError, NotYetError, UnknownArgumentError


def test_what_is_taken_and_what_is_left():
    kwargs = {
        "dtype": "auto",
        "revision": "v2",
        "variant": "fp16",
        "output_attentions": True,
        "mine": 1,
        "low_cpu_mem_usage": True,
        "progress": False,
        "use_safetensors": None,
        "disable_mmap": None,
    }
    options = LoadOptions.take(kwargs)
    assert kwargs == {"output_attentions": True, "mine": 1}
    assert (options.dtype, options.variant, options.hub.revision) == ("auto", "fp16", "v2")
    assert (options.progress, options.use_safetensors, options.disable_mmap) == (False, None, False)


def test_the_older_name_of_dtype():
    assert LoadOptions.take({"torch_dtype": "float16"}).dtype == "float16"
    assert LoadOptions.take({"torch_dtype": "float16", "dtype": "float64"}).dtype == "float64"
    assert LoadOptions.take({"torch_dtype": "float16", "dtype": None}).dtype == "float16"


def test_paths_become_texts():
    options = LoadOptions.take({"gguf_file": Path("x.gguf"), "subfolder": Path("a/b")})
    assert (options.gguf_file, options.hub.subfolder) == ("x.gguf", "a/b")


@pytest.mark.parametrize("name", _HARMLESS)
def test_harmless_names(name):
    kwargs = {name: object()}
    LoadOptions.take(kwargs)
    assert kwargs == {}


@pytest.mark.parametrize("name", sorted(_RETIRED))
def test_retired_names(name):
    with pytest.raises(UnknownArgumentError, match=f"{name} is no longer an argument") as caught:
        LoadOptions.take({name: None})
    assert _RETIRED[name] in str(caught.value)


@pytest.mark.parametrize("name", sorted(_LATER))
def test_names_of_later_releases(name):
    idle, release = _LATER[name]
    for value in idle:
        kwargs = {name: value}
        refuse(kwargs)
        assert kwargs == {}
    with pytest.raises(NotYetError) as caught:
        refuse({name: {"some": "wish"}})
    assert str(caught.value) == f"{name}={{'some': 'wish'}} is not offered yet ({name}). {release}"


def test_values_that_compare_oddly_still_ask_for_something():
    class Odd:
        def __eq__(self, other):
            return False

        __hash__ = None

    with pytest.raises(NotYetError, match="tp_plan="):
        refuse({"tp_plan": Odd()})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"variant": 1}, r"variant has a value of the wrong type \(variant\): expected a text, found int 1"),
        ({"token": 1.5}, r"token has .*expected a token, True or False, found float 1\.5"),
        ({"state_dict": [], "gguf_file": "x"}, r"state_dict has .*expected tensors by name"),
        ({"state_dict": {}, "gguf_file": "x"}, r"state_dict and gguf_file both give the weights.*only one"),
        ({"weights_only": False}, r"weights_only=False would execute the code in a pickle"),
        ({"dtype": {}}, r"dtype is a dictionary, which is for models made of several sub-models"),
        ({"config": {"a": 1}}, r"config has .*expected a config object.*config_class\.from_dict"),
        ({"config": 5}, r"config has a value of the wrong type .*found int 5"),
    ],
)
def test_values_that_cannot_be(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        LoadOptions.take(kwargs)


def test_configs():
    for config in (None, "path", Path("path"), LlamaConfig()):
        check_config(config)


def test_unknown_arguments():
    error = unknown_argument("LlamaModel", ["devicemap", "x"], ())
    assert isinstance(error, TypeError)
    assert str(error) == (
        "LlamaModel does not know the argument 'devicemap' (devicemap, x). Did you mean 'device_map'?"
    )
    assert "Did you mean 'hidden_size'?" in str(unknown_argument("M", ["hiden_size"], ["hidden_size"]))
    assert "Did you mean 'local_files_only'?" in str(unknown_argument("M", ["local_file_only"], ()))
    assert "generation setting" in str(unknown_argument("M", ["temperature"], ()))
    assert "neither an option" in str(unknown_argument("M", ["qqq"], ()))
    assert "Because." in str(unknown_argument("M", ["temperature"], (), "Because."))
