# SPDX-License-Identifier: Apache-2.0
"""Checks of what a user passes to `generate`: each names the argument, what was found, and the mend."""

from __future__ import annotations

from typing import Any

import torch

from pretrained.core.constraints import constraints_of
from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError


def check_ids(ids: Any, vocab_size: int | None, name: str, *, may_be_empty: bool = False) -> torch.Tensor:
    """Return token ids as int64, or raise where they cannot be ids.

    Args:
        ids: What the user passed.
        vocab_size: How many ids the model knows; None to leave that unchecked.
        name: The argument, for messages.
        may_be_empty: Whether length 0 is fine.

    Raises:
        GenerationError: names the argument and, for an id outside the vocabulary, row and position.
    """
    if not isinstance(ids, torch.Tensor):
        kind = type(ids).__name__
        mend = f"Pass **{name} instead." if hasattr(ids, "keys") else f"Write torch.tensor({name})."
        if isinstance(ids, list | tuple) and len({len(row) for row in ids if hasattr(row, "__len__")}) > 1:
            mend = (
                'Its rows are of different lengths: tokenizer.pad({"input_ids": ...}, padding_side="left", '
                'return_tensors="pt") makes ids and attention_mask of them.'
            )
        raise GenerationError(f"{name} must be a tensor of token ids", where=name, found=kind, mend=mend)
    if ids.dim() != 2:
        mend = f"Write {name}.unsqueeze(0) for a batch of one." if ids.dim() == 1 else "Pass one id a token."
        raise GenerationError(
            f"{name} has the wrong rank",
            where=name,
            expected="[batch, length]",
            found=list(ids.shape),
            mend=mend,
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        mend = f"Write {name}.long(); or pass vectors as inputs_embeds."
        raise GenerationError(
            f"{name} must be whole numbers", where=name, expected="int64", found=ids.dtype, mend=mend
        )
    if ids.shape[0] == 0 or (ids.shape[1] == 0 and not may_be_empty):
        raise GenerationError(
            "The prompt is empty",
            where=name,
            found=list(ids.shape),
            mend="Pass at least one token, such as the tokenizer's bos_token_id, or some text.",
        )
    checked: torch.Tensor = ids.long()
    if vocab_size is not None and checked.numel():
        wrong = (checked < 0) | (checked >= vocab_size)
        if bool(wrong.any()):
            row, position = wrong.nonzero()[0].tolist()
            raise GenerationError(
                f"Token id {int(checked[row, position])} is outside the vocabulary",
                where=f"{name}, row {row}, position {position}",
                expected=f"0 to {vocab_size - 1}",
                mend="Use the tokenizer that belongs to this model.",
            )
    return checked


def vocabulary(model: Any) -> int | None:
    """Return how many token ids a model knows, or None where it does not say.

    Args:
        model: The model.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(embeddings, "num_embeddings", None)
    return size if size is not None else getattr(model.config, "vocab_size", None)


def check_beams(model: Any, config: GenerationConfig) -> None:
    """Raise where a beam search cannot work; the fields' own contradictions are found elsewhere.

    Args:
        model: The model.
        config: The settled config.

    Raises:
        GenerationError: fewer tokens than a step has candidates, or a forced token that
            there is not.
    """
    if config.num_beams == 1:
        return
    size = vocabulary(model)
    needed = 2 * config.num_beams // config.num_beam_groups
    if size is not None and size < needed:
        raise GenerationError(
            f"num_beams={config.num_beams} looks at {needed} tokens a step, and there are only {size}",
            where="num_beams",
            mend=f"Pass num_beams={max(size // 2, 1) * config.num_beam_groups} or less.",
        )
    for constraint in constraints_of(config):
        for token in _tokens(getattr(constraint, "token_ids", [])):
            if size is not None and token >= size:
                raise GenerationError(
                    f"Token {token} of a constraint is outside the vocabulary",
                    where="constraints or force_words_ids",
                    expected=f"0 to {size - 1}",
                    mend="Use the tokenizer that belongs to this model.",
                )


def _tokens(ids: Any) -> list[int]:
    """Return all ids of nested lists."""
    return [token for one in ids for token in (_tokens(one) if isinstance(one, list) else [one])]


def check_embeds(embeds: Any, ids: torch.Tensor | None) -> None:
    """Raise where a prompt given as vectors cannot be one.

    Args:
        embeds: What the user passed as `inputs_embeds`.
        ids: What the user passed beside it.

    Raises:
        GenerationError: another type, rank or length.
    """
    if not isinstance(embeds, torch.Tensor) or embeds.dim() != 3 or not embeds.is_floating_point():
        raise GenerationError(
            "inputs_embeds must be vectors",
            where="inputs_embeds",
            expected="a floating tensor [batch, length, hidden]",
            found=list(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__,
        )
    if embeds.shape[0] == 0 or embeds.shape[1] == 0:
        raise GenerationError("The prompt is empty", where="inputs_embeds", found=list(embeds.shape))
    if (
        ids is not None
        and isinstance(ids, torch.Tensor)
        and ids.dim() == 2
        and ids.shape[1] > embeds.shape[1]
    ):
        raise GenerationError(
            "input_ids beside inputs_embeds name more tokens than there are vectors",
            where="inputs_embeds",
            expected=f"{ids.shape[1]} positions or more",
            found=embeds.shape[1],
            mend="Leave input_ids out, or pass vectors for all of them.",
        )


def check_mask(mask: Any, batch: int, lengths: tuple[int, ...], name: str) -> torch.Tensor:
    """Return a mask as int64, or raise where it does not fit the prompt.

    Args:
        mask: What the user passed.
        batch: Rows of the prompt.
        lengths: Lengths that would fit.
        name: The argument, for messages.

    Raises:
        GenerationError: another type or shape, or a row without any token.
    """
    expected = " or ".join(str([batch, length]) for length in dict.fromkeys(lengths))
    if (
        not isinstance(mask, torch.Tensor)
        or mask.dim() != 2
        or mask.shape[0] != batch
        or mask.shape[1] not in lengths
    ):
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise GenerationError(
            f"{name} does not fit the prompt",
            where=name,
            expected=expected,
            found=found,
            mend="Pass the mask that the tokenizer returned with these ids: generate(**inputs).",
        )
    checked: torch.Tensor = mask.long()
    empty = (checked == 0).all(dim=1)
    if bool(empty.any()):
        raise GenerationError(
            f"A row of {name} hides its whole prompt", where=f"{name}, row {int(empty.nonzero()[0])}"
        )
    return checked


def check_batch(tensor: torch.Tensor, batch: int, name: str, *, than: str = "the encoder's input") -> None:
    """Raise where a tensor has another batch size than what it belongs to.

    Args:
        tensor: What the user passed.
        batch: Rows of what it belongs to.
        name: The argument, for messages.
        than: What it belongs to.

    Raises:
        GenerationError: it has.
    """
    if tensor.shape[0] != batch:
        raise GenerationError(
            f"{name} has another batch size than {than}",
            where=name,
            expected=batch,
            found=tensor.shape[0],
        )
