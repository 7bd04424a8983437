# SPDX-License-Identifier: Apache-2.0
"""`CompileConfig`, and what a generation config makes of it."""

import pytest

from pretrained.core.compiling import CompileConfig, as_compile_config
from pretrained.core.generation_checks import wants_compile
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError


def test_dicts_and_other_libraries_objects_are_read():
    class Theirs:
        def to_dict(self):
            return {"mode": "reduce-overhead", "fullgraph": False, "_compile_all_devices": None}

    assert as_compile_config({"backend": "eager"}) == CompileConfig(backend="eager")
    assert as_compile_config(Theirs()) == CompileConfig(mode="reduce-overhead", fullgraph=False)
    assert as_compile_config(None) == CompileConfig()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"backends": "eager"}, "backend"),
        ({"fullgraph": 1}, "fullgraph"),
        ({"dynamic": "yes"}, "dynamic"),
        ({"mode": 3}, "mode"),
        ({"backend": ""}, "backend"),
        ({"mode": "default", "options": {"a": 1}}, "options"),
        (7, "CompileConfig or a dict"),
    ],
)
def test_wrong_values_are_named(value, words):
    with pytest.raises(GenerationError, match=words):
        GenerationConfig(compile_config=value)


def test_a_config_with_one_is_written_and_read():
    config = GenerationConfig(compile_config=CompileConfig(backend="eager"))
    again = GenerationConfig.from_dict(GenerationConfig(compile_config={"backend": "eager"}).to_dict())
    assert as_compile_config(again.compile_config) == as_compile_config(config.compile_config)
    assert '"backend": "eager"' in config.to_json_string()


def test_what_asks_for_compiling():
    assert not wants_compile(GenerationConfig())
    assert wants_compile(GenerationConfig(compile=True))
    assert wants_compile(GenerationConfig(compile_config={}))
    assert not wants_compile(GenerationConfig(compile_config={}, disable_compile=True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"disable_compile": True}, "contradict"),
        ({"use_cache": False}, "needs a cache"),
        ({"cache_implementation": "dynamic"}, "'dynamic'"),
    ],
)
def test_contradictions_are_named(settings, words):
    with pytest.raises(GenerationError, match=words):
        GenerationConfig(compile=True, **settings)
