# SPDX-License-Identifier: Apache-2.0
"""What config.json says of weights that another library has quantized, as typed values.

For each library there is a file (`pretrained.core.gptq`) with a `ForeignScheme` of its own, whose `parse`
reads ``quantization_config`` and refuses by name what is not read; the table of them is
`pretrained.core.quantization.READ_METHODS`. How the tensors become weights is the backend's
(`pretrained.torch.quantizers.foreign`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pretrained.core.dtypes import floating_dtype_name
from pretrained.errors import ArgumentError, ConfigError, NotYetError


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignScheme:
    """How another library has stored the dense layers of a model.

    Attributes:
        quant_method: Its name in config.json.
        compute_dtype: As `QuantizationConfig.compute_dtype`; from the call, not from the file.
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

    def with_wish(self, value: Any) -> tuple[Self, Any]:
        """Take what a call may say of weights that are stored so: `compute_dtype`.

        Args:
            value: `quantization_config` of the call.

        Returns:
            The scheme, and what is left of the wish: None, or what asks for another method.

        Raises:
            ArgumentError: another setting of this method.
        """
        values = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        method = values.get("quant_method")
        if getattr(method, "value", method) != self.quant_method:
            return self, value
        unknown = [name for name in values if name not in ("quant_method", "compute_dtype")]
        if unknown:
            raise ArgumentError(
                "The checkpoint says how it is quantized",
                where="quantization_config",
                expected="nothing, or quant_method and compute_dtype",
                found=", ".join(map(str, unknown)),
                mend="Leave the argument out.",
            )
        compute = values.get("compute_dtype")
        name = None if compute is None else floating_dtype_name(str(compute))
        if name not in ("float32", "bfloat16", None):
            raise ArgumentError(
                "Quantized layers multiply in bfloat16 or float32",
                where="quantization_config.compute_dtype",
                expected="'bfloat16', 'float32' or None",
                found=repr(name),
            )
        return replace(self, compute_dtype=name), None


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
