# SPDX-License-Identifier: Apache-2.0
"""Understands the pickles that `torch.save` writes, without being able to run anything.

A pickle is a program for a small stack machine, and the usual machine may import and call whatever the
program names. This one knows only the opcodes that state dicts need, and its only "globals" are the entries
of one table in `pickle_values`: placeholders for tensors, storages, dtypes and ordered dictionaries.
Everything else is an error that names it. No module is imported, and no function of the file's choosing is
called.

Memory stays proportional to the pickle: each opcode takes at least one byte of it and creates at most one
object, strings are slices of it, and the number of opcodes is limited.

Opcodes: the docstrings of Python's own `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from pretrained.core.pickle_values import (
    GLOBALS,
    Opaque,
    OrderedDictValue,
    Rebuild,
    StorageRef,
    StorageType,
    StoredTensor,
    TorchDType,
)
from pretrained.errors import CheckpointError

MAX_STEPS: Final = 4_000_000
"""Most opcodes that a pickle may have: about fifty are needed for one tensor."""

_MOST_AXES: Final = 64
_LARGEST_SIZE: Final = 2**63 - 1

CONVERT: Final = (
    "Nothing in the file was executed. If you trust its source, convert it to safetensors where it was made "
    "(safetensors.torch.save_file) and load that."
)


_U2: Final = struct.Struct("<H")
_I4: Final = struct.Struct("<i")
_U4: Final = struct.Struct("<I")
_U8: Final = struct.Struct("<Q")
_F8: Final = struct.Struct(">d")


def run_pickle(data: bytes, *, where: object, start: int = 0) -> tuple[Any, int]:
    """Run one pickle.

    Args:
        data: The bytes that hold it.
        where: Named in errors, normally the file.
        start: Index of its first byte.

    Returns:
        Its value, made of dicts, lists, tuples, strings, numbers and the placeholders of this module; and the
        index of the first byte after it.

    Raises:
        CheckpointError: it is malformed, too long, or uses anything that is not on the lists of this module.
    """
    return _Machine(data, start, where).run()


class _Machine:
    """The state of one run: where it reads, its stack and its memo."""

    def __init__(self, data: bytes, start: int, where: object) -> None:
        self.data = data
        self.position = start
        self.where = where
        self.steps = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> tuple[Any, int]:
        data, handlers = self.data, _HANDLERS
        while True:
            self.charge(1)
            if self.position >= len(data):
                raise self.truncated()
            opcode = data[self.position]
            self.position += 1
            if opcode == _STOP:
                value = self.pop()
                if self.stack or self.marks:
                    raise self.malformed("values are left on its stack")
                return value, self.position
            handler = handlers.get(opcode)
            if handler is None:
                raise self.forbidden_opcode(opcode)
            handler(self)

    # What the handlers are made of

    def charge(self, count: int) -> None:
        """Count work, so that neither a long program nor a copied list can take unbounded time or memory."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise self.malformed(f"it takes more than {MAX_STEPS} steps")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, having checked that they exist."""
        end = self.position + count
        if end > len(self.data):
            raise self.truncated()
        raw = self.data[self.position : end]
        self.position = end
        return raw

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise self.malformed("a name in it has no end")
        raw = self.data[self.position : end]
        self.position = end + 1
        return raw.decode("utf-8", "replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.malformed("it takes a value that is not there")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise self.malformed("it takes a mark that is not there")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def remember(self, index: int) -> None:
        if index > len(self.data):
            raise self.malformed(f"its memo index {index} is absurd")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.malformed(f"it takes entry {index} of its memo, which is not there")
        self.push(self.memo[index])

    def text(self, count: int) -> None:
        try:
            self.push(self.take(count).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise self.malformed("a string in it is not UTF-8") from None

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def append_all(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.malformed("it appends to something that is not a list")
        target.extend(values)

    def store_all(self, pairs: list[Any]) -> None:
        """Put keys and values, which alternate in `pairs`, into the dict on top."""
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self.malformed("it stores items in something that is not a dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing a deeply nested tuple recurses in C without a limit, so only plain keys are taken.
            if not (key is None or isinstance(key, str | int)):
                raise self.malformed(f"it has a dict key that is a {type(key).__name__}")
            target[key] = value

    # Opcodes with rules of their own

    def find_global(self, name: str) -> None:
        if name not in GLOBALS:
            raise self.forbidden_global(name)
        self.push(GLOBALS[name])

    def op_global(self) -> None:
        module = self.line()
        self.find_global(f"{module}.{self.line()}")

    def op_stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.malformed("it names a global by something that is not a string")
        self.find_global(f"{module}.{name}")

    def op_inst(self) -> None:
        module = self.line()
        raise self.forbidden_global(f"{module}.{self.line()}")

    def op_persistent_id(self) -> None:
        self.push(self.storage(self.pop()))

    def op_build(self) -> None:
        state, target = self.pop(), self.top()
        if type(target) is not OrderedDictValue or not isinstance(state, dict):
            raise self.forbidden(f"sets the state of {_describe(target)}")

    def op_reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Rebuild) or type(arguments) is not tuple:
            raise self.forbidden(f"calls {_describe(function)}")
        self.push(self.rebuild(function, arguments))

    # What stands in for the functions that torch's pickles name

    def rebuild(self, function: Rebuild, arguments: tuple[Any, ...]) -> Any:
        result: Any = None
        match function, arguments:
            case ((Rebuild.TENSOR | Rebuild.TENSOR_V2 | Rebuild.TENSOR_V3), _):
                result = self.tensor(function, arguments)
            case (Rebuild.PARAMETER, (StoredTensor() as tensor, _, _)):
                result = tensor
            case (Rebuild.PARAMETER_WITH_STATE, (StoredTensor() as tensor, _, _, _)):
                result = tensor
            case (Rebuild.ORDERED_DICT, ()):
                result = OrderedDictValue()
            case (Rebuild.ORDERED_DICT, (list() as pairs,)):  # as Python 2 wrote it
                result = self.ordered_dict(pairs)
            case (Rebuild.SIZE, (sizes,)):
                result = self.sizes(sizes)
            case (Rebuild.DEVICE, (str(), *_)):
                result = Opaque("torch.device")
        if result is None:
            raise self.malformed(f"the arguments of {function.value} are not what torch.save writes")
        return result

    def ordered_dict(self, pairs: list[Any]) -> Any:
        self.charge(len(pairs))
        if not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
            raise self.malformed("an OrderedDict in it is not made of pairs")
        self.push(OrderedDictValue())
        self.store_all([part for pair in pairs for part in pair])
        return self.pop()

    def storage(self, identity: Any) -> StorageRef:
        match identity:
            case ("storage", StorageType() as kind, str() as key, str() | None, int() as count):
                view = None
            case ("storage", StorageType() as kind, str() as key, str() | None, int() as count, view):
                pass
            case _:
                raise self.malformed("it refers to outside data that is not a tensor storage")
        if not 0 <= count <= _LARGEST_SIZE:
            raise self.malformed(f"storage {key[:100]!r} has {count} elements")
        if view is None:
            return StorageRef(key, kind.dtype, count)
        if type(view) is tuple and len(view) == 3 and all(type(part) is int for part in view[1:]):
            _, offset, length = view
            if 0 <= offset <= offset + length <= count:
                return StorageRef(key, kind.dtype, count, offset)
        raise self.malformed(f"the view of storage {key[:100]!r} does not lie in it")

    def tensor(self, function: Rebuild, arguments: tuple[Any, ...]) -> StoredTensor | None:
        """Make a tensor of (storage, offset, shape, strides, requires_grad, hooks, [dtype,] [metadata])."""
        plain, dtype = list(arguments), None
        if function is Rebuild.TENSOR_V3 and len(plain) > 6:
            dtype = plain.pop(6)
            if not isinstance(dtype, TorchDType):
                return None
        if len(plain) == 7 and not plain[6]:
            plain.pop()  # metadata would say that the bytes are to be negated or conjugated
        if len(plain) != (4 if function is Rebuild.TENSOR else 6):
            return None
        storage, offset = plain[0], plain[1]
        shape, strides = self.sizes(plain[2]), self.sizes(plain[3])
        if not isinstance(storage, StorageRef) or type(offset) is not int or len(shape) != len(strides):
            return None
        if not 0 <= offset <= _LARGEST_SIZE:
            raise self.malformed(f"a tensor begins at element {offset} of its storage")
        return StoredTensor(storage, dtype or storage.dtype, offset, shape, strides)

    def sizes(self, value: Any) -> tuple[int, ...]:
        if (
            type(value) not in (tuple, list)
            or len(value) > _MOST_AXES
            or not all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in value)
        ):
            raise self.malformed("a shape or a stride in it is not a short tuple of whole numbers, 0 or more")
        return tuple(value)

    # Errors

    def malformed(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"The pickle in this PyTorch file cannot be right: {why}", where=self.where, mend=CONVERT
        )

    def truncated(self) -> CheckpointError:
        return self.malformed(f"it goes on past its end, after {len(self.data)} bytes")

    def forbidden(self, deed: str) -> CheckpointError:
        return CheckpointError(
            f"The pickle in this PyTorch file {deed}, which no tensor needs", where=self.where, mend=CONVERT
        )

    def forbidden_global(self, name: str) -> CheckpointError:
        return self.forbidden(f"asks for the global {name[:200]!r}")

    def forbidden_opcode(self, opcode: int) -> CheckpointError:
        return self.forbidden(f"uses the opcode {bytes([opcode])!r}")


def _describe(value: Any) -> str:
    if isinstance(value, Rebuild):
        return value.value
    return f"a {type(value).__name__}"


def _int_from(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


_STOP: Final = ord(".")
_HANDLERS: Final[Mapping[int, Callable[[_Machine], None]]] = {
    ord(code): handler
    for code, handler in {
        # protocol and framing: nothing depends on either
        b"\x80": lambda m: m.take(1),
        b"\x95": lambda m: m.take(8),
        # plain values
        b"N": lambda m: m.push(None),
        b"\x88": lambda m: m.push(True),
        b"\x89": lambda m: m.push(False),
        b"K": lambda m: m.push(m.take(1)[0]),
        b"M": lambda m: m.push(m.number(_U2)),
        b"J": lambda m: m.push(m.number(_I4)),
        b"\x8a": lambda m: m.push(_int_from(m.take(m.take(1)[0]))),
        b"G": lambda m: m.push(m.number(_F8)),
        b"X": lambda m: m.text(m.number(_U4)),
        b"\x8c": lambda m: m.text(m.take(1)[0]),
        b"\x8d": lambda m: m.text(m.number(_U8)),
        b"U": lambda m: m.text(m.take(1)[0]),  # Python 2's str
        b"T": lambda m: m.text(m.number(_U4)),
        b"C": lambda m: m.push(m.take(m.take(1)[0])),
        b"B": lambda m: m.push(m.take(m.number(_U4))),
        # containers
        b"(": lambda m: m.marks.append(len(m.stack)),
        b")": lambda m: m.push(()),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"t": lambda m: m.push(tuple(m.pop_to_mark())),
        b"]": lambda m: m.push([]),
        b"a": lambda m: m.append_all([m.pop()]),
        b"e": lambda m: m.append_all(m.pop_to_mark()),
        b"}": lambda m: m.push({}),
        b"s": lambda m: m.store_all([m.pop(), m.pop()][::-1]),
        b"u": lambda m: m.store_all(m.pop_to_mark()),
        # stack and memo
        b"0": lambda m: m.pop(),
        b"1": lambda m: m.pop_to_mark(),
        b"q": lambda m: m.remember(m.take(1)[0]),
        b"r": lambda m: m.remember(m.number(_U4)),
        b"\x94": lambda m: m.remember(len(m.memo)),
        b"h": lambda m: m.recall(m.take(1)[0]),
        b"j": lambda m: m.recall(m.number(_U4)),
        # the ones that could do harm elsewhere
        b"c": _Machine.op_global,
        b"\x93": _Machine.op_stack_global,
        b"i": _Machine.op_inst,
        b"Q": _Machine.op_persistent_id,
        b"R": _Machine.op_reduce,
        b"b": _Machine.op_build,
    }.items()
}
