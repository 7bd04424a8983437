# SPDX-License-Identifier: Apache-2.0
"""Checks of models that were edited, for rows of the table of `pretrained.testing.battery`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pretrained.testing.battery import Case, assert_close


def check_resize(case: Case, folder: Path, *, size: int) -> Any:
    """A model with another number of tokens keeps what it knew, runs, learns, and comes back from a file.

    Args:
        case: A row whose inputs name tokens from 3 on.
        folder: For the model's files.
        size: Tokens, more or fewer than there are.

    Returns:
        The resized model.
    """
    model = case.build()
    rows = model.get_input_embeddings().weight.shape[0]
    kept = min(rows, size)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    ties = {alias: owner for alias, owner in model.ties().items() if _is_one(model, alias, owner)}
    inputs = {name: _below(value, kept) for name, value in case.inputs(model.config).items()}
    with torch.no_grad():
        old = model(**inputs)
    returned = model.resize_token_embeddings(size, mean_resizing=False)
    assert returned is model.get_input_embeddings() and len(returned.weight) == size, case
    assert model.config.vocab_size == size, f"{case}: config.vocab_size is {model.config.vocab_size}"
    assert all(_is_one(model, alias, owner) for alias, owner in ties.items()), f"{case}: a tie is lost"
    for key, tensor in model.state_dict().items():
        # No other size of a small config is that of its words.
        wanted = tuple(size if length == rows else length for length in before[key].shape)
        assert tensor.shape == wanted, f"{case}: {key} has shape {list(tensor.shape)}, not {wanted}"
        shared = tuple(
            slice(min(one, other)) for one, other in zip(tensor.shape, before[key].shape, strict=True)
        )
        assert torch.equal(tensor[shared], before[key][shared]), f"{case}: {key} has lost values"
        assert tensor.isfinite().all(), f"{case}: {key}"
    with torch.no_grad():
        new = model(**inputs)
    for name, value in old.items():
        if isinstance(value, torch.Tensor) and value.dim():
            vocabulary = value.shape[-1] == rows and new[name].shape[-1] == size
            found, expected = (new[name][..., :kept], value[..., :kept]) if vocabulary else (new[name], value)
            assert_close(found, expected, f"{case}: {name} of a model with {size} tokens")
    _check_learning(case, model)
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), case
    return model


def _is_one(model: Any, alias: str, owner: str) -> bool:
    return model.get_parameter(alias) is model.get_parameter(owner)


def _below(value: torch.Tensor, tokens: int) -> torch.Tensor:
    return value if value.is_floating_point() else value.clamp(max=tokens - 1)


def _check_learning(case: Case, model: Any) -> None:
    """Every parameter gets a gradient of its own shape, new rows too where they are asked for."""
    inputs = case.with_labels(case.inputs(model.config), model.config)
    if inputs is None:
        return
    model.train()
    loss = model(**inputs).loss
    assert loss.isfinite(), f"{case}: loss {loss}"
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and gradient.abs().sum() > 0, case
    model.zero_grad()
    model.eval()
