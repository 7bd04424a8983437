# SPDX-License-Identifier: Apache-2.0
"""Loads amid other things: threads, forks, workers, contexts of torch; and what a load leaves behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrained.errors import PretrainedError
from pretrained.torch.models.llama import LlamaForCausalLM
from support.checkpoints import Folder, tiny_llama

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")

IDS = torch.tensor([[3, 4, 5]])
SIZES = {"hidden_size": 32, "intermediate_size": 64}
WAYS = {
    "same": {},
    "cast": {"dtype": "bfloat16"},
    "own memory": {"disable_mmap": True},
    "int8": {"load_in_8bit": True},
    "int4": {"load_in_4bit": True},
    "disk": {"device_map": "disk"},
    "mixed": {"device_map": {"": "cpu", "model.layers.0": "disk"}},
    "converted": {"device_map": "disk", "dtype": "bfloat16", "offload_folder": True},
    "quantized to disk": {"device_map": "disk", "load_in_8bit": True, "offload_folder": True},
}


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model", tiny_llama(**SIZES))


def load(path, way, cls=LlamaForCausalLM):
    options = dict(WAYS[way])
    if "offload_folder" in options:
        options["offload_folder"] = path.parent / "offload"
    return cls.from_pretrained(path, **options)


def settled(look, wanted, seconds=5):
    """Look until the system has noticed: a thread that ended is listed for a moment."""
    deadline = time.monotonic() + seconds
    while (found := look()) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def threads():
    return len(os.listdir("/proc/self/task")), sorted(thread.name for thread in threading.enumerate())


def descriptors():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sorted(target for target in found if not target.startswith("/proc"))


def maps_of(path):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]


# -- what a load and a model leave behind ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(folder, kind, way):
    """Threads end with the load (torch's own pool is there before); files and maps with the model."""
    if kind != "safetensors":
        getattr(folder, kind)()
    load(folder.path, way)(IDS)
    gc.collect()
    before = threads(), descriptors()
    model = load(folder.path, way)
    after_load = settled(threads, before[0])
    assert after_load == before[0]
    # Sockets that were there before are other tests'.
    new = set(descriptors()) - set(before[1])
    assert not [target for target in new if target.startswith("socket")]
    placed = model.__dict__.get("_dispatch") is not None
    if not placed:
        assert descriptors() == before[1]
    model(IDS)
    model.generate(IDS, max_new_tokens=2)
    assert settled(threads, before[0]) == before[0]
    if way in ("own memory", "cast"):
        assert not maps_of(folder.path)
    if way in ("same", "disk", "mixed"):
        assert maps_of(folder.path)
    del model
    gc.collect()
    assert settled(threads, before[0]) == before[0]
    assert descriptors() == before[1]
    assert not maps_of(folder.path.parent)


@pytest.mark.parametrize("way", ["same", "cast", "int8", "disk", "converted"])
def test_nothing_is_left_of_a_load_that_failed(folder, way):
    load(folder.path, way)
    folder.tensors(**{"model__layers__1__mlp__up_proj__weight": torch.full((64, 32), float("nan"))})
    folder.config(num_hidden_layers=3)
    gc.collect()
    before = threads(), descriptors()
    for _ in range(2):
        with pytest.raises(Exception, match=r"layers\.2|missing|older state|no finite"):
            load(folder.path, way)
    gc.collect()
    assert settled(threads, before[0]) == before[0]
    assert descriptors() == before[1]
    assert not maps_of(folder.path)


def test_a_tensor_keeps_its_map_and_nothing_else_does(folder):
    model = load(folder.path, "same")
    kept = model.model.norm.weight
    wanted = kept.detach().clone()
    del model
    gc.collect()
    assert len(maps_of(folder.path)) == 1
    assert torch.equal(kept, wanted)
    del kept
    gc.collect()
    assert not maps_of(folder.path)


def test_a_thousand_loads_leave_no_more_than_one(folder):
    load(folder.path, "disk")
    gc.collect()
    before = threads(), descriptors(), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(100):
        for way in ("same", "cast", "disk"):
            load(folder.path, way)
    gc.collect()
    assert settled(threads, before[0]) == before[0]
    assert descriptors() == before[1]
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before[2] + 50


# -- threads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 8])
def test_threads_that_load_different_models_get_the_right_ones(tmp_path, workers):
    folders = [
        Folder(tmp_path / str(seed) / "model", tiny_llama(seed=seed, **SIZES)) for seed in range(workers)
    ]
    ways = list(WAYS)
    alone = {(n, way): load(folders[n].path, way)(IDS).logits for n in range(workers) for way in ways}
    gate = threading.Barrier(workers)

    def work(number):
        for turn in range(len(ways)):
            way = ways[(turn + number) % len(ways)]
            gate.wait()
            assert torch.equal(load(folders[number].path, way)(IDS).logits, alone[number, way]), way
        return True

    with ThreadPoolExecutor(workers) as pool:
        assert all(pool.map(work, range(workers)))
    assert torch.get_default_dtype() == torch.float32


def test_modules_built_meanwhile_have_memory_and_values(folder):
    """Building without memory is one thread's own affair."""
    stop, faults = threading.Event(), []

    def build():
        while not stop.is_set():
            layer = nn.Linear(8, 8)
            if layer.weight.is_meta or not layer.weight.any() or layer.weight.dtype != torch.float32:
                faults.append(layer)
            model = tiny_llama()
            if any(p.is_meta for p in model.parameters()):
                faults.append(model)

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    try:
        for _ in range(20):
            for way in ("same", "cast", "int8"):
                load(folder.path, way)
    finally:
        stop.set()
        for builder in builders:
            builder.join()
    assert not faults


# -- processes -------------------------------------------------------------------------------------


def forked(work):
    """Run a function in a forked process and return how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_a_fork_runs_the_model_and_loads_another(folder, way):
    torch.set_num_threads(1)
    model = load(folder.path, way)
    wanted = model(IDS).logits
    assert forked(lambda: torch.equal(model(IDS).logits, wanted)) == 0
    assert forked(lambda: torch.equal(load(folder.path, way)(IDS).logits, wanted)) == 0

    def edit():
        with torch.no_grad():
            model.model.norm.weight.zero_()
        return not model(IDS).logits.any()

    assert forked(edit) == 0
    assert torch.equal(model(IDS).logits, wanted)


class Loading(torch.utils.data.Dataset):
    """Each worker loads the model for itself, at its first item."""

    def __init__(self, path):
        self.path, self.model = path, None

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.model is None:
            self.model = load(self.path, "same")
        with torch.no_grad():
            return self.model(IDS).logits


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader(folder):
    wanted = load(folder.path, "same")(IDS).logits.detach()
    loader = torch.utils.data.DataLoader(
        Loading(folder.path), num_workers=2, batch_size=None, multiprocessing_context="fork"
    )
    assert all(torch.equal(logits, wanted) for logits in loader)


@pytest.mark.slow
def test_a_spawned_process_shares_the_map(folder):
    """Two processes that run from one file share its pages: neither pays for them alone."""
    big = Folder(folder.path.parent / "big", tiny_llama(hidden_size=512, intermediate_size=2048))
    code = (
        f"import sys, torch; sys.path[:0] = {sys.path}\n"
        "from pretrained.torch.models.llama import LlamaForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = LlamaForCausalLM.from_pretrained(sys.argv[1])\n"
        "model(torch.tensor([[1, 2]]))\n"
        "print('up', flush=True); sys.stdin.readline()\n"
        "found = {}\n"
        "mine = False\n"
        "for line in open('/proc/self/smaps'):\n"
        "    if '-' in line.split()[0] and ':' not in line.split()[0]: mine = sys.argv[1] in line\n"
        "    elif mine and 'kB' in line: found[line.split(':')[0]] = int(line.split()[1])\n"
        "print(found['Rss'], found['Pss'], found['Private_Dirty'])\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(big.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "up\n"
    for child in children:
        rss, pss, dirty = map(int, child.communicate("\n")[0].split())
        assert dirty == 0
        assert rss > 10_000
    assert pss <= rss


# -- contexts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, torch.enable_grad, lambda: torch.device("cpu")]
)
def test_contexts_of_torch_change_nothing(folder, way, context):
    wanted = load(folder.path, way)(IDS).logits
    with context():
        model = load(folder.path, way)
    assert torch.equal(model(IDS).logits, wanted)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    floating = [p for p in model.parameters() if p.is_floating_point()]
    usual = [p for p in load(folder.path, way).parameters() if p.is_floating_point()]
    assert [p.requires_grad for p in floating] == [p.requires_grad for p in usual]
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 5)


def test_what_was_loaded_in_inference_mode_can_be_trained(folder):
    with torch.inference_mode():
        model = load(folder.path, "same")
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_the_default_dtype_of_torch_is_not_the_models(folder, way, dtype):
    wanted = load(folder.path, way)
    torch.set_default_dtype(dtype)
    try:
        model = load(folder.path, way)
        assert torch.get_default_dtype() == dtype
        assert {k: v.dtype for k, v in model.state_dict().items()} == {
            k: v.dtype for k, v in wanted.state_dict().items()
        }
        assert {k: v.dtype for k, v in model.named_buffers()} == {
            k: v.dtype for k, v in wanted.named_buffers()
        }
        logits = model(IDS).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits, wanted(IDS).logits)


@pytest.mark.parametrize("way", WAYS)
def test_the_meta_context_is_refused_or_escaped(folder, way):
    with torch.device("meta"):
        if "device_map" in WAYS[way]:
            model = load(folder.path, way)
            assert not any(p.is_meta for p in model.parameters())
        else:
            with pytest.raises(PretrainedError, match=r"torch\.device\('meta'\)"):
                load(folder.path, way)


def test_deterministic_mode_and_its_poison(folder):
    torch.use_deterministic_algorithms(True)
    try:
        for way in WAYS:
            assert load(folder.path, way)(IDS).logits.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_new_models_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = LlamaForCausalLM.from_config(tiny_llama().config)
    model(IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_random_numbers_are_left_alone(folder):
    for way in WAYS:
        torch.manual_seed(3)
        wanted = torch.rand(3)
        torch.manual_seed(3)
        load(folder.path, way)
        assert torch.equal(torch.rand(3), wanted), way
