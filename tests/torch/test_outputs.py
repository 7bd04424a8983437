# SPDX-License-Identifier: Apache-2.0
"""Outputs as objects, dictionaries, tuples and trees."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
import transformers.modeling_outputs as theirs
from torch.utils import _pytree

from pretrained.testing.battery import Case
from pretrained.torch import outputs
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    ModelOutput,
    Seq2SeqLMOutput,
    detuple,
    finish,
)
from support.cases import TINY_LLAMA

CLASSES = [
    cls
    for _, cls in inspect.getmembers(outputs, inspect.isclass)
    if issubclass(cls, ModelOutput) and cls is not ModelOutput
]


def example():
    """An output with a hole in the middle."""
    return CausalLMOutputWithPast(
        loss=None, logits=torch.ones(1), hidden_states=(torch.zeros(2), torch.ones(2)), attentions=()
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_fields_and_their_order_are_the_ecosystems(cls):
    names = [field.name for field in dataclasses.fields(cls)]
    assert names == [field.name for field in dataclasses.fields(getattr(theirs, cls.__name__))]
    assert all(field.default is None for field in dataclasses.fields(cls))
    filled = cls(*range(len(names)))
    assert filled.to_tuple() == tuple(range(len(names)))


def test_every_way_to_read_one():
    out = example()
    assert out.keys() == tuple(out) == ("logits", "hidden_states", "attentions")
    assert len(out) == 3
    assert out.logits is out["logits"] is out[0] is out.get("logits")
    assert out.hidden_states is out[1] is out[-2]
    assert out[:2] == out.to_tuple()[:2] and type(out[:2]) is tuple
    assert out.values() == out.to_tuple()
    assert dict(out.items()) == dict(out) == {**out}
    assert "logits" in out and "loss" not in out and "nonsense" not in out and "keys" not in out


def test_what_is_none_does_not_exist():
    out = example()
    assert out.loss is None and out.get("loss") is None and out.get("loss", 5) == 5
    assert out.get("nonsense", 5) == out.get("keys", 5) == 5
    for name in ("loss", "nonsense", "keys", "to_tuple"):
        with pytest.raises(KeyError, match=name):
            out[name]
    with pytest.raises(IndexError):
        out[3]
    with pytest.raises(AttributeError):
        out.nonsense  # noqa: B018


def test_fields_can_be_set():
    out = example()
    out["loss"] = torch.tensor(3.0)
    assert out.loss is out[0] and len(out) == 4
    out.loss = None
    assert len(out) == 3
    with pytest.raises(KeyError, match="CausalLMOutputWithPast has no field 'lost'"):
        out["lost"] = 1


def test_copies_and_pickles():
    out = example()
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert type(again) is CausalLMOutputWithPast and again.keys() == out.keys()
        assert torch.equal(again.hidden_states[1], out.hidden_states[1]) and again.loss is None


def test_trees_of_tensors():
    out = Seq2SeqLMOutput(logits=torch.ones(2), decoder_attentions=(torch.ones(1), torch.ones(3)))
    leaves, spec = _pytree.tree_flatten(out)
    assert [leaf.numel() for leaf in leaves] == [2, 1, 3]
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is Seq2SeqLMOutput and again.loss is None and again.logits is out.logits
    doubled = _pytree.tree_map(lambda x: 2 * x, {"nested": [out]})["nested"][0]
    assert doubled.decoder_attentions[1].tolist() == [2.0, 2.0, 2.0]


def test_a_users_own_output_is_a_tree_too():
    @dataclasses.dataclass
    class Own(ModelOutput):
        first: torch.Tensor | None = None
        second: torch.Tensor | None = None

    doubled = _pytree.tree_map(lambda x: 2 * x, Own(second=torch.ones(2)))
    assert type(doubled) is Own and doubled.first is None and doubled[0].tolist() == [2.0, 2.0]


def test_functional_transforms_return_outputs():
    def run(x):
        return BaseModelOutput(last_hidden_state=x * 2)

    out = torch.func.vmap(run)(torch.ones(3, 2))
    assert type(out) is BaseModelOutput and out.last_hidden_state.shape == (3, 2)


def test_compiled_functions_return_outputs():
    def run(x):
        out = CausalLMOutputWithPast(logits=x * 2, hidden_states=(x, x + 1))
        hidden_states = out.hidden_states
        return CausalLMOutputWithPast(loss=out["logits"].sum(), logits=out[0], hidden_states=hidden_states)

    x = torch.arange(3.0)
    out = torch.compile(run, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    assert type(out) is CausalLMOutputWithPast and out.keys() == ("loss", "logits", "hidden_states")
    assert out.loss == 6 and torch.equal(out.hidden_states[1], x + 1)


def test_finish_gives_what_was_asked_for():
    out = example()
    assert finish(out, True) is out
    assert finish(out, False) == out.to_tuple()


def test_detuple_takes_what_users_pass():
    state, out = torch.ones(1), BaseModelOutput(torch.ones(1))
    assert detuple((state, None, (state,)), BaseModelOutput).attentions == (state,)
    assert detuple([state], BaseModelOutput).last_hidden_state is state
    assert detuple(out, BaseModelOutput) is out and detuple(None, BaseModelOutput) is None


def test_models_return_tuples_on_request():
    model = Case(LlamaForCausalLM, {**TINY_LLAMA, "use_cache": False}).build()
    ids = torch.tensor([[5, 6, 7]])
    out = model(ids, labels=ids, output_hidden_states=True)
    plain = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert type(plain) is tuple and [type(x) for x in plain] == [type(x) for x in out.to_tuple()]
    model.config.return_dict = False
    assert type(model(ids)) is tuple and type(model(ids, return_dict=True)) is CausalLMOutputWithPast
