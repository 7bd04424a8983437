# SPDX-License-Identifier: Apache-2.0
"""The picture: sound XML, a column for each device, every area labelled, heights to scale."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pretrained.core.placement import plan_placement
from pretrained.core.plan_picture import draw
from pretrained.core.skeleton import ParamSpec, Skeleton

SVG = "{http://www.w3.org/2000/svg}"


def picture(loads, budgets, **arguments):
    keys = [f"layers.{index}.w" for index in range(len(loads))]
    skeleton = Skeleton({key: ParamSpec(key, (1,), key[:-2]) for key in keys})
    placement = plan_placement(skeleton, dict(zip(keys, loads, strict=True)), budgets, **arguments)
    return ElementTree.fromstring(draw(placement, "a <model> & more"))


def texts(tree):
    return [element.text for element in tree.iter(f"{SVG}text")]


def areas(tree):
    """Return (x, height) of the areas, the background left out."""
    found = [(rect.get("x"), rect.get("height")) for rect in tree.findall(f"{SVG}rect") if rect.get("x")]
    return [(float(x), float(height)) for x, height in found]


def test_devices_blocks_and_free_room_are_labelled():
    tree = picture([1000, 1000, 1000, 1000], {0: 3500, "cpu": 1500, "disk": None})
    words = texts(tree)
    assert words[0] == "a <model> & more"
    assert {"GPU 0", "cpu", "disk"} <= set(words)
    assert "layers.{0..1}  2.0 kB" in words
    assert "kept for blocks that return  1.0 kB" in words
    assert "free  500 B" in words
    assert "offloaded blocks run on GPU 0" in words[1]


def test_heights_are_to_scale():
    found = areas(picture([3000, 1000], {0: 3000, 1: 1000}))
    assert len({x for x, _ in found}) == 2
    assert found[0][1] == pytest.approx(3 * found[1][1], abs=0.2)


def test_much_free_room_is_cut_short():
    tree = picture([1000], {0: 10**9})
    assert len(tree.findall(f"{SVG}polyline")) == 1
    heights = [height for _, height in areas(tree)]
    assert heights[1] == pytest.approx(0.3 * heights[0], abs=0.2)
    assert not picture([1000], {0: 1100}).findall(f"{SVG}polyline")


def test_labels_do_not_touch_and_stay_inside():
    keys = [f"part{index}.w" for index in range(40)]
    skeleton = Skeleton({key: ParamSpec(key, (1,)) for key in keys})
    placement = plan_placement(skeleton, dict.fromkeys(keys, 1) | {keys[0]: 10**6}, {0: None})
    tree = ElementTree.fromstring(draw(placement, "many"))
    heights = sorted(float(text.get("y")) for text in tree.iter(f"{SVG}text") if "part" in text.text)
    assert len(heights) == 40
    assert min(above - below for below, above in pairwise(heights)) >= 16.9
    assert heights[0] > 70
    assert heights[-1] < float(tree.get("height"))


def test_nothing_to_draw():
    assert texts(picture([], {0: 0, "cpu": 0}))[0] == "a <model> & more"
