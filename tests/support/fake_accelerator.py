# SPDX-License-Identifier: Apache-2.0
"""An accelerator on the CPU that is as late, and as quick, as its rules allow.

Memory of the "device" is ordinary memory. The computing stream runs at once. Copies run as late as events
let them: when something waits for an event behind them. Until then what they write holds NaN, and what they
read is read late, so that a buffer that is filled again too early gives wrong values. A copy into memory that
the computing stream has used since the last event that the copying stream waited for is an error, and so is
a use of memory that is being written.
"""

import threading
from concurrent.futures import Executor, Future

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter


class Race(AssertionError):
    """Work that nothing orders touches the same memory."""


class FakeEvent:
    def __init__(self, runtime, stream, position):
        self.runtime, self.stream, self.position = runtime, stream, position

    def synchronize(self):
        self.runtime.host_waits += 1
        self.stream.run_to(self.position)


class FakeStream:
    """A queue of copies, or the computing stream, whose work is done at once."""

    def __init__(self, runtime, *, computes=False):
        self.runtime, self.computes = runtime, computes
        self.issued = 0
        self.waiting = []
        self.knows = 0  # position of the computing stream that this one waited for

    def run_to(self, position):
        with self.runtime.lock, _disable_current_modes():
            while self.waiting and self.waiting[0][0] <= position:
                self.waiting.pop(0)[1]()


class FakeRuntime:
    """Implements `pretrained.torch.accelerator.Runtime`."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.lock = threading.RLock()
        self.compute = FakeStream(self, computes=True)
        self.streams = []
        self.used = {}  # address -> last position of the computing stream that used it
        self.writing = {}  # address -> copies that have not run
        self.bytes_sent = self.bytes_allocated = self.host_waits = self.pinned_bytes = 0
        self.sent = []

    def new_stream(self):
        self.streams.append(FakeStream(self))
        return self.streams[-1]

    def current_stream(self):
        return self.compute

    def event(self, stream):
        with self.lock:
            return FakeEvent(self, stream, stream.issued)

    def wait(self, stream, event):
        with self.lock:
            if stream.computes:
                event.stream.run_to(event.position)
            elif event.stream.computes:
                stream.knows = max(stream.knows, event.position)

    def pinned(self, nbytes):
        self.pinned_bytes += nbytes
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def empty(self, nbytes):
        memory = torch.full((nbytes,), 255, dtype=torch.uint8)
        with self.lock:
            self.bytes_allocated += nbytes
            # The allocator gives out memory that earlier work may still use.
            self.used[memory.untyped_storage().data_ptr()] = self.compute.issued
            self.compute.issued += 1
        return memory

    def hold(self, memory, stream):
        pass

    def copy(self, target, source, stream):
        with self.lock:
            address = target.untyped_storage().data_ptr()
            if self.used.get(address, -1) >= stream.knows:
                raise Race("a copy overwrites memory that the computing stream may still use")
            with _disable_current_modes():
                target.view(torch.uint8).fill_(255)
            self.writing[address] = self.writing.get(address, 0) + 1
            stream.issued += 1
            self.bytes_sent += source.nbytes
            self.sent.append(target.nbytes)

            def run():
                target.copy_(source)
                self.writing[address] -= 1

            stream.waiting.append((stream.issued, run))

    def watch(self):
        """Return a context in which each operation is work of the computing stream."""
        return _Watch(self)


class _Watch(TorchDispatchMode):
    def __init__(self, runtime):
        super().__init__()
        self.runtime = runtime

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not (func.is_view or func is torch.ops.aten.detach.default):
            with self.runtime.lock:
                for value in tree_iter((args, kwargs)):
                    if isinstance(value, torch.Tensor) and not value.is_meta:
                        address = value.untyped_storage().data_ptr()
                        if self.runtime.writing.get(address):
                            raise Race(f"{func} uses memory that is being written")
                        self.runtime.used[address] = self.runtime.compute.issued
                self.runtime.compute.issued += 1
        return func(*args, **kwargs)


class Inline(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn, *args, **kwargs):
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future
