# SPDX-License-Identifier: Apache-2.0
"""Everything about a tokenizer besides its vocabulary, as tokenizer_config.json holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNLIMITED = int(1e30)
"""What files write for a maximum length that nobody knows."""

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The special tokens that have a name."""


@dataclass(slots=True)
class TokenizerSettings:
    """What a tokenizer does besides turning text into ids.

    Attributes:
        special: The named special tokens there are, such as ``{"eos_token": "</s>"}``.
        extra_special: Further special tokens.
        model_max_length: In tokens; `UNLIMITED` where unknown.
        padding_side: ``"right"`` or ``"left"``.
        truncation_side: ``"right"`` or ``"left"``: the end that is dropped.
        model_input_names: What a call returns.
        clean_up_tokenization_spaces: Whether decoding takes the blank before punctuation out.
        chat_template: A template, or several by name, or None.
        tokenizer_class: The name that files carry.
        rest: Every other key of the file, kept and written back.
    """

    special: dict[str, str] = field(default_factory=dict)
    extra_special: list[str] = field(default_factory=list)
    model_max_length: int = UNLIMITED
    padding_side: str = "right"
    truncation_side: str = "right"
    model_input_names: tuple[str, ...] = ("input_ids", "attention_mask")
    clean_up_tokenization_spaces: bool = False
    chat_template: str | dict[str, str] | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"
    rest: dict[str, Any] = field(default_factory=dict)
