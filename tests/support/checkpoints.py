# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints on disk, whole or broken in one way."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pretrained.arch.llama import LlamaConfig
from pretrained.torch.models.llama import LlamaForCausalLM

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny_llama(cls=LlamaForCausalLM, seed=0, **values):
    """Return a model of a few kilobytes with seeded random weights, norms included."""
    torch.manual_seed(seed)
    model = cls(LlamaConfig(**{**TINY, **values})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


class Folder:
    """A saved model that can be broken: a config and the tensors of model.safetensors."""

    def __init__(self, path: Path, model=None):
        self.path = path
        (model or tiny_llama()).save_pretrained(path)

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def config(self, *drop, **values):
        """Change keys of config.json, and leave some out."""
        file = self.path / "config.json"
        content = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))
        return self

    def tensors(self, *drop, metadata=None, **values):
        """Change tensors (dots written as two underscores), and leave some out."""
        content = load_file(self.weights)
        content |= {key.replace("__", "."): value for key, value in values.items()}
        content = {key: value.clone().contiguous() for key, value in content.items() if key not in drop}
        save_file(content, self.weights, metadata or {"format": "pt"})
        return self

    def rename(self, change):
        """Give every tensor the name that a function makes of its own."""
        save_file({change(k): v for k, v in load_file(self.weights).items()}, self.weights, {"format": "pt"})
        return self

    def header(self, change):
        """Let a function change the header of the safetensors file, the data staying as they are."""
        raw = self.weights.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        return self

    def pickle(self, content=None, **options):
        """Replace model.safetensors by pytorch_model.bin with some content, by default the same."""
        content = load_file(self.weights) if content is None else content
        self.weights.unlink()
        file = self.path / "pytorch_model.bin"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file, **options)
        return self

    def shards(self, change=None):
        """Replace model.safetensors by two shards and an index; `change` may spoil its weight_map."""
        content = load_file(self.weights)
        self.weights.unlink()
        keys = sorted(content)
        halves = {"a.safetensors": keys[:7], "b.safetensors": keys[7:]}
        for name, part in halves.items():
            save_file({key: content[key] for key in part}, self.path / name, {"format": "pt"})
        weight_map = {key: name for name, part in halves.items() for key in part}
        if change is not None:
            change(weight_map)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))
        return self
