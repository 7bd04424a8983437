# SPDX-License-Identifier: Apache-2.0
"""Slow packers of other libraries' layouts, one number at a time.

They are written from the tables in `core/gptq.py` and `core/awq.py`, and share no code with the readers.
`foreign_checkpoint` makes small checkpoints with known weights.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


def words_of(numbers, bits):
    """Pack a row of integers, the first one lowest, into 32-bit words."""
    whole = 0
    for place, number in enumerate(numbers):
        whole |= int(number) << (bits * place)
    count = len(numbers) * bits // 32
    return np.array([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)], np.uint32).view(np.int32)


def gptq_parts(integers, zeros, scales, bits, group_of, *, less_one=True):
    """Return the four tensors of a weight; `integers` [out, in], `zeros` and `scales` [out, groups]."""
    stored = (zeros - 1) % 2**bits if less_one else zeros
    return {
        "qweight": np.stack([words_of(row, bits) for row in integers], axis=1),
        "qzeros": np.stack([words_of(column, bits) for column in stored.T]),
        "scales": scales.T.copy(),
        "g_idx": group_of.astype(np.int32),
    }


def awq_parts(integers, zeros, scales):
    """Return the three tensors of a weight; as `gptq_parts`."""

    def packed(matrix):  # [out, n] -> [n, out / 8]
        result = np.zeros((matrix.shape[1], matrix.shape[0] // 8), np.uint32)
        for row in range(result.shape[0]):
            for word in range(result.shape[1]):
                for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    result[row, word] |= np.uint32(int(matrix[8 * word + output, row]) << (4 * nibble))
        return result.view(np.int32)

    return {"qweight": packed(integers), "qzeros": packed(zeros), "scales": scales.T.copy()}


def by_the_formula(integers, zeros, scales, group_of):
    """Return (q - z) * s as float32 [out, in], one number at a time."""
    out = np.empty(integers.shape, np.float32)
    for row, column in np.ndindex(*integers.shape):
        group = group_of[column]
        number = int(integers[row, column]) - int(zeros[row, group])
        out[row, column] = np.float32(number) * np.float32(scales[row, group])
    return out


def chance_weight(rng, shape, bits, group, *, symmetric=False, order=None, scale_dtype=np.float16):
    """Return integers, zeros, scales and the group of each input, at random.

    `order` is None, "even" (groups of equal size, mixed up) or "uneven".
    """
    out, inputs = shape
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    integers = rng.integers(0, 2**bits, shape)
    zeros = np.full((out, groups), 2 ** (bits - 1))
    if not symmetric:
        # With the two ends, where storing one less wraps around.
        zeros = rng.integers(0, 2**bits, (out, groups))
        zeros[0], zeros[-1] = 0, 2**bits - 1
    scales = (rng.uniform(0.5, 1.5, (out, groups)) / 2**bits / inputs**0.5).astype(scale_dtype)
    group_of = np.arange(inputs) // size
    if order == "even":
        group_of = rng.permutation(group_of)
    elif order == "uneven":
        group_of[0] = groups - 1
    return integers, zeros, scales, group_of


def foreign_checkpoint(model, folder, pack, settings, *, picks=None, head=False, seed=0, **weights):
    """Write a model whose dense layers are quantized; return the plain weights that it stands for, by path.

    `pack(path, parts of chance_weight)` returns the tensors by name.
    """
    rng = np.random.default_rng(seed)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    skip = set() if head else {model.get_output_embeddings()}
    known = {}
    body = {id(module) for module in model.base_model.modules()}
    for path, module in model.named_modules():
        wanted = picks(path) if picks else True
        if not isinstance(module, nn.Linear) or module in skip or not wanted:
            continue
        if id(module) not in body and not head:
            continue
        chance = chance_weight(rng, tuple(module.weight.shape), **weights)
        known[path] = torch.from_numpy(by_the_formula(*chance))
        del state[f"{path}.weight"]
        for name, array in pack(path, chance).items():
            state[f"{path}.{name}"] = torch.from_numpy(array)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return known
