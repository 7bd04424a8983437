# SPDX-License-Identifier: Apache-2.0
"""Token healing: the last token of a prompt becomes the one that the text would rather have had.

A prompt that ends in the middle of a word, or of a link after ``http``, ends in a token that such text seldom
has. Its last token is taken back, and of all tokens that begin with the same text the likeliest is taken.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError
from pretrained.torch.generation.checks import check_ids, vocabulary
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.settings import parameters

FAVOUR = 1.0
"""What the score of the token that was there is raised by, so that a word is not changed without need."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Extensions:
    """The tokens whose spelling begins with that of another one.

    Args:
        tokenizer: Anything with `get_vocab` and `all_special_ids`.

    Raises:
        GenerationError: it has not.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise GenerationError(
                "Token healing looks at the spelling of tokens",
                where="tokenizer",
                expected="a tokenizer with get_vocab()",
                found=type(tokenizer).__name__,
            )
        # Tokens that are no text: special ones, those added by name, and bytes by their number.
        added = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
        other = {*getattr(tokenizer, "all_special_ids", ()), *added.values()}
        vocab = tokenizer.get_vocab().items()
        pairs = sorted((t, i) for t, i in vocab if t and i not in other and not _BYTE.fullmatch(t))
        self._spellings = [spelling for spelling, _ in pairs]
        self._ids = [index for _, index in pairs]
        self._spelling_of = {index: spelling for spelling, index in pairs}

    def of(self, token: int) -> list[int]:
        """Return the ids of all tokens that begin like one, itself included; none for what is no text.

        Args:
            token: Its id.
        """
        spelling = self._spelling_of.get(token)
        if spelling is None:
            return []
        first = bisect.bisect_left(self._spellings, spelling)
        end = bisect.bisect_left(self._spellings, spelling + "\U0010ffff", first)
        return self._ids[first:end]


@torch.no_grad()
def healed(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, tokenizer: Any) -> torch.Tensor:
    """Return prompts whose last token is healed; the text of each still begins as it did.

    Rows that end in padding or in a special token, that have one token, and those whose last token has no
    other that begins like it, stay as they are.

    Args:
        model: A decoder-only model with a language-model head.
        ids: [rows, length].
        mask: [rows, length], 0 at padding; None where nothing is padded.
        tokenizer: Of the prompt.

    Returns:
        [rows, length].
    """
    extensions = Extensions(tokenizer)
    real = torch.ones_like(ids) if mask is None else mask
    long_enough = ((real.sum(1) > 1) & (real[:, -1] != 0)).tolist()
    last = ids[:, -1].tolist()
    choices = [extensions.of(token) if long_enough[row] else [] for row, token in enumerate(last)]
    rows = [row for row, choice in enumerate(choices) if len(choice) > 1]
    if not rows:
        return ids
    scores = _next_scores(model, ids[rows, :-1], None if mask is None else mask[rows, :-1])
    result = ids.clone()
    for place, row in enumerate(rows):
        tokens = torch.tensor([i for i in choices[row] if i < scores.shape[1]], device=ids.device)
        value = scores[place, tokens] + FAVOUR * (tokens == last[row])
        result[row, -1] = tokens[value.argmax()]
    return result


def for_healing(config: GenerationConfig, inputs: GenerationInputs) -> GenerationInputs:
    """Return prepared inputs; where they are to be healed, with ids of their own that can be changed.

    Args:
        config: The settled config.
        inputs: The prepared inputs.

    Raises:
        GenerationError: the prompt, or its beginning, is not there as ids.
    """
    if not config.token_healing:
        return inputs
    if inputs.inputs_embeds is not None or inputs.past_length:
        raise GenerationError(
            "Token healing looks at the whole prompt as ids",
            where="token_healing",
            found="inputs_embeds" if inputs.inputs_embeds is not None else "a cache and its new tokens",
            mend="Pass the whole prompt as input_ids, or leave token_healing out.",
        )
    ids = inputs.input_ids.clone()
    return dataclasses.replace(inputs, input_ids=ids, encoder_input_ids=ids)


def heal(model: Any, config: GenerationConfig, inputs: GenerationInputs, tokenizer: Any) -> None:
    """Heal prepared prompts in place, where the call asks for it.

    Args:
        model: The model that generates.
        config: The settled config.
        inputs: From `for_healing`.
        tokenizer: Of the prompt.
    """
    if config.token_healing:
        inputs.input_ids.copy_(healed(model, inputs.input_ids, inputs.attention_mask, tokenizer))


def heal_by_hand(model: Any, ids: Any, tokenizer: Any) -> torch.Tensor:
    """Return healed prompts, as `GenerationMixin.heal_tokens` promises.

    Args:
        model: The model.
        ids: [rows, length], padded on the left with the tokenizer's padding token.
        tokenizer: Of the prompt.

    Raises:
        GenerationError: no tokenizer, an encoder-decoder, or ids that are none.
    """
    if tokenizer is None:
        raise GenerationError(
            "Token healing looks at the text of tokens, and there is no tokenizer to make it",
            where="tokenizer",
            mend="Pass tokenizer=... to heal_tokens().",
        )
    refuse_encoders(model)
    ids = check_ids(ids, vocabulary(model), "input_ids")
    pad = getattr(tokenizer, "pad_token_id", None)
    # Only what the rows begin with is padding: the same token may end a turn.
    mask = None if pad is None else (ids != pad).long().cummax(dim=1).values
    return healed(model, ids, mask, tokenizer)


def refuse_encoders(model: Any) -> None:
    """Raise where a model's prompt is read by an encoder, which has nothing to complete.

    Args:
        model: The model.

    Raises:
        GenerationError: it is.
    """
    if model.config.is_encoder_decoder:
        raise GenerationError(
            "Token healing completes the prompt of a decoder, and this model's is read by an encoder",
            where="token_healing",
            found=type(model).__name__,
            mend="Leave token_healing out.",
        )


def _next_scores(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    takes = parameters(type(getattr(model, "unsynced", model)).forward)
    arguments: dict[str, Any] = {"input_ids": ids}
    if mask is not None and bool((mask == 0).any()):
        arguments["attention_mask"] = mask
        if "position_ids" in takes:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
    options: dict[str, Any] = {"use_cache": False, "return_dict": True, "logits_to_keep": 1}
    arguments |= {name: value for name, value in options.items() if name in takes}
    logits: torch.Tensor = model(**arguments).logits
    return logits[:, -1].float()
