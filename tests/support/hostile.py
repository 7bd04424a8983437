# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - one case a line
"""A corpus of hostile model folders: each function writes one, into a copy of a good one.

`CASES` maps a name to how the folder is opened and what is expected: "refused" is an error of ours,
"harmless" may load as well, because what is odd in the file is not used. In both cases nothing outside the
folder may be touched, and time and memory are bounded; `tests/test_hostile_corpus.py` measures all that.
"""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.tokenizers import write_json_tokenizer

HUGE = 2**62
DEEP = 100_000


@dataclass(frozen=True)
class Case:
    """One hostile folder: how it is made and opened, and what must come of it."""

    make: Callable[[Path], None]
    action: str
    expected: str = "refused"


CASES: dict[str, Case] = {}


def case(name: str, action: str, expected: str = "refused"):
    """Enter a function that spoils a folder into the table."""

    def enter(make):
        assert name not in CASES, name
        CASES[name] = Case(make, action, expected)
        return make

    return enter


def write_base(folder: Path) -> Path:
    """Write the good folder: a tiny Llama as safetensors, a tokenizer, a chat template."""
    from support.checkpoints import tiny_llama

    tiny_llama().save_pretrained(folder)
    write_json_tokenizer(
        folder, chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    return folder


# Weights: pickles


def forbid(_: object) -> None:
    """What a hostile pickle would call: it can be seen from outside."""
    os.system("touch owned")


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def zip_of(pickled: bytes, **entries: bytes) -> bytes:
    """An archive as torch.save writes it, with any pickle."""
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/0", bytes(64))
    return stream.getvalue()


def binary(folder: Path, content: bytes) -> Path:
    """Put a pytorch_model.bin in place of the weights."""
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(content)
    return file


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10t"


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of a tensor that lies on storage 0, of 16 numbers, with any claims."""

    def sizes(values):
        return b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values) + b"t"

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"Q"
        + b"\x8a\x09" + offset.to_bytes(9, "little", signed=True) + sizes(shape) + sizes(strides) + b"\x89}tR"
    )  # fmt: skip


def state(**tensors: bytes) -> bytes:
    """The pickle of a dict of pickled values."""
    items = b"".join(b"X" + struct.pack("<I", len(k)) + k.encode() + v for k, v in tensors.items())
    return b"\x80\x02}(" + items + b"u."


_HEAD = b"\x80\x02"
PICKLES = {
    "os.system by reduce": pickle.dumps({"w": Call(os.system, "touch owned")}, 2),
    "os.system by stack global": pickle.dumps({"w": Call(os.system, "touch owned")}, 4),
    "os.system by inst": b"(X\x0b\0\0\0touch ownedios\nsystem\n.",
    "eval": b"\x80\x02cbuiltins\neval\nX\x1e\0\0\0__import__('os').system('true')\x85R.",
    "getattr chain": b"\x80\x02cbuiltins\ngetattr\ncos\nX\x06\0\0\0system\x86R.",
    "dotted global": b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.",
    "module by absolute path": b"\x80\x02c/tmp/evil\nrun\n.",
    "torch.load": b"\x80\x02ctorch\nload\nX\x08\0\0\0evil.bin\x85R.",
    "numpy memmap": b"\x80\x02cnumpy\nmemmap\nX\x0b\0\0\0/etc/passwd\x85R.",
    "io.open": b"\x80\x02cio\nopen\nX\x0b\0\0\0/etc/passwd\x85R.",
    "build with setstate": b"\x80\x02ccollections\nOrderedDict\n)RX\x0c\0\0\0__setstate__cos\nsystem\n\x86b.",
    "build into a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__Nsb.",
    "newobj": b"\x80\x02csubprocess\nPopen\nX\x04\0\0\0true\x85\x81.",
    "newobj with keywords": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "extension registry 1": b"\x80\x02\x82\x01.",
    "extension registry 2": b"\x80\x02\x83\x01\x01.",
    "extension registry 4": b"\x80\x02\x84\x01\0\0\0.",
    "extension registry negative": b"\x80\x02\x84\xff\xff\xff\xff.",
    "out-of-band buffer": b"\x80\x05\x97\x98.",
    "text persistent id": b"\x80\x02P/etc/passwd\n.",
    "persistent id out of the zip": state(w=tensor((4,), (1,)).replace(b"X\x01\0\0\x000", b"X\x0e\0\0\0../../x/data/0")),
    "persistent id absolute": state(w=tensor((4,), (1,)).replace(b"X\x01\0\0\x000", b"X\x0b\0\0\0/etc/passwd")),
    "memo bomb": _HEAD + b"]q\x00" + b"(" + b"h\x00h\x00h\x00h\x00" * 5000 + b"t0.",
    "lists that double": _HEAD + b"]" + b"2(" * 200_000,
    "doubling by the memo": _HEAD + b"]\x94" + b"".join(b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(60)) + b".",
    "nested lists": _HEAD + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "nested tuples": _HEAD + b")" + b"\x85" * DEEP + b".",
    "nested dicts": _HEAD + b"}" + b"K\x01}" * DEEP + b"s" * DEEP + b".",
    "nested tuple as key": _HEAD + b"})" + b"\x85" * DEEP + b"Ns.",
    "marks only": _HEAD + b"(" * 500_000,
    "lists only": _HEAD + b"]" * 1_000_000,
    "memo only": _HEAD + b"N" + b"\x94" * 1_000_000 + b".",
    "huge memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long1": b"\x80\x02\x8a\xff" + b"\xff" * 254 + b"\x7f.",
    "long4 of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "long as text": b"\x80\x02L" + b"9" * 200_000 + b"L\n.",
    "int as text": b"\x80\x02I" + b"9" * 200_000 + b"\n.",
    "binbytes of 4 GB": b"\x80\x03B\xff\xff\xff\xffxx.",
    "binbytes8 of 2**62": b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"xx.",
    "bytearray8 of 2**62": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"xx.",
    "unicode8 of 2**64-1": b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b"xx.",
    "unicode of 4 GB": b"\x80\x02X\xff\xff\xff\xffxx.",
    "frame of 2**63": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"}.",
    "unknown protocol": b"\x80\xff}.",
    "unending name": _HEAD + b"c" + b"a" * 500_000,
    "no stop": _HEAD + b"}",
    "empty": b"",
    "a set": b"\x80\x04\x8f(K\x01\x90.",
    "a list": b"\x80\x02].",
    "names with NUL": state(**{"w\0/etc": tensor((4,), (1,), offset=99)}),
    "stride 0 of 2**40": state(w=tensor((2**40,), (0,))),
    "stride 0 times 1000": state(**{f"w{i}": tensor((2**20,), (0,)) for i in range(1000)}),
    "shape past 2**64": state(w=tensor((2**33, 2**33), (0, 0))),
    "shape of many axes": state(w=tensor((2,) * 200, (0,) * 200)),
    "negative shape": state(w=tensor((-4,), (1,))),
    "negative stride": state(w=tensor((4,), (-1,), 3)),
    "negative offset": state(w=tensor((4,), (1,), -1)),
    "offset of 2**62": state(w=tensor((1,), (1,), HUGE)),
    "strides past 2**63": state(w=tensor((2, 2), (HUGE, HUGE))),
    "storage of 2**62": state(w=tensor((4,), (1,)).replace(b"cpuK\x10", b"cpu\x8a\x08" + struct.pack("<Q", HUGE))),
}  # fmt: skip
for _name, _data in PICKLES.items():
    _mild = _name in ("frame of 2**63", "unknown protocol")
    case(f"pickle, zip: {_name}", "weights", "harmless" if _mild else "refused")(
        lambda f, d=_data: binary(f, zip_of(d))
    )

_LEGACY = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
for _name in (
    "os.system by reduce", "os.system by stack global", "eval", "nested lists", "lists that double",
    "storage of 2**62", "stride 0 of 2**40", "extension registry 1",
):  # fmt: skip
    case(f"pickle, old format: {_name}", "weights")(
        lambda f, d=PICKLES[_name]: binary(
            f, _LEGACY + d + pickle.dumps(["0"], 2) + struct.pack("<q", 16) + bytes(64)
        )
    )
for _name, _count in {"negative": -1, "2**62": HUGE}.items():
    case(f"old format: storage count {_name}", "weights")(
        lambda f, n=_count: binary(
            f, _LEGACY + state(w=tensor((4,), (1,))) + pickle.dumps(["0"], 2) + struct.pack("<q", n)
        )
    )
case("old format: a million storages", "weights")(
    lambda f: binary(
        f, _LEGACY + state(w=tensor((4,), (1,))) + _HEAD + b"](" + b"X\0\0\0\0" * 200_000 + b"e."
    )
)
case("bare pickle of a call", "weights")(lambda f: binary(f, pickle.dumps(Call(os.system, "touch owned"), 2)))


# Weights: archives

GOOD_PICKLE = state(w=tensor((4,), (1,)))


def patch(folder: Path, signature: bytes, field: int, layout: str, value: int, entry: bytes = b"") -> None:
    """Overwrite a field of the last record with a signature, or of the entry's."""
    file = binary(folder, zip_of(GOOD_PICKLE))
    data = bytearray(file.read_bytes())
    start = data.rindex(entry) - 46 if entry else data.rindex(signature)
    assert data[start : start + 4] == signature
    struct.pack_into(layout, data, start + field, value)
    file.write_bytes(data)


for _name in ("../../evil", "/etc/evil", "archive/../../evil", "C:\\evil", "archive/data/..", "a\0b"):
    case(f"zip: entry {_name!r}", "weights")(lambda f, n=_name: binary(f, _with_entry(n)))


def _with_entry(name: str) -> bytes:
    placeholder = "x" * len(name)
    data = zip_of(GOOD_PICKLE, **{placeholder: b"x"})
    return data.replace(placeholder.encode(), name.encode())


@case("zip: two entries of a name", "weights")
def _(folder):
    data = zip_of(GOOD_PICKLE, **{"archive/datz.pkl": pickle.dumps(Call(os.system, "touch owned"), 2)})
    binary(folder, data.replace(b"datz", b"data"))


@case("zip: overlapping entries", "weights")
def _(folder):
    data = zip_of(GOOD_PICKLE, **{"archive/data/1": bytes(64)})
    file = binary(folder, data)
    data = bytearray(data)
    first = data.rindex(b"archive/data/0") - 46
    second = data.rindex(b"archive/data/1") - 46
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    file.write_bytes(data)


@case("zip: a thousand times compressed", "weights")
def _(folder):
    file = binary(folder, b"")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", GOOD_PICKLE)
        archive.writestr("archive/data/0", bytes(50_000_000))


@case("zip: a compressed pickle", "weights")
def _(folder):
    file = binary(folder, b"")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 50_000_000)


@case("zip: a hundred thousand entries", "weights")
def _(folder):
    file = binary(folder, b"")
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"x{i}", b"")


case("zip: encrypted", "weights")(lambda f: patch(f, b"PK\1\2", 8, "<H", 1, b"archive/data/0"))
case("zip: size of 4 GB", "weights")(lambda f: patch(f, b"PK\1\2", 24, "<I", 0xFFFFFFF0, b"archive/data/0"))
case("zip: zip64 without its field", "weights")(
    lambda f: patch(f, b"PK\1\2", 24, "<I", 0xFFFFFFFF, b"archive/data/0")
)
case("zip: unknown compression", "weights")(lambda f: patch(f, b"PK\1\2", 10, "<H", 99, b"archive/data/0"))
case("zip: offset past the end", "weights")(
    lambda f: patch(f, b"PK\1\2", 42, "<I", 0x7FFFFFFF, b"archive/data/0")
)
case("zip: entries of 65535", "weights", "harmless")(lambda f: patch(f, b"PK\5\6", 10, "<H", 65535))
case("zip: contents of 4 GB", "weights")(lambda f: patch(f, b"PK\5\6", 12, "<I", 0xFFFFFFF0))
case("zip: contents past the end", "weights")(lambda f: patch(f, b"PK\5\6", 16, "<I", 0x7FFFFFFF))


@case("zip: zip64 record that lies", "weights")
def _(folder):
    data = zip_of(GOOD_PICKLE)
    end = data.rindex(b"PK\5\6")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, HUGE, HUGE, HUGE, HUGE)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    tail = bytearray(data[end:])
    tail[8:20] = b"\xff" * 12
    binary(folder, data[:end] + record + locator + tail)


# Weights: safetensors


def header(folder: Path, text: bytes, data: bytes = b"", length: int | None = None) -> None:
    """Write a model.safetensors with any header."""
    count = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", count) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), key="w") -> bytes:
    """A header of one tensor."""
    return json.dumps({key: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def two(first, second) -> bytes:
    """A header of two tensors of bytes."""
    spans = {"a": first, "b": second}
    return json.dumps(
        {k: {"dtype": "U8", "shape": [v[1] - v[0]], "data_offsets": v} for k, v in spans.items()}
    ).encode()


HEADERS = {
    "deep lists": b'{"w":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep dicts": b'{"w":' * DEEP + b"1" + b"}" * DEEP,
    "unclosed deep": b'{"w":' + b"[" * 2_000_000,
    "many lists": b'{"w":[' + b"[]," * 1_000_000 + b"[]]}",
    "giant number": b'{"w":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,8]}}',
    "giant exponent": b'{"w":{"dtype":"F32","shape":[1e999999999],"data_offsets":[0,8]}}',
    "giant string": b'{"w":{"dtype":"' + b"F" * 5_000_000 + b'","shape":[2],"data_offsets":[0,8]}}',
    "giant key": b'{"' + b"w" * 5_000_000 + b'":{"dtype":"X","shape":[2],"data_offsets":[0,8]}}',
    "repeated key": b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1
    + b'"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    "repeated field": b'{"w":{"dtype":"U8","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    "counts past 2**64": entry(shape=[2**32, 2**32, 4]),
    "counts that wrap to 8 bytes": entry(shape=[2**62, 4, 2]),
    "2**63": entry(shape=[2**63]),
    "many axes": entry(shape=[1] * 100_000),
    "negative size": entry(shape=[-2]),
    "size of a float": entry(shape=[2.0]),
    "size of true": entry(shape=[True]),
    "size NaN": b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "negative offset": entry(offsets=[-8, 0]),
    "offsets reversed": entry(offsets=[8, 0]),
    "offsets past the end": entry(shape=[2**40], offsets=[0, 2**42]),
    "offset of 2**70": entry(shape=[1], offsets=[2**70, 2**70 + 4]),
    "overlap": two([0, 6], [4, 8]),
    "hole": two([0, 2], [4, 8]),
    "same bytes": two([0, 8], [0, 8]),
    "first bytes left out": entry("U8", [4], [4, 8]),
    "dtype lie": entry("F64"),
    "unknown dtype": entry("F33"),
    "dtype is a list": entry(["F32"]),
    "dtype names a class": entry("os.system"),
    "metadata that is deep": b'{"__metadata__":{"format":{"a":1}}}',
    "metadata that is a number": b'{"__metadata__":5}',
    "a list": b"[]",
    "not UTF-8": b'{"\xff":1}',
    "a lone surrogate": b'{"\\ud800":1}',
    "nothing": b"{",
    "infinity": b'{"w":Infinity}',
}  # fmt: skip
for _name, _text in HEADERS.items():
    case(f"safetensors: {_name}", "weights")(lambda f, t=_text: header(f, t, bytes(8)))
for _name, _length in {"2**64-1": 2**64 - 1, "100 MB in a file of 100 bytes": 99_999_999, "0": 0}.items():
    case(f"safetensors: header of {_name}", "weights")(lambda f, n=_length: header(f, entry(), bytes(8), n))
case("safetensors: name with NUL", "model")(lambda f: header(f, entry(key="w\0../../etc"), bytes(8)))
case("safetensors: name with dots", "model")(lambda f: header(f, entry(key="../../../etc/passwd"), bytes(8)))
case("safetensors: name with newlines", "model")(lambda f: header(f, entry(key="a\n\x1b[2Jb"), bytes(8)))
case("safetensors: name of a dunder", "model")(
    lambda f: header(f, entry(key="__class__.__init__.__globals__"), bytes(8))
)


@case("safetensors: a hundred thousand names", "model")
def _(folder):
    entries = {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    header(folder, json.dumps(entries).encode())


# Weights: indexes and what they name


def index(folder: Path, content: object) -> None:
    """Put an index in place of the weights; the file moves to a.safetensors."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)


def outside(folder: Path) -> Path:
    """The folder beside the model's that must not be touched; it holds good weights."""
    return folder.parent / "outside"


NAMES = {
    "up": "../outside/secret.safetensors",
    "up and in": "x/../../outside/secret.safetensors",
    "dot": "./a.safetensors",
    "dots": "..",
    "empty": "",
    "folder": "sub/a.safetensors",
    "backslash": "..\\outside\\secret.safetensors",
    "drive": "C:secret.safetensors",
    "NUL": "a.safetensors\0.safetensors",
    "newline": "a\n.safetensors",
    "absent": "b.safetensors",
    "of 5000 letters": "a" * 5000 + ".safetensors",
    "url": "http://127.0.0.1:9/a.safetensors",
    "tilde": "~/a.safetensors",
    "device": "/dev/zero",
    "fullwidth dots": "\uff0e\uff0e/secret.safetensors",
}
for _name, _path in NAMES.items():
    case(f"index: {_name}", "model")(lambda f, p=_path: index(f, {"weight_map": {"w": p}}))
case("index: absolute", "model")(
    lambda f: index(f, {"weight_map": {"w": str(outside(f) / "secret.safetensors")}})
)
INDEXES = {
    "deep": b'{"weight_map":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep dicts": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a list": b"[]",
    "null": b"null",
    "empty map": b'{"weight_map":{}}',
    "map of numbers": b'{"weight_map":{"w":5}}',
    "map is a list": b'{"weight_map":["a.safetensors"]}',
    "repeated": b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}',
    "metadata number": b'{"weight_map":{"w":"a.safetensors"},"metadata":5}',
    "giant number": b'{"metadata":{"total_size":' + b"9" * 100_000 + b'},"weight_map":{"w":"a.safetensors"}}',
    "NaN": b'{"metadata":{"total_size":NaN},"weight_map":{"w":"a.safetensors"}}',
    "many lists": b'{"weight_map":[' + b"[]," * 1_000_000 + b"[]]}",
    "not UTF-8": b'{"weight_map":{"\xff":"a.safetensors"}}',
    "ten thousand files": json.dumps(
        {"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(10_000)}}
    ).encode(),
    "a suffix of each kind": b'{"weight_map":{"w":"a.safetensors","x":"b.bin"}}',
    "names config.json": b'{"weight_map":{"w":"config.json"}}',
    "names itself": b'{"weight_map":{"w":"model.safetensors.index.json"}}',
}
for _name, _text in INDEXES.items():
    case(f"index: {_name}", "model")(lambda f, t=_text: index(f, t))


def link(folder: Path, name: str, target: str | Path) -> None:
    """Put a link in place of a file."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def linked_shard(folder: Path, target: str | Path) -> None:
    """An index whose only file is a link."""
    index(folder, {"weight_map": {"w": "b.safetensors"}})
    link(folder, "b.safetensors", target)


case("link: a shard leads out", "model")(lambda f: linked_shard(f, outside(f) / "secret.safetensors"))
case("link: a shard leads out by ..", "model")(lambda f: linked_shard(f, "../outside/secret.safetensors"))
case("link: a shard leads to itself", "model")(lambda f: linked_shard(f, "b.safetensors"))
case("link: a shard leads to a device", "model")(lambda f: linked_shard(f, "/dev/zero"))
case("link: the weights lead to a device", "model")(lambda f: link(f, "model.safetensors", "/dev/zero"))
case("link: the weights lead to a folder", "model")(lambda f: link(f, "model.safetensors", "."))
case("link: the weights lead to themselves", "model")(
    lambda f: link(f, "model.safetensors", "model.safetensors")
)
case("link: config.json leads to a device", "config")(lambda f: link(f, "config.json", "/dev/zero"))
case("link: tokenizer.json leads to a device", "tokenizer")(
    lambda f: link(f, "tokenizer.json", "/dev/urandom")
)
for _file, _action in {
    "model.safetensors": "model",
    "config.json": "config",
    "generation_config.json": "generation",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "chat_template.jinja": "tokenizer",
}.items():
    case(f"link: {_file} leads out", _action)(
        lambda f, n=_file: link(
            f, n, outside(f) / ("secret.safetensors" if n.endswith("s") else "secret.json")
        )
    )


def fifo(folder: Path, name: str) -> None:
    """Put a pipe, which nobody writes to, in place of a file."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)


def as_folder(folder: Path, name: str) -> None:
    """Put a folder in place of a file."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()


for _file, _action, _expected in [
    ("model.safetensors", "model", "refused"),
    ("config.json", "config", "refused"),
    ("generation_config.json", "model", "harmless"),
    ("tokenizer.json", "tokenizer", "refused"),
    ("tokenizer_config.json", "tokenizer", "harmless"),
    ("chat_template.jinja", "tokenizer", "harmless"),
]:
    case(f"pipe: {_file}", _action, _expected)(lambda f, n=_file: fifo(f, n))
    case(f"folder: {_file}", _action, _expected)(lambda f, n=_file: as_folder(f, n))


# Weights: GGUF


def string(text: str | bytes) -> bytes:
    """A string as GGUF spells it."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(metadata: list[bytes], tensors: list[bytes], *, counts=None, version=3, data=b"") -> bytes:
    """A GGUF file of raw parts."""
    found = counts or (len(tensors), len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", version, *found) + b"".join(metadata) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def gguf(folder: Path, content: bytes) -> None:
    """Put a GGUF file in place of the weights."""
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(content)


def pair(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return string(key) + struct.pack("<I", kind) + value


def row(name="w", shape=(32,), kind=0, offset=0, axes=None) -> bytes:
    """A tensor's entry."""
    count = len(shape) if axes is None else axes
    return (
        string(name)
        + struct.pack("<I", count)
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    """An array's value."""
    return struct.pack("<IQ", kind, count) + content


_LLAMA = pair("general.architecture", 8, string("llama"))
GGUFS = {
    "tensor count 2**62": gguf_bytes([], [], counts=(HUGE, 0)),
    "metadata count 2**64-1": gguf_bytes([], [], counts=(0, 2**64 - 1)),
    "array of 2**62": gguf_bytes([pair("a", 9, array(4, HUGE))], []),
    "array of strings 2**62": gguf_bytes([pair("a", 9, array(8, HUGE))], []),
    "array of arrays 2**62": gguf_bytes([pair("a", 9, array(9, HUGE))], []),
    "bytes count that wraps": gguf_bytes([pair("a", 9, array(10, 2**61))], []),
    "nested arrays": gguf_bytes([pair("a", 9, array(9, 1) * 10_000)], []),
    "wide nested arrays": gguf_bytes([pair("a", 9, array(9, 1000, array(9, 1000, array(9, 0) * 1000)))], []),
    "array of type 99": gguf_bytes([pair("a", 9, array(99, 1))], []),
    "string of 2**62": gguf_bytes([string("a") + struct.pack("<IQ", 8, HUGE)], []),
    "string of 2**64-1 in an array": gguf_bytes([pair("a", 9, array(8, 1, struct.pack("<Q", 2**64 - 1)))], []),
    "key of 2**62": gguf_bytes([struct.pack("<Q", HUGE)], [], counts=(0, 1)),
    "not UTF-8": gguf_bytes([pair("a", 8, string(b"\xff\xfe"))], []),
    "alignment 0": gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 0))], [row()], data=bytes(128)),
    "alignment 3": gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 3))], [row()], data=bytes(128)),
    "alignment 2**31": gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 2**31))], [row()], data=bytes(128)),
    "alignment of text": gguf_bytes([pair("general.alignment", 8, string("32"))], [row()], data=bytes(128)),
    "alignment -32": gguf_bytes([pair("general.alignment", 5, struct.pack("<i", -32))], [row()], data=bytes(128)),
    "shape past 2**64": gguf_bytes([], [row(shape=(2**40, 2**40))], data=bytes(128)),
    "shape that wraps": gguf_bytes([], [row(shape=(2**63, 2))], data=bytes(128)),
    "axes 2**32-1": gguf_bytes([], [row(axes=2**32 - 1)], data=bytes(128)),
    "size 0": gguf_bytes([], [row(shape=(0,))], data=bytes(128)),
    "offset of 2**62": gguf_bytes([], [row(offset=HUGE)], data=bytes(128)),
    "offset that wraps": gguf_bytes([], [row(offset=2**64 - 32)], data=bytes(128)),
    "overlap": gguf_bytes([], [row("a"), row("b", offset=32)], data=bytes(256)),
    "twice": gguf_bytes([], [row("a"), row("a", offset=128)], data=bytes(256)),
    "type 99": gguf_bytes([], [row(kind=99)], data=bytes(128)),
    "half blocks": gguf_bytes([], [row(shape=(33,), kind=8)], data=bytes(128)),
    "a file that is split in 2**31": gguf_bytes([pair("split.count", 4, struct.pack("<I", 2**31))], []),
    "a split count of text": gguf_bytes([pair("split.count", 8, string("../x"))], []),
    "big-endian": gguf_bytes([], [], version=3 << 24),
    "version 99": gguf_bytes([], [], version=99),
    "no architecture": gguf_bytes([], [row()], data=bytes(128)),
    "architecture with dots": gguf_bytes([pair("general.architecture", 8, string("../../x"))], [row()], data=bytes(128)),
    "architecture of a number": gguf_bytes([pair("general.architecture", 4, bytes(4))], [row()], data=bytes(128)),
    "llama without sizes": gguf_bytes([_LLAMA], [row()], data=bytes(128)),
    "llama of 2**32-1 layers": gguf_bytes([_LLAMA, *(
        pair(f"llama.{key}", 4, struct.pack("<I", value)) for key, value in {
            "block_count": 2**32 - 1, "embedding_length": 16, "feed_forward_length": 24, "context_length": 64,
            "attention.head_count": 4, "attention.head_count_kv": 2}.items()
    ), pair("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))], [row("token_embd.weight", (16, 2))], data=bytes(128)),
}  # fmt: skip
for _name, _data in GGUFS.items():
    case(f"gguf: {_name}", "model")(lambda f, d=_data: gguf(f, d))


# Configs


def config(folder: Path, *, raw: bytes | None = None, **values: object) -> None:
    """Change keys of config.json, or its whole text."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | values
    file.write_bytes(raw if raw is not None else json.dumps(content).encode())


NUMBERS = {
    "2**62": HUGE,
    "2**70": 2**70,
    "-1": -1,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "1e308": 1e308,
}
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size",
)  # fmt: skip
for _key in SIZES:
    for _name, _value in NUMBERS.items():
        case(f"config: {_key} {_name}", "model")(lambda f, k=_key, v=_value: config(f, **{k: v}))
for _key in ("max_position_embeddings", "rms_norm_eps", "rope_theta", "num_labels"):
    for _name, _value in NUMBERS.items():
        case(f"config: {_key} {_name}", "model", "harmless")(lambda f, k=_key, v=_value: config(f, **{k: v}))
for _layers in (10_000, 1_000_000, 2**31):
    case(f"config: {_layers} layers", "model")(lambda f, n=_layers: config(f, num_hidden_layers=n))
for _key in ("hidden_size", "head_dim", "vocab_size", "intermediate_size"):
    case(f"config: {_key} 2**31", "model")(lambda f, k=_key: config(f, **{k: 2**31}))
CONFIGS = {
    "deep lists": b'{"model_type":"llama","x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep dicts": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "giant number": b'{"model_type":"llama","hidden_size":' + b"9" * 100_000 + b"}",
    "a list": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"model_type":"\xff"}',
    "NUL": b'{"model_type":"llama\\u0000"}',
    "UTF-16": '{"model_type":"llama"}'.encode("utf-16"),
    "model_type is a list": b'{"model_type":["llama"]}',
    "model_type is a dict": b'{"model_type":{"a":1}}',
    "model_type names a module": b'{"model_type":"os"}',
    "model_type leaves": b'{"model_type":"../../evil"}',
    "model_type is long": b'{"model_type":"' + b"x" * 5_000_000 + b'"}',
}
for _name, _text in CONFIGS.items():
    case(f"config: {_name}", "model")(lambda f, t=_text: config(f, raw=t))
ODD = {
    "auto_map": {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil--evil.Model"}},
    "architectures of paths": {"architectures": ["os.system", "../../evil", "__import__"]},
    "architectures is deep": {"architectures": [[["x"]]]},
    "names of classes": {"_class_name": "os.system", "__class__": "x", "transformers_version": {"a": 1}},
    "dunder keys": {"__init__": 1, "__dict__": {"a": 1}, "__module__": "os", "__reduce__": ["os.system"]},
    "methods as keys": {"to_dict": 1, "save_pretrained": "x", "from_pretrained": None, "check": 5, "_finish": 1},
    "act of a name": {"hidden_act": "__import__('os').system"},
    "act of an attribute": {"hidden_act": "nn.Module"},
    "dtype of a name": {"torch_dtype": "os.system"},
    "dtype of a function": {"dtype": "load"},
    "attention of a path": {"_attn_implementation": "kernels-community/evil", "attn_implementation": "evil/x"},
    "rope type of a name": {"rope_scaling": {"rope_type": "__class__", "factor": 2.0}},
    "rope factor": {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
    "rope factor 0": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "rope of a list": {"rope_scaling": [1, 2]},
    "rope long lists": {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 300_000, "long_factor": [1.0]}},
    "rope yarn of 2**62": {"rope_scaling": {"rope_type": "yarn", "factor": HUGE, "original_max_position_embeddings": HUGE}},
    "quantization of a name": {"quantization_config": {"quant_method": "os.system"}},
    "quantization of a list": {"quantization_config": [1]},
    "gptq of odd bits": {"quantization_config": {"quant_method": "gptq", "bits": HUGE, "group_size": -5}},
    "awq of text": {"quantization_config": {"quant_method": "awq", "bits": "x"}},
    "regex in skipped modules": {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:(a+)+$"],
        "config_groups": {"g": {"targets": ["re:" + "(.*)*" * 20 + "x"], "weights": {"num_bits": 4, "type": "int"}}}}},
    "pruned heads": {"pruned_heads": {"0": [HUGE], "-1": [0], str(HUGE): [1]}},
    "pruned heads of text": {"pruned_heads": {"x": "y"}},
    "pruned heads are many": {"pruned_heads": {str(i): [0] for i in range(50_000)}},
    "labels are many": {"id2label": {str(i): "x" for i in range(200_000)}},
    "labels of lists": {"id2label": {"0": [1]}},
    "labels of huge keys": {"id2label": {str(2**70): "x"}},
    "ids are lists": {"eos_token_id": [[1]], "pad_token_id": {}},
    "ids are huge": {"pad_token_id": HUGE, "bos_token_id": -HUGE},
    "layer types": {"layer_types": ["os.system"] * 2},
    "layer types are many": {"layer_types": ["full_attention"] * 1_000_000},
    "name or path leaves": {"_name_or_path": "../../../../etc/passwd", "name_or_path": "/etc/passwd"},
    "base model elsewhere": {"base_model_name_or_path": "/etc", "_commit_hash": "../../x"},
    "a nested config": {"text_config": {"model_type": "os"}, "decoder": {"model_type": "llama"}},
    "generation keys": {"max_length": HUGE, "num_beams": -5, "do_sample": "yes", "bad_words_ids": [[]]},
}  # fmt: skip
for _name, _values in ODD.items():
    case(f"config: {_name}", "model", "harmless")(lambda f, v=_values: config(f, **v))


@case("config: a list of a hundred thousand lists", "config", "harmless")
def _(folder):
    config(folder, raw=b'{"model_type":"llama","x":[' + b"[]," * 100_000 + b"[]]}")


@case("config: larger than any config", "config")
def _(folder):
    with open(folder / "config.json", "wb") as file:
        file.truncate(2**40)


@case("adapter that points elsewhere", "model", "harmless")
def _(folder):
    target = str(outside(folder))
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": target, "peft_type": "os"})
    )


@case("adapter alone that points elsewhere", "model")
def _(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    target = str(outside(folder))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": target}))


@case("code beside the model", "model", "harmless")
def _(folder):
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "__init__.py",
        "sitecustomize.py",
        "conftest.py",
    ):
        (folder / name).write_text("import os\nos.system('touch owned')\n")
    config(
        folder,
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"},
    )


@case("code as the only architecture", "model")
def _(folder):
    (folder / "modeling_evil.py").write_text("import os\nos.system('touch owned')\n")
    config(
        folder,
        model_type="evil",
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"},
    )


# Generation configs


def generation(folder: Path, raw: bytes) -> None:
    """Write generation_config.json."""
    (folder / "generation_config.json").write_bytes(raw)


GENERATIONS = {
    "deep": (b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "refused"),
    "a list": (b"[1]", "refused"),
    "not JSON": (b"{", "refused"),
    "giant number": (b'{"max_length":' + b"9" * 100_000 + b"}", "refused"),
    "huge": (json.dumps({"max_length": HUGE, "num_beams": HUGE, "max_new_tokens": HUGE}).encode(), "harmless"),
    "NaN": (b'{"temperature":NaN,"top_p":Infinity,"top_k":-Infinity}', "harmless"),
    "wrong types": (json.dumps({k: {"a": [1]} for k in ("max_length", "do_sample", "eos_token_id", "temperature", "bad_words_ids", "suppress_tokens")}).encode(), "harmless"),
    "dunders": (b'{"__class__":"x","_values":{"a":1},"validate":1,"to_dict":5,"_extra":[]}', "harmless"),
    "code": (b'{"custom_generate":"../../evil","trust_remote_code":true,"cache_implementation":"os.system"}', "harmless"),
    "watermarking": (b'{"watermarking_config":{"a":1},"compile_config":{"backend":"evil"},"cache_config":[1]}', "harmless"),
}  # fmt: skip
for _name, (_text, _expected) in GENERATIONS.items():
    case(f"generation config: {_name}", "generation", _expected)(lambda f, t=_text: generation(f, t))
    case(f"generation config of a model: {_name}", "model", "harmless")(lambda f, t=_text: generation(f, t))


# Tokenizers


def vocabulary(folder: Path, *path: str, value: object = None, raw: bytes | None = None) -> None:
    """Change one part of tokenizer.json, or its whole text."""
    file = folder / "tokenizer.json"
    if raw is None:
        content = part = json.loads(file.read_text())
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        raw = json.dumps(content).encode()
    file.write_bytes(raw)


def settings(folder: Path, raw: bytes | None = None, **values: object) -> None:
    """Change tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) | values
    file.write_bytes(json.dumps(content).encode() if raw is None else raw)


TOKENIZERS = {
    "deep": b"[" * DEEP,
    "deep and closed": b'{"model":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep dicts": b'{"normalizer":' * DEEP + b"1" + b"}" * DEEP,
    "nothing": b"",
    "a list": b"[]",
    "empty": b"{}",
    "not UTF-8": b'{"\xff":1}',
    "giant number": b'{"version":' + b"9" * 100_000 + b"}",
    "many lists": b'{"x":[' + b"[]," * 1_000_000 + b"[]]}",
    "model of a type": b'{"version":"1.0","model":{"type":"os.system"}}',
}
for _name, _text in TOKENIZERS.items():
    case(f"tokenizer.json: {_name}", "tokenizer")(lambda f, t=_text: vocabulary(f, raw=t))


def _chain(depth: int, kind: str) -> dict:
    part: dict = {"type": "Lowercase"} if kind == "normalizers" else {"type": "Whitespace"}
    for _ in range(depth):
        part = {"type": "Sequence", kind: [part]}
    return part


def _token(index: int, content: str, **flags: object) -> dict:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **plain, **flags}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PARTS = {
    "nested normalizers": (("normalizer",), _chain(60, "normalizers"), "harmless"),
    "nested pre-tokenizers": (("pre_tokenizer",), _chain(60, "pretokenizers"), "harmless"),
    "a vocabulary of negative ids": (("model", "vocab"), {"a": -1, "<unk>": 0}, "refused"),
    "a vocabulary of huge ids": (("model", "vocab"), {"a": 2**32 - 1, "<unk>": 0, "<s>": 2**31, "</s>": 7}, "harmless"),
    "a vocabulary of ids past 2**64": (("model", "vocab"), {"a": 2**70}, "refused"),
    "a vocabulary of one id": (("model", "vocab"), {"a": 0, "b": 0, "<unk>": 0, "<s>": 0, "</s>": 0}, "harmless"),
    "a vocabulary that is a list": (("model", "vocab"), [1, 2], "refused"),
    "an empty vocabulary": (("model", "vocab"), {}, "harmless"),
    "an unknown token that is not there": (("model", "unk_token"), "nope", "harmless"),
    "a padding of 2**62": (("padding",), {"strategy": {"Fixed": HUGE}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}, "harmless"),
    "a padding to multiples of 0": (("padding",), {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}, "harmless"),
    "a truncation with a stride": (("truncation",), {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2**40}, "harmless"),
    "a truncation of 0": (("truncation",), {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}, "harmless"),
    "added tokens of huge ids": (("added_tokens",), [_token(2**32 - 1, "zz"), _token(2**31, "yy")], "harmless"),
    "an empty added token": (("added_tokens",), [_token(0, "")], "harmless"),
    "an added token of a megabyte": (("added_tokens",), [_token(0, "x" * 1_000_000)], "harmless"),
    "an added token twice": (("added_tokens",), [_token(0, "a"), _token(1, "a")], "harmless"),
    "a broken regex": (("pre_tokenizer",), _split("(((("), "refused"),
    "a regex of look-behinds": (("pre_tokenizer",), _split("(?<=a{1,9999}){9999}b"), "harmless"),
    "a regex of counts": (("pre_tokenizer",), _split("((a{1,1000}){1,1000}){1,1000}"), "harmless"),
    "a regex of nested repeats": (("pre_tokenizer",), _split("^(([a-z ])+.)+[A-Z]([a-z])+$"), "harmless"),
    "a regex that backtracks": (("pre_tokenizer",), _split("(?:[a-z ]+)+#"), "harmless"),
    "a regex that refers back": (("pre_tokenizer",), _split("(.*)\\1(.*)\\2(.*)\\3#"), "harmless"),
    "a regex of groups": (("pre_tokenizer",), _split("(" * 3000 + "a" + ")" * 3000), "harmless"),
    "a regex that calls itself": (("pre_tokenizer",), _split("(?<x>a|b\\g<x>c)*"), "harmless"),
    "an empty regex": (("pre_tokenizer",), _split(""), "harmless"),
    "a replacement that grows": (("normalizer",), {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "xx"}] * 24}, "harmless"),
    "a prefix that grows": (("normalizer",), {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "x" * 100_000}] * 50}, "harmless"),
    "an empty replacement": (("normalizer",), {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}, "harmless"),
    "a charsmap of rubbish": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAA=="}, "harmless"),
    "a charsmap that lies": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAAAAAAA"}, "harmless"),
    "a charsmap of random bytes": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "CAAAAP////8BAgMEYWJjZGVmZ2g="}, "harmless"),
    "a template of unknown tokens": (("post_processor",), {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}], "pair": [], "special_tokens": {}}, "harmless"),
    "a template that repeats": (("post_processor",), {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 20000, "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}}, "harmless"),
    "a decoder of rubbish": (("decoder",), {"type": "os.system"}, "refused"),
    "a decoder that strips": (("decoder",), {"type": "Strip", "content": "h", "start": 2**40, "stop": 2**40}, "harmless"),
    "a BPE of merges of nothing": (("model",), {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "refused"),
    "a BPE of a dropout": (("model",), {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 7.0}, "harmless"),
    "a Unigram of NaN": (("model",), {"type": "Unigram", "vocab": [["a", 1e400]], "unk_id": 0}, "refused"),
    "a Unigram without its unknown": (("model",), {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 99}, "harmless"),
    "a Unigram of nothing": (("model",), {"type": "Unigram", "vocab": [], "unk_id": None}, "harmless"),
    "a WordPiece without its unknown": (("model",), {"type": "WordPiece", "vocab": {}, "unk_token": "x", "continuing_subword_prefix": "", "max_input_chars_per_word": 2**40}, "harmless"),
}  # fmt: skip
for _name, (_path, _value, _expected) in PARTS.items():
    case(f"tokenizer.json: {_name}", "tokenizer", _expected)(
        lambda f, p=_path, v=_value: vocabulary(f, *p, value=v)
    )


@case("tokenizer.json: a vocabulary of 200,000 long words", "tokenizer", "harmless")
def _(folder):
    vocab = {f"{i}" + "x" * 20: i for i in range(100_000)} | {
        "<unk>": 100_000,
        "<s>": 100_001,
        "</s>": 100_002,
    }
    vocabulary(folder, "model", "vocab", value=vocab)


@case("tokenizer.json: larger than any", "tokenizer")
def _(folder):
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(2**40)


SETTINGS = {
    "deep": (b"[" * DEEP, "refused"),
    "deep and closed": (b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "refused"),
    "a list": (b"[]", "refused"),
    "giant number": (b'{"model_max_length":' + b"9" * 100_000 + b"}", "refused"),
    "length of text": (b'{"model_max_length":"x"}', "refused"),
    "length NaN": (b'{"model_max_length":NaN}', "refused"),
    "length -1": (b'{"model_max_length":-1}', "harmless"),
    "length infinity": (b'{"model_max_length":Infinity}', "harmless"),
    "length of a list": (b'{"model_max_length":[1]}', "refused"),
    "input names of a number": (b'{"model_input_names":5}', "refused"),
    "input names of lists": (b'{"model_input_names":[[1]]}', "refused"),
    "class of a list": (b'{"tokenizer_class":["os.system"]}', "harmless"),
    "class of a path": (b'{"tokenizer_class":"../../evil","auto_map":{"AutoTokenizer":["evil.T",null]}}', "harmless"),
    "template of a number": (b'{"chat_template":5}', "refused"),
    "template list of numbers": (b'{"chat_template":[5]}', "refused"),
    "template list without names": (b'{"chat_template":[{"a":1}]}', "refused"),
    "template of dicts": (b'{"chat_template":{"default":{"a":1}}}', "refused"),
    "side": (b'{"padding_side":"up"}', "refused"),
    "token of a number": (b'{"bos_token":5,"pad_token":[1,2],"unk_token":{"content":{"a":1}}}', "harmless"),
    "extra of a number": (b'{"additional_special_tokens":5}', "refused"),
    "extra of deep lists": (b'{"additional_special_tokens":[[["x"]]]}', "harmless"),
    "extra of many": (json.dumps({"additional_special_tokens": [f"<{i}>" for i in range(20_000)]}).encode(), "harmless"),
    "added tokens of text": (b'{"added_tokens_decoder":{"x":"y"}}', "refused"),
    "added tokens of a list": (b'{"added_tokens_decoder":[1]}', "refused"),
    "added tokens of huge ids": (json.dumps({"added_tokens_decoder": {str(HUGE): {"content": "zz"}}}).encode(), "harmless"),
    "added tokens of giant ids": (json.dumps({"added_tokens_decoder": {"9" * 5000: {"content": "zz"}}}).encode(), "refused"),
    "ByT5 of 2**62": (json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": HUGE}).encode(), "refused"),
    "ByT5 of 10**8": (b'{"tokenizer_class":"ByT5Tokenizer","extra_ids":100000000}', "refused"),
    "ByT5 of -5": (b'{"tokenizer_class":"ByT5Tokenizer","extra_ids":-5}', "refused"),
    "ByT5 of text": (b'{"tokenizer_class":"ByT5Tokenizer","extra_ids":"x"}', "refused"),
    "flags of text": (b'{"tokenizer_class":"LlamaTokenizer","bos_token":"<s>","add_bos_token":"x","add_eos_token":[1]}', "harmless"),
    "files elsewhere": (b'{"tokenizer_file":"/etc/passwd","vocab_file":"/etc/passwd","special_tokens_map_file":"/etc/passwd","name_or_path":"/etc"}', "harmless"),
}  # fmt: skip
for _name, (_text, _expected) in SETTINGS.items():
    case(f"tokenizer_config.json: {_name}", "tokenizer", _expected)(lambda f, t=_text: settings(f, raw=t))
for _file in ("special_tokens_map.json", "added_tokens.json"):
    for _name, _text in {
        "deep": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}",
        "a list": b"[1]",
        "not JSON": b"{",
        "odd values": b'{"a":"b","bos_token":[1],"pad_token":{"x":1},"zz":[[1]]}',
    }.items():
        expected = "harmless" if (_name, _file[0]) == ("odd values", "s") else "refused"
        case(f"{_file}: {_name}", "tokenizer", expected)(lambda f, n=_file, t=_text: (f / n).write_bytes(t))


def old_vocabulary(folder: Path, **files: bytes) -> None:
    """Put other vocabulary files in place of tokenizer.json; dots written as __."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)


WORDS = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
OLD = {
    "vocab.txt of nothing": ({"vocab__txt": b""}, "refused"),
    "vocab.txt without specials": ({"vocab__txt": b"a\nb\n"}, "refused"),
    "vocab.txt of a line": ({"vocab__txt": WORDS + b"x" * 1_000_000}, "harmless"),
    "vocab.txt of bytes": ({"vocab__txt": b"\xff\xfe\x00"}, "refused"),
    "vocab.txt of many": ({"vocab__txt": WORDS + b"".join(b"%d\n" % i for i in range(200_000))}, "harmless"),
    "vocab.txt of one word": ({"vocab__txt": WORDS + b"a\n" * 500_000}, "harmless"),
    "vocab.txt of blanks": ({"vocab__txt": WORDS + b"\n" * 1_000_000}, "harmless"),
    "merges of three": ({"vocab__json": b'{"a":0,"b":1}', "merges__txt": b"a b c\n"}, "refused"),
    "merges of one": ({"vocab__json": b'{"a":0,"b":1}', "merges__txt": b"a\n"}, "refused"),
    "merges of others": ({"vocab__json": b'{"a":0}', "merges__txt": b"x y\n"}, "refused"),
    "vocab of text": ({"vocab__json": b'{"a":"b"}', "merges__txt": b""}, "refused"),
    "vocab of -1": ({"vocab__json": b'{"a":-1}', "merges__txt": b""}, "refused"),
    "vocab of 2**70": ({"vocab__json": b'{"a":%d}' % 2**70, "merges__txt": b""}, "refused"),
    "vocab of lists": ({"vocab__json": b'{"a":[1]}', "merges__txt": b""}, "refused"),
    "vocab of NaN": ({"vocab__json": b'{"a":NaN}', "merges__txt": b""}, "refused"),
    "vocab is a list": ({"vocab__json": b"[1]", "merges__txt": b""}, "refused"),
    "vocab is deep": (
        {"vocab__json": b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "merges__txt": b""},
        "refused",
    ),
    "vocab of one id": ({"vocab__json": b'{"a":0,"b":0,"c":0}', "merges__txt": b""}, "harmless"),
}
for _name, (_files, _expected) in OLD.items():
    case(f"vocabulary: {_name}", "tokenizer", _expected)(lambda f, c=_files: old_vocabulary(f, **c))


def gguf_vocabulary(folder: Path, *metadata: bytes) -> None:
    """Put a GGUF file with a vocabulary in place of everything."""
    gguf(folder, gguf_bytes([_LLAMA, *metadata], []))


def strings(*values: str) -> bytes:
    """An array of strings."""
    return array(8, len(values), b"".join(map(string, values)))


_TOKENS = pair("tokenizer.ggml.tokens", 9, strings("<unk>", "<s>", "</s>", "a", "b", "ab"))
_SCORES = pair("tokenizer.ggml.scores", 9, array(6, 6, struct.pack("<6f", *range(6))))
_GPT2 = pair("tokenizer.ggml.model", 8, string("gpt2"))
_SPM = pair("tokenizer.ggml.model", 8, string("llama"))
_T5 = pair("tokenizer.ggml.model", 8, string("t5"))
GGUF_VOCABULARIES = {
    "of a number": [pair("tokenizer.ggml.tokens", 4, bytes(4)), _GPT2],
    "of numbers": [pair("tokenizer.ggml.tokens", 9, array(4, 2, bytes(8))), _GPT2],
    "of arrays": [pair("tokenizer.ggml.tokens", 9, array(9, 1, array(4, 1, bytes(4)))), _GPT2],
    "of an unknown kind": [_TOKENS, pair("tokenizer.ggml.model", 8, string("os.system"))],
    "of a kind that is an array": [_TOKENS, pair("tokenizer.ggml.model", 9, strings("gpt2"))],
    "without merges": [_TOKENS, _GPT2],
    "merges of numbers": [_TOKENS, _GPT2, pair("tokenizer.ggml.merges", 9, array(4, 2, bytes(8)))],
    "merges of one word": [_TOKENS, _GPT2, pair("tokenizer.ggml.merges", 9, strings("ab"))],
    "merges of others": [_TOKENS, _GPT2, pair("tokenizer.ggml.merges", 9, strings("x y"))],
    "merges of a text": [_TOKENS, _GPT2, pair("tokenizer.ggml.merges", 8, string("a b"))],
    "an unknown splitting": [_TOKENS, _GPT2, pair("tokenizer.ggml.pre", 8, string("../x")), pair("tokenizer.ggml.merges", 9, strings("a b"))],
    "a splitting of a number": [_TOKENS, _GPT2, pair("tokenizer.ggml.pre", 4, b"\1\0\0\0"), pair("tokenizer.ggml.merges", 9, strings("a b"))],
    "without scores": [_TOKENS, _SPM],
    "scores of NaN": [_TOKENS, _T5, pair("tokenizer.ggml.scores", 9, array(6, 6, struct.pack("<6f", *[float("nan")] * 6)))],
    "scores too few": [_TOKENS, _SPM, pair("tokenizer.ggml.scores", 9, array(6, 2, bytes(8)))],
    "scores of text": [_TOKENS, _SPM, pair("tokenizer.ggml.scores", 9, strings(*"abcdef"))],
    "a score": [_TOKENS, _SPM, pair("tokenizer.ggml.scores", 6, bytes(4))],
    "types of text": [_TOKENS, _SPM, _SCORES, pair("tokenizer.ggml.token_type", 9, strings(*"abcdef"))],
    "types too few": [_TOKENS, _SPM, _SCORES, pair("tokenizer.ggml.token_type", 9, array(5, 1, bytes(4)))],
    "an id outside": [_TOKENS, _SPM, _SCORES, pair("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 77))],
    "an id of text": [_TOKENS, _SPM, _SCORES, pair("tokenizer.ggml.bos_token_id", 8, string("x"))],
    "a charsmap of text": [_TOKENS, _T5, _SCORES, pair("tokenizer.ggml.precompiled_charsmap", 8, string("xx"))],
    "an unknown id outside": [_TOKENS, _T5, _SCORES, pair("tokenizer.ggml.unknown_token_id", 4, struct.pack("<I", 77))],
}  # fmt: skip
for _name, _parts in GGUF_VOCABULARIES.items():
    case(f"gguf vocabulary: {_name}", "tokenizer")(lambda f, p=_parts: gguf_vocabulary(f, *p))
for _name, _parts in {
    "a charsmap of rubbish": [_TOKENS, _T5, _SCORES, pair("tokenizer.ggml.precompiled_charsmap", 9, array(0, 9, b"\xff" * 9))],
    "a charsmap that lies": [_TOKENS, _T5, _SCORES, pair("tokenizer.ggml.precompiled_charsmap", 9, array(0, 16, struct.pack("<I", 8) + b"\xff" * 12))],
    "a context of text": [_TOKENS, _SPM, _SCORES, pair("llama.context_length", 8, string("x"))],
    "a template of a number": [_TOKENS, _SPM, _SCORES, pair("tokenizer.chat_template", 4, bytes(4))],
    "a long token": [pair("tokenizer.ggml.tokens", 9, strings("<unk>", "a" * 20_000)), _SPM, pair("tokenizer.ggml.scores", 9, array(6, 2, bytes(8)))],
    "a flag of text": [_TOKENS, _SPM, _SCORES, pair("tokenizer.ggml.add_bos_token", 8, string("no"))],
}.items():  # fmt: skip
    case(f"gguf vocabulary: {_name}", "tokenizer", "harmless")(lambda f, p=_parts: gguf_vocabulary(f, *p))


# Chat templates

_GROW = "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{use}"


def _doubling(start: str, value: str, use: str = "") -> str:
    return _GROW.format(start=start, step="{% set ns.x = " + value + " %}", use=use)


TEMPLATES = {
    "class chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by subscript": "{{ ''['__class__']['__mro__'] }}{{ messages['__class__'].__base__ }}",
    "class by attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "globals of a global": "{{ raise_exception.__globals__['os'].system('touch owned') }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "environment of the template": "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception).x() }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}).x() }}",
    "format through a filter": "{{ ('{0.__class__}'.format | string).x() }}",
    "format by map": "{{ ['{0.__class__}'] | map('format', 1) | first | int / 0 }}",
    "format indirectly": "{% set f = '{0.__class__.__base__}'.format %}{{ f(messages).x() }}",
    "code of a function": "{{ raise_exception.__code__.co_consts / 0 }}{{ strftime_now.gi_frame.f_globals.x }}",
    "generator frame": "{{ (messages | map('string')).gi_frame.f_builtins.x }}",
    "changes the messages": "{{ messages.append(1) }}",
    "changes a message": "{{ messages[0].update(role='x') }}",
    "changes by setdefault": "{{ messages[0].__setitem__('role', 'x') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "extends": "{% extends '../secret.json' %}",
    "from import": "{% from '/etc/passwd' import x %}",
    "debug": "{% debug %}",
    "do": "{% do messages.append(1) %}",
    "not jinja": "{% for %}{{",
    "nested deep": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "additions": "{{ 1" + " + 1" * 50_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "long": "{{ messages }}" * 500_000,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "lists in loops": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "lengths in loops": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | join | length %}{% endfor %}",
    "sorting in loops": "{% for i in range(99999) %}{% set x = range(99999) | sort | first %}{% endfor %}",
    "searching in loops": "{% set s = 'a' * 16000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "comparing in loops": "{% set s = 'a' * 8000000 %}{% set t = 'a' * 8000000 %}{% for i in range(99999) %}{% if s + 'b' == t + 'c' %}{% endif %}{% endfor %}",
    "slicing in loops": "{% set s = 'a' * 8000000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "indent of tojson": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "lipsum": "{{ lipsum(n=10 ** 6, max=10 ** 6) }}",
    "round": "{{ 1.5 | round(10 ** 8, 'floor') }}",
    "wordwrap": "{{ ('a ' * 7000000) | wordwrap(1, wrapstring='x' * 1000) | length }}",
    "urlize": "{{ ('a.bc ' * 3000000) | urlize | length }}",
    "title": "{% for i in range(9999) %}{% set x = ('a-' * 8000000) | title %}{% endfor %}",
    "string times": "{{ 'a' * 10 ** 10 }}",
    "list times": "{{ [1] * 10 ** 10 }}",
    "list of long strings": "{{ ([('a' * 16000000)] * 100000) | tojson | length }}",
    "power": "{{ (10 ** (10 ** 10)) % 7 }}",
    "power of powers": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x % 7 }}",
    "string doubling ~": _doubling("'a'", "ns.x ~ ns.x"),
    "string doubling +": _doubling("'a'", "ns.x + ns.x"),
    "string doubling %": _doubling("'a'", "'%s%s' % (ns.x, ns.x)"),
    "string doubling format": _doubling("'a'", "'{}{}'.format(ns.x, ns.x)"),
    "string doubling join": _doubling("'a'", "[ns.x, ns.x] | join"),
    "string doubling replace": _doubling("'aa'", "ns.x | replace('a', ns.x)"),
    "string doubling list": _doubling("'a'", "[ns.x, ns.x] | string"),
    "string doubling tojson": _doubling("'\"'", "ns.x | tojson"),
    "string doubling escape": _doubling("'<'", "(ns.x ~ '<') | escape | string"),
    "string doubling upper": _doubling("'ß'", "(ns.x | upper) ~ ns.x"),
    "block doubling": _GROW.format(start="'a'", step="{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}", use=""),
    "block repeating": "{% set s = 'a' * 16000000 %}{% set t %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "block of text repeating": "{% set t %}{% for i in range(99999) %}" + "x" * 60_000 + "{% endfor %}{% endset %}{{ t | length }}",
    "filter block": "{% filter upper %}{% for i in range(99999) %}" + "x" * 60_000 + "{% endfor %}{% endfilter %}",
    "macro doubling": "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}" + _doubling("'a'", "f(ns.x)"),
    "call doubling": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40 + "a" + "{% endcall %}" * 40,
    "list doubling": _doubling("[1]", "ns.x + ns.x"),
    "nested list doubling": _doubling("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "nested tuple doubling": _doubling("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "nested dict doubling": _doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | tojson }}"),
    "nested dict() doubling": _doubling("{}", "dict(a=ns.x, b=ns.x)", "{{ ns.x | string | length }}"),
    "nested namespace doubling": _doubling("1", "namespace(a=ns.x, b=ns.x)", "{{ ns.x }}"),
    "nested comparing": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "namespace of itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{{ ns | tojson }}",
    "splits": "{% for i in range(99999) %}{% set x = ('a ' * 8000000).split() %}{% endfor %}",
    "translate": "{{ ('a' * 10000).translate({97: 'x' * 100000}) | length }}",
    "encode": "{{ ('a' * 9999999).encode('utf-32').hex().encode('utf-32') | length }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "padding in format": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "padding in percent": "{{ '%*d' % (10 ** 9, 1) }}",
    "precision": "{{ '%.999999999f' % 1.5 }}",
    "precision in format": "{{ '{:.999999999f}'.format(1.5) }}",
    "sum of lists": "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "strftime": "{{ strftime_now('%A' * 4000000) | length }}",
    "strftime of a list": "{{ strftime_now([1]) }}",
    "digits": "{{ ('9' * 5000000) | int }}{{ 10 ** 5000 }}",
    "join of many": "{{ (['x' * 99999] * 99999) | join('y' * 99999) }}",
    "map of replace": "{{ (['a' * 9999] * 9999) | map('replace', 'a', 'b' * 9999) | list | length }}",
    "groupby": "{% for i in range(9999) %}{% set x = messages * 9999 | int %}{{ (range(99999) | list) | groupby('real') | length }}{% endfor %}",
    "cycler": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
}  # fmt: skip
# What these do is harmless or refused, whichever it is; none may take long or much.
MILD_TEMPLATES = {
    "format string", "format map", "format through a filter", "format indirectly", "generator frame", "title",
    "class by subscript", "class by attr filter", "additions", "round", "wordwrap", "urlize", "lipsum", "batch",
    "slice", "upper", "digits", "strftime", "string doubling tojson", "string doubling list", "precision",
    "string doubling escape", "namespace of itself", "self", "sum of lists", "encode", "translate", "lists",
    "power of powers", "parentheses", "nested deep", "code of a function", "list of long strings",
}  # fmt: skip
for _name, _text in TEMPLATES.items():
    case(f"template: {_name}", "chat", "harmless" if _name in MILD_TEMPLATES else "refused")(
        lambda f, t=_text: (f / "chat_template.jinja").write_text(t, encoding="utf-8")
    )


@case("template: names that leave", "chat", "harmless")
def _(folder):
    (folder / "additional_chat_templates").mkdir()
    link(folder / "additional_chat_templates", "x.jinja", outside(folder) / "secret.json")


@case("template: a thousand", "chat", "harmless")
def _(folder):
    (folder / "additional_chat_templates").mkdir()
    for i in range(1000):
        (folder / "additional_chat_templates" / f"{i}.jinja").write_text("x")


@case("folder: a hundred thousand names", "model", "harmless")
def _(folder):
    for i in range(5000):
        (folder / f"x{i}").touch()


@case("folder: nested deep", "tokenizer", "harmless")
def _(folder):
    path = folder
    for _ in range(150):
        path = path / "d"
        path.mkdir()


def copy_base(base: Path, folder: Path) -> Path:
    """Copy the good folder, to be spoiled."""
    shutil.copytree(base, folder)
    return folder
