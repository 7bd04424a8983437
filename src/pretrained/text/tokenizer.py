# SPDX-License-Identifier: Apache-2.0
"""`AutoTokenizer` and the one tokenizer class behind it.

A tokenizer is an engine, which turns text into ids, plus settings: special tokens, padding, a chat
template. Names and arguments are the ecosystem's. Tokenizing changes nothing in the tokenizer, so threads
may share one, and no setting of the ``tokenizers`` library or of the process is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pretrained.core.hub import HubOptions, resolve
from pretrained.core.push import PushToHubMixin, prepare_push
from pretrained.errors import ArgumentError
from pretrained.text.chat_mixin import ChatMixin
from pretrained.text.encoding import plain
from pretrained.text.encoding_mixin import EncodingMixin, checked_side
from pretrained.text.engines import Engine
from pretrained.text.settings import TokenizerSettings
from pretrained.text.tokenizer_files import (
    check_overrides,
    read_gguf_tokenizer,
    read_tokenizer,
    write_tokenizer,
)
from pretrained.text.vocabulary import MAX_ID

# The tidying that the ecosystem calls clean_up_tokenization_spaces.
_TIDY = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
         " 've": "'ve", " 're": "'re"}  # fmt: skip


class PreTrainedTokenizer(EncodingMixin, ChatMixin, PushToHubMixin):
    """Turns text into a model's inputs, and ids back into text.

    Args:
        engine: What turns text into ids.
        settings: Everything else; None for the defaults.
        name_or_path: Where it came from.

    Attributes:
        settings: As given; the properties of this class read and write it.
        name_or_path: As given.
    """

    is_fast = True

    def __init__(
        self, engine: Engine, settings: TokenizerSettings | None = None, *, name_or_path: str = ""
    ) -> None:
        self.engine = engine
        self.settings = settings or TokenizerSettings()
        self.name_or_path = name_or_path

    # -- loading and saving --------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        use_fast: bool = True,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read a tokenizer from a folder, a file or a repository.

        Args:
            pretrained_model_name_or_path: Folder, id, tokenizer.json or .gguf file.
            gguf_file: Use the vocabulary of this GGUF file in the folder or repository.
            use_fast: Accepted for scripts that pass it; there is one implementation.
            trust_remote_code: Accepted for scripts that pass it; no code is ever run.
            **kwargs: The Hub's arguments (`HubOptions`), and settings that replace those of the files:
                ``padding_side``, ``model_max_length``, ``pad_token``, ``add_eos_token`` and so on.

        Raises:
            FileError: nothing is there.
            TokenizerError: no tokenizer is there, or its files are broken.
            UnknownArgumentError: a setting that no tokenizer has.
        """
        del use_fast, trust_remote_code  # neither can change what is read
        options = HubOptions.take(kwargs)
        check_overrides(kwargs)
        source = resolve(pretrained_model_name_or_path, options)
        engine, settings = read_tokenizer(source, gguf_file, kwargs)
        return cls(engine, settings, name_or_path=source.name)

    @classmethod
    def from_gguf_metadata(
        cls, metadata: Mapping[str, Any], *, name_or_path: str = "", **kwargs: Any
    ) -> Self:
        """Make the tokenizer that an already read GGUF file describes.

        Args:
            metadata: `Checkpoint.metadata` of `pretrained.core.gguf.read_gguf`.
            name_or_path: The file, for errors.
            **kwargs: Settings that replace those of the file.

        Raises:
            TokenizerError: the vocabulary is absent, of an unknown kind or contradicts itself.
        """
        check_overrides(kwargs)
        engine, settings = read_gguf_tokenizer(metadata, name_or_path or None, kwargs)
        return cls(engine, settings, name_or_path=name_or_path)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write the tokenizer's files into a folder, which is made where it is absent.

        Args:
            save_directory: The folder.
            push_to_hub: Also push those files; then `kwargs` are those of `push_to_hub`.
            **kwargs: ``repo_id`` and the other arguments of `push_to_hub`.

        Returns:
            The files written.

        Raises:
            ArgumentError: the folder is a file.
            UnknownArgumentError: an argument that nothing takes, or that only pushing takes.
            FileError: a file cannot be written, or the push failed.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ArgumentError("A tokenizer is saved into a folder", where=folder, found="a file")
        push = prepare_push("Saving a tokenizer", folder, push_to_hub, kwargs)
        files = write_tokenizer(folder, self.engine, self.settings)
        push(self)
        return tuple(str(file) for file in files)

    # -- ids to text ---------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Turn ids into text.

        Args:
            token_ids: An id, a list, an array or a tensor; of several rows, a list of texts is returned.
                Ids past the vocabulary have no text: models pad their embeddings, and may emit such rows.
            skip_special_tokens: Leave special tokens out.
            clean_up_tokenization_spaces: Take the blank before punctuation out; None for the tokenizer's
                own setting.

        Raises:
            TokenizerError: an id is negative, or larger than any vocabulary.
        """
        ids = plain(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        text = self.engine.decode(self._tokens_of(ids), skip_special_tokens=skip_special_tokens)
        tidy = clean_up_tokenization_spaces
        if self.settings.clean_up_tokenization_spaces if tidy is None else tidy:
            for untidy, clean in _TIDY.items():
                text = text.replace(untidy, clean)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Turn several rows of ids into texts; see `decode`.

        Args:
            sequences: Lists, arrays or tensors of ids.
            skip_special_tokens: As for `decode`.
            clean_up_tokenization_spaces: As for `decode`.
        """
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in plain(sequences)
        ]

    # -- settings ------------------------------------------------------------------------------

    @property
    def model_max_length(self) -> int:
        """How many tokens the model takes; a huge number where its files do not say."""
        return self.settings.model_max_length

    @model_max_length.setter
    def model_max_length(self, length: int) -> None:
        self.settings.model_max_length = length

    @property
    def padding_side(self) -> str:
        """Where padding goes: ``"right"``, or ``"left"`` for generation in batches."""
        return self.settings.padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self.settings.padding_side = checked_side(side, "padding_side")

    @property
    def truncation_side(self) -> str:
        """Which end truncation drops: ``"right"`` or ``"left"``."""
        return self.settings.truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self.settings.truncation_side = checked_side(side, "truncation_side")

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return list(self.settings.model_input_names)

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """Whether decoding takes the blank before punctuation out."""
        return self.settings.clean_up_tokenization_spaces

    def __repr__(self) -> str:
        special = ", ".join(f"{name}={token!r}" for name, token in self.settings.special.items())
        return f"{type(self).__name__}({self.name_or_path!r}, {len(self)} tokens, {special})"

    # -- inside --------------------------------------------------------------------------------

    def _tokens_of(self, ids: list[int]) -> list[int]:
        """Return the ids that are tokens; raise for those that no model emits."""
        size = len(self)
        for index in ids:
            if not 0 <= index < MAX_ID:
                raise self._outside(index)
        # Ids of tokens added later may lie beyond a gap.
        return [index for index in ids if index < size or self.engine.id_to_token(index) is not None]


class AutoTokenizer:
    """Reads the tokenizer of any model; see `PreTrainedTokenizer.from_pretrained`."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer is not made directly: use AutoTokenizer.from_pretrained(path_or_id).")

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> PreTrainedTokenizer:
        """Read a tokenizer from a folder, a file or a repository.

        Args:
            pretrained_model_name_or_path: Folder, id, tokenizer.json or .gguf file.
            gguf_file: Use the vocabulary of this GGUF file in the folder or repository.
            **kwargs: See `PreTrainedTokenizer.from_pretrained`.
        """
        return PreTrainedTokenizer.from_pretrained(
            pretrained_model_name_or_path, gguf_file=gguf_file, **kwargs
        )
