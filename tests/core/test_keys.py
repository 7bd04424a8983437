# SPDX-License-Identifier: Apache-2.0
"""Names in files against names in models: every key ends in one place, and renames read both ways."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrained.core.keys import LEGACY_NORM_RULES, Drop, Rename, match_keys
from pretrained.errors import ArgumentError, WeightsError

HEADLESS = ["embed.weight", "layers.0.weight", "norm.weight"]
WITH_HEAD = [*(f"model.{key}" for key in HEADLESS), "lm_head.weight"]


def test_equal_names():
    match = match_keys(WITH_HEAD, WITH_HEAD, base_prefix="model")
    assert match.sources == {key: key for key in WITH_HEAD}
    assert (match.missing, match.unexpected, match.dropped, match.renamed) == ((), (), {}, {})


@pytest.mark.parametrize(
    ("file", "model", "missing", "unexpected"),
    [
        (HEADLESS, WITH_HEAD, ("lm_head.weight",), ()),
        (WITH_HEAD, HEADLESS, (), ("lm_head.weight",)),
        ([f"model.{key}" for key in HEADLESS], [*HEADLESS], (), ()),
    ],
)
def test_a_prefix_more_or_less(file, model, missing, unexpected):
    match = match_keys(file, model, base_prefix="model")
    assert match.missing == missing
    assert match.unexpected == unexpected
    assert match.renamed == {}
    assert len(match.sources) == 3


def test_missing_keys_come_in_the_order_of_the_model():
    match = match_keys(["b"], ["d", "c", "b", "a"])
    assert match.missing == ("d", "c", "a")


def test_ties_share_what_the_file_holds():
    ties = {"lm_head.weight": "model.embed.weight"}
    for held in (["model.embed.weight"], ["lm_head.weight"]):
        match = match_keys(held, ["model.embed.weight", "lm_head.weight"], ties=ties)
        assert match.sources == {"model.embed.weight": held[0], "lm_head.weight": held[0]}
        assert match.missing == ()
    both = ["model.embed.weight", "lm_head.weight"]
    assert match_keys(both, both, ties=ties).sources == {key: key for key in both}
    assert set(match_keys([], both, ties=ties).missing) == set(both)


def test_rules():
    rules = (*LEGACY_NORM_RULES, Drop("*.inv_freq", "derived"), Rename("h.*.mix.*", "layers.*.mixer.*"))
    model = ["bert.x.LayerNorm.weight", "bert.x.LayerNorm.bias", "layers.3.mixer.q"]
    file = ["x.LayerNorm.gamma", "x.LayerNorm.beta", "h.3.mix.q", "rope.inv_freq", "other"]
    match = match_keys(file, model, base_prefix="bert", rules=rules)
    assert match.sources == dict(zip(model, file, strict=False))
    assert match.dropped == {"rope.inv_freq": "derived"}
    assert match.unexpected == ("other",)
    # A save gives all names one prefix: the model's.
    assert match.renamed == {
        "bert.x.LayerNorm.weight": "bert.x.LayerNorm.gamma",
        "bert.x.LayerNorm.bias": "bert.x.LayerNorm.beta",
        "layers.3.mixer.q": "h.3.mix.q",
    }


def test_two_rules_on_one_key():
    rules = (*LEGACY_NORM_RULES, Rename("h.*", "layers.*"))
    match = match_keys(["h.0.LayerNorm.gamma"], ["layers.0.LayerNorm.weight"], rules=rules)
    assert match.sources == {"layers.0.LayerNorm.weight": "h.0.LayerNorm.gamma"}
    assert match.renamed == {"layers.0.LayerNorm.weight": "h.0.LayerNorm.gamma"}


@given(st.lists(st.text("ab.0", min_size=1, max_size=6), min_size=2, max_size=2))
def test_renames_read_both_ways(parts):
    rule = Rename("old.*.x.*", "new.*.yy.*.z")
    key = f"old.{parts[0]}.x.{parts[1]}"
    renamed = rule.to_model(key)
    assert renamed is not None
    assert rule.to_file(renamed) is not None
    assert rule.to_model(rule.to_file(renamed)) == renamed
    assert rule.to_model("other") is None


@given(
    st.sets(st.text("ab.", min_size=1, max_size=4), max_size=6),
    st.sets(st.text("ab.", min_size=1, max_size=4), max_size=6),
)
def test_every_key_ends_in_one_place(file, model):
    match = match_keys(sorted(file), sorted(model), rules=(Drop("a*", "why"),))
    used, left = set(match.sources.values()), {*match.unexpected, *match.dropped}
    assert used | left == file
    assert not used & left
    assert set(match.sources) | set(match.missing) == model


def test_key_mapping_comes_first():
    mapping = {r"^x\.(\d)": r"layers.\1", re.compile("^y"): "z"}
    match = match_keys(["x.3.w", "y.w", "v"], ["layers.3.w", "z.w", "v"], key_mapping=mapping)
    assert match.sources == {"layers.3.w": "x.3.w", "z.w": "y.w", "v": "v"}
    assert match.renamed == {}


def test_key_mapping_and_a_rule():
    match = match_keys(
        ["x.LayerNorm.gamma"], ["y.LayerNorm.weight"], rules=LEGACY_NORM_RULES, key_mapping={"^x": "y"}
    )
    assert match.sources == {"y.LayerNorm.weight": "x.LayerNorm.gamma"}
    assert match.renamed == {"y.LayerNorm.weight": "y.LayerNorm.gamma"}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"(": "x"}, r"'\(' is not a regular expression .*found missing \).*backslash"),
        ({5: "x"}, r"not a dictionary of regular expressions and replacements .*found 5: 'x'"),
        ({"a": None}, r"not a dictionary of regular expressions and replacements"),
        ({"(a)": r"\2"}, r"is not a replacement for '\(a\)'.*invalid group reference.*as many as"),
        ({"[ab]": "c"}, r"Two keys of the file would fill 'c' \(key_mapping\): found 'a' and 'b'.*so narrow"),
    ],
)
def test_key_mappings_that_cannot_be(mapping, message):
    with pytest.raises(ArgumentError, match=message):
        match_keys(["a", "b"], ["c"], key_mapping=mapping)


def test_two_keys_for_one_weight():
    with pytest.raises(WeightsError, match=r"would fill 'model\.w' .*found 'model\.w' and 'w'.*in two ways"):
        match_keys(["model.w", "w"], ["model.w"], base_prefix="model")
