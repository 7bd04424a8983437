# SPDX-License-Identifier: Apache-2.0
"""Building without memory: shapes only, no compiler stack, no trace in other threads."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from pretrained.torch.empty import no_memory


def test_modules_have_shapes_and_no_memory():
    with no_memory():
        layer = nn.Sequential(nn.Linear(3, 5), nn.Embedding(7, 3, padding_idx=0), nn.LayerNorm(4))
        table = torch.arange(6).view(2, 3)
    assert all(tensor.is_meta for tensor in layer.parameters())
    assert [tuple(p.shape) for p in layer.parameters()] == [(5, 3), (5,), (7, 3), (4,), (4,)]
    assert table.is_meta and table.shape == (2, 3)
    assert not torch.zeros(1).is_meta


@pytest.mark.parametrize(
    "fill",
    [
        nn.init.normal_,
        nn.init.trunc_normal_,
        nn.init.xavier_uniform_,
        lambda tensor: nn.init.constant_(tensor=tensor, val=3.0),
        lambda tensor: tensor.normal_(),
        lambda tensor: tensor.uniform_(0, 1),
        lambda tensor: tensor.zero_(),
        lambda tensor: tensor.fill_(3.0),
    ],
)
def test_fills_return_their_tensor(fill):
    with no_memory():
        tensor = torch.empty(3, 4)
        assert fill(tensor) is tensor and tensor.is_meta


def test_tensors_with_memory_are_filled_as_ever():
    real = torch.zeros(2, device="cpu")
    with no_memory():
        nn.init.constant_(real, 3.0)
        other = torch.empty(2, device="cpu").fill_(4.0)
    assert real.tolist() == [3.0, 3.0] and other.tolist() == [4.0, 4.0]


def test_it_ends_with_an_error_too():
    with pytest.raises(ValueError, match="inside"), no_memory():
        raise ValueError("inside")
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_device().type == "cpu"


def test_other_threads_keep_their_memory():
    entered, checked, found = threading.Event(), threading.Event(), []

    def other():
        entered.wait(5)
        found.append(nn.Linear(2, 2).weight.is_meta)
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with no_memory():
        entered.set()
        assert checked.wait(5)
        assert nn.Linear(2, 2).weight.is_meta
    thread.join()
    assert found == [False]


def test_the_compiler_stack_stays_unloaded():
    script = (
        "import sys; from torch import nn; from pretrained.torch.empty import no_memory\n"
        "with no_memory(): nn.Linear(3, 5); nn.Embedding(7, 3, padding_idx=0); nn.LayerNorm(4)\n"
        "print(sorted({'torch._inductor', 'torch._dynamo', 'sympy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
