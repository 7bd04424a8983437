# SPDX-License-Identifier: Apache-2.0
"""The report of a load, as text and as the ecosystem's dictionary."""

import pytest

from pretrained.core.report import LoadReport, fold_keys, fold_mismatches, format_bytes


@pytest.mark.parametrize(
    ("keys", "folded"),
    [
        ([], []),
        (["a.weight"], ["a.weight"]),
        (["h.0.w"], ["h.0.w"]),
        (["h.0.w", "h.1.w", "h.2.w"], ["h.{0..2}.w"]),
        (["h.2.w", "x", "h.0.w", "h.1.w"], ["h.{0..2}.w", "x"]),
        (["h.0.w", "h.2.w", "h.3.w", "h.9.w"], ["h.{0,2..3,9}.w"]),
        (["h.0.w", "h.0.b"], ["h.0.w", "h.0.b"]),
        (["0.w", "1.w"], ["{0..1}.w"]),
        (["w.0", "w.1"], ["w.{0..1}"]),
        (["conv1.w", "conv2.w"], ["conv1.w", "conv2.w"]),
        (["a.0.b.0.w", "a.1.b.0.w", "a.0.b.1.w"], ["a.{0..1}.b.0.w", "a.0.b.1.w"]),
        (["a{}.0.w", "a{}.1.w"], ["a{}.{0..1}.w"]),
    ],
)
def test_keys_are_folded(keys, folded):
    assert fold_keys(keys) == folded


def test_mismatches_are_folded_by_their_shapes():
    mismatched = [(f"h.{i}.w", (2,), (3,)) for i in range(3)] + [("h.3.w", (2,), (4,)), ("n", (), (1,))]
    assert fold_mismatches(mismatched) == [
        "h.{0..2}.w: file [2], model [3]",
        "h.3.w: file [2], model [4]",
        "n: file [], model [1]",
    ]


def test_the_text():
    report = LoadReport(
        model="LlamaForCausalLM",
        source="some/folder",
        missing=("score.weight",),
        unexpected=("h.0.x", "h.1.x"),
        mismatched=(("n", (2,), (3,)),),
        errors=("something else",),
    )
    assert str(report) == (
        "LlamaForCausalLM from some/folder\n"
        "  newly initialised (train them before use):\n"
        "    score.weight\n"
        "  newly initialised, for the file's shape differs:\n"
        "    n: file [2], model [3]\n"
        "  not used (another head or architecture):\n"
        "    h.{0..1}.x\n"
        "  something else"
    )
    assert not report.is_plain
    assert report.loading_info() == {
        "missing_keys": ["score.weight"],
        "unexpected_keys": ["h.0.x", "h.1.x"],
        "mismatched_keys": [("n", (2,), (3,))],
        "error_msgs": ["something else"],
    }


def test_a_plain_load():
    report = LoadReport(model="M", source="s", dropped={"x": "derived"}, nbytes_read=5)
    assert report.is_plain
    assert str(report) == "M from s"
    assert not any(report.loading_info().values())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e9, "5.0 GB"), (2e12, "2.00 TB")],
)
def test_bytes_as_people_write_them(count, text):
    assert format_bytes(count) == text
