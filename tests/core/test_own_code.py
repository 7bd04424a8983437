# SPDX-License-Identifier: Apache-2.0
"""Code beside the weights: written by a save, run only where a call says so, and kept in its folder."""

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from pretrained import (
    ArgumentError,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    ConfigError,
    FileError,
    LlamaConfig,
    LlamaModel,
    MissingDependencyError,
    PreTrainedConfig,
)
from pretrained.core import own_code
from pretrained.core.hub import HubOptions, Source

CONFIGURATION = """
from pretrained import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own-model"
    size: int = 4
"""
PARTS = """
from torch import nn


def layer(size):
    return nn.Linear(size, size)
"""
MODELING = """
from pretrained import PreTrainedModel

from .parts.layers import layer
from .{configuration} import OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = layer(config.size)
        self.post_init()

    def forward(self, x):
        from . import late

        return self.layer(x) * late.FACTOR
"""


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """A user's package of an architecture, imported; its name is new for each test."""
    name = f"own_package_{abs(hash(request.node.name))}"
    folder = tmp_path / name
    (folder / "parts").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "configuration.py").write_text(CONFIGURATION)
    (folder / "parts" / "layers.py").write_text(PARTS)
    (folder / "late.py").write_text("FACTOR = 2.0\n")
    (folder / "modeling.py").write_text(MODELING.format(configuration="configuration"))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(f"{name}.modeling")
    for module in [module for module in sys.modules if module.startswith((name, own_code.PACKAGE))]:
        del sys.modules[module]
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, own_code._Finder)]


@pytest.fixture
def folder(package, tmp_path):
    """A model's folder with its code."""
    package.OwnModel.register_for_auto_class()
    package.OwnModel(package.OwnConfig()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trap(folder, **auto_map):
    """Make a folder whose code leaves a mark where it runs."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": auto_map}))
    (folder / "trap.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Trap: pass\n")
    return folder


def test_a_save_takes_the_source_along(folder):
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}
    assert names == {"configuration.py", "modeling.py", "late.py", "parts/layers.py"}
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration.OwnConfig",
        "AutoModel": "modeling.OwnModel",
    }


def test_nothing_runs_without_being_asked(folder, tmp_path):
    for value in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
        with pytest.raises(
            ConfigError, match=r"AutoConfig\.from_pretrained would have to run code.*OwnConfig in "
        ):
            AutoModel.from_pretrained(folder, **value)
    trapped = trap(tmp_path / "trap", AutoConfig="trap.Trap", AutoModel="trap.Trap")
    with pytest.raises(ConfigError, match=r"class Trap in trap\.py.*pass trust_remote_code=True"):
        AutoModel.from_pretrained(trapped)
    with pytest.raises(ConfigError, match=r"AutoModel\.from_pretrained would .*Trap in trap\.py"):
        AutoModel.from_config(PreTrainedConfig.from_pretrained(trapped))
    assert not (trapped / "ran").exists()
    with pytest.raises(ArgumentError, match="trust_remote_code has a value of the wrong type"):
        AutoModel.from_pretrained(trapped, trust_remote_code="yes")


def test_code_runs_where_it_is_trusted(folder, package, caplog, tmp_path):
    before = set(sys.modules)
    with caplog.at_level(logging.WARNING):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert f"of {folder}" in caplog.text and "modeling.py" in caplog.text and "layers.py" in caplog.text
    assert type(model).__name__ == "OwnModel" and type(model) is not package.OwnModel
    assert type(model.config) is type(model).config_class
    new = {name for name in set(sys.modules) - before if name.rpartition(".")[2] in ("modeling", "layers")}
    assert len(new) == 2 and all(name.startswith(own_code.PACKAGE) for name in new)
    theirs = package.OwnModel.from_pretrained(folder)
    x = torch.ones(1, 4)
    assert torch.equal(model(x), theirs(x))
    # The same files are the same classes; a second save takes the code along again.
    again = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(again) is type(model)
    model.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "parts" / "layers.py").read_text() == PARTS
    assert not list(folder.rglob("__pycache__"))
    second = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert torch.equal(second(x), model(x))
    assert AutoModel.from_config(model.config, trust_remote_code=True).config.size == 4
    # A class that is named needs no trust, and takes the argument.
    assert package.OwnModel.from_pretrained(folder, trust_remote_code=True).config.size == 4


def test_two_folders_with_files_of_one_name_do_not_meet(folder, tmp_path):
    first = AutoModel.from_pretrained(folder, trust_remote_code=True)
    (folder / "late.py").write_text("FACTOR = 3.0\n")
    second = AutoModel.from_pretrained(folder, trust_remote_code=True)
    x = torch.ones(1, 4)
    assert torch.allclose(second(x), 1.5 * first(x))


def test_registered_classes_come_first(folder, package, monkeypatch):
    monkeypatch.setattr(AutoConfig, "_registered", {})
    monkeypatch.setattr(AutoModel, "_registered", {})
    AutoConfig.register("own-model", package.OwnConfig)
    AutoModel.register(package.OwnConfig, package.OwnModel)
    assert type(AutoModel.from_pretrained(folder)) is package.OwnModel
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is package.OwnModel


def test_built_in_architectures_need_no_code_of_theirs(tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    LlamaModel(LlamaConfig(**tiny, intermediate_size=8)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "trap.Trap", "AutoModel": "../trap.Trap"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoModel.from_pretrained(tmp_path)) is LlamaModel


ESCAPES = [
    "../trap.Trap",
    "..trap.Trap",
    "/tmp/trap.Trap",
    "sub/trap.Trap",
    "trap",
    "trap.py.",
    "trap.Trap ",
    "C:\\trap.Trap",
    "--trap.Trap",
    "tr\u00e4p.Trap",
    "import.Trap",
    "",
    5,
    None,
    ["trap.Trap"],
]


@pytest.mark.parametrize("entry", ESCAPES, ids=repr)
@pytest.mark.parametrize("trust", [True, False])
def test_entries_that_leave_the_folder_are_refused(entry, trust, tmp_path):
    trapped = trap(tmp_path / "trap", AutoConfig=entry)
    with pytest.raises(ConfigError, match="not the name of a class in a file of the model's folder"):
        AutoModel.from_pretrained(trapped, trust_remote_code=trust)
    assert not (trapped / "ran").exists()


def test_links_and_imports_that_leave_the_folder_are_refused(tmp_path):
    trapped = trap(tmp_path / "trap", AutoConfig="linked.Trap")
    (tmp_path / "outside.py").write_text("class Trap: pass\n")
    (trapped / "linked.py").symlink_to(tmp_path / "outside.py")
    with pytest.raises(FileError, match=r"linked\.py' is a link that leads out"):
        AutoModel.from_pretrained(trapped, trust_remote_code=True)
    (trapped / "linked.py").unlink()
    (trapped / "linked.py").write_text("from ..outside import Trap\n")
    with pytest.raises(ConfigError, match=r"imports from above its folder.*line 1"):
        AutoModel.from_pretrained(trapped, trust_remote_code=True)


BROKEN = [
    ("class Trap(:", ConfigError, "not Python"),
    (
        "import package_that_nobody_has\nclass Trap: pass",
        MissingDependencyError,
        "Install package_that_nobody_has",
    ),
    ("1 / 0", ConfigError, "failed while it was imported.*ZeroDivisionError"),
    ("from .absent import x", ConfigError, "ModuleNotFoundError"),
    ("x = 1", ConfigError, r"has no class Trap"),
    ("class Trap: pass", ConfigError, "not a class of this library"),
]


@pytest.mark.parametrize(("text", "error", "message"), BROKEN)
def test_code_that_fails_is_named_and_leaves_nothing_behind(text, error, message, tmp_path):
    trapped = trap(tmp_path, AutoConfig="trap.Trap")
    (trapped / "trap.py").write_text(text)
    with pytest.raises(error, match=message):
        AutoConfig.from_pretrained(trapped, trust_remote_code=True)


def repository(folder, revision="main"):
    """Stand for a repository that is in the cache."""
    names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    options = HubOptions(revision=revision)
    return Source("hub", "me/x", folder, None, "0" * 40, frozenset(names), options, _fetched=names)


def test_a_repository_needs_a_revision(folder, monkeypatch):
    with pytest.raises(
        ArgumentError, match=rf"only at a revision that you name.*me/x.*revision='{'0' * 40}'"
    ):
        AutoModel.from_pretrained(repository(folder), trust_remote_code=True)
    model = AutoModel.from_pretrained(repository(folder, "v1.0"), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    with pytest.raises(ArgumentError, match="code_revision is for code in a repository"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, code_revision="v1.0")
    # Code in another repository: at a revision of its own.
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {key: f"you/code--{value}" for key, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    asked = []

    def resolve(name, options=None):
        asked.append((name, options.revision))
        return repository(folder, options.revision)

    monkeypatch.setattr(own_code, "resolve", resolve)
    with pytest.raises(ConfigError, match=r"OwnConfig in configuration\.py of you/code"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ArgumentError, match="code_revision= a commit or a tag"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_pretrained(folder, trust_remote_code=True, code_revision="v2")
    assert asked[0] == ("you/code", "main") and set(asked[1:]) == {("you/code", "v2")}


def test_what_cannot_be_registered(package):
    with pytest.raises(ArgumentError, match="LlamaModel is part of this library"):
        LlamaModel.register_for_auto_class()
    with pytest.raises(ArgumentError, match=r"'AutoModelForCausalML'.*Did you mean 'AutoModelForCausalLM'"):
        package.OwnModel.register_for_auto_class("AutoModelForCausalML")
    with pytest.raises(ArgumentError, match=r"'AutoModel'.*expected AutoConfig"):
        package.OwnConfig.register_for_auto_class("AutoModel")

    class Inside(package.OwnModel):
        pass

    with pytest.raises(ArgumentError, match="source of Inside cannot be copied"):
        Inside.register_for_auto_class()


def test_a_config_alone_takes_its_file_along(package, tmp_path):
    package.OwnConfig.register_for_auto_class()
    package.OwnConfig(size=6).save_pretrained(tmp_path / "config")
    assert sorted(file.name for file in (tmp_path / "config").iterdir()) == [
        "config.json",
        "configuration.py",
    ]
    assert AutoConfig.from_pretrained(tmp_path / "config", trust_remote_code=True).size == 6


def test_an_entry_for_another_auto_class_is_not_run(folder):
    with pytest.raises(ArgumentError, match="AutoModelForCausalLM has no class for OwnConfig"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_the_amount_of_code_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(own_code, "MAX_FILES", 3)
    for i in range(5):
        (tmp_path / f"m{i}.py").write_text(f"from . import m{i + 1}\n")
    with pytest.raises(ConfigError, match="code of this model is too large"):
        own_code.collect(lambda name: p if (p := Path(tmp_path, name)).is_file() else None, ["m0"])
