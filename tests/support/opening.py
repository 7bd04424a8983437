# SPDX-License-Identifier: Apache-2.0
"""The ways in which hostile and mutated model folders are opened, as users open good ones."""

import logging
from pathlib import Path

MESSAGES = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "a b c"}]
TEXTS = ["hello world", "a b c hello " * 5, "", "\x00\ud7ff é 中 \U0001f600"]


def open_weights(folder: Path) -> None:
    """Read the headers of a folder's weights and the values of the first tensors."""
    from pretrained.core.files import find_weights, open_checkpoint

    ggufs = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    checkpoint = open_checkpoint(find_weights(folder, gguf_file=ggufs[0] if ggufs else None))
    read_some(checkpoint)


def read_some(checkpoint) -> None:
    """Read the first tensors of a checkpoint as loading does."""
    import numpy as np

    from pretrained.core.dtypes import DTYPES
    from pretrained.core.gguf import load_tensor
    from pretrained.core.reader import MappedFiles

    with MappedFiles(checkpoint.states) as files:
        for info in list(checkpoint.tensors.values())[:4]:
            if info.dtype in DTYPES:
                # What a cast reads: every element, at the size that the shape claims.
                np.ascontiguousarray(files.array(info)).tobytes()
            else:
                load_tensor(info)


def open_model(folder: Path) -> None:
    """Load the model and the generation config beside it."""
    from pretrained import AutoModelForCausalLM

    ggufs = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    gguf = {"gguf_file": ggufs[0]} if ggufs else {}
    AutoModelForCausalLM.from_pretrained(folder, **gguf)


def open_cast(folder: Path) -> None:
    """Load the model in another dtype than its files', so that every weight is copied."""
    import torch

    from pretrained import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def open_config(folder: Path) -> None:
    """Read config.json and write it again."""
    from pretrained import AutoConfig

    AutoConfig.from_pretrained(folder).to_json_string()


def open_generation(folder: Path) -> None:
    """Read generation_config.json and write it again."""
    from pretrained import GenerationConfig

    GenerationConfig.from_pretrained(folder).to_json_string()


def open_tokenizer(folder: Path) -> None:
    """Read the tokenizer, encode and decode a little."""
    from pretrained import AutoTokenizer

    ggufs = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": ggufs[0]} if ggufs else {}))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        tokenizer.decode(ids[:50])
    len(tokenizer)


def open_chat(folder: Path) -> None:
    """Render a conversation with the folder's chat template."""
    from pretrained import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)


ACTIONS = {
    "weights": open_weights,
    "model": open_model,
    "cast": open_cast,
    "config": open_config,
    "generation": open_generation,
    "tokenizer": open_tokenizer,
    "chat": open_chat,
}


def warm_up() -> None:
    """Import what the actions import, so that forks do not."""
    import tempfile

    from support.hostile import write_base

    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder))
        for name, action in ACTIONS.items():
            if name not in ("crash",):
                action(Path(folder))
