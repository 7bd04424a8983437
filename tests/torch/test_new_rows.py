# SPDX-License-Identifier: Apache-2.0
"""Rows near a mean: their mean and covariance, and tables that have none to speak of."""

import pytest
import torch
from torch import nn

from pretrained.errors import ArgumentError
from pretrained.torch import new_rows
from pretrained.torch.new_rows import SPREAD, rows_as_initialised, rows_near_mean


def draw(table, count, where="table"):
    torch.manual_seed(0)
    return rows_near_mean(lambda part: table[part], len(table), count, where=where)


@pytest.mark.parametrize("rows", [50, 400])
def test_mean_and_covariance(rows, monkeypatch):
    monkeypatch.setattr(new_rows, "MOST_ROWS", 100)
    mix = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    table = (torch.randn(rows, 6, generator=torch.Generator().manual_seed(2)) @ mix + 1).double()
    made = draw(table, 20_000)
    wanted = table.T.cov(correction=0) * SPREAD
    deviation = wanted.diag().sqrt()
    assert ((made.mean(0) - table.mean(0)).abs() < 6 * deviation / 20_000**0.5).all()
    # A block of 1024 sees 100 of the rows, so with 20 blocks there is more noise than in 20,000 draws.
    allowed = 0.05 if rows == 50 else 0.15
    assert ((made.T.cov() - wanted).abs() < allowed * torch.outer(deviation, deviation)).all()


@pytest.mark.parametrize(
    "table",
    [
        torch.ones(1, 4),
        torch.full((30, 4), 0.25),
        torch.zeros(3, 4),
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, 2.0, 3.0, 4.0]]),
        torch.randn(3, 64),
        torch.randn(40, 4) * 1e30,
        torch.randn(40, 4) * 1e-38,
        torch.randn(9000, 3).bfloat16(),
        torch.randn(40, 4).half() * 1e4,
    ],
    ids=["one", "equal", "zero", "two", "few", "large", "tiny", "bfloat16", "float16"],
)
def test_tables_whose_covariance_cannot_be_decomposed(table):
    made = draw(table, 1100)
    mean, spread = table.double().mean(0), table.double().std(0, correction=0)
    assert made.shape == (1100, table.shape[1]) and made.isfinite().all() and made.dtype == torch.float32
    assert ((made - mean).abs() <= 6 * spread * SPREAD**0.5 + 1e-6 * table.double().abs().max(0)[0]).all()


def test_rows_that_are_no_numbers_are_left_out():
    table = torch.randn(50, 4)
    whole = table.clone()
    table[3, 1], table[7] = float("nan"), float("inf")
    kept = [i for i in range(50) if i not in (3, 7)]
    assert torch.allclose(draw(table, 5), whole[kept].mean(0), atol=1e-3)
    with pytest.raises(ArgumentError, match=r"No row of this table has only finite numbers.*\(lm_head\)"):
        draw(table[3:4], 5, "lm_head")


def test_seeds_decide():
    table = torch.randn(50, 4)
    assert torch.equal(draw(table, 5), draw(table, 5))
    assert not torch.equal(draw(table, 5)[0], draw(table, 5)[1])


def test_a_large_table_is_never_widened_whole():
    table, seen = torch.randn(20_000, 4).bfloat16(), []

    def rows(part):
        seen.append(len(table[part]))
        return table[part]

    rows_near_mean(rows, len(table), 3, where="table")
    assert max(seen) <= 4096 and sum(seen) <= 20_000 + 4096


class Own:
    """A class whose `_init_weights` fills what it is given."""

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (7, 4) and module.out_features == 7
            nn.init.constant_(module.weight, 3.0)
            nn.init.constant_(module.bias, 2.0)


def test_rows_as_a_class_initialises_them():
    layer = nn.Linear(4, 30)
    before = layer.weight.detach().clone()
    made = rows_as_initialised(Own(), layer, 7, axis=0, where="lm_head")
    assert (made["weight"] == 3).all() and (made["bias"] == 2).all()
    assert torch.equal(layer.weight, before) and layer.out_features == 30
    with pytest.raises(ArgumentError, match=r"Own does not say how to initialise a Embedding \(wte\)"):
        rows_as_initialised(Own(), nn.Embedding(3, 4), 7, axis=0, where="wte")
