# SPDX-License-Identifier: Apache-2.0
"""Reading a tokenizer from a model's files, and writing it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrained.core.gguf import read_gguf
from pretrained.core.hub import Source
from pretrained.core.writer import write_text_atomically
from pretrained.errors import ArgumentError, TokenizerError, UnknownArgumentError, did_you_mean
from pretrained.text.engines import ByteEngine, Engine, TokenizersEngine, load_json_tokenizer
from pretrained.text.gguf_vocab import gguf_tokenizer
from pretrained.text.guards import library_faults, malformed_files
from pretrained.text.settings import SPECIAL_NAMES, UNLIMITED, TokenizerSettings
from pretrained.text.vocab_files import (
    BERT_SPECIAL,
    GPT2_SPECIAL,
    QWEN2_SPECIAL,
    ROBERTA_SPECIAL,
    read_bpe,
    read_json,
    read_text,
    read_wordpiece,
)

BYT5_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

# Characters that any file system takes in a name, its ending left out.
_LONGEST_NAME = 60
# Classes whose models read token types; every other gets none unless its files say so.
_WITH_TOKEN_TYPES = ("Bert", "MobileBert", "Electra", "Albert", "Deberta", "ConvBert", "Funnel", "XLNet")
# Classes that let tokenizer_config.json say how rows start and end, over what tokenizer.json says.
_WITH_END_FLAGS = ("Llama", "CodeLlama", "Gemma")
# Said by the files themselves or by the machine they were written on, so not carried over.
_NOT_KEPT = (
    "name_or_path",
    "special_tokens_map_file",
    "tokenizer_file",
    "is_local",
    "local_files_only",
    "backend",
    "added_tokens_decoder",
)
_OVERRIDES = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
    "chat_template",
    "additional_special_tokens",
    "extra_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    *SPECIAL_NAMES,
)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise UnknownArgumentError for a setting that no tokenizer has.

    Args:
        overrides: Arguments of ``from_pretrained`` that replace what the files say.
    """
    for name in overrides:
        if name not in _OVERRIDES:
            near = did_you_mean(name, _OVERRIDES)
            raise UnknownArgumentError(
                f"No tokenizer takes an argument {name!r}",
                mend=near or f"It takes, besides the Hub's arguments: {', '.join(_OVERRIDES)}.",
            )


def read_tokenizer(
    source: Source, gguf_file: str | None, overrides: Mapping[str, Any]
) -> tuple[Engine, TokenizerSettings]:
    """Read a tokenizer from whatever files a model has.

    Args:
        source: Where the files are.
        gguf_file: Read the vocabulary of this GGUF file.
        overrides: Settings that replace those of the files.

    Raises:
        TokenizerError: no tokenizer is there, or its files are broken.
        FileError: a file that was asked for is not there.
    """
    with malformed_files(source.path or source.folder):
        return _read_tokenizer(source, gguf_file, overrides)


def _read_tokenizer(
    source: Source, gguf_file: str | None, overrides: Mapping[str, Any]
) -> tuple[Engine, TokenizerSettings]:
    path = _gguf_path(source, gguf_file)
    if path is not None:
        return read_gguf_tokenizer(read_gguf(path).metadata, path, overrides)
    if source.kind == "file" and source.path is not None and source.path.name != "tokenizer.json":
        raise ArgumentError(
            "A tokenizer is read from a folder, a tokenizer.json or a .gguf file", found=source.path
        )
    config = _read_config(source) | dict(overrides)
    settings = _settings(source, config)
    engine = _read_engine(source, config, settings)
    _add_missing_tokens(source, engine, config, settings)
    _apply_end_flags(engine, config, overrides, settings)
    return engine, settings


def read_gguf_tokenizer(
    metadata: Mapping[str, Any], where: object, overrides: Mapping[str, Any]
) -> tuple[Engine, TokenizerSettings]:
    """Make the tokenizer that a GGUF file's metadata describes; see `gguf_vocab.gguf_tokenizer`.

    Args:
        metadata: The file's key-value section.
        where: The file, for errors.
        overrides: Settings that replace those of the file.
    """
    with malformed_files(where), library_faults("This GGUF file's vocabulary cannot be used", where):
        engine, settings = gguf_tokenizer(metadata, where)
    described: dict[str, Any] = dict(settings.special)
    for name in ("model_max_length", "chat_template"):
        described[name] = getattr(settings, name)
    replaced = _settings_from(described | dict(overrides))
    _apply_end_flags(engine, overrides, overrides, replaced)
    return engine, replaced


def _gguf_path(source: Source, gguf_file: str | None) -> Path | None:
    if source.kind == "file" and source.path is not None and source.path.suffix == ".gguf":
        return source.path
    if gguf_file is None:
        return None
    local = Path(gguf_file).expanduser()
    return local if local.is_absolute() else source.require(gguf_file)


def _read_config(source: Source) -> dict[str, Any]:
    file = source.file("tokenizer_config.json", required=False)
    config = read_json(file) if file else {}
    mapping = source.file("special_tokens_map.json", required=False)
    if mapping:
        # tokenizer_config.json is the newer file and wins; a null there is an answer too.
        config = read_json(mapping) | config
    template = _read_template(source)
    if template is not None:
        config["chat_template"] = template
    return config


def _read_template(source: Source) -> str | dict[str, str] | None:
    templates: dict[str, str] = {}
    file = source.file("chat_template.jinja", required=False)
    if file:
        templates["default"] = read_text(file)
    elif file := source.file("chat_template.json", required=False):
        templates["default"] = str(read_json(file).get("chat_template", ""))
    prefix, suffix = "additional_chat_templates/", ".jinja"
    for name in sorted(source.listing()):
        if name.startswith(prefix) and name.endswith(suffix):
            key = name.removeprefix(prefix).removesuffix(suffix)
            templates[key] = read_text(source.require(name))
    if not templates:
        return None
    return templates["default"] if list(templates) == ["default"] else templates


def _settings(source: Source, config: dict[str, Any]) -> TokenizerSettings:
    """Settings from the config's keys, with the defaults that the class of the files implies."""
    kind = str(config.get("tokenizer_class") or "")
    defaults: Mapping[str, str] = {}
    if kind.startswith("ByT5"):
        defaults = BYT5_SPECIAL
    elif source.file("tokenizer.json", required=False) is None:
        defaults = {
            "bert": BERT_SPECIAL,
            "roberta": ROBERTA_SPECIAL,
            "gpt2": GPT2_SPECIAL,
            "qwen2": QWEN2_SPECIAL,
        }[_style(source, kind)]
    return _settings_from({**defaults, **config})


def _settings_from(config: Mapping[str, Any]) -> TokenizerSettings:
    values = dict(config)
    special = {name: _content(values.pop(name)) for name in SPECIAL_NAMES if values.get(name) is not None}
    extra = values.pop("additional_special_tokens", None) or values.pop("extra_special_tokens", None) or []
    values.pop("extra_special_tokens", None)
    extra_tokens = [_content(t) for t in (extra.values() if isinstance(extra, Mapping) else extra)]
    kind = str(values.pop("tokenizer_class", None) or TokenizerSettings().tokenizer_class)
    names = values.pop("model_input_names", None)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or ()):
        raise TokenizerError("model_input_names must be a list of names", found=repr(names)[:200])
    if names is None:
        types = ("token_type_ids",) if kind.startswith(_WITH_TOKEN_TYPES) else ()
        names = ("input_ids", *types, "attention_mask")
    template = values.pop("chat_template", None)
    if isinstance(template, list):  # the older spelling of several templates
        template = {str(item["name"]): str(item["template"]) for item in template}
    if not isinstance(template, str | dict | None) or (
        isinstance(template, dict) and not all(isinstance(text, str) for text in template.values())
    ):
        raise TokenizerError("chat_template must be a text, or texts by name", found=repr(template)[:200])
    length = values.pop("model_max_length", None)
    settings = TokenizerSettings(
        special=special,
        extra_special=extra_tokens,
        model_max_length=UNLIMITED if length is None else int(min(length, UNLIMITED)),
        padding_side=_side(values.pop("padding_side", None), "padding_side"),
        truncation_side=_side(values.pop("truncation_side", None), "truncation_side"),
        model_input_names=tuple(names),
        clean_up_tokenization_spaces=bool(values.pop("clean_up_tokenization_spaces", False)),
        chat_template=template,
        tokenizer_class=kind,
    )
    unset = {name: None for name in SPECIAL_NAMES if name in values}
    settings.rest = {k: v for k, v in values.items() if k not in _NOT_KEPT and k not in unset}
    return settings


def _side(value: Any, name: str) -> str:
    if value not in (None, "left", "right"):
        raise ArgumentError(f"{name} must be 'left' or 'right'", found=repr(value))
    return value or "right"


def _content(token: Any) -> str:
    """A token may be written with its flags."""
    if isinstance(token, Mapping):
        return str(token.get("content", ""))
    return str(getattr(token, "content", token))


def _style(source: Source, kind: str) -> str:
    """What kind of vocabulary files these are, by the class that wrote them or by their names."""
    if kind.startswith(("Roberta", "XLMRoberta", "Longformer", "Bart")):
        return "roberta"
    if kind.startswith("Qwen2"):
        return "qwen2"
    if kind.startswith("GPT2"):
        return "gpt2"
    if source.file("vocab.txt", required=False):
        return "bert"
    vocab = source.file("vocab.json", required=False)
    if vocab and {"<s>", "</s>", "<mask>"} <= read_json(vocab).keys():
        return "roberta"
    return "gpt2"


def _read_engine(source: Source, config: Mapping[str, Any], settings: TokenizerSettings) -> Engine:
    if settings.tokenizer_class.startswith("ByT5"):
        return ByteEngine(int(config.get("extra_ids", 125)))
    file = source.file("tokenizer.json", required=False)
    if file:
        return load_json_tokenizer(read_text(file), file)
    style = _style(source, settings.tokenizer_class)
    vocab_txt = source.file("vocab.txt", required=False)
    if vocab_txt and style == "bert":
        return read_wordpiece(vocab_txt, config, settings.special)
    vocab, merges = source.file("vocab.json", required=False), source.file("merges.txt", required=False)
    if vocab and merges:
        return read_bpe(vocab, merges, config, settings.special, style)
    raise _no_tokenizer(source)


def _no_tokenizer(source: Source) -> TokenizerError:
    names = source.listing()
    ggufs = sorted(n for n in names if n.endswith(".gguf"))
    pieces = sorted(n for n in names if n in ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"))
    if ggufs:
        mend = f"To use the vocabulary of the GGUF file pass gguf_file={ggufs[0]!r}."
    elif pieces:
        mend = (
            f"{pieces[0]} alone is not read; save the tokenizer once as tokenizer.json, "
            "which every tokenizer of the Hub's libraries writes."
        )
    else:
        mend = "Load the tokenizer from where the model came from, or save it here with save_pretrained."
    return TokenizerError(
        "There is no tokenizer",
        where=source.folder if source.kind != "hub" else source.name,
        expected="tokenizer.json, or vocab.txt, or vocab.json and merges.txt, or a GGUF file",
        found=", ".join(sorted(names)[:12]) or "no files",
        mend=mend,
    )


def _add_missing_tokens(
    source: Source, engine: Engine, config: Mapping[str, Any], settings: TokenizerSettings
) -> None:
    """Add the tokens that the config lists and the vocabulary file lacks, in the order of their ids."""
    listed: dict[int, tuple[str, bool]] = {}
    file = source.file("added_tokens.json", required=False)
    if file:
        listed |= {int(index): (token, False) for token, index in read_json(file).items()}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        listed[int(index)] = (_content(token), bool(token.get("special", False)))
    for _, (token, special) in sorted(listed.items()):
        if engine.token_to_id(token) is None:
            engine.add_tokens([token], special=special)
    known = engine.special_ids()
    named = [*settings.special.values(), *settings.extra_special]
    unmarked = [t for t in dict.fromkeys(named) if engine.token_to_id(t) not in known]
    engine.add_tokens(unmarked, special=True)


def _apply_end_flags(
    engine: Engine, config: Mapping[str, Any], overrides: Mapping[str, Any], settings: TokenizerSettings
) -> None:
    flags = [config.get("add_bos_token"), config.get("add_eos_token")]
    asked = any(overrides.get(name) is not None for name in ("add_bos_token", "add_eos_token"))
    by_class = settings.tokenizer_class.startswith(_WITH_END_FLAGS) and any(f is not None for f in flags)
    if not (asked or by_class):
        return
    if not isinstance(engine, TokenizersEngine):
        raise ArgumentError(
            f"{settings.tokenizer_class} always ends a row in </s>",
            found="add_bos_token or add_eos_token",
            mend="Leave them out, or pass add_special_tokens=False when tokenizing.",
        )
    # What was not asked for stays as it is, which a row of no text shows.
    now = engine.encode([""], None, add_special_tokens=True, truncation=None)[0].ids
    ends = []
    for flag, name in zip(flags, ("bos_token", "eos_token"), strict=True):
        token = settings.special.get(name)
        wanted = (token is not None and engine.token_to_id(token) in now) if flag is None else flag
        if wanted and token is None:
            raise TokenizerError(f"This tokenizer has no {name} to add", mend=f"Pass {name}=... as well.")
        ends.append(token if wanted else None)
    engine.set_ends(*ends)


def write_tokenizer(folder: Path, engine: Engine, settings: TokenizerSettings) -> tuple[Path, ...]:
    """Write a tokenizer's files, which this library and others of the ecosystem read.

    Args:
        folder: Made where it is absent.
        engine: The vocabulary.
        settings: The rest.

    Returns:
        The files written.

    Raises:
        FileError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = dict(settings.rest)
    config |= settings.special
    if settings.extra_special:
        config["additional_special_tokens"] = settings.extra_special
    config |= {
        "clean_up_tokenization_spaces": settings.clean_up_tokenization_spaces,
        "model_input_names": list(settings.model_input_names),
        "model_max_length": settings.model_max_length,
        "padding_side": settings.padding_side,
        "tokenizer_class": settings.tokenizer_class,
        "truncation_side": settings.truncation_side,
    }
    files: dict[str, str] = {}
    vocabulary = engine.to_json()
    if vocabulary is not None:
        files["tokenizer.json"] = vocabulary
    elif isinstance(engine, ByteEngine):
        config["extra_ids"] = engine.extra_ids
        config["added_tokens_decoder"] = engine.added_tokens()
    template = settings.chat_template
    if isinstance(template, dict):
        _check_names(template)
        files |= {
            f"additional_chat_templates/{k}.jinja": text for k, text in template.items() if k != "default"
        }
        template = template.get("default")
    if template is not None:
        files["chat_template.jinja"] = template
    mapping: dict[str, Any] = dict(settings.special)
    if settings.extra_special:
        mapping["additional_special_tokens"] = settings.extra_special
    files["special_tokens_map.json"] = _json(mapping)
    files["tokenizer_config.json"] = _json(config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text_atomically(folder / name, text)
    return tuple(folder / name for name in files)


def _check_names(templates: Mapping[str, str]) -> None:
    """Raise for a template whose name, which a stranger's file gives, would lead out of the folder."""
    for name in templates:
        if not name or any(character in name for character in "/\\:\0") or len(name) > _LONGEST_NAME:
            raise TokenizerError(
                "The name of a chat template cannot be a file's name",
                where="chat_template",
                found=repr(name[:100]),
                mend="Give the template another name.",
            )


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
