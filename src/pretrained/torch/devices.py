# SPDX-License-Identifier: Apache-2.0
"""Where a model goes: `device_map` in every form, understood before anything is read.

This release places a model on one device. Maps that name several are refused with a word on when to
expect them; maps that could never be meant are refused for good.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pretrained.core.report import fold_keys, format_bytes
from pretrained.errors import ArgumentError, NotYetError, PlacementError, did_you_mean

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_FORMS = "'auto', 'cpu', 'cuda', 'cuda:0', a number, or {'': one of these}"


def single_device(device_map: Any) -> torch.device:
    """Return the one device that a map names.

    Args:
        device_map: None for torch's default device; ``"auto"`` and the other strategies; a device, its
            name or its index; or a dictionary of module names whose values all name one device.

    Raises:
        PlacementError: no such device here, or the map makes no sense.
        NotYetError: the map names several devices, or the disk.
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
    if isinstance(device_map, Mapping):
        return _common_device(device_map)
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if torch.cuda.device_count() == 1 and device_map == "auto":
            return torch.device("cuda:0")
        raise _later(device_map)
    if isinstance(device_map, str) and device_map == "disk":
        raise _later(device_map)
    return _device(device_map)


def check_covers(device_map: Any, model: nn.Module) -> None:
    """Raise where a dictionary leaves a weight without a home or names a module that does not exist.

    Args:
        device_map: As the user gave it; other forms than dictionaries cover everything.
        model: The model, with or without memory.

    Raises:
        PlacementError: names the modules.
    """
    if not isinstance(device_map, Mapping):
        return
    weights = [*model.state_dict()]
    known = {*weights, *(name for name, _ in model.named_modules())}
    unknown = [name for name in device_map if name not in known]
    if unknown:
        raise PlacementError(
            f"{type(model).__name__} has no module {unknown[0]!r}",
            where="device_map",
            mend=did_you_mean(str(unknown[0]), known) or "model.named_modules() lists them.",
        )
    homeless = [key for key in weights if not _is_covered(key, device_map)]
    if homeless:
        raise PlacementError(
            "The device_map gives some weights no device",
            where="device_map",
            found="nothing for " + "; ".join(fold_keys(homeless)[:10]),
            mend="Name their modules as well, or add '' for everything that is not named.",
        )


def named_map(device_map: Any, device: torch.device) -> dict[str, int | str]:
    """Return a map as ``model.hf_device_map`` shows it.

    Args:
        device_map: As the user gave it.
        device: The device it came to.
    """
    if device.type == "cuda":
        home: int | str = device.index or 0
    else:
        home = device.type if device.type == "cpu" or device.index is None else str(device)
    names = list(device_map) if isinstance(device_map, Mapping) else [""]
    return dict.fromkeys(names, home)


def check_memory(sizes: Mapping[str, int], device: torch.device) -> None:
    """Raise where new weights would never fit, whatever else runs; the system may say so too late.

    Args:
        sizes: Bytes by weight.
        device: Where they are to go; only the CPU is looked at, other devices tell by themselves.

    Raises:
        PlacementError: together they take more than the machine's whole memory.
    """
    total, present = sum(sizes.values()), _physical_bytes()
    if device.type != "cpu" or present is None or total <= present:
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


def _is_covered(key: str, names: Iterable[str]) -> bool:
    return any(name in ("", key) or key.startswith(f"{name}.") for name in names)


def _common_device(device_map: Mapping[Any, Any]) -> torch.device:
    if not device_map or not all(isinstance(name, str) for name in device_map):
        raise PlacementError(
            "A dictionary maps names of modules to devices",
            where="device_map",
            expected="{'': 'cpu'}, or names such as 'model.layers.0' as keys",
            found=repr(device_map)[:200],
        )
    if "disk" in (home for home in device_map.values() if isinstance(home, str)):
        raise _later(device_map)
    devices = {_device(home) for home in device_map.values()}
    if len(devices) > 1:
        raise _later(device_map)
    return devices.pop()


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


def _later(device_map: Any) -> NotYetError:
    return NotYetError(
        f"device_map={device_map!r}"[:200] + " places a model over several devices, which is not offered yet",
        where="device_map",
        mend="It comes with the release of placement; pass one device, such as 'cpu' or 'cuda:0'.",
    )
