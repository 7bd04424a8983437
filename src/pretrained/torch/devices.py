# SPDX-License-Identifier: Apache-2.0
"""One device by any of its names, understood and checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from pretrained.core.report import format_bytes
from pretrained.errors import ArgumentError, PlacementError

_FORMS = "'auto', 'cpu', 'cuda', 'cuda:0', a number, or a dictionary of module names and these"


def single_device(device_map: Any) -> torch.device:
    """Return the one device that a map names for everything.

    Args:
        device_map: None for torch's default device; a device, its name or its index; or one of these as
            the only value of a dictionary, under the empty name.

    Raises:
        PlacementError: there is no such device here.
        ArgumentError: there is no map, and the default device is "meta", which holds no values.
    """
    if device_map is None:
        device = torch.get_default_device()
        if device.type == "meta":
            raise ArgumentError(
                "Weights cannot be loaded inside torch.device('meta')",
                where="torch.device context",
                mend="Leave the context, or pass device_map='cpu'.",
            )
        return device
    return _device(device_map[""] if isinstance(device_map, Mapping) else device_map)


def home_name(device: torch.device) -> int | str:
    """Return a device as ``model.hf_device_map`` shows it.

    Args:
        device: Where weights live.
    """
    if device.type == "cuda":
        return device.index or 0
    return device.type if device.type == "cpu" or device.index is None else str(device)


def check_memory(sizes: Mapping[str, int]) -> None:
    """Raise where new weights would never fit, whatever else runs; the system may say so too late.

    Args:
        sizes: Bytes by weight, of those that go to the CPU: other devices tell by themselves.

    Raises:
        PlacementError: together they take more than the machine's whole memory.
    """
    total, present = sum(sizes.values()), _physical_bytes()
    if present is None or total <= present:
        return
    largest = max(sizes, key=lambda key: sizes[key])
    raise PlacementError(
        "The new weights do not fit into this machine's memory",
        where=f"{largest} alone takes {format_bytes(sizes[largest])}",
        expected=f"at most {format_bytes(present)}",
        found=format_bytes(total),
        mend="Check the sizes in the config.",
    )


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return None


def _device(name: Any) -> torch.device:
    """Return a device that exists here and can hold weights."""
    if isinstance(name, bool) or (isinstance(name, int) and name < 0):
        raise PlacementError(
            "A device index is a number from 0 on", where="device_map", expected=_FORMS, found=repr(name)
        )
    try:
        device = torch.device(f"cuda:{name}" if isinstance(name, int) else name)
    except (RuntimeError, TypeError) as error:
        raise PlacementError(f"Unknown device {name!r}"[:200], where="device_map", expected=_FORMS) from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        raise PlacementError(
            "The device 'meta' holds no values, so nothing can be loaded onto it",
            where="device_map",
            mend="For a model without memory build it from its config: "
            "with torch.device('meta'): model = AutoModel.from_config(config).",
        )
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend that is absent has an error of its own
        raise PlacementError(
            "There is no such device here",
            where="device_map",
            expected="cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count())),
            found=str(device),
            mend="Pass device_map='cpu' or 'auto', or install a PyTorch build for your accelerator.",
        ) from error
    return device
