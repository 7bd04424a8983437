# SPDX-License-Identifier: Apache-2.0
"""Maps that users write: what they mean, and every way in which they can be wrong."""

import pytest

from pretrained.arch.skeletons import config_of, skeleton_for
from pretrained.core.device_map import check_device_map
from pretrained.core.plan import LoadPolicy
from pretrained.core.units import weight_sizes
from pretrained.errors import PlacementError

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32,
    "d_model": 8,
    "d_ff": 16,
    "d_kv": 4,
    "num_layers": 2,
    "num_heads": 2,
}
ALL = [0, 1, "cpu", "disk"]
PAGE = {"shared": 0, "encoder": 0, "decoder": 1, "lm_head": "cpu"}


def t5(tied=False):
    return skeleton_for(config_of({**T5, "tie_word_embeddings": tied}))


def sizes(skeleton):
    return weight_sizes(skeleton, LoadPolicy())


def test_the_pages_map():
    found = check_device_map(t5(), {"lm_head": "cpu", "decoder": "cuda:1", "encoder": 0, "shared": 0}, ALL)
    assert list(found.device_map.items()) == list(PAGE.items())
    assert found.strategy == "given"
    assert found.homes["decoder.block.1.layer.0.layer_norm.weight"] == 1
    assert found.homes["lm_head.weight"] == "cpu"
    assert (found.main, found.runs_on("lm_head")) == (0, 0)
    # The embedding is one tensor, and the decoder's entry says nothing about it on its own.
    assert found.homes["decoder.embed_tokens.weight"] == 0
    assert found.notes == (
        "decoder.embed_tokens.weight is tied to shared.weight and lives with it on GPU 0, not on GPU 1 with "
        "decoder",
    )


def test_longer_entries_win():
    found = check_device_map(t5(), {"": "cpu", "encoder": 0, "encoder.block.1": "disk"}, ALL)
    assert found.homes["encoder.block.0.layer.0.layer_norm.weight"] == 0
    assert found.homes["encoder.block.1.layer.0.layer_norm.weight"] == "disk"
    assert found.homes["lm_head.weight"] == "cpu"


def test_one_home_for_all():
    skeleton = t5()
    found = check_device_map(skeleton, {"": "disk"}, ALL, sizes=sizes(skeleton))
    assert set(found.homes) == {*skeleton.params}
    assert found.main == "cpu"
    assert found.room("cpu").returning > 0


def test_an_incomplete_map_names_what_is_missing():
    with pytest.raises(
        PlacementError,
        match=r"incomplete: 25 weights have no home .* none for encoder\.embed_tokens, .*lm_head"
        r"|incomplete: .* none for .*Add 'encoder\.embed_tokens', or '' for everything",
    ):
        check_device_map(t5(), {"shared": 0, "decoder": 1}, ALL)


def test_unknown_modules_get_a_suggestion():
    with pytest.raises(
        PlacementError,
        match=r"modules that the model does not have .*paths under shared, encoder, decoder, lm_head, "
        r"found 'encodr', 'x'\. Did you mean 'encoder'\?",
    ):
        check_device_map(t5(), {**PAGE, "encodr": 0, "x": 1}, ALL)


def test_modules_without_weights_may_be_named():
    given = {**PAGE, "encoder.dropout": 0}
    with pytest.raises(PlacementError, match=r"'encoder\.dropout'"):
        check_device_map(t5(), given, ALL)
    assert "encoder.dropout" in check_device_map(t5(), given, ALL, modules=["encoder.dropout"]).device_map


def test_a_device_that_is_not_there():
    with pytest.raises(
        PlacementError,
        match=r"a device that is not there .*expected one of 0, 'cpu', 'disk', found 'decoder': 1\.",
    ):
        check_device_map(t5(), PAGE, [0, "cpu", "disk"])


@pytest.mark.parametrize(
    ("home", "message"),
    [
        (-1, r"A device index is a number from 0 on \(device_map\['decoder'\]\): found -1"),
        ("gpu", r"Unknown device 'gpu' \(device_map\['decoder'\]\)"),
        (None, "Unknown device None"),
    ],
)
def test_what_is_no_device(home, message):
    with pytest.raises(PlacementError, match=message):
        check_device_map(t5(), {**PAGE, "decoder": home}, ALL)


@pytest.mark.parametrize("given", [{}, None, ["shared"], {0: "shared"}])
def test_what_is_no_map(given):
    with pytest.raises(PlacementError, match="A device map"):
        check_device_map(t5(), given, ALL)


def test_a_tied_weight_told_to_live_in_two_homes():
    with pytest.raises(
        PlacementError,
        match=r"one tensor, to live in two homes .*lm_head\.weight \('cpu'\) is shared\.weight \(0\)\. "
        r"Give 'lm_head' the home 0",
    ):
        check_device_map(t5(tied=True), PAGE, ALL)
    assert check_device_map(t5(tied=True), {**PAGE, "lm_head": 0}, ALL).homes["lm_head.weight"] == 0


def test_a_split_block_is_allowed_and_noted():
    skeleton = t5()
    given = {"": 0, "encoder.block.1.layer.1": 1}
    found = check_device_map(skeleton, given, ALL, sizes=sizes(skeleton))
    assert found.notes == ("encoder.block.1 is split over GPU 0 and GPU 1: activations are moved inside it",)
    assert found.room(1).weights == sum(
        size for key, size in sizes(skeleton).items() if key.startswith("encoder.block.1.layer.1.")
    )
    assert sum(room.weights for room in found.rooms) == 4 * skeleton.num_parameters


def test_budgets_are_compared_with_what_comes_back_too():
    skeleton = t5()
    known = sizes(skeleton)
    need = check_device_map(skeleton, {"": 0, "lm_head": "cpu"}, ALL, sizes=known).room(0)
    assert need.returning == 32 * 8 * 4
    budgets = {0: need.peak, "cpu": 10**6}
    check_device_map(skeleton, {"": 0, "lm_head": "cpu"}, budgets, sizes=known)
    with pytest.raises(
        PlacementError,
        match=r"more on GPU 0 than its budget .* for lm_head, which comes back to run\. Move some",
    ):
        check_device_map(skeleton, {"": 0, "lm_head": "cpu"}, budgets | {0: need.peak - 1}, sizes=known)


def test_what_comes_back_goes_to_the_device_that_has_room():
    skeleton = t5()
    known = sizes(skeleton)
    budgets = {0: known["shared.weight"], 1: 10**6, "cpu": 10**6}
    with pytest.raises(PlacementError, match="GPU 0"):
        check_device_map(skeleton, {"": 1, "shared": 0, "lm_head": "cpu"}, budgets, sizes=known)
    budgets[0] += 32 * 8 * 4
    found = check_device_map(skeleton, {"": 1, "shared": 0, "lm_head": "cpu"}, budgets, sizes=known)
    assert found.main == 0
