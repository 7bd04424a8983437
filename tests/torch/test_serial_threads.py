# SPDX-License-Identifier: Apache-2.0
"""Threads whose operators stay on one core."""

import threading

import torch

from pretrained.torch.serial_threads import serial_pool


def test_only_its_own_threads_are_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with serial_pool(2) as pool:
            assert {future.result() for future in [pool.submit(torch.get_num_threads) for _ in range(4)]} == {
                1
            }
            assert torch.get_num_threads() == 3
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [3]
    finally:
        torch.set_num_threads(before)


def test_the_pool_works_where_the_runtime_is_out_of_reach(monkeypatch):
    monkeypatch.setattr("pretrained.torch.serial_threads._omp_set_num_threads", lambda: None)
    with serial_pool() as pool:
        assert pool.submit(lambda: int(torch.ones(3).sum())).result() == 3
