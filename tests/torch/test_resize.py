# SPDX-License-Identifier: Apache-2.0
"""`resize_token_embeddings` as a transaction: arguments, values, ties, configs, homes, and failures."""

import copy
import logging
import re

import numpy as np
import pytest
import torch
from torch import nn

from pretrained.core.config import PreTrainedConfig
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import ArgumentError, NotYetError, PlacementError
from pretrained.testing.battery import Case
from pretrained.torch import dispatch, resize, row_edits
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.bert import BertForMaskedLM
from pretrained.torch.models.distilbert import DistilBertModel
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from pretrained.torch.models.roberta import RobertaForMaskedLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from pretrained.torch.nn import Conv1D
from pretrained.torch.offload import DiskWeights
from pretrained.torch.quantize_model import quantize_model
from pretrained.torch.quantized_blocks import GgufEmbedding
from support.cases import TINY_LLAMA
from support.cases_bert import TINY_BERT, TINY_DISTILBERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5
from support.fake_accelerator import FakeRuntime

CONFIGS = {
    LlamaForCausalLM: TINY_LLAMA,
    LlamaModel: TINY_LLAMA,
    LlamaForSequenceClassification: TINY_LLAMA,
    GPT2LMHeadModel: TINY_GPT2,
    BertForMaskedLM: TINY_BERT,
    RobertaForMaskedLM: TINY_BERT,
    DistilBertModel: TINY_DISTILBERT,
    T5ForConditionalGeneration: TINY_T5,
}


def build(cls=LlamaForCausalLM, dtype=torch.float32, **config):
    return Case(cls, {**CONFIGS[cls], **config}).build(dtype)


def state(model):
    """Everything that a failed edit must leave as it was."""
    return {
        "parameters": {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)},
        "values": {key: p.detach().clone() for key, p in model.named_parameters(remove_duplicate=False)},
        "facts": {
            path: {
                name: getattr(module, name)
                for name in ("num_embeddings", "out_features", "padding_idx", "vocab_size", "shape")
                if hasattr(module, name)
            }
            for path, module in model.named_modules(remove_duplicate=False)
        },
        "config": model.config.to_dict(),
        "given": model.config._given,
        "generation": None if model.generation_config is None else dict(model.generation_config._values),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "homes": copy.copy(getattr(model, "hf_device_map", None)),
    }


def assert_same(first, second):
    values, others = first.pop("values"), second.pop("values")
    assert first == second
    assert all(torch.equal(values[key], others[key]) for key in values)


# -- arguments -----------------------------------------------------------------------------------


def test_without_a_number_nothing_happens():
    model = build()
    before = state(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("size", "multiple", "rows"),
    [
        (110, None, 110),
        (100, 64, 128),
        (None, 64, 128),
        (None, 99, 99),
        (64, 64, 64),
        (np.int64(110), np.int32(8), 112),
        (torch.tensor(110), None, 110),
    ],
)
def test_sizes(size, multiple, rows):
    model = build()
    embedding = model.get_input_embeddings()
    assert model.resize_token_embeddings(size, multiple) is embedding
    assert embedding.num_embeddings == model.lm_head.out_features == model.vocab_size == rows
    assert model.config.vocab_size == rows and type(model.config.vocab_size) is int
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, rows)


class Size(int):
    pass


def test_a_subclass_of_int_counts():
    assert len(build().resize_token_embeddings(Size(7)).weight) == 7


@pytest.mark.parametrize("bad", [0, -3, True, False, 110.0, "110", np.bool_(True), np.float64(3), [110]])
@pytest.mark.parametrize("name", ["new_num_tokens", "pad_to_multiple_of"])
def test_numbers_that_count_nothing(name, bad):
    model = build()
    before = state(model)
    text = rf"{name} counts rows \({name}\): expected a whole number above 0, found .*\. Pass "
    with pytest.raises(ValueError, match=text):
        model.resize_token_embeddings(**{name: bad})
    assert_same(before, state(model))


def test_a_flag_that_is_none():
    with pytest.raises(ArgumentError, match=r"mean_resizing is True or False \(mean_resizing\): found 'no'"):
        build().resize_token_embeddings(110, mean_resizing="no")


def test_a_size_beyond_the_machine_is_refused_before_anything_changes():
    model = build()
    before = state(model)
    with pytest.raises(PlacementError, match="do not fit into this machine's memory"):
        model.resize_token_embeddings(10**15)
    assert_same(before, state(model))


# -- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50, 150])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_gradients_ties_and_layers_stay(dtype, tied, size):
    model = build(dtype=dtype, tie_word_embeddings=tied)
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.mark = "mine"
    layers = (model.model.embed_tokens, model.lm_head)
    old = [layer.weight.detach().clone() for layer in layers]
    seen = []
    layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.resize_token_embeddings(size)
    assert (model.model.embed_tokens, model.lm_head) == layers
    assert (layers[0].weight is layers[1].weight) is tied
    kept = min(size, 99)
    for layer, values in zip(layers, old, strict=True):
        assert layer.weight.dtype == dtype and layer.weight.shape == (size, 32)
        assert torch.equal(layer.weight[:kept], values[:kept])
        assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes
    assert layers[1].weight.requires_grad is False and layers[1].weight.mark == "mine"
    assert layers[0].weight.requires_grad is not tied
    model(torch.tensor([[1]]))
    assert seen and type(layers[0].weight) is nn.Parameter


def test_what_came_apart_stays_apart():
    model = build(tie_word_embeddings=True)
    head = nn.Linear(32, 99, bias=False)
    model.set_output_embeddings(head)
    old = head.weight.detach().clone()
    model.resize_token_embeddings(110)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight[:99], old)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
def test_both_names_of_a_bias(cls, tied):
    model = build(cls, tie_word_embeddings=tied)
    head = model.get_submodule(model._head_path)
    for size in (120, 40):
        model.resize_token_embeddings(size)
        assert head.bias is head.decoder.bias and head.bias.shape == (size,)
    # A bias that came apart has to fit all the same.
    head._parameters["bias"] = nn.Parameter(torch.arange(40.0))
    model.resize_token_embeddings(45, mean_resizing=False)
    assert head.bias.tolist() == [*range(40), 0, 0, 0, 0, 0] and head.decoder.bias.shape == (45,)
    model.resize_token_embeddings(50)
    assert torch.allclose(head.bias[45:], head.bias[:45].mean(), atol=1e-2)


def test_t5_has_one_table_under_all_names():
    model = build(T5ForConditionalGeneration)
    model.resize_token_embeddings(120)
    tables = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert all(table.weight is model.shared.weight and table.num_embeddings == 120 for table in tables)
    assert model.lm_head.weight is model.shared.weight and model.lm_head.out_features == 120


@pytest.mark.parametrize(("size", "expected"), [(60, 50), (50, None), (120, 50)])
def test_padding_is_kept_or_cut_off(size, expected, caplog):
    model = build(pad_token_id=50)
    with caplog.at_level(logging.WARNING):
        model.resize_token_embeddings(size)
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == expected
    assert model.generation_config.pad_token_id == expected
    assert bool(caplog.text) is (expected is None)
    if expected is None:
        assert "named tokens that are cut off, from 50 on; they no longer do in pad_token_id" in caplog.text


def test_roberta_cannot_lose_its_padding():
    model = build(RobertaForMaskedLM, pad_token_id=20)
    before = state(model)
    with pytest.raises(ArgumentError, match=r"The config does not allow this size.*padding"):
        model.resize_token_embeddings(20)
    assert_same(before, state(model))


def test_settings_lose_the_tokens_that_are_cut_off(caplog):
    model = build()
    model.config.eos_token_id = [2, 80]
    generation = model.generation_config
    generation.eos_token_id, generation.bos_token_id = [2, 80], 90
    generation.suppress_tokens, generation.bad_words_ids = [5, 70], [[5], [70, 3]]
    generation.sequence_bias = [[[4, 95], -1.0], [[6], 2.0]]
    generation.max_length = 77
    model.resize_token_embeddings(60)
    assert model.config.eos_token_id == [2] and generation.eos_token_id == [2]
    assert generation.bos_token_id is None and generation.suppress_tokens == [5]
    assert generation.bad_words_ids == [[5]] and generation.sequence_bias == [[[6], 2.0]]
    assert generation.max_length == 77
    assert "bad_words_ids, bos_token_id, eos_token_id, sequence_bias, suppress_tokens" in caplog.text
    out = model.generate(torch.tensor([[3, 4]]), max_new_tokens=3)
    assert out.max() < 60


def test_ids_that_were_never_in_the_vocabulary_are_left_alone():
    model = build(GPT2LMHeadModel, eos_token_id=50256)
    model.resize_token_embeddings(60)
    assert model.config.eos_token_id == 50256


def test_configs_and_files_follow(tmp_path):
    model = build(GPT2LMHeadModel)
    model.resize_token_embeddings(131)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config.vocab_size == 131 and torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.lm_head.weight is again.transformer.wte.weight


def test_a_mapped_model_is_resized_and_the_file_is_not(tmp_path):
    build().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(120)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_model_without_memory_has_other_shapes():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaForCausalLM.config_class(**TINY_LLAMA))
    model.resize_token_embeddings(120)
    assert model.lm_head.weight.is_meta and model.lm_head.weight.shape == (120, 32)


def test_a_part_of_a_model_says_so(caplog):
    model = build()
    model.resize_token_embeddings(110)
    build(LlamaModel).resize_token_embeddings(110)
    assert not caplog.text
    model.model.resize_token_embeddings(120)
    assert "LlamaModel was built as a part of LlamaForCausalLM. Where that is still in use" in caplog.text
    model.resize_token_embeddings(120)
    assert model(torch.tensor([[110]])).logits.shape == (1, 1, 120)


def test_inference_mode_leaves_weights_that_can_be_trained():
    model = build(GPT2LMHeadModel)
    with torch.inference_mode():
        model.resize_token_embeddings(120)
        model.resize_position_embeddings(40)
        model.untie_weights()
    ids = torch.tensor([[3, 110]])
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None and model.transformer.wpe.weight.grad is not None


def test_training_goes_on_with_new_rows():
    model = build(tie_word_embeddings=True)
    ids = torch.tensor([[3, 4, 5]])
    first = model(ids, labels=ids).loss
    first.backward()
    model.resize_token_embeddings(120)
    assert model.lm_head.weight.grad is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[3, 110, 5]])
    old = model.lm_head.weight.detach().clone()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight[110], old[110])


class TextConfig(PreTrainedConfig):
    model_type = "text-of-own"
    vocab_size: int = 50
    hidden_size: int = 8


class CompositeConfig(PreTrainedConfig):
    model_type = "own"
    tie_word_embeddings: bool = False
    text_config: dict | None = None

    def get_text_config(self, decoder=False):
        if "_text" not in self.__dict__:
            object.__setattr__(self, "_text", TextConfig(pad_token_id=45))
        return self._text


class Composite(PreTrainedModel):
    config_class = CompositeConfig

    def __init__(self, config):
        super().__init__(config)
        text = config.get_text_config()
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, padding_idx=45)
        self.lm_head = nn.Embedding(text.vocab_size, text.hidden_size)
        self.post_init()


def test_the_text_part_of_a_config_follows():
    model = Composite(CompositeConfig())
    model.resize_token_embeddings(60)
    text = model.config.get_text_config()
    assert text.vocab_size == 60 and text.pad_token_id == 45
    assert not hasattr(model.config, "vocab_size")
    assert model.lm_head.num_embeddings == 60
    model.resize_token_embeddings(40)
    assert text.pad_token_id is None and model.embed_tokens.padding_idx is None


# -- kinds of layers -----------------------------------------------------------------------------


def with_head(head):
    model = build()
    model.lm_head = head
    return model


def test_a_transposed_head():
    head = Conv1D(99, 32)
    model = with_head(head)
    old = head.weight.detach().clone()
    model.resize_token_embeddings(120)
    assert head.nf == 120 and head.weight.shape == (32, 120) and head.bias.shape == (120,)
    assert torch.equal(head.weight[:, :99], old)
    assert torch.allclose(head.weight[:, 99:].mean(1), old.mean(1), atol=1e-4)
    model.resize_token_embeddings(130, mean_resizing=False)
    assert (head.bias[120:] == 0).all() and head.weight[:, 120:].std() > 0.01
    assert model(torch.tensor([[1]])).logits.shape[-1] == 130


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(32, 99)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (Adapter(), "Adapter"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(32, 99)), "ParametrizedLinear"),
    ],
    ids=["adapter", "parametrized"],
)
def test_kinds_that_cannot_be_resized(head, found):
    model = with_head(head)
    before = state(model)
    with pytest.raises(ArgumentError, match=rf"of a kind that cannot be resized \(lm_head.weight\).*{found}"):
        model.resize_token_embeddings(120)
    assert_same(before, state(model))


def test_rows_that_are_not_here():
    model = build()
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ArgumentError, match=r"another library has sharded or moved them \(lm_head.weight\)"):
        model.resize_token_embeddings(120)
    assert model.get_input_embeddings().num_embeddings == 99


def test_a_class_that_does_not_initialise_its_head():
    class Silent(LlamaForCausalLM):
        def _init_weights(self, module):
            if not isinstance(module, nn.Linear):
                super()._init_weights(module)

    model = Silent(Silent.config_class(**TINY_LLAMA))
    before = state(model)
    with pytest.raises(ArgumentError, match="Silent does not say how to initialise a Linear"):
        model.resize_token_embeddings(120, mean_resizing=False)
    assert_same(before, state(model))


# -- quantized -----------------------------------------------------------------------------------

INT8 = QuantizationConfig(quant_method="int8", quantize_embeddings=True, quantize_head=True)


@pytest.mark.parametrize("near_mean", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_int8_tables(tied, near_mean, tmp_path):
    model = build(tie_word_embeddings=tied)
    quantize_model(model, INT8)
    model.config.quantization_config = INT8.to_dict()
    embedding, head = model.get_input_embeddings(), model.lm_head
    old = embedding.dequantized()
    for size in (120, 40):
        model.resize_token_embeddings(size, mean_resizing=near_mean)
        kept = min(size, 99)
        assert torch.equal(embedding.dequantized()[:kept], old[:kept])
        assert embedding.num_embeddings == head.out_features == size and head.shape == (size, 32)
        assert (head.weight is embedding.weight) is (head.weight_scale is embedding.weight_scale) is tied
        assert model(torch.tensor([[1, size - 1]])).logits.shape == (1, 2, size)
        if size == 120 and near_mean:
            assert (embedding.dequantized()[99:] - old.mean(0)).abs().max() < old.mean(0).abs().max() / 100
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_int8_tables_on_disk(tied, tmp_path):
    build(tie_word_embeddings=tied).save_pretrained(tmp_path)
    scheme = {"quantization_config": INT8.to_dict()}
    plain = LlamaForCausalLM.from_pretrained(tmp_path, **scheme)
    placed = LlamaForCausalLM.from_pretrained(
        tmp_path, device_map="disk", offload_folder=tmp_path / "offload", **scheme
    )
    for model in (plain, placed):
        torch.manual_seed(0)
        model.resize_token_embeddings(120)
    assert torch.equal(placed.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(placed.lm_head.weight_scale, plain.lm_head.weight_scale)
    assert (placed.lm_head.weight is placed.model.embed_tokens.weight) is tied
    with torch.no_grad():
        ids = torch.tensor([[3, 119]])
        assert torch.equal(placed(ids).logits, plain(ids).logits)


def test_other_quantized_tables_are_refused():
    leaf = build()
    holder = nn.ModuleDict({"head": leaf.lm_head})
    quantize_model(holder, QuantizationConfig(quant_method="int4"))
    leaf.lm_head = holder["head"]
    before = state(leaf)
    text = r"quantized in this way.*\(lm_head.weight\).*QuantizedLinear, int4.*dequantize\(\) first"
    with pytest.raises(ArgumentError, match=text):
        leaf.resize_token_embeddings(120)
    assert_same(before, state(leaf))


def test_blocks_of_a_gguf_file_are_refused():
    model = build()
    model.model.embed_tokens = GgufEmbedding(99, 32, "q8_0")
    before = state(model)
    with pytest.raises(ArgumentError, match=r"\(model.embed_tokens.weight\).*found GgufEmbedding, q8_0"):
        model.resize_token_embeddings(120)
    assert_same(before, state(model))


# -- homes ---------------------------------------------------------------------------------------

MAPS = {
    "disk": "disk",
    "cpu": {"": "cpu"},
    "embedding on disk": {"model.embed_tokens": "disk", "lm_head": "disk", "model": "cpu"},
    "layers on disk": {"model.layers": "disk", "": "cpu"},
}


@pytest.mark.parametrize("size", [60, 120])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MAPS)
def test_placed_models_give_what_resident_ones_give(name, tied, size, tmp_path):
    build(tie_word_embeddings=tied).save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    placed = LlamaForCausalLM.from_pretrained(tmp_path, device_map=MAPS[name])
    ids = torch.tensor([[3, 4, size - 1 if size < 99 else 98]])
    for model in (plain, placed):
        torch.manual_seed(0)
        model.resize_token_embeddings(size)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, plain(ids).logits)
        assert torch.equal(placed.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))
    assert (placed.lm_head.weight is placed.model.embed_tokens.weight) is tied
    if "disk" in name:
        # What is still in the file is still let go of after use; what is not lives in memory.
        assert "_dispatch" in placed.__dict__ or name == "embedding on disk"
        assert placed.hf_device_map.get("model.embed_tokens", "cpu") == "cpu"
    placed.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, plain.lm_head.weight)


def test_what_does_not_fit_into_memory_stays_on_disk(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    before = state(model)
    monkeypatch.setattr(dispatch, "available_host_memory", lambda: 100)
    with pytest.raises(PlacementError, match=r"do not fit into memory together \(resizing weights on disk\)"):
        model.resize_token_embeddings(120)
    assert_same(before, state(model))
    with torch.no_grad():
        assert model(torch.tensor([[1]])).logits.isfinite().all()


def test_weights_that_run_elsewhere_than_they_rest():
    fake = FakeRuntime()
    model, plain = build(), build()
    homes = dispatch.Homes({"": "cpu"}, torch.device("cpu"))
    dispatch.attach(model, homes, DiskWeights(), runtimes=lambda device: fake)
    for each in (model, plain):
        torch.manual_seed(0)
        each.resize_token_embeddings(120)
    ids = torch.tensor([[3, 110]])
    sent = len(fake.sent)
    with torch.no_grad(), fake.watch():
        found = model(ids).logits
    assert torch.equal(found, plain(ids).logits) and len(fake.sent) > sent


def test_options_of_a_placement_outlive_a_resize(tmp_path):
    build().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    held = model.__dict__["_dispatch"]
    dispatch.attach(model, held.homes, held.store, skip_keys=iter(["past"]), whole=iter(["LlamaMLP"]))
    model.resize_token_embeddings(120)
    options = model.__dict__["_dispatch"].options
    assert (options["skip_keys"], options["whole"]) == (("past",), ("LlamaMLP",))


# -- failures ------------------------------------------------------------------------------------

STEPS = ["with_rows", "rows_near_mean", "replace_parameters", "_count_rows", "_check_config"]


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), KeyboardInterrupt()], ids=["memory", "interrupt"]
)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cls", [LlamaForCausalLM, BertForMaskedLM, T5ForConditionalGeneration])
def test_a_failing_step_leaves_everything_as_it_was(cls, step, call, error, monkeypatch):
    model = build(cls, tie_word_embeddings=cls is T5ForConditionalGeneration)
    before = state(model)
    real, calls = getattr(resize, step), []

    def failing(*args, **kwargs):
        calls.append(step)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(resize, step, failing)
    if call == 1:
        with pytest.raises(type(error)):
            model.resize_token_embeddings(120)
        assert_same(before, state(model))
    else:
        # Not every model has a second call of each step.
        try:
            model.resize_token_embeddings(120)
        except type(error):
            assert_same(before, state(model))
    monkeypatch.undo()
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == 120


def test_a_config_that_fails_late_leaves_everything_as_it_was(monkeypatch):
    model = build()
    before = state(model)
    real = type(model.config).update
    calls = []

    def failing(self, values):
        calls.append(values)
        real(self, values)
        if len(calls) == 2:
            raise RuntimeError("late")

    monkeypatch.setattr(type(model.config), "update", failing)
    with pytest.raises(RuntimeError, match="late"):
        model.resize_token_embeddings(120)
    assert_same(before, state(model))


def test_hooks_that_cannot_be_attached_leave_the_old_ones(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        expected = model(ids).logits
    before, real, calls = state(model), dispatch._sweepers, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError("no hooks")
        return real(*args)

    monkeypatch.setattr(dispatch, "_sweepers", failing)
    with pytest.raises(MemoryError, match="no hooks"):
        model.resize_token_embeddings(120)
    assert_same(before, state(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


# -- sharded -------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [60, 121])
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_tensors_by_their_logical_shape(mesh, tied, size):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model, plain = build(tie_word_embeddings=tied), build(tie_word_embeddings=tied)
    for layer in (model.lm_head, model.model.embed_tokens):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    model.tie_weights()
    for each in (model, plain):
        torch.manual_seed(0)
        each.resize_token_embeddings(size)
    for layer, other in (
        (model.lm_head, plain.lm_head),
        (model.model.embed_tokens, plain.model.embed_tokens),
    ):
        assert isinstance(layer.weight, DTensor) and layer.weight.placements == (Shard(0),)
        assert layer.weight.shape == (size, 32) and layer.weight.requires_grad
        assert torch.equal(layer.weight.full_tensor(), other.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.vocab_size == size


def test_a_model_in_fsdp_is_refused_by_name(mesh):
    from torch.distributed.fsdp import fully_shard

    model = build()
    fully_shard(model, mesh=mesh)
    text = r"A model that FSDP has sharded cannot be resized.*\(model.embed_tokens.weight\).*Resize the model"
    with pytest.raises(NotYetError, match=text):
        model.resize_token_embeddings(120)
    assert model.config.vocab_size == 99 and model(torch.tensor([[1]])).logits.shape[-1] == 99


# -- positions -----------------------------------------------------------------------------------


def test_positions_of_sines_are_computed():
    model = build(DistilBertModel, sinusoidal_pos_embds=True)
    with torch.no_grad():
        model.init_weights()
        model._init_weights(model.get_position_embeddings())
    model.resize_position_embeddings(40)
    whole = build(DistilBertModel, sinusoidal_pos_embds=True, max_position_embeddings=40)
    whole._init_weights(whole.get_position_embeddings())
    table = model.get_position_embeddings().weight
    assert torch.equal(table, whole.get_position_embeddings().weight) and not table.requires_grad


@pytest.mark.parametrize("size", [1, 2])
def test_roberta_keeps_a_position_for_text(size):
    model = build(RobertaForMaskedLM)
    before = state(model)
    text = rf"No position would be left for text.*expected more than 2: .*padding, 1, found {size}"
    with pytest.raises(ArgumentError, match=text):
        model.resize_position_embeddings(size)
    assert_same(before, state(model))


def test_robertas_positions_begin_after_the_padding():
    model = build(RobertaForMaskedLM)
    model.resize_position_embeddings(10 + 2)
    assert model.get_position_embeddings().padding_idx == 1
    assert model(torch.full((1, 10), 5)).logits.shape[1] == 10
    with pytest.raises(ArgumentError, match="at most 10 tokens"):
        model(torch.full((1, 11), 5))


@pytest.mark.parametrize("bad", [0, -1, True, 3.0, None])
def test_positions_that_count_nothing(bad):
    with pytest.raises(ArgumentError, match="new_num_position_embeddings counts rows"):
        build(GPT2LMHeadModel).resize_position_embeddings(bad)


def test_distances_are_no_table():
    model = build(BertForMaskedLM, position_embedding_type="relative_key")
    with pytest.raises(NotYetError, match="positions are distances inside attention"):
        model.resize_position_embeddings(40)


def test_buffers_that_number_positions_follow():
    class Numbered(GPT2LMHeadModel):
        def __init__(self, config):
            super().__init__(config)
            self.transformer.register_buffer("position_ids", torch.arange(32)[None], persistent=False)

    model = Numbered(Numbered.config_class(**TINY_GPT2))
    for size in (40, 9):
        model.resize_position_embeddings(size)
        assert model.transformer.position_ids.tolist() == [[*range(size)]]


@pytest.mark.parametrize(
    "step", ["with_rows", "rows_as_initialised", "replace_parameters", "_resize_numbers"]
)
def test_failing_positions_leave_everything_as_it_was(step, monkeypatch):
    model = build(GPT2LMHeadModel)
    before = state(model)

    def failing(*args, **kwargs):
        raise MemoryError(step)

    monkeypatch.setattr(resize, step, failing)
    with pytest.raises(MemoryError, match=step):
        model.resize_position_embeddings(40)
    assert_same(before, state(model))


# -- ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [LlamaForCausalLM, GPT2LMHeadModel, BertForMaskedLM, T5ForConditionalGeneration]
)
def test_untying_and_tying_again(cls, tmp_path):
    model = build(cls, tie_word_embeddings=True)
    ids = torch.tensor([[5, 6]])
    inputs = {"decoder_input_ids": ids} if cls is T5ForConditionalGeneration else {}
    with torch.no_grad():
        expected = model(ids, **inputs).logits
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.untie_weights()
    assert head.weight is not embedding.weight and torch.equal(head.weight, embedding.weight)
    assert head.weight.data_ptr() != embedding.weight.data_ptr() and head.weight.requires_grad
    assert model.config.tie_word_embeddings is False
    model.untie_weights()
    with torch.no_grad():
        found = model(ids, **inputs).logits
        # T5 scales what goes into a tied head, and the config says which it is.
        if cls is not T5ForConditionalGeneration:
            assert torch.equal(found, expected)
        head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, head.weight)
    assert torch.equal(again.get_input_embeddings().weight, embedding.weight)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_untying_on_disk_and_int8(tmp_path):
    build(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map="disk")
    ids = torch.tensor([[5, 6]])
    with torch.no_grad():
        expected = model(ids).logits
        model.untie_weights()
        assert torch.equal(model(ids).logits, expected)
        model.lm_head.weight.mul_(2)
        assert torch.equal(model(ids).logits, expected * 2)
    model = build(tie_word_embeddings=True)
    quantize_model(model, INT8)
    model.untie_weights()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert model.lm_head.weight_scale is not model.get_input_embeddings().weight_scale


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification])
def test_what_has_no_head_cannot_be_untied(cls):
    with pytest.raises(ArgumentError, match=rf"{cls.__name__} has no head that its embedding can be tied to"):
        build(cls).untie_weights()


# -- setters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.set_input_embeddings(torch.zeros(99, 32)), "value is no module (value): found Tensor"),
        (lambda m: m.set_input_embeddings(nn.Embedding(99, 16)), "expected 32, found 16"),
        (lambda m: m.set_output_embeddings(nn.Linear(16, 99)), "(new_embeddings.in_features): expected 32"),
        (lambda m: m.set_output_embeddings(None), "new_embeddings is no module"),
        (lambda m: m.set_encoder(nn.Identity()), "LlamaForCausalLM has no encoder to replace"),
        (lambda m: m.set_decoder(3), "decoder is no module (decoder): found int"),
        (lambda m: m.model.set_decoder(nn.Identity()), "LlamaModel is the decoder itself"),
        (lambda m: m.get_encoder("image"), "LlamaForCausalLM reads text only (modality)"),
    ],
)
def test_setters_check(call, text):
    model = build()
    before = state(model)
    with pytest.raises(ArgumentError, match=re.escape(text)):
        call(model)
    assert_same(before, state(model))


def test_a_head_with_a_bias_takes_no_head_without():
    with pytest.raises(ArgumentError, match="This head's decoder has a bias"):
        build(BertForMaskedLM).set_output_embeddings(nn.Linear(32, 99, bias=False))


def test_another_number_of_rows_is_said(caplog):
    build().set_input_embeddings(nn.Embedding(120, 32))
    assert "The new embedding has 120 rows and config.vocab_size is 99" in caplog.text


def test_stacks_are_replaced():
    model = build(T5ForConditionalGeneration)
    for name in ("encoder", "decoder"):
        other = build(T5ForConditionalGeneration).get_submodule(name)
        getattr(model, f"set_{name}")(other)
        assert getattr(model, f"get_{name}")() is getattr(model, name) is other
    model = build()
    other = build(LlamaModel)
    model.set_decoder(other)
    assert model.get_decoder() is model.model is other


def test_tying_to_an_embedding_of_another_size():
    model = build(tie_word_embeddings=True)
    model.set_input_embeddings(nn.Embedding(120, 32))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.out_features == 120
    model = build(BertForMaskedLM)
    model.set_input_embeddings(nn.Embedding(120, 32))
    before = state(model)
    text = (
        r"another number of rows than its bias has \(cls.predictions.decoder.bias\): expected 120, found 99"
    )
    with pytest.raises(ArgumentError, match=text):
        model.tie_weights()
    assert_same(before, state(model))


def test_undo_goes_backwards():
    table, undo = {"a": 1}, row_edits.Undo()
    undo.set_item(table, "a", 2)
    undo.set_item(table, "a", 3)
    undo.set_item(table, "b", 4)
    undo.all()
    assert table == {"a": 1}
