# SPDX-License-Identifier: Apache-2.0
"""Settings of continuous batching: values are checked, the ecosystem's names are known."""

import json

import pytest

from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError, NotYetError, PlacementError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("page_size", 0, "page_size cannot be 0 (ContinuousBatchingConfig.page_size): expected a whole"),
        ("page_size", None, "page_size cannot be None"),
        ("num_blocks", 1.5, "num_blocks cannot be 1.5"),
        ("max_requests_per_batch", True, "max_requests_per_batch cannot be True"),
        ("max_batch_tokens", -1, "expected a whole number of 1 or more"),
        ("max_memory_percent", 2, "expected a share above 0 and up to 1"),
        ("allow_block_sharing", 1, "expected True or False"),
        ("scheduler_type", "prefill_first", 'expected "fifo"'),
        ("seed", -3, "seed cannot be -3"),
    ],
)
def test_wrong_values_are_refused(name, value, message):
    with pytest.raises(GenerationError) as caught:
        ContinuousBatchingConfig(**{name: value})
    assert message in str(caught.value)


def test_memory_may_be_a_text():
    assert ContinuousBatchingConfig(max_memory="2GiB").max_memory_bytes == 2 << 30
    with pytest.raises(PlacementError, match="not an amount of memory"):
        ContinuousBatchingConfig(max_memory="much")


def test_settings_of_the_ecosystem():
    assert ContinuousBatchingConfig.from_dict({"block_size": 16}).page_size == 16
    quiet = {"use_cuda_graph": None, "use_async_batching": False, "auto_switch_to_flash": True}
    assert ContinuousBatchingConfig.from_dict(quiet) == ContinuousBatchingConfig()
    with pytest.raises(NotYetError, match=r"use_cuda_graph=True cannot be obeyed"):
        ContinuousBatchingConfig.from_dict({"use_cuda_graph": True})
    with pytest.raises(GenerationError, match=r"no setting 'page_sise'.*Did you mean 'page_size'"):
        ContinuousBatchingConfig.from_dict({"page_sise": 16})


def test_round_trip_within_a_generation_config():
    own = ContinuousBatchingConfig(page_size=16, max_memory="1GB")
    config = GenerationConfig(continuous_batching_config=own)
    again = GenerationConfig.from_dict(json.loads(config.to_json_string()))
    assert ContinuousBatchingConfig.from_dict(again.continuous_batching_config) == own
    with pytest.raises(GenerationError, match="a ContinuousBatchingConfig, or a dict of its settings"):
        GenerationConfig(continuous_batching_config=3)
