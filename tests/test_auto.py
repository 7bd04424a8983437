# SPDX-License-Identifier: Apache-2.0
"""The Auto classes: which class they pick, that they read each file once, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pretrained
from pretrained import auto
from pretrained.auto import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from pretrained.core.config import PreTrainedConfig
from pretrained.core.hub import HubOptions, Source
from pretrained.core.registry import AUTO_CLASSES, FAMILIES
from pretrained.errors import ArgumentError, ConfigError, FileError, UnknownArgumentError
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel

TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama's folder."""
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(pretrained.LlamaConfig(**TINY, initializer_range=0.5)).save_pretrained(path)
    return path


@pytest.fixture
def registries():
    """Leaves the process's registrations as they were."""
    classes = [AutoConfig, *(getattr(auto, name) for name in AUTO_CLASSES.values())]
    before = [dict(cls._registered) for cls in classes]
    yield
    for cls, content in zip(classes, before, strict=True):
        cls._registered.clear()
        cls._registered.update(content)


def config_folder(path: Path, **values) -> Path:
    (path / "config.json").write_text(json.dumps(values))
    return path


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_config_class_comes_from_model_type(model_type, tmp_path):
    config = AutoConfig.from_pretrained(config_folder(tmp_path, model_type=model_type, own_key=[1]))
    assert type(config).__name__ == FAMILIES[model_type].config
    assert config.own_key == [1]
    assert config.name_or_path == str(tmp_path)
    assert type(AutoConfig.for_model(model_type)) is type(config)


def test_config_overrides_and_unused_arguments(folder):
    config, rest = AutoConfig.from_pretrained(
        folder, hidden_size=64, nonsense=1, return_unused_kwargs=True, trust_remote_code=False
    )
    assert (config.hidden_size, rest) == (64, {"nonsense": 1})


def test_config_from_a_json_file_and_from_a_weights_file(folder):
    for name in ("config.json", "model.safetensors"):
        assert AutoConfig.from_pretrained(folder / name).hidden_size == 16


def test_unknown_model_type_names_the_file(tmp_path):
    config_folder(tmp_path, model_type="mistrall")
    with pytest.raises(ConfigError) as caught:
        AutoModel.from_pretrained(tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "config.json") in text
    assert "Did you mean 'mistral'?" in text


def test_absent_model_type(tmp_path):
    with pytest.raises(ConfigError, match="does not say which architecture"):
        AutoConfig.from_pretrained(config_folder(tmp_path, hidden_size=3))


def test_missing_path_and_missing_config(tmp_path):
    with pytest.raises(FileError, match="nowhere"):
        AutoConfig.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "other.txt").write_text("")
    with pytest.raises(FileError, match=r"There is no config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "expected"), [(AutoModel, LlamaModel), (AutoModelForCausalLM, LlamaForCausalLM)]
)
def test_model_class_comes_from_model_type(folder, cls, expected):
    model = cls.from_pretrained(folder)
    assert type(model) is expected
    assert not model.training
    assert model.name_or_path == str(folder)
    new = cls.from_config(model.config)
    assert type(new) is expected and new.training


def test_files_are_looked_up_and_read_once(folder, monkeypatch):
    reads, lookups = [], []
    read_text, resolve = Path.read_text, auto.resolve

    def counted_read(self, *args, **kwargs):
        reads.append(self.name)
        return read_text(self, *args, **kwargs)

    def counted_resolve(path, options):
        lookups.append(type(path))
        return resolve(path, options)

    monkeypatch.setattr(Path, "read_text", counted_read)
    monkeypatch.setattr(auto, "resolve", counted_resolve)
    AutoModelForCausalLM.from_pretrained(folder)
    assert reads.count("config.json") == 1
    assert [kind for kind in lookups if kind is not Source] == [type(folder)]


def test_keyword_arguments_that_are_config_attributes_override_it(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, output_attentions=True, use_cache=False)
    assert model.config.output_attentions is True
    assert model.config.use_cache is False


def test_other_keyword_arguments_reach_the_constructor_and_are_refused(folder):
    with pytest.raises(UnknownArgumentError, match="does not know the argument 'nonsense'"):
        AutoModelForCausalLM.from_pretrained(folder, nonsense=1)


def test_with_a_config_object_nothing_overrides_it(folder):
    config = AutoConfig.from_pretrained(folder, output_attentions=True)
    assert AutoModelForCausalLM.from_pretrained(folder, config=config).config.output_attentions is True
    with pytest.raises(UnknownArgumentError, match="use_cache"):
        AutoModelForCausalLM.from_pretrained(folder, config=config, use_cache=False)


def test_config_from_another_place(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    config_folder(tmp_path, **values, rms_norm_eps=0.25)
    model = AutoModelForCausalLM.from_pretrained(folder, config=tmp_path)
    assert model.config.rms_norm_eps == 0.25
    assert model.name_or_path == str(folder)


def test_options_of_a_load_are_the_loads_and_not_the_configs(folder):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="bfloat16", attn_implementation="eager", output_loading_info=True, device_map="cpu"
    )
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.attn_implementation == "eager"
    assert not any(info.values())
    assert str(AutoModelForCausalLM.from_pretrained(folder, torch_dtype="float16").dtype) == "torch.float16"


def test_weights_from_a_state_dict(folder):
    source = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(None, config=source.config, state_dict=source.state_dict())
    assert (model.lm_head.weight == source.lm_head.weight).all()
    with pytest.raises(ArgumentError, match="Nothing to load from"):
        AutoModelForCausalLM.from_pretrained(None, state_dict=source.state_dict())


def test_wrong_family_lists_what_there_is(folder):
    with pytest.raises(
        ValueError, match=r"AutoModelForSeq2SeqLM has no class for model_type 'llama'"
    ) as caught:
        AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert "AutoModelForCausalLM (LlamaForCausalLM)" in str(caught.value)
    with pytest.raises(ArgumentError, match="expected one of mt5, t5, umt5"):
        AutoModelForSeq2SeqLM.from_config(pretrained.LlamaConfig(**TINY))


def test_from_config_passes_its_arguments_on():
    model = AutoModel.from_config(
        pretrained.LlamaConfig(**TINY), dtype="float16", attn_implementation="eager"
    )
    assert str(model.dtype) == "torch.float16"
    assert model.config.attn_implementation == "eager"


def test_from_config_needs_a_config_object(folder):
    with pytest.raises(ArgumentError, match=r"needs a config object.*found str.*AutoModel\.from_pretrained"):
        AutoModel.from_config(str(folder))


@pytest.mark.parametrize("name", ["AutoConfig", *AUTO_CLASSES.values()])
def test_auto_classes_are_not_built(name):
    with pytest.raises(ArgumentError, match=rf"{name} picks a class and is none itself.*from_pretrained"):
        getattr(auto, name)()


def test_with_lm_head_is_deprecated():
    config = pretrained.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=16)
    with pytest.warns(FutureWarning, match="AutoModelForCausalLM") as caught:
        model = auto.AutoModelWithLMHead.from_config(config)
    assert type(model) is pretrained.GPT2LMHeadModel
    assert caught[0].filename == __file__


# -- the hub, offline -----------------------------------------------------------------------------


def test_a_repository_is_looked_up_once_and_keeps_its_options(folder, monkeypatch):
    asked = []

    def look_up(name, options):
        asked.append((name, options))
        return Source("folder", str(name), folder, options=options)

    monkeypatch.setattr(
        auto, "resolve", lambda path, options: path if isinstance(path, Source) else look_up(path, options)
    )
    model = AutoModelForCausalLM.from_pretrained("me/tiny", revision="v2", token="t", local_files_only=True)
    assert asked == [("me/tiny", HubOptions(revision="v2", token="t", local_files_only=True))]
    assert model.name_or_path == "me/tiny"


# -- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.realweights
def test_config_and_model_of_a_gguf_file(smollm2_gguf):
    config = AutoConfig.from_pretrained(smollm2_gguf)
    assert type(config) is pretrained.LlamaConfig
    assert AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name) == config
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert type(model) is LlamaForCausalLM
    assert model.config.hidden_size == config.hidden_size == 576


# -- registration ---------------------------------------------------------------------------------


class MineConfig(PreTrainedConfig):
    model_type = "mine"
    width: int = 4


class MineModel(LlamaModel):
    config_class = MineConfig


class MyLlamaConfig(pretrained.LlamaConfig):
    own: int = 1


class MyLlamaModel(LlamaModel):
    config_class = MyLlamaConfig


@pytest.mark.usefixtures("registries")
def test_registered_classes_are_picked(tmp_path):
    AutoConfig.register("mine", MineConfig)
    AutoModel.register(MineConfig, MineModel)
    config = AutoConfig.from_pretrained(config_folder(tmp_path, model_type="mine", width=9))
    assert type(config) is MineConfig and config.width == 9
    assert AutoModel._class_of(config) is MineModel
    with pytest.raises(ArgumentError, match=r"has no class for MineConfig.*register\(MineConfig"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.usefixtures("registries")
def test_a_registered_config_may_take_a_known_model_type():
    with pytest.raises(ArgumentError, match=r"'llama' is taken.*exist_ok=True"):
        AutoConfig.register("llama", MyLlamaConfig)
    AutoConfig.register("llama", MyLlamaConfig, exist_ok=True)
    AutoModel.register(MyLlamaConfig, MyLlamaModel)
    config = AutoConfig.for_model("llama", **TINY)
    assert type(AutoModel.from_config(config)) is MyLlamaModel
    # Tasks without a class of one's own keep the built-in one.
    assert type(AutoModelForCausalLM.from_config(config)) is LlamaForCausalLM


@pytest.mark.usefixtures("registries")
def test_registration_is_checked():
    with pytest.raises(ArgumentError, match=r"is for another model_type.*expected 'mine'.*found 'yours'"):
        AutoConfig.register("yours", MineConfig)
    with pytest.raises(ArgumentError, match=r"MineModel is for another config.*expected MineConfig"):
        AutoModel.register(MyLlamaConfig, MineModel)
    with pytest.raises(ArgumentError, match="AutoModel has a class for LlamaConfig already"):
        AutoModel.register(pretrained.LlamaConfig, LlamaModel)
    AutoModel.register(MineConfig, MineModel)
    with pytest.raises(ArgumentError, match="AutoModel has a class for MineConfig already"):
        AutoModel.register(MineConfig, MineModel)
    AutoModel.register(MineConfig, MineModel, exist_ok=True)


def test_tokenizers_come_from_the_text_room():
    assert auto.AutoTokenizer is pretrained.AutoTokenizer
    with pytest.raises(AttributeError, match="AutoNonsense"):
        auto.AutoNonsense  # noqa: B018 - the access is the test
