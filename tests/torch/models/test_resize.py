# SPDX-License-Identifier: Apache-2.0
"""Other numbers of tokens and positions in every class of every family."""

import pytest
import torch

from pretrained.errors import NotYetError
from pretrained.testing import edits
from support.resized import HEADS, ROWS


@pytest.mark.parametrize("size", [60, 131])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_every_class_in_every_way(case, size, tmp_path):
    edits.check_resize(case, tmp_path, size=size)


@pytest.mark.parametrize("case", [row for row in HEADS if row.model_class.can_generate()], ids=str)
def test_generating_with_new_tokens(case):
    model = case.build()
    model.resize_token_embeddings(131)
    with torch.no_grad():
        head = model.get_output_embeddings()
        bias = torch.zeros(131, requires_grad=False)
        bias[120] = 1e4
        head.register_forward_hook(lambda module, args, out: out + bias)
    inputs = case.inputs(model.config)
    ids = inputs.pop("input_ids")
    inputs = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
    out = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, **inputs)
    assert (out[:, -3:] == 120).all()


POSITIONS = [row for row in ROWS if row.model_class._position_embedding]


@pytest.mark.parametrize("size", [16, 50])
@pytest.mark.parametrize("case", POSITIONS, ids=str)
def test_positions_of_every_class(case, size, tmp_path):
    model = case.build()
    table = model.get_position_embeddings()
    old = table.weight.detach().clone()
    inputs = case.inputs(model.config)
    with torch.no_grad():
        before = model(**inputs)[0]
    model.resize_position_embeddings(size)
    assert model.get_position_embeddings() is table and table.num_embeddings == size
    assert model.config.max_position_embeddings == size
    kept = min(size, len(old))
    assert torch.equal(table.weight[:kept], old[:kept]) and table.weight.isfinite().all()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], before)
    if size == 50:
        ids = torch.randint(3, 99, (2, 45) if inputs["input_ids"].dim() == 2 else (1, 2, 45))
        other = {name: value for name, value in inputs.items() if name.startswith("encoder_")}
        other = {name: value[: len(ids)] for name, value in other.items()}
        assert model(input_ids=ids, **other)[0].isfinite().all()
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.get_position_embeddings().weight, table.weight)


@pytest.mark.parametrize("case", [row for row in ROWS if row not in POSITIONS], ids=str)
def test_classes_without_a_table_say_what_to_do(case):
    model = case.build()
    text = "reads distances" if "T5" in str(case) else "rotary"
    for call in (model.get_position_embeddings, lambda: model.resize_position_embeddings(50)):
        with pytest.raises(NotYetError, match=rf"{type(model).__name__} has no table.*{text}"):
            call()
        with pytest.raises(NotImplementedError):
            call()
