# SPDX-License-Identifier: Apache-2.0
"""Quantized, offloaded and fixed-window caches: values against references, memory, rows, crops, refusals."""

import copy
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from pretrained.errors import ArgumentError, GenerationError, UnknownArgumentError
from pretrained.torch.cache import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingLayer,
    EncoderDecoderCache,
    OffloadedLayer,
    QuantizedCache,
    QuantizedLayer,
    SlidingWindowCache,
    StaticCache,
    StaticSlidingWindowLayer,
    as_cache,
)
from pretrained.torch.cache_offload import Transfers
from pretrained.torch.cache_quantized import dequantize_groups, quantize_groups

B, H, D = 2, 3, 16


def states(length, seed=0, batch=B, width=D, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    shape = (batch, H, length, width)
    return tuple(torch.randn(shape, generator=gen).to(dtype) for _ in range(2))


def config(**values):
    return SimpleNamespace(num_hidden_layers=2, **values)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- group quantization --------------------------------------------------------------------------


def slow_groups(x, nbits, dim):
    """Quantize and unpack in numpy, one group at a time, in double precision."""
    x = np.moveaxis(x.astype(np.float64), dim, -1)
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        group = x[index]
        low, levels = group.min(), 2**nbits - 1
        scale = (group.max() - low) / levels or 1.0
        out[index] = low + np.clip(np.round((group - low) / scale), 0, levels) * scale
    return np.moveaxis(out, -1, dim)


@pytest.mark.parametrize("nbits", [2, 4, 8])
@pytest.mark.parametrize("dim", [3, 4])
def test_groups_equal_a_slow_reference(nbits, dim):
    x = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    packed, scale, low = quantize_groups(x, nbits, dim)
    assert packed.dtype == torch.uint8 and packed.shape[dim] == 8 * nbits // 8
    found = dequantize_groups(packed, scale, low, nbits, dim)
    np.testing.assert_allclose(found, slow_groups(x.numpy(), nbits, dim), atol=2e-5)
    assert ((found - x).abs() <= scale / 2 + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_errors_in_16_bits_are_half_a_step_and_what_the_dtype_rounds(dtype, nbits):
    x = (torch.randn(4, 4, 4, 64) * 5 + 20).to(dtype)
    packed, scale, low = quantize_groups(x, nbits, 3)
    found = dequantize_groups(packed, scale, low, nbits, 3)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    spread = scale.float() * (2**nbits - 1)
    bound = scale.float() / 2 + eps * (spread + found.float().abs())
    assert ((found.float() - x.float()).abs() <= bound).all()


def test_equal_values_and_infinities():
    x = torch.full((1, 1, 1, 8), 3.5)
    assert torch.equal(dequantize_groups(*quantize_groups(x, 4, 3), 4, 3), x)
    x[..., 0] = float("nan")
    assert dequantize_groups(*quantize_groups(x, 4, 3), 4, 3).isnan().all()


AXES = [("quanto", 0, 0), ("quanto", -1, 0), ("quanto", -1, -1), ("hqq", 1, 1), ("hqq", 0, 1)]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("backend", "axis_key", "axis_value"), AXES)
def test_a_quantized_layer_returns_all_tokens_within_half_a_step(backend, axis_key, axis_value, window):
    layer = QuantizedLayer(8, axis_key, axis_value, 8, 12, backend=backend, sliding_window=window)
    exact = DynamicLayer() if window is None else DynamicSlidingLayer(window)
    for step, length in enumerate([30, 1, 1, 5, 1, 1, 1, 9, 40, 1, 1]):
        k, v = states(length, step)
        sizes = exact.get_mask_sizes(length)
        assert layer.get_mask_sizes(length) == sizes
        mine, full = layer.update(k, v), exact.update(k, v)
        assert layer.get_seq_length() == exact.get_seq_length()
        for a, b in zip(mine, full, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 0.02
            assert torch.equal(a[:, :, -length:], b[:, :, -length:]), "new tokens come back as they are"
    assert layer.batch_size == B and layer.is_initialized
    if window is None:
        assert layer.keys.shape == exact.keys.shape and (layer.keys - exact.keys).abs().max() < 0.02


def test_keys_along_tokens_follow_the_reference():
    layer = QuantizedLayer(4, -1, 0, 8, 8)
    k, v = states(16)
    layer.update(k, v)
    keys, values = layer.update(*states(1, 1))
    np.testing.assert_allclose(
        keys[:, :, :16].reshape(B, H, 2, 8, D), slow_groups(k.reshape(B, H, 2, 8, D).numpy(), 4, 3), atol=2e-5
    )
    np.testing.assert_allclose(
        values[:, :, :16].reshape(B, H, 16, 2, 8),
        slow_groups(v.reshape(B, H, 16, 2, 8).numpy(), 4, 4),
        atol=2e-5,
    )


def test_what_is_quantized_is_never_quantized_again():
    layer = QuantizedLayer(2, q_group_size=8, residual_length=4)
    layer.update(*states(8))
    first = layer.update(*states(1, 1))[0][:, :, :8].clone()
    for step in range(40):
        keys, _ = layer.update(*states(1, 2 + step))
    assert torch.equal(keys[:, :, :8], first)


@pytest.mark.parametrize(("nbits", "share"), [(8, 0.55), (4, 0.3), (2, 0.18)])
def test_memory_of_a_long_prompt(nbits, share):
    plain, small = DynamicLayer(), QuantizedLayer(nbits)
    k, v = states(8000, batch=1, width=64, dtype=torch.bfloat16)
    plain.update(k, v)
    small.update(k, v)
    del k, v
    assert small.nbytes <= share * plain.nbytes
    for step in range(127):
        small.update(*states(1, step, batch=1, width=64, dtype=torch.bfloat16))
    assert small.nbytes <= (share + 0.03) * plain.nbytes
    assert QuantizedCache("quanto", config(), nbits).nbytes == 0


@pytest.mark.parametrize("axes", [(0, 0), (-1, -1)])
@pytest.mark.parametrize("keep", [45, 41, 33, 20, 8, 3, 0])
def test_a_quantized_layer_goes_back(axes, keep):
    layer, exact = QuantizedLayer(8, *axes, 8, 8), DynamicLayer()
    for step, length in enumerate([40, 1, 1, 1, 1, 1]):
        layer.update(*states(length, step))
        exact.update(*states(length, step))
    assert layer.can_crop(keep)
    layer.crop(keep)
    exact.crop(keep)
    assert layer.get_seq_length() == keep and layer.get_mask_sizes(2) == (keep + 2, 0)
    for seed in (50, 51):
        mine, full = layer.update(*states(9, seed)), exact.update(*states(9, seed))
        assert all((a - b).abs().max() < 0.03 for a, b in zip(mine, full, strict=True))


def test_rows_of_a_quantized_cache():
    cache = QuantizedCache("quanto", config(), 8, q_group_size=8, residual_length=4)
    for layer in range(2):
        cache.update(*states(7), layer)
    k, _ = cache.update(*states(1, 1), 0)
    cache.update(*states(1, 1), 1)
    k = k.clone()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert (cache[0][0] - k[[1, 1]]).abs().max() < 0.03
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 4, 5]))
    assert cache.batch_size == cache.max_batch_size == 3
    keys, _ = cache.update(*states(1, 2, batch=3), 0)
    assert (keys[:, :, :8] - k[[1, 1, 1]]).abs().max() < 0.03
    with pytest.raises(GenerationError, match="batch 3, found batch 2"):
        cache.update(*states(1), 0)
    twin = copy.deepcopy(cache)
    cache.reset()
    assert cache.batch_size == -1 and cache.nbytes == 0 and twin.batch_size == 3


def test_a_prompt_is_let_go_of_once_it_is_quantized():
    layer = QuantizedLayer(4, -1, 0, 8, 16)
    k, v = states(101)
    refs = [weakref.ref(k), weakref.ref(v)]
    layer.update(k, v)
    del k, v
    gc.collect()
    assert [ref() for ref in refs] == [None, None] and layer.get_seq_length() == 101


WRONG = [
    ({"nbits": 3}, r"nbits cannot be obeyed \(nbits\): expected 2, 4 or 8, found 3\. Take 4"),
    ({"nbits": 1}, "expected 2, 4 or 8"),
    ({"backend": "quatno"}, r"no quantized cache by the name 'quatno'.*'quanto', 'hqq'.*Leave it out"),
    (
        {"axis_key": 1},
        r"axis_key cannot be obeyed.*0 \(groups along channels\) or -1 \(groups along tokens\)",
    ),
    ({"backend": "hqq", "axis_value": -1}, r"axis_value cannot be obeyed.*1 \(groups along channels\) or 0"),
    ({"q_group_size": 0}, "q_group_size must be a whole number of 1 or more.*found 0"),
    ({"q_group_size": 6, "nbits": 2}, "does not fill whole bytes.*multiple of 4, for 2 bits, found 6"),
    ({"residual_length": 0}, "residual_length must be a whole number of 1 or more"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_of_quantization_that_cannot_work(settings, message):
    with pytest.raises(ArgumentError, match=message):
        QuantizedCache(config=config(), **settings)


def test_groups_must_divide_a_head():
    wide = config(hidden_size=3 * D, num_attention_heads=3)
    with pytest.raises(
        GenerationError, match=r"divide the heads' width.*divisor of 16, found 24.*=16, or leave"
    ):
        QuantizedCache("quanto", wide, q_group_size=24)
    assert QuantizedCache("quanto", wide).layers[0].q_group_size == D
    with pytest.raises(GenerationError, match="divisor of 16, found 64"):
        QuantizedLayer().update(*states(1))
    with (
        pytest.raises(GenerationError, match=r"gradients are recorded, as rounding has no gradient"),
        torch.enable_grad(),
    ):
        k, v = states(1)
        QuantizedLayer(q_group_size=8).update(k.requires_grad_(), v)


# -- windows of fixed size -----------------------------------------------------------------------


def oracle_config(window):
    return transformers.MistralConfig(
        hidden_size=H * D,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=H,
        sliding_window=window,
    )


@pytest.mark.parametrize("window", [1, 2, 5, 30, 100])
@pytest.mark.parametrize("chunks", [[7, 1, 1, 4, 1, 90, 1, 1], [1] * 200, [64, 64, 3]])
def test_a_fixed_window_equals_the_growing_one(window, chunks):
    layer, exact = StaticSlidingWindowLayer(1000, window), DynamicSlidingLayer(window)
    address = None
    for step, length in enumerate(chunks):
        k, v = states(length, step)
        assert layer.get_mask_sizes(length) == exact.get_mask_sizes(length)
        for a, b in zip(layer.update(k, v), exact.update(k, v), strict=True):
            assert torch.equal(a, b)
        address = address or layer._keys.data_ptr()
    assert layer._keys.data_ptr() == address and layer._keys.shape[2] <= window + 63
    assert layer.get_seq_length() == sum(chunks) and layer.get_max_length() == -1
    layer.reset()
    assert layer.get_seq_length() == 0 and layer._keys.data_ptr() == address


def test_a_fixed_window_equals_transformers_on_what_a_query_sees():
    ours = SlidingWindowCache(oracle_config(6), 64)
    theirs = transformers.StaticCache(oracle_config(6), 64)
    for step in range(20):
        k, v = states(1, step)
        mine, their = ours.update(k, v, 0), theirs.update(k, v, 0)
        seen = min(step + 1, 6)
        assert torch.equal(mine[0], their[0][:, :, :seen] if step < 6 else their[0][:, :, -6:])
    assert not ours.is_compileable and ours.is_sliding == [True]


def test_a_fixed_window_goes_back_by_its_margin():
    layer, exact = StaticSlidingWindowLayer(500, 8, margin=5), DynamicLayer()
    for step in range(300):
        layer.update(*states(1, step))
        exact.update(*states(1, step))
        if step % 37 == 36:
            for end in (layer, exact):
                end.crop(exact.get_seq_length() - 5)
    mine, full = layer.update(*states(3, 999)), exact.update(*states(3, 999))
    assert torch.equal(mine[0], full[0][:, :, -10:])
    assert not layer.can_crop(10)
    with pytest.raises(GenerationError, match="cannot go back that far"):
        layer.crop(10)
    layer.keep_margin(100)
    for step in range(150):
        layer.update(*states(1, step))
        exact.update(*states(1, step))
    for end in (layer, exact):
        end.crop(exact.get_seq_length() - 100)
    assert torch.equal(layer.update(*states(1, 5))[0], exact.update(*states(1, 5))[0][:, :, -8:])


def test_a_short_fixed_window_is_full_at_its_length():
    layer = StaticSlidingWindowLayer(8, 20)
    assert layer.get_max_length() == 8
    layer.update(*states(8))
    with pytest.raises(GenerationError, match=r"static cache is full.*at most 8.*found 9.*max_cache_len=20"):
        layer.update(*states(1))
    for wrong, message in ((0, "sliding_window must be 1 or more: found 0. Leave it None"), (-1, "sliding")):
        with pytest.raises(ArgumentError, match=message):
            StaticSlidingWindowLayer(8, wrong)
    with pytest.raises(ArgumentError, match="max_cache_len must be 1 or more"):
        StaticSlidingWindowLayer(0, 4)
    with pytest.raises(ArgumentError, match="sliding_window must be 1 or more"):
        QuantizedLayer(sliding_window=0)
    with pytest.raises(GenerationError, match=r"cannot be written by positions.*StaticCache"):
        StaticSlidingWindowLayer(8, 4).update(*states(1), torch.tensor([0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DynamicSlidingLayer(6),
        lambda: StaticSlidingWindowLayer(500, 6),
        lambda: QuantizedLayer(8, q_group_size=8, residual_length=3, sliding_window=6),
        lambda: OffloadedLayer(DynamicSlidingLayer(6)),
    ],
)
def test_rows_after_a_window_has_slid(make):
    layer = make()
    for step in range(90):
        keys, _ = layer.update(*states(1, step))
    keys = keys.clone()
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0, 1]))
    more, _ = layer.update(*states(1, 200, batch=3))
    assert more.shape == (3, H, 6, D) and (more[:, :, :5] - keys[[1, 1, 1], :, -5:]).abs().max() < 0.03


# -- offloading ----------------------------------------------------------------------------------


class Simulated(Transfers):
    """An accelerator that is the CPU too: counts what is on it."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits, self.most = [], 0, 0

    def is_away(self, states):
        return True

    def to_host(self, *states):
        return tuple(tensor.clone() for tensor in states)

    def fetch(self, pair, device):
        copies = tuple(tensor.clone() for tensor in pair)
        self.copies.append(weakref.ref(copies[0]))
        self.most = max(self.most, sum(ref() is not None for ref in self.copies))
        return copies, "event"

    def wait(self, copies, event):
        assert event == "event"
        self.waits += 1


def simulate(cache):
    simulated = Simulated()
    for layer in cache.layers:
        layer._transfers = simulated
    return simulated


MAKERS = {
    "dynamic": (lambda off: DynamicCache(config=many(), offloading=off)),
    "sliding": (lambda off: DynamicCache(config=many(sliding_window=4), offloading=off)),
    "static": (lambda off: StaticCache(many(), 64, offloading=off)),
}


def many(**values):
    return SimpleNamespace(num_hidden_layers=6, **values)


@pytest.mark.parametrize("kind", MAKERS)
def test_offloaded_layers_come_one_ahead(kind):
    plain, away = MAKERS[kind](False), MAKERS[kind](True)
    device = simulate(away)
    for step, length in enumerate([9, 1, 1, 3, 1]):
        for layer in range(6):
            k, v = states(length, 10 * step + layer)
            assert plain.get_mask_sizes(length, layer) == away.get_mask_sizes(length, layer)
            for a, b in zip(plain.update(k, v, layer), away.update(k, v, layer), strict=True):
                assert torch.equal(a, b)
        if step == 2:
            away.reorder_cache(torch.tensor([1, 0]))
            plain.reorder_cache(torch.tensor([1, 0]))
            away.crop(-1) if kind != "sliding" else None
            plain.crop(-1) if kind != "sliding" else None
    assert device.most <= 2 and device.waits == 4 * 6
    assert torch.equal(plain[3][0], away[3][0])
    assert not away.is_compileable and len(device.copies) <= 4 * 6 + 2


def test_offloading_leaves_windows_alone_where_it_is_told_to():
    kinds = ["sliding_attention", "full_attention"]
    mixed = config(layer_types=kinds, sliding_window=4)
    cache = DynamicCache(config=mixed, offloading=True, offload_only_non_sliding=True)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingLayer, OffloadedLayer]
    assert cache.is_sliding == [True, False]
    both = DynamicCache(config=mixed, offloading=True)
    assert [type(layer) for layer in both.layers] == [OffloadedLayer, OffloadedLayer]
    fixed = SlidingWindowCache(mixed, 32, offloading=True)
    assert [type(layer) for layer in fixed.layers] == [StaticSlidingWindowLayer, OffloadedLayer]


def test_an_offloaded_static_cache_is_allocated_on_the_host():
    cache = StaticCache(config(), 16, offloading=True)
    cache.early_initialization(B, [H, H], [D, D], torch.float32, "cpu")
    assert cache.is_initialized and cache.nbytes == 2 * 2 * B * H * 16 * D * 4
    with pytest.raises(GenerationError, match="offloaded cache cannot be written by positions"):
        cache.update(*states(1), 0, torch.tensor([0]))
    cache.update(*states(16), 0)
    with pytest.raises(GenerationError, match="static cache is full"):
        cache.update(*states(1), 0)


def test_layers_of_any_cache_can_be_moved_and_brought_back():
    cache = DynamicCache()
    cache.update(*states(3), 0)
    before = cache[0][0].clone()
    cache.offload(0)
    cache.prefetch(0)
    assert torch.equal(cache[0][0], before)


# -- names and signatures ------------------------------------------------------------------------


def test_constructors_take_what_transformers_does():
    pairs = [states(4, layer) for layer in range(2)]
    for made in (DynamicCache(pairs), DynamicCache(ddp_cache_data=pairs, config=config())):
        assert made.get_seq_length() == 4 and torch.equal(made[1][1], pairs[1][1])
    assert len(DynamicCache(config())) == 2, "a config may come first"
    assert type(Cache(layer_class_to_replicate=DynamicLayer)._make(0)) is DynamicLayer
    old = config(num_attention_heads=H, hidden_size=H * D)
    cache = StaticCache(config=old, max_batch_size=B, max_cache_len=8, device="cpu", dtype=torch.float64)
    assert cache.is_initialized and cache.layers[0]._keys.shape == (B, H, 8, D)
    assert cache.layers[0]._keys.dtype == torch.float64 and cache.get_max_cache_shape() == 8
    with pytest.raises(GenerationError, match="batch 2, found batch 1"):
        cache.update(*states(1, batch=1, dtype=torch.float64), 0)
    with pytest.raises(ArgumentError, match=r"does not say how wide keys are.*early_initialization"):
        StaticCache(config(), 8, max_batch_size=2)
    with pytest.raises(UnknownArgumentError, match="StaticCache has no argument 'max_batch'"):
        StaticCache(config(), 8, max_batch=2)
    with pytest.raises(ArgumentError, match=r"needs its length.*prompt's length plus max_new_tokens"):
        StaticCache(config())


def test_an_encoder_decoder_cache_is_made_of_two():
    rows = tuple(states(4, layer) + states(7, layer) for layer in range(2))
    both = EncoderDecoderCache(rows)
    assert both.is_updated == {0: True, 1: True} and both.get_seq_length() == 4
    assert both.nbytes == 2 * 2 * B * H * 11 * D * 4
    with pytest.raises(ArgumentError, match=r"made of two caches.*found DynamicCache"):
        EncoderDecoderCache(DynamicCache())
    assert type(as_cache(rows)) is EncoderDecoderCache and type(as_cache(rows[:0])) is DynamicCache
    assert as_cache(None) is None and as_cache(both) is both


def test_past_recording_lets_windows_go_back():
    for cache in (
        DynamicCache(config=config(sliding_window=4)),
        SlidingWindowCache(config(sliding_window=4), 200),
        QuantizedCache("quanto", config(sliding_window=4), 8, q_group_size=8, residual_length=2),
    ):
        cache.activate_past_recording()
        whole = DynamicLayer()
        for step in range(100):
            cache.update(*states(1, step), 0)
            cache.update(*states(1, step), 1)
            whole.update(*states(1, step))
        assert cache.can_crop(7) and cache.can_crop(-93)
        cache.crop(7)
        whole.crop(7)
        found, exact = cache.update(*states(1, 7), 0)[0], whole.update(*states(1, 7))[0]
        assert (found - exact[:, :, -4:]).abs().max() < 0.03
