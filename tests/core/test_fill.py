# SPDX-License-Identifier: Apache-2.0
"""The cuts against brute force over every cut there is."""

from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrained.core.fill import fill_in_order, least_ceiling, least_ends, running_totals, spare_first, spread

LOADS = st.lists(st.integers(0, 12), min_size=1, max_size=8)
ROOMS = st.lists(st.integers(-3, 30), min_size=1, max_size=4)


def every_cut(count, devices):
    """Yield the ends of every way to cut `count` units into consecutive runs, all placed."""
    for inner in combinations_with_replacement(range(count + 1), devices - 1):
        yield [*inner, count]


def shares(loads, ends):
    return [sum(loads[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def fits(found, rooms):
    return all(share == 0 or share <= room for share, room in zip(found, rooms, strict=True))


def fitting_cuts(loads, rooms):
    found = [shares(loads, ends) for ends in every_cut(len(loads), len(rooms))]
    return [cut for cut in found if fits(cut, rooms)]


def best_ceiling(loads, rooms):
    return min(map(max, fitting_cuts(loads, rooms)), default=None)


@given(LOADS, ROOMS)
@settings(max_examples=150, deadline=None)
def test_the_fullest_device_is_as_empty_as_can_be(loads, rooms):
    totals = running_totals(loads)
    best = best_ceiling(loads, rooms)
    if sum(loads):
        assert least_ceiling(totals, rooms) == best
    ends = spread(totals, rooms)
    assert (ends is None) == (least_ceiling(totals, rooms) is None)
    if ends is not None and sum(loads):
        found = shares(loads, ends)
        assert ends[-1] == len(loads)
        assert ends == sorted(ends)
        assert max(found) == best
        assert fits(found, rooms)


@given(LOADS, ROOMS)
@settings(max_examples=150, deadline=None)
def test_filling_in_order_reaches_as_far_as_any_cut(loads, rooms):
    ends = fill_in_order(running_totals(loads), rooms)
    assert fits(shares(loads, ends), rooms)
    for count in range(ends[-1] + 1, len(loads) + 1):
        assert best_ceiling(loads[:count], rooms) is None or sum(loads[:count]) == 0


@given(LOADS, ROOMS)
@settings(max_examples=150, deadline=None)
def test_the_first_device_is_spared(loads, rooms):
    totals = running_totals(loads)
    ends = spare_first(totals, rooms)
    fitting = fitting_cuts(loads, rooms)
    if not sum(loads):
        return
    assert (ends is None) == (not fitting)
    if ends is not None and len(rooms) > 1:
        found = shares(loads, ends)
        assert found[0] == min(cut[0] for cut in fitting)
        assert max(found[1:]) == min(max(cut[1:]) for cut in fitting if cut[0] == found[0])


@pytest.mark.parametrize(
    ("loads", "rooms", "expected"),
    [
        # The lowest ceiling of 2 would leave the last device empty; even shares do not.
        ([1] * 6, [9, 9, 9, 9], [2, 2, 1, 1]),
        ([4, 1, 1, 1, 1], [9, 9], [4, 4]),
        ([1, 1, 1, 1], [1, 9], [1, 3]),
        ([5], [1, 9], [0, 5]),
    ],
)
def test_even_shares(loads, rooms, expected):
    found = shares(loads, spread(running_totals(loads), rooms))
    assert sorted(found) == sorted(expected)


def test_a_device_with_less_than_no_room_takes_nothing_not_even_what_has_no_size():
    assert spread(running_totals([1, 0]), [1, -1]) == [2, 2]
    assert spare_first(running_totals([1]), [-1, 1]) == [0, 1]


def test_least_ends():
    totals = running_totals([3, 1, 1, 1])
    assert least_ends(totals, [9, 1, 2]) == [1, 2, 4]
    assert least_ends(totals, [9, 9, 9]) == [0, 0, 4]
