# SPDX-License-Identifier: Apache-2.0
"""`GenerationConfig`: how to generate, as a typed object that reads and writes generation_config.json.

A field that nobody set is not the same as a field set to its default: only set fields are written, and
only they win over a model's own settings. Reading an attribute gives the effective value.

A user's value is checked when it is set. A file's values are kept as they are, and checked by `validate`
when they are used, so that neither a load nor a save of weights ever fails over them.
"""

from __future__ import annotations

import copy
import enum
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pretrained.core.config import read_json_object
from pretrained.core.generation_checks import contradictions, effectless, wrong_value
from pretrained.core.generation_fields import FIELDS, GENERATE_ARGUMENTS, METADATA, Field, normalise
from pretrained.core.hub import HubOptions, resolve
from pretrained.core.push import PushToHubMixin, prepare_push
from pretrained.core.writer import write_text_atomically
from pretrained.errors import ArgumentError, GenerationError, UnknownArgumentError, did_you_mean

logger = logging.getLogger(__name__)

GENERATION_CONFIG_NAME = "generation_config.json"


class GenerationMode(enum.StrEnum):
    """The strategies that a config can ask for; values are the ecosystem's names."""

    GREEDY_SEARCH = "greedy_search"
    SAMPLE = "sample"
    BEAM_SEARCH = "beam_search"
    BEAM_SAMPLE = "beam_sample"
    GROUP_BEAM_SEARCH = "group_beam_search"
    CONSTRAINED_BEAM_SEARCH = "constrained_beam_search"
    CONTRASTIVE_SEARCH = "contrastive_search"
    ASSISTED_GENERATION = "assisted_generation"
    DOLA_GENERATION = "dola_generation"


class GenerationConfig(PushToHubMixin):
    """How to generate: lengths, strategy, sampling, rules on the scores, outputs, special tokens.

    Args:
        **kwargs: Fields by name (`pretrained.core.generation_fields.FIELDS` lists them with their
            defaults). None leaves a field unset.

    Raises:
        UnknownArgumentError: no such field; the message names the nearest one.
        GenerationError: a value cannot work, or two contradict each other.
    """

    _values: dict[str, Any]
    _extra: dict[str, Any]

    def __init__(self, **kwargs: Any) -> None:
        object.__setattr__(self, "_values", {})
        object.__setattr__(self, "_extra", {})
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.validate()

    # -- attributes ----------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no ordinary attribute. Copying asks before __init__ has run.
        if name in ("_values", "_extra") or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        if name in FIELDS:
            value = self._values.get(name)
            return FIELDS[name].default if value is None else value
        if name in METADATA:
            return self._values.get(name)
        if name in self._extra:
            return self._extra[name]
        raise AttributeError(f"GenerationConfig has no field {name!r}. {did_you_mean(name, FIELDS)}".rstrip())

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS:
            self._values[name] = _checked(name, value, FIELDS[name])
        elif name in METADATA:
            self._values[name] = value
        elif name in self._extra:
            self._extra[name] = value
        else:
            raise _unknown(name)

    def __delattr__(self, name: str) -> None:
        for values in (self._values, self._extra):
            if name in values:
                del values[name]
                return
        raise AttributeError(f"GenerationConfig has no set field {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *FIELDS, *self._extra]

    def is_set(self, name: str) -> bool:
        """Whether a field was given a value, by a user or by a file.

        Args:
            name: A field's name.
        """
        return self._values.get(name) is not None

    # -- reading -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read the generation config of a model folder or a hub id.

        Args:
            pretrained_model_name: Folder or hub id.
            config_file_name: Name of the file; None for generation_config.json.
            return_unused_kwargs: Return ``(config, unused)`` instead of refusing unknown arguments.
            **kwargs: Hub arguments (`revision`, `subfolder`, `token`, `cache_dir`, `force_download`,
                `local_files_only`), and fields that override the file's.

        Raises:
            FileError: no such file.
            ConfigError: not a JSON object.
            UnknownArgumentError: an argument that is neither.
        """
        source = resolve(pretrained_model_name, HubOptions.take(kwargs))
        config = cls.from_json_file(source.require(config_file_name or GENERATION_CONFIG_NAME))
        unused = config.update(**kwargs)
        if return_unused_kwargs:
            return config, unused
        if unused:
            raise _unknown(next(iter(unused)))
        return config

    @classmethod
    def from_json_file(cls, file: str | Path) -> Self:
        """Read a generation_config.json by its path.

        Args:
            file: Path of the file.

        Raises:
            FileError: it cannot be read.
            ConfigError: it is no JSON object.
        """
        return cls.from_dict(read_json_object(Path(file)))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a config from the content of a file.

        Nothing of it is refused here: unknown keys are kept, and values that cannot work are named in
        one log line and refused when they are used.

        Args:
            config_dict: The content.
            **kwargs: Fields that override it; these are checked.
        """
        config = cls()
        for name, value in config_dict.items():
            if name in FIELDS or name in METADATA:
                config._values[name] = normalise(copy.deepcopy(value))
            else:
                config._extra[name] = copy.deepcopy(value)
        unused = config.update(**kwargs)
        if unused:
            raise _unknown(next(iter(unused)))
        problems = config.problems()
        if problems:
            logger.warning(
                "This generation config cannot be used as it is (%s); pass other values to generate().",
                "; ".join(error.what for error in problems),
            )
        return config

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """Collect the generation settings that a model's own config.json carries (as old ones do).

        ``task_specific_params`` are left alone: they belong to one task, not to the model.

        Args:
            model_config: A model config, or the content of its file.
        """
        config = cls()
        parts = [
            model_config,
            *(_get(model_config, name) for name in ("decoder", "generator", "text_config")),
        ]
        for name, field in FIELDS.items():
            for part in parts:
                value = normalise(_get(part, name)) if part is not None else None
                if value is not None:
                    if value != field.default:
                        config._values[name] = copy.deepcopy(value)
                    break
        config._values["_from_model_config"] = True
        return config

    # -- changing ------------------------------------------------------------------------------

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Set fields, and return the arguments that are no fields.

        Args:
            defaults_only: Leave fields alone that are set already.
            allow_custom_entries: Keep arguments that are no fields as extra entries.
            **kwargs: Fields by name.

        Raises:
            GenerationError: a value cannot work, or two contradict each other; nothing is changed then.
        """
        changed, unused = copy.copy(self), {}
        object.__setattr__(changed, "_values", dict(self._values))
        object.__setattr__(changed, "_extra", dict(self._extra))
        for name, value in kwargs.items():
            if name in FIELDS or name in METADATA or name in self._extra:
                if not (defaults_only and (self.is_set(name) or name in self._extra)):
                    setattr(changed, name, value)
            elif allow_custom_entries:
                changed._extra[name] = value
            else:
                unused[name] = value
        if len(unused) < len(kwargs):
            changed.validate()
        object.__setattr__(self, "_values", changed._values)
        object.__setattr__(self, "_extra", changed._extra)
        return unused

    def merged(self, over: GenerationConfig) -> GenerationConfig:
        """Return a config with this one's set fields, and `over`'s where this one has none.

        Args:
            over: The config that gives way.
        """
        config = copy.deepcopy(over)
        config._values.update({k: copy.deepcopy(v) for k, v in self._values.items() if v is not None})
        config._extra.update(copy.deepcopy(self._extra))
        return config

    # -- checking ------------------------------------------------------------------------------

    def problems(self) -> list[GenerationError]:
        """Return what stands in the way of generating with this config, one error each."""
        found = []
        for name, value in self._values.items():
            if name in FIELDS and value is not None and not self._dormant(name):
                wrong = FIELDS[name].check(value)
                if wrong:
                    found.append(wrong_value(name, value, wrong))
        return found or contradictions(self)

    def hints(self) -> dict[str, str]:
        """Return the set fields that have no effect beside the others, each with the reason."""
        return effectless(self)

    def validate(self, strict: bool = False) -> None:
        """Raise where this config cannot work.

        Args:
            strict: Raise too where a field has no effect beside the others, such as a temperature
                without sampling.

        Raises:
            GenerationError: names the field and the mend; the first of several problems.
        """
        problems = self.problems()
        if problems:
            raise problems[0]
        if strict:
            for name, reason in self.hints().items():
                raise GenerationError(
                    f"{name} has no effect: {reason}", where=name, found=getattr(self, name)
                )

    def get_generation_mode(self, assistant_model: object = None) -> GenerationMode:
        """Return the strategy that this config asks for.

        Args:
            assistant_model: A model that drafts, if there is one.
        """
        if self.constraints is not None or self.force_words_ids is not None:
            return GenerationMode.CONSTRAINED_BEAM_SEARCH
        if self.num_beams > 1 and self.num_beam_groups > 1:
            return GenerationMode.GROUP_BEAM_SEARCH
        if self.num_beams > 1:
            return GenerationMode.BEAM_SAMPLE if self.do_sample else GenerationMode.BEAM_SEARCH
        drafts = (
            assistant_model,
            self.use_mtp or None,
            self.prompt_lookup_num_tokens,
            self.assistant_early_exit,
        )
        if any(draft is not None for draft in drafts):
            return GenerationMode.ASSISTED_GENERATION
        if self.dola_layers is not None:
            return GenerationMode.DOLA_GENERATION
        contrastive = self.penalty_alpha is not None and self.penalty_alpha > 0 and self.top_k > 1
        plain = GenerationMode.CONTRASTIVE_SEARCH if contrastive else GenerationMode.GREEDY_SEARCH
        return GenerationMode.SAMPLE if self.do_sample else plain

    # -- writing -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return every field with its effective value, and every key that came with the file."""
        return {name: getattr(self, name) for name in FIELDS} | self.to_diff_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what was set, by a user or by a file: what is written."""
        return copy.deepcopy(self._values | self._extra)

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """Return the text of a generation_config.json.

        Args:
            use_diff: Only what was set; False for every field.
            ignore_metadata: Leave out where the config comes from.
        """
        content = self.to_diff_dict() if use_diff else self.to_dict()
        # Objects, which no file can hold.
        content.pop("constraints", None)
        if ignore_metadata:
            content = {name: value for name, value in content.items() if name not in METADATA}
        return json.dumps(_jsonable(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write the config to a file.

        Args:
            json_file_path: Where to.
            use_diff: Only what was set; False for every field.
        """
        write_text_atomically(Path(json_file_path), self.to_json_string(use_diff))

    def warn_before_saving(self) -> None:
        """Log one line where the config contradicts itself or has values without effect."""
        problems = [error.what for error in self.problems()]
        problems += [f"{name}: {reason}" for name, reason in self.hints().items()]
        if problems:
            logger.warning("Saving a generation config that needs a look: %s.", "; ".join(problems))

    def save_pretrained(
        self,
        save_directory: str | Path,
        config_file_name: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write generation_config.json into a folder, which is made where it is absent.

        A config that cannot work is written all the same, with one log line: it must never stand
        between a trained model and the disk.

        Args:
            save_directory: The folder.
            config_file_name: Another name for the file.
            push_to_hub: Also push that file; then `kwargs` are those of `push_to_hub`.
            **kwargs: `repo_id` and the other arguments of `push_to_hub`.

        Raises:
            ArgumentError: the folder is a file.
            UnknownArgumentError: an argument that nothing takes, or that only pushing takes.
            FileError: the file cannot be written, or the push failed.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError("A generation config is saved into a folder", where=folder, found="a file")
        push = prepare_push("Saving a generation config", folder, push_to_hub, kwargs)
        self.warn_before_saving()
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / (config_file_name or GENERATION_CONFIG_NAME))
        push(self)

    # -- comparing -----------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        return self.to_json_string(False, True) == other.to_json_string(False, True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(ignore_metadata=True)}"

    def _dormant(self, name: str) -> bool:
        """Whether a field plays no part: files often keep a temperature of 0 beside greedy decoding."""
        group = FIELDS[name].group
        unused_tokens = name in ("pad_token_id", "eos_token_id", "bos_token_id") and self._values[name] == -1
        return unused_tokens or (group == "sampling" and not self.do_sample and self.penalty_alpha is None)


def _checked(name: str, value: Any, field: Field) -> Any:
    value = normalise(value)
    wrong = None if value is None else field.check(value)
    if wrong:
        raise wrong_value(name, value, wrong)
    return value


def _unknown(name: str) -> UnknownArgumentError:
    if name in GENERATE_ARGUMENTS:
        return UnknownArgumentError(
            f"{name} is an argument of generate(), not a field of its config",
            where=name,
            mend=f"Call generate(..., {name}=...).",
        )
    near = did_you_mean(name, FIELDS)
    keep = (
        "To keep a key that is no field, use GenerationConfig.from_dict or update(allow_custom_entries=True)."
    )
    return UnknownArgumentError(f"GenerationConfig has no field {name!r}", where=name, mend=near or keep)


def _get(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _jsonable(value: Any) -> Any:
    """Spell what JSON lacks: token tuples as keys become pairs, as files of the ecosystem have them."""
    if isinstance(value, Mapping):
        if any(isinstance(key, tuple) for key in value):
            return [[list(key), bias] for key, bias in value.items()]
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "to_dict"):
        return _jsonable(value.to_dict())
    return value
