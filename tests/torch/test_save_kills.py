# SPDX-License-Identifier: Apache-2.0
"""Saves that die or fail anywhere: the folder loads as the old model or as the new one, whole.

The two models differ in their weights, in a size in config.json and in generation_config.json, so that any
mix is seen. A death is an exception at one write, flush, rename, link or removal, after which all others
fail too, so that no handler can tidy up.
"""

import builtins
import errno
import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from pretrained.core import atomic_files
from pretrained.core.atomic_files import one_saver
from pretrained.core.save_journal import JOURNAL, text_file
from pretrained.errors import ArgumentError, FileError
from pretrained.torch.models.llama import LlamaForCausalLM
from support.checkpoints import tiny_llama

OLD = {"num_hidden_layers": 1, "intermediate_size": 24, "pad_token_id": 0}
NEW = {"num_hidden_layers": 1, "intermediate_size": 32, "pad_token_id": 5}
SHAPES = {
    "one": {},
    "two": {"max_shard_size": 6500},
    "three": {"max_shard_size": 4000},
    "bin": {"safe_serialization": False},
    "bins": {"safe_serialization": False, "max_shard_size": 6500},
    "variant": {"variant": "fp16"},
}
EFFECTS = ["replace", "link", "unlink", "fsync", "mkdir"]


class Killed(BaseException):
    """Stands for SIGKILL."""


class Deaths:
    """Lets some effects happen and none after them."""

    def __init__(self, patch, allowed, error=Killed, lasting=True):
        self.allowed, self.error, self.lasting, self.done = allowed, error, lasting, 0
        for name in EFFECTS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(atomic_files, "open", self._open, raising=False)

    def step(self):
        failing = self.done >= self.allowed if self.lasting else self.done == self.allowed
        self.done += 1
        if failing:
            raise self.error

    def _counted(self, real):
        def effect(*args, **kwargs):
            self.step()
            return real(*args, **kwargs)

        return effect

    def _open(self, file, mode):
        self.step()
        opened = builtins.open(file, mode)  # noqa: SIM115  # closed by the stand-in
        write = opened.write
        outer = self

        class Half:
            """A file that has taken half of the bytes when the end comes."""

            def write(self, data):
                try:
                    outer.step()
                except BaseException:
                    write(bytes(data)[: len(data) // 2])
                    raise
                return write(data)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                opened.close()

            flush, fileno = opened.flush, opened.fileno

        return Half()


def model_of(values, seed):
    model = tiny_llama(seed=seed, **values)
    model.generation_config.max_new_tokens = 10 + seed
    return model


OLD_MODEL, NEW_MODEL, THIRD = model_of(OLD, 1), model_of(NEW, 2), model_of(OLD, 3)


def is_whole(folder, model, variant=None):
    """Tell whether a folder loads as one model; an error is one that nobody may ever see."""
    loaded, info = LlamaForCausalLM.from_pretrained(folder, variant=variant, output_loading_info=True)
    assert not any(info.values())
    state, other = loaded.state_dict(), model.state_dict()
    return (
        loaded.config.intermediate_size == model.config.intermediate_size
        and loaded.config.pad_token_id == model.config.pad_token_id
        and loaded.generation_config.max_new_tokens == model.generation_config.max_new_tokens
        and all(torch.equal(state[key], other[key]) for key in other)
    )


CHANGES = [
    ("one", "one"),
    ("one", "two"),
    ("two", "one"),
    ("two", "two"),
    ("two", "three"),
    ("bin", "one"),
    ("bins", "bin"),
    ("variant", "variant"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES, ids=lambda shape: shape)
def test_a_save_that_dies_at_any_effect(tmp_path, old, new):
    before = tmp_path / "before"
    OLD_MODEL.save_pretrained(before, **SHAPES[old])
    variant = SHAPES[new].get("variant")
    seen = []
    for allowed in range(200):
        folder = tmp_path / "now"
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            deaths = Deaths(patch, allowed)
            try:
                NEW_MODEL.save_pretrained(folder, **SHAPES[new])
                finished = True
            except Killed:
                finished = False
        is_new = is_whole(folder, NEW_MODEL, variant)
        assert is_new or is_whole(folder, OLD_MODEL, variant), f"a mix after {allowed} effects"
        seen.append(is_new)
        if not finished and allowed % 3 == 0:
            # The next save finds its way over the remains, and leaves none.
            THIRD.save_pretrained(folder, **SHAPES[new])
            assert is_whole(folder, THIRD, variant)
        if finished or allowed % 3 == 0:
            assert not [name for name in os.listdir(folder) if name.startswith(".")]
        shutil.rmtree(folder)
        if finished:
            break
    assert finished
    assert deaths.done > 10
    assert seen == sorted(seen), "what was new became old again"
    assert {False, True} == set(seen)


def test_a_first_save_that_dies_leaves_no_half_model(tmp_path):
    """Before the end of the weights there is nothing to load; after it, everything."""
    whole = 0
    for allowed in range(200):
        folder = tmp_path / str(allowed)
        with pytest.MonkeyPatch.context() as patch:
            Deaths(patch, allowed)
            try:
                NEW_MODEL.save_pretrained(folder)
                break
            except Killed:
                pass
        if (folder / "model.safetensors").exists():
            assert is_whole(folder, NEW_MODEL)
            whole += 1
        else:
            with pytest.raises(FileError, match=r"No such file|folder is empty|are no weights"):
                LlamaForCausalLM.from_pretrained(folder)
    assert whole >= 3


@pytest.mark.parametrize(("old", "new"), [("one", "one"), ("one", "two"), ("two", "two")])
def test_an_error_at_any_effect_says_what_is_there(tmp_path, old, new):
    """An error, other than a death, is cleaned up after; its text says which model is in the folder."""
    before = tmp_path / "before"
    OLD_MODEL.save_pretrained(before, **SHAPES[old])
    listing = sorted(os.listdir(before))
    for allowed in range(200):
        folder = tmp_path / "now"
        shutil.copytree(before, folder)
        with pytest.MonkeyPatch.context() as patch:
            deaths = Deaths(patch, allowed, OSError(errno.EIO, "Input/output error"), lasting=False)
            try:
                NEW_MODEL.save_pretrained(folder, **SHAPES[new])
                error = None
            except FileError as caught:
                error = str(caught)
        if error is None:
            assert is_whole(folder, NEW_MODEL)
        elif "The new checkpoint is in place" in error:
            assert is_whole(folder, NEW_MODEL), allowed
        else:
            assert "what was there before is intact" in error
            assert is_whole(folder, OLD_MODEL), allowed
            left = set(os.listdir(folder)) - set(listing)
            assert not left or (old == "one" and left == {"model.safetensors.index.json"})
        shutil.rmtree(folder)
        if deaths.done <= allowed:
            break
    assert error is None
    assert allowed > 10


def test_a_text_that_is_written_after_a_death_counts(tmp_path):
    """Somebody writes config.json by hand before anything tidies up."""
    OLD_MODEL.save_pretrained(tmp_path / "m")
    for allowed in range(200):
        folder = tmp_path / "now"
        shutil.copytree(tmp_path / "m", folder)
        with pytest.MonkeyPatch.context() as patch:
            Deaths(patch, allowed)
            with pytest.raises(Killed):
                NEW_MODEL.save_pretrained(folder)
        if (folder / JOURNAL).exists() and text_file(folder, "config.json").name != "config.json":
            break
        shutil.rmtree(folder)
    assert text_file(folder, "config.json").name.startswith(".tmp-")
    assert text_file(folder, "tokenizer.json").name == "tokenizer.json"
    config = NEW_MODEL.config.__class__.from_pretrained(folder)
    assert config.intermediate_size == 32
    config.initializer_range = 0.5
    config.save_pretrained(folder)
    assert LlamaForCausalLM.from_pretrained(folder).config.initializer_range == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 50_000,
        '{"weights": [[1, 2, 3]], "single": "../x", "index": "y", "texts": {}}',
        '{"weights": [[1, 2, 3]], "single": "model.safetensors", "index": "y",'
        ' "texts": {"config.json": "../../etc/passwd"}}',
        '{"weights": [[1, 2, 3]], "single": "model.safetensors", "index": "y",'
        ' "texts": {"config.json": ".tmp-00000000-config.json"}}',
    ],
)
def test_a_journal_of_a_stranger_says_nothing(tmp_path, text):
    OLD_MODEL.save_pretrained(tmp_path)
    (tmp_path / JOURNAL).write_text(text)
    (tmp_path / ".tmp-00000000-config.json").write_text("{}")
    assert is_whole(tmp_path, OLD_MODEL)
    NEW_MODEL.save_pretrained(tmp_path)
    assert is_whole(tmp_path, NEW_MODEL)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


# -- disks, folders and other savers ---------------------------------------------------------------


def listing_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("new", ["one", "two", "bin"])
def test_a_full_disk_leaves_the_old_model(tmp_path, new):
    """A limit on file sizes makes the system itself refuse to write."""
    OLD_MODEL.save_pretrained(tmp_path, **SHAPES["bin" if new == "bin" else "one"])
    before = listing_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(FileError, match="Writing failed; what was there before is intact") as caught:
            NEW_MODEL.save_pretrained(tmp_path, **SHAPES[new])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert listing_of(tmp_path) == before
    assert is_whole(tmp_path, OLD_MODEL)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_only_be_read(tmp_path):
    OLD_MODEL.save_pretrained(tmp_path)
    tmp_path.chmod(0o555)
    with pytest.raises(FileError, match="Get write permission"):
        NEW_MODEL.save_pretrained(tmp_path)
    assert is_whole(tmp_path, OLD_MODEL)


def test_a_file_system_that_may_only_be_read(tmp_path, monkeypatch):
    OLD_MODEL.save_pretrained(tmp_path)
    before = listing_of(tmp_path)

    def refuse(file, mode):
        raise OSError(errno.EROFS, "Read-only file system", str(file))

    monkeypatch.setattr(atomic_files, "open", refuse, raising=False)
    with pytest.raises(FileError, match="read-only: save elsewhere"):
        NEW_MODEL.save_pretrained(tmp_path)
    assert listing_of(tmp_path) == before


def test_two_savers_in_threads(tmp_path):
    """Of two that meet, one is refused and the other finishes."""
    OLD_MODEL.save_pretrained(tmp_path, safe_serialization=False)
    inside, go = threading.Event(), threading.Event()

    def slowly(tensors, path):
        inside.set()
        assert go.wait(10)
        torch.save(tensors, path)

    def save():
        NEW_MODEL.save_pretrained(tmp_path, safe_serialization=False, save_function=slowly)

    first = threading.Thread(target=save)
    first.start()
    assert inside.wait(10)
    try:
        with pytest.raises(FileError, match=r"Another save is writing.*is_main_process=False") as caught:
            THIRD.save_pretrained(tmp_path, safe_serialization=False)
        assert str(tmp_path) in str(caught.value)
        assert is_whole(tmp_path, OLD_MODEL)
    finally:
        go.set()
        first.join()
    assert is_whole(tmp_path, NEW_MODEL)


def test_two_savers_in_processes(tmp_path):
    OLD_MODEL.save_pretrained(tmp_path)
    script = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileError, match="Another save is writing into this folder"):
            NEW_MODEL.save_pretrained(tmp_path)
        other.kill()
    assert is_whole(tmp_path, OLD_MODEL)
    NEW_MODEL.save_pretrained(tmp_path)
    assert is_whole(tmp_path, NEW_MODEL)


def test_a_folder_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(atomic_files.fcntl, "flock", refuse)
    with one_saver(tmp_path):
        (tmp_path / "x").touch()
    NEW_MODEL.save_pretrained(tmp_path)
    assert is_whole(tmp_path, NEW_MODEL)


def test_saving_where_one_has_loaded_from(tmp_path):
    """The weights are views of the file that is replaced, and stay what they were."""
    OLD_MODEL.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for shape in ("one", "two", "two", "one"):
        loaded.save_pretrained(tmp_path, **SHAPES[shape])
        assert is_whole(tmp_path, OLD_MODEL)
    with torch.no_grad():
        loaded.lm_head.weight.add_(1)
    loaded.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, OLD_MODEL.lm_head.weight + 1)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArgumentError, match="found a file"):
        NEW_MODEL.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
