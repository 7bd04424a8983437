# SPDX-License-Identifier: Apache-2.0
"""Brings offloaded weights to an accelerator ahead of the modules that use them.

A ring owns a bounded amount of device memory, cut into buffers of one weight each. While a module computes,
the weights of those that follow are copied on a stream of their own; which those are is what ran last time,
and before the first run the order of the module tree. A guess that proves wrong costs time, never a wrong
value:

- the computing stream waits for the copy of each weight that it is given;
- a buffer is written again only after the work that used it, which the copying stream waits for;
- a buffer to which something still refers after its module ran (an output that is a view of the weight,
  autograd) is left to it, and replaced;
- weights are copied anew in each forward, so that edits between forwards are seen; within one, a weight that
  several modules share is copied once as long as there is room to keep it.

When the room is taken, by a large weight or by modules within modules, a weight gets memory beside the ring,
as it would without one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from pretrained.errors import PretrainedError
from pretrained.torch.accelerator import Event, Runtime
from pretrained.torch.staging import Sending, Stager, flat, like

# What the device's allocator rounds to as well.
_ALIGN: Final = 512

# Parts of a forward that are remembered; a submodule that is called in a loop of its own has no end.
_TRACE: Final = 16384

Key = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """A weight where it rests.

    Attributes:
        tensor: On the CPU.
        on_staged: Called from another thread when its bytes have been read.
    """

    tensor: torch.Tensor
    on_staged: Callable[[], None] | None = None


class RingPart(Protocol):
    """What is brought as one: the weights of a module."""

    def sources(self) -> Sequence[Source]:
        """Return its weights, as they rest now; none where it runs at the moment."""


@dataclass(eq=False, slots=True)
class _Entry:
    """A weight on the device.

    Attributes:
        memory: The buffer.
        view: The weight in it.
        sending: Its copy.
        source_version: Torch's count of edits of the source when it was copied.
        serial: The forward that it was copied for.
        after: What had to happen before the copy.
        references: References to the buffer while nothing uses it.
        version: Torch's count of edits of the buffer, once copied.
        uses: Modules that run with it now.
        awaited: The place in the forward's order of a part that it was fetched for.
        events: Ends of uses, by stream.
    """

    key: Key
    memory: torch.Tensor
    view: torch.Tensor
    sending: Sending
    source_version: int
    serial: int
    after: list[Event]
    references: int
    version: int = -1
    uses: int = 0
    awaited: int = -1
    events: dict[Any, Event] = field(default_factory=dict)


@dataclass(slots=True)
class Order:
    """The order in which parts run below one module.

    Attributes:
        parts: As of its last call; before the first, in the order of the module tree.
    """

    parts: list[RingPart] = field(default_factory=list)


class _Session:
    """One call of the outermost module, in one thread."""

    def __init__(self, order: Order, serial: int) -> None:
        self.order, self.serial = order, serial
        self.expected = list(order.parts)
        self.ran: list[RingPart] = []
        self.depth = 0
        self.at = self.ahead = 0

    def enter(self, part: RingPart) -> None:
        """Note that a part runs now."""
        if len(self.ran) < _TRACE:
            self.ran.append(part)
        try:
            self.at = self.expected.index(part, self.at) + 1
        except ValueError:
            # Out of order: what follows its first place is the best guess there is.
            self.at = self.expected.index(part) + 1 if part in self.expected else len(self.expected)
            self.ahead = self.at
        self.ahead = max(self.ahead, self.at)


class Loan:
    """Weights that are given to a module while it runs.

    Attributes:
        tensors: On the device, in the order of the part's sources.
    """

    __slots__ = ("entries", "tensors")

    def __init__(self, entries: list[_Entry], tensors: list[torch.Tensor]) -> None:
        self.entries, self.tensors = entries, tensors


class Ring:
    """Device memory for the offloaded weights of one model on one accelerator.

    Args:
        runtime: The accelerator.
        capacity: Bytes of device memory.
        stager: Copies to it.
    """

    def __init__(self, runtime: Runtime, capacity: int, stager: Stager | None = None) -> None:
        self.runtime, self.capacity = runtime, capacity
        self.stager = stager or Stager(runtime)
        self._entries: dict[Key, _Entry] = {}
        self._pool: list[tuple[torch.Tensor, list[Event]]] = []
        self._taken = 0
        self._serial = 0
        self._lock = threading.Lock()
        self._local = threading.local()

    # -- forwards ------------------------------------------------------------------------------

    def begin(self, order: Order) -> None:
        """Note that a module with parts below it begins to run.

        Args:
            order: The order of its parts.
        """
        session: _Session | None = getattr(self._local, "session", None)
        if session is None:
            with self._lock:
                self._serial += 1
                session = self._local.session = _Session(order, self._serial)
                self._fetch_ahead(session)
        session.depth += 1

    def end(self) -> None:
        """Note that a module that began has ended, or failed."""
        session: _Session | None = getattr(self._local, "session", None)
        if session is None:
            return
        session.depth -= 1
        if session.depth <= 0:
            session.order.parts = session.ran or session.order.parts
            self._local.session = None

    # -- parts ---------------------------------------------------------------------------------

    def enter(self, part: RingPart, sources: Sequence[Source]) -> Loan:
        """Return a part's weights on the device, and go on with those of the parts that follow.

        Args:
            part: What begins to run.
            sources: Its weights.

        Raises:
            BaseException: what reading a weight raised.
        """
        session: _Session | None = getattr(self._local, "session", None)
        loan = Loan([], [])
        try:
            with self._lock:
                if session is None:
                    self._serial += 1
                    session = _Session(Order(), self._serial)
                session.enter(part)
                for source in sources:
                    entry = self._entry(source, session, is_wanted=True)
                    assert entry is not None
                    entry.uses += 1
                    loan.entries.append(entry)
                self._fetch_ahead(session)
            self._await(loan)
        except BaseException:
            self.leave(loan)
            raise
        return loan

    def _await(self, loan: Loan) -> None:
        stream = self.runtime.current_stream()
        for entry in loan.entries:
            event = entry.sending.enqueued()
            self.runtime.wait(stream, event)
            self.runtime.hold(entry.memory, stream)
            if entry.version < 0:
                entry.version = entry.memory._version
            loan.tensors.append(entry.view)

    def leave(self, loan: Loan) -> None:
        """Take a part's weights back; nothing of the part may refer to them any more.

        Args:
            loan: What `enter` returned; empty afterwards.
        """
        loan.tensors.clear()
        stream = self.runtime.current_stream()
        event = self.runtime.event(stream)
        session: _Session | None = getattr(self._local, "session", None)
        with self._lock:
            while loan.entries:
                entry = loan.entries.pop()
                entry.events[stream] = event
                entry.uses -= 1
                if entry.uses == 0:
                    self._settle(entry)
            if session is not None:
                self._fetch_ahead(session)

    def _settle(self, entry: _Entry) -> None:
        """Decide what becomes of a weight that nothing runs with any more."""
        if references_to(entry.memory) > entry.references:
            self._forget(entry)
            self._taken -= entry.memory.numel()
        elif self._entries.get(entry.key) is not entry or entry.memory._version != entry.version:
            # Replaced by a newer copy meanwhile, or edited by its module.
            self._retire(entry)
        elif self._taken > self.capacity:
            self._retire(entry)
            self._drop_spare(0)

    # -- memory --------------------------------------------------------------------------------

    def _fetch_ahead(self, session: _Session) -> None:
        while session.ahead < len(session.expected):
            part = session.expected[session.ahead]
            try:
                sources = part.sources()
            except PretrainedError:
                # The part says it itself when it runs.
                return
            for source in sources:
                entry = self._entry(source, session, is_wanted=False)
                if entry is None:
                    return
                entry.awaited = session.ahead
            session.ahead += 1

    def _entry(self, source: Source, session: _Session, *, is_wanted: bool) -> _Entry | None:
        """Return a weight's place on the device, on its way or there; None where there is no room yet."""
        tensor = source.tensor
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        version = -1 if tensor.is_inference() else tensor._version
        entry = self._entries.get(key)
        if entry is not None:
            is_fresh = entry.serial >= session.serial and entry.source_version == version
            if is_fresh and not entry.sending.has_failed:
                return entry
            if entry.uses:
                self._forget(entry)
            else:
                self._retire(entry)
        elements = flat(tensor)
        assert elements is not None
        found = self._memory(tensor.numel() * tensor.element_size(), session, is_wanted=is_wanted)
        if found is None:
            return None
        memory, after = found
        with torch.inference_mode(False), torch.no_grad():
            view = like(memory, tensor)
            references = references_to(memory)
            target = flat(view)
        assert target is not None
        sending = self.stager.send(elements, target, after=after, on_staged=source.on_staged)
        entry = _Entry(key, memory, view, sending, version, session.serial, after, references)
        self._entries[key] = entry
        return entry

    def _memory(
        self, nbytes: int, session: _Session, *, is_wanted: bool
    ) -> tuple[torch.Tensor, list[Event]] | None:
        """Return a buffer of the ring, and what must have happened before it is written."""
        size = -(-nbytes // _ALIGN) * _ALIGN
        found = self._spare(size)
        if found is None and self._taken + size > self.capacity:
            self._make_room(size, session, is_wanted=is_wanted)
            found = self._spare(size)
        if found is not None:
            return found
        if self._taken + size > self.capacity and not is_wanted:
            return None
        try:
            memory = self._allocate(size)
        except torch.OutOfMemoryError:
            if not is_wanted:
                return None
            # Better without read-ahead than not at all.
            for entry in [entry for entry in self._entries.values() if entry.uses == 0]:
                self._retire(entry)
            self._drop_spare(self.capacity)
            memory = self._allocate(size)
        self._taken += size
        # The allocator may give out memory that work enqueued earlier on this stream still uses.
        return memory, [self.runtime.event(self.runtime.current_stream())]

    def _allocate(self, size: int) -> torch.Tensor:
        # Weights outlive a call in inference mode, and threads outside of it write them.
        with torch.inference_mode(False), torch.no_grad():
            memory = self.runtime.empty(size)
        self.runtime.hold(memory, self.stager.stream)
        return memory

    def _spare(self, size: int) -> tuple[torch.Tensor, list[Event]] | None:
        for index, (memory, _) in enumerate(self._pool):
            if memory.numel() == size:
                return self._pool.pop(index)
        return None

    def _make_room(self, size: int, session: _Session, *, is_wanted: bool) -> None:
        """Give up weights that no coming module waits for, those of the right size first."""
        idle = [entry for entry in self._entries.values() if entry.uses == 0]
        awaited = [e for e in idle if e.serial == session.serial and e.awaited >= session.at]
        spent = [entry for entry in idle if entry not in awaited]
        # What is needed last goes first.
        order = spent + (sorted(awaited, key=lambda entry: -entry.awaited) if is_wanted else [])
        fitting = next((entry for entry in spent if entry.memory.numel() == size), None)
        if fitting is not None:
            self._retire(fitting)
            return
        self._drop_spare(size)
        for entry in order:
            if self._taken + size <= self.capacity:
                return
            self._retire(entry)
            if entry.memory.numel() == size:
                return
            self._drop_spare(size)

    def _drop_spare(self, size: int) -> None:
        """Give spare buffers back to the allocator until `size` bytes of the ring are free."""
        while self._pool and self._taken + size > self.capacity:
            memory, _ = self._pool.pop(0)
            self._taken -= memory.numel()

    def _retire(self, entry: _Entry) -> None:
        """Give a weight up; its buffer is spare once nothing of its copy is left to enqueue."""
        self._forget(entry)
        was_sent = entry.sending.cancel()
        # Of a copy that never began nobody has waited for what it had to wait for.
        events = [*([] if was_sent else entry.after), *entry.events.values()]
        self._pool.append((entry.memory, events))

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]


def references_to(memory: torch.Tensor) -> int:
    """Return how many tensors share a tensor's memory, those that autograd keeps among them.

    The one use of a function that torch keeps to itself (its CUDA graphs rest on it).

    Args:
        memory: Any tensor.
    """
    return int(torch._C._storage_Use_Count(memory.untyped_storage()._cdata))


def room_for(sizes: Mapping[str, Sequence[int]]) -> int:
    """Return the capacity of a ring: its largest block, which is what a placement keeps free.

    Parts are single layers, so that a block's room holds several, and those of the next block follow as soon
    as the first of this one have run.

    Args:
        sizes: Bytes of the weights of each part, by path. A block is what lies below one number of a path.
    """
    blocks: dict[str, int] = {}
    for path, weights in sizes.items():
        names = path.split(".")
        end = next((at + 1 for at, name in enumerate(names) if name.isdecimal()), len(names))
        block = ".".join(names[:end])
        blocks[block] = blocks.get(block, 0) + sum(-(-size // _ALIGN) * _ALIGN for size in weights)
    return max(blocks.values(), default=0)
