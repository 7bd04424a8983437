# SPDX-License-Identifier: Apache-2.0
"""prune_heads on every architecture: a model without heads computes what it computes with them silenced."""

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrained import AutoModel
from pretrained.errors import ArgumentError, WeightsError
from pretrained.testing import battery
from pretrained.testing.battery import Case
from pretrained.torch.cache import DynamicCache, StaticCache
from pretrained.torch.models.bert import BertForMaskedLM, BertModel
from pretrained.torch.models.distilbert import DistilBertModel
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5EncoderModel, T5ForConditionalGeneration
from pretrained.torch.models.t5_stacks import T5Decoder
from support.cases import CASES, TINY_LLAMA
from support.cases_bert import TINY_BERT, TINY_DISTILBERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5

# Where each family's heads come together.
OUTPUTS = (
    "attention.output.dense",
    "attention.out_lin",
    ".attn.c_proj",
    "self_attn.o_proj",
    "SelfAttention.o",
)


def outputs_of(model):
    """Return each layer's output projection, by its published name, and where an encoder has one, there."""
    found = [
        module
        for name, module in model.named_modules()
        if f".{name}".endswith(OUTPUTS) and "decoder." not in name and "crossattention" not in name
    ]
    return found


def some_heads(model):
    """Return heads of the first and the last layer, whole groups where there are groups."""
    group = getattr(model.config, "group_size", 1)
    last = model.config.num_hidden_layers - 1
    return {0: list(range(group)), last: list(range(group, 2 * group))} if last else {0: list(range(group))}


def silence(model, heads):
    """Let the heads' results count for nothing, without any of the code under test."""
    size = getattr(model.config, "head_size", None) or model.config.d_kv
    for layer, numbers in heads.items():
        gone = torch.tensor([head * size + channel for head in numbers for channel in range(size)])

        def mute(_module, args, gone=gone):
            return (args[0].index_fill(-1, gone, 0.0), *args[1:])

        outputs_of(model)[layer].register_forward_pre_hook(mute)
    return model


def tensors(output):
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple) and name.endswith("hidden_states"):
            yield from ((f"{name}[{index}]", part) for index, part in enumerate(value))


def is_multi_query(case):
    config = case.model_class.config_class(**case.config)
    return getattr(config, "group_size", 1) == config.num_attention_heads


def with_two_layers(case):
    """Return the case with layers that differ in their heads but share a table of positions."""
    if case.kind != "seq2seq":
        return case
    return replace(case, config={**case.config, "num_layers": 2}, name=str(case))


PRUNABLE = [with_two_layers(case) for case in CASES if not is_multi_query(case)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_pruned_is_silenced(case, attention):
    model = case.build()
    model.set_attn_implementation(attention)
    heads = some_heads(model)
    silenced = silence(copy.deepcopy(model), heads)
    before = model.num_parameters()
    model.prune_heads(heads)
    inputs = case.inputs(model.config, "right")
    with torch.no_grad():
        expected = dict(tensors(silenced(**inputs, output_hidden_states=True)))
        found = dict(tensors(model(**inputs, output_hidden_states=True)))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error = float((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6))
        assert error <= 1e-6, f"{name}: {error:.2e}"
    assert model.num_parameters() == before - gone_by_hand(model, heads)
    assert model.config.pruned_heads == heads


def gone_by_hand(model, heads):
    """Return how many weights a head takes along: rows of queries, keys, values; columns of the output."""
    config = model.config
    hidden, size = config.hidden_size, getattr(config, "head_size", None) or config.d_kv
    group = getattr(config, "group_size", 1)
    biased = config.model_type in ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "gpt2")
    qkv_bias = biased or bool(getattr(config, "qkv_bias", False))
    total = 0
    for numbers in heads.values():
        rows = len(numbers) * size + 2 * (len(numbers) // group) * size
        total += rows * (hidden + qkv_bias) + len(numbers) * size * hidden
    return total


@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_a_pruned_model_saves_and_loads(case, tmp_path):
    model = case.build()
    model.prune_heads(some_heads(model))
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    keys = json.loads((first / "config.json").read_text())["pruned_heads"]
    assert keys == {str(layer): heads for layer, heads in some_heads(model).items()}
    loaded, info = type(model).from_pretrained(first, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.to_dict() == model.config.to_dict()
    for (name, one), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other), name
    inputs = case.inputs(model.config)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0], rtol=1e-6, atol=1e-6)
    loaded.save_pretrained(second)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    # A second cut goes on from the numbers of the first; the same cut again changes nothing.
    loaded.prune_heads(some_heads(model))
    assert loaded.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("case", [case for case in PRUNABLE if case.keeps_cache], ids=str)
def test_caches_have_the_heads_that_are_left(case):
    model = case.build()
    group, heads = getattr(model.config, "group_size", 1), some_heads(model)
    model.prune_heads(heads)
    inputs = case.inputs(model.config)
    ids = inputs.pop("input_ids")
    positions = torch.arange(ids.shape[1])[None]
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, ids.shape[1])):
        with torch.no_grad():
            whole = model(ids, use_cache=False, position_ids=positions, **inputs)[0]
            parts = [
                model(
                    ids[:, a:b],
                    position_ids=positions[:, a:b],
                    past_key_values=cache,
                    use_cache=True,
                    **inputs,
                )[0]
                for a, b in ((0, 7), (7, 8), (8, 11))
            ]
        found = torch.cat(parts, dim=1) if parts[0].shape[1] == 7 else parts[-1]
        assert float((found - whole).abs().max()) <= 1e-5
        total = model.config.num_attention_heads
        held = [layer.keys.shape[1] for layer in cache.layers]
        assert held == [(total - len(heads.get(i, ()))) // group for i in range(len(held))]


@pytest.mark.parametrize(
    ("cls", "config"),
    [(LlamaForCausalLM, TINY_LLAMA), (GPT2LMHeadModel, TINY_GPT2), (T5ForConditionalGeneration, TINY_T5)],
)
def test_pruned_models_generate_what_silenced_ones_do(cls, config):
    model = Case(cls, config).build()
    silenced = silence(copy.deepcopy(model), some_heads(model))
    model.prune_heads(some_heads(model))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    found = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, silenced.generate(ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("case", [case for case in PRUNABLE if case.kind != "seq2seq"][::5], ids=str)
def test_pruned_models_train(case):
    model = case.build().train()
    model.prune_heads(some_heads(model))
    inputs = case.with_labels(case.inputs(model.config), model.config)
    if inputs is None:
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(**inputs).loss.backward()
    optimizer.step()
    cut = [name for name in before if name.endswith(tuple(f"{output}.weight" for output in OUTPUTS))]
    assert cut and all(not torch.equal(before[name], model.get_parameter(name)) for name in cut)


def test_gradients_and_frozen_weights_are_cut_along():
    model = Case(BertModel, TINY_BERT).build()
    model(torch.tensor([[5, 6, 7]]))[0].sum().backward()
    own = model.encoder.layer[0].attention.self
    own.key.weight.requires_grad_(False)
    gradient = own.query.weight.grad.clone()
    model.prune_heads({0: [1]})
    assert torch.equal(own.query.weight.grad, torch.cat([gradient[:8], gradient[16:]]))
    assert not own.key.weight.requires_grad and own.query.weight.requires_grad


def test_cuts_in_turn_are_one_cut():
    model, other = Case(BertModel, TINY_BERT).build(), Case(BertModel, TINY_BERT).build()
    model.prune_heads({0: [2], 1: [0]})
    model.prune_heads({0: [0]})
    model.prune_heads({0: [2, 3]})
    other.prune_heads({1: [0], 0: [3, 0, 2]})
    assert model.config.pruned_heads == other.config.pruned_heads == {0: [0, 2, 3], 1: [0]}
    for (name, one), (_, two) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


def test_the_body_inside_a_head_is_cut():
    model = Case(BertForMaskedLM, TINY_BERT).build()
    model.prune_heads({1: [3]})
    assert model.bert.encoder.layer[1].attention.self.query.out_features == 24
    assert model.bert.config is model.config
    assert [w.shape[1] for w in model(torch.tensor([[5, 6]]), output_attentions=True).attentions] == [4, 3]


# -- files of transformers 4 -----------------------------------------------------------------------


def published_bert(folder):
    """Write what transformers 4 wrote of a BERT of 2 layers and 3 heads of 4 channels, pruned by {0: [1]}.

    Names and shapes as published; heads 0 and 2 of layer 0 are left, so its queries have 8 rows.
    """
    generator = torch.Generator().manual_seed(7)

    def new(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {
        "embeddings.word_embeddings.weight": new(30, 12),
        "embeddings.position_embeddings.weight": new(16, 12),
        "embeddings.token_type_embeddings.weight": new(2, 12),
        "embeddings.LayerNorm.weight": 1 + new(12),
        "embeddings.LayerNorm.bias": new(12),
        "pooler.dense.weight": new(12, 12),
        "pooler.dense.bias": new(12),
    }
    for layer, inner in ((0, 8), (1, 12)):
        path = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            weights[f"{path}.attention.self.{name}.weight"] = new(inner, 12)
            weights[f"{path}.attention.self.{name}.bias"] = new(inner)
        weights[f"{path}.attention.output.dense.weight"] = new(12, inner)
        weights[f"{path}.attention.output.dense.bias"] = new(12)
        weights[f"{path}.intermediate.dense.weight"] = new(20, 12)
        weights[f"{path}.intermediate.dense.bias"] = new(20)
        weights[f"{path}.output.dense.weight"] = new(12, 20)
        weights[f"{path}.output.dense.bias"] = new(12)
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            weights[f"{path}.{norm}.weight"], weights[f"{path}.{norm}.bias"] = 1 + new(12), new(12)
    config = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None,
        "dtype": "float32",
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 12,
        "initializer_range": 0.02,
        "intermediate_size": 20,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 16,
        "model_type": "bert",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "pruned_heads": {"0": [1]},
        "transformers_version": "4.57.6",
        "type_vocab_size": 2,
        "use_cache": True,
        "vocab_size": 30,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def bert_by_hand(weights, ids):
    """Compute the published BERT with plain functions, two heads in layer 0 and three in layer 1."""
    from torch.nn import functional as F

    def norm(x, path):
        return F.layer_norm(x, (12,), weights[f"{path}.weight"], weights[f"{path}.bias"], 1e-12)

    def dense(x, path):
        return F.linear(x, weights[f"{path}.weight"], weights[f"{path}.bias"])

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer, heads in ((0, 2), (1, 3)):
        path, found = f"encoder.layer.{layer}", []
        q, k, v = (dense(x, f"{path}.attention.self.{name}") for name in ("query", "key", "value"))
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            scores = (q[..., part] @ k[..., part].mT) / 2  # 2 is the root of 4 channels
            found.append(scores.softmax(-1) @ v[..., part])
        x = norm(
            dense(torch.cat(found, -1), f"{path}.attention.output.dense") + x,
            f"{path}.attention.output.LayerNorm",
        )
        inner = F.gelu(dense(x, f"{path}.intermediate.dense"))
        x = norm(dense(inner, f"{path}.output.dense") + x, f"{path}.output.LayerNorm")
    return x


def test_a_pruned_folder_of_transformers_4_loads(tmp_path):
    weights = published_bert(tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is BertModel and not any(info.values())
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], bert_by_hand(weights, ids), rtol=1e-5, atol=1e-5)
    # One more head: of the three numbers of before, 2 is the second of those that are left.
    model.prune_heads({0: [2]})
    assert model.config.pruned_heads == {0: [1, 2]}
    assert torch.equal(
        model.encoder.layer[0].attention.self.query.weight,
        weights["encoder.layer.0.attention.self.query.weight"][:4],
    )


WRITTEN = Path(__file__).parents[1] / "data" / "pruned-by-transformers-4"


@pytest.mark.parametrize("cls", [BertModel, GPT2LMHeadModel, T5EncoderModel])
def test_folders_that_transformers_4_has_pruned_and_written(cls):
    """See the README there; 4.57.6 also reads the folders of BERT and GPT-2 that are written here."""
    folder = WRITTEN / cls.config_class.model_type
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and model.config.pruned_heads == {0: [1, 3], 1: [0]}
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = model(expected["input_ids"])[0]
    torch.testing.assert_close(found, expected["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [BertModel, GPT2LMHeadModel])
def test_pruned_folders_are_written_as_transformers_4_has_them(cls, tmp_path):
    folder = WRITTEN / cls.config_class.model_type
    cls.from_pretrained(folder).save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, folder)]
    assert configs[0]["pruned_heads"] == configs[1]["pruned_heads"] == {"0": [1, 3], "1": [0]}


@pytest.mark.parametrize("case", PRUNABLE, ids=str)
def test_the_skeleton_of_a_pruned_model(case):
    heads = some_heads(case.build())
    module = importlib.import_module(case.model_class.config_class.__module__)
    family = case.model_class.config_class.__name__.removesuffix("Config")
    pruned = replace(case, config={**case.config, "pruned_heads": heads}, name=str(case))
    battery.check_skeleton(pruned, module.skeleton, family)


ONE_OF_EACH = {"LlamaModel", "GPT2Model", "BertModel", "DistilBertModel", "T5EncoderModel"}


@pytest.mark.parametrize("case", [case for case in PRUNABLE if str(case) in ONE_OF_EACH], ids=str)
def test_a_pruned_model_is_one_graph(case):
    heads = some_heads(case.build())
    battery.check_compiled(replace(case, config={**case.config, "pruned_heads": heads}))


def test_files_that_are_not_as_small_as_their_config_says(tmp_path):
    published_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruned_heads": {"1": [0]}}))
    with pytest.raises(WeightsError, match=r"encoder\.layer\.0\.attention\.self\.query\.weight"):
        BertModel.from_pretrained(tmp_path)


def test_the_layout_of_a_pruned_t5_encoder():
    """The table of positions serves every layer, and so keeps a column for each head of before."""
    model = Case(T5EncoderModel, {**TINY_T5, "num_layers": 2}).build()
    heads, size = model.config.num_heads, model.config.d_kv
    model.prune_heads({0: [1]})
    block = model.encoder.block[0].layer[0].SelfAttention
    assert block.relative_attention_bias.weight.shape[1] == heads
    assert block.q.weight.shape[0] == block.o.weight.shape[1] == (heads - 1) * size
    assert model.encoder.block[1].layer[0].SelfAttention.q.weight.shape[0] == heads * size


# -- what is refused, and changes nothing ------------------------------------------------------------


def unchanged_after(model, heads, text, error=ArgumentError):
    before = {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()}
    config = copy.deepcopy(model.config.__dict__)
    with pytest.raises(error, match=text):
        model.prune_heads(heads)
    assert {name: (id(p), tuple(p.shape)) for name, p in model.named_parameters()} == before
    assert model.config.__dict__ == config


def test_quantized_layers_are_refused(tmp_path):
    Case(LlamaForCausalLM, TINY_LLAMA).build().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": "int8"})
    unchanged_after(model, {0: [0, 1]}, r"not cut out of quantized weights \(layer 0\).*dequantize\(\) first")
    model.dequantize()
    model.prune_heads({0: [0, 1]})
    assert model.config.pruned_heads == {0: [0, 1]}


def test_placed_models_are_refused(tmp_path):
    Case(LlamaForCausalLM, TINY_LLAMA).build().save_pretrained(tmp_path / "model")
    places = {"model": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    model = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    unchanged_after(model, {0: [0, 1]}, r"placed over devices or the disk .*prune and save it")


def test_a_pruned_model_is_placed_and_quantized(tmp_path):
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    model.prune_heads({0: [0, 1]})
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7]])
    places = {"model": "cpu", "model.layers.0": "disk", "lm_head": "cpu"}
    placed = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    rounded = LlamaForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config={"quant_method": "int8"}
    )
    with torch.no_grad():
        assert torch.equal(placed(ids)[0], model(ids)[0])
        assert float((rounded(ids)[0] - model(ids)[0]).abs().max()) < 0.1


class Adapter(nn.Module):
    """A layer around another one, as adapter libraries put there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_layers_of_others_are_refused():
    model = Case(BertModel, TINY_BERT).build()
    own = model.encoder.layer[1].attention.self
    own.value = Adapter(own.value)
    text = r"plain dense layers only \(layer 1\): expected Linear or Conv1D.*Adapter.*merge_and_unload"
    unchanged_after(model, {0: [0], 1: [0]}, text)
    model.prune_heads({0: [0]})


def test_parametrized_layers_are_refused():
    model = Case(BertModel, TINY_BERT).build()
    nn.utils.parametrizations.weight_norm(model.encoder.layer[0].attention.self.query)
    unchanged_after(model, {0: [0]}, "plain dense layers only")


def test_shared_weights_are_refused():
    model = Case(BertModel, TINY_BERT).build()
    first, second = (layer.attention.self for layer in model.encoder.layer)
    second.key.weight = first.key.weight
    text = r"several layers share.*layer\.0\.attention\.self\.key\.weight, encoder\.layer\.1\.attention"
    unchanged_after(model, {0: [0]}, text)


def test_a_config_that_another_model_has_pruned_is_noticed():
    model = Case(BertModel, TINY_BERT).build()
    other = BertModel(model.config)
    other.prune_heads({0: [0]})
    unchanged_after(model, {0: [1]}, r"do not agree \(layer 0\): expected 24 channels, found 32.*deepcopy")


def test_models_without_such_heads_say_so():
    model = T5Decoder(T5EncoderModel.config_class(**TINY_T5))
    unchanged_after(model, {0: [0]}, r"T5Decoder has no heads that can be pruned .*prunable_attentions")
    multi_query = Case(LlamaForCausalLM, {**TINY_LLAMA, "num_key_value_heads": 1}).build()
    unchanged_after(multi_query, {0: [0]}, "multi-query attention")


@pytest.mark.parametrize("fails_at", range(0, 20, 3))
def test_a_cut_that_is_interrupted_leaves_the_model_as_it_was(monkeypatch, fails_at):
    model = Case(DistilBertModel, TINY_DISTILBERT).build()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(ids)[0]
    state, plain, count = dict(model.named_parameters()), nn.Module.__setattr__, 0

    def fail_once(self, name, value):
        nonlocal count
        count += 1
        if count == fails_at + 1:
            raise KeyboardInterrupt
        plain(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", fail_once)
    with pytest.raises(KeyboardInterrupt):
        model.prune_heads({0: [0], 1: [2]})
    monkeypatch.undo()
    assert all(parameter is state[name] for name, parameter in model.named_parameters())
    assert model.config.pruned_heads == {}
    with torch.no_grad():
        assert torch.equal(model(ids)[0], expected)
    model.prune_heads({0: [0], 1: [2]})


def test_a_compiled_model_is_traced_anew():
    model = Case(BertModel, TINY_BERT).build()
    compiled, ids = torch.compile(model, fullgraph=True, backend="eager"), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        compiled(ids)
        model.prune_heads({0: [0]})
        assert torch.equal(compiled(ids)[0], model(ids)[0])
    torch._dynamo.reset()
