# SPDX-License-Identifier: Apache-2.0
"""Weights files that are changed, cut short, replaced or removed under a load or a running model.

A file that is cut short under a map kills whoever touches the lost pages, so everything that could do that
runs in a process of its own, which must end by itself.
"""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from pretrained.core.file_state import FilesInUse, FileState, states_of
from pretrained.core.files import open_checkpoint
from pretrained.core.reader import MappedFiles
from pretrained.errors import CheckpointError, PretrainedError
from pretrained.torch import load as load_module
from pretrained.torch.models.llama import LlamaForCausalLM
from support.checkpoints import Folder, tiny_llama

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot be changed there")

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def cut(file):
    os.truncate(file, 100)


def overwrite(file):
    size = file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"\xff" * (size // 2))


def touch(file):
    os.utime(file, (1, 1))


def replace_(file):
    new = file.with_name("new")
    new.write_bytes(bytes(1000))
    os.replace(new, file)


CHANGES = {"cut": cut, "overwrite": overwrite, "touch": touch}


# -- the small parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_named(tmp_path, change):
    file = tmp_path / "w"
    file.write_bytes(bytes(1000))
    in_use = FilesInUse(states_of([file, tmp_path / "gone"]))
    in_use.check()
    CHANGES[change](file)
    verb = "cut short" if change == "cut" else "changed"
    with pytest.raises(CheckpointError, match=rf"was {verb} under a model .*{file.name}.*disable_mmap=True"):
        in_use.check()


@pytest.mark.parametrize("how", [replace_, os.unlink])
def test_a_name_that_was_given_away_is_no_change(tmp_path, how):
    file = tmp_path / "w"
    file.write_bytes(bytes(1000))
    in_use = FilesInUse({file: FileState.of(file)})
    how(file)
    in_use.check()


@pytest.mark.parametrize("change", [replace_, overwrite])
def test_a_file_that_is_not_the_one_whose_header_was_read(folder, change):
    checkpoint = open_checkpoint(folder.path)
    info = next(iter(checkpoint.tensors.values()))
    folder.weights.write_bytes(folder.weights.read_bytes()) if change is overwrite else change(folder.weights)
    with pytest.raises(CheckpointError, match=r"changed or replaced after it|became shorter"):
        MappedFiles(checkpoint.states).buffer(info)


# -- while it loads ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_change_during_a_load_ends_it(folder, monkeypatch, dtype):
    """Same size and shapes, other values: nothing else would tell."""
    other = Folder(folder.path.parent / "other", tiny_llama(seed=5)).weights.read_bytes()
    real = load_module.execute

    def execute(*args, **kwargs):
        real(*args, **kwargs)
        with open(folder.weights, "r+b") as opened:
            opened.write(other)

    monkeypatch.setattr(load_module, "execute", execute)
    with pytest.raises(CheckpointError, match="changed while it was being loaded"):
        LlamaForCausalLM.from_pretrained(folder.path, dtype=dtype)


def test_a_replacement_between_header_and_map_ends_it(folder, monkeypatch):
    other = Folder(folder.path.parent / "other", tiny_llama(seed=5)).weights
    real = load_module.plan_load

    def plan(*args, **kwargs):
        os.replace(other, folder.weights)
        return real(*args, **kwargs)

    monkeypatch.setattr(load_module, "plan_load", plan)
    with pytest.raises(CheckpointError, match="changed or replaced after it was read"):
        LlamaForCausalLM.from_pretrained(folder.path)


def test_a_replacement_after_the_map_changes_nothing(folder, monkeypatch):
    other = Folder(folder.path.parent / "other", tiny_llama(seed=5)).weights
    real = load_module.execute

    def execute(*args, **kwargs):
        real(*args, **kwargs)
        os.replace(other, folder.weights)

    monkeypatch.setattr(load_module, "execute", execute)
    model = LlamaForCausalLM.from_pretrained(folder.path)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


# -- under a running model -----------------------------------------------------------------------

MAPS = {
    "resident": {},
    "disk": {"device_map": "disk"},
    "mixed": {"device_map": {"": "cpu", "model.layers.1": "disk"}},
}


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_runs_from_a_changed_file_refuses(folder, where, change):
    if change == "cut":
        return  # in processes of their own, below
    model = LlamaForCausalLM.from_pretrained(folder.path, **MAPS[where])
    model(IDS)
    CHANGES[change](folder.weights)
    for use in (
        lambda: model(IDS),
        lambda: model.generate(IDS, max_new_tokens=2),
        lambda: model.save_pretrained(folder.path.parent / "out"),
        lambda: model.save_pretrained(folder.path.parent / "out", safe_serialization=False),
    ):
        with pytest.raises(CheckpointError, match="was changed under a model that runs from it"):
            use()
    out = folder.path.parent / "out"
    assert not out.exists() or not list(out.iterdir())


def test_moves_and_casts_read_the_weights_and_refuse_too(folder):
    model = LlamaForCausalLM.from_pretrained(folder.path)
    touch(folder.weights)
    for move in (model.half, lambda: model.to(torch.bfloat16), model.double):
        with pytest.raises(CheckpointError, match="was changed"):
            move()
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    "prepare",
    [
        lambda path: LlamaForCausalLM.from_pretrained(path, disable_mmap=True),
        lambda path: LlamaForCausalLM.from_pretrained(path, dtype="bfloat16"),
        lambda path: LlamaForCausalLM.from_pretrained(path).bfloat16(),
        lambda path: copy.deepcopy(LlamaForCausalLM.from_pretrained(path)),
        lambda path: pickle.loads(pickle.dumps(LlamaForCausalLM.from_pretrained(path))),
        lambda path: LlamaForCausalLM.from_pretrained(path, device_map={"": "cpu"}, disable_mmap=True),
    ],
    ids=["disable_mmap", "cast", "cast-later", "deepcopy", "pickle", "placed"],
)
def test_weights_in_memory_of_their_own_need_no_file(folder, prepare):
    model = prepare(folder.path)
    before = model(IDS).logits
    cut(folder.weights)
    assert torch.equal(model(IDS).logits, before)
    shutil.rmtree(folder.path)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("how", ["replaced", "removed", "saved over"])
def test_a_file_that_lost_its_name_lives_on(folder, where, how):
    model = LlamaForCausalLM.from_pretrained(folder.path, **MAPS[where])
    before = tiny_llama()(IDS).logits
    if how == "replaced":
        replace_(folder.weights)
    elif how == "removed":
        shutil.rmtree(folder.path)
    else:
        tiny_llama(seed=3).save_pretrained(folder.path)
    assert torch.equal(model(IDS).logits, before)
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)


def test_shards_are_all_looked_at(folder):
    folder.shards()
    model = LlamaForCausalLM.from_pretrained(folder.path)
    touch(folder.path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors"):
        model(IDS)


def test_looking_costs_microseconds(folder):
    import timeit

    model = LlamaForCausalLM.from_pretrained(folder.path)
    assert min(timeit.repeat(model._files_in_use.check, number=100, repeat=5)) < 100 * 100e-6


# -- without dying -------------------------------------------------------------------------------

SCRIPT = """
import os, sys
sys.path[:0] = {path}
import torch
torch.set_num_threads(1)
from pathlib import Path
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.errors import CheckpointError, PretrainedError
file, where, moment = Path(sys.argv[1]), eval(sys.argv[2]), sys.argv[3]
ids = torch.tensor([[3, 4, 5]])
cut = lambda *_: os.truncate(file, 4096 if file.stat().st_size > 4096 else 100)
model = LlamaForCausalLM.from_pretrained(file.parent, **where)
if moment == "before the first forward":
    cut(); use = lambda: model(ids)
elif moment == "after a forward":
    model(ids); cut(); use = lambda: model(ids)
elif moment == "before generate":
    cut(); use = lambda: model.generate(ids, max_new_tokens=3)
elif moment == "between tokens":
    calls = []
    def once(*_):
        calls.append(1)
        if len(calls) == 2: cut()
    model.register_forward_hook(once)
    use = lambda: model.generate(ids, max_new_tokens=5, min_new_tokens=5)
elif moment == "between layers":
    model.model.layers[0].register_forward_hook(lambda *_: cut())
    use = lambda: model(ids)
elif moment == "before a save":
    cut(); use = lambda: model.save_pretrained(file.parent.parent / "out")
elif moment == "before a pickle":
    cut(); use = lambda: model.save_pretrained(file.parent.parent / "out", safe_serialization=False)
elif moment == "before a cast":
    cut(); use = lambda: model.half()
try:
    use()
except CheckpointError as error:
    assert "was cut short under a model that runs from it" in str(error), error
    assert str(file) in str(error)
    print("refused")
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of some pages for each layer, so that what is cut off was in a page of its own."""
    path = tmp_path_factory.mktemp("wide")
    return Folder(path / "model", tiny_llama(hidden_size=64, intermediate_size=256))


def run(folder, tmp_path, where, moment):
    shutil.copytree(folder.path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(path=sys.path), str(file), repr(where), moment],
        capture_output=True,
        text=True,
        check=False,
    )


def check_refused(done):
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "moment"),
    [("resident", "before the first forward"), ("resident", "between tokens"), ("disk", "between layers")],
)
def test_a_file_cut_short_kills_nobody(wide, tmp_path, where, moment):
    check_refused(run(wide, tmp_path, MAPS[where], moment))


@pytest.mark.long
@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize(
    "moment",
    [
        "before the first forward",
        "after a forward",
        "before generate",
        "between tokens",
        "before a save",
        "before a pickle",
        "before a cast",
    ],
)
def test_nor_anywhere_else(wide, tmp_path, where, moment):
    check_refused(run(wide, tmp_path, MAPS[where], moment))


# -- while somebody saves --------------------------------------------------------------------------


def test_an_index_that_is_exchanged_during_a_load(folder, monkeypatch):
    """Shards under the same names may be of another checkpoint then."""
    folder.shards()
    index = folder.path / "model.safetensors.index.json"
    real = load_module.execute

    def execute(*args, **kwargs):
        real(*args, **kwargs)
        new = index.with_name("new")
        new.write_bytes(index.read_bytes())
        os.replace(new, index)

    monkeypatch.setattr(load_module, "execute", execute)
    with pytest.raises(CheckpointError, match=r"changed or replaced after it was read .*index\.json"):
        LlamaForCausalLM.from_pretrained(folder.path)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"device_map": "disk"}])
@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_loads_beside_saves_are_of_one_checkpoint(tmp_path, size, options):
    """Every load is the old model, the new one, or an error that says what happened."""
    models = [tiny_llama(seed=seed) for seed in (0, 1)]
    wanted = [
        model.to(torch.bfloat16 if "dtype" in options else torch.float32)(IDS).logits for model in models
    ]
    models = [tiny_llama(seed=seed) for seed in (0, 1)]
    models[0].save_pretrained(tmp_path / "model", max_shard_size=size)
    stop = threading.Event()

    def save():
        turn = 0
        while not stop.is_set():
            turn += 1
            models[turn % 2].save_pretrained(tmp_path / "model", max_shard_size=size)
            stop.wait(0.05)

    saver = threading.Thread(target=save)
    saver.start()
    found, faults = 0, []
    try:
        for _ in range(40):
            try:
                logits = LlamaForCausalLM.from_pretrained(tmp_path / "model", **options)(IDS).logits
                assert any(torch.equal(logits, each) for each in wanted)
                found += 1
            except PretrainedError as error:
                faults.append(str(error))
    finally:
        stop.set()
        saver.join()
    assert found, faults[:3]
    assert all(str(tmp_path) in fault for fault in faults)


# -- models inside models, and paths that move -----------------------------------------------------


def test_parts_of_a_model_look_too(folder):
    model = LlamaForCausalLM.from_pretrained(folder.path)
    inner = model.model
    touch(folder.weights)
    for use in (lambda: inner(IDS), model.state_dict, inner.state_dict):
        with pytest.raises(CheckpointError, match="was changed under a model"):
            use()


@pytest.mark.parametrize("options", [{}, {"device_map": "disk"}])
def test_a_relative_path_means_the_same_file_later(folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    model = LlamaForCausalLM.from_pretrained("model", **options)
    offloaded = LlamaForCausalLM.from_pretrained(
        "model", dtype="bfloat16", device_map="disk", offload_folder="off"
    )
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    model(IDS)
    assert offloaded(IDS).logits.isfinite().all()
    offloaded.save_pretrained(tmp_path / "saved")
    touch(folder.weights)
    with pytest.raises(CheckpointError, match="was changed under a model"):
        model(IDS)


def test_an_offload_folder_that_is_the_models_own(folder):
    for _ in range(2):
        model = LlamaForCausalLM.from_pretrained(
            folder.path, dtype="bfloat16", device_map="disk", offload_folder=folder.path
        )
        assert torch.equal(model(IDS).logits, tiny_llama().bfloat16()(IDS).logits)
    assert torch.equal(LlamaForCausalLM.from_pretrained(folder.path)(IDS).logits, tiny_llama()(IDS).logits)
