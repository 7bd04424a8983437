# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: which are some, and the base model that one names. Read without any framework."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrained.core.config import read_json_object
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.weights_names import candidates
from pretrained.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"

PREFIX = "base_model.model."
"""What the names in adapter files begin with: the path of the base model inside peft's own."""


def is_adapter(source: Source | None, variant: str | None = None) -> bool:
    """Tell whether a source holds an adapter and no weights of a whole model.

    Args:
        source: Where a model's files are; None for none.
        variant: Infix of the weights' file names.
    """
    if source is None or source.kind == "file" or source.file(ADAPTER_CONFIG, required=False) is None:
        return False
    names = candidates(variant, None)
    if source.names is not None:
        return not any(name in source.names for name in names)
    return not any((source.folder / name).exists() for name in names)


def read_adapter_config(source: Source) -> tuple[dict[str, Any], Path]:
    """Return the content of an adapter's config, and its file.

    Args:
        source: Where the adapter's files are.

    Raises:
        FileError: there is no adapter_config.json.
        ConfigError: it is not JSON, or does not say of which kind the adapter is.
    """
    file = source.require(ADAPTER_CONFIG)
    values = read_json_object(file)
    if not isinstance(values.get("peft_type"), str):
        raise ConfigError(
            "This adapter's config does not say of which kind it is",
            where=file,
            expected='"peft_type", such as "LORA"',
            found=repr(values.get("peft_type"))[:100],
            mend="Save the adapter again with peft or with save_pretrained.",
        )
    return values, file


def base_of(source: Source) -> Source:
    """Return where the base model of an adapter is, looked up like the adapter itself.

    Args:
        source: Where the adapter's files are.

    Raises:
        ConfigError: its config names no base model.
        FileError: the base model is not there.
    """
    values, file = read_adapter_config(source)
    name = values.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(
            "This adapter does not say what it was trained on",
            where=file,
            expected='"base_model_name_or_path"',
            found=repr(name)[:100],
            mend="Load the base model yourself, then call its load_adapter with this folder.",
        )
    revision = values.get("revision")
    own = HubOptions()
    options = replace(
        source.options,
        revision=revision if isinstance(revision, str) and revision else own.revision,
        subfolder=own.subfolder,
    )
    return resolve(name, options)
