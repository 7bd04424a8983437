# SPDX-License-Identifier: Apache-2.0
"""From texts to a model's inputs: truncation, padding, tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pretrained.errors import ArgumentError, TokenizerError, did_you_mean
from pretrained.text.encoding import BatchEncoding, pad_rows, plain
from pretrained.text.engines import Row, Truncation
from pretrained.text.settings import UNLIMITED
from pretrained.text.vocabulary import VocabularyMixin

_STRATEGIES = ("longest_first", "only_first", "only_second")
_OPTIONAL_OUTPUTS = {
    "token_type_ids": "type_ids",
    "special_tokens_mask": "special_mask",
    "offset_mapping": "offsets",
}


class EncodingMixin(VocabularyMixin):
    """Adds the call that tokenizes, and padding."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """Turn text into a model's inputs.

        Args:
            text: A text, or a list of them.
            text_pair: A second text for each, as in question and context.
            text_target: What the model shall answer; its ids are returned as ``labels``.
            add_special_tokens: Add what the model expects around a text.
            padding: True or ``"longest"`` for the longest row, ``"max_length"``, or False.
            truncation: True or ``"longest_first"``, ``"only_first"``, ``"only_second"``, or False. None
                truncates where `max_length` is given.
            max_length: In tokens, special ones included; None for `model_max_length`.
            pad_to_multiple_of: Round the padded length up to a multiple of this.
            padding_side: ``"left"`` or ``"right"``; None for the tokenizer's own.
            return_tensors: ``"pt"``, ``"np"``, or None for lists. A single text becomes one row.
            return_token_type_ids: None for whether the model takes them.
            return_attention_mask: None for whether the model takes it.
            return_special_tokens_mask: Also 1 for each special token that was added.
            return_offsets_mapping: Also where each token lies in its text, in characters.
            return_length: Also the rows' lengths.

        Returns:
            ``input_ids`` and so on, each of shape (rows, tokens), or (tokens,) for a single text in lists.

        Raises:
            TokenizerError: not text; padding without a pad token; rows that make no tensor.
            ArgumentError: arguments that contradict each other.
        """
        shape: dict[str, Any] = {
            "padding": padding,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
        }
        cut = self._truncation(truncation, max_length, padding)
        if cut is not None and pad_to_multiple_of and cut.max_length % pad_to_multiple_of:
            raise ArgumentError(
                "Rows cut to max_length cannot also be padded to a multiple that it is not",
                found=f"max_length={cut.max_length}, pad_to_multiple_of={pad_to_multiple_of}",
                mend="Make max_length such a multiple.",
            )
        if text is None:
            if text_target is None:
                raise TokenizerError("There is no text to tokenize", mend="Pass a text or a list of texts.")
            text, text_target = text_target, None
        rows, is_batch = self._rows(text, text_pair, add_special_tokens, cut)
        wanted = {
            "token_type_ids": self._wants("token_type_ids", return_token_type_ids),
            "special_tokens_mask": return_special_tokens_mask,
            "offset_mapping": return_offsets_mapping,
        }
        encoded: dict[str, Any] = {"input_ids": [row.ids for row in rows]}
        encoded |= {
            name: [getattr(row, _OPTIONAL_OUTPUTS[name]) for row in rows] for name in wanted if wanted[name]
        }
        if self._wants("attention_mask", return_attention_mask):
            encoded["attention_mask"] = [[1] * len(row.ids) for row in rows]
        if return_length:
            encoded["length"] = [len(row.ids) for row in rows]
        if text_target is not None:
            targets, _ = self._rows(text_target, None, add_special_tokens, cut)
            if len(targets) != len(rows):
                raise TokenizerError(
                    "There must be one target for each text", found=f"{len(targets)} for {len(rows)}"
                )
        batch = self._finish(encoded, is_batch, **shape)
        if text_target is not None:
            labels = self._finish({"input_ids": [row.ids for row in targets]}, is_batch, **shape)
            batch["labels"] = labels["input_ids"]
        return batch

    def encode(
        self, text: str, text_pair: str | None = None, *, add_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Turn one text into ids: a list, or a tensor of one row with `return_tensors`.

        Args:
            text: The text.
            text_pair: A second text.
            add_special_tokens: Add what the model expects around a text.
            **kwargs: Further arguments of a call.
        """
        return self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, *, add_special_tokens: bool = False) -> list[str]:
        """Split a text into the spellings of its tokens.

        Args:
            text: The text.
            pair: A second text.
            add_special_tokens: Include what the model expects around a text.
        """
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens)
        return [self._token_of(index) for index in ids]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Make encoded texts equally long, as a data loader's collating function does.

        Args:
            encoded_inputs: Encodings of single texts, or one of a batch.
            padding: As for a call, and so are the others.
            max_length: In tokens.
            pad_to_multiple_of: Round the length up to a multiple of this.
            padding_side: ``"left"`` or ``"right"``.
            return_attention_mask: None for whether the model takes it.
            return_tensors: ``"pt"``, ``"np"`` or None.

        Raises:
            TokenizerError: there is nothing to pad, or no pad token.
        """
        if isinstance(encoded_inputs, Mapping):
            columns = {name: plain(values) for name, values in encoded_inputs.items()}
        else:
            names = list(encoded_inputs[0]) if encoded_inputs else []
            columns = {name: [plain(row[name]) for row in encoded_inputs] for name in names}
        if "input_ids" not in columns:
            raise TokenizerError("There are no input_ids to pad", found=", ".join(columns) or "nothing")
        is_batch = not columns["input_ids"] or isinstance(columns["input_ids"][0], list)
        if not is_batch:
            columns = {name: [values] for name, values in columns.items()}
        if "attention_mask" not in columns and self._wants("attention_mask", return_attention_mask):
            columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        return self._finish(
            columns,
            is_batch,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens a row gets.

        Args:
            pair: For a pair of texts.
        """
        return self.engine.num_special_tokens(pair=pair)

    # -- inside -------------------------------------------------------------------------------

    def _wants(self, name: str, asked: bool | None) -> bool:
        return name in self.settings.model_input_names if asked is None else asked

    def _rows(
        self, text: Any, text_pair: Any, add_special_tokens: bool, truncation: Truncation | None
    ) -> tuple[list[Row], bool]:
        is_batch = not isinstance(text, str)
        texts = _texts(text, "text")
        pairs = None if text_pair is None else _texts(text_pair, "text_pair")
        if pairs is not None and len(pairs) != len(texts):
            raise TokenizerError(
                "There must be one second text for each text", found=f"{len(pairs)} for {len(texts)}"
            )
        rows = self.engine.encode(texts, pairs, add_special_tokens=add_special_tokens, truncation=truncation)
        return rows, is_batch

    def _truncation(
        self, truncation: bool | str | None, max_length: int | None, padding: bool | str
    ) -> Truncation | None:
        if truncation is None:
            truncation = max_length is not None and padding != "max_length"
        if truncation in (False, "do_not_truncate"):
            if max_length is not None and padding != "max_length":
                raise ArgumentError(
                    "max_length changes nothing without truncation",
                    found=f"max_length={max_length}, truncation=False",
                    mend="Pass truncation=True, or padding='max_length'.",
                )
            return None
        strategy = "longest_first" if truncation is True else str(truncation)
        if strategy not in _STRATEGIES:
            raise ArgumentError(
                f"Unknown truncation={truncation!r}",
                expected=f"True, False, or one of {', '.join(_STRATEGIES)}",
                mend=did_you_mean(strategy, _STRATEGIES) or None,
            )
        return Truncation(self._length(max_length, "truncation"), strategy, self.settings.truncation_side)

    def _length(self, max_length: int | None, what: str) -> int:
        length = self.settings.model_max_length if max_length is None else max_length
        if length >= UNLIMITED:
            raise ArgumentError(
                f"{what} needs a length, and this tokenizer's files name none",
                mend="Pass max_length=..., or set tokenizer.model_max_length.",
            )
        if length < 0:
            raise ArgumentError("max_length must not be negative", found=length)
        return length

    def _finish(
        self,
        encoded: dict[str, Any],
        is_batch: bool,
        *,
        padding: bool | str,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        return_tensors: str | None,
    ) -> BatchEncoding:
        """Pad rows, and make tensors or take a single row out of its list."""
        if padding not in (False, "do_not_pad"):
            encoded = self._padded(encoded, padding, max_length, pad_to_multiple_of, padding_side)
        elif pad_to_multiple_of:
            raise ArgumentError(
                "pad_to_multiple_of changes nothing without padding", mend="Pass padding=True."
            )
        if return_tensors is not None:
            return BatchEncoding(encoded).convert_to_tensors(return_tensors)
        return BatchEncoding(encoded if is_batch else {name: rows[0] for name, rows in encoded.items()})

    def _padded(
        self,
        encoded: dict[str, Any],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> dict[str, Any]:
        if padding not in (True, "longest", "max_length"):
            raise ArgumentError(
                f"Unknown padding={padding!r}", expected="True, 'longest', 'max_length' or False"
            )
        if self.pad_token_id is None:
            raise TokenizerError(
                "This tokenizer has no pad token, so rows cannot be padded",
                mend="Set one first: tokenizer.pad_token = tokenizer.eos_token.",
            )
        fillers = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": 0,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
        }
        ragged = {name: rows for name, rows in encoded.items() if name in fillers}
        length = self._length(max_length, "padding='max_length'") if padding == "max_length" else None
        side = checked_side(side or self.settings.padding_side, "padding_side")
        return encoded | pad_rows(ragged, fillers, length=length, multiple=multiple, side=side)


def _texts(text: Any, name: str) -> list[str]:
    if isinstance(text, str):
        return [text]
    if isinstance(text, Sequence):
        for i, item in enumerate(text):
            if not isinstance(item, str):
                raise TokenizerError(
                    f"{name} must hold strings only",
                    where=f"item {i}",
                    found=type(item).__name__,
                    mend="Pass pairs as two lists: tokenizer(texts, text_pair=others).",
                )
        return list(text)
    raise TokenizerError(f"{name} must be a string or a list of strings", found=type(text).__name__)


def checked_side(side: str, name: str) -> str:
    """Return a side, or raise ArgumentError.

    Args:
        side: ``"left"`` or ``"right"``.
        name: The setting's name, for the error.
    """
    if side not in ("left", "right"):
        raise ArgumentError(f"{name} must be 'left' or 'right'", found=repr(side))
    return side
