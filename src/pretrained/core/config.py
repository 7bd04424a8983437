# SPDX-License-Identifier: Apache-2.0
"""`PreTrainedConfig`: a model's config.json as a typed object that loses nothing.

A config class declares its fields as annotated class attributes with defaults. Everything else in a
config.json is kept as a plain attribute and written back. Values are checked against the annotations
when they are set, so that a wrong file fails here, by the name of the key, and not inside a layer.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pretrained.core.atomic_files import write_text_atomically
from pretrained.core.config_values import (
    PROBLEM_TYPES,
    check_ranges,
    checked,
    dtype_field,
    hints,
    label_count,
    label_fields,
)
from pretrained.core.hub import HubOptions, resolve
from pretrained.core.own_code import AutoClassMixin, own_code, write_own_code
from pretrained.core.push import PushToHubMixin, prepare_push
from pretrained.errors import ArgumentError, ConfigError, FileError, did_you_mean

CONFIG_NAME = "config.json"

# A config.json has a few kilobytes, one with a hundred thousand labels some megabytes.
_MAX_JSON_BYTES = 20_000_000


class PreTrainedConfig(AutoClassMixin, PushToHubMixin):
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
    _auto_classes: ClassVar[tuple[str, ...]] = ("AutoConfig",)
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
        object.__setattr__(self, "_name_or_path", values.pop("_name_or_path", ""))
        # Keys that would hide a method or an internal of this class are carried, not set.
        kept = {name: values.pop(name) for name in list(values) if _is_reserved(type(self), name)}
        object.__setattr__(self, "_kept", kept)
        object.__setattr__(self, "_given", frozenset(values))
        values = self.normalise(label_fields(dict(values)))
        for name, default in _defaults(type(self)).items():
            if name not in self.__dict__:
                object.__setattr__(self, name, default)
        for name, value in values.items():
            setattr(self, name, value)
        if not self.__dict__.get("_unfinished", False):
            self._finish()

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

    def _finish(self) -> None:
        """Derive what follows from the fields, and check them against each other."""
        self.derive()
        self.check()
        check_ranges(type(self), self.__dict__)
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"Unknown problem_type {self.problem_type!r}",
                where="problem_type",
                expected=", ".join(PROBLEM_TYPES),
                mend=did_you_mean(self.problem_type, PROBLEM_TYPES),
            )

    # -- attributes ----------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        hint = hints(typing.cast(Any, type(self))).get(name)
        if name in ("dtype", "torch_dtype"):
            name, value = "dtype", dtype_field(value)
        elif hint is not None:
            value = checked(type(self), name, value, hint)
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
        for name, value in label_fields({"num_labels": label_count(count)}, current=self.num_labels).items():
            setattr(self, name, value)

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
        try:
            return cls._read(config_dict, kwargs.pop("return_unused_kwargs", False), kwargs)
        except ConfigError as error:
            # The key alone does not say which of a user's many files is meant.
            source = config_dict.get("_name_or_path")
            if source and str(source) not in str(error.where):
                error.where = f"{error.where}, {source}" if error.where else source
            raise

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any], return_unused: bool, kwargs: dict[str, Any]) -> Any:
        """Do what `from_dict` says."""
        file_type = config_dict.get("model_type")
        if cls.model_type and file_type and file_type != cls.model_type:
            raise ConfigError(
                f"This config is not a {cls.__name__}",
                where=config_dict.get("_name_or_path") or "model_type",
                expected=repr(cls.model_type),
                found=repr(file_type),
                mend="Use AutoConfig (or an Auto model class), which picks the class from model_type.",
            )
        values = copy.deepcopy({key: value for key, value in config_dict.items() if key not in kwargs})
        config = cls.__new__(cls)
        # With overrides the file alone need not make sense: the call may be what mends it.
        object.__setattr__(config, "_unfinished", bool(kwargs))
        config.__init__(**values)
        object.__delattr__(config, "_unfinished")
        if file_type and not cls.model_type:
            object.__setattr__(config, "model_type", file_type)
        unused = {}
        if return_unused:
            known = set(config_dict) - {"model_type"}
            unused = {name: kwargs[name] for name in kwargs if name not in known and not config.has(name)}
        if kwargs:
            config.update({name: value for name, value in kwargs.items() if name not in unused})
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
        if _is_reserved(type(self), name):
            return False
        known = name in self.__dict__ or name in type(self).attribute_map
        settable = isinstance(getattr(type(self), name, None), property)
        return known or settable or name in ("torch_dtype", "attn_implementation")

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several attributes and check the whole again.

        Args:
            values: New values by name.

        Raises:
            ConfigError: a value cannot be, or contradicts another; nothing is changed then.
        """
        values, before = dict(values), dict(self.__dict__)
        try:
            if "attn_implementation" in values:
                object.__setattr__(self, "_attn_implementation", values.pop("attn_implementation"))
            object.__setattr__(self, "_given", self._given | frozenset(values))
            for name, value in self.normalise(label_fields(values, current=self.num_labels)).items():
                setattr(self, name, value)
            self._finish()
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    # -- writing -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return every field and kept key, JSON-able, plus `model_type`."""
        return self._written({name: copy.deepcopy(value) for name, value in self._items()})

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
        return self._written(values)

    def _written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Give values the spelling of the file they came from, and add what is only carried."""
        values = self.spell(values, self._given)
        if "torch_dtype" in self._given and "dtype" in values:
            values["torch_dtype"] = values["dtype"]
            if "dtype" not in self._given:
                del values["dtype"]
        values |= copy.deepcopy(self._kept)
        values["model_type"] = self.model_type
        return dict(sorted(values.items()))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the config as the text of a config.json.

        Args:
            use_diff: Leave out defaults that were not given.
        """
        values = self.to_diff_dict() if use_diff else self.to_dict()
        for name, value in values.items():
            try:
                json.dumps(value, sort_keys=True)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{type(self).__name__}.{name} cannot be written as JSON",
                    where=name,
                    found=f"{type(value).__name__} {value!r}"[:200],
                    mend=f"Set {name!r} to plain numbers, texts, lists or dictionaries, or delete it.",
                ) from error
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
            push_to_hub: Also push that file; then `kwargs` are those of `push_to_hub`.
            **kwargs: `repo_id` and the other arguments of `push_to_hub`.

        Raises:
            ArgumentError: the folder is a file.
            UnknownArgumentError: an argument that nothing takes, or that only pushing takes.
            FileError: the file cannot be written, or the push failed.
        """
        folder = Path(save_directory)
        if save_directory == "" or folder.is_file():
            found = "a file" if save_directory else "an empty text"
            raise ArgumentError(
                "A config is saved into a folder",
                where=folder if save_directory else "save_directory",
                found=found,
                mend="Name a folder.",
            )
        push = prepare_push("Saving a config", folder, push_to_hub, kwargs)
        folder.mkdir(parents=True, exist_ok=True)
        entries, code = own_code(type(self))
        write_own_code(folder, code)
        if entries:
            self.auto_map = {**(getattr(self, "auto_map", None) or {}), **entries}
        self.to_json_file(folder / CONFIG_NAME)
        push(self)

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
        size = file.stat().st_size
        # Some editors put a byte order mark first, which is no part of the text.
        text = file.read_text(encoding="utf-8-sig") if size <= _MAX_JSON_BYTES else ""
    except UnicodeDecodeError as error:
        raise ConfigError(
            "This file is not UTF-8 text", where=file, found=error.reason, mend="Save it as UTF-8."
        ) from error
    except OSError as error:
        raise FileError(
            "This file cannot be read",
            where=file,
            found=error.strerror,
            mend="Check the path and its permissions.",
        ) from error
    if size > _MAX_JSON_BYTES:
        raise ConfigError(
            "This file is too large to be a config",
            where=file,
            expected=f"at most {_MAX_JSON_BYTES} bytes",
            found=f"{size} bytes",
            mend="Check that it is the file you mean, or download it again.",
        )
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
            mend="Download or write it again.",
        )
    return content


def _defaults(cls: type) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(cls, name)) for name in hints(cls) if hasattr(cls, name)}


def _is_reserved(cls: type, name: str) -> bool:
    """Tell whether an attribute of that name would hide a method, a fact or an internal of the class."""
    if name.startswith("_"):
        return True
    own = getattr(cls, name, None)
    if name in hints(cls) or own is None:
        return False
    return own.fset is None if isinstance(own, property) else callable(own)
