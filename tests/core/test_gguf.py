# SPDX-License-Identifier: Apache-2.0
"""The GGUF header reader against the gguf package, and against files that lie."""

import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from pretrained.core.ggml import BLOCK_TYPES
from pretrained.core.gguf import load_tensor, read_gguf
from pretrained.errors import CheckpointError, FileError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name="w", sizes=(4,), kind=0, offset=0) -> bytes:
    """A row of the tensor table; `sizes` as the file has them, fastest axis first."""
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def write(
    folder: Path,
    *,
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: int = 64,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    name: str = "model.gguf",
) -> Path:
    counts = counts or (len(tensors), len(entries))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    file = folder / name
    file.write_bytes(header + bytes(-len(header) % 32) + bytes(data))
    return file


def refused(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_gguf(file)
    text = str(caught.value)
    where = f" ({file})"
    assert where in text
    return text.replace(where, "")


# -- what a good file says ------------------------------------------------------------------------


def test_it_agrees_with_the_gguf_package(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.eps", 1e-5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "Grüße, 世界")
    writer.add_array("a.words", ["", "x", "Ġthe", "é" * 300])
    writer.add_array("a.ids", [3, -1, 5])
    writer.add_array("a.scores", [0.5, -1.25])
    writer.add_array("a.flags", [True, False])
    writer.add_array("a.nested", [[1, 2], [3]])
    arrays = {
        "w.f32": rng.standard_normal((3, 5)).astype(np.float32),
        "w.f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "w.i32": np.arange(6, dtype=np.int32),
    }
    for key, value in arrays.items():
        writer.add_tensor(key, value)
    quantized = gguf.quants.quantize(
        rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q5_1
    )
    writer.add_tensor("w.q", quantized, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    checkpoint = read_gguf(file)
    metadata = checkpoint.metadata
    assert checkpoint.format == "gguf" and checkpoint.files == (file,)
    assert metadata["general.architecture"] == "llama"
    assert metadata["a.count"] == 7 and type(metadata["a.count"]) is int
    assert metadata["a.eps"] == np.float32(1e-5) and type(metadata["a.eps"]) is float
    assert metadata["a.flag"] is True
    assert metadata["a.text"] == "Grüße, 世界"
    assert metadata["a.words"] == ["", "x", "Ġthe", "é" * 300]
    assert metadata["a.ids"].tolist() == [3, -1, 5] and metadata["a.ids"].dtype == np.int32
    assert metadata["a.scores"].tolist() == [0.5, -1.25]
    assert metadata["a.flags"].tolist() == [True, False] and metadata["a.flags"].dtype == np.bool_
    assert [part.tolist() for part in metadata["a.nested"]] == [[1, 2], [3]]

    assert {key: (info.dtype, info.shape) for key, info in checkpoint.tensors.items()} == {
        "w.f32": ("float32", (3, 5)),
        "w.f16": ("float16", (2, 3, 4)),
        "w.i32": ("int32", (6,)),
        "w.q": ("q5_1", (4, 64)),
    }
    for theirs in gguf.GGUFReader(file).tensors:
        ours = checkpoint.tensors[theirs.name]
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
    np.testing.assert_array_equal(load_tensor(checkpoint.tensors["w.f32"]), arrays["w.f32"])
    np.testing.assert_array_equal(
        load_tensor(checkpoint.tensors["w.q"]),
        gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q5_1),
    )


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (U8, b"\xff", 255),
        (I8, b"\xff", -1),
        (U16, b"\xff\xff", 65535),
        (I16, b"\xff\xff", -1),
        (U32, b"\xff" * 4, 2**32 - 1),
        (I32, b"\xff" * 4, -1),
        (F32, struct.pack("<f", 0.5), 0.5),
        (BOOL, b"\x00", False),
        (STRING, string("x"), "x"),
        (U64, b"\xff" * 8, 2**64 - 1),
        (I64, b"\xff" * 8, -1),
        (F64, struct.pack("<d", 0.1), 0.1),
    ],
)
def test_every_value_type_becomes_plain_python(tmp_path, kind, raw, value):
    found = read_gguf(write(tmp_path, entries=(entry("k", kind, raw),))).metadata["k"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_every_tensor_type_has_its_size(tmp_path, kind):
    row = tensor(sizes=(2 * kind.elements, 3), kind=kind.type_id)
    info = read_gguf(write(tmp_path, tensors=(row,), data=4096)).tensors["w"]
    assert (info.dtype, info.shape, info.nbytes) == (kind.name, (3, 2 * kind.elements), 6 * kind.nbytes)


def test_version_2_reads_the_same(tmp_path):
    file = write(tmp_path, entries=(entry("k", U8, b"\x01"),), tensors=(tensor(),), version=2)
    assert read_gguf(file).metadata == {"k": 1}


def test_the_files_own_alignment_places_the_data(tmp_path):
    entries = (entry("general.alignment", U32, struct.pack("<I", 256)),)
    file = write(tmp_path, entries=entries, tensors=(tensor(),), data=512)
    assert read_gguf(file).tensors["w"].offset == 256


def test_number_arrays_outlive_the_file(tmp_path):
    file = write(tmp_path, entries=(entry("k", ARRAY, array(U16, 3, b"\x01\x00\x02\x00\x03\x00")),))
    values = read_gguf(file).metadata["k"]
    file.unlink()
    assert values.tolist() == [1, 2, 3] and not values.flags.writeable


# -- a model in several files ---------------------------------------------------------------------


def parts(folder: Path, count: int = 2, total: int = 2) -> list[Path]:
    files = []
    for number in range(count):
        entries = (
            entry("split.no", U16, struct.pack("<H", number)),
            entry("split.count", U16, struct.pack("<H", count)),
            entry("split.tensors.count", I32, struct.pack("<i", total)),
        )
        name = f"m-{number + 1:05}-of-{count:05}.gguf"
        files.append(write(folder, entries=entries, tensors=(tensor(f"w{number}"),), name=name))
    return files


@pytest.mark.parametrize("given", [0, 1])
def test_parts_are_found_from_any_of_them(tmp_path, given):
    files = parts(tmp_path)
    checkpoint = read_gguf(files[given])
    assert checkpoint.files == tuple(files)
    assert {key: info.file for key, info in checkpoint.tensors.items()} == {"w0": files[0], "w1": files[1]}
    assert checkpoint.metadata["split.no"] == 0


def test_a_missing_part_is_named(tmp_path):
    files = parts(tmp_path)
    files[1].unlink()
    with pytest.raises(FileError, match=r"Part 2 of 2 .*m-00002-of-00002\.gguf.*Download all its parts"):
        read_gguf(files[0])


def test_a_renamed_part_is_refused(tmp_path):
    text = refused(parts(tmp_path)[0].rename(tmp_path / "model.gguf"))
    assert "one part of a model in several files" in text and "model-00001-of-00002.gguf" in text


def test_parts_under_each_others_names_are_refused(tmp_path):
    files = parts(tmp_path)
    shutil.copy(files[0], files[1])
    with pytest.raises(CheckpointError, match=r"another part than its name says.*'split.no' 1, found 0"):
        read_gguf(files[0])


def test_parts_that_hold_too_few_tensors_are_refused(tmp_path):
    assert "expected 3 tensors, found 2" in refused(parts(tmp_path, total=3)[0])


def test_a_merged_file_may_say_that_it_has_no_parts(tmp_path):
    file = write(tmp_path, entries=(entry("split.count", U16, b"\x00\x00"),), tensors=(tensor(),))
    assert list(read_gguf(file).tensors) == ["w"]


def test_a_split_count_that_is_no_number_is_refused(tmp_path):
    assert "'split.count' cannot be used" in refused(
        write(tmp_path, entries=(entry("split.count", STRING, string("2")),))
    )


# -- files that lie -------------------------------------------------------------------------------


def test_an_absent_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"does not exist.*Check the path"):
        read_gguf(tmp_path / "no.gguf")
    with pytest.raises(FileError, match="a folder"):
        read_gguf(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (bytes(64), "zeros"),
        (b"tjgg" + bytes(60), "formats before GGUF.*current llama.cpp"),
        (b"FUGG" + bytes(60), "unknown content"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, content, found):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"This is not a GGUF file.*b'GGUF', found .*{found}"):
        read_gguf(file)


def test_a_lone_magic_number_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    assert "ends inside its header: expected at least 24 bytes, found 6 bytes" in refused(file)


def test_big_endian_files_are_refused_by_name(tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("w", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = refused(file)
    assert "is big-endian" in text and "gguf_convert_endian.py" in text


@pytest.mark.parametrize(("version", "mend"), [(1, "Convert the model again"), (4, "Update this library")])
def test_other_versions_are_refused(tmp_path, version, mend):
    text = refused(write(tmp_path, version=version))
    assert f"expected version 2 or 3, found {version}" in text and mend in text


def test_every_truncation_is_refused(tmp_path):
    entries = (entry("words", ARRAY, array(STRING, 2, string("ab") + string("c"))), entry("n", U32, bytes(4)))
    whole = write(tmp_path, entries=entries, tensors=(tensor(sizes=(4, 4)),), data=64).read_bytes()
    file = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert "again" in refused(file), size


@pytest.mark.parametrize(
    ("counts", "what"), [((2**60, 0), "tensors"), ((0, 2**60), "metadata entries"), ((10, 0), "tensors")]
)
def test_counts_that_cannot_fit_are_refused(tmp_path, counts, what):
    assert f"promises {max(counts)} {what}, which cannot fit" in refused(write(tmp_path, counts=counts))


@pytest.mark.parametrize("kind", [U8, F64, STRING, ARRAY])
def test_arrays_that_cannot_fit_are_refused(tmp_path, kind):
    file = write(tmp_path, entries=(entry("k", ARRAY, array(kind, 2**61, b"")),))
    assert "elements of 'k', which cannot fit" in refused(file)


def test_a_string_past_the_end_is_refused(tmp_path):
    file = write(tmp_path, entries=(entry("k", STRING, struct.pack("<Q", 2**63)),))
    assert "ends inside the value of 'k'" in refused(file)


def test_a_string_of_an_array_past_the_end_is_refused(tmp_path):
    values = string("ok") + struct.pack("<Q", 2**63)
    assert "ends inside element 1 of 'k'" in refused(
        write(tmp_path, entries=(entry("k", ARRAY, array(STRING, 2, values)),))
    )


def test_a_long_key_is_refused(tmp_path):
    file = write(tmp_path, entries=(entry("k" * 70000, U8, b"\x00"),))
    assert "key of metadata entry 0 is out of range: expected at most 65535 bytes, found 70000" in refused(
        file
    )


def test_deep_nesting_is_refused(tmp_path):
    value = array(U8, 1, b"\x00")
    for _ in range(2000):
        value = array(ARRAY, 1, value)
    assert "'k' is nested too deep" in refused(write(tmp_path, entries=(entry("k", ARRAY, value),)))


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (entry("k", 13, b""), "'k' has an unknown value type: expected 0 to 12, found 13"),
        (
            entry("k", ARRAY, array(99, 1, b"\x00")),
            "'k' has an unknown value type: expected 0 to 12, found 99",
        ),
        (entry("k", BOOL, b"\x02"), "'k' is no boolean: expected 0 or 1, found 2"),
        (entry("k", ARRAY, array(BOOL, 2, b"\x01\x07")), "'k' holds values that are no booleans"),
        (entry(b"\xff", U8, b"\x00"), "Not UTF-8 text: the key of metadata entry 0"),
        (entry("k", STRING, string(b"\xff")), "Not UTF-8 text: the value of 'k'"),
        (entry("k", ARRAY, array(STRING, 2, string("a") + string(b"\xff"))), "Element 1 of 'k' is not UTF-8"),
        (
            entry("general.alignment", U32, struct.pack("<I", 24)),
            "expected a power of two up to 1048576, found 24",
        ),
        (entry("general.alignment", U32, bytes(4)), "'general.alignment' cannot be used"),
        (entry("general.alignment", STRING, string("32")), "'general.alignment' cannot be used"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, made, text):
    assert text in refused(write(tmp_path, entries=(made,)))


def test_a_repeated_key_is_refused(tmp_path):
    made = entry("k", U8, b"\x00")
    assert "The metadata key 'k' occurs twice" in refused(write(tmp_path, entries=(made, made)))


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([tensor(), tensor()], "The tensor 'w' occurs twice"),
        ([tensor(sizes=(1,) * 5)], "'w' has too many axes: expected at most 4, found 5"),
        ([tensor(sizes=(4, 0))], "'w' has an axis of length zero"),
        ([tensor(kind=4)], "'w' has an unknown type: expected one of 0 (float32)"),
        ([tensor(sizes=(33,), kind=8)], "The rows of tensor 'w' are not whole blocks"),
        ([tensor(sizes=(16, 4), kind=8)], "a last axis that is a multiple of 32 (q8_0), found (4, 16)"),
        ([tensor(offset=4)], "'w' is not aligned: expected a multiple of 32, found 4"),
        ([tensor(offset=64)], "'w' lies past the end of the file"),
        ([tensor(sizes=(2**40, 2**40))], "'w' lies past the end of the file"),
        ([tensor(sizes=(2**63, 2**63, 2**63, 2**63))], "'w' lies past the end of the file"),
        ([tensor(offset=2**63)], "'w' lies past the end of the file"),
        ([tensor("a", sizes=(12,)), tensor("b", offset=32)], "data of tensors 'a' and 'b' overlap"),
        ([tensor("a"), tensor("b")], "data of tensors 'a' and 'b' overlap"),
        ([tensor(name=b"\xff")], "Not UTF-8 text: a tensor's name"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, rows, text):
    assert text in refused(write(tmp_path, tensors=tuple(rows)))


def test_a_download_that_stopped_says_so(tmp_path):
    file = write(tmp_path, tensors=(tensor(sizes=(4096,)),), data=100)
    text = refused(file)
    assert f"expected a file of at least {file.stat().st_size - 100 + 16384} bytes" in text
    assert "Fetch the file again" in text


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path):
    file = write(tmp_path, tensors=(tensor(sizes=(16,)),), data=64)
    info = read_gguf(file).tensors["w"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(
        CheckpointError, match=r"The data of 'w' is cut off .*: expected 64 bytes, found 56 bytes"
    ):
        load_tensor(info)


def test_corrupt_headers_never_crash_nor_eat_memory(tmp_path):
    entries = (
        entry("general.architecture", STRING, string("llama")),
        entry("words", ARRAY, array(STRING, 3, string("ab") + string("c") + string(""))),
        entry("ids", ARRAY, array(I32, 3, bytes(12))),
        entry("nested", ARRAY, array(ARRAY, 1, array(U8, 2, bytes(2)))),
    )
    rows = (tensor("a", sizes=(32, 2), kind=8), tensor("b", offset=96))
    whole = write(tmp_path, entries=entries, tensors=rows, data=128).read_bytes()
    file = tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(1500):
            broken = np.frombuffer(whole, np.uint8).copy()
            for _ in range(rng.integers(1, 4)):
                broken[rng.integers(4, len(broken) - 128)] = rng.choice(
                    [0, 1, 7, 8, 9, 127, 255, rng.integers(256)]
                )
            file.write_bytes(broken.tobytes())
            try:
                read_gguf(file)
            except (CheckpointError, FileError):
                continue
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.realweights
def test_a_real_header_reads_fast_and_like_the_gguf_package(smollm2_gguf):
    began = time.perf_counter()
    checkpoint = read_gguf(smollm2_gguf)
    assert time.perf_counter() - began < 0.25  # 0.025 s on an idle machine
    reader = gguf.GGUFReader(smollm2_gguf)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert checkpoint.metadata.keys() == theirs.keys()
    for key, value in theirs.items():
        ours = checkpoint.metadata[key]
        assert (list(ours) if isinstance(value, list) else ours) == value
    for row in reader.tensors:
        info = checkpoint.tensors[row.name]
        assert (info.offset, info.nbytes) == (row.data_offset, row.n_bytes)
        assert info.shape == tuple(reversed(row.shape.tolist()))
