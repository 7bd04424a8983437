# SPDX-License-Identifier: Apache-2.0
"""Replacing weights of a model by others with more or fewer rows, all of them or none.

Everything that can fail comes first: new tensors are made beside the old ones. Then they are put in, step by
step, with a record of how to undo each step; whatever goes wrong, the model is as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pretrained.core.budgets import CPU
from pretrained.errors import ArgumentError, NotYetError
from pretrained.torch.dispatch import Dispatch, attach, check_room
from pretrained.torch.offload import DiskWeights

logger = logging.getLogger(__name__)

NewParameters = Mapping[int, tuple[nn.Parameter, nn.Parameter]]
"""Identity of a parameter -> the parameter itself, which keeps that identity taken, and its successor."""


class Undo:
    """What brings a model back to where it was, last step first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def add(self, step: Callable[[], Any]) -> None:
        """Note how to undo what is about to be done.

        Args:
            step: Called without arguments where the edit fails.
        """
        self._steps.append(step)

    def set_item(self, table: dict[Any, Any], name: Any, value: Any) -> None:
        """Set an entry of a dictionary.

        Args:
            table: The dictionary.
            name: The entry.
            value: Its new value.
        """
        if name in table:
            self.add(lambda old=table[name]: table.__setitem__(name, old))
        else:
            self.add(lambda: table.pop(name, None))
        table[name] = value

    def keep(self, table: dict[Any, Any]) -> None:
        """Note what a dictionary holds, so that whatever happens to its entries can be undone.

        Args:
            table: The dictionary; values that are changed themselves are not brought back.
        """
        before = dict(table)

        def bring_back() -> None:
            table.clear()
            table.update(before)

        self.add(bring_back)

    def all(self) -> None:
        """Undo everything."""
        while self._steps:
            self._steps.pop()()


@contextmanager
def transaction() -> Iterator[Undo]:
    """Give a record that is played back where the block raises, interrupts included."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        undo.all()
        raise


def check_editable(model: nn.Module, parameter: Any, where: str) -> None:
    """Raise for a weight whose rows are not all here, or that another library holds.

    Args:
        model: The model.
        parameter: A matrix or a bias of it, or what stands in its place.
        where: Its name.

    Raises:
        NotYetError: the model is wrapped by `fully_shard` or FullyShardedDataParallel.
        ArgumentError: the weight cannot be replaced.
    """
    for module in model.modules():
        names = {base.__name__ for base in type(module).__mro__}
        for wrapper in ("FSDPModule", "FullyShardedDataParallel"):
            if wrapper in names:
                raise NotYetError(
                    "A model that FSDP has sharded cannot be resized: it keeps the old sizes to itself",
                    where=where,
                    mend="Resize the model first, and wrap it then.",
                )
    if not isinstance(parameter, nn.Parameter):
        raise ArgumentError(
            "This weight is not a parameter that can be replaced",
            where=where,
            found=type(parameter).__name__,
            mend="Remove parametrizations, and merge or unload adapters, before resizing.",
        )


def check_whole(module: nn.Module, parameter: torch.Tensor, where: str, dims: int) -> None:
    """Raise for a parameter that another library has emptied or flattened.

    Args:
        module: Its layer.
        parameter: A weight or bias.
        where: Its name.
        dims: Axes that it should have.

    Raises:
        ArgumentError: it has another number of axes, or no rows, or its values are elsewhere.
    """
    elsewhere = parameter.is_meta and hasattr(module, "_hf_hook")
    if parameter.dim() == dims and parameter.numel() and not elsewhere:
        return
    raise ArgumentError(
        "The rows of this weight are not here: another library has sharded or moved them",
        where=where,
        expected=f"a tensor of {dims} axes with values",
        found=f"shape {list(parameter.shape)} on {parameter.device}",
        mend="Resize the model first, and shard or dispatch it then.",
    )


def with_rows(
    old: nn.Parameter, size: int, fresh: torch.Tensor | None, *, axis: int = 0
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a parameter and one with the same first rows, dtype, device and sharding, and others after.

    Args:
        old: The parameter.
        size: Rows of the new one.
        fresh: The rows after the old ones, along `axis`; None where there are none.
        axis: Which axis counts rows.
    """
    whole: Any = old.detach()
    sharded = getattr(whole, "full_tensor", None)
    if sharded is not None:
        whole = sharded()
    shape = list(whole.shape)
    kept = min(size, shape[axis])
    shape[axis] = size
    new = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    new.narrow(axis, 0, kept).copy_(whole.narrow(axis, 0, kept))
    if fresh is not None:
        new.narrow(axis, kept, size - kept).copy_(fresh)
    if sharded is not None:
        # Imported here: it takes a while, and only models that are sharded need it.
        from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

        # Every rank gets its part of the first one's rows, whatever it has drawn itself.
        new = distribute_tensor(new, old.device_mesh, old.placements)  # type: ignore[attr-defined]
    made = nn.Parameter(new, requires_grad=old.requires_grad)
    # Marks that optimizers and trainers put on parameters.
    made.__dict__.update(old.__dict__)
    return old, made


def replace_parameters(model: nn.Module, new: NewParameters, undo: Undo) -> list[nn.Module]:
    """Replace parameters wherever they are held, so that what was one tensor stays one.

    Args:
        model: Changed in place.
        new: What becomes what.
        undo: Takes how to undo it.

    Returns:
        The modules that hold any.

    Raises:
        PlacementError: as for `rehome`.
    """
    with rehome(model, new, undo):
        return _put(model, new, undo)


@contextmanager
def rehome(model: nn.Module, new: NewParameters, undo: Undo, *, only: str | None = None) -> Iterator[None]:
    """Make a placed model run with the weights that the block puts in.

    They live where the old ones lived. Those of a weight on disk are in no file, so they stay in memory.

    Args:
        model: One that was not placed is left alone.
        new: What becomes what.
        undo: Takes how to undo it.
        only: Path of the one module whose weights are replaced; None for all that hold them.

    Raises:
        PlacementError: weights that come from disk do not fit into memory.
    """
    dispatch: Dispatch | None = model.__dict__.get("_dispatch")
    if dispatch is None:
        yield
        return
    moving = _on_disk(model, new, dispatch.store)
    if only is not None:
        moving = {path: pair for path, pair in moving.items() if path == only}
    check_room(sum(made.nbytes for _, made in set(moving.values())), "resizing weights on disk")
    # Undone last, when the old weights are back.
    undo.add(lambda: attach(model, dispatch.homes, dispatch.store, **dispatch.options))
    yield
    device_map = {**dispatch.homes.device_map, **dict.fromkeys(moving, CPU)}
    if moving:
        logger.info("%s now lives in memory: its new rows are in no file", ", ".join(moving))
        undo.set_item(model.__dict__, "hf_device_map", dict(device_map))
    attach(model, replace(dispatch.homes, device_map=device_map), dispatch.store, **dispatch.options)
    for old, _ in new.values():
        span = dispatch.store.span_of(old.data)
        if span is not None:
            # It was read for the new rows; who still holds it reads it from the file again.
            span.release()


def _put(model: nn.Module, new: NewParameters, undo: Undo) -> list[nn.Module]:
    touched = []
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                undo.set_item(module._parameters, name, new[id(parameter)][1])
                touched.append(module)
    return touched


def _on_disk(
    model: nn.Module, new: NewParameters, store: DiskWeights
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Return the paths of modules whose weights were on disk and are replaced."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in new and store.span_of(parameter.data) is not None:
                found[path] = new[id(parameter)]
    return found
