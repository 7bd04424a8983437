# SPDX-License-Identifier: Apache-2.0
"""`PreTrainedConfig`: a model's config.json as a typed object that loses nothing.

A config class declares its fields as annotated class attributes with defaults. Everything else in a
config.json is kept as a plain attribute and written back. Values are checked against the annotations
when they are set, so that a wrong file fails here, by the name of the key, and not inside a layer.
"""

from __future__ import annotations

import copy
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pretrained.core.atomic_files import write_text_atomically
from pretrained.core.dtypes import dtype_name
from pretrained.core.hub import HubOptions, resolve
from pretrained.core.push import PushToHubMixin
from pretrained.errors import ArgumentError, ConfigError, FileError

CONFIG_NAME = "config.json"


class PreTrainedConfig(PushToHubMixin):
    """Base of every model configuration.

    Subclasses set `model_type`, declare fields (``hidden_size: int = 768``) and may give
    `attribute_map` (the ecosystem's common name -> this architecture's own), `check` (contradictions
    between fields) and `normalise` (old spellings -> new ones, before fields are set).

    Args:
        **values: Field values by name, in the class's spelling or the common one; unknown names are
            kept as attributes.

    Raises:
        ConfigError: a value has the wrong type, or two values contradict each other.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    architectures: list[str] | None = None
    dtype: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    cross_attention_hidden_size: int | None = None
    tie_word_embeddings: bool = True
    chunk_size_feed_forward: int = 0
    pruned_heads: dict[int, list[int]] = {}  # noqa: RUF012 - copied for each instance by _defaults
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}  # noqa: RUF012
    label2id: dict[str, int] = {"LABEL_0": 0, "LABEL_1": 1}  # noqa: RUF012
    problem_type: str | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __init__(self, **values: Any) -> None:
        attn_implementation = values.pop("attn_implementation", None)
        values.pop("model_type", None)
        object.__setattr__(self, "_attn_implementation", attn_implementation)
        object.__setattr__(self, "_given", frozenset(values) | getattr(self, "_given", frozenset()))
        object.__setattr__(self, "_name_or_path", values.pop("_name_or_path", ""))
        values = self.normalise(_labels(dict(values)))
        for name, default in _defaults(type(self)).items():
            if name not in self.__dict__:
                object.__setattr__(self, name, default)
        for name, value in values.items():
            setattr(self, name, value)
        self.derive()
        self.check()

    # -- what subclasses may override ----------------------------------------------------------

    def normalise(self, values: dict[str, Any]) -> dict[str, Any]:
        """Translate old spellings of config.json into this class's fields.

        Args:
            values: As given to the constructor or read from a file; may be changed and returned.
        """
        return values

    def derive(self) -> None:
        """Fill in fields that follow from others where the file leaves them out."""

    def check(self) -> None:
        """Raise `ConfigError` where fields contradict each other."""

    def spell(self, values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Translate fields back into the spelling of the file they came from (inverse of `normalise`).

        Args:
            values: What is about to be written; may be changed and returned.
            given: The keys of the file or call that this config was made from.
        """
        return values

    # -- attributes ----------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        hint = _hints(typing.cast(Any, type(self))).get(name)
        if name in ("dtype", "torch_dtype"):
            name, value = "dtype", None if value is None else _dtype(value)
        elif hint is not None:
            value = _checked(type(self), name, value, hint)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        own_name = type(self).attribute_map.get(name)
        if own_name is not None and own_name != name:
            return getattr(self, own_name)
        if name == "torch_dtype":
            return self.dtype
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def name_or_path(self) -> str:
        """The id or folder this config was read from, or an empty string."""
        return str(getattr(self, "_name_or_path", ""))

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head; setting it renames the labels LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != len(self.id2label):
            self.id2label = {index: f"LABEL_{index}" for index in range(count)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """Whether models return output objects (True) or plain tuples."""
        return self.return_dict

    @property
    def attn_implementation(self) -> str | None:
        """The attention implementation asked for, or None for the default; never saved."""
        return typing.cast("str | None", self._attn_implementation)

    def get_text_config(self, decoder: bool = False) -> Self:
        """Return the part of the config that describes the text model: here the config itself.

        Args:
            decoder: Accepted for compatibility; composite configs tell encoder and decoder apart.
        """
        return self

    # -- reading -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read the config of a model folder, a hub id or a config.json.

        Args:
            pretrained_model_name_or_path: Folder, file or hub id.
            **kwargs: Hub arguments (`revision`, `subfolder`, `token`, `cache_dir`, `force_download`,
                `local_files_only`), `return_unused_kwargs=True` to get ``(config, rest)``, and values
                that override the file's.

        Raises:
            FileError: there is no such path or no config.json in it.
            ConfigError: the file is not a config of this class.
        """
        hub_options = HubOptions.take(kwargs)
        values, _ = read_config(pretrained_model_name_or_path, hub_options)
        values["_name_or_path"] = str(pretrained_model_name_or_path)
        config: Self = cls.from_dict(values, **kwargs)
        return config

    @classmethod
    def get_config_dict(cls, path: str | Path, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the raw content of a config.json and the arguments that are not hub arguments.

        Args:
            path: Folder, file or hub id.
            **kwargs: Hub arguments, as for `from_pretrained`.
        """
        hub_options = HubOptions.take(kwargs)
        return read_config(path, hub_options)[0], kwargs

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Build a config from the content of a config.json.

        Args:
            config_dict: Key-value pairs, in any spelling the family has used.
            **kwargs: Overrides; with `return_unused_kwargs=True` those that are no attribute of the
                config come back in ``(config, rest)``, otherwise they are kept as attributes.

        Raises:
            ConfigError: a value has the wrong type, or the file is of another architecture.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        file_type = config_dict.get("model_type")
        if cls.model_type and file_type and file_type != cls.model_type:
            raise ConfigError(
                f"This config is not a {cls.__name__}",
                where=config_dict.get("_name_or_path") or "model_type",
                expected=repr(cls.model_type),
                found=repr(file_type),
                mend="Use AutoConfig (or an Auto model class), which picks the class from model_type.",
            )
        config = cls(**copy.deepcopy(dict(config_dict)))
        if file_type and not cls.model_type:
            object.__setattr__(config, "model_type", file_type)
        unused = {}
        overrides = {}
        for name, value in kwargs.items():
            if return_unused and not config.has(name):
                unused[name] = value
            else:
                overrides[name] = value
        if overrides:
            config.update(overrides)
        return (config, unused) if return_unused else config

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Read a config from one JSON file.

        Args:
            json_file: Path of the file.
        """
        config: Self = cls.from_dict(read_json_object(Path(json_file)))
        return config

    def has(self, name: str) -> bool:
        """Tell whether `name` is a field, a common name or a kept key of this config.

        Args:
            name: Attribute name.
        """
        known = name in self.__dict__ or name in type(self).attribute_map
        settable = isinstance(getattr(type(self), name, None), property)
        return known or settable or name in ("torch_dtype", "attn_implementation")

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several attributes and check the whole again.

        Args:
            values: New values by name.
        """
        values = dict(values)
        if "attn_implementation" in values:
            object.__setattr__(self, "_attn_implementation", values.pop("attn_implementation"))
        object.__setattr__(self, "_given", self._given | frozenset(values))
        for name, value in self.normalise(_labels(values)).items():
            setattr(self, name, value)
        self.derive()
        self.check()

    # -- writing -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return every field and kept key, JSON-able, plus `model_type`."""
        values = {name: copy.deepcopy(value) for name, value in self._items()}
        values = self.spell(values, self._given)
        values["model_type"] = self.model_type
        return dict(sorted(values.items()))

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is worth writing: values that differ from the defaults or were given."""
        defaults = _defaults(type(self))
        given = {type(self).attribute_map.get(name, name) for name in self._given}
        if "torch_dtype" in given:
            given.add("dtype")
        values = {
            name: copy.deepcopy(value)
            for name, value in self._items()
            if name in given or name not in defaults or value != defaults[name]
        }
        values = self.spell(values, self._given)
        values["model_type"] = self.model_type
        return dict(sorted(values.items()))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the config as the text of a config.json.

        Args:
            use_diff: Leave out defaults that were not given.
        """
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the config to one JSON file, all or nothing.

        Args:
            json_file_path: Where to.
            use_diff: Leave out defaults that were not given.
        """
        write_text_atomically(Path(json_file_path), self.to_json_string(use_diff))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json into a folder, which is made where it is absent.

        Args:
            save_directory: The folder.
            push_to_hub: Also push it; then `kwargs` are those of `push_to_hub`.
            **kwargs: `repo_id` and the other arguments of `push_to_hub`.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError("A config is saved into a folder", where=folder, found="a file")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", None) or folder.name, **kwargs)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == typing.cast(Self, other).to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def _items(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.__dict__.items():
            if not name.startswith("_"):
                yield name, value


PretrainedConfig = PreTrainedConfig


def read_config(path: str | Path, options: HubOptions | None = None) -> tuple[dict[str, Any], Path]:
    """Read the raw config.json of a folder, file or hub id.

    Args:
        path: Folder, file or hub id.
        options: Where on the hub, and how; None for the defaults.

    Returns:
        The content and the local file it came from.

    Raises:
        FileError: no such path, or no config.json in it.
        ConfigError: not a JSON object.
    """
    source = resolve(path, options or HubOptions())
    file = source.file(CONFIG_NAME, required=True)
    if file is None:
        raise FileError(f"There is no {CONFIG_NAME}", where=path)
    return read_json_object(file), file


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object.

    Args:
        file: Path of the file.

    Raises:
        FileError: it cannot be read.
        ConfigError: it is not UTF-8 JSON, or its top level is no object.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("This file is not UTF-8 text", where=file, found=error.reason) from error
    except OSError as error:
        raise FileError("This file cannot be read", where=file, found=error.strerror) from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "This file is not valid JSON",
            where=file,
            found=f"{error}" if text.strip() else "an empty file",
            mend="Download or write it again.",
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "This file does not hold a JSON object",
            where=file,
            expected="{...}",
            found=type(content).__name__,
        )
    return content


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Field name -> annotation, resolved once for each class."""
    resolved = typing.get_type_hints(cls)
    return {name: hint for name, hint in resolved.items() if typing.get_origin(hint) is not ClassVar}


def _defaults(cls: type) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(cls, name)) for name in _hints(cls) if hasattr(cls, name)}


def _labels(values: dict[str, Any]) -> dict[str, Any]:
    """Make id2label, label2id and num_labels agree, whichever were given."""
    id2label = values.get("id2label")
    if isinstance(id2label, Mapping):
        try:
            id2label = {int(index): label for index, label in id2label.items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "A key of id2label is not a whole number", where="id2label", found=error
            ) from error
        values["id2label"] = id2label
        values.setdefault("label2id", {label: index for index, label in id2label.items()})
    pruned = values.get("pruned_heads")
    if isinstance(pruned, Mapping):
        values["pruned_heads"] = {
            int(layer): sorted(int(head) for head in heads) for layer, heads in pruned.items()
        }
    count = values.pop("num_labels", None)
    if count is not None and (id2label is None or len(id2label) != count):
        values["id2label"] = {index: f"LABEL_{index}" for index in range(count)}
        values["label2id"] = {label: index for index, label in values["id2label"].items()}
    return values


def _dtype(value: Any) -> str:
    try:
        return dtype_name(str(value))
    except ArgumentError as error:
        raise ConfigError(error.what, where="dtype", expected=error.expected, mend=error.mend) from error


def _checked(cls: type, name: str, value: Any, hint: Any) -> Any:
    """Return `value`, widened where that loses nothing, or raise `ConfigError`."""
    fits, value = _fit(value, hint)
    if fits:
        return value
    raise ConfigError(
        f"{cls.__name__}.{name} has a value of the wrong type",
        where=name,
        expected=_spelling(hint),
        found=f"{type(value).__name__} {value!r}"[:200],
        mend=f"Correct {name!r} in config.json or in the call.",
    )


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:  # noqa: PLR0911 - one line for each kind of annotation
    origin = typing.get_origin(hint)
    if hint is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        results = [_fit(value, option) for option in typing.get_args(hint)]
        return next((result for result in results if result[0]), (False, value))
    if hint is type(None):
        return value is None, value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        if isinstance(value, float) and value.is_integer():
            return True, int(value)
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else value
    if origin is typing.Literal:
        return value in typing.get_args(hint), value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, value
        items = [_fit(item, typing.get_args(hint)[0]) for item in value]
        return all(fits for fits, _ in items), [item for _, item in items]
    if origin is dict:
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    return isinstance(value, hint), value


def _spelling(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
