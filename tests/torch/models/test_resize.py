# SPDX-License-Identifier: Apache-2.0
"""Resizing every class of every family, and against transformers with the same weights."""

import pytest
import torch

from pretrained.errors import NotYetError
from pretrained.testing import edits
from support.cases import CASES
from support.oracle import transformers_twin

# Each class once, and those whose ties differ from the default.
SEEN: dict[str, object] = {}
for row in CASES:
    name = row.model_class.__name__
    SEEN.setdefault(name if "tied" not in str(row) else str(row), row)
ROWS = list(SEEN.values())
HEADS = [row for row in ROWS if row.build().get_output_embeddings() is not None]


@pytest.mark.parametrize("size", [60, 131])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_every_class_in_every_way(case, size, tmp_path):
    edits.check_resize(case, tmp_path, size=size)


@pytest.mark.parametrize("size", [60, 128])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_old_rows_and_sizes_equal_the_oracles(case, size):
    model = case.build()
    twin = transformers_twin(model)
    model.resize_token_embeddings(size - 5, 64 if size == 128 else None, mean_resizing=False)
    twin.resize_token_embeddings(size - 5, 64 if size == 128 else None, mean_resizing=False)
    ours, theirs = model.state_dict(), twin.state_dict()
    kept = min(size, 99)
    for key, tensor in ours.items():
        if key in theirs:
            assert tensor.shape == theirs[key].shape, key
            length = kept if tensor.shape[0] == len(model.get_input_embeddings().weight) else len(tensor)
            length = min(length, len(tensor))
            assert torch.equal(tensor[:length], theirs[key][:length]), key
    assert model.config.vocab_size == twin.config.vocab_size


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_new_rows_lie_where_the_oracles_lie(case):
    model = case.build()
    twin = transformers_twin(model)
    torch.manual_seed(0)
    model.resize_token_embeddings(99 + 2000)
    twin.resize_token_embeddings(99 + 2000)
    for ours, theirs in (
        (model.get_input_embeddings().weight, twin.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, twin.get_output_embeddings().weight),
    ):
        old, one, other = (part.detach().double() for part in (ours[:99], ours[99:], theirs[99:]))
        sigma = old.std(0) * 1e-9**0.5
        # Of n draws the mean is known to sigma / sqrt(n) and the covariance to about sqrt(2 / n) of itself.
        assert ((one.mean(0) - other.mean(0)).abs() < 8 * sigma / 2000**0.5 + 1e-8).all()
        ratio = (one - one.mean(0)).std(0) / (other - other.mean(0)).std(0)
        assert ((ratio - 1).abs() < 0.12).all(), ratio
        scale = torch.outer(sigma, sigma)
        assert ((one.T.cov() / scale - other.T.cov() / scale).abs() < 0.25).all()


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


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_encoders_and_decoders_are_the_oracles(case):
    model = case.build()
    twin = transformers_twin(model)
    for get in ("get_encoder", "get_decoder"):
        ours, theirs = getattr(model, get)(), getattr(twin, get)()
        path = next(path for path, module in model.named_modules() if module is ours)
        assert path == next(path for path, module in twin.named_modules() if module is theirs), get
