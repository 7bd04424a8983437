# SPDX-License-Identifier: Apache-2.0
"""The collector waits for the end of a block, and is never left off by it."""

from __future__ import annotations

import gc
import threading

import pytest

from pretrained.core.collector import no_collection


@pytest.fixture(autouse=True)
def collector():
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


def test_nothing_is_collected_inside_and_the_collector_is_on_afterwards():
    seen: list[str] = []
    note = lambda phase, info: seen.append(phase)  # noqa: E731
    gc.callbacks.append(note)
    try:
        with no_collection():
            kept = [[] for _ in range(gc.get_threshold()[0] * 20)]
            assert not seen
        kept += [[] for _ in range(gc.get_threshold()[0] * 20)]
        assert seen
    finally:
        gc.callbacks.remove(note)


def test_an_error_switches_it_on_again():
    with pytest.raises(ZeroDivisionError), no_collection():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_what_the_user_switched_off_stays_off():
    gc.disable()
    with no_collection():
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_two_threads_that_overlap_leave_it_on():
    inside, left = threading.Event(), threading.Event()

    def other():
        with no_collection():
            inside.set()
            left.wait(10)

    with no_collection():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
    assert gc.isenabled()
    left.set()
    thread.join()
    assert gc.isenabled()


def test_a_model_is_built_without_a_collection():
    from pretrained import LlamaConfig, LlamaForCausalLM
    from pretrained.torch.load import build_empty

    seen: list[bool] = []

    class Watched(LlamaForCausalLM):
        def __init__(self, config):
            seen.append(gc.isenabled())
            super().__init__(config)

    build_empty(Watched, LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1))
    assert seen == [False] and gc.isenabled()
