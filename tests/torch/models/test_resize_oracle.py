# SPDX-License-Identifier: Apache-2.0
"""Resized models and the parts of models against transformers with the same weights."""

import pytest
import torch

from support.oracle import transformers_twin
from support.resized import HEADS, ROWS

# Transformers ties the heads of these again, or leaves one of the two names of the bias at its old length.
WRONG = (
    "MT5ForConditionalGeneration-untied",
    "UMT5ForConditionalGeneration-untied",
    "RobertaForMaskedLM-untied",
)
COMPARED = [row for row in HEADS if str(row) not in WRONG]


@pytest.mark.parametrize("size", [60, 128])
@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_old_rows_and_sizes_equal_the_oracles(case, size):
    model = case.build()
    twin = transformers_twin(model)
    model.resize_token_embeddings(size - 5, 64 if size == 128 else None, mean_resizing=False)
    twin.resize_token_embeddings(size - 5, 64 if size == 128 else None, mean_resizing=False)
    ours, theirs = model.state_dict(), twin.state_dict()
    kept = min(size, 99)
    for key, tensor in ours.items():
        if key in theirs:
            assert tensor.shape == theirs[key].shape, key
            length = kept if tensor.shape[0] == len(model.get_input_embeddings().weight) else len(tensor)
            length = min(length, len(tensor))
            assert torch.equal(tensor[:length], theirs[key][:length]), key
    assert model.config.vocab_size == twin.config.vocab_size


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_new_rows_lie_where_the_oracles_lie(case):
    model = case.build()
    twin = transformers_twin(model)
    torch.manual_seed(0)
    model.resize_token_embeddings(99 + 2000)
    twin.resize_token_embeddings(99 + 2000)
    for ours, theirs in (
        (model.get_input_embeddings().weight, twin.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, twin.get_output_embeddings().weight),
    ):
        old, one, other = (part.detach().double() for part in (ours[:99], ours[99:], theirs[99:]))
        sigma = old.std(0) * 1e-9**0.5
        # Of n draws the mean is known to sigma / sqrt(n) and the covariance to about sqrt(2 / n) of itself.
        assert ((one.mean(0) - other.mean(0)).abs() < 8 * sigma / 2000**0.5 + 1e-8).all()
        ratio = (one - one.mean(0)).std(0) / (other - other.mean(0)).std(0)
        assert ((ratio - 1).abs() < 0.12).all(), ratio
        scale = torch.outer(sigma, sigma)
        assert ((one.T.cov() / scale - other.T.cov() / scale).abs() < 0.25).all()


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_encoders_and_decoders_are_the_oracles(case):
    model = case.build()
    twin = transformers_twin(model)
    for get in ("get_encoder", "get_decoder"):
        ours, theirs = getattr(model, get)(), getattr(twin, get)()
        path = next(path for path, module in model.named_modules() if module is ours)
        assert path == next(path for path, module in twin.named_modules() if module is theirs), get
