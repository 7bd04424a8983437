# SPDX-License-Identifier: Apache-2.0
"""Configs of watermarks: what `GenerationConfig.watermarking_config` holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pretrained.core.registry import load_name
from pretrained.core.writer import write_text_atomically
from pretrained.errors import GenerationError, did_you_mean

_ROOM = "pretrained.torch.generation.watermark"


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class BaseWatermarkingConfig:
    """What the configs of all watermarks can do."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a config from a dict.

        Args:
            config_dict: Fields by name.
            **kwargs: Fields that override it.

        Raises:
            GenerationError: no such field, or a value that cannot work.
        """
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {**config_dict, **kwargs}
        for name in values:
            if name not in fields:
                raise GenerationError(
                    f"{cls.__name__} has no field {name!r}",
                    where="watermarking_config",
                    expected=", ".join(fields),
                    mend=did_you_mean(name, fields) or None,
                )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return copy.deepcopy(vars(self))

    def to_json_string(self) -> str:
        """Return all fields as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write all fields to a file.

        Args:
            json_file_path: Where to.
        """
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        write_text_atomically(Path(json_file_path), text)

    def update(self, **kwargs: Any) -> None:
        """Set fields.

        Args:
            **kwargs: Fields by name.

        Raises:
            GenerationError: no such field, or a value that cannot work; nothing is changed then.
        """
        vars(self).update(vars(self.from_dict(self.to_dict(), **kwargs)))

    def validate(self) -> None:
        """Raise where a value cannot work.

        Raises:
            GenerationError: names the field.
        """
        raise NotImplementedError(f"{type(self).__name__} must define validate")

    def construct_processor(self, vocab_size: int, device: Any = "cpu") -> Any:
        """Return the rule on scores that leaves this watermark.

        Args:
            vocab_size: Of the model.
            device: Where the scores are.
        """
        raise NotImplementedError(f"{type(self).__name__} must define construct_processor")

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Iterate over names and values."""
        yield from self.to_dict().items()

    def _require(self, name: str, right: bool, expected: str) -> None:
        if not right:
            found = getattr(self, name)
            raise GenerationError(
                f"{name} of the watermark cannot be {found!r}", where=name, expected=expected
            )


@dataclass
class WatermarkingConfig(BaseWatermarkingConfig):
    """A watermark of "green" tokens that come more often than by chance (arXiv:2306.04634).

    Attributes:
        greenlist_ratio: Share of the vocabulary that is green at each step, between 0 and 1.
        bias: Added to the scores of green tokens.
        hashing_key: Secret from which the lists of green tokens follow.
        seeding_scheme: ``"lefthash"``: the list follows from the last token; ``"selfhash"``: from the last
            tokens and the new one, which costs more.
        context_width: How many tokens that is.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: str = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise where a value cannot work.

        Raises:
            GenerationError: names the field.
        """
        ratio, bias = self.greenlist_ratio, self.bias
        right = isinstance(ratio, float) and 0 < ratio < 1
        self._require("greenlist_ratio", right, "a number between 0 and 1")
        right = isinstance(bias, int | float) and math.isfinite(bias)
        self._require("bias", right, "a number")
        self._require("hashing_key", _whole(self.hashing_key, 1), "a whole number of 1 or more")
        schemes = ("lefthash", "selfhash")
        self._require("seeding_scheme", self.seeding_scheme in schemes, '"lefthash" or "selfhash"')
        self._require("context_width", _whole(self.context_width, 1), "a whole number of 1 or more")

    def construct_processor(self, vocab_size: int, device: Any = "cpu") -> Any:
        """Return the `WatermarkLogitsProcessor`.

        Args:
            vocab_size: Of the model.
            device: Where the scores are.
        """
        return load_name(_ROOM, "WatermarkLogitsProcessor")(vocab_size, device, **self.to_dict())


@dataclass
class SynthIDTextWatermarkingConfig(BaseWatermarkingConfig):
    """A watermark that leaves the distribution of each token as it is (doi:10.1038/s41586-024-08025-4).

    Attributes:
        ngram_len: Tokens that a hash sees: those before the new one, and it.
        keys: Secrets, one for each round of the tournament.
        context_history_size: So many contexts back a repeated one is noticed and left without a mark.
        sampling_table_seed: Seed of the table of coin throws.
        sampling_table_size: Size of that table.
        skip_first_ngram_calls: Leave the first ``ngram_len - 1`` tokens without a mark.
        debug_mode: Take all tokens as equally likely, for tests.
    """

    ngram_len: int
    keys: list[int]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False
    debug_mode: bool = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise where a value cannot work.

        Raises:
            GenerationError: names the field.
        """
        keys = self.keys
        right = isinstance(keys, list | tuple) and bool(keys) and all(_whole(key, 0) for key in keys)
        self._require("ngram_len", _whole(self.ngram_len, 2), "a whole number of 2 or more")
        self._require("keys", right, "a list of whole numbers")
        size = self.sampling_table_size
        self._require("sampling_table_size", _whole(size, 1, 2**24), "a whole number from 1 to 2**24")
        right = _whole(self.context_history_size, 1)
        self._require("context_history_size", right, "a whole number of 1 or more")
        self._require("sampling_table_seed", _whole(self.sampling_table_seed, 0), "a whole number")

    def construct_processor(self, vocab_size: int, device: Any = "cpu") -> Any:
        """Return the `SynthIDTextWatermarkLogitsProcessor`.

        Args:
            vocab_size: Accepted for compatibility; the rule follows the scores.
            device: Where the scores are.
        """
        return load_name(_ROOM, "SynthIDTextWatermarkLogitsProcessor")(device=device, **self.to_dict())


def as_watermarking_config(value: Any) -> BaseWatermarkingConfig:
    """Return a watermark's config from what a user or a file wrote.

    Args:
        value: A config, or a dict; its keys say of which watermark.

    Raises:
        GenerationError: it is neither, or a value cannot work.
    """
    if isinstance(value, Mapping):
        synthid = bool({"keys", "ngram_len"} & set(value))
        cls = SynthIDTextWatermarkingConfig if synthid else WatermarkingConfig
        if synthid:
            for name in ("ngram_len", "keys"):
                if name not in value:
                    raise GenerationError(f"The watermark lacks {name}", where="watermarking_config")
        return cls.from_dict(value)
    if not callable(getattr(value, "construct_processor", None)):
        raise GenerationError(
            "watermarking_config has the wrong type",
            where="watermarking_config",
            expected="a WatermarkingConfig, a SynthIDTextWatermarkingConfig or a dict of their fields",
            found=type(value).__name__,
        )
    value.validate()
    config: BaseWatermarkingConfig = value
    return config


def wrong_watermark(value: Any) -> str | None:
    """Return what is wrong with a value for `watermarking_config`, or None.

    Args:
        value: What a user or a file wrote.
    """
    try:
        as_watermarking_config(value)
    except GenerationError as error:
        return f"a watermark's config ({error})"
    return None
