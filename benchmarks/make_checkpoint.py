# SPDX-License-Identifier: Apache-2.0
"""Make the checkpoint that the loading benchmarks read: T5 of T0-3B's shape in bfloat16, three shards.

``python benchmarks/make_checkpoint.py`` writes 5.57 GB in 557 tensors below .cache/bench; ``--layers 4``
makes a small one. Values are random from a seed, with the standard deviations that T5 starts training
with, so that activations stay finite. The head is tied to the embedding. Tensors are written one at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".cache" / "bench"
LAYERS, QUICK_LAYERS = 24, 4
SHARDS = 3
_D_MODEL, _D_FF, _D_KV, _HEADS, _VOCAB, _BUCKETS = 2048, 5120, 64, 32, 32128, 32
_INNER = _D_KV * _HEADS
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: values around `mean` with a standard deviation."""

    key: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        """Its size in bfloat16."""
        return 2 * math.prod(self.shape)


def checkpoint(layers: int = LAYERS, folder: Path = FOLDER) -> Path:
    """Return the folder of the checkpoint, made now where it is not there whole.

    Args:
        layers: Layers of the encoder, and of the decoder.
        folder: Where checkpoints are kept.

    Raises:
        SystemExit: the disk has no room for it.
    """
    made = folder / f"t5-{layers}-layers"
    shards = split(tensors(layers))
    if _is_whole(made, shards):
        return made
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    needed, free = sum(t.nbytes for shard in shards for t in shard), shutil.disk_usage(made).free
    if free < needed + (1 << 30):
        raise SystemExit(f"{made}: {needed / 1e9:.1f} GB and 1 GB to spare are needed, {free / 1e9:.1f} free")
    weight_map = {}
    for number, shard in enumerate(shards):
        _write_shard(made / _name(number), shard, seed=number)
        weight_map |= {tensor.key: _name(number) for tensor in shard}
    (made / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
    # Written last: a folder with an index and all its bytes is whole.
    (made / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return made


def config(layers: int) -> dict[str, object]:
    """Return config.json's content.

    Args:
        layers: Layers of the encoder, and of the decoder.
    """
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": _D_MODEL,
        "d_ff": _D_FF,
        "d_kv": _D_KV,
        "num_heads": _HEADS,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "vocab_size": _VOCAB,
        "relative_attention_num_buckets": _BUCKETS,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }


def tensors(layers: int) -> list[Tensor]:
    """List every tensor, in the order of the modules.

    Args:
        layers: Layers of the encoder, and of the decoder.
    """
    found = [Tensor("shared.weight", (_VOCAB, _D_MODEL), 1.0)]
    for stack, attentions in (
        ("decoder", ("SelfAttention", "EncDecAttention")),
        ("encoder", ("SelfAttention",)),
    ):
        for index in range(layers):
            block = f"{stack}.block.{index}.layer"
            for part, name in enumerate(attentions):
                found += _attention(f"{block}.{part}.{name}", has_bias=name == "SelfAttention" and index == 0)
                found.append(_norm(f"{block}.{part}.layer_norm"))
            part = len(attentions)
            found += [
                Tensor(f"{block}.{part}.DenseReluDense.{name}.weight", (_D_FF, _D_MODEL), _D_MODEL**-0.5)
                for name in ("wi_0", "wi_1")
            ]
            found.append(Tensor(f"{block}.{part}.DenseReluDense.wo.weight", (_D_MODEL, _D_FF), _D_FF**-0.5))
            found.append(_norm(f"{block}.{part}.layer_norm"))
        found.append(_norm(f"{stack}.final_layer_norm"))
    return found


def _attention(path: str, *, has_bias: bool) -> list[Tensor]:
    made = [
        Tensor(f"{path}.q.weight", (_INNER, _D_MODEL), (_D_MODEL * _D_KV) ** -0.5),
        Tensor(f"{path}.k.weight", (_INNER, _D_MODEL), _D_MODEL**-0.5),
        Tensor(f"{path}.v.weight", (_INNER, _D_MODEL), _D_MODEL**-0.5),
        Tensor(f"{path}.o.weight", (_D_MODEL, _INNER), _INNER**-0.5),
    ]
    if has_bias:
        made.append(Tensor(f"{path}.relative_attention_bias.weight", (_BUCKETS, _HEADS), _D_MODEL**-0.5))
    return made


def _norm(path: str) -> Tensor:
    return Tensor(f"{path}.weight", (_D_MODEL,), 0.0, mean=1.0)


def split(whole: list[Tensor], count: int = SHARDS) -> list[list[Tensor]]:
    """Cut a list of tensors into shards of about the same size.

    Args:
        whole: All tensors.
        count: How many shards.
    """
    total = sum(tensor.nbytes for tensor in whole)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    before = 0
    for tensor in whole:
        shards[min(count - 1, before * count // total)].append(tensor)
        before += tensor.nbytes
    return shards


def _name(number: int) -> str:
    return f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"


def _header(shard: list[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in shard:
        span = [at, at + tensor.nbytes]
        entries[tensor.key] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": span}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(file: Path, shard: list[Tensor], seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with open(file, "wb") as stream:
        stream.write(_header(shard))
        for tensor in shard:
            values = torch.empty(tensor.shape)
            if tensor.deviation:
                values.normal_(tensor.mean, tensor.deviation, generator=generator)
            else:
                values.fill_(tensor.mean)
            stream.write(memoryview(values.bfloat16().view(torch.int16).numpy()).cast("B"))


def _is_whole(made: Path, shards: list[list[Tensor]]) -> bool:
    if not (made / _INDEX).is_file() or not (made / "config.json").is_file():
        return False
    for number, shard in enumerate(shards):
        file = made / _name(number)
        size = len(_header(shard)) + sum(tensor.nbytes for tensor in shard)
        if not file.is_file() or file.stat().st_size != size:
            return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    print(checkpoint(arguments.layers))
