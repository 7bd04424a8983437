# SPDX-License-Identifier: Apache-2.0
"""Sizes, homes and budgets as people write them."""

from pathlib import Path

import pytest

from pretrained.core import budgets
from pretrained.core.budgets import (
    accelerators_of,
    available_host_memory,
    in_order,
    parse_budget_text,
    parse_budgets,
    parse_home,
    parse_size,
)
from pretrained.errors import PlacementError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (5000, 5000),
        ("5000", 5000),
        ("10GiB", 10 * 2**30),
        ("10GB", 10**10),
        ("10 gb", 10**10),
        ("1.5MiB", 3 * 2**19),
        ("200KB", 200_000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [-1, True, 1.5, None, "", "ten", "10 GiBs", "GiB", "-3GB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(PlacementError, match="This is not an amount of memory"):
        parse_size(text)


def test_bits_are_not_guessed_at():
    with pytest.raises(PlacementError, match=r"found '10Gb'\. Write 10GB for bytes"):
        parse_size("10Gb")


class Device:
    """Stands for a framework's device object, which is known by its text."""

    def __str__(self):
        return "cuda:3"


@pytest.mark.parametrize(
    ("value", "home"),
    [
        (0, 0),
        ("1", 1),
        ("cuda", 0),
        ("cuda:2", 2),
        (Device(), 3),
        ("xpu:1", 1),
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("disk", "disk"),
        ("mps", "mps"),
        ("meta", "meta"),
    ],
)
def test_homes(value, home):
    assert parse_home(value) == home


def test_a_negative_index_is_refused():
    with pytest.raises(
        PlacementError, match=r"A device index is a number from 0 on \(device_map\): found -1"
    ):
        parse_home(-1)


@pytest.mark.parametrize("value", ["cuad:0", "gpu", "", None, True, 1.0, "cuda:x"])
def test_what_is_no_home(value):
    with pytest.raises(PlacementError, match="Unknown device"):
        parse_home(value)


def test_a_slip_is_named():
    with pytest.raises(PlacementError, match=r"Did you mean 'cuda:0'\?"):
        parse_home("cuad:0")


def test_budgets_come_in_the_order_of_filling_and_the_disk_is_always_there():
    found = parse_budgets({"cpu": "30GiB", 1: 5, "cuda:0": "1KB"})
    assert list(found.items()) == [(0, 1000), (1, 5), ("cpu", 30 * 2**30), ("disk", None)]
    assert parse_budgets({"disk": 7, "cpu": None}) == {"cpu": None, "disk": 7}


def test_a_device_named_twice():
    with pytest.raises(PlacementError, match="A device is named twice"):
        parse_budgets({0: "1GB", "cuda:0": "2GB"})


def test_a_wrong_budget_is_named_by_its_device():
    with pytest.raises(PlacementError, match=r"max_memory\['cpu'\]"):
        parse_budgets({"cpu": "lots"})


def test_the_command_lines_spelling():
    assert parse_budget_text("0=10GiB, cpu=3GB") == {0: 10 * 2**30, "cpu": 3 * 10**9, "disk": None}


@pytest.mark.parametrize("text", ["10GiB", "0=1GB,0=2GB", "0=1GB,", ""])
def test_the_command_lines_spelling_is_checked(text):
    with pytest.raises(PlacementError, match="This is not a list of budgets"):
        parse_budget_text(text)


def test_orders():
    homes = ["disk", "cpu", "mps", 2, 0]
    assert in_order(homes) == [0, 2, "mps", "cpu", "disk"]
    assert accelerators_of(homes) == [0, 2, "mps"]


def test_free_memory_of_this_machine():
    left = available_host_memory()
    assert left is None or left > 0


def test_a_memory_group_limits_what_the_system_has(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    assert budgets._group_left(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert budgets._group_left(tmp_path) is None
    assert budgets._group_left(tmp_path / "absent") is None


def test_a_memory_group_of_the_older_interface(tmp_path):
    (tmp_path / "memory.limit_in_bytes").write_text("1000")
    (tmp_path / "memory.usage_in_bytes").write_text("900")
    (tmp_path / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 50\ntotal_active_file 5\n")
    assert budgets._group_left(tmp_path) == 155
    (tmp_path / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert budgets._group_left(tmp_path) is None


def test_the_groups_of_this_process_are_asked_from_the_root_down(tmp_path):
    (tmp_path / "cgroup").write_text("4:memory,hugetlb:/job/step\n3:cpuset:/\n0::/user/me\n")
    root = Path("/groups")
    assert budgets._group_folders(tmp_path / "cgroup", root) == [
        root,
        root / "memory",
        root / "memory" / "job",
        root / "memory" / "job" / "step",
        root / "user",
        root / "user" / "me",
    ]
    assert budgets._group_folders(tmp_path / "absent", root) == [root, root / "memory"]
