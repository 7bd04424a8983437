# SPDX-License-Identifier: Apache-2.0
"""What the battery does not reach in the T5 family: distances, caches, float16, files, heads, refusals."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from pretrained.arch.t5 import T5Config
from pretrained.errors import ArgumentError, ConfigError, WeightsError
from pretrained.testing import reference
from pretrained.testing.battery import Case, assert_close, relative_error
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache, StaticCache
from pretrained.torch.models import mt5, t5, umt5
from pretrained.torch.models.t5_layers import (
    T5SelfAttention,
    add_mask,
    keep_finite,
    relative_position_bucket,
)
from support.cases_t5 import TINY_T5, UNTIED
from support.oracle import transformers_twin

LM_CLASSES = [
    t5.T5ForConditionalGeneration,
    mt5.MT5ForConditionalGeneration,
    umt5.UMT5ForConditionalGeneration,
]


def build(cls=t5.T5ForConditionalGeneration, dtype=torch.float32, **config):
    return Case(cls, {**TINY_T5, **config}).build(dtype)


def ids(length, rows=3, seed=1):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- relative positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 9), (8, 128), (4, 5), (7, 20)])
def test_buckets_equal_the_slow_ones_and_the_oracles(num_buckets, max_distance, bidirectional):
    facts = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    positions = torch.arange(-300, 300)
    fast = relative_position_bucket(positions, **facts)
    assert fast.tolist() == [reference.relative_position_bucket(p, **facts) for p in positions.tolist()]
    assert torch.equal(fast, T5Attention._relative_position_bucket(positions, **facts))
    assert int(fast.min()) >= 0 and int(fast.max()) == num_buckets - 1 - (bidirectional and num_buckets % 2)


@pytest.mark.parametrize("on_device", [False, True], ids=["counted", "tensor"])
@pytest.mark.parametrize(("first", "queries", "keys"), [(0, 6, 6), (5, 3, 8), (7, 1, 8), (2, 2, 12)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_biases_are_looked_up_pair_by_pair(bidirectional, first, queries, keys, on_device):
    layer = T5SelfAttention(T5Config(**TINY_T5), 0, bidirectional=bidirectional)
    last = first + queries - 1
    found = layer.position_bias(torch.tensor(last) if on_device else last, queries, keys)
    table, facts = layer.relative_attention_bias.weight, {"num_buckets": 8, "max_distance": 9}
    for i in range(queries):
        for j in range(keys):
            bucket = reference.relative_position_bucket(j - first - i, bidirectional=bidirectional, **facts)
            assert torch.equal(found[0, :, i, j], table[bucket])


def test_biases_add_up_with_any_mask():
    bias = torch.randn(1, 2, 3, 4)
    allowed = torch.rand(2, 1, 3, 4) > 0.5
    assert add_mask(bias, None) is bias
    boolean = add_mask(bias, allowed)
    additive = add_mask(bias, torch.where(allowed, 0.0, torch.finfo(torch.float32).min))
    torch.testing.assert_close(boolean.softmax(-1), additive.softmax(-1))
    assert torch.equal(
        boolean[allowed.expand(2, 2, 3, 4)], bias.expand(2, 2, 3, 4)[allowed.expand(2, 2, 3, 4)]
    )


@pytest.mark.parametrize(
    ("cls", "tables"), [(t5.T5Model, 2), (mt5.MT5Model, 2), (umt5.UMT5Model, 3)], ids=["t5", "mt5", "umt5"]
)
def test_how_many_tables_there_are(cls, tables):
    names = [name for name, _ in build(cls).named_parameters() if "relative_attention_bias" in name]
    assert len(names) == tables
    assert not any("EncDecAttention" in name for name in names)


# -- the decoder's cache -------------------------------------------------------------------------------


def decode_in_pieces(model, cache, start, total, encoded, mask, *, decoder_mask=None, static=False):
    parts = []
    for piece in (slice(0, 4), slice(4, 5), slice(5, 8), *(slice(i, i + 1) for i in range(8, total))):
        more = {}
        if static:
            more["cache_position"] = torch.arange(piece.start, piece.stop)
        if decoder_mask is not None:
            more["decoder_attention_mask"] = decoder_mask[:, : piece.stop]
        out = model(
            decoder_input_ids=start[:, piece],
            attention_mask=mask,
            encoder_outputs=encoded,
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        if static:
            cache.advance(piece.stop - piece.start)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "static by position"])
@pytest.mark.parametrize("cls", LM_CLASSES)
def test_cached_equals_uncached(cls, kind, padding):
    model = build(cls)
    source, target, total = ids(9), ids(11, seed=2), 11
    mask, decoder_mask = torch.ones_like(source), None
    mask[0, :3] = 0
    if padding != "none":
        decoder_mask = torch.ones_like(target)
        decoder_mask[1, slice(0, 2) if padding == "left" else slice(8, None)] = 0
    own = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(model.config, max_cache_len=14)
    )
    cache = EncoderDecoderCache(own, DynamicCache())
    with torch.no_grad():
        encoded = model.get_encoder()(source, mask)
        whole = model(source, mask, target, decoder_mask, use_cache=False).logits
        pieces = decode_in_pieces(
            model, cache, target, total, encoded, mask, decoder_mask=decoder_mask, static="by" in kind
        )
    seen = torch.ones_like(target) if decoder_mask is None else decoder_mask
    assert_close(pieces[seen.bool()], whole[seen.bool()], f"{kind}, {padding}")


def test_the_encoders_keys_are_computed_once():
    model, calls = build(), []
    source, target = ids(6), ids(5)
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        encoded = model.get_encoder()(source)
        first = model(encoder_outputs=encoded, decoder_input_ids=target[:, :2])
        model(
            encoder_outputs=encoded, decoder_input_ids=target[:, 2:3], past_key_values=first.past_key_values
        )
    assert len(calls) == model.config.num_decoder_layers


@pytest.mark.parametrize("kind", ["a plain cache", "tuples"])
def test_older_kinds_of_caches(kind):
    model = build()
    source, target = ids(6), ids(5)
    with torch.no_grad():
        whole = model(source, decoder_input_ids=target, use_cache=True)
        if kind == "tuples":
            half = model(source, decoder_input_ids=target[:, :3], use_cache=True).past_key_values
            given = half.to_legacy_cache()
            assert len(given[0]) == 4
        else:
            given = DynamicCache(config=model.config)
            model(source, decoder_input_ids=target[:, :3], past_key_values=given, use_cache=True)
        rest = model(source, decoder_input_ids=target[:, 3:], past_key_values=given, use_cache=True)
    assert_close(rest.logits, whole.logits[:, 3:], kind)
    assert isinstance(rest.past_key_values, EncoderDecoderCache)
    assert rest.past_key_values.get_seq_length() == 5


def test_no_cache_where_none_is_wanted():
    model = build()
    assert model(ids(4), decoder_input_ids=ids(3), use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(ids(4), decoder_input_ids=ids(3)).past_key_values is None


# -- inputs --------------------------------------------------------------------------------------------


def test_encoder_outputs_save_the_encoder():
    model = build()
    source, target = ids(6), ids(5)
    with torch.no_grad():
        whole = model(source, decoder_input_ids=target)
        encoded = model.get_encoder()(source)
        model.encoder.forward = None
        for given in (encoded, (encoded.last_hidden_state,), [encoded.last_hidden_state]):
            assert torch.equal(model(encoder_outputs=given, decoder_input_ids=target).logits, whole.logits)


def test_labels_become_the_decoders_input():
    model = build(decoder_start_token_id=2)
    labels = torch.tensor([[5, 6, 1, -100, -100], [7, 8, 9, 4, 1]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[2, 5, 6, 1, 0], [2, 7, 8, 9, 4]]
    assert labels[0, 3] == -100
    from_labels = model(ids(6, 2), labels=labels)
    by_hand = model(ids(6, 2), decoder_input_ids=shifted, labels=labels)
    assert torch.equal(from_labels.logits, by_hand.logits) and torch.equal(from_labels.loss, by_hand.loss)


def test_num_items_in_batch_divides_the_loss():
    model, labels = build(), torch.tensor([[5, 6, 1, -100, -100]])
    mean = model(ids(6, 1), labels=labels).loss
    torch.testing.assert_close(model(ids(6, 1), labels=labels, num_items_in_batch=6).loss, mean / 2)


def test_padding_of_the_input_changes_nothing():
    model = build(umt5.UMT5ForConditionalGeneration)
    source, target = ids(6, 1), ids(5, 1)
    right = torch.cat([source, torch.zeros(1, 3, dtype=torch.long)], 1)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), source], 1)
    mask = torch.ones_like(right)
    mask[0, 6:] = 0
    with torch.no_grad():
        plain = model(source, decoder_input_ids=target).logits
        assert_close(model(right, mask, target).logits, plain, "right")
        assert_close(model(left, mask.flip(1), target).logits, plain, "left")


def test_ready_masks_pass_through():
    model, source, target = build(), ids(6), ids(5)
    mask, causal = torch.ones(3, 1, 1, 6, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).tril()
    mask[0, ..., :2] = False
    with torch.no_grad():
        flat = model(source, mask[:, 0, 0].long(), target).logits
        ready = model(source, mask, target, causal[None, None].expand(3, 1, 5, 5)).logits
    assert torch.equal(flat, ready)


def test_setting_the_attention_reaches_both_stacks():
    model = build()
    with torch.no_grad():
        fused = model(ids(6), decoder_input_ids=ids(5))
        assert fused.cross_attentions is None
        model.set_attn_implementation("eager")
        stepwise = model(ids(6), decoder_input_ids=ids(5), output_attentions=True)
    assert model.encoder.config is model.decoder.config is model.config
    assert_close(fused.logits, stepwise.logits, "eager")
    assert [w.shape for w in stepwise.cross_attentions] == [(3, 4, 5, 6)] * 2


@pytest.mark.parametrize("cls", [t5.T5ForConditionalGeneration, t5.T5ForSequenceClassification])
def test_replacing_the_embedding_reaches_both_stacks(cls):
    model = build(cls)
    new = torch.nn.Embedding(99, 32)
    model.set_input_embeddings(new)
    base = model.base_model
    assert model.get_input_embeddings() is new
    assert base.get_encoder().embed_tokens is base.get_decoder().embed_tokens is base.shared is new


# -- numbers -------------------------------------------------------------------------------------------


def save(model, folder, **config):
    model.save_pretrained(folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize("config", [{}, UNTIED], ids=["v1.0", "v1.1"])
def test_wo_stays_float32_in_float16(config, tmp_path):
    save(build(**config), tmp_path)
    model = t5.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        name for name in dtypes if name.endswith(".wo.weight")
    }
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float16, attn_implementation="sdpa"
    ).eval()
    inputs = {"input_ids": ids(6), "decoder_input_ids": ids(5)}
    with torch.no_grad():
        ours, other = model(**inputs), theirs(**inputs)
    assert ours.logits.dtype == torch.float16
    assert relative_error(ours.logits, other.logits) < 5e-3
    loaded = t5.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_overflow_in_float16_is_clipped():
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([1.0, -float("inf"), float("inf"), largest], dtype=torch.float16)
    assert keep_finite(x).tolist() == [1.0, -64512.0, 64512.0, 64512.0]
    finite = torch.tensor([1.0, largest], dtype=torch.float16)
    assert torch.equal(keep_finite(finite), finite)
    wide = torch.tensor([float("inf")])
    assert keep_finite(wide) is wide


def test_new_weights_have_the_published_spread():
    sizes = {"vocab_size": 2000, "d_model": 64, "d_kv": 32, "d_ff": 512, "num_heads": 8, "num_labels": 2}
    torch.manual_seed(0)
    model = t5.T5ForQuestionAnswering(T5Config(**TINY_T5 | sizes, initializer_factor=2.0))
    expected = {
        "shared.weight": 2.0,
        "encoder.block.0.layer.0.SelfAttention.q.weight": 2 * (64 * 32) ** -0.5,
        "encoder.block.0.layer.0.SelfAttention.k.weight": 2 * 64**-0.5,
        "encoder.block.0.layer.0.SelfAttention.o.weight": 2 * 256**-0.5,
        "decoder.block.0.layer.1.EncDecAttention.v.weight": 2 * 64**-0.5,
        "decoder.block.0.layer.2.DenseReluDense.wi.weight": 2 * 64**-0.5,
        "decoder.block.0.layer.2.DenseReluDense.wo.weight": 2 * 512**-0.5,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 2 * 64**-0.5,
        "qa_outputs.weight": 2 * 64**-0.5,
    }
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, std in expected.items():
        spread = 0.2 if weights[name].numel() < 1000 else 0.05
        assert abs(float(weights[name].std()) / std - 1) < spread, name
    assert float(weights["qa_outputs.bias"].abs().max()) == 0
    assert weights["encoder.final_layer_norm.weight"].unique().tolist() == [2.0]


# -- files ---------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Let `change` edit the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {key: tensor.clone() for key, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def load(folder, cls=t5.T5ForConditionalGeneration, **kwargs):
    return cls.from_pretrained(folder, output_loading_info=True, **kwargs)


def test_a_head_in_the_file_counts_whatever_the_config_says(tmp_path):
    # transformers 5 writes true for every T5, also for v1.1 with its own head.
    original = build(**UNTIED)
    save(original, tmp_path / "a", tie_word_embeddings=True)
    model, info = load(tmp_path / "a")
    assert not any(info.values())
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert (model.config.tie_word_embeddings, model.config.scale_decoder_outputs) == (False, False)
    model.save_pretrained(tmp_path / "b")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
    inputs = {"input_ids": ids(6), "decoder_input_ids": ids(5)}
    with torch.no_grad():
        assert_close(model(**inputs).logits, theirs(**inputs).logits, "saved again")


def test_an_absent_head_is_the_embedding_whatever_the_config_says(tmp_path):
    original = build()
    save(original, tmp_path, tie_word_embeddings=False, scale_decoder_outputs=False)
    model, info = load(tmp_path)
    assert not any(info.values())
    assert model.lm_head.weight is model.shared.weight
    assert (model.config.tie_word_embeddings, model.config.scale_decoder_outputs) == (True, False)


def test_a_copy_of_the_embedding_in_the_file_stays_tied(tmp_path):
    save(build(), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["shared.weight"]}))
    model, info = load(tmp_path)
    assert not any(info.values())
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight


def test_a_file_without_shared(tmp_path):
    # google/madlad400: the embedding under an alias, beside another head.
    original = build(**UNTIED)
    save(original, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"decoder.embed_tokens.weight": t.pop("shared.weight")}))
    model, info = load(tmp_path)
    assert not any(info.values())
    for weight in (model.shared.weight, model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight):
        assert torch.equal(weight, original.shared.weight)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_tensors_in_place_of_files_settle_ties_too():
    original = build(**UNTIED)
    config = type(original.config)(**{**TINY_T5, **UNTIED, "tie_word_embeddings": True})
    model = t5.T5ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=original.state_dict()
    )
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert model.lm_head.weight is not model.shared.weight
    tied = {"lm_head.weight": original.shared.weight.clone()}
    model = t5.T5ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=original.state_dict() | tied
    )
    assert model.lm_head.weight is model.shared.weight


def test_the_first_files_unused_table_is_dropped(tmp_path):
    save(build(), tmp_path)
    key = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.ones(8, 4)}))
    model, info = load(tmp_path)
    assert not any(info.values())
    assert key in model.load_report.dropped


def test_the_encoder_of_a_whole_model(tmp_path):
    original = build(**UNTIED)
    save(original, tmp_path)
    model, info = load(tmp_path, t5.T5EncoderModel)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model(ids(6))[0], original.get_encoder()(ids(6))[0])
    model.save_pretrained(tmp_path / "encoder")
    again, info = load(tmp_path / "encoder", t5.T5EncoderModel)
    assert not any(info.values())
    assert torch.equal(again.shared.weight, original.shared.weight)
    with pytest.raises(WeightsError, match="decoder"):
        load(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("cls", "new"),
    [
        (t5.T5ForSequenceClassification, {"classification_head.dense", "classification_head.out_proj"}),
        (t5.T5ForTokenClassification, {"classifier"}),
        (t5.T5ForQuestionAnswering, {"qa_outputs"}),
    ],
)
def test_new_heads_on_a_whole_model(cls, new, tmp_path):
    original = build()
    save(original, tmp_path)
    model, info = load(tmp_path, cls)
    assert set(info["missing_keys"]) == {f"{name}.{part}" for name in new for part in ("weight", "bias")}
    assert torch.equal(model.get_input_embeddings().weight, original.shared.weight)
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(model.base_model.state_dict()[key], original.state_dict()[key])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_headless_model_takes_a_classifiers_weights(tmp_path):
    original = build(t5.T5ForSequenceClassification)
    save(original, tmp_path)
    model, info = load(tmp_path, t5.T5Model)
    assert not info["missing_keys"]
    assert torch.equal(model.shared.weight, original.transformer.shared.weight)


# -- generation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, UNTIED], ids=["plain", "gated-untied"])
@pytest.mark.parametrize("cls", LM_CLASSES)
def test_greedy_tokens_equal_the_oracles(cls, config):
    # As many decoder as encoder blocks: transformers' own cache fails where there are more.
    model = build(cls, **config, num_layers=2)
    source = ids(7)
    mask = torch.ones_like(source)
    mask[0, :3] = 0
    inputs = {"input_ids": source.masked_fill(mask == 0, 0), "attention_mask": mask, "max_new_tokens": 16}
    expected = transformers_twin(model).generate(**inputs, do_sample=False)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, do_sample=False, **options), expected), options


# -- what is refused -----------------------------------------------------------------------------------


def test_a_decoder_needs_something_to_read():
    with pytest.raises(ArgumentError, match="decoder_input_ids"):
        build(t5.T5Model)(ids(4))


def test_a_row_without_its_end_is_not_classified():
    model = build(t5.T5ForSequenceClassification)
    source = ids(5)
    source[[0, 2], 3] = 1
    with pytest.raises(ArgumentError, match=r"token 1 in every row.*row 1"):
        model(source)
    with pytest.raises(ArgumentError, match="Pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_rows_may_have_several_ends():
    model = build(t5.T5ForSequenceClassification)
    source = ids(6, 2)
    source[0, 2] = source[0, 5] = source[1, 4] = 1
    with torch.no_grad():
        both = model(source).logits
        assert_close(both[:1], model(source[:1]).logits, "two ends")
        assert_close(both[1:], model(source[1:]).logits, "one end")


def test_an_answer_has_two_ends():
    with pytest.raises(ConfigError, match="two outputs"):
        build(t5.T5ForQuestionAnswering, num_labels=3)


def test_labels_need_a_start_token():
    model = build()
    model.config.pad_token_id = None
    with pytest.raises(ConfigError, match=r"Set both on model\.config"):
        model(ids(4), labels=ids(3))


def test_dummy_inputs_run():
    model = build()
    assert model(**model.dummy_inputs).logits.shape == (3, 5, 99)
