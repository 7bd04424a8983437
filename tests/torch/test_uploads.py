# SPDX-License-Identifier: Apache-2.0
"""Loading onto a device that finishes every copy as late as it may."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from pretrained.core.plan import LoadStep
from pretrained.core.reader import MappedFiles
from pretrained.core.safetensors_file import read_safetensors_header
from pretrained.torch import load
from pretrained.torch import uploads as module
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.staging import Stager
from pretrained.torch.tensors import TORCH_DTYPES, mapped_reader
from pretrained.torch.uploads import Uploads
from support.cases import TINY_LLAMA
from support.fake_accelerator import FakeRuntime, Inline

# Stands for the accelerator: the reader asks only whether it is the CPU.
DEVICE = torch.device("meta")
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def steps(tmp_path):
    """A function that returns the steps of a file with weights of one dtype, and the weights."""

    def make(stored, wanted):
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (64, 33), "b": (7,), "c": (), "d": (0, 4), "e": (300, 300)}
        weights = {
            name: torch.randn(shape, generator=generator).to(TORCH_DTYPES[stored])
            for name, shape in shapes.items()
        }
        path = tmp_path / f"{stored}.safetensors"
        save_file(weights, path)
        infos = read_safetensors_header(path).tensors
        return [LoadStep(name, infos[name], wanted) for name in shapes], weights

    return make


def loaded(steps, fake):
    files = MappedFiles()
    with Uploads(files, runtimes=lambda device: fake, piece=4096) as uploads:
        read = mapped_reader(files)
        return {step.key: uploads.read(step, DEVICE, read) for step in steps}


@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_values_are_the_files_cast(steps, stored, wanted):
    made, weights = steps(stored, wanted)
    fake = FakeRuntime()
    found = loaded(made, fake)
    for name, weight in weights.items():
        expected = weight.to(TORCH_DTYPES[wanted])
        if weight.numel():
            assert torch.equal(found[name], expected), name
            assert found[name].shape == weight.shape and found[name].dtype == expected.dtype


def test_the_narrower_dtype_crosses(steps):
    for stored, wanted in (("float32", "bfloat16"), ("bfloat16", "float32")):
        made, weights = steps(stored, wanted)
        fake = FakeRuntime()
        loaded(made, fake)
        # A cast on the device is a second copy there.
        crossed = 2 * sum(weight.numel() for weight in weights.values())
        assert fake.bytes_sent == (crossed if stored == "float32" else 2 * crossed)


def test_values_are_there_only_at_the_end_and_threads_end_with_it(steps):
    made, weights = steps("float32", "float32")
    fake, before = FakeRuntime(), threading.active_count()
    with Uploads(runtimes=lambda device: fake) as uploads:
        late = uploads.read(made[0], DEVICE, mapped_reader())
        assert not torch.equal(late, weights["a"])
    assert torch.equal(late, weights["a"])
    assert threading.active_count() == before


def test_what_waits_to_be_read_is_bounded(steps, monkeypatch):
    made, weights = steps("float32", "float32")
    monkeypatch.setattr(module, "WINDOW", 10_000)
    fake = FakeRuntime()
    found = loaded(made * 3, fake)
    assert torch.equal(found["e"], weights["e"])


def test_an_error_is_raised_by_the_load_and_leaves_no_thread(steps):
    made, _ = steps("float32", "float32")
    fake, before = FakeRuntime(), threading.active_count()

    def fail(nbytes):
        raise MemoryError("no page-locked memory")

    fake.pinned = fail
    with pytest.raises(MemoryError, match="no page-locked memory"):
        loaded(made, fake)
    assert threading.active_count() == before
    fake = FakeRuntime()
    with pytest.raises(KeyError), Uploads(runtimes=lambda device: fake) as uploads:
        uploads.read(made[-1], DEVICE, mapped_reader())
        raise KeyError("something else")
    assert threading.active_count() == before


def test_a_device_without_streams_is_copied_to_at_once(steps):
    made, _ = steps("float32", "float32")
    with Uploads(runtimes=lambda device: None) as uploads:
        assert uploads.read(made[0], DEVICE, mapped_reader()).is_meta
        assert not uploads.read(made[0], torch.device("cpu"), mapped_reader()).is_meta


def test_pages_are_given_back_only_of_views_of_the_file(steps, monkeypatch):
    made, weights = steps("float32", "float32")
    released = []
    monkeypatch.setattr(MappedFiles, "release", lambda self, info, *part: released.append((info.key, *part)))
    loaded(made, FakeRuntime())
    assert ("a", 0, 4096) in released and ("a", 8192, 64 * 33 * 4) in released
    assert sum(end - start for _, start, end in released) == sum(weight.nbytes for weight in weights.values())
    del released[:]
    files = MappedFiles()
    with Uploads(files, runtimes=lambda device: FakeRuntime()) as uploads:
        found = uploads.read(made[0], DEVICE, lambda step, device: weights["a"])
    assert torch.equal(found, weights["a"]) and released == []


def test_what_is_no_tensor_is_moved_by_itself(steps):
    made, _ = steps("float32", "float32")

    class Packed:
        def to(self, device):
            return "moved"

    with Uploads(runtimes=lambda device: FakeRuntime()) as uploads:
        assert uploads.read(made[0], DEVICE, lambda step, device: Packed()) == "moved"


def test_a_model_is_loaded_through_uploads(tmp_path, monkeypatch):
    torch.manual_seed(0)
    LlamaForCausalLM.from_config(LlamaForCausalLM.config_class(**TINY_LLAMA)).save_pretrained(tmp_path)
    fake = FakeRuntime()
    monkeypatch.setattr(load, "Uploads", lambda files: Uploads(files, runtimes=lambda device: fake))
    monkeypatch.setattr(load.Homes, "resting", lambda self, key, is_buffer=False: DEVICE)
    monkeypatch.setattr(load, "_fill_derived_buffers", lambda model, homes: None)
    monkeypatch.setattr(load, "_audit", lambda model, new: None)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    assert fake.bytes_sent == sum(weight.nbytes for weight in plain.parameters())
    for name, weight in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)


def test_page_locked_memory_is_bounded():
    fake = FakeRuntime()
    stager = Stager(fake, piece=100, buffers=3, executor=Inline())
    target = fake.empty(5000)
    stager.send(torch.arange(5000).to(torch.uint8), target, after=[fake.event(fake.compute)]).enqueued()
    assert fake.pinned_bytes == 300
