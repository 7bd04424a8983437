# SPDX-License-Identifier: Apache-2.0
"""`CompileConfig`: what `GenerationConfig.compile_config` holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrained.errors import GenerationError, did_you_mean


@dataclass
class CompileConfig:
    """How the decoding step is compiled; the arguments of `torch.compile`.

    Attributes:
        fullgraph: Whether a layer must become one graph; False lets torch run parts of it as they are.
        dynamic: Whether sizes may be symbols; None for no, as every bucket of lengths has its own step.
        backend: Torch's compiler.
        mode: Its mode, such as ``"max-autotune"``; None for the default.
        options: Its options; None for none.
    """

    fullgraph: bool = True
    dynamic: bool | None = None
    backend: str = "inductor"
    mode: str | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise where a value cannot work."""
        self._require("fullgraph", isinstance(self.fullgraph, bool), "True or False")
        self._require(
            "dynamic", self.dynamic is None or isinstance(self.dynamic, bool), "True, False or None"
        )
        self._require("backend", isinstance(self.backend, str) and bool(self.backend), "a name")
        self._require("mode", self.mode is None or isinstance(self.mode, str), "a name, or None")
        is_options = self.options is None or isinstance(self.options, Mapping)
        self._require("options", is_options, "a dict, or None")
        both = self.mode is not None and bool(self.options)
        self._require("options", not both, "None beside a mode: torch takes one of them")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return dataclasses.asdict(self)

    def _require(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise GenerationError(
                f"{name} of compile_config cannot be {getattr(self, name)!r}", where=name, expected=expected
            )


def as_compile_config(value: Any) -> CompileConfig:
    """Return a config from what a user or a file wrote.

    Args:
        value: A `CompileConfig` (or an object with its ``to_dict``), a dict of its fields, or None.

    Raises:
        GenerationError: it is none of these, a field that is not there, or a value that cannot work.
    """
    if value is None or isinstance(value, CompileConfig):
        return value or CompileConfig()
    if not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise GenerationError(
            "compile_config has the wrong type",
            where="compile_config",
            expected="a CompileConfig or a dict of its fields",
            found=type(value).__name__,
        )
    names = [field.name for field in dataclasses.fields(CompileConfig)]
    # Other libraries write private switches beside the arguments of torch.
    given = {name: item for name, item in value.items() if not str(name).startswith("_")}
    for name in given:
        if name not in names:
            raise GenerationError(
                f"CompileConfig has no field {name!r}",
                where="compile_config",
                expected=", ".join(names),
                mend=did_you_mean(str(name), names) or None,
            )
    return CompileConfig(**given)


def wrong_compile_config(value: Any) -> str | None:
    """Return what is wrong with a value for `compile_config`, or None.

    Args:
        value: What a user or a file wrote.
    """
    try:
        as_compile_config(value)
    except GenerationError as error:
        return f"a CompileConfig, or a dict of its fields ({error})"
    return None
