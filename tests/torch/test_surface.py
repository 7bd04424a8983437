# SPDX-License-Identifier: Apache-2.0
"""The methods and attributes that scripts of the ecosystem expect of every model are there."""

import inspect

import pytest
import torch

from pretrained import (
    ArgumentError,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertForTokenClassification,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
)
from support.cases import CASES, TINY_LLAMA

NAMES = [
    "config",
    "name_or_path",
    "generation_config",
    "config_class",
    "base_model_prefix",
    "main_input_name",
    "warnings_issued",
    "base_model",
    "can_generate",
    "from_pretrained",
    "_from_config",
    "save_pretrained",
    "push_to_hub",
    "post_init",
    "get_input_embeddings",
    "set_input_embeddings",
    "get_output_embeddings",
    "set_output_embeddings",
    "tie_weights",
    "resize_token_embeddings",
    "prune_heads",
    "init_weights",
    "initialize_weights",
    "_init_weights",
    "get_decoder",
    "set_decoder",
    "get_encoder",
    "set_encoder",
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
    "is_gradient_checkpointing",
    "activation_checkpointing_enable",
    "activation_checkpointing_disable",
    "is_activation_checkpointing",
    "enable_input_require_grads",
    "disable_input_require_grads",
    "supports_gradient_checkpointing",
    "get_memory_footprint",
    "to",
    "cuda",
    "half",
    "float",
    "dequantize",
    "is_quantized",
    "quantization_method",
    "hf_quantizer",
    "register_for_auto_class",
    "add_model_tags",
    "model_tags",
    "set_attn_implementation",
    "loss_function",
    "add_adapter",
    "load_adapter",
    "set_adapter",
    "enable_adapters",
    "disable_adapters",
    "active_adapters",
    "get_adapter_state_dict",
    "delete_adapter",
    "enable_peft_hotswap",
    "_no_split_modules",
    "_tied_weights_keys",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_save",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_skip_keys_device_placement",
    "device",
    "dtype",
    "num_parameters",
    "estimate_tokens",
    "floating_point_ops",
    "invert_attention_mask",
    "get_extended_attention_mask",
    "create_extended_attention_mask_for_decoder",
    "get_head_mask",
]

# Known elsewhere and left out: what says what an implementation can do, which here every class can.
LEFT_OUT = {
    "_supports_sdpa": "every class runs every implementation that is registered",
    "_supports_flash_attn": "the same",
    "_supports_flex_attn": "the same: flex attention is none of them",
    "_supports_attention_backend": "the same",
    "_can_compile_fullgraph": "every class compiles to one graph; the battery tests it",
    "_is_stateful": "no class here keeps state between calls outside its cache",
    "_can_record_outputs": "outputs are returned by the forward itself",
}


def one_of_each():
    found = {}
    for case in CASES:
        found.setdefault(case.model_class.__name__, case)
    return list(found.values())


@pytest.mark.parametrize("case", one_of_each(), ids=str)
def test_every_name_is_there(case):
    with torch.device("meta"):
        model = case.model_class(case.model_class.config_class(**case.config))
    own = {name for cls in type(model).__mro__ for name in vars(cls)} | set(vars(model))
    assert [name for name in NAMES if name not in own] == []
    assert not own & set(LEFT_OUT)


def test_methods_are_documented():
    methods = [name for name in NAMES if inspect.isfunction(getattr(PreTrainedModel, name, None))]
    assert len(methods) > 40
    assert [name for name in methods if not getattr(PreTrainedModel, name).__doc__] == []


def build(cls, **config):
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


IDS = torch.tensor([[3, 4, 5, 6]])
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("cls", "config", "labels", "more"),
    [
        (LlamaForCausalLM, TINY_LLAMA, IDS, {"vocab_size": 99, "num_items_in_batch": 3}),
        (T5ForConditionalGeneration, T5, IDS, {"vocab_size": 99, "num_items_in_batch": 4}),
        (BertForSequenceClassification, BERT, torch.tensor([1]), {}),
    ],
)
def test_the_loss_function_is_the_one_of_the_forward(cls, config, labels, more):
    model = build(cls, **config)
    with torch.no_grad():
        output = model(IDS, labels=labels)
    torch.testing.assert_close(model.loss_function(logits=output.logits, labels=labels, **more), output.loss)


DISTILBERT = {"dim": 8, "n_heads": 2, "n_layers": 1, "hidden_dim": 8}
QA = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([2])}


@pytest.mark.parametrize(
    ("cls", "config", "labels", "names"),
    [
        (LlamaForCausalLM, TINY_LLAMA, {"labels": IDS}, {"labels", "vocab_size", "num_items_in_batch"}),
        (T5ForConditionalGeneration, T5, {"labels": IDS}, {"logits", "labels", "vocab_size"}),
        (BertForSequenceClassification, BERT, {"labels": torch.tensor([1])}, {"logits", "labels", "config"}),
        (BertForMaskedLM, BERT, {"labels": IDS}, {"logits", "labels", "vocab_size"}),
        (DistilBertForTokenClassification, DISTILBERT, {"labels": IDS % 2}, {"logits"}),
        (BertForQuestionAnswering, BERT, QA, {"start_logits", "end_logits", "end_positions"}),
    ],
)  # fmt: skip
def test_a_loss_function_that_is_set(cls, config, labels, names):
    model, seen = build(cls, **config), {}
    own = model(IDS, **labels).loss

    def loss(**tensors):
        seen.update(tensors)
        return torch.tensor(7.0)

    model.loss_function = loss
    assert model.loss_function is loss
    assert model(IDS, **labels).loss == 7
    assert names <= seen.keys()
    model.loss_function = None
    torch.testing.assert_close(model(IDS, **labels).loss, own)


def test_a_loss_is_given_what_it_takes():
    class Loss(torch.nn.Module):
        def forward(self, logits, labels):
            return logits[..., 0].sum() * 0 + labels.sum()

    model = build(LlamaForCausalLM, **TINY_LLAMA)
    model.loss_function = Loss()
    assert model(IDS, labels=IDS).loss == IDS.sum()
    model = build(LlamaForCausalLM, **TINY_LLAMA)
    model.loss_function = lambda logits, labels, vocab_size: torch.tensor(float(vocab_size))
    assert model(IDS, labels=IDS).loss == 99


def test_faults_of_the_loss_function():
    with pytest.raises(ArgumentError, match=r"A loss is a function.*loss_function.*found 5"):
        build(LlamaForCausalLM, **TINY_LLAMA).loss_function = 5
    with pytest.raises(ArgumentError, match="LlamaModel has no loss"):
        build(LlamaModel, **TINY_LLAMA).loss_function = print
    with pytest.raises(ArgumentError, match="LlamaModel has no loss"):
        build(LlamaModel, **TINY_LLAMA).loss_function  # noqa: B018 - the access is the test
    model = build(LlamaForCausalLM, **TINY_LLAMA)
    with pytest.raises(ArgumentError, match="another width than the vocabulary"):
        model.loss_function(logits=torch.zeros(1, 4, 99), labels=IDS, vocab_size=98)


def test_tags_are_kept_once():
    model = build(LlamaForCausalLM, **TINY_LLAMA)
    assert model.model_tags is None
    model.add_model_tags("tiny")
    model.add_model_tags(["tiny", "mine"])
    assert model.model_tags == ["tiny", "mine"]
    with pytest.raises(ArgumentError, match="Tags are texts"):
        model.add_model_tags([5])


def test_the_quantizer_says_what_can_be_done(tmp_path):
    model = build(LlamaForCausalLM, **TINY_LLAMA)
    assert model.hf_quantizer is None
    model.save_pretrained(tmp_path)
    quantizer = LlamaForCausalLM.from_pretrained(tmp_path, load_in_8bit=True).hf_quantizer
    assert quantizer.is_serializable() and quantizer.is_trainable and not quantizer.is_qat_trainable
    assert quantizer.quantization_config["quant_method"] == "int8"
