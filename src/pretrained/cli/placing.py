# SPDX-License-Identifier: Apache-2.0
"""What `run` and `plan` say about placement and quantization in the same words, and what this machine has."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Protocol

from pretrained.core.budgets import CPU, DISK, Home, available_host_memory, spelled
from pretrained.core.placement import STRATEGIES
from pretrained.core.report import format_bytes
from pretrained.errors import ArgumentError, PlacementError, did_you_mean


class _Arguments(Protocol):
    def add_mutually_exclusive_group(self) -> Any: ...


def add_quantization_arguments(parser: _Arguments) -> None:
    """Describe how weights are stored in memory.

    Args:
        parser: A verb's own, or a group of it.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quantize", choices=["int8", "int4"], help="quantize while loading")
    group.add_argument("--packed", action="store_true", help="keep the blocks of a GGUF file as they are")


def quantization_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the `quantization_config` that the arguments ask for, or None.

    Args:
        options: With `add_quantization_arguments`.
    """
    method = "gguf" if options.packed else options.quantize
    return None if method is None else {"quant_method": method}


def device_map_of(word: str) -> str | dict[str, Any]:
    """Return a device map from one word of a command line.

    Args:
        word: A strategy, a device, or a map as JSON.

    Raises:
        PlacementError: it begins like JSON and is none.
        ArgumentError: it is none of the three.
    """
    if word.lstrip().startswith("{"):
        try:
            value = json.loads(word)
        except ValueError as error:
            raise PlacementError(
                "The device map is not JSON",
                where="--device-map",
                found=str(error),
                mend='Quote it for the shell: \'{"encoder": 0, "decoder": "cpu"}\'.',
            ) from error
        return dict(value)
    if word in STRATEGIES:
        return word
    if word in (CPU, DISK, "mps", "cuda") or word.isdecimal() or ":" in word:
        return {"": int(word) if word.isdecimal() else word}
    raise ArgumentError(
        f"Unknown way to place a model: {word!r}",
        where="--device-map",
        expected=f"{', '.join(STRATEGIES)}, a device, or a map as JSON",
        mend=did_you_mean(word, STRATEGIES) or None,
    )


def machine_budgets() -> tuple[dict[Home, int | None], str]:
    """Return what this machine may give, as a load without ``max_memory`` sees it, and a note that says so.

    A framework is imported only where the system shows an accelerator: on other machines a plan stays quick,
    and needs none.
    """
    budgets: dict[Home, int | None] = {CPU: available_host_memory(), DISK: None}
    unseen = ""
    if _may_have_accelerators():
        try:
            from pretrained.torch.place import free_memory  # noqa: PLC0415 - see above

            budgets = free_memory()
        except ImportError:
            unseen = "; without PyTorch accelerators are not looked for"
    free = ", ".join(
        f"{spelled(home)} {'without limit' if size is None else format_bytes(size)}"
        for home, size in budgets.items()
        if home != DISK
    )
    return budgets, f"planned for what is free on this machine now: {free}, and the disk{unseen}"


def _may_have_accelerators() -> bool:
    """Tell whether the system shows devices of a kind that PyTorch may compute on."""
    if sys.platform == "win32":
        return True
    kinds = ("nvidia[0-9]*", "kfd", "dxg")
    return any(True for kind in kinds for _ in Path("/dev").glob(kind))
