# SPDX-License-Identifier: Apache-2.0
"""Facts about a model's parameters, and mask helpers by values worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrained.errors import ArgumentError
from pretrained.testing.battery import Case
from pretrained.torch.models.bert import BertModel
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from pretrained.torch.utils_mixin import ModuleUtilsMixin
from support.cases import TINY_LLAMA

LOWEST = torch.finfo(torch.float32).min

# Of the tiny Llama: each embedding (and the head), one block, the last norm.
EMBEDDING = 99 * 32
BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
TOTAL = EMBEDDING + 2 * BLOCK + 32


class Plain(nn.Module, ModuleUtilsMixin):
    """Any module with the mixin."""

    def __init__(self, is_decoder=False, **tensors):
        super().__init__()
        self.config = SimpleNamespace(is_decoder=is_decoder)
        for name, tensor in tensors.items():
            if name.startswith("buffer"):
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once(tied):
    model = Case(LlamaForCausalLM, {**TINY_LLAMA, "tie_word_embeddings": tied}).build()
    head = 0 if tied else EMBEDDING
    assert model.num_parameters() == TOTAL + head
    # A head that is the embedding goes with it.
    assert model.num_parameters(exclude_embeddings=True) == TOTAL - EMBEDDING + head
    model.lm_head.weight.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == (TOTAL - EMBEDDING if tied else TOTAL)
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == TOTAL - EMBEDDING


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_memory_footprint_is_bytes(dtype, width):
    model = Case(LlamaForCausalLM, {**TINY_LLAMA, "tie_word_embeddings": True}).build(dtype)
    assert model.get_memory_footprint(return_buffers=False) == TOTAL * width
    # The rotary frequencies: four of float32, whatever the weights are.
    assert model.get_memory_footprint() == TOTAL * width + 4 * 4


def test_device_and_dtype_are_the_first_ones():
    half, whole = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.int8)
    assert Plain(a=half, b=torch.zeros(1)).dtype == torch.float16
    assert Plain(a=whole, b=half).dtype == torch.float16
    assert Plain(buffer=torch.zeros(1), a=half).dtype == torch.float16
    assert Plain(buffer=half).dtype == torch.float16
    assert Plain(a=whole, buffer=half).dtype == torch.float16
    assert Plain(a=whole).dtype == torch.int8
    assert Plain(a=half).device == torch.device("cpu")
    assert Plain(buffer=half.to("meta")).device == torch.device("meta")
    model = Case(LlamaModel, TINY_LLAMA).build(torch.bfloat16)
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("fact", ["device", "dtype"])
def test_a_module_without_tensors_has_neither(fact):
    with pytest.raises(ArgumentError, match="Plain has no parameters"):
        getattr(Plain(), fact)


def test_operations_are_six_for_each_token_and_parameter():
    model = Case(LlamaModel, TINY_LLAMA).build()
    inputs = {"input_ids": torch.ones(3, 5, dtype=torch.long), "attention_mask": torch.ones(3, 9)}
    assert model.estimate_tokens(inputs) == 15
    assert model.floating_point_ops(inputs) == 6 * 15 * (TOTAL - EMBEDDING)
    assert model.floating_point_ops(inputs, exclude_embeddings=False) == 6 * 15 * TOTAL


def test_embeddings_count_as_tokens():
    model = Case(LlamaModel, TINY_LLAMA).build()
    assert model.estimate_tokens({"input_ids": None, "inputs_embeds": torch.ones(3, 5, 32)}) == 15


@pytest.mark.parametrize("build", [Case(LlamaModel, TINY_LLAMA).build, lambda: Plain(a=torch.zeros(1))])
def test_without_the_main_input_nothing_is_counted_and_that_is_said_once(build, caplog):
    model = build()
    assert model.estimate_tokens({"attention_mask": torch.ones(1)}) == 0
    assert model.floating_point_ops({"labels": torch.ones(1)}) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "Tokens and operations are not counted: no input_ids among the inputs (attention_mask)."
    ]


def test_operations_of_a_model_by_its_published_size():
    """BERT base without a head: its paper says 110M."""
    with torch.device("meta"):
        model = BertModel(BertModel.config_class())
    assert model.num_parameters() == 109_482_240
    assert model.num_parameters(exclude_embeddings=True) == 109_482_240 - (30522 + 512 + 2) * 768
    inputs = {"input_ids": torch.ones(8, 128, dtype=torch.long)}
    assert model.floating_point_ops(inputs) == 6 * 8 * 128 * (109_482_240 - 23_835_648)


def test_masks_shorter_than_the_input_are_refused():
    with pytest.raises(
        ArgumentError, match=r"The mask is shorter than the input .*\[batch, 5\].*found \[1, 3\]"
    ):
        ModuleUtilsMixin.create_extended_attention_mask_for_decoder((1, 5), torch.ones(1, 3))


# -- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", [torch.int64, torch.bool, torch.float32], ids=str)
def test_inverted_masks(dtype, of):
    model, lowest = Plain(a=torch.zeros(1, dtype=dtype)), torch.finfo(dtype).min
    found = model.invert_attention_mask(torch.tensor([[1, 1, 0], [0, 1, 1]]).to(of))
    assert found.dtype == dtype and found.shape == (2, 1, 1, 3)
    assert found[:, 0, 0].tolist() == [[0, 0, lowest], [lowest, 0, 0]]
    found = model.invert_attention_mask(torch.tensor([[[1, 0], [1, 1]]]).to(of))
    assert found.shape == (1, 1, 2, 2) and found[0, 0].tolist() == [[0, lowest], [0, 0]]


def test_extended_masks_of_an_encoder():
    model = Plain(a=torch.zeros(1))
    found = model.get_extended_attention_mask(torch.tensor([[1, 1, 0]]), (1, 3))
    assert found.shape == (1, 1, 1, 3) and found.flatten().tolist() == [0, 0, LOWEST]
    found = model.get_extended_attention_mask(torch.tensor([[[1, 0], [1, 1]]]), (1, 2), dtype=torch.float16)
    assert found.dtype == torch.float16
    assert found[0, 0].tolist() == [[0, torch.finfo(torch.float16).min], [0, 0]]
    assert model.get_extended_attention_mask(torch.ones(1, 3), (1, 3), torch.device("meta")).is_meta


def test_extended_masks_of_a_decoder_are_causal():
    model = Plain(is_decoder=True, a=torch.zeros(1))
    found = model.get_extended_attention_mask(torch.tensor([[0, 1, 1]]), (1, 3))
    assert found.shape == (1, 1, 3, 3)
    assert (found[0, 0] == 0).tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    assert set(found.flatten().tolist()) == {0.0, LOWEST}
    # Of rank 3 it is taken as it is.
    found = model.get_extended_attention_mask(torch.ones(1, 2, 2), (1, 2))
    assert found.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
def test_a_decoders_mask_shows_the_prefix(dtype):
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).to(dtype)
    found = ModuleUtilsMixin.create_extended_attention_mask_for_decoder((2, 3), mask)
    assert found.dtype == dtype and found.shape == (2, 1, 3, 5)
    assert found[0, 0].int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]
    assert found[1, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    meta = torch.device("meta")
    assert ModuleUtilsMixin.create_extended_attention_mask_for_decoder((2, 3), mask, meta).is_meta


def test_extended_masks_do_what_a_model_does_with_the_plain_one():
    case = next(c for c in _bert_cases() if c.model_class is BertModel)
    model = case.build()
    inputs = case.inputs(model.config, "right")
    ready = model.get_extended_attention_mask(inputs["attention_mask"], inputs["input_ids"].shape)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        found = model(**{**inputs, "attention_mask": ready}).last_hidden_state
    torch.testing.assert_close(found, expected)


def _bert_cases():
    from support.cases_bert import BERT_CASES

    return BERT_CASES


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3, 3)])
def test_masks_of_other_ranks_are_refused(shape):
    model, mask = Plain(a=torch.zeros(1)), torch.ones(shape)
    text = r"attention_mask has the wrong rank \(attention_mask\): expected \[batch, key\] or \[batch, query"
    with pytest.raises(ArgumentError, match=text):
        model.invert_attention_mask(mask)
    with pytest.raises(ValueError, match=text):
        model.get_extended_attention_mask(mask, (1, 3))


def test_head_masks():
    model = Plain(a=torch.zeros(1, dtype=torch.bfloat16))
    assert model.get_head_mask(None, 3) == [None, None, None]
    found = model.get_head_mask(torch.tensor([1, 0]), 3)
    assert found.shape == (3, 1, 2, 1, 1) and found.dtype == torch.bfloat16
    assert [layer.flatten().tolist() for layer in found] == [[1.0, 0.0]] * 3
    found = model.get_head_mask(torch.tensor([[1, 0], [0, 1]]), 2)
    assert [layer.flatten().tolist() for layer in found] == [[1.0, 0.0], [0.0, 1.0]]
    chunked = model.get_head_mask(torch.tensor([[1, 0], [0, 1]]), 2, is_attention_chunked=True)
    assert chunked.shape == (2, 1, 2, 1, 1, 1)


def test_head_masks_of_other_ranks_are_refused():
    text = r"head_mask has the wrong rank \(head_mask\): expected \[heads\] or \[layers, heads\], found"
    with pytest.raises(ArgumentError, match=text):
        Plain(a=torch.zeros(1)).get_head_mask(torch.ones(1, 1, 2), 3)
