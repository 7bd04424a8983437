# SPDX-License-Identifier: Apache-2.0
"""What config.json says of weights that another library has quantized, as typed values.

For each library there is a file (`pretrained.core.gptq`) with a `ForeignScheme` of its own, whose `parse`
reads ``quantization_config`` and refuses by name what is not read; the table of them is
`pretrained.core.quantization.READ_METHODS`. How the tensors become weights is the backend's
(`pretrained.torch.quantizers.foreign`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pretrained.errors import ConfigError, NotYetError


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignScheme:
    """How another library has stored the dense layers of a model.

    Attributes:
        quant_method: Its name in config.json.
        compute_dtype: As `QuantizationConfig.compute_dtype`.
    """

    quant_method: ClassVar[str]

    compute_dtype: str | None = None

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Read ``quantization_config``.

        Args:
            values: The dictionary in config.json.
            where: What to name in errors.

        Raises:
            ConfigError: a value that cannot be.
            NotYetError: a variant that is not read.
        """
        raise NotImplementedError


def whole_number(
    values: Mapping[str, Any], names: tuple[str, ...], default: int | None, *, where: str
) -> int:
    """Return a setting that is a whole number.

    Args:
        values: The dictionary.
        names: The setting's spellings; the first that is there counts.
        default: What it is where it is absent; None where it must be there.
        where: What to name in errors.

    Raises:
        ConfigError: it is absent or something else.
    """
    found = next((values[name] for name in names if values.get(name) is not None), default)
    if type(found) is not int:
        raise ConfigError(
            f"quantization_config has no whole number as {names[0]!r}",
            where=where,
            found="nothing" if found is None else repr(found),
        )
    return found


def yes_or_no(values: Mapping[str, Any], name: str, default: bool, *, where: str) -> bool:
    """Return a setting that is true or false.

    Args:
        values: The dictionary.
        name: The setting.
        default: What it is where it is absent.
        where: What to name in errors.

    Raises:
        ConfigError: it is something else.
    """
    found = values.get(name)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise ConfigError(f"quantization_config.{name} is true or false", where=where, found=repr(found))
    return found


def not_read(what: str, *, where: str, mend: str | None = None) -> NotYetError:
    """Return the error for a variant that is not read.

    Args:
        what: The variant, as the subject of a sentence about it: ``"GPTQ in the format 'marlin'"``.
        where: What to name.
        mend: What to do; None for what always helps.
    """
    return NotYetError(
        f"{what} is not read yet",
        where=f"quantization_config, {where}",
        mend=mend
        or "Take the unquantized checkpoint and pass quantization_config={'quant_method': 'int4'} (or "
        "'int8').",
    )
