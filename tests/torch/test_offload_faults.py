# SPDX-License-Identifier: Apache-2.0
"""Offload folders that are full, foreign, damaged, hostile, shared, or left by killed processes."""

import errno
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from pretrained.core.disk_space import check_room, free_bytes
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.errors import CheckpointError, FileError, PlacementError, PretrainedError
from pretrained.torch import offload_folder
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.offload_folder import INDEX
from support.checkpoints import Folder, tiny_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tests Linux's limits, locks and signals")

IDS = torch.tensor([[3, 4, 5]])
LOCK = ".pretrained-offload.lock"


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def load(folder, offload, dtype="bfloat16", **options):
    return LlamaForCausalLM.from_pretrained(
        folder.path, dtype=dtype, device_map="disk", offload_folder=offload, **options
    )


def right(model, dtype=torch.bfloat16):
    return torch.equal(model(IDS).logits, tiny_llama().to(dtype)(IDS).logits)


def content(offload):
    return sorted(name for name in os.listdir(offload) if name != LOCK)


# -- a full disk ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"mounting is not allowed: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


WIDE = {"hidden_size": 64, "intermediate_size": 512}


def test_a_copy_that_the_disk_has_no_room_for(tmp_path, small_disk):
    wide = Folder(tmp_path / "wide", tiny_llama(**WIDE))
    free = free_bytes(small_disk)
    with pytest.raises(FileError) as caught:
        load(wide, small_disk / "off", "float16")
    text = str(caught.value)
    needed = int(re.search(r"room for (\d+) bytes", text)[1])
    assert needed > free
    assert abs(int(re.search(r"found (\d+) free", text)[1]) - free) <= 3 * 4096
    assert "pretrained-offload-" in text and "offload_folder elsewhere" in text
    assert content(small_disk / "off") == []
    assert free_bytes(small_disk) >= free - 3 * 4096


def test_a_save_that_the_disk_has_no_room_for(tmp_path, small_disk):
    model = tiny_llama(**WIDE)
    (small_disk / "old").mkdir()
    tiny_llama().save_pretrained(small_disk / "old")
    before = content(small_disk / "old")
    for options in ({}, {"max_shard_size": "50KB"}, {"safe_serialization": False, "variant": "x"}):
        with pytest.raises(
            FileError, match=r"no room .*model\S*: expected \d+ free bytes, found \d+\. Free space"
        ):
            model.save_pretrained(small_disk / "old", **options)
    assert content(small_disk / "old") == before
    assert LlamaForCausalLM.from_pretrained(small_disk / "old").config.hidden_size == 16


@pytest.mark.parametrize("pickle", [False, True])
def test_a_disk_that_fills_up_while_it_is_written(tmp_path, small_disk, monkeypatch, pickle):
    """Somebody else took the room after it was asked for."""
    monkeypatch.setattr("pretrained.core.writer.check_room", lambda *_: None)
    model = tiny_llama(**WIDE)
    with pytest.raises(FileError) as caught:
        model.save_pretrained(small_disk / "out", safe_serialization=not pickle)
    text = str(caught.value)
    assert "disk is full" in text
    assert re.search(r"\d+ bytes are free, \d+ are needed", text)
    assert ("pytorch_model.bin" if pickle else "model.safetensors") in text
    assert content(small_disk / "out") == []
    wide = Folder(tmp_path / "wide", model)
    with pytest.raises(
        FileError, match=r"converted copy.*pretrained-offload-\w+\.safetensors.*bytes are free"
    ):
        load(wide, small_disk / "off", "float16")
    assert content(small_disk / "off") == []


def test_an_index_that_the_disk_has_no_room_for(folder, tmp_path, monkeypatch):
    """The copies are whole, but nobody would ever find them."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pretrained.core.atomic_files.replace_text", full)
        with pytest.raises(FileError, match="No space left"):
            load(folder, tmp_path / "off")
    assert content(tmp_path / "off") == []


def test_room_is_made_of_what_killed_saves_left(tmp_path, small_disk):
    model = tiny_llama()
    left = small_disk / "out" / ".tmp-0123abcd-model.safetensors"
    left.parent.mkdir()
    left.write_bytes(bytes(240 << 10))
    with pytest.raises(FileError, match="no room"):
        model.save_pretrained(left.parent)  # whoever writes there may be alive
    os.utime(left, (time.time() - 3600,) * 2)
    model.save_pretrained(left.parent)
    assert not left.exists()


def test_file_systems_that_say_nothing_are_not_asked_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    check_room(tmp_path / "x", 1 << 60)
    monkeypatch.undo()
    with pytest.raises(FileError, match="no room"):
        check_room(tmp_path / "x", 1 << 60)


@pytest.mark.parametrize("what", ["copy", "safetensors", "pickle"])
def test_a_limit_on_file_sizes(tmp_path, what):
    wide = Folder(tmp_path / "wide", tiny_llama(**WIDE))
    model = LlamaForCausalLM.from_pretrained(wide.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(FileError) as caught:
            if what == "copy":
                load(wide, tmp_path / "out")
            else:
                model.save_pretrained(tmp_path / "out", safe_serialization=what == "safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ".bin" in str(caught.value) or ".safetensors" in str(caught.value)
    assert what == "pickle" or "File too large" in str(caught.value)
    assert content(tmp_path / "out") == []
    assert load(wide, tmp_path / "out")(IDS).logits.isfinite().all()


# -- what lies in the folder ---------------------------------------------------------------------


def files_of(offload):
    return [offload / name for name in content(offload) if name.endswith(".safetensors")]


def edit_index(offload, change):
    index = json.loads((offload / INDEX).read_text())
    change(index)
    (offload / INDEX).write_text(json.dumps(index))


def test_schemes_and_dtypes_live_beside_each_other(folder, tmp_path):
    offload = tmp_path / "off"
    config = {"quant_method": "int8"}
    for _ in range(2):
        assert right(load(folder, offload))
        assert right(load(folder, offload, "float16"), torch.float16)
        quantized = load(folder, offload, "float32", quantization_config=config)(IDS).logits
        assert torch.allclose(quantized, tiny_llama()(IDS).logits, atol=0.05)
        assert len(files_of(offload)) == 3


def test_a_folder_of_another_model_stays_as_it_is(folder, tmp_path):
    offload = tmp_path / "off"
    load(folder, offload)
    before = {file: file.read_bytes() for file in (*files_of(offload), offload / INDEX)}
    other = Folder(tmp_path / "elsewhere" / "model", tiny_llama(seed=4))
    with pytest.raises(PlacementError, match=r"copies made from another model"):
        load(other, offload)
    assert {file: file.read_bytes() for file in before} == before
    assert right(load(folder, offload))


def flip(at):
    def change(file):
        raw = bytearray(file.read_bytes())
        raw[at if at >= 0 else len(raw) + at] ^= 0x20
        file.write_bytes(raw)

    return change


DAMAGES = {
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
    "emptied": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "length": flip(1),
    "header": flip(30),
    "values": flip(-5),
    "other": lambda file: save_file({"a": torch.ones(3)}, file),
    "gone": os.unlink,
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_never_trusted(folder, tmp_path, name):
    offload = tmp_path / "off"
    load(folder, offload)
    (file,) = files_of(offload)
    DAMAGES[name](file)
    try:
        assert right(load(folder, offload))
    except PretrainedError as error:
        assert name == "folder"  # which no rename replaces
        assert str(file.parent) in str(error)
    else:
        assert len(files_of(offload)) == 1


@pytest.mark.parametrize("position", range(0, 900, 37))
def test_any_flipped_bit_of_a_copys_header(folder, tmp_path, position, monkeypatch):
    """Even where the time of the copy's last change were what it was."""
    offload = tmp_path / "off"
    load(folder, offload)
    (file,) = files_of(offload)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    old = file.stat()
    flip(position % (length + 8))(file)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert right(load(folder, offload))


BAD_INDEXES = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "list": b"[]",
    "nested": b"[" * 100_000,
    "twice": b'{"format": 1, "format": 1, "weights": {}}',
    "other format": b'{"format": 9, "weights": {}}',
    "no weights": b'{"format": 1}',
    "weights a list": b'{"format": 1, "weights": []}',
    "entry a number": b'{"format": 1, "weights": {"a": 5}}',
    "source a text": b'{"format": 1, "weights": {"a": {"file": "x", "source": "y"}}}',
    "file a number": b'{"format": 1, "weights": {"a": {"file": 3, "source": {}}}}',
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_that_is_none(folder, tmp_path, name):
    (tmp_path / INDEX).write_bytes(BAD_INDEXES[name])
    with pytest.raises(PlacementError, match=r"index of the offload folder cannot be read .*Delete"):
        load(folder, tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_an_index_that_is_no_file(folder, tmp_path, kind):
    file = tmp_path / "off" / INDEX
    file.parent.mkdir()
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda path: path.symlink_to(path)}[kind](file)
    with pytest.raises(PlacementError, match="cannot be read"):
        load(folder, file.parent)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "\0"]
)
def test_an_index_cannot_lead_out_of_its_folder(folder, tmp_path, name):
    """The other file holds tensors of the right names and shapes, and must not be used."""
    offload = tmp_path / "off"
    load(folder, offload)
    (file,) = files_of(offload)
    (offload / "sub").mkdir()
    for at in (tmp_path / "secret.safetensors", offload / "sub" / "x.safetensors"):
        header = read_safetensors_header(file).tensors
        zeros = {k: torch.zeros(i.shape, dtype=torch.bfloat16) for k, i in header.items()}
        save_file(zeros, at)

    def lead_out(index):
        for entry in index["weights"].values():
            entry["file"] = name
            if (offload / name.replace("\0", "x")).is_file():
                found = os.stat(offload / name)
                entry["written"] = [found.st_size, found.st_mtime_ns]

    edit_index(offload, lead_out)
    assert right(load(folder, offload))
    assert (tmp_path / "secret.safetensors").exists()


def test_random_damage_to_the_index(folder, tmp_path):
    offload = tmp_path / "off"
    load(folder, offload)
    text = (offload / INDEX).read_bytes()
    generator = random.Random(0)
    for _ in range(60):
        raw = bytearray(text)
        for _ in range(generator.choice([1, 1, 3])):
            raw[generator.randrange(len(raw))] = generator.choice(b'{}[]",:019aZ\x00\xff')
        (offload / INDEX).write_bytes(raw)
        try:
            assert right(load(folder, offload))
        except PlacementError as error:
            assert "Delete the folder" in str(error)


def test_a_folder_that_is_a_file_or_a_loop(folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "loop"):
        with pytest.raises(FileError, match="offload folder cannot be made"):
            load(folder, path)


def test_a_lock_that_is_a_link_is_not_followed(folder, tmp_path):
    offload = tmp_path / "off"
    offload.mkdir()
    (offload / LOCK).symlink_to(tmp_path / "made")
    with pytest.raises(FileError, match="cannot be locked"):
        load(folder, offload)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_that_changes_while_it_is_converted(folder, tmp_path, monkeypatch):
    real = offload_folder._write

    def write(*args, **kwargs):
        file = real(*args, **kwargs)
        os.utime(folder.weights, (5, 5))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(offload_folder, "_write", write)
        with pytest.raises(CheckpointError, match="changed or replaced after it was read"):
            load(folder, tmp_path / "off")
    assert content(tmp_path / "off") == []
    assert right(load(folder, tmp_path / "off"))


# -- processes -----------------------------------------------------------------------------------

START = """
import json, os, random, signal, sys, time
sys.path[:0] = {path}
import torch
torch.set_num_threads(1)
from pathlib import Path
from pretrained.errors import PretrainedError
from pretrained.torch.models.llama import LlamaForCausalLM
IDS = torch.tensor([[3, 4, 5]])
"""


def script(text, *args, check=True):
    done = subprocess.run(
        [sys.executable, "-c", START.format(path=sys.path) + text, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_folders_that_may_only_be_read(folder, tmp_path):
    """Copies that are there can be used; what is not there cannot be written, and says so."""
    offload, empty = tmp_path / "off", tmp_path / "empty"
    load(folder, offload)
    empty.mkdir()
    for path in (*tmp_path.parents, tmp_path):
        if path.stat().st_uid == os.geteuid() and "pytest" in str(path):
            path.chmod(0o755)
    done = script(
        """
model, offload, empty = sys.argv[1:]
def load(folder, dtype):
    return LlamaForCausalLM.from_pretrained(model, dtype=dtype, device_map="disk", offload_folder=folder)
load(offload, "bfloat16")(IDS)  # everything is imported while Python's own files can be read
os.setgid(12345), os.setuid(12345)
print(load(offload, "bfloat16")(IDS).logits.sum().item())
for folder, dtype in ((offload, "float16"), (empty, "bfloat16"), (empty + "/below", "bfloat16")):
    try:
        load(folder, dtype)
    except PretrainedError as error:
        print(error)
""",
        folder.path,
        offload,
        empty,
    )
    first, *rest = done.stdout.splitlines()
    assert float(first) == pytest.approx(tiny_llama().bfloat16()(IDS).logits.sum().item())
    assert len(rest) == 3
    assert all("Permission denied" in line and str(tmp_path) in line for line in rest)


@pytest.mark.slow
def test_copies_from_memory_of_a_killed_process_go_and_those_of_a_living_do_not(folder, tmp_path):
    offload = tmp_path / "off"
    config = tiny_llama().config
    state = tiny_llama(seed=8).state_dict()
    living = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, device_map="disk", offload_folder=offload
    )
    mine = set(files_of(offload))
    script(
        """
from pretrained.torch.models.llama import LlamaForCausalLM
plain = LlamaForCausalLM.from_pretrained(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(
    None, config=plain.config, state_dict=plain.state_dict(), device_map="disk", offload_folder=sys.argv[2]
)
os.kill(os.getpid(), signal.SIGKILL)
""",
        folder.path,
        offload,
        check=False,
    )
    left = set(files_of(offload)) - mine
    assert len(left) == 1
    assert right(load(folder, offload))
    assert not left & set(files_of(offload))
    assert mine < set(files_of(offload))
    assert torch.equal(living(IDS).logits, tiny_llama(seed=8)(IDS).logits)


KILLS = """
model, offload, count, dtypes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
def load(dtype):
    return LlamaForCausalLM.from_pretrained(model, dtype=dtype, device_map="disk", offload_folder=offload)
wanted = {dtype: LlamaForCausalLM.from_pretrained(model, dtype=dtype)(IDS).logits for dtype in dtypes}
def forked(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child
def loads():
    while True:
        for dtype in dtypes:
            load(dtype)
        for name in os.listdir(offload):
            if random.random() < 0.5:
                (offload / name).unlink()
def check():
    for dtype in dtypes:
        assert torch.equal(load(dtype)(IDS).logits, wanted[dtype])
    names = sorted(os.listdir(offload))
    index = json.loads((offload / "pretrained-offload.json").read_text())["weights"]
    named = {entry["file"] for entry in index.values()}
    copies = {name for name in names if name.endswith(".safetensors")}
    assert copies <= named, names
    assert not [name for name in names if name.startswith(".tmp-")] or left_over(names), names
def left_over(names):
    # Where both dtypes were there already nothing was written, and so nothing removed.
    load_one = dtypes[0]
    for name in names:
        if name.endswith(".safetensors"):
            (offload / name).unlink()
    load(load_one)
    return not [name for name in os.listdir(offload) if name.startswith(".tmp-")]
offload.mkdir(exist_ok=True)
random.seed(1)
tail = 0
for _ in range(count):
    child = forked(loads)
    time.sleep(random.uniform(0, float(sys.argv[5])))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tail += any(name.startswith(".tmp-") for name in os.listdir(offload))
    check()
print(json.dumps({"with temporary files": tail}))
"""


@pytest.mark.slow
def test_a_few_killed_loads(folder, tmp_path):
    script(KILLS, folder.path, tmp_path / "off", 5, "bfloat16", 0.1)


@pytest.mark.long
def test_many_killed_loads(tmp_path):
    """Of a model that takes a while to convert, so that kills fall into every step."""
    folder = Folder(
        tmp_path / "model", tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    )
    done = script(KILLS, folder.path, tmp_path / "off", 120, "bfloat16,float16", 0.5)
    assert json.loads(done.stdout)["with temporary files"] > 3


TOGETHER = """
model, offload, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
wanted = {d: LlamaForCausalLM.from_pretrained(model, dtype=d)(IDS).logits for d in ("bfloat16", "float16")}
def work(seed):
    random.seed(seed)
    for _ in range(rounds):
        dtype = random.choice(("bfloat16", "float16"))
        loaded = LlamaForCausalLM.from_pretrained(
            model, dtype=dtype, device_map={"": "disk", "model.norm": "cpu"} if seed % 2 else "disk",
            offload_folder=offload,
        )
        assert torch.equal(loaded(IDS).logits, wanted[dtype])
        if seed == 0 and random.random() < 0.5:
            for name in os.listdir(offload):
                if name.endswith(".safetensors"):
                    with open(os.path.join(offload, name), "r+b") as opened:
                        pass
                    os.utime(os.path.join(offload, name), (1, 1))
children = []
for seed in range(4):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(seed)
            code = 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes)
assert not any(codes[1:]), codes
"""


@pytest.mark.slow
def test_processes_that_share_a_folder(folder, tmp_path):
    text = TOGETHER.replace("if seed == 0 and", "if False and")
    assert script(text, folder.path, tmp_path / "off", 6).stdout == "[0, 0, 0, 0]\n"


def test_threads_that_share_a_folder(folder, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(lambda _: load(folder, tmp_path / "off"), range(12)))
    assert all(right(model) for model in models)
    assert len(files_of(tmp_path / "off")) == 1
