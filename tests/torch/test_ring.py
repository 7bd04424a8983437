# SPDX-License-Identifier: Apache-2.0
"""Weights that come through a ring, on a device that is as late as it may be: same values, always."""

import copy
import gc
import random
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pretrained.arch.skeletons import policy_for, skeleton_for
from pretrained.core.budgets import parse_budgets
from pretrained.core.placement import plan_placement
from pretrained.core.units import weight_sizes
from pretrained.errors import ArgumentError, CheckpointError
from pretrained.torch.dispatch import Homes, attach, remove_hooks
from pretrained.torch.models.bert import BertForMaskedLM
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from pretrained.torch.offload import DiskWeights
from pretrained.torch.ring import Ring, Source, references_to, room_for
from pretrained.torch.staging import Stager
from support.cases import TINY_LLAMA
from support.cases_bert import TINY_BERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5
from support.fake_accelerator import FakeRuntime, Inline, Race

FAMILIES = {
    "llama": (LlamaForCausalLM, TINY_LLAMA),
    "t5": (T5ForConditionalGeneration, TINY_T5),
    "bert": (BertForMaskedLM, TINY_BERT),
    "gpt2": (GPT2LMHeadModel, TINY_GPT2),
}
CPU = Homes({"": "cpu"}, torch.device("cpu"))


class Blocks(nn.Module):
    """Blocks that run in an order given with the call."""

    def __init__(self, count=6, size=32):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.LayerNorm(size), nn.Linear(size, size * (1 + i % 2)))
            for i in range(count)
        )

    def forward(self, x, order):
        for index in order:
            x = x + self.blocks[index](x)[..., : x.shape[-1]].tanh()
        return x


def through_ring(model, *, homes=CPU, store=None, runtime=None, capacity=None, inline=True, piece=1024):
    """Attach a ring on a fake device and return the device."""
    fake = runtime or FakeRuntime()
    attach(model, homes, store or DiskWeights(), runtimes=lambda device: fake)
    ring = ring_of(model)
    ring.stager = Stager(fake, piece=piece, buffers=3, executor=Inline() if inline else None)
    if capacity is not None:
        ring.capacity = capacity
    return fake


def ring_of(model):
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return next(hook.__self__.ring for hook in hooks if getattr(hook.__self__, "ring", None) is not None)


def inputs_of(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def family(name, **changes):
    cls, values = FAMILIES[name]
    torch.manual_seed(3)
    return cls.from_config(cls.config_class(**{**values, **changes})).eval()


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "threads"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_the_resident_models_bit_for_bit(name, tied, inline):
    model = family(name, tie_word_embeddings=tied)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    fake = through_ring(model, inline=inline)
    with torch.no_grad(), fake.watch():
        for _ in range(2):
            assert torch.equal(model(**inputs).logits, expected)
    assert fake.bytes_sent > 0


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_blocks_gives_the_same_values(seed):
    pick = random.Random(seed)
    model, plain = Blocks(), Blocks()
    capacity = pick.choice([0, 4_000, 9_000, 17_000, 60_000, 10**7])
    fake = through_ring(model, capacity=capacity, inline=seed % 2 == 0, piece=pick.choice([64, 1000, 10**6]))
    x = torch.randn(4, 32)
    order = list(range(6))
    for _ in range(6):
        if pick.random() < 0.5:
            order = [pick.randrange(6) for _ in range(pick.randrange(1, 10))]
        expected = plain(x, order)
        with torch.inference_mode(pick.random() < 0.3), torch.no_grad(), fake.watch():
            assert torch.equal(model(x, order), expected)
        if pick.random() < 0.3:
            # An edit between forwards, also one that torch does not count, is seen by the next.
            index, value = pick.randrange(6), pick.random()
            for one in (model, plain):
                weight = one.blocks[index][0].weight
                (weight.data if seed % 3 else weight.detach()).mul_(1 + value)


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_generate_gives_the_same_ids(name, prompt):
    model = family(name)
    ids = torch.randint(3, 90, (1, prompt), generator=torch.Generator().manual_seed(2))
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    fake = through_ring(model)
    with fake.watch():
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_weights_on_disk_come_through_the_ring(tmp_path):
    made = family("llama")
    made.save_pretrained(tmp_path)
    inputs = inputs_of(made)
    with torch.no_grad():
        expected = made(**inputs).logits
    for home in ({"": "disk"}, {"": "cpu", "model.layers.0": "disk", "lm_head": "disk"}):
        model = LlamaForCausalLM.from_pretrained(tmp_path, device_map=home)
        fake = through_ring(model, homes=model._dispatch.homes, store=model._dispatch.store, inline=False)
        with torch.no_grad(), fake.watch():
            for _ in range(2):
                assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.lm_head.weight, made.lm_head.weight)


def test_a_changed_file_is_an_error_with_a_ring_too(tmp_path):
    family("llama").save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"})
    through_ring(model, homes=model._dispatch.homes, store=model._dispatch.store)
    inputs = inputs_of(model)
    with torch.no_grad():
        model(**inputs)
        (file,) = tmp_path.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-64])
        with pytest.raises(CheckpointError, match="cut short under a model"):
            model(**inputs)


# -- what could go wrong -------------------------------------------------------------------------


class ViewOfWeight(nn.Module):
    """Gives out a view of its weight, as tables of positions do."""

    def __init__(self, value, size=32):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size, size), float(value)), requires_grad=False)

    def forward(self):
        return self.weight[:4]


class Views(nn.Module):
    def __init__(self, count=8):
        super().__init__()
        self.parts = nn.ModuleList(ViewOfWeight(index) for index in range(count))

    def forward(self):
        return [part() for part in self.parts]


def test_outputs_that_are_views_of_weights_keep_their_values():
    model = Views()
    fake = through_ring(model, capacity=2 * 4096)
    for _ in range(2):
        outputs = model()
        assert [float(output.mean()) for output in outputs] == list(range(8))
    assert fake.bytes_allocated >= 16 * 4096


def test_gradients_flow_through_frozen_weights():
    model, plain = Blocks().requires_grad_(False), Blocks().requires_grad_(False)
    fake = through_ring(model, capacity=9_000)
    order = [0, 1, 2, 3, 4, 5, 0]
    x, y = (torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "xy")
    plain(y, order).square().sum().backward()
    with fake.watch():
        model(x, order).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_training_what_is_brought_in_is_refused():
    model = Blocks().train()
    through_ring(model)
    with pytest.raises(ArgumentError, match=r"placed on 'cpu' cannot be trained \(blocks\.0\.0\.weight\)"):
        model(torch.randn(1, 32), [0])
    model.eval()
    model(torch.randn(1, 32), [0])


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self):
        self.seen.add_(1)
        return self.seen.clone()


def test_an_edit_by_a_forward_does_not_reach_the_next_use():
    model = nn.ModuleList([Counter()])
    root = nn.Module()
    root.counter = model[0]
    root.forward = lambda: [root.counter() for _ in range(3)]
    through_ring(root, homes=Homes({"": "cpu"}, torch.device("cpu"), True), capacity=10**6)
    assert all(torch.equal(value, torch.ones(8)) for value in root())


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.fails = True

    def forward(self, x):
        x = self.inner(x)
        if self.fails:
            raise ValueError("on purpose")
        return x


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), Failing(), nn.Linear(32, 32)).requires_grad_(False)
    x = torch.randn(2, 32)
    resting = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    fake = through_ring(model)
    for _ in range(3):
        with pytest.raises(ValueError, match="on purpose"), fake.watch():
            model(x)
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == resting
    model[1].fails = False
    with fake.watch():
        result = model(x)
    remove_hooks(model)
    assert torch.equal(result, model(x))


def test_an_error_while_reading_a_weight_is_raised_where_the_weight_is_needed(monkeypatch):
    model = Blocks(2)
    fake = through_ring(model, inline=False)
    x = torch.randn(1, 32)
    with torch.no_grad():
        expected = model(x, [0, 1])
        good = fake.copy
        monkeypatch.setattr(fake, "copy", lambda *args: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            model(x, [0, 1])
        monkeypatch.setattr(fake, "copy", good)
        assert torch.equal(model(x, [0, 1]), expected)


def test_two_threads_run_one_model():
    model, plain = Blocks(), Blocks()
    fake = through_ring(model, capacity=12_000, inline=False)
    wrong = []

    def run(seed):
        pick = random.Random(seed)
        for _ in range(10):
            x = torch.randn(2, 32, generator=torch.Generator().manual_seed(pick.randrange(99)))
            order = [pick.randrange(6) for _ in range(6)]
            with torch.no_grad():
                if not torch.equal(model(x, order), plain(x, order)):
                    wrong.append(order)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert fake.bytes_sent


def test_modules_within_modules_and_calls_of_parts_alone():
    class Nested(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.scale = nn.Parameter(torch.full((32,), 0.5), requires_grad=False)
            self.inner = inner

        def forward(self, x):
            return self.inner(x * self.scale) * self.scale

    torch.manual_seed(0)
    model = Nested(Nested(nn.Linear(32, 32))).requires_grad_(False)
    x = torch.randn(2, 32)
    expected, alone = model(x), model.inner.inner(x)
    fake = through_ring(model, capacity=1)
    with fake.watch():
        assert torch.equal(model(x), expected)
        assert torch.equal(model.inner.inner(x), alone)


# -- economy -------------------------------------------------------------------------------------


def test_the_ring_stays_within_its_room_and_sends_each_weight_once():
    model = Blocks().requires_grad_(False)
    fake = through_ring(model)
    sizes = [[weight.nbytes for weight in block.parameters()] for block in model.blocks]
    capacity = ring_of(model).capacity
    assert capacity == sum(-(-size // 512) * 512 for size in sizes[1])
    x = torch.randn(2, 32)
    for count in range(1, 4):
        model(x, range(6))
        assert fake.bytes_sent == count * sum(map(sum, sizes))
    assert fake.pinned_bytes <= 3 * 1024
    assert ring_of(model)._taken <= capacity


def test_what_follows_is_on_its_way_before_it_is_asked_for():
    model = Blocks().requires_grad_(False)
    fake = through_ring(model)
    order = [4, 2, 0, 5, 1]
    model(torch.randn(2, 32), order)
    start, sent = fake.bytes_sent, []
    for index in order:
        model.blocks[index][0].register_forward_pre_hook(lambda *_: sent.append(fake.bytes_sent - start))
    model(torch.randn(2, 32), order)
    sizes = [[weight.nbytes for weight in model.blocks[index].parameters()] for index in order]
    for at in range(len(order)):
        # More than what has run and the first layer of this block, which is about to run.
        assert sent[at] > sum(map(sum, sizes[:at])) + sum(sizes[at][:2])
    assert fake.bytes_sent - start == sum(map(sum, sizes))


@pytest.mark.parametrize("edit", ["data", "counted", "replaced"])
def test_an_edit_between_forwards_is_seen_though_the_ring_still_holds_the_old_values(edit):
    model, plain = (Blocks().requires_grad_(False) for _ in range(2))
    through_ring(model, capacity=10**7)
    x = torch.randn(2, 32)
    for _ in range(2):
        assert torch.equal(model(x, range(6)), plain(x, range(6)))
        for one in (model, plain):
            layer = one.blocks[3][0]
            if edit == "data":
                layer.weight.data.mul_(2)
            elif edit == "counted":
                layer.weight.mul_(2)
            else:
                layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)
    assert torch.equal(model(x, range(6)), plain(x, range(6)))


def test_a_weight_of_several_modules_is_sent_once_where_there_is_room():
    model = family("llama", tie_word_embeddings=True)
    fake = through_ring(model, capacity=10**7)
    inputs = inputs_of(model)
    with torch.no_grad():
        model(**inputs)
    assert fake.bytes_sent == sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()])


def test_a_forward_does_not_wait_for_the_device_in_the_callers_thread():
    model = Blocks().requires_grad_(False)
    fake = through_ring(model, inline=False)
    waits = []
    pinned = fake.pinned

    class Watched:
        def __init__(self, event):
            self.event, self.stream, self.position = event, event.stream, event.position

        def synchronize(self):
            waits.append(threading.current_thread())
            self.event.synchronize()

    make = fake.event
    fake.event = lambda stream: Watched(make(stream))
    model(torch.randn(2, 32), range(6))
    assert pinned is not None
    assert waits
    assert threading.current_thread() not in waits


def staging_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pretrained-staging")]


def threads_after(count):
    """Return the threads of rings, once no more than `count` are left or five seconds have passed."""
    gc.collect()
    end = time.monotonic() + 5
    while len(staging_threads()) > count and time.monotonic() < end:
        time.sleep(0.01)
    return staging_threads()


def test_no_thread_and_no_memory_outlives_the_model():
    before = threads_after(0)
    model = Blocks().requires_grad_(False)
    fake = through_ring(model, inline=False)
    model(torch.randn(2, 32), range(6))
    assert len(staging_threads()) > len(before)
    memory = [entry.memory for entry in ring_of(model)._entries.values()]
    assert memory
    del model, fake
    assert len(threads_after(len(before))) == len(before)
    assert all(references_to(one) <= 3 for one in memory)


def test_removing_hooks_ends_the_ring():
    model = Blocks().requires_grad_(False)
    x = torch.randn(2, 32)
    expected = model(x, range(6))
    fake = through_ring(model)
    remove_hooks(model)
    assert torch.equal(model(x, range(6)), expected)
    assert fake.bytes_sent == 0


def test_copying_a_model_with_a_ring_is_refused():
    model = Blocks()
    through_ring(model)
    with pytest.raises(ArgumentError, match="cannot be copied"):
        copy.deepcopy(model)


# -- pieces --------------------------------------------------------------------------------------


def test_room_is_that_of_the_largest_block():
    sizes = {"embed": [1000], "h.0.a": [512, 1], "h.0.b": [512], "h.1.a": [5], "head": [100]}
    assert room_for(sizes) == 3 * 512
    assert room_for({}) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_placement_keeps_the_room_free_that_the_ring_takes(name):
    config = FAMILIES[name][0].config_class(**FAMILIES[name][1])
    skeleton = skeleton_for(config)
    sizes = weight_sizes(skeleton, policy_for(config, "float32"))
    room, offloaded = sum(sizes.values()), []
    while len(offloaded) < len(sizes) // 2:
        room = int(room * 0.9)
        placement = plan_placement(skeleton, sizes, parse_budgets({0: room, "cpu": "1GB"}))
        offloaded = [key for key, home in placement.homes.items() if home == "cpu"]
    parts = {}
    for key in offloaded:
        parts.setdefault(key.rpartition(".")[0], []).append(sizes[key])
    (kept,) = (one.returning for one in placement.rooms if one.home == 0)
    # What the device's allocator rounds up is in no plan.
    assert kept <= room_for(parts) <= kept + 512 * len(offloaded)


@pytest.mark.parametrize("layout", ["plain", "transposed", "channels"])
def test_strides_are_kept(layout):
    tensor = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    if layout == "transposed":
        tensor = tensor.view(6, 20).t()
    if layout == "channels":
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    ring = Ring(FakeRuntime(), 10**6)
    part = type("Part", (), {"sources": lambda self: ()})()
    loan = ring.enter(part, [Source(tensor)])
    assert loan.tensors[0].stride() == tensor.stride()
    assert torch.equal(loan.tensors[0], tensor)
    ring.leave(loan)


def test_the_fake_device_notices_a_use_without_a_wait_and_a_copy_that_comes_too_early():
    fake = FakeRuntime()
    stager = Stager(fake, executor=Inline())
    memory = fake.empty(64)
    start = fake.event(fake.compute)
    sending = stager.send(torch.zeros(64, dtype=torch.uint8), memory, after=[start])
    with fake.watch(), pytest.raises(Race, match="being written"):
        memory + 1
    fake.wait(fake.compute, sending.enqueued())
    with fake.watch():
        assert int((memory + 1).sum()) == 64
    sending = stager.send(torch.zeros(64, dtype=torch.uint8), memory, after=[start])
    with pytest.raises(Race, match="overwrites"):
        sending.enqueued()


def test_a_view_of_a_weight_is_counted_as_a_reference():
    memory = torch.empty(64, dtype=torch.uint8)
    alone = references_to(memory)
    weight = nn.Parameter(memory.view(torch.float32).view(4, 4), requires_grad=False)
    with_weight = references_to(memory)
    x = torch.ones(1, 4, requires_grad=True)
    y = F.linear(x, weight)
    del weight
    assert alone < with_weight
    assert references_to(memory) > alone
    del y
    assert references_to(memory) == alone
