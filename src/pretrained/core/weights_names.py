# SPDX-License-Identifier: Apache-2.0
"""Chooses the weights among the names of files, in a folder or in a repository that is not yet fetched."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from pretrained.errors import FileError, did_you_mean

INDEX_NAME: Final = re.compile(r".+\.index(\.[\w.-]+)?\.json")
"""What the names of index files look like."""

_WEIGHTS_NAME: Final = re.compile(r".+\.(safetensors|bin|gguf|h5|msgpack|index(\.[\w.-]+)?\.json)")
_VARIANT_NAME: Final = re.compile(
    r"(?:model|pytorch_model)\.([\w-]+?)(?:-\d{5,}-of-\d{5,})?\.(?:safetensors|bin)"
)


def choose_weights(
    names: Collection[str],
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    gguf_file: str | None = None,
    where: str = "",
) -> str:
    """Choose the file that holds the weights, or the index of those that do, among names.

    Args:
        names: The files there are, locally or in a repository.
        variant: Infix of the names: ``"fp16"`` for ``model.fp16.safetensors``.
        use_safetensors: None prefers safetensors to ``pytorch_model.bin``, True takes nothing else, False
            skips it.
        gguf_file: Take this GGUF file instead.
        where: What an error says about the place.

    Raises:
        FileError: none of them fits; the message says what was looked for, what is there, and which argument
            helps.
    """
    if gguf_file is not None:
        if gguf_file in names:
            return gguf_file
        ggufs = [name for name in names if name.endswith(".gguf")]
        raise FileError(
            f"There is no GGUF file {gguf_file!r}",
            where=where,
            found=few(ggufs) if ggufs else "no GGUF file",
            mend=did_you_mean(gguf_file, ggufs) or None,
        )
    wanted = candidates(variant, use_safetensors)
    for candidate in wanted:
        if candidate in names:
            return candidate
    weights = [name for name in names if _WEIGHTS_NAME.fullmatch(name)]
    raise FileError(
        "There are no weights",
        where=where,
        expected=" or ".join(wanted),
        found=few(weights or names),
        mend=_mend(names, variant, use_safetensors),
    )


def few(names: Collection[str]) -> str:
    """List the first names, and say how many more there are."""
    ordered = sorted(names)
    text = ", ".join(ordered[:8]) or "no files"
    return f"{text} and {len(ordered) - 8} more" if len(ordered) > 8 else text


def candidates(variant: str | None, use_safetensors: bool | None) -> list[str]:
    """Return the names that weights may have, in the order of preference; see `choose_weights`."""
    names: list[str] = []
    if use_safetensors is not False:
        names += ["model.safetensors", "model.safetensors.index.json"]
    if use_safetensors is not True:
        names += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
    if not variant:
        return names
    return [f"{stem}.{variant}.{end}" for stem, _, end in (name.rpartition(".") for name in names)]


def _mend(names: Collection[str], variant: str | None, use_safetensors: bool | None) -> str | None:
    """Say which argument would have found weights."""
    variants = sorted({match[1] for name in names if (match := _VARIANT_NAME.fullmatch(name))})
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    mend = None
    if not set(names).isdisjoint(candidates(variant, None)):
        mend = "Drop use_safetensors to take either format."
    elif ggufs:
        mend = f"Pass gguf_file={ggufs[0]!r}."
    elif variants and variant not in variants:
        mend = f"Pass variant={variants[0]!r}."
    elif variant and not set(names).isdisjoint(candidates(None, None)):
        mend = "Drop variant to use the plain names."
    elif not {"tf_model.h5", "tf_model.h5.index.json"}.isdisjoint(names):
        mend = "tf_model.h5 holds TensorFlow weights: pass from_tf=True."
    elif not {"flax_model.msgpack", "flax_model.msgpack.index.json"}.isdisjoint(names):
        mend = "flax_model.msgpack holds Flax weights: pass from_flax=True."
    elif "adapter_config.json" in names:
        mend = "This is an adapter: load the base model that adapter_config.json names, then the adapter."
    return mend
