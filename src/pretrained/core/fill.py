# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of placement: a row of loads cut into consecutive runs, one for each device.

Runs keep module order, so that activations pass from device to device once. All functions take the running
totals of the loads (``totals[i]`` is the sum of the first i), which makes every cut a binary search.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

Totals = Sequence[int]


def running_totals(loads: Iterable[int]) -> list[int]:
    """Return the sums of the first 0, 1, 2, ... loads.

    Args:
        loads: Bytes of each unit.
    """
    return [0, *accumulate(loads)]


def fill_in_order(totals: Totals, rooms: Sequence[int]) -> list[int]:
    """Fill each device as far as it goes, then the next.

    Args:
        totals: Of the loads.
        rooms: Bytes each device can take; negative ones take nothing.

    Returns:
        For each device the end of its run. The last one is the most units that any cut can place.
    """
    ends, at = [], 0
    for room in rooms:
        at = max(at, bisect_right(totals, totals[at] + room) - 1)
        ends.append(at)
    return ends


def least_ceiling(totals: Totals, rooms: Sequence[int]) -> int | None:
    """Return the least load that the fullest device can have with all units placed, None if they do not fit.

    Args:
        totals: Of the loads.
        rooms: Bytes each device can take.
    """
    count = len(totals) - 1

    def fits(ceiling: int) -> bool:
        ends = fill_in_order(totals, [min(room, ceiling) for room in rooms])
        return (ends[-1] if ends else 0) == count

    low, high = 0, totals[-1]
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def spread(totals: Totals, rooms: Sequence[int]) -> list[int] | None:
    """Cut all units into runs as even as the rooms allow, or return None if they do not fit.

    No cut has a lower fullest device; below that ceiling each device's share is brought near the mean of what
    is left for it and those after it.

    Args:
        totals: Of the loads.
        rooms: Bytes each device can take.
    """
    ceiling = least_ceiling(totals, rooms)
    if ceiling is None:
        return None
    rooms = [min(room, ceiling) for room in rooms]
    least = least_ends(totals, rooms)
    ends, at = [], 0
    for index, room in enumerate(rooms):
        most = max(at, bisect_right(totals, totals[at] + room) - 1)
        mean = totals[at] + (totals[-1] - totals[at]) / (len(rooms) - index)
        nearest = bisect_left(totals, mean)
        if nearest > 0 and mean - totals[nearest - 1] <= totals[min(nearest, len(totals) - 1)] - mean:
            nearest -= 1
        at = min(max(nearest, least[index], at), most)
        ends.append(at)
    return ends


def least_ends(totals: Totals, rooms: Sequence[int]) -> list[int]:
    """Return for each device the least end of its run that leaves no more than fits on those after it.

    Args:
        totals: Of the loads.
        rooms: Bytes each device can take.
    """
    ends = [len(totals) - 1]
    for room in reversed(rooms[1:]):
        last = ends[-1]
        ends.append(last if room < 0 else min(last, bisect_left(totals, totals[last] - room)))
    return ends[::-1]


def spare_first(totals: Totals, rooms: Sequence[int]) -> list[int] | None:
    """Cut all units so that the first device gets as little as possible and the others even shares, or None.

    Args:
        totals: Of the loads.
        rooms: Bytes each device can take.
    """
    if len(rooms) == 1:
        return spread(totals, rooms)
    first = least_ends(totals, rooms)[0]
    if first > 0 and totals[first] > rooms[0]:
        return None
    rest = [total - totals[first] for total in totals[first:]]
    ends = spread(rest, rooms[1:])
    return None if ends is None else [first, *(first + end for end in ends)]
