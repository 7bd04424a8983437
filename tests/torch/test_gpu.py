# SPDX-License-Identifier: Apache-2.0
"""What only a real accelerator can say: ``pytest -m gpu``. Skipped where there is none.

The same code is tested against a device on the CPU in test_ring, test_uploads and test_quantized_cuda.
"""

import gc
import threading
import time

import pytest
import torch
from torch import nn

from pretrained.core.quantization import QuantizationConfig
from pretrained.torch.accelerator import runtime_for
from pretrained.torch.big_modeling import cpu_offload
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.quantized import QuantizedLinear
from pretrained.torch.quantized_cuda import can_multiply, pack, unpack
from pretrained.torch.quantized_ops import pack_nibbles
from pretrained.torch.rounding import quantize
from pretrained.torch.staging import Stager
from support.cases import TINY_LLAMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda", 0)
CONFIG = {**TINY_LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM.from_config(LlamaForCausalLM.config_class(**CONFIG), dtype="bfloat16").save_pretrained(
        path
    )
    return path


def ids():
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1)).to(GPU)


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


# -- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [0, "cuda:0", {"": 0}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_a_load_onto_the_device_has_the_files_values(folder, device_map, dtype):
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    for name, weight in expected.named_parameters():
        found = model.get_parameter(name)
        assert found.device == GPU
        assert torch.equal(found.cpu(), weight), name


def test_many_pieces_arrive_whole_and_threads_end():
    stager = Stager(runtime_for(GPU), piece=1 << 16, buffers=3)
    source = torch.randint(0, 255, (50_000_001,), dtype=torch.uint8)
    target = torch.zeros(len(source), dtype=torch.uint8, device=GPU)
    start = stager.runtime.event(stager.runtime.current_stream())
    sending = stager.send(source, target, after=[start])
    stager.runtime.wait(stager.runtime.current_stream(), sending.enqueued())
    assert torch.equal(target.cpu(), source)
    stager.close()
    assert not any(thread.name.startswith("pretrained-staging") for thread in threading.enumerate())


# -- offload -------------------------------------------------------------------------------------

MAPS = {
    "cpu": {"model.embed_tokens": 0, "model": "cpu", "lm_head": "cpu"},
    "disk": {"model.embed_tokens": 0, "model": "disk", "lm_head": 0},
    "mixed": {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "": "cpu"},
}


@pytest.mark.parametrize("homes", MAPS)
def test_offloaded_outputs_are_the_resident_models_bit_for_bit(folder, homes):
    expected = logits(LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map=0))
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map=MAPS[homes])
    for _ in range(5):
        assert torch.equal(logits(model), expected)


def test_generate_under_a_small_budget_gives_the_same_ids(folder):
    arguments = {"max_new_tokens": 12, "do_sample": False}
    plain = LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map=0)
    expected = plain.generate(ids(), **arguments)
    block = sum(weight.nbytes for weight in plain.model.layers[0].parameters())
    budgets = {0: 3 * block, "cpu": 3 * block}
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto", max_memory=budgets)
    assert {0, "cpu"} <= set(model.hf_device_map.values())
    assert torch.equal(model.generate(ids(), **arguments), expected)


def test_a_wrong_guess_an_edit_and_another_stream_give_right_values():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(8))

        def forward(self, x, order):
            for index in order:
                x = self.blocks[index](x).tanh()
            return x

    model, plain = (Blocks().eval().requires_grad_(False) for _ in range(2))
    plain.to(GPU)
    cpu_offload(model, execution_device=GPU)
    x = torch.randn(64, 1024, device=GPU)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        order = torch.randint(0, 8, (6,), generator=generator).tolist()
        with torch.cuda.stream(torch.cuda.Stream() if step % 5 == 4 else torch.cuda.current_stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            assert torch.equal(model(x, order), plain(x, order))
        for one in (model, plain):
            one.blocks[step % 8].weight.data.mul_(0.5)


def test_the_hosts_thread_never_waits_in_a_forward(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map=MAPS["cpu"])
    inputs = ids()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_thread_and_no_device_memory_outlives_an_offloaded_model(folder):
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto", device_map=MAPS["mixed"])
    logits(model)
    del model
    gc.collect()
    torch.cuda.synchronize()
    end = time.monotonic() + 5
    while time.monotonic() < end and any("pretrained" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)
    assert not any("pretrained" in thread.name for thread in threading.enumerate())
    torch.empty(1, device=GPU)
    assert torch.cuda.memory_allocated() <= before + 1024


# -- quantized -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128), (72, 192), (8, 96)])
def test_the_4_bit_layout_is_undone(shape):
    if not can_multiply(*shape, GPU):
        pytest.skip("this device has no 4-bit kernel that is recognised")
    numbers = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack(pack_nibbles(numbers).to(GPU))
    assert torch.equal(unpack(packed).cpu().to(torch.uint8), numbers)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("scheme", [("int8", None, True), ("int4", 32, True), ("int4", 128, False)])
def test_a_quantized_layer_computes_what_its_weight_says(scheme, rows):
    method, group, symmetric = scheme
    config = QuantizationConfig(
        quant_method=method, **({"group_size": group, "symmetric": symmetric} if group else {})
    )
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512), torch.randn(rows, 512)
    leaf = QuantizedLinear(512, 256, config, bias=False, dtype=torch.bfloat16)
    leaf.fill(quantize(weight, config))
    expected = x.to(torch.bfloat16).float() @ leaf.dequantized(torch.float32).t()
    stored = {name: tensor.clone() for name, tensor in leaf.stored().items()}
    leaf.to(GPU)
    leaf.use_kernel_layout()
    found = leaf(x.to(GPU, torch.bfloat16)).float().cpu()
    assert (found - expected).norm() < 0.02 * expected.norm()
    for name, tensor in leaf.stored().items():
        assert torch.equal(tensor.cpu(), stored[name])
    assert torch.equal(leaf.dequantized(torch.float32).cpu(), leaf.cpu().dequantized(torch.float32))


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("device_map", [0, MAPS["cpu"]], ids=["resident", "offloaded"])
def test_a_quantized_model_is_near_the_plain_one(folder, method, device_map):
    plain = logits(LlamaForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map=0)).float()
    settings = {"quantization_config": {"quant_method": method}, "dtype": "bfloat16"}
    on_cpu = LlamaForCausalLM.from_pretrained(folder, **settings)
    with torch.no_grad():
        same = on_cpu(input_ids=ids().cpu()).logits.float()
    found = logits(LlamaForCausalLM.from_pretrained(folder, device_map=device_map, **settings)).float()
    assert (found.cpu() - same).norm() < 0.05 * same.norm()
    assert (found - plain).norm() < (0.05 if method == "int8" else 0.4) * plain.norm()
