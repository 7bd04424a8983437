# SPDX-License-Identifier: Apache-2.0
"""What the battery does not reach in BERT: distances, pruned layers, files, losses, what is refused."""

import numpy as np
import pytest
import torch

from pretrained.arch.bert import BertConfig, skeleton
from pretrained.errors import ArgumentError, ConfigError, WeightsError
from pretrained.testing.battery import Case, assert_close, compare_outputs
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache, StaticCache
from pretrained.torch.load import skeleton_of
from pretrained.torch.models import bert
from support.cases_bert import TINY_BERT, encoder_output
from support.oracle import transformers_twin

RELATIVE = ["relative_key", "relative_key_query"]


def build(cls, **config):
    return Case(cls, {**TINY_BERT, **config}).build()


def ids(length=11, rows=3, seed=1):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- relative positions --------------------------------------------------------------------------------


def attention_reference(layer, hidden, kind, allowed):
    """Attention of one layer in numpy, one query and key at a time (Huang et al. 2020, methods 3 and 4)."""
    part = {name: p.detach().double().numpy() for name, p in layer.attention.self.named_parameters()}
    hidden = hidden.detach().double().numpy()
    size, heads = layer.attention.self.attention_head_size, layer.attention.self.num_attention_heads
    q, k, v = (hidden @ part[f"{n}.weight"].T + part[f"{n}.bias"] for n in ("query", "key", "value"))
    table = part["distance_embedding.weight"]
    middle, length, out = len(table) // 2, hidden.shape[0], np.zeros_like(q)
    for h in range(heads):
        channels = slice(h * size, (h + 1) * size)
        for i in range(length):
            scores = np.full(length, -np.inf)
            for j in (j for j in range(length) if allowed(i, j)):
                distance = table[i - j + middle]
                score = q[i, channels] @ k[j, channels] + q[i, channels] @ distance
                if kind == "relative_key_query":
                    score += k[j, channels] @ distance
                scores[j] = score / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[i, channels] = weights / weights.sum() @ v[:, channels]
    return out


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_equal_the_papers(kind, is_decoder, implementation):
    model = build(
        bert.BertModel, position_embedding_type=kind, is_decoder=is_decoder, max_position_embeddings=12
    )
    model.set_attn_implementation(implementation)
    layer, kept = model.encoder.layer[0], {}
    layer.attention.self.register_forward_hook(lambda m, args, out: kept.update(hidden=args[0], out=out[0]))
    mask = torch.ones(1, 11, dtype=torch.int64)
    mask[0, -3:] = 0
    with torch.no_grad():
        model(ids(rows=1), attention_mask=mask)
    expected = attention_reference(
        layer, kept["hidden"][0], kind, lambda i, j: mask[0, j] and (j <= i or not is_decoder)
    )
    np.testing.assert_allclose(kept["out"][0].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_do_not_enter_the_embeddings(kind):
    model = build(bert.BertModel, position_embedding_type=kind)
    before = model(ids()).last_hidden_state
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.add_(1.0)
    assert torch.equal(model(ids()).last_hidden_state, before)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_count_on_from_a_cache(kind, static):
    model = build(bert.BertLMHeadModel, position_embedding_type=kind, is_decoder=True)
    tokens = ids()
    # Longer than the table of distances: slots that stay empty must do no harm.
    cache = StaticCache(model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
    parts = []
    with torch.no_grad():
        whole = model(tokens).logits
        for piece in (slice(0, 5), slice(5, 6), slice(6, 11)):
            more = {"cache_position": torch.arange(piece.start, piece.stop)} if static else {}
            parts.append(model(tokens[:, piece], past_key_values=cache, **more).logits)
            if static:
                cache.advance(piece.stop - piece.start)
    assert_close(torch.cat(parts, 1), whole, "cached")


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_train(kind):
    model = build(bert.BertForMaskedLM, position_embedding_type=kind)
    model(ids(), labels=ids(seed=2)).loss.backward()
    gradient = model.bert.encoder.layer[1].attention.self.distance_embedding.weight.grad
    # 11 tokens are at most 10 apart; the table reaches 23.
    assert (gradient[13:34].abs().sum(1) > 0).all() and not gradient[:13].any() and not gradient[34:].any()


@pytest.mark.parametrize("kind", RELATIVE)
def test_the_skeleton_has_the_distances(kind):
    config = BertConfig(**TINY_BERT, position_embedding_type=kind, is_decoder=True, add_cross_attention=True)
    with torch.device("meta"):
        model = bert.BertLMHeadModel(config)
    held = skeleton_of(model)
    promised = skeleton(config, "LMHeadModel")
    assert {k: p.shape for k, p in promised.params.items()} == {k: p.shape for k, p in held.params.items()}


def test_relative_attention_is_one_graph():
    model = build(bert.BertModel, position_embedding_type="relative_key_query")
    with torch.no_grad():
        graph = torch.compile(model, fullgraph=True, backend="eager")(ids()).last_hidden_state
        assert_close(graph, model(ids()).last_hidden_state, "compiled")
    torch._dynamo.reset()


# -- pruned heads --------------------------------------------------------------------------------------


def test_a_folder_with_pruned_heads_loads(tmp_path):
    """A head that is cut out does what a head does whose output is multiplied by nothing."""
    full = build(bert.BertModel)
    state, heads, size = full.state_dict(), {0: [1, 3], 1: [0]}, 8
    silenced = build(bert.BertModel)
    for layer, pruned in heads.items():
        path = f"encoder.layer.{layer}.attention"
        keep = torch.tensor([i for i in range(32) if i // size not in pruned])
        gone = torch.tensor([i for i in range(32) if i // size in pruned])
        for name in ("query", "key", "value"):
            for leaf in ("weight", "bias"):
                state[f"{path}.self.{name}.{leaf}"] = state[f"{path}.self.{name}.{leaf}"][keep]
        state[f"{path}.output.dense.weight"] = state[f"{path}.output.dense.weight"][:, keep]
        with torch.no_grad():
            silenced.get_parameter(f"{path}.output.dense.weight")[:, gone] = 0
    config = BertConfig(**TINY_BERT, pruned_heads={"0": [1, 3], "1": [0]})
    bert.BertModel.from_pretrained(None, config=config, state_dict=state).save_pretrained(tmp_path)
    loaded, info = bert.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.config.pruned_heads == heads
    assert loaded.encoder.layer[0].attention.self.num_attention_heads == 2
    with torch.no_grad():
        out = loaded(ids(), output_attentions=True)
        assert_close(out.last_hidden_state, silenced(ids()).last_hidden_state, "pruned")
    assert [weights.shape[1] for weights in out.attentions] == [2, 3]


# -- cross-attention -----------------------------------------------------------------------------------


def test_the_encoders_keys_are_computed_once():
    model = build(bert.BertLMHeadModel, is_decoder=True, add_cross_attention=True)
    tokens, encoder = ids(), encoder_output(model.config)
    with torch.no_grad():
        whole = model(tokens, **encoder).logits
        first = model(tokens[:, :6], use_cache=True, **encoder)
        cache = first.past_key_values
        assert isinstance(cache, EncoderDecoderCache) and cache.is_updated == {0: True, 1: True}
        # A second encoder output is not looked at: its keys and values are those of the first.
        other = {**encoder, "encoder_hidden_states": torch.zeros_like(encoder["encoder_hidden_states"])}
        second = model(tokens[:, 6:], past_key_values=cache, **other)
    assert cache.get_seq_length() == 11 and cache.cross_attention_cache.get_seq_length() == 13
    assert_close(torch.cat([first.logits, second.logits], 1), whole, "cached")


def test_cross_attentions_are_returned():
    model = build(bert.BertModel, is_decoder=True, add_cross_attention=True)
    inputs = {"input_ids": ids(), **encoder_output(model.config), "output_attentions": True}
    ours, theirs = model(**inputs), transformers_twin(model)(**inputs)
    assert [w.shape for w in ours.cross_attentions] == [(3, 4, 11, 13)] * 2
    compare_outputs(ours, theirs, None, what="cross-attentions")


# -- positions, chunks, attention implementations ----------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_chunks_change_nothing(size):
    plain, chunked = build(bert.BertModel), build(bert.BertModel, chunk_size_feed_forward=size)
    assert_close(chunked(ids()).last_hidden_state, plain(ids()).last_hidden_state, "chunked")


def test_eager_and_fused_attention_agree():
    model = build(bert.BertModel)
    fused = model(ids()).last_hidden_state
    model.set_attn_implementation("eager")
    assert_close(model(ids()).last_hidden_state, fused, "eager")


def test_a_model_without_a_pooler(tmp_path):
    config = BertConfig(**TINY_BERT)
    model = bert.BertModel(config, add_pooling_layer=False).eval()
    assert model.pooler is None and model(ids()).pooler_output is None
    model.save_pretrained(tmp_path)
    again, info = bert.BertModel.from_pretrained(tmp_path, add_pooling_layer=False, output_loading_info=True)
    assert again.pooler is None and not any(info.values())
    promised = skeleton(config, add_pooling_layer=False).params
    assert list(promised) == list(model.state_dict())


# -- files -----------------------------------------------------------------------------------------------


def test_a_missing_pooler_is_reported_and_initialised(tmp_path, caplog):
    bert.BertForMaskedLM(BertConfig(**TINY_BERT)).save_pretrained(tmp_path)
    model, info = bert.BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert not model.pooler.dense.bias.any() and model.pooler.dense.weight.std() > 0.01
    # The head's keys are said to be unused, its tied ones are not in the file.
    assert len(info["unexpected_keys"]) == 5 and "cls.predictions.bias" in info["unexpected_keys"]
    assert "newly initialised" in caplog.text and "not used" in caplog.text


def test_a_missing_body_weight_is_an_error(tmp_path):
    state = bert.BertModel(BertConfig(**TINY_BERT)).state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    with pytest.raises(WeightsError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        bert.BertModel.from_pretrained(None, config=BertConfig(**TINY_BERT), state_dict=state)


def test_a_file_of_another_head_serves_the_body(tmp_path):
    source = build(bert.BertForPreTraining)
    source.save_pretrained(tmp_path)
    model, info = bert.BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, output_loading_info=True
    )
    assert info["missing_keys"] == ["classifier.bias", "classifier.weight"]
    assert all(key.startswith("cls.") for key in info["unexpected_keys"])
    assert torch.equal(model.bert.pooler.dense.weight, source.bert.pooler.dense.weight)
    assert model.classifier.weight.shape == (4, 32)


def test_names_of_the_first_files_load():
    source = build(bert.BertForMaskedLM)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in source.state_dict().items()
        if key != "cls.predictions.decoder.bias"
    }
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    model, info = bert.BertForMaskedLM.from_pretrained(
        None, config=source.config, state_dict=old, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(model(ids()).logits, source(ids()).logits)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("name", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
@pytest.mark.parametrize("tied", [True, False])
def test_either_name_of_the_bias_is_enough(tied, name):
    source = build(bert.BertForMaskedLM, tie_word_embeddings=tied)
    state = {
        k: v for k, v in source.state_dict().items() if not k.endswith("s.bias") and "decoder.bias" not in k
    }
    state[name] = source.cls.predictions.bias.detach()
    model = bert.BertForMaskedLM.from_pretrained(None, config=source.config, state_dict=state)
    head = model.cls.predictions
    assert head.decoder.bias is head.bias and torch.equal(head.bias, state[name])
    assert (head.decoder.weight is model.bert.embeddings.word_embeddings.weight) is tied


def test_the_trained_one_of_two_biases_is_taken():
    """Transformers 5 saves both where the word embedding is not tied, and trains only the decoder's."""
    source = build(bert.BertForMaskedLM, tie_word_embeddings=False)
    state = source.state_dict()
    state["cls.predictions.bias"] = torch.zeros(99)
    model = bert.BertForMaskedLM.from_pretrained(None, config=source.config, state_dict=state)
    assert torch.equal(model(ids()).logits, source(ids()).logits)


def test_a_new_decoder_brings_its_bias():
    model = build(bert.BertForMaskedLM)
    new = torch.nn.Linear(32, 99)
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is new and model.cls.predictions.bias is new.bias


def test_new_heads_start_from_the_configs_spread():
    torch.manual_seed(0)
    model = bert.BertForPreTraining(BertConfig(**TINY_BERT, initializer_range=0.5))
    head = model.cls.predictions
    assert not head.bias.any() and 0.4 < head.transform.dense.weight.std() < 0.6
    assert not model.bert.embeddings.word_embeddings.weight[0].any()
    assert torch.equal(head.transform.LayerNorm.weight, torch.ones(32))


# -- losses ------------------------------------------------------------------------------------------------


def test_pretraining_adds_both_losses():
    model = build(bert.BertForPreTraining)
    labels, following = ids(seed=2).masked_fill(ids(seed=3) > 40, -100), torch.tensor([0, 1, 1])
    ours = model(ids(), labels=labels, next_sentence_label=following)
    theirs = transformers_twin(model)(ids(), labels=labels, next_sentence_label=following)
    assert_close(ours.loss, theirs.loss, "both")
    parts = [model(ids(), labels=labels).loss, model(ids(), next_sentence_label=following).loss]
    assert_close(parts[0] + parts[1], theirs.loss, "the sum of each")
    assert model(ids()).loss is None and len(model(ids(), return_dict=False)) == 2


def test_the_loss_with_a_decoder_of_its_own():
    model = build(bert.BertForMaskedLM, tie_word_embeddings=False)
    twin = transformers_twin(model)
    ours, theirs = model(ids(), labels=ids(seed=2)), twin(ids(), labels=ids(seed=2))
    assert_close(ours.loss, theirs.loss, "loss")
    ours.loss.backward()
    theirs.loss.backward()
    head, other = model.cls.predictions, twin.cls.predictions
    assert_close(head.bias.grad, other.decoder.bias.grad, "bias")
    assert_close(head.decoder.weight.grad, other.decoder.weight.grad, "decoder")


@pytest.mark.parametrize(
    ("problem", "count", "labels"),
    [
        (None, 1, torch.tensor([0.5, -1.0, 2.0])),
        ("regression", 2, torch.randn(3, 2, generator=torch.Generator().manual_seed(0))),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])),
        (None, 3, torch.tensor([2, 0, 1])),
    ],
    ids=["one-number", "numbers", "several-classes", "one-class"],
)
def test_a_row_is_classified_by_the_kind_of_problem(problem, count, labels):
    model = build(bert.BertForSequenceClassification, num_labels=count, problem_type=problem)
    theirs = transformers_twin(model)(ids(), labels=labels)
    assert_close(model(ids(), labels=labels).loss, theirs.loss, "loss")


def test_labels_make_no_cache():
    model = build(bert.BertLMHeadModel, is_decoder=True)
    assert model(ids(), labels=ids()).past_key_values is None
    assert model(ids()).past_key_values.get_seq_length() == 11


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "inputs", "message"),
    [
        ({}, {"input_ids": ids(25)}, "at most 24 tokens.*25 tokens"),
        (
            {},
            {"input_ids": ids(), "encoder_hidden_states": torch.ones(3, 2, 32)},
            "has no layers that look at",
        ),
        ({}, {"input_ids": ids(), "encoder_attention_mask": torch.ones(3, 2)}, "which are not given"),
        ({}, {}, "Give either token ids or embeddings"),
        (
            {},
            {"input_ids": ids(), "attention_mask": torch.ones(3, 4)},
            "does not cover the keys",
        ),
    ],
    ids=["too-long", "no-cross-attention", "mask-alone", "nothing", "short-mask"],
)
def test_inputs_that_cannot_work_are_refused(config, inputs, message):
    with pytest.raises(ArgumentError, match=rf"(?s){message}"):
        build(bert.BertModel, **config)(**inputs)


def test_a_cache_and_new_tokens_may_be_too_long_together():
    model = build(bert.BertLMHeadModel, is_decoder=True)
    cache = model(ids(20)).past_key_values
    with pytest.raises(ArgumentError, match=r"(?s)at most 24 tokens.*26 tokens"):
        model(ids(6), past_key_values=cache)


def test_question_answering_has_two_outputs():
    with pytest.raises(ConfigError, match="scores the two ends of an answer"):
        bert.BertForQuestionAnswering(BertConfig(**TINY_BERT, num_labels=3))


def test_a_language_model_that_is_no_decoder_says_so(caplog):
    bert.BertLMHeadModel(BertConfig(**TINY_BERT))
    assert "BertLMHeadModel sees the tokens it is to predict" in caplog.text


def test_a_decoder_of_its_own_in_the_file_is_kept():
    """Whatever the config says: files of fine-tuned models are right about themselves."""
    source = build(bert.BertForMaskedLM, tie_word_embeddings=False)
    config = BertConfig(**TINY_BERT)
    model = bert.BertForMaskedLM.from_pretrained(None, config=config, state_dict=source.state_dict())
    assert torch.equal(model(ids()).logits, source(ids()).logits)
    assert not model.config.tie_word_embeddings
