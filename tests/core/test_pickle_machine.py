# SPDX-License-Identifier: Apache-2.0
"""The pickle machine: what it understands equals Python's, and nothing hostile gets anywhere."""

import os
import pickle
import struct
import sys
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrained.core import pickle_machine
from pretrained.core.pickle_machine import run_pickle
from pretrained.core.pickle_values import OrderedDictValue, StorageRef, StoredTensor
from pretrained.errors import CheckpointError


def run(data: bytes):
    return run_pickle(data, where="here.bin")[0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1, "ü": [1, (2, (3, 4, 5, 6)), None, True, False], 3: {"x": (), "y": []}, None: -1},
        [0, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, -(2**40), 2**79, 0.5, -1e300],
        ("short", "x" * 300, b"bytes", b"y" * 300),
        [[i] for i in range(3000)],
        {f"layer.{i}": i for i in range(3000)},
    ],
    ids=["empty", "nested", "numbers", "strings", "list", "dict"],
)
def test_plain_values_come_out_as_pickle_loads_them(value, protocol):
    if protocol == 2 and isinstance(value, tuple):
        pytest.skip("protocol 2 spells bytes as a call of _codecs.encode")
    assert run(pickle.dumps(value, protocol=protocol)) == value


def test_the_end_is_reported():
    first, second = pickle.dumps([1], 2), pickle.dumps("x", 2)
    assert run_pickle(first + second, where="f") == ([1], len(first))
    assert run_pickle(first + second, where="f", start=len(first)) == ("x", len(first + second))


def test_shared_values_stay_shared_and_loops_are_taken():
    inner = [1]
    value = run(pickle.dumps([inner, inner], 2))
    assert value[0] is value[1]
    loop = []
    loop.append(loop)
    value = run(pickle.dumps(loop, 2))
    assert value[0] is value


def test_ordered_dicts_lose_only_their_attributes():
    original = OrderedDict(a=1)
    original._metadata = {"": {"version": 1}}
    value = run(pickle.dumps(original, 2))
    assert type(value) is OrderedDictValue
    assert value == {"a": 1}


def test_python_2_spellings():
    assert run(b"\x80\x02U\x03abc.") == "abc"
    assert run(b"\x80\x02T\x03\0\0\0abc.") == "abc"
    assert run(b"\x80\x02ccollections\nOrderedDict\n(]](U\x01aK\x01eatR.") == {"a": 1}


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06t"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"QK\x00K\x02K\x03\x86K\x03K\x01\x86\x89}tR"


def test_a_tensor_becomes_a_placeholder():
    value = run(b"\x80\x02" + TENSOR + b".")
    assert isinstance(value, StoredTensor)
    assert (value.dtype.name, value.offset, value.shape, value.strides) == ("float32", 0, (2, 3), (3, 1))
    assert value.storage == StorageRef("0", value.dtype, 6)


def test_views_of_storages_from_before_torch_0_4():
    view = STORAGE[:-1] + b"(X\x01\0\0\0vK\x02K\x04tt"
    assert run(b"\x80\x02" + view + b"Q.").offset == 2
    with pytest.raises(CheckpointError, match="view of storage '0' does not lie in it"):
        run(b"\x80\x02" + view.replace(b"K\x04tt", b"K\x05tt") + b"Q.")


class Reduce:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


SYSTEM = Reduce(os.system, "touch owned")
EVIL = {
    "reduce": (pickle.dumps(SYSTEM, 2), "global 'posix.system'"),
    "reduce in a dict": (pickle.dumps({"w": [SYSTEM]}, 2), "global 'posix.system'"),
    "stack global": (pickle.dumps(SYSTEM, 4), "global 'posix.system'"),
    "eval": (b"\x80\x02cbuiltins\neval\nX\x04\0\0\x001+1\x85R.", "global 'builtins.eval'"),
    "python 2 builtins": (b"\x80\x02c__builtin__\neval\n.", "global '__builtin__.eval'"),
    "stack global eval": (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "global 'builtins.eval'"),
    "dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.", "OrderedDict.__init__"),
    "unimported": (b"\x80\x02cantigravity\nfly\n.", "global 'antigravity.fly'"),
    "torch's own loader": (b"\x80\x02ctorch\nload\n.", "global 'torch.load'"),
    "another rebuild": (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", "torch._utils._rebuild_qtensor"),
    "class in a subclass": (b"\x80\x02ccollections\ndefaultdict\n.", "collections.defaultdict"),
    "inst": (b"(X\x01\0\0\0xios\nsystem\n.", "global 'os.system'"),
    "obj": (b"(ccollections\nOrderedDict\no.", "uses the opcode b'o'"),
    "newobj": (b"ccollections\nOrderedDict\n)\x81.", r"uses the opcode b'\\x81'"),
    "newobj_ex": (b"ccollections\nOrderedDict\n)}\x92.", r"uses the opcode b'\\x92'"),
    "ext1": (b"\x80\x02\x82\x01.", r"uses the opcode b'\\x82'"),
    "ext2": (b"\x80\x02\x83\x01\x00.", r"uses the opcode b'\\x83'"),
    "ext4": (b"\x80\x02\x84\x01\0\0\0.", r"uses the opcode b'\\x84'"),
    "text persistent id": (b"Pstorage\n.", "uses the opcode b'P'"),
    "next buffer": (b"\x80\x05\x97.", r"uses the opcode b'\\x97'"),
    "build on a dict": (b"}}b.", "sets the state of a dict"),
    "build on a tensor": (TENSOR + b"}b.", "sets the state of a StoredTensor"),
    "build on a function": (b"ccollections\nOrderedDict\n}b.", "sets the state of collections.OrderedDict"),
    "calls a string": (b"X\x01\0\0\0x)R.", "calls a str"),
    "calls a dtype": (b"ctorch\nfloat32\n)R.", "calls a TorchDType"),
    "calls with a list": (b"ccollections\nOrderedDict\n]R.", "calls collections.OrderedDict"),
    "wrong arguments": (b"ccollections\nOrderedDict\nK\x01\x85R.", "arguments of collections.OrderedDict"),
    "not pairs": (b"ccollections\nOrderedDict\n]K\x01a\x85R.", "not made of pairs"),
    "tensor of nothing": (
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "arguments of torch._utils._rebuild_tensor_v2",
    ),
    "tensor to negate": (
        TENSOR.replace(b"\x89}tR", b"\x89}}X\x01\0\0\0nK\x01stR") + b".",
        "arguments of torch",
    ),
    "parameter of a dict": (b"ctorch._utils\n_rebuild_parameter\n}\x88}\x87R.", "_rebuild_parameter are not"),
    "negative offset": (TENSOR.replace(b"QK\x00", b"QJ\xff\xff\xff\xff") + b".", "begins at element -1"),
    "negative shape": (
        TENSOR.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86") + b".",
        "a shape or a stride",
    ),
    "strides and shape": (
        TENSOR.replace(b"K\x02K\x03\x86", b"K\x06\x85") + b".",
        "arguments of torch._utils",
    ),
    "shape is a string": (b"ctorch\nSize\nX\x01\0\0\0x\x85R.", "a shape or a stride"),
    "persistent id is a string": (b"X\x01\0\0\0xQ.", "outside data that is not a tensor storage"),
    "persistent id of another kind": (
        STORAGE.replace(b"storage", b"storagX") + b"Q.",
        "not a tensor storage",
    ),
    "persistent id without a type": (b"(X\x07\0\0\0storageNX\0\0\0\0NK\x01tQ.", "not a tensor storage"),
    "negative storage": (STORAGE.replace(b"K\x06", b"J\xff\xff\xff\xff") + b"Q.", "has -1 elements"),
    "huge memo index": (b"Nr\xff\xff\xff\xff.", "memo index 4294967295 is absurd"),
    "unknown memo": (b"h\x05.", "takes entry 5 of its memo"),
    "huge string": (b"X\xff\xff\xff\x7fabc.", "goes on past its end"),
    "huger string": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "goes on past its end"),
    "huge bytes": (b"B\xff\xff\xff\xffabc.", "goes on past its end"),
    "huge frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", None),
    "truncated": (pickle.dumps({"a": [1, 2]}, 2)[:-3], "goes on past its end"),
    "empty": (b"", "goes on past its end"),
    "no newline": (b"c" + b"x" * 2000, "a name in it has no end"),
    "bad utf-8": (b"X\x01\0\0\0\xff.", "not UTF-8"),
    "stack underflow": (b".", "a value that is not there"),
    "underflow past a mark": (b"N(0.", "a value that is not there"),
    "mark underflow": (b"t.", "a mark that is not there"),
    "stack left over": (b"NN.", "left on its stack"),
    "mark left over": (b"N(.", "that is not there"),
    "append to a dict": (b"}Na.", "appends to something that is not a list"),
    "items in a list": (b"]NNs.", "stores items in something that is not a dict"),
    "odd items": (b"}(Nu.", "stores items"),
    "tuple key": (b"})Ns.", "a dict key that is a tuple"),
    "names that are numbers": (b"\x80\x04K\x01K\x02\x93.", "a global by something that is not a string"),
}


@pytest.mark.parametrize("name", EVIL)
def test_hostile_pickles_do_nothing(name, tmp_path, monkeypatch):
    data, message = EVIL[name]
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    tracemalloc.start()
    try:
        if message is None:
            run(data)
        else:
            with pytest.raises(CheckpointError, match=message) as caught:
                run(data)
            assert "here.bin" in str(caught.value)
            assert "Nothing in the file was executed." in str(caught.value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert set(sys.modules) == modules
    assert not list(tmp_path.iterdir())


def test_deep_nesting_costs_no_recursion():
    value = run(b"]" * 200_000 + b"a" * 199_999 + b".")
    assert isinstance(value, list)
    value = run(b")" + b"\x85" * 200_000 + b".")
    assert isinstance(value, tuple)


def test_work_is_bounded(monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 steps"):
        run(b"N0" * 600 + b"N.")
    # A list of 100 pairs, copied again and again: few opcodes, much memory.
    pair = b"]" + b"(K\x01K\x02tq\x010" + b"h\x01a" * 100 + b"q\x000"
    with pytest.raises(CheckpointError, match="more than 1000 steps"):
        run(pair + b"ccollections\nOrderedDict\nh\x00\x85R0" * 20 + b"N.")


def check_mutation(position: int, replacement: bytes) -> None:
    data = pickle.dumps({"a": [1, (2, 3)], "b": OrderedDict(x=1)}, 2)[:-2] + b"X\x01\0\0\0w" + TENSOR + b"s."
    position %= len(data)
    changed = data[:position] + replacement + data[position + len(replacement) :]
    try:
        run(changed)
    except CheckpointError as error:
        assert "here.bin" in str(error)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_mutated_pickles(position, replacement):
    check_mutation(position, replacement)


@pytest.mark.long
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
@settings(max_examples=30_000, deadline=None)
def test_many_mutated_pickles(position, replacement):
    check_mutation(position, replacement)
