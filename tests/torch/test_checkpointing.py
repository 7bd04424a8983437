# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing on every architecture: the same gradients, bit for bit, from less memory."""

import copy
import logging

import pytest
import torch
from torch import nn

from pretrained import PreTrainedConfig, PreTrainedModel
from pretrained.errors import ArgumentError, NotYetError, UnknownArgumentError
from pretrained.testing.battery import Case
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache
from pretrained.torch.models.bert import BertForMaskedLM, BertModel
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.cases import CASES, TINY_LLAMA
from support.cases_bert import TINY_BERT
from support.cases_gpt2 import TINY_GPT2
from support.cases_t5 import TINY_T5

FAMILIES = [
    Case(LlamaForCausalLM, {**TINY_LLAMA, "attention_dropout": 0.2}),
    Case(GPT2LMHeadModel, TINY_GPT2),
    Case(BertForMaskedLM, TINY_BERT, kind="encoder"),
    Case(T5ForConditionalGeneration, TINY_T5, kind="seq2seq"),
]


def ready(case):
    """Return a model that trains with dropout, and inputs with padding."""
    model = case.build().train()
    if (
        hasattr(model.config, "attention_dropout")
        and case.model_class.config_class.model_type != "distilbert"
    ):
        model.config.attention_dropout = 0.2
    inputs = case.inputs(model.config, "right")
    return model, case.with_labels(inputs, model.config) or inputs


def step(model, inputs, seed=3):
    """Return the first output and all gradients of one pass, by name."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    output = model(**inputs)[0]
    (output if output.dim() == 0 else output.square().mean()).backward()
    return output.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert set(ours[1]) == set(theirs[1])
    for name, gradient in theirs[1].items():
        assert torch.equal(ours[1][name], gradient), name


class Runs:
    """Counts how often each layer of a model runs."""

    def __init__(self, model):
        self.model, self.count = model, 0
        self.layers = [m for m in model.modules() if type(m).__name__ in LAYERS]
        for layer in self.layers:
            layer.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1

    def of(self, inputs):
        self.count = 0
        result = step(self.model, inputs)
        return self.count, result


LAYERS = {"LlamaDecoderLayer", "GPT2Block", "BertLayer", "RobertaLayer", "TransformerBlock", "T5Block"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_plain_run(case):
    model, inputs = ready(case)
    runs = Runs(model)
    plain_runs, plain = runs.of(inputs)
    assert plain_runs == len(runs.layers)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    twice, again = runs.of(inputs)
    assert twice == 2 * plain_runs, "some layers did not run a second time"
    assert_same(again, plain)
    model.activation_checkpointing_enable(every_n_layers=2)
    some, again = runs.of(inputs)
    stacks = {
        id(m) for m in model.modules() if isinstance(m, nn.ModuleList) and type(m[0]).__name__ in LAYERS
    }
    assert some == plain_runs + sum((len(m) + 1) // 2 for m in model.modules() if id(m) in stacks)
    assert_same(again, plain)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert runs.of(inputs)[0] == plain_runs


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_dropout_is_repeated(case):
    """The comparison above says something: other random numbers give other gradients."""
    model, inputs = ready(case)
    model.gradient_checkpointing_enable()
    first, other = step(model, inputs, seed=3), step(model, inputs, seed=4)
    assert not torch.equal(first[0], other[0])
    model.gradient_checkpointing_enable({"preserve_rng_state": False})
    wrong = step(model, inputs, seed=3)
    assert torch.equal(wrong[0], first[0])
    assert any(not torch.equal(wrong[1][name], first[1][name]) for name in first[1])


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_the_reentrant_kind_gives_the_same_gradients(case):
    model, inputs = ready(case)
    plain = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = step(model, inputs)
    assert torch.equal(again[0], plain[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-7)


def saved_bytes(model, inputs):
    """Return the bytes that a forward keeps for its backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_less_is_kept(case):
    layers = {"n_layer": 6} if case.model_class is GPT2LMHeadModel else {"num_layers": 6}
    if case.model_class in (LlamaForCausalLM, BertForMaskedLM):
        layers = {"num_hidden_layers": 6}
    small = {"vocab_size": 99} if "vocab_size" in case.config else {}
    model, inputs = ready(Case(case.model_class, {**case.config, **layers, **small}, kind=case.kind))
    plain = saved_bytes(model, inputs)
    model.activation_checkpointing_enable(every_n_layers=2)
    half = saved_bytes(model, inputs)
    model.gradient_checkpointing_enable()
    least = saved_bytes(model, inputs)
    assert least < plain / 3, (least, plain)
    assert least < half < plain


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_frozen_embeddings(case, reentrant):
    model, inputs = ready(case)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    plain = step(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    again = step(model, inputs)
    assert torch.equal(again[0], plain[0]) and set(again[1]) == set(plain[1])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(again[1][name], gradient, rtol=1e-5, atol=1e-7)
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Embedding))


def test_what_reentrant_checkpointing_lacks_without_the_hook():
    case = FAMILIES[0]
    model, inputs = ready(case)
    model.get_input_embeddings().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        _, gradients = step(model, inputs)
    assert not any("layers.0" in name for name in gradients)
    model.enable_input_require_grads()
    assert any("layers.0" in name for name in step(model, inputs)[1])
    model.eval()
    with torch.no_grad():
        assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad


# -- caches --------------------------------------------------------------------------------------------

DECODERS = [case for case in FAMILIES if case.kind != "encoder"]


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_no_cache_is_made_while_layers_run_again(case, caplog):
    model, inputs = ready(case)
    assert model(**inputs).past_key_values is not None
    model.gradient_checkpointing_enable()
    with caplog.at_level(logging.WARNING):
        assert model(**inputs).past_key_values is None
        assert not caplog.records, "nobody asked for a cache"
        assert model(**inputs, use_cache=True).past_key_values is None
        model(**inputs, use_cache=True)
    assert [record.getMessage() for record in caplog.records] == [
        "use_cache=True has no effect while training with gradient checkpointing."
    ]
    with torch.no_grad():
        assert model(**inputs, use_cache=True).past_key_values is not None
    assert model.eval()(**inputs, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_a_cache_by_name_is_written_once(case, caplog):
    """A prefix is in the cache, as prefix tuning has it; its gradients are those of the plain run."""
    model, inputs = ready(case)
    ids_name = "decoder_input_ids" if case.kind == "seq2seq" else "input_ids"
    if case.kind == "seq2seq":
        inputs["decoder_input_ids"] = inputs.pop("labels").clamp(min=0)
    else:
        inputs = {"input_ids": inputs["input_ids"]}
    length = inputs[ids_name].shape[1]

    def run():
        torch.manual_seed(5)
        cache = (
            EncoderDecoderCache(DynamicCache(), DynamicCache()) if case.kind == "seq2seq" else DynamicCache()
        )
        with torch.no_grad():
            model(**{**inputs, ids_name: inputs[ids_name][:, :2]}, past_key_values=cache)
        rest = {**inputs, ids_name: inputs[ids_name][:, 2:]}
        result = step(model, {**rest, "past_key_values": cache})
        return result, cache.get_seq_length()

    plain, plain_length = run()
    model.gradient_checkpointing_enable()
    with caplog.at_level(logging.WARNING):
        again, again_length = run()
    assert plain_length == again_length == length
    assert_same(again, plain)
    assert ["past_key_values were given" in r.getMessage() for r in caplog.records] == [True]


def test_generation_does_not_mind():
    model = Case(LlamaForCausalLM, TINY_LLAMA).build()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.train().generate(ids, max_new_tokens=6, do_sample=False), expected)


# -- with others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_under_the_compiler(case):
    model, inputs = ready(Case(case.model_class, case.config, kind=case.kind))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "dropout_rate"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    plain = step(model, inputs)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    loss = compiled(**inputs)[0]
    loss.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(loss, plain[0])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[1][name], rtol=1e-4, atol=1e-6)


def test_copies_keep_the_switches():
    model, inputs = ready(FAMILIES[0])
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    other = copy.deepcopy(model)
    assert other.is_gradient_checkpointing
    other.disable_input_require_grads()
    other.gradient_checkpointing_disable()
    assert model.is_gradient_checkpointing and model.get_input_embeddings()._forward_hooks
    assert not other.get_input_embeddings()._forward_hooks
    assert_same(step(other, inputs), step(model, inputs))


def test_a_folder_does_not_keep_them(tmp_path):
    model, _ = ready(FAMILIES[0])
    plain, switched = tmp_path / "plain", tmp_path / "switched"
    model.save_pretrained(plain)
    model.gradient_checkpointing_enable()
    model.save_pretrained(switched)
    for file in plain.iterdir():
        assert file.read_bytes() == (switched / file.name).read_bytes()
    assert not LlamaForCausalLM.from_pretrained(switched).is_gradient_checkpointing


def test_a_stack_alone_and_autocast():
    model = Case(LlamaModel, TINY_LLAMA).build().train()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, inputs)
        model.gradient_checkpointing_enable()
        assert_same(step(model, inputs), plain)


# -- what is refused ---------------------------------------------------------------------------------------


class Bare(PreTrainedModel):
    """A class that does not run its layers through `call_layer`."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(2, 2)
        self.post_init()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every_n_layers": 0}, ArgumentError, r"every_n_layers must be positive .*found 0"),
        ({"every_n_layers": True}, ArgumentError, r"every_n_layers must be positive .*found True"),
        ({"offload": True}, NotYetError, r"offload=True is not offered yet .*save_on_cpu"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrent": True}},
            UnknownArgumentError,
            r"has no argument 'use_reentrent'.*Did you mean 'use_reentrant'\?",
        ),
    ],
)
def test_arguments_that_cannot_work(options, error, text):
    model = Case(BertModel, TINY_BERT).build()
    with pytest.raises(error, match=text):
        model.activation_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing


def test_classes_that_do_not_support_it_say_so():
    model = Bare(PreTrainedConfig())
    with pytest.raises(ArgumentError, match=r"Bare does not support gradient checkpointing .*call_layer"):
        model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_on_a_frozen_model(reentrant):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    results = []
    for switched in (False, True):
        model, inputs = ready(FAMILIES[0])
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config)
        if switched:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        results.append(step(wrapped, inputs))
    assert len(results[0][1]) == 8
    assert_same(*results)
