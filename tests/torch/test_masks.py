# SPDX-License-Identifier: Apache-2.0
"""Masks against slow loops over rows, queries and keys."""

import re

import pytest
import torch

from pretrained.errors import ArgumentError
from pretrained.torch.masks import additive, causal_mask, padding_mask

CPU = torch.device("cpu")


def slow_causal(positions, keys, window, mask=None):
    """Who may look at whom, by the definition of each word."""
    rows = 1 if mask is None else len(mask)
    allowed = torch.zeros(rows, 1, len(positions), len(keys), dtype=torch.bool)
    for row in range(rows):
        for q, position in enumerate(positions):
            for k, key in enumerate(keys):
                near = window is None or position - key < window
                padded = mask is not None and not (key < len(mask[row]) and mask[row][key])
                allowed[row, 0, q, k] = key <= position and near and not padded
    return allowed


def plain(query_length, kv_length):
    """What None means to a kernel: causal, aligned at the end; one query sees everything."""
    return slow_causal(range(kv_length - query_length, kv_length), range(kv_length), None)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 8, 99])
@pytest.mark.parametrize(
    ("first", "query_length", "kv_offset"),
    [
        (0, 1, 0),
        (0, 5, 0),
        (4, 1, 0),
        (4, 3, 0),
        (9, 1, 6),  # a sliding cache has let go of six
        (9, 3, 6),
    ],
)
def test_positions_on_the_host(first, query_length, kv_offset, window):
    kv_length = first + query_length - kv_offset
    found = causal_mask(
        query_length=query_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        query_positions=first,
        attention_mask=None,
        window=window,
        device=CPU,
    )
    positions = range(first, first + query_length)
    expected = slow_causal(positions, range(kv_offset, kv_offset + kv_length), window)
    assert torch.equal(plain(query_length, kv_length) if found is None else found, expected)


@pytest.mark.parametrize(
    ("first", "query_length", "window", "none"),
    [(0, 5, None, True), (0, 5, 5, True), (0, 5, 4, False), (4, 1, None, True), (4, 2, None, False)],
)
def test_no_mask_is_built_where_causal_says_it(first, query_length, window, none):
    sizes = {"query_length": query_length, "kv_length": first + query_length, "query_positions": first}
    assert (causal_mask(**sizes, attention_mask=None, window=window, device=CPU) is None) == none


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("first", "query_length", "kv_offset"), [(0, 5, 0), (4, 1, 0), (4, 2, 0), (7, 2, 5)])
def test_padded_rows(first, query_length, kv_offset, window, dtype):
    total = first + query_length
    mask = torch.ones(3, total, dtype=dtype)
    mask[0, :2], mask[1, -1:], mask[2] = 0, 0, 0
    found = causal_mask(
        query_length=query_length,
        kv_length=total - kv_offset,
        kv_offset=kv_offset,
        query_positions=first,
        attention_mask=mask,
        window=window,
        device=CPU,
    )
    expected = slow_causal(range(first, total), range(kv_offset, total), window, mask.tolist())
    assert found.dtype == torch.bool and torch.equal(found, expected)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("known", [None, 6, 10], ids=["no mask", "short mask", "full mask"])
@pytest.mark.parametrize("positions", [[0, 1, 2], [5], [4, 5]])
def test_positions_on_the_device(positions, known, window):
    """A static cache shows all its slots: those not yet filled are hidden, by causality or a short mask."""
    mask = None if known is None else torch.ones(2, known, dtype=torch.int64)
    if mask is not None:
        mask[0, 0] = 0
    found = causal_mask(
        query_length=len(positions),
        kv_length=10,
        query_positions=torch.tensor(positions),
        attention_mask=mask,
        window=window,
        device=CPU,
    )
    expected = slow_causal(positions, range(10), window, None if mask is None else mask.tolist())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_ready_masks_pass_through(dtype):
    mask = torch.ones(2, 1, 3, 5).to(dtype)
    sizes = {"query_length": 3, "kv_length": 5, "query_positions": 2}
    assert causal_mask(**sizes, attention_mask=mask, device=CPU) is mask
    assert padding_mask(mask, kv_length=5) is mask


def test_ready_masks_hold_no_whole_numbers():
    mask = torch.ones(2, 1, 3, 5, dtype=torch.int64)
    text = r"used as it is.*\(attention_mask\): expected booleans.*found torch\.int64\. Pass .*\.bool\(\)"
    with pytest.raises(ArgumentError, match=text):
        causal_mask(query_length=3, kv_length=5, query_positions=2, attention_mask=mask, device=CPU)
    with pytest.raises(ArgumentError, match=text):
        padding_mask(mask, kv_length=5)


def test_padding_mask_of_each_rank():
    flat = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = padding_mask(flat, kv_length=3)
    assert found.shape == (2, 1, 1, 3) and torch.equal(found[:, 0, 0], flat.bool())
    square = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 1, 1]]])
    found = padding_mask(square, kv_length=3)
    assert found.shape == (1, 1, 3, 3) and torch.equal(found[:, 0], square.bool())
    assert padding_mask(None, kv_length=3) is None


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (1, 1, 2, 3, 5)])
def test_a_decoder_refuses_other_ranks(shape):
    text = rf"has the wrong rank .*expected \[batch, length\].*found {re.escape(str([*shape]))}"
    with pytest.raises(ArgumentError, match=text):
        causal_mask(
            query_length=5, kv_length=5, query_positions=0, attention_mask=torch.ones(shape), device=CPU
        )


@pytest.mark.parametrize("shape", [(5,), (1, 1, 2, 3, 5)])
def test_an_encoder_refuses_other_ranks(shape):
    with pytest.raises(ArgumentError, match="attention_mask has the wrong rank"):
        padding_mask(torch.ones(shape), kv_length=5)


@pytest.mark.parametrize(("length", "positions"), [(2, 3), (6, 3), (6, torch.tensor([3, 4]))])
def test_a_decoders_mask_covers_cached_and_new_tokens(length, positions):
    text = (
        rf"does not cover the keys \(attention_mask\): expected length 5 \(cached and new tokens\), "
        rf"found length {length}\. Pass a mask over the cached and the new tokens"
    )
    with pytest.raises(ArgumentError, match=text):
        causal_mask(
            query_length=2,
            kv_length=5,
            query_positions=positions,
            attention_mask=torch.ones(1, length),
            device=CPU,
        )


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4)])
def test_an_encoders_mask_covers_the_keys(shape):
    with pytest.raises(ArgumentError, match=r"does not cover the keys.*expected length 5.*found length 4"):
        padding_mask(torch.ones(shape), kv_length=5)


def test_additive_masks_in_the_kernels_dtype():
    booleans = torch.tensor([True, False])
    assert additive(booleans, torch.float16) is booleans
    assert additive(None, torch.float16) is None
    numbers = torch.tensor([0.0, torch.finfo(torch.float32).min, -torch.inf, -2.0])
    assert additive(numbers, torch.float32) is numbers
    for dtype in (torch.float16, torch.bfloat16):
        least = torch.finfo(dtype).min
        assert additive(numbers, dtype).tolist() == [0.0, least, least, -2.0]
        assert additive(numbers, dtype).dtype == dtype
