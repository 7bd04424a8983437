# SPDX-License-Identifier: Apache-2.0
"""The static table of architectures: complete, resolvable, and clear about what it lacks."""

from __future__ import annotations

import inspect

import pytest

from pretrained.core.config import PreTrainedConfig
from pretrained.core.registry import (
    AUTO_CLASSES,
    FAMILIES,
    family,
    load_name,
    model_class_name,
    model_type_of,
)
from pretrained.errors import ArgumentError, ConfigError, MissingDependencyError

ROWS = [
    (model_type, framework, name)
    for model_type, row in FAMILIES.items()
    for framework, models in row.models.items()
    for name in models.classes
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_config_class_is_where_the_table_says(model_type):
    row = FAMILIES[model_type]
    config_class = load_name(row.arch, row.config)
    assert issubclass(config_class, PreTrainedConfig)
    assert config_class.model_type == model_type
    assert config_class.__module__ == row.arch


@pytest.mark.parametrize(("model_type", "framework", "name"), ROWS, ids=lambda value: value)
def test_model_class_is_where_the_table_says(model_type, framework, name):
    row = FAMILIES[model_type]
    model_class = load_name(row.models[framework].module, name)
    assert model_class.__name__ == name
    # A large module may have its base class defined in a neighbour: t5 in t5_stacks.
    assert model_class.__module__.startswith(row.models[framework].module)
    assert issubclass(load_name(row.arch, row.config), model_class.config_class)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_model_class_is_left_out_of_the_table(model_type):
    models = FAMILIES[model_type].models["torch"]
    module = inspect.getmodule(load_name(models.module, models.tasks["Model"]))
    base = load_name("pretrained.torch.model", "PreTrainedModel")
    defined = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
    }
    assert {name for name in defined if not name.startswith("_")} <= set(models.classes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_tasks_are_those_of_auto_classes(model_type):
    for models in FAMILIES[model_type].models.values():
        assert set(models.tasks) <= set(AUTO_CLASSES)
        assert "Model" in models.tasks


def test_table_is_sorted_so_that_rows_are_found():
    assert list(FAMILIES) == sorted(FAMILIES)


def test_model_class_name_resolves_without_importing():
    assert model_class_name("gpt2", "ForCausalLM") == ("pretrained.torch.models.gpt2", "GPT2LMHeadModel")


def test_task_that_a_family_lacks_lists_what_it_has():
    with pytest.raises(ArgumentError) as caught:
        model_class_name("llama", "ForSeq2SeqLM")
    assert str(caught.value) == (
        "AutoModelForSeq2SeqLM has no class for model_type 'llama' (model_type): "
        "expected one of mt5, t5, umt5, found 'llama'. "
        "For 'llama' there is AutoModel (LlamaModel), AutoModelForCausalLM (LlamaForCausalLM), "
        "AutoModelForSequenceClassification (LlamaForSequenceClassification), "
        "AutoModelForTokenClassification (LlamaForTokenClassification), "
        "AutoModelForQuestionAnswering (LlamaForQuestionAnswering)."
    )


def test_framework_without_classes_is_said():
    with pytest.raises(ArgumentError, match=r"one of none.*For 'llama' there is no class in this framework"):
        model_class_name("llama", "Model", framework="tensorflow")


def test_unknown_model_type_names_file_type_known_ones_and_the_nearest():
    with pytest.raises(ConfigError) as caught:
        family("lama", where="some/config.json", more=("mine",))
    text = str(caught.value)
    assert text.startswith(
        "The architecture 'lama' is not known here (some/config.json): expected 'model_type'"
    )
    assert "llama, mine, mistral" in text
    assert "Did you mean 'llama'?" in text
    assert "AutoConfig.register(model_type, config_class)" in text


@pytest.mark.parametrize("value", [3, ["llama"], {}])
def test_model_type_of_another_kind_is_unknown(value):
    with pytest.raises(ConfigError, match="is not known here"):
        family(value, where="config.json")


def test_absent_model_type_is_said():
    with pytest.raises(ConfigError, match=r"not say which architecture.*config\.json.*found no 'model_type'"):
        family(None, where="config.json")


def test_missing_framework_names_the_extra(monkeypatch):
    def absent(module):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("pretrained.core.registry.import_module", absent)
    with pytest.raises(MissingDependencyError) as caught:
        load_name("pretrained.torch.models.llama", "LlamaModel")
    assert str(caught.value) == (
        "LlamaModel needs PyTorch, which is not installed (pretrained.torch.models.llama). "
        "Install it with: pip install 'pretrained[torch]'"
    )
    assert isinstance(caught.value, ImportError)


def test_other_missing_modules_are_not_disguised():
    with pytest.raises(ModuleNotFoundError, match="nonexistent_module"):
        load_name("pretrained.nonexistent_module", "X")


@pytest.mark.parametrize(
    ("values", "model_type"),
    [
        ({"model_type": "bert", "architectures": ["T5Model"]}, "bert"),
        ({"architectures": ["UMT5ForConditionalGeneration"]}, "umt5"),
        ({"architectures": ["SomethingElse"]}, None),
        ({"architectures": "UMT5Model"}, None),
        ({}, None),
    ],
)
def test_model_type_is_told_by_the_class_where_a_file_leaves_it_out(values, model_type):
    assert model_type_of(values) == model_type
