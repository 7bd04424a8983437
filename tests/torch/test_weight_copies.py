# SPDX-License-Identifier: Apache-2.0
"""Copies of weights for decoding: when they are made, when they are made anew, when they go."""

import copy
import pickle

import pytest
import torch

import pretrained
from pretrained.errors import GenerationError
from pretrained.torch import products, weight_copies
from pretrained.torch.products import Form
from pretrained.torch.weight_copies import WeightCopies

IDS = torch.tensor([[5, 9, 11, 3]])


@pytest.fixture
def model():
    if not products._onednn_works(torch.float32):
        pytest.skip("oneDNN does not multiply here")
    torch.manual_seed(0)
    config = pretrained.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    return pretrained.LlamaForCausalLM(config).eval()


def copies(model):
    return model.__dict__.get("_weight_copies") or ()


def generate(model, **settings):
    return model.generate(IDS, **{"max_new_tokens": 6, "weight_copies": True, **settings})


# Of each of two layers: queries with keys and values, output, gate with up, down; and the head.
ALL = 9


def test_copies_are_made_when_asked_for_and_kept(model):
    generate(model)
    assert len(copies(model)) == ALL
    kept = {key: entry.stored for key, entry in model._weight_copies._entries.items()}
    generate(model)
    assert all(model._weight_copies._entries[key].stored is stored for key, stored in kept.items())


def test_none_are_made_for_a_short_call_and_those_that_are_there_are_used(model):
    generate(model, weight_copies=None)
    assert not copies(model)
    generate(model, weight_copies=None, max_new_tokens=weight_copies.LEAST_STEPS)
    assert len(copies(model)) == ALL
    generate(model, weight_copies=None, max_new_tokens=2)
    assert len(copies(model)) == ALL


def test_none_are_made_unasked_where_memory_is_short(model, monkeypatch):
    monkeypatch.setattr(weight_copies, "available_host_memory", lambda: 1000)
    generate(model, weight_copies=None, max_new_tokens=40)
    assert not copies(model)
    generate(model)
    assert len(copies(model)) == ALL


def test_false_lets_go_of_them(model):
    generate(model)
    generate(model, weight_copies=False)
    assert not copies(model)


def test_the_setting_is_checked(model):
    with pytest.raises(GenerationError, match="weight_copies"):
        generate(model, weight_copies="yes")


def _set_data(model):
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)


def _edit_data(model):
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] += 1


def _edit_array(model):
    model.model.layers[1].mlp.down_proj.weight.detach().numpy()[:] *= 2


def _swap_rows(model):
    weight = model.lm_head.weight.data
    weight.copy_(weight.flip(0))


def _replace(model):
    model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(torch.randn(16, 32))


def _load(model):
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("edit", [_set_data, _edit_data, _edit_array, _swap_rows, _replace, _load])
def test_an_edited_weight_is_copied_anew(model, edit, rows):
    ids = IDS.expand(rows, -1)
    settings = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    model.generate(ids, weight_copies=True, **settings)
    with torch.no_grad():
        edit(model)
    found = model.generate(ids, weight_copies=True, **settings)
    right = model.generate(ids, weight_copies=False, **settings)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(right.logits))


def test_other_rows_want_another_form(model):
    generate(model)
    forms = {entry.form for entry in model._weight_copies._entries.values()}
    model.generate(IDS.expand(2, -1), max_new_tokens=6, weight_copies=True)
    after = {entry.form for entry in model._weight_copies._entries.values()}
    assert (forms, after) == ({Form.BAGS}, {Form.PACKED})
    assert len(copies(model)) == ALL


def test_copies_of_a_model_begin_without_any(model):
    expected = generate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copies(other)
        assert torch.equal(generate(other), expected)


def test_parameters_stay_what_and_where_they_are(model):
    def places():
        named = model.state_dict(keep_vars=True)
        return {name: (id(p), p.data_ptr(), p.stride(), p._version) for name, p in named.items()}

    before = places()
    generate(model)
    assert places() == before


def test_a_weight_whose_edits_cannot_be_noticed_is_not_copied():
    assert WeightCopies().get(Form.PACKED, [torch.ones(8, 8).t()[:, :5]]) is None


def test_nothing_is_left_when_the_weights_are_gone():
    kept = WeightCopies()
    kept.get(Form.BAGS, [torch.ones(8, 8)])
    assert len(kept) == 1
    kept.refresh()
    assert len(kept) == 0
