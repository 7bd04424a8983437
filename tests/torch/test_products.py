# SPDX-License-Identifier: Apache-2.0
"""Products of few rows: every form multiplies rightly, and the chosen one is not slow."""

import time

import pytest
import torch
from torch.nn import functional as F

from pretrained.torch import products
from pretrained.torch.products import Form, choose, fingerprint, make_copy, make_product

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


def _works(dtype):
    if not products._onednn_works(dtype):
        pytest.skip(f"oneDNN does not multiply {dtype} here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "rows"),
    [(form, rows) for form in Form for rows in (1, 2, 8) if form is not Form.BAGS or rows == 1],
)
@pytest.mark.parametrize(("size", "out"), [(64, 96), (33, 7), (576, 1001)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_multiplies(dtype, form, rows, size, out, bias):
    if form is not Form.LINEAR:
        _works(dtype)
    torch.manual_seed(0)
    x = torch.randn(rows, size).to(dtype)
    weight = (torch.randn(out, size) / size**0.5).to(dtype)
    added = torch.randn(out).to(dtype) if bias else None
    stored = make_copy(form, [weight]) if form.is_copy else weight
    found = make_product(form, stored, added)(x)
    right = F.linear(x.double(), weight.double(), None if added is None else added.double())
    assert found.dtype == dtype and found.shape == (rows, out)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", [Form.PACKED, Form.BAGS])
def test_copies_lie_one_below_the_other(form):
    _works(torch.float32)
    torch.manual_seed(0)
    weights = [torch.randn(out, 16) for out in (8, 4, 12)]
    x = torch.randn(1, 16)
    product = make_product(form, make_copy(form, weights), None)
    torch.testing.assert_close(product(x), torch.cat([F.linear(x, weight) for weight in weights], -1))


@pytest.mark.parametrize(
    ("dtype", "rows", "outputs", "copies", "form"),
    [
        (torch.float32, 1, 5000, True, Form.BAGS),
        (torch.float32, 2, 576, True, Form.PACKED),
        (torch.float32, 1, 576, False, Form.ONEDNN),
        (torch.bfloat16, 1, 576, True, Form.BAGS),
        (torch.bfloat16, 1, 5000, True, Form.PACKED),
        (torch.bfloat16, 8, 576, True, Form.PACKED),
        (torch.bfloat16, 8, 576, False, Form.ONEDNN),
        (torch.float16, 1, 576, True, Form.LINEAR),
        (torch.float64, 1, 576, True, Form.LINEAR),
    ],
)
def test_what_is_chosen(dtype, rows, outputs, copies, form):
    if form is not Form.LINEAR:
        _works(dtype)
    assert choose(CPU, dtype, rows, outputs, copies=copies) is form
    assert choose(torch.device("meta"), dtype, rows, outputs, copies=copies) is Form.LINEAR


def test_bags_take_a_row_that_is_there_several_times():
    torch.manual_seed(0)
    torch.set_num_threads(2)
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    product = make_product(Form.BAGS, make_copy(Form.BAGS, [weight]), None)
    assert product.parts == 2
    assert torch.equal(product(x), product(x.repeat(2, 1)))
    torch.testing.assert_close(product(x), x @ weight.t())


def test_linear_stands_in_where_the_operators_are_gone(monkeypatch):
    def gone(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "make_copy", gone)
    products._onednn_works.cache_clear()
    try:
        assert choose(CPU, torch.float32, 1, 8, copies=True) is Form.LINEAR
    finally:
        monkeypatch.undo()
        products._onednn_works.cache_clear()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 8)])
def test_the_chosen_form_is_not_slower_than_linear(dtype, rows):
    """Notices a torch whose operators have lost what they are chosen for; 48 MB defeat the caches."""
    _works(dtype)
    weights = [torch.full((1536, 1024), 0.01, dtype=dtype) for _ in range(48 * 2**20 // (1536 * 1024 * 4))]
    x = torch.ones(rows, 1024, dtype=dtype)
    form = choose(CPU, dtype, rows, 1536, copies=True)
    chosen = [make_product(form, make_copy(form, [weight]), None) for weight in weights]
    plain = [make_product(Form.LINEAR, weight, None) for weight in weights]
    times = {}
    with torch.inference_mode():
        for _ in range(7):
            for name, kind in (("chosen", chosen), ("plain", plain)):
                start = time.perf_counter()
                for product in kind:
                    product(x)
                times[name] = min(times.get(name, 1e9), time.perf_counter() - start)
    assert times["chosen"] < 1.3 * times["plain"], times


@pytest.mark.parametrize("shape", [(96, 64), (1000, 36), (8, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_tells_edits(shape, dtype):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    before = fingerprint(weight)
    assert torch.equal(before, fingerprint(weight.clone()))
    edits = [
        lambda w: w.data[0, 0].add_(1),
        lambda w: w.data[-1, -1].add_(1),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: w.data.copy_(w.data.flip(1)),
        lambda w: w.data.mul_(-1),
    ]
    for edit in edits if min(shape) > 4 else edits[:2]:
        other = torch.nn.Parameter(weight.detach().clone())
        edit(other)
        assert not torch.equal(before, fingerprint(other))


def test_there_is_no_fingerprint_of_what_is_not_contiguous():
    assert fingerprint(torch.ones(8, 8).t()[:, :5]) is None
    assert fingerprint(torch.ones(3, 1)) is None
