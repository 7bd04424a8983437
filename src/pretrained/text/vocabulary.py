# SPDX-License-Identifier: Apache-2.0
"""A tokenizer's vocabulary and its special tokens: the part that is about single tokens, not texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrained.errors import TokenizerError, UnknownArgumentError, did_you_mean
from pretrained.text.encoding import plain
from pretrained.text.engines import Engine, TokenizersEngine
from pretrained.text.settings import SPECIAL_NAMES, TokenizerSettings

MAX_ID = 2**32  # beyond it the tokenizers library takes no number


def _special_token(name: str) -> property:
    """A special token by name, as text: None where there is none."""

    def get(self: VocabularyMixin) -> str | None:
        return self.settings.special.get(name)

    def set_(self: VocabularyMixin, token: str | None) -> None:
        self._set_special(name, token)

    return property(get, set_, doc=f"The {name}, or None. It can be set to any token of the vocabulary.")


def _special_id(name: str) -> property:
    """The id of a special token by name."""

    def get(self: VocabularyMixin) -> int | None:
        token = self.settings.special.get(name)
        return None if token is None else self.engine.token_to_id(token)

    def set_(self: VocabularyMixin, index: int | None) -> None:
        self._set_special(name, None if index is None else self._token_of(index))

    return property(get, set_, doc=f"The id of the {name}, or None. It can be set to any id.")


class VocabularyMixin:
    """Tokens and their ids, and the special ones among them.

    Attributes:
        engine: What turns text into ids.
        settings: Holds which tokens are special.
    """

    engine: Engine
    settings: TokenizerSettings

    bos_token, bos_token_id = _special_token("bos_token"), _special_id("bos_token")
    eos_token, eos_token_id = _special_token("eos_token"), _special_id("eos_token")
    unk_token, unk_token_id = _special_token("unk_token"), _special_id("unk_token")
    sep_token, sep_token_id = _special_token("sep_token"), _special_id("sep_token")
    pad_token, pad_token_id = _special_token("pad_token"), _special_id("pad_token")
    cls_token, cls_token_id = _special_token("cls_token"), _special_id("cls_token")
    mask_token, mask_token_id = _special_token("mask_token"), _special_id("mask_token")

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, without those added later; `len` counts all."""
        return self.engine.size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.engine.size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self.engine.vocab()

    @property
    def vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self.engine.vocab()

    def add_tokens(self, new_tokens: str | Sequence[Any], special_tokens: bool = False) -> int:
        """Add tokens and return how many were new; then resize the model's embeddings.

        Args:
            new_tokens: A token, or several.
            special_tokens: Decoding may leave them out.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) else list(new_tokens)
        return self.engine.add_tokens(tokens, special=special_tokens)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Name special tokens, adding those that are no tokens yet, and return how many were new.

        Args:
            special_tokens_dict: ``{"pad_token": "<pad>"}`` and so on; ``additional_special_tokens`` takes
                a list.

        Raises:
            UnknownArgumentError: there is no special token of that name.
        """
        new = 0
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens"):
                texts = [str(token) for token in value]
                new += self.engine.add_tokens(list(value), special=True)
                known = self.settings.extra_special
                self.settings.extra_special = [*known, *(t for t in texts if t not in known)]
            elif name in SPECIAL_NAMES:
                new += self.engine.add_tokens([value], special=True)
                self.settings.special[name] = str(value)
            else:
                raise UnknownArgumentError(
                    f"There is no special token named {name!r}",
                    expected=f"one of {', '.join(SPECIAL_NAMES)}, additional_special_tokens",
                    mend=did_you_mean(name, SPECIAL_NAMES) or None,
                )
        return new

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The named special tokens by name."""
        extra = self.settings.extra_special
        return dict(self.settings.special) | ({"additional_special_tokens": extra} if extra else {})

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own."""
        return list(self.settings.extra_special)

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token: what ``skip_special_tokens`` leaves out."""
        named = [*self.settings.special.values(), *self.settings.extra_special]
        marked = [self._token_of(index) for index in sorted(self.engine.special_ids())]
        return list(dict.fromkeys([*named, *marked]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        ids = (self.engine.token_to_id(token) for token in self.all_special_tokens)
        return [index for index in ids if index is not None]

    @property
    def backend_tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` inside; None for byte-level tokenizers."""
        return self.engine.tokenizer if isinstance(self.engine, TokenizersEngine) else None

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The spellings of ids.

        Args:
            ids: An id, or several.
            skip_special_tokens: Leave special tokens out.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        values = plain(ids)
        if isinstance(values, int):
            return self._token_of(values)
        left_out = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._token_of(index) for index in values if index not in left_out]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The ids of spellings: that of the unknown token, or None, for those that are no token.

        Args:
            tokens: A token, or several.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.engine.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Join spellings into text.

        Args:
            tokens: As `tokenize` returns them.
        """
        return self.engine.decode(self.convert_tokens_to_ids(list(tokens)), skip_special_tokens=False)

    # -- inside --------------------------------------------------------------------------------

    def _set_special(self, name: str, token: Any) -> None:
        if token is None:
            self.settings.special.pop(name, None)
            return
        text = str(getattr(token, "content", token))
        if self.engine.token_to_id(text) is None:
            raise TokenizerError(
                f"{text!r} is not in the vocabulary, so it cannot be the {name}",
                mend=f"Add it: tokenizer.add_special_tokens({{{name!r}: {text!r}}}), then resize the model.",
            )
        self.settings.special[name] = text

    def _token_of(self, index: int) -> str:
        token = self.engine.id_to_token(index) if 0 <= index < MAX_ID else None
        if token is None:
            raise self._outside(index)
        return token

    def _outside(self, index: int) -> TokenizerError:
        mend = "Decode with the tokenizer that the model was trained with."
        if index < 0:
            mend = "Labels mark what is ignored by -100: replace it by tokenizer.pad_token_id first."
        return TokenizerError(
            "A token id is outside the vocabulary",
            expected=f"0 to {len(self) - 1}",
            found=index,
            mend=mend,
        )
