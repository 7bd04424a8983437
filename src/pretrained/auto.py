# SPDX-License-Identifier: Apache-2.0
"""The Auto classes: read ``config.json:model_type``, pick the class that the registry names, delegate.

``AutoModelForX.from_pretrained`` reads the config once and hands the config object to the class it
picks. Importing this module loads no framework; a model's module is imported when it is picked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pretrained.arch.gguf import gguf_config
from pretrained.core.adapter_files import base_of, is_adapter
from pretrained.core.config import CONFIG_NAME, PreTrainedConfig, read_json_object
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.options import LoadOptions, check_config, refuse
from pretrained.core.own_code import CodeOptions, load_class, refuse_code
from pretrained.core.registry import FAMILIES, family, load_name, model_class_name, model_type_of
from pretrained.errors import ArgumentError

if TYPE_CHECKING:
    from pretrained.text.tokenizer import AutoTokenizer  # noqa: F401 - given out by __getattr__

# The arguments of a load that are not the config's, whatever a config may call its attributes.
_FOR_LOAD = ("torch_dtype", *(f.name for f in fields(LoadOptions) if f.name not in ("hub", "config")))


def __getattr__(name: str) -> Any:
    # Lazy, so that models can be had without the text extra's packages.
    if name == "AutoTokenizer":
        return load_name("pretrained.text.tokenizer", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class AutoConfig:
    """Builds the config class that a model_type names; never an instance of itself.

    Raises:
        ArgumentError: on construction.
    """

    _registered: ClassVar[dict[str, type[PreTrainedConfig]]] = {}

    def __init__(self) -> None:
        _refuse_instance(type(self), "AutoConfig.from_pretrained(...) or AutoConfig.for_model(...)")

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return a new config of an architecture.

        Args:
            model_type: As in config.json, ``"llama"``.
            *args: Passed to the config class.
            **kwargs: Its fields.

        Raises:
            ConfigError: the model_type is unknown, or a field has a wrong value.
        """
        return cls._class_of(model_type, where="model_type")(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | Source, **kwargs: Any) -> Any:
        """Read the config of a folder, a hub id, a config.json or a GGUF file.

        Args:
            pretrained_model_name_or_path: Folder, file or hub id.
            **kwargs: Hub arguments (`revision`, `subfolder`, `token`, ...), `gguf_file` to read the
                config out of a GGUF file of the folder, `trust_remote_code=True` to run a class that comes
                with the model, `return_unused_kwargs=True` to get ``(config,
                rest)``, and values that override the file's.

        Returns:
            A config of the class that ``model_type`` names.

        Raises:
            FileError: there is no such path, or no config in it.
            ConfigError: the file is no config, or its model_type is absent or unknown.
        """
        code = CodeOptions.take(kwargs)
        refuse(kwargs)
        source = resolve(pretrained_model_name_or_path, HubOptions.take(kwargs))
        values, file = _read_values(source, kwargs.pop("gguf_file", None))
        values["_name_or_path"] = source.name
        config_class = _own_class(cls, values.get("model_type"), values, file, lambda: source, code)
        if config_class is None:
            config_class = cls._class_of(model_type_of(values), where=file)
        return config_class.from_dict(values, **kwargs)

    @classmethod
    def register(cls, model_type: str, config: type[PreTrainedConfig], exist_ok: bool = False) -> None:
        """Make a config class of your own known for the rest of the process.

        Args:
            model_type: What config.json files say.
            config: The class; its `model_type` must be the same.
            exist_ok: Replace a class that is known by that model_type.

        Raises:
            ArgumentError: the two disagree, or the model_type is taken.
        """
        if config.model_type != model_type:
            raise ArgumentError(
                f"{config.__name__} is for another model_type",
                where="model_type",
                expected=repr(config.model_type),
                found=repr(model_type),
                mend=f"Set model_type = {model_type!r} in the class.",
            )
        if not exist_ok and (model_type in FAMILIES or model_type in cls._registered):
            raise ArgumentError(
                f"model_type {model_type!r} is taken",
                where="model_type",
                mend="Pass exist_ok=True to replace it.",
            )
        cls._registered[model_type] = config

    @classmethod
    def _class_of(cls, model_type: object, *, where: object) -> type[PreTrainedConfig]:
        if isinstance(model_type, str) and model_type in cls._registered:
            return cls._registered[model_type]
        row = family(model_type, where=where, more=tuple(cls._registered))
        found: type[PreTrainedConfig] = load_name(row.arch, row.config)
        return found


def _read_values(source: Source, gguf_file: str | None) -> tuple[dict[str, Any], Path]:
    """Return what config.json holds, or what a GGUF file says in its place, and the file."""
    if gguf_file is not None:
        weights = find_weights(source.weights_folder(gguf_file=gguf_file), gguf_file=gguf_file)
        checkpoint = open_checkpoint(weights)
    elif source.path is not None and _is_gguf(source.path):
        checkpoint = open_checkpoint(source.path)
    else:
        # A weights file stands for its folder, as it does for the models' own from_pretrained.
        named = source.path if source.path is not None and source.path.suffix == ".json" else None
        file = named or source.require(CONFIG_NAME)
        return read_json_object(file), file
    return gguf_config(checkpoint.metadata, checkpoint.tensors), checkpoint.files[0]


def _is_gguf(file: Path) -> bool:
    if file.suffix == ".gguf":
        return True
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


class _AutoModel:
    """What all AutoModel classes do; each names its task.

    Raises:
        ArgumentError: on construction.
    """

    _task: ClassVar[str]
    _registered: ClassVar[dict[type[PreTrainedConfig], Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._registered = {}

    def __init__(self) -> None:
        name = type(self).__name__
        _refuse_instance(type(self), f"{name}.from_pretrained(...) or {name}.from_config(config)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: PreTrainedConfig | str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model with the class that its config's model_type names, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Hub id, folder, weights file, or None with `config` and
                `state_dict`.
            *model_args: Passed to the constructor after the config.
            config: A config object, or where to read one; None for the one beside the weights.
            **kwargs: As for the models' own ``from_pretrained``, and `trust_remote_code=True` to run a class
                that comes with the model; of a repository, at a `revision` that is named (`code_revision`
                where the code is in another). Without a config object, those that
                are attributes of the config override it.

        Returns:
            The model, or ``(model, loading_info)`` with ``output_loading_info=True``.

        Raises:
            ArgumentError: the model_type has no class for this task; a ValueError.
            ConfigError: the model_type is absent or unknown.
            FileError: nothing there, or files missing.
        """
        path: Any = pretrained_model_name_or_path
        if path is None and config is None:
            raise ArgumentError(
                "Nothing to load from",
                where="pretrained_model_name_or_path",
                found="None",
                mend="Pass a name or path, or both config= and state_dict=.",
            )
        check_config(config)
        code = CodeOptions.take(kwargs)
        code_source: Source | None = None
        if not isinstance(config, PreTrainedConfig):
            path, code_source, config, kwargs = _read_config(path, config, kwargs, code)
        model_class = cls._class_of(config, code_source, code)
        return model_class.from_pretrained(path, *model_args, config=config, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        """Build a model with new weights, in training mode.

        Args:
            config: Says which architecture, and its sizes.
            **kwargs: `dtype`, `attn_implementation`, `trust_remote_code`; the rest goes to the constructor.

        Raises:
            ArgumentError: the model_type has no class for this task, or `config` is no config object.
        """
        code = CodeOptions.take(kwargs)
        return cls._class_of(config, None, code)._from_config(config, **kwargs)

    @classmethod
    def register(cls, config_class: type[PreTrainedConfig], model_class: Any, exist_ok: bool = False) -> None:
        """Make a model class of your own known to this Auto class for the rest of the process.

        Args:
            config_class: The config that picks it; register that with `AutoConfig.register`.
            model_class: The class; its `config_class`, where it has one, must be the same.
            exist_ok: Replace a class that is known for that config.

        Raises:
            ArgumentError: the two disagree, or the config has a class already.
        """
        own = getattr(model_class, "config_class", None)
        if own is not None and own is not config_class:
            raise ArgumentError(
                f"{model_class.__name__} is for another config",
                where="config_class",
                expected=own.__name__,
                found=config_class.__name__,
            )
        if not exist_ok and (config_class in cls._registered or cls._built_in(config_class) is not None):
            raise ArgumentError(
                f"{cls.__name__} has a class for {config_class.__name__} already",
                where="config_class",
                mend="Pass exist_ok=True to replace it.",
            )
        cls._registered[config_class] = model_class

    @classmethod
    def _class_of(cls, config: Any, source: Source | None = None, code: CodeOptions | None = None) -> Any:
        if not isinstance(config, PreTrainedConfig):
            raise ArgumentError(
                f"{cls.__name__} needs a config object",
                where="config",
                expected="a PreTrainedConfig",
                found=type(config).__name__,
                mend=f"To load a model by name or path use {cls.__name__}.from_pretrained(...).",
            )
        if type(config) in cls._registered:
            return cls._registered[type(config)]
        own = _own_class(
            cls,
            config.model_type,
            config.__dict__,
            config.name_or_path or "config",
            lambda: source if source is not None else resolve(config.name_or_path),
            code or CodeOptions(),
        )
        if own is not None:
            return own
        if config.model_type not in FAMILIES:
            raise ArgumentError(
                f"{cls.__name__} has no class for {type(config).__name__}",
                where="config",
                expected=f"a config of one of {', '.join(FAMILIES)}",
                found=f"model_type {config.model_type!r}",
                mend=f"Register one with {cls.__name__}.register({type(config).__name__}, model_class).",
            )
        return load_name(*model_class_name(config.model_type, cls._task))

    @classmethod
    def _built_in(cls, config_class: type[PreTrainedConfig]) -> str | None:
        row = FAMILIES.get(config_class.model_type)
        if row is None or (config_class.__module__, config_class.__name__) != (row.arch, row.config):
            return None
        return row.models["torch"].tasks.get(cls._task)


class AutoModel(_AutoModel):
    """Picks the headless model."""

    _task = "Model"


class AutoModelForPreTraining(_AutoModel):
    """Picks the model with the heads it was pretrained with."""

    _task = "ForPreTraining"


class AutoModelForCausalLM(_AutoModel):
    """Picks the model that predicts the next token."""

    _task = "ForCausalLM"


class AutoModelForMaskedLM(_AutoModel):
    """Picks the model that fills in masked tokens."""

    _task = "ForMaskedLM"


class AutoModelForSeq2SeqLM(_AutoModel):
    """Picks the encoder-decoder language model."""

    _task = "ForSeq2SeqLM"


class AutoModelForSequenceClassification(_AutoModel):
    """Picks the model that classifies texts."""

    _task = "ForSequenceClassification"


class AutoModelForTokenClassification(_AutoModel):
    """Picks the model that classifies tokens."""

    _task = "ForTokenClassification"


class AutoModelForQuestionAnswering(_AutoModel):
    """Picks the model that finds an answer's span in a text."""

    _task = "ForQuestionAnswering"


class AutoModelForMultipleChoice(_AutoModel):
    """Picks the model that chooses among texts."""

    _task = "ForMultipleChoice"


class AutoModelForNextSentencePrediction(_AutoModel):
    """Picks the model that tells whether one text follows another."""

    _task = "ForNextSentencePrediction"


class AutoModelForTextEncoding(_AutoModel):
    """Picks the model that encodes texts: the encoder alone, where there is a decoder too."""

    _task = "ForTextEncoding"


class AutoModelWithLMHead(_AutoModel):
    """Picks a language model of whatever kind; deprecated, as the three kinds have classes of their own."""

    _task = "WithLMHead"

    @classmethod
    def _class_of(cls, config: Any, source: Source | None = None, code: CodeOptions | None = None) -> Any:
        warnings.warn(
            "AutoModelWithLMHead is deprecated; use AutoModelForCausalLM, AutoModelForMaskedLM or "
            "AutoModelForSeq2SeqLM.",
            FutureWarning,
            stacklevel=3,
        )
        return super()._class_of(config, source, code)


def _read_config(
    path: Any, config: str | Path | None, kwargs: dict[str, Any], code: CodeOptions
) -> tuple[Source | None, Source, PreTrainedConfig, dict[str, Any]]:
    """Read the config of a load.

    Returns:
        Where the weights are, looked up once; where the config is; the config, with the call's overrides
        in it; and the arguments that are left for the model's own ``from_pretrained``.
    """
    refuse(kwargs)
    hub_options = HubOptions.take(kwargs)
    # Some of the load's arguments (dtype) are attributes of a config too, and must not go there.
    for_load = {name: kwargs.pop(name) for name in _FOR_LOAD if name in kwargs}
    source = None if path is None else resolve(path, hub_options)
    # A GGUF file holds the config of its own weights only.
    gguf_file = for_load.get("gguf_file") if config is None else None
    config_source = resolve(config, hub_options) if config is not None else source
    if config is None and source is not None and is_adapter(source, for_load.get("variant")):
        config_source = base_of(source)
    assert config_source is not None  # from_pretrained refuses a call with neither
    found, rest = AutoConfig.from_pretrained(
        config_source,
        gguf_file=gguf_file,
        return_unused_kwargs=True,
        trust_remote_code=code.trust,
        code_revision=code.revision,
        **kwargs,
    )
    return source, config_source, found, rest | for_load


def _own_class(
    asking: type[Any],
    model_type: Any,
    values: Mapping[str, Any],
    where: object,
    source: Callable[[], Source],
    code: CodeOptions,
) -> Any:
    """Return the class that a config's auto_map names for an Auto class; None where another is to be used.

    Raises:
        ConfigError: it is the only one there is, and its code is not to be run.
    """
    auto_map = values.get("auto_map")
    if not isinstance(auto_map, Mapping) or asking.__name__ not in auto_map:
        return None
    if isinstance(model_type, str) and model_type in AutoConfig._registered and asking is AutoConfig:
        return None
    if code.trust:
        return load_class(source(), auto_map, asking.__name__, code)
    if model_type in FAMILIES:
        return None
    raise refuse_code(auto_map[asking.__name__], where, f"{asking.__name__}.from_pretrained")


def _refuse_instance(cls: type, mend: str) -> NoReturn:
    raise ArgumentError(
        f"{cls.__name__} picks a class and is none itself", where=cls.__name__, mend=f"Use {mend}."
    )
