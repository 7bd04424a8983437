# SPDX-License-Identifier: Apache-2.0
"""The first model card of a repository: what the files themselves say, and how to load them.

A card is README.md with a YAML head, as the Hub reads it. Nothing is invented: purpose, data, quality and
license are the author's to add, and a card that is there is never written over, only given tags.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pretrained.core.adapter_files import ADAPTER_CONFIG
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.config import CONFIG_NAME, read_json_object
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.hub import is_repo_id
from pretrained.core.registry import AUTO_CLASSES, FAMILIES
from pretrained.core.report import format_bytes
from pretrained.errors import ArgumentError, PretrainedError

CARD_NAME: Final = "README.md"

_PIPELINES = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
_ADAPTER_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# Several tasks may mean one class; these are said only where no other does.
_VAGUE = ("ForPreTraining", "ForTextEncoding", "WithLMHead")
# What a reader wants to know -> the names that configs give it.
_FACTS = {
    "vocabulary": ("vocab_size",),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "hidden size": ("hidden_size", "d_model", "n_embd", "dim"),
    "attention heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "longest input": ("max_position_embeddings", "n_positions"),
}
_TOKENIZER_FILES = frozenset(("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"))

_END = """\
This card was made from the files. What the model is for, what it was trained on, how well it does and under
which license it may be used, only its author can say: please add it here.
"""


def new_card(
    folder: Path,
    names: Iterable[str],
    repo_id: str,
    *,
    variant: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """Return the text of a card for files that have none.

    Args:
        folder: Where they lie.
        names: Which of its files, and those that are in the repository already.
        repo_id: The repository they go to.
        variant: Infix of the weights' file names.
        tags: Added to the architecture's.
    """
    names = set(names)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_NAME).is_file():
        return _adapter_card(folder, repo_id, tags)
    here = CONFIG_NAME in names and (folder / CONFIG_NAME).is_file()
    config = read_json_object(folder / CONFIG_NAME) if here else {}
    checkpoint = _checkpoint(folder, variant)
    model_type, architecture = config.get("model_type"), (config.get("architectures") or [None])[0]
    task = _task(model_type, architecture)
    head = ["---", "library_name: pretrained"]
    if task in _PIPELINES and checkpoint is not None:
        head.append(f"pipeline_tag: {_PIPELINES[task]}")
    known = [model_type] if isinstance(model_type, str) and _is_plain(model_type) else []
    head += _tag_lines([*known, *tags])
    parts = ["\n".join([*head, "---"]), f"# {repo_id.rpartition('/')[2]}"]
    if checkpoint is not None or config:
        parts.append(_table(config, architecture, checkpoint))
    parts += _how_to_load(repo_id, names, task if checkpoint is not None else None, variant)
    return "\n\n".join([*parts, _END])


def with_tags(text: str, tags: Collection[str]) -> str:
    """Return a card with tags added to those it has; the text itself where it has them all.

    Args:
        text: The card.
        tags: What it should have.

    Raises:
        ArgumentError: the card's YAML head cannot be read.
    """
    # Imported here: only cards that exist are taken apart.
    from huggingface_hub import ModelCard  # noqa: PLC0415

    if not tags:
        return text
    try:
        card = ModelCard(text if text.startswith("---") else f"---\n\n---\n{text}")
        known = list(card.data.get("tags") or [])
    except Exception as error:  # of the YAML library, which has a family of its own
        raise ArgumentError(
            "The model card's head cannot be read, so it can be given no tags",
            where=CARD_NAME,
            found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            mend="Mend the YAML between its first two lines of '---', or leave tags out.",
        ) from error
    new = [tag for tag in dict.fromkeys(tags) if tag not in known]
    if not new:
        return text
    card.data["tags"] = known + new
    return str(card)


def _adapter_card(folder: Path, repo_id: str, tags: Iterable[str]) -> str:
    """A card for an adapter, in peft's format, whose base model is elsewhere."""
    config = read_json_object(folder / ADAPTER_CONFIG)
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    head = ["---", "library_name: peft"]
    # A name on the author's own disk would say nothing to others.
    shared = isinstance(base, str) and "/" in base and is_repo_id(base) and not Path(base).exists()
    if shared:
        head.append(f"base_model: {base}")
    head += _tag_lines(tags)
    what = f"An adapter ({kind})" if isinstance(kind, str) and _is_plain(kind) else "An adapter"
    auto = _ADAPTER_TASKS.get(str(config.get("task_type")), "AutoModel")
    code = (
        [f"from pretrained import {auto}", "", f'model = {auto}.from_pretrained("{base}")'] if shared else []
    )
    return "\n\n".join(
        [
            "\n".join([*head, "---"]),
            f"# {repo_id.rpartition('/')[2]}",
            f"{what} for `{base}`." if shared else f"{what}.",
            "## How to load",
            "\n".join(["```python", *code, f'model.load_adapter("{repo_id}")', "```"]),
            _END,
        ]
    )


def _tag_lines(tags: Iterable[str]) -> list[str]:
    lines = [f"- {_yaml_text(tag)}" for tag in dict.fromkeys(tags)]
    return ["tags:", *lines] if lines else []


def _checkpoint(folder: Path, variant: str | None) -> Checkpoint | None:
    try:
        return open_checkpoint(find_weights(folder, variant=variant))
    except (PretrainedError, OSError):
        return None  # a config or tokenizer alone, or a format that only others read


def _task(model_type: object, architecture: object) -> str | None:
    """The task that an architecture's class stands for, if this library knows it."""
    row = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        return None
    tasks = row.models["torch"].tasks
    found = [task for task, name in tasks.items() if name == architecture]
    return next((task for task in found if task not in _VAGUE), found[0] if found else None)


def _table(config: Mapping[str, Any], architecture: object, checkpoint: Checkpoint | None) -> str:
    rows: dict[str, str] = {}
    if isinstance(architecture, str) and _is_plain(architecture):
        rows["architecture"] = f"{architecture} (`{config.get('model_type')}`)"
    if checkpoint is not None:
        if "quantization_config" not in config:
            count = sum(info.num_elements for info in checkpoint.tensors.values())
            rows["parameters"] = f"{count:,}"
        dtypes = list(dict.fromkeys(info.dtype for info in checkpoint.tensors.values()))
        stored = ", ".join(sorted(dtypes))
        rows["stored as"] = f"{stored}; {checkpoint.format}, {format_bytes(checkpoint.nbytes)}"
    for label, names in _FACTS.items():
        value = next((config[name] for name in names if isinstance(config.get(name), int)), None)
        if value is not None:
            rows[label] = f"{value:,}"
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows.items())])


def _how_to_load(repo_id: str, names: set[str], task: str | None, variant: str | None) -> list[str]:
    has_tokenizer = not names.isdisjoint(_TOKENIZER_FILES)
    classes = ([AUTO_CLASSES[task]] if task else []) + (["AutoTokenizer"] if has_tokenizer else [])
    if not classes:
        return []
    lines = [f"from pretrained import {', '.join(sorted(classes))}", ""]
    if has_tokenizer:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
    if task:
        more = f', variant="{variant}"' if variant else ""
        lines.append(f'model = {AUTO_CLASSES[task]}.from_pretrained("{repo_id}"{more})')
    return ["## How to load", "\n".join(["```python", *lines, "```"])]


def _is_plain(text: str) -> bool:
    return text.replace("-", "_").replace(".", "_").isidentifier()


def _yaml_text(text: str) -> str:
    return text if _is_plain(text) and text.lower() not in _YAML_WORDS else f'"{_escaped(text)}"'


_YAML_WORDS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
