# SPDX-License-Identifier: Apache-2.0
"""Running a model whose weights live in several places, through torch's own forward hooks.

Each module with weights of its own that do not lie where it runs becomes a part (`_Part`). Before it runs,
its weights are brought to its device; after it, they are dropped there, or, where it runs on the CPU, the
pages of those on disk are let go. Between forwards the model holds its weights as ordinary CPU tensors, so
that reading, saving and copying out work as on any model. `forward` is never replaced, and `remove_hooks`
undoes everything.

Weights that run on an accelerator come through a `pretrained.torch.ring.Ring` where the device has streams,
ahead of the part that needs them, and otherwise by a copy when the part begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pretrained.core.budgets import CPU, DISK, Home, available_host_memory
from pretrained.core.report import format_bytes
from pretrained.core.units import covering
from pretrained.errors import ArgumentError, PlacementError
from pretrained.torch.accelerator import Runtime, runtime_for
from pretrained.torch.devices import home_name
from pretrained.torch.offload import DiskWeights, Span, cannot_copy, files_of
from pretrained.torch.quantized import IntegerLeaf
from pretrained.torch.read_ahead import ReadAhead
from pretrained.torch.releases import Releases
from pretrained.torch.ring import Loan, Order, Ring, Source, room_for
from pretrained.torch.staging import flat

WHOLE: Final = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
"""Classes of torch that use weights of their submodules without calling them; each is one part."""

# Never called themselves: what they hold is used by the module around them.
_CONTAINERS: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Homes:
    """Where every weight of a model lives and where its modules run.

    Attributes:
        device_map: Module path -> home; the longest path that covers a key counts.
        main: Where modules run whose weights live on the CPU or on disk.
        offload_buffers: Whether buffers follow the map onto the CPU or disk instead of staying where they are
            used.
        ties: Alias -> owner: a tied weight lives, and the modules that hold it run, where its owner is.
    """

    device_map: Mapping[str, Home]
    main: torch.device
    offload_buffers: bool = False
    ties: Mapping[str, str] = field(default_factory=dict)

    def home(self, key: str, *, is_buffer: bool = False) -> Home:
        """Return the home of a weight.

        Args:
            key: Its name in the model.
            is_buffer: Whether it is a buffer.
        """
        path = covering(self.ties.get(key, key), self.device_map)
        if path is None:
            # A table that no file holds: a given map need not name it; weights were checked before.
            return CPU if self.main.type == "cpu" else home_name(self.main)
        home = self.device_map[path]
        if is_buffer and not self.offload_buffers and home in (CPU, DISK):
            return CPU if self.main.type == "cpu" else home_name(self.main)
        return home

    def execution(self, key: str) -> torch.device:
        """Return where the module that holds a weight runs.

        Args:
            key: The weight's name in the model.
        """
        home = self.home(key)
        return self.main if home in (CPU, DISK) else torch_device(home)

    def resting(self, key: str, *, is_buffer: bool = False) -> torch.device:
        """Return the device of a weight's tensor between forwards.

        Args:
            key: Its name in the model.
            is_buffer: Whether it is a buffer.
        """
        home = self.home(key, is_buffer=is_buffer)
        return torch.device("cpu") if home == DISK else torch_device(home)

    @property
    def devices(self) -> set[torch.device]:
        """Where any module runs."""
        homes = set(self.device_map.values())
        return {self.main if home in (CPU, DISK) else torch_device(home) for home in homes}


def torch_device(home: Home) -> torch.device:
    """Return torch's name for a home other than ``"disk"``.

    Args:
        home: An accelerator's index, or a device's name.
    """
    return torch.device("cuda", home) if isinstance(home, int) else torch.device(home)


@dataclass(slots=True)
class Dispatch:
    """What is attached to a model that was placed; kept as ``model._dispatch``."""

    homes: Homes
    store: DiskWeights
    handles: list[RemovableHandle] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """What else `attach` was called with, to call it again."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.store.__deepcopy__(memo)

    def __reduce__(self) -> Any:
        return self.store.__reduce__()


def attach(
    model: nn.Module,
    homes: Homes,
    store: DiskWeights,
    *,
    skip_keys: Iterable[str] = (),
    whole: Iterable[str] = (),
    force: bool = False,
    runtimes: Callable[[torch.device], Runtime | None] = runtime_for,
) -> None:
    """Make a model run with its weights where they are.

    Args:
        model: Its weights lie in their homes already; those on disk are tensors of `store`.
        homes: Where they are.
        store: The weights on disk.
        skip_keys: Keyword arguments whose tensors are not moved between devices.
        whole: Further classes whose submodules' weights are brought in together.
        force: Attach hooks also where all weights lie where they are used.
        runtimes: Gives the streams of a device; None for one that has none.
    """
    remove_hooks(model)
    skip_keys = skip_keys if isinstance(skip_keys, str) else tuple(skip_keys)
    whole = tuple(whole)
    options = {"skip_keys": skip_keys, "whole": whole, "force": force, "runtimes": runtimes}
    dispatch = Dispatch(homes, store, options=options)
    try:
        _add_hooks(model, dispatch, skip_keys, whole, force, runtimes)
    except BaseException:
        # Half of the hooks would bring weights in and never put them back.
        for handle in dispatch.handles:
            handle.remove()
        raise


def _add_hooks(
    model: nn.Module,
    dispatch: Dispatch,
    skip_keys: Iterable[str],
    whole: Iterable[str],
    force: bool,
    runtimes: Callable[[torch.device], Runtime | None],
) -> None:
    """Do what `attach` says, and note the dispatch on the model at the end."""
    homes, store = dispatch.homes, dispatch.store
    ahead, releases = ReadAhead(), Releases(store)
    runtime = {device: runtimes(device) for device in homes.devices}
    fast = frozenset(device for device, found in runtime.items() if found is not None)
    parts = _parts(model, homes, store, ahead, releases, frozenset((*WHOLE, *whole)), fast)
    for part, following in pairwise(parts):
        part.successor = following
    skip = frozenset([skip_keys] if isinstance(skip_keys, str) else skip_keys)
    if len(homes.devices) > 1 or (homes.main.type != "cpu" and (parts or force)):
        for module, device in _entries(model, homes):
            mover = _Mover(device, skip)
            dispatch.handles.append(module.register_forward_pre_hook(mover.before, with_kwargs=True))
        back = _Back(skip)
        dispatch.handles.append(model.register_forward_pre_hook(back.before, with_kwargs=True, prepend=True))
        dispatch.handles.append(model.register_forward_hook(back.after, with_kwargs=True))
    calls = []
    for device, found in runtime.items():
        here = [part for part in parts if part.device == device]
        if found is not None and here:
            calls += _through_ring(model, here, found)
    for call in calls:
        dispatch.handles.append(call.module.register_forward_pre_hook(call.before))
    for part in parts:
        dispatch.handles.append(part.module.register_forward_pre_hook(part.before))
        dispatch.handles.append(part.module.register_forward_hook(part.after, always_call=True))
    for call in calls:
        dispatch.handles.append(call.module.register_forward_hook(call.after, always_call=True))
    for module, below in _sweepers(model, parts):
        sweep = _Sweep(below)
        dispatch.handles.append(module.register_forward_hook(sweep.after, always_call=True))
    if store.nbytes:
        dispatch.handles.append(model.register_forward_hook(releases.after, always_call=True))
    if not parts and not dispatch.handles and not force:
        return
    model._dispatch = dispatch  # type: ignore[assignment]


def remove_hooks(model: nn.Module) -> None:
    """Undo `attach`: the model's weights stay where they lie, as ordinary tensors.

    Those on disk stay tensors on the map of their file, as after a plain load. Where weights lie on several
    devices the model does not run any more until it is moved.

    Args:
        model: Any module.
    """
    model.__dict__.pop("_disk_weights", None)
    dispatch = model.__dict__.get("_dispatch")
    if dispatch is None:
        return
    for handle in dispatch.handles:
        handle.remove()
    del model._dispatch


def disk_weights_of(model: nn.Module) -> DiskWeights | None:
    """Return a placed model's weights on disk, or None for a model that was not placed.

    Args:
        model: Any module.
    """
    dispatch = model.__dict__.get("_dispatch")
    return None if dispatch is None else dispatch.store


def leave(model: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Prepare a placed model for `.to`, `.half` and the like: all weights come out of their homes.

    Args:
        model: Any module; one that was not placed is left alone.
        convert: What torch will do to each weight.

    Raises:
        PlacementError: the memory for the weights on disk is not there; nothing has changed then.
        CheckpointError: a file that weights on disk lie in was changed.
    """
    dispatch = model.__dict__.get("_dispatch")
    if dispatch is None:
        return
    need, seen = 0, set()
    device = convert(next(model.parameters()).detach().view(-1)[:1]).device
    for tensor in (*model.parameters(), *model.buffers()):
        span = dispatch.store.span_of(tensor.data)
        if span is None or tensor.data_ptr() in seen:
            continue
        span.file.check()
        seen.add(tensor.data_ptr())
        probe = convert(tensor.data.view(-1)[:1])
        if (probe.dtype, probe.device) != (tensor.dtype, tensor.device):
            need += tensor.numel() * probe.element_size()
    # Quantized layers get a copy in the layout of their kernel.
    leaves = [module for module in model.modules() if isinstance(module, IntegerLeaf)]
    need += sum({leaf.weight.data_ptr(): leaf.weight.nbytes for leaf in leaves}.values())
    if device.type == "cpu":
        check_room(need, "to, half, float, ...")
    remove_hooks(model)
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": home_name(device)}  # type: ignore[assignment]


def check_room(need: int, where: str) -> None:
    """Raise where weights that are read in from disk do not fit into main memory.

    Args:
        need: Their bytes.
        where: What asks for them.

    Raises:
        PlacementError: they do not.
    """
    left = available_host_memory()
    if left is not None and need > left:
        raise PlacementError(
            "The weights on disk do not fit into memory together",
            where=where,
            expected=f"{format_bytes(need)} of free memory",
            found=format_bytes(left),
            mend="Load the model again with the dtype or device_map that you want.",
        )


def modules_changed(model: nn.Module) -> None:
    """Go on after layers of a placed model were replaced by others, whose weights are in memory.

    Where everything runs on the CPU the model has left its homes then. Over several devices it keeps them.

    Args:
        model: Any module; one that was not placed is left alone.
    """
    dispatch = model.__dict__.get("_dispatch")
    if dispatch is None:
        return
    if all(device.type == "cpu" for device in dispatch.homes.devices):
        remove_hooks(model)
        model.hf_device_map = {"": CPU}  # type: ignore[assignment]
    else:
        skip = getattr(model, "_skip_keys_device_placement", None) or ()
        attach(model, dispatch.homes, dispatch.store, skip_keys=skip)


# -- parts ---------------------------------------------------------------------------------------

Slot = tuple[nn.Module, str, bool]
"""A module, a name in it, and whether that is a buffer."""


class _Part:
    """A module with weights that do not lie where it runs."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        device: torch.device,
        slots: Sequence[Slot],
        spans: Sequence[Span],
        reader: ReadAhead,
        releases: Releases,
    ) -> None:
        self.path, self.module, self.device = path, module, device
        self.slots, self.spans, self.reader, self.releases = slots, spans, reader, releases
        self.files = files_of(spans)
        # Of a table only some rows are read, so fetching all of it ahead would be waste.
        self.ahead = [] if isinstance(module, nn.Embedding | nn.EmbeddingBag) else list(spans)
        self.successor: _Part | None = None
        self.is_requested = False
        self.has_run = False
        self.ring: Ring | None = None
        self._span_at = {span.address: span for span in spans}
        self._lock = threading.Lock()
        self._inside = 0
        self._resting: list[tuple[Slot, torch.Tensor]] = []
        self._loan: Loan | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise cannot_copy("copied")

    def __reduce__(self) -> Any:
        raise cannot_copy("pickled")

    @property
    def is_brought(self) -> bool:
        """Whether its weights run on another device than they rest on."""
        return self.device.type != "cpu" or self.ring is not None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.spans:
            self._check_files()
            self.reader.enter(self)
        if self.spans or self.is_brought:
            self._check_not_trained()
        if self.is_brought:
            with self._lock:
                self._inside += 1
                if self._inside == 1:
                    self._bring()

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.is_brought:
            with self._lock:
                # After an error in `before` of this or of another hook there is nothing to put back.
                self._inside = max(0, self._inside - 1)
                if self._inside == 0:
                    self._put_back()
        self.has_run = True
        self.release()

    def release(self) -> None:
        self.is_requested = False
        if self.spans:
            self.releases.add(self.spans)

    def sources(self) -> Sequence[Source]:
        """Return what the ring may fetch ahead; nothing while the part runs, for its weights are there."""
        if not self._lock.acquire(blocking=False):
            return ()
        try:
            if self._inside:
                return ()
            self._check_files()
            return [self._source(tensor) for _, tensor in self._away() if _can_send(tensor)]
        finally:
            self._lock.release()

    def _source(self, tensor: torch.Tensor) -> Source:
        span = self._span_at.get(tensor.data_ptr())
        return Source(tensor, None if span is None else span.release)

    def _check_files(self) -> None:
        for file in self.files:
            file.check()

    def _check_not_trained(self) -> None:
        if self.module.training and torch.is_grad_enabled():
            for owner, name, is_buffer in self.slots:
                if not is_buffer and owner.get_parameter(name).requires_grad:
                    raise _cannot_train(f"{self.path}.{name}", "on disk" if self.spans else "on 'cpu'")

    def _away(self) -> Iterator[tuple[Slot, torch.Tensor]]:
        for slot in self.slots:
            tensor = _table(slot)[slot[1]]
            if tensor is not None and (tensor.device != self.device or self.device.type == "cpu"):
                yield slot, tensor

    def _bring(self) -> None:
        sent = []
        for slot, tensor in list(self._away()):
            if self.ring is not None and _can_send(tensor):
                sent.append((slot, tensor))
            else:
                self._replace(slot, tensor, tensor.detach().to(self.device))
        if self.ring is not None and sent:
            self._loan = self.ring.enter(self, [self._source(tensor) for _, tensor in sent])
            for (slot, tensor), copy in zip(sent, self._loan.tensors, strict=True):
                self._replace(slot, tensor, copy)

    def _replace(self, slot: Slot, resting: torch.Tensor, copy: torch.Tensor) -> None:
        self._resting.append((slot, resting))
        _table(slot)[slot[1]] = copy if slot[2] else nn.Parameter(copy, requires_grad=False)

    def _put_back(self) -> None:
        while self._resting:
            slot, tensor = self._resting.pop()
            _table(slot)[slot[1]] = tensor
        if self.ring is not None and self._loan is not None:
            self.ring.leave(self._loan)
            self._loan = None


def _table(slot: Slot) -> dict[str, Any]:
    return slot[0]._buffers if slot[2] else slot[0]._parameters


def _can_send(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > 0 and flat(tensor) is not None


class _Call:
    """Tells a ring where a forward begins and ends."""

    def __init__(self, module: nn.Module, ring: Ring, order: Order) -> None:
        self.module, self.ring, self.order = module, ring, order

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.ring.begin(self.order)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.ring.end()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise cannot_copy("copied")

    def __reduce__(self) -> Any:
        raise cannot_copy("pickled")


def _through_ring(model: nn.Module, parts: Sequence[_Part], runtime: Runtime) -> list[_Call]:
    """Give parts that run on one device a ring, and return the modules that call them."""
    sizes = {part.path: [tensor.nbytes for _, tensor in part._away()] for part in parts}
    ring = Ring(runtime, room_for(sizes))
    below: dict[str, list[_Part]] = {}
    for part in parts:
        part.ring = ring
        names = part.path.split(".") if part.path else []
        for length in range(len(names) + 1):
            below.setdefault(".".join(names[:length]), []).append(part)
    modules = ((model.get_submodule(path), held) for path, held in below.items())
    return [
        _Call(module, ring, Order(list(held)))
        for module, held in modules
        if not isinstance(module, _CONTAINERS)
    ]


def _parts(
    model: nn.Module,
    homes: Homes,
    store: DiskWeights,
    reader: ReadAhead,
    releases: Releases,
    whole: frozenset[str],
    fast: frozenset[torch.device],
) -> list[_Part]:
    """Return the parts of a model, in module order."""
    slots: dict[str, list[tuple[Slot, str]]] = {}
    modules: dict[str, nn.Module] = {}
    for path, owner, module, name, is_buffer in _slots(model, whole):
        key = f"{path}.{name}" if path else name
        modules[owner[0]] = owner[1]
        slots.setdefault(owner[0], []).append(((module, name, is_buffer), key))
    parts = []
    for path, held in slots.items():
        device = homes.execution(held[0][1])
        away, spans = [], []
        for slot, _ in held:
            owner_module, name, is_buffer = slot
            tensor = (owner_module._buffers if is_buffer else owner_module._parameters)[name]
            assert tensor is not None
            span = store.span_of(tensor.data)
            if span is not None:
                spans.append(span)
            # A device that has streams and is the CPU's is a test's.
            if span is not None or tensor.device != device or (device in fast and device.type == "cpu"):
                away.append(slot)
        if away:
            parts.append(_Part(path, modules[path], device, away, spans, reader, releases))
    return parts


def _slots(
    model: nn.Module, whole: frozenset[str]
) -> Iterator[tuple[str, tuple[str, nn.Module], nn.Module, str, bool]]:
    """Yield (path, the part's path and module, module, name, is a buffer) of every tensor of a model."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module, owner: tuple[str, nn.Module], is_inside: bool) -> Iterator[Any]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if not is_inside and not isinstance(module, _CONTAINERS):
            owner = (path, module)
        for table, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for name, tensor in table.items():
                if tensor is not None:
                    yield path, owner, module, name, is_buffer
        inside = is_inside or type(module).__name__ in whole
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}" if path else name, child, owner, inside)

    return walk("", model, ("", model), False)


class _Sweep:
    """Releases, after a module ran, weights below it that it may have used without calling their modules."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in self._parts:
            # One that ever ran is called by its forward, and has been released there.
            if not part.has_run:
                part.release()


def _sweepers(model: nn.Module, parts: Sequence[_Part]) -> Iterator[tuple[nn.Module, list[_Part]]]:
    """Yield the modules that call parts, with those below each."""
    own = {id(part.module) for part in parts}
    for path, module in model.named_modules():
        if id(module) in own or isinstance(module, _CONTAINERS):
            continue
        below = [part for part in parts if part.spans and (not path or part.path.startswith(f"{path}."))]
        if below:
            yield module, below


def _cannot_train(key: str, home: str) -> ArgumentError:
    return ArgumentError(
        f"A weight placed {home} cannot be trained",
        where=key,
        mend="Place it on the device that it runs on, or freeze it with requires_grad_(False); for "
        "evaluation call model.eval().",
    )


# -- inputs --------------------------------------------------------------------------------------


class _Mover:
    """Brings a module's inputs to the device it runs on."""

    def __init__(self, device: torch.device, skip: frozenset[str]) -> None:
        self._device, self._skip = device, skip

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kept = {name: value for name, value in kwargs.items() if name in self._skip}
        rest = {name: value for name, value in kwargs.items() if name not in self._skip}
        return moved(args, self._device), {**moved(rest, self._device), **kept}


class _Back:
    """Brings the model's outputs to where its inputs came from."""

    def __init__(self, skip: frozenset[str]) -> None:
        self._skip = skip
        self._local = threading.local()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.device = next(_devices((args, kwargs)), None)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        device = getattr(self._local, "device", None)
        if device is None:
            return output
        if isinstance(output, Mapping):
            for name, value in output.items():
                if name not in self._skip:
                    output[name] = moved(value, device)  # type: ignore[index]
            return output
        return moved(output, device)

    # Locals of a thread cannot be copied; a copied model is refused by its store with a clear word.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Back:
        return _Back(self._skip)


def _entries(model: nn.Module, homes: Homes) -> Iterator[tuple[nn.Module, torch.device]]:
    """Yield the modules at which a forward may pass to another device, with that device."""
    for path, module in model.named_modules():
        above = path.rpartition(".")[0]
        if isinstance(module, _CONTAINERS) or covering(path, homes.device_map) is None:
            continue
        device = homes.execution(_first_key(path, module))
        parent = model.get_submodule(above) if path else None
        outer = covering(above, homes.device_map) if path else None
        differs = parent is None or outer is None or homes.execution(_first_key(above, parent)) != device
        if not path or differs or isinstance(parent, _CONTAINERS):
            yield module, device


def _first_key(path: str, module: nn.Module) -> str:
    """Return the key of a module's first own weight, which may be tied elsewhere; its path without one."""
    name = next((name for name, tensor in module._parameters.items() if tensor is not None), None)
    return path if name is None else f"{path}.{name}" if path else name


def _devices(value: Any) -> Iterator[torch.device]:
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _devices(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _devices(item)


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with every tensor in its tuples, lists and dictionaries on a device.

    Args:
        value: Anything; objects of other classes are left as they are.
        device: Where to.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if type(value) in (list, tuple):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {name: moved(item, device) for name, item in value.items()}
    return value
