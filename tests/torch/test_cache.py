# SPDX-License-Identifier: Apache-2.0
"""Caches: values against transformers' caches, growth, windows, overflow, cropping, rows."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

from pretrained.errors import ArgumentError, GenerationError, NotYetError
from pretrained.torch.cache import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    layer_windows,
)

B, H, D = 2, 3, 4
CHUNKS = [5, 1, 1, 3, 1, 70, 1, 1]


def states(length, seed=0, batch=B):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, H, length, D, generator=gen), torch.randn(batch, H, length, D, generator=gen))


def config(**values):
    return SimpleNamespace(num_hidden_layers=2, **values)


def oracle_config(**values):
    return transformers.LlamaConfig(
        hidden_size=H * D, num_hidden_layers=2, num_attention_heads=H, num_key_value_heads=H, **values
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 30])
def test_dynamic_cache_equals_transformers(window, grad):
    kinds = None if window is None else ["sliding_attention", "full_attention"]
    ours = DynamicCache(config(layer_types=kinds, sliding_window=window))
    extra = {} if window is None else {"layer_types": kinds, "sliding_window": window}
    theirs = transformers.DynamicCache(config=oracle_config(**extra))
    with torch.set_grad_enabled(grad):
        for step, length in enumerate(CHUNKS):
            for layer in range(2):
                if window != 1:  # transformers keeps the whole past for a window of one: [-0:]
                    assert ours.get_mask_sizes(length, layer) == theirs.get_mask_sizes(length, layer)
                k, v = states(length, 10 * step + layer)
                mine = ours.update(k, v, layer)
                if window == 1 and layer == 0:
                    assert torch.equal(mine[0], k) and torch.equal(mine[1], v)
                    continue
                for a, b in zip(mine, theirs.update(k, v, layer), strict=True):
                    assert torch.equal(a, b)
                assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)


def test_views_handed_out_stay_as_they_are():
    layer, seen, kept = DynamicLayer(), [], []
    with torch.no_grad():
        for step in range(200):
            keys, _ = layer.update(*states(1, step))
            seen.append(keys)
            kept.append(keys.clone())
    assert all(torch.equal(a, b) for a, b in zip(seen, kept, strict=True))
    assert layer._keys.shape[2] < 2 * 200


def test_growing_copies_seldom():
    layer = DynamicLayer()
    buffers = set()
    with torch.no_grad():
        for step in range(1000):
            layer.update(*states(1, step, batch=1))
            buffers.add(layer._keys.data_ptr())
    assert len(buffers) <= 12


def test_the_first_states_are_held_and_never_written():
    layer = DynamicLayer()
    k, v = states(6)
    before = k.clone()
    with torch.no_grad():
        assert layer.update(k, v)[0] is k
        layer.crop(3)
        layer.update(*states(1, 9))
    assert torch.equal(k, before)


def test_autograd_flows_through_a_cache():
    layer = DynamicLayer()
    k, v = states(3)
    k.requires_grad_()
    layer.update(k, v)
    keys, _ = layer.update(*states(2, 1))
    later, _ = layer.update(*states(1, 2))
    (keys.sum() + 2 * later.sum()).backward()
    assert torch.equal(k.grad, torch.full_like(k, 3.0))


def test_a_cache_filled_under_inference_mode_can_be_continued_without():
    layer = DynamicLayer()
    with torch.inference_mode():
        layer.update(*states(3))
        layer.update(*states(1, 1))
    with torch.no_grad():
        keys, _ = layer.update(*states(1, 2))
    assert keys.shape[2] == 5 and not keys.is_inference()


def test_another_batch_size_is_refused():
    cache = DynamicCache()
    with torch.no_grad():
        cache.update(*states(3), 0)
        with pytest.raises(
            GenerationError, match=r"batch 2, found batch 1\. Use cache\.batch_repeat_interleave"
        ):
            cache.update(*states(1, batch=1), 0)


def test_static_cache_equals_transformers_on_its_filled_part():
    ours, theirs = StaticCache(config(), 100), transformers.StaticCache(oracle_config(), 100)
    total = 0
    with torch.no_grad():
        for step, length in enumerate(CHUNKS):
            total += length
            for layer in range(2):
                k, v = states(length, 10 * step + layer)
                assert ours.get_mask_sizes(length, layer) == (total, 0)
                mine, their = ours.update(k, v, layer), theirs.update(k, v, layer)
                assert mine[0].shape[2] == total
                assert torch.equal(mine[0], their[0][:, :, :total]) and torch.equal(
                    mine[1], their[1][:, :, :total]
                )
    assert ours.get_seq_length() == total and ours.max_cache_len == 100 and ours.is_compileable
    address = ours.layers[0]._keys.data_ptr()
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.layers[0]._keys.data_ptr() == address
    assert not ours.layers[0]._keys.any()


def test_static_cache_by_positions_returns_the_whole_buffer():
    ours, theirs = StaticCache(config(), 16), transformers.StaticCache(oracle_config(), 16)
    ours.early_initialization(B, H, D, torch.float32, "cpu")
    with torch.no_grad():
        for at, length in ((0, 4), (4, 1), (5, 1)):
            k, v = states(length, at)
            positions = torch.arange(at, at + length)
            assert ours.get_mask_sizes(length, 0, positions) == (16, 0)
            mine, their = ours.update(k, v, 0, positions), theirs.update(k, v, 0)
            ours.advance(length)
            assert torch.equal(mine[0], their[0]) and torch.equal(mine[1], their[1])
    assert ours.get_seq_length() == 6


def test_static_cache_overflow_says_how_much_it_takes():
    cache = StaticCache(config(), 8)
    with torch.no_grad():
        cache.update(*states(8), 0)
        with pytest.raises(
            GenerationError,
            match=r"static cache is full.*at most 8.*9 \(8 held and 1 new\).*max_cache_len=64",
        ):
            cache.update(*states(1), 0)
        with pytest.raises(IndexError):
            cache.update(*states(1), 0, torch.tensor([8]))


def test_static_cache_refuses_to_be_trained_through():
    k, v = states(2)
    with pytest.raises(GenerationError, match=r"gradients are recorded.*DynamicCache"):
        StaticLayer(4).update(k.requires_grad_(), v)


@pytest.mark.parametrize("wrong", [0, -3])
def test_sizes_must_be_positive(wrong):
    with pytest.raises(ArgumentError, match=f"max_cache_len must be 1 or more: found {wrong}"):
        StaticLayer(wrong)
    with pytest.raises(ArgumentError, match=f"sliding_window must be 1 or more: found {wrong}"):
        DynamicSlidingLayer(wrong)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config(), 32)])
def test_crop_and_go_on(make):
    cache, whole = make(), make()
    with torch.no_grad():
        cache.update(*states(6), 0)
        cache.update(*states(4, 1), 0)
        cache.crop(-3)
        assert cache.get_seq_length() == 7
        cache.crop(5)
        cache.crop(9)
        k, v = states(2, 2)
        keys, _ = cache.update(k, v, 0)
        expected, _ = whole.update(
            torch.cat([states(6)[0][:, :, :5], k], 2), torch.cat([states(6)[1][:, :, :5], v], 2), 0
        )
    assert torch.equal(keys, expected)


def test_a_sliding_cache_can_go_back_by_its_margin():
    window, margin = 4, 3
    ours = DynamicSlidingLayer(window, margin)
    whole = DynamicLayer()
    with torch.no_grad():
        for step in range(9):
            ours.update(*states(1, step))
            whole.update(*states(1, step))
        ours.crop(6)
        whole.crop(6)
        mine, full = ours.update(*states(2, 50)), whole.update(*states(2, 50))
        assert torch.equal(mine[0], full[0][:, :, -5:])
        assert ours.get_mask_sizes(1) == (4, 5)
        for step in range(9):
            ours.update(*states(1, step))
        with pytest.raises(
            GenerationError, match=r"cannot go back that far.*at most 3 tokens cropped, found 4"
        ):
            ours.crop(ours.get_seq_length() - 4)


def test_a_sliding_cache_lets_go_of_a_long_prompt():
    layer = DynamicSlidingLayer(8)
    with torch.no_grad():
        keys, _ = layer.update(*states(5000))
        assert keys.shape[2] == 5000
        for step in range(300):
            layer.update(*states(1, step))
    assert layer._keys.shape[2] <= 128 and layer.get_seq_length() == 5300


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(config(), 32)])
def test_rows_can_be_reordered_repeated_and_selected(make):
    cache = make()
    with torch.no_grad():
        cache.update(*states(6), 0)
        k, v = cache.update(*states(1, 1), 0)
        k, v = k.clone(), v.clone()
        cache.reorder_cache(torch.tensor([1, 1]))
        assert torch.equal(cache[0][0], k[[1, 1]]) and torch.equal(cache[0][1], v[[1, 1]])
        cache.batch_repeat_interleave(3)
        assert cache.batch_size == 6 and torch.equal(cache[0][0], k[[1] * 6])
        cache.batch_select_indices(torch.tensor([0, 4]))
        keys, _ = cache.update(*states(1, 2), 0)
        assert torch.equal(keys, torch.cat([k[[1, 1]], states(1, 2)[0]], 2))


def test_reordering_a_static_cache_keeps_its_address():
    cache = StaticCache(config(), 8)
    with torch.no_grad():
        cache.update(*states(3), 0)
        address = cache.layers[0]._keys.data_ptr()
        cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0]._keys.data_ptr() == address
    assert torch.equal(cache[0][0], states(3)[0][[1, 0]])


def test_legacy_tuples_go_both_ways():
    pairs = tuple(states(4, layer) for layer in range(2))
    cache = Cache.from_legacy_cache(pairs)
    assert len(cache) == 2 and cache.get_seq_length() == 4
    assert all(
        torch.equal(a, b)
        for ours, theirs in zip(cache.to_legacy_cache(), pairs, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    rows = tuple(states(4, layer) + states(7, layer) for layer in range(2))
    both = EncoderDecoderCache.from_legacy_cache(rows)
    assert both.is_updated == {0: True, 1: True} and both.cross_attention_cache.get_seq_length() == 7
    assert [len(row) for row in both.to_legacy_cache()] == [4, 4]
    assert torch.equal(both[1][3], rows[1][3])


def test_encoder_decoder_cache():
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        cache.self_attention_cache.update(*states(2), 0)
        cache.cross_attention_cache.update(*states(5), 0)
        cache.is_updated[0] = True
        cache.update(*states(1, 3), 0)
    assert cache.get_seq_length() == 3 and len(cache) == 1 and cache.get_mask_sizes(1, 0) == (4, 0)
    cache.batch_repeat_interleave(2)
    assert [t.shape[0] for t in cache[0]] == [4] * 4
    cache.reorder_cache(torch.tensor([0, 0]))
    assert [t.shape[0] for t in cache[0]] == [2] * 4
    cache.reset()
    assert cache.is_updated == {0: False} and cache.get_seq_length() == 0
    assert cache.cross_attention_cache.get_seq_length() == 0


def test_a_copy_is_independent():
    cache = DynamicCache()
    with torch.no_grad():
        cache.update(*states(5), 0)
        cache.update(*states(1, 1), 0)
        twin = copy.deepcopy(cache)
        a, _ = cache.update(*states(1, 2), 0)
        b, _ = twin.update(*states(1, 3), 0)
    assert torch.equal(a[:, :, :6], b[:, :, :6]) and not torch.equal(a[:, :, 6], b[:, :, 6])


def test_which_layers_slide():
    assert layer_windows(config(sliding_window=None)) == [None, None]
    assert layer_windows(config(sliding_window=8)) == [8, 8]
    assert layer_windows(config(sliding_window=8, use_sliding_window=False)) == [None, None]
    assert layer_windows(config(sliding_window=8, layer_types=["full_attention", "sliding_attention"])) == [
        None,
        8,
    ]
    assert len(layer_windows(SimpleNamespace(num_layers=2, num_decoder_layers=3))) == 3
    with pytest.raises(NotYetError, match="no cache for layers of type 'chunked_attention' yet"):
        layer_windows(config(layer_types=["chunked_attention"]))


def test_a_cache_of_another_model_is_refused():
    with pytest.raises(GenerationError, match=r"fewer layers.*more than 2 layers, found 2"):
        StaticCache(config(), 8).update(*states(1), 2)


def test_an_empty_cache_is_true_and_says_what_it_is():
    cache = DynamicCache()
    assert cache and len(cache) == 0 and cache.get_seq_length(3) == 0 and cache.get_max_length() == -1
    assert not cache.is_compileable and cache.batch_size == -1
    assert repr(cache) == "DynamicCache(0 layers, 0 tokens)"
    with pytest.raises(IndexError):
        DynamicCache(config())[0]
