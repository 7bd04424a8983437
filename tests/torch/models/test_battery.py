# SPDX-License-Identifier: Apache-2.0
import importlib
from functools import partial

import pytest

from pretrained.testing import battery
from support.cases import CASES
from support.oracle import transformers_twin

ids = {"argvalues": CASES, "ids": str}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", **ids)
def test_outputs_equal_the_oracles(case, padding):
    battery.check_parity(case, transformers_twin, padding=padding)


@pytest.mark.parametrize("case", **ids)
def test_bfloat16_outputs_are_as_near_as_the_oracles(case):
    battery.check_bfloat16(case, partial(transformers_twin, attn_implementation="sdpa"))


@pytest.mark.parametrize("case", **ids)
def test_every_part_equals_the_oracles(case):
    battery.check_submodules(case, transformers_twin)


@pytest.mark.parametrize("case", **ids)
def test_attentions_equal_the_oracles(case):
    battery.check_attentions(case, transformers_twin)


@pytest.mark.parametrize("case", **ids)
def test_loss_and_gradients_equal_the_oracles(case):
    battery.check_loss_and_gradients(case, transformers_twin)


@pytest.mark.parametrize("case", **ids)
def test_a_tuple_on_request(case):
    battery.check_tuple(case)


@pytest.mark.parametrize("case", **ids)
def test_embeddings_in_place_of_ids(case):
    battery.check_inputs_embeds(case)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("case", [case for case in CASES if case.keeps_cache], ids=str)
def test_cached_equals_uncached(case, static):
    battery.check_cache(case, static=static)


@pytest.mark.parametrize("case", **ids)
def test_save_and_load_lose_nothing(case, tmp_path):
    battery.check_round_trip(case, tmp_path)


@pytest.mark.parametrize("case", **ids)
def test_pickled_models_come_back(case):
    battery.check_pickle(case)


@pytest.mark.parametrize("case", **ids)
def test_forward_is_one_graph(case):
    battery.check_compiled(case)


@pytest.mark.parametrize("case", **ids)
def test_skeleton_is_the_module_tree(case):
    module = importlib.import_module(case.model_class.config_class.__module__)
    family = case.model_class.config_class.__name__.removesuffix("Config")
    battery.check_skeleton(case, module.skeleton, family)
