# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints as other libraries quantize them, with slow readers of their own in numpy."""

import json
import math

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

SCALES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def weights(bits=8, kind="int", strategy="channel", symmetric=True, **values):
    """Return the settings of weights as compressed-tensors writes them."""
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **values,
    }


def compressed(scheme, form, *, ignore=("lm_head",), targets=("Linear",), inputs=None, **values):
    """Return ``quantization_config`` as compressed-tensors writes it."""
    group = {
        "targets": list(targets),
        "weights": scheme,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": 1.5,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.0",
        **values,
    }


def fp8(block=(128, 128), **values):
    """Return ``quantization_config`` as DeepSeek's checkpoints have it."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": None if block is None else list(block),
        **values,
    }


def blocks_of(scheme, shape):
    """Return the (rows, columns) that share a scale."""
    return {
        "tensor": shape,
        "channel": (1, shape[1]),
        "group": (1, scheme["group_size"]),
        "block": tuple(scheme["block_structure"] or ()),
    }[scheme["strategy"]]


def cells(shape, block, order=None):
    """Return, for every number of a matrix, the row and column of its scale."""
    rows, columns = np.indices(shape)
    return rows // block[0], columns // block[1] if order is None else order[columns]


def pack(numbers, bits):
    """Pack rows of signed integers into int32 words, the first in the lowest bits."""
    words = math.ceil(numbers.shape[1] * bits / 32)
    rows = []
    for row in numbers:
        whole = sum((int(number) + (1 << (bits - 1))) << (bits * at) for at, number in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(4 * words, "little"), np.int32))
    return np.stack(rows)


def tensor(values):
    """Return a torch tensor of numpy values, those of ml_dtypes too."""
    values = np.ascontiguousarray(values)
    names = {
        np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
        np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
    }
    if values.dtype in names:
        raw = {1: np.uint8, 2: np.int16}[values.dtype.itemsize]
        return torch.from_numpy(values.view(raw).copy()).view(names[values.dtype])
    return torch.from_numpy(values.copy())


def quantized(weight, scheme, form, *, scale_dtype="bfloat16", scale_name="weight_scale", flat=False, seed=0):
    """Quantize a matrix the slow way.

    Returns:
        The tensors by name, and the matrix that they stand for, float32.
    """
    random = np.random.default_rng(seed)
    weight = weight.astype(np.float32)
    shape, bits = weight.shape, scheme["num_bits"]
    block = blocks_of(scheme, shape)
    grid = (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    order = None
    if scheme["actorder"] == "group":
        order = random.permutation(np.repeat(np.arange(grid[1]), block[1])).astype(np.int32)
    largest = 448 if scheme["type"] == "float" else (1 << (bits - 1)) - 1
    at = cells(shape, block, order)
    low, high = np.zeros(grid, np.float32), np.zeros(grid, np.float32)
    np.minimum.at(low, at, weight)
    np.maximum.at(high, at, weight)
    zero = np.zeros(grid, np.int8)
    if scheme["symmetric"]:
        scale = np.maximum(high, -low) / largest
    else:
        scale = (high - low) / (2 * largest + 1)
        zero = np.clip(np.round(-low / scale) - largest - 1, -largest - 1, largest).astype(np.int8)
    scale = np.maximum(scale, 1e-6).astype(SCALES[scale_dtype])
    scales, zeros = scale[at].astype(np.float32), zero[at].astype(np.float32)
    tensors = {scale_name: scale[:, 0] if flat and grid[1] == 1 else scale}
    if scheme["strategy"] == "tensor":
        tensors[scale_name] = scale.reshape(()) if flat else scale.reshape(1)
    if scheme["type"] == "float":
        numbers = (weight / scales).astype(ml_dtypes.float8_e4m3fn)
        tensors["weight"] = numbers
    else:
        numbers = np.clip(np.round(weight / scales + zeros), -largest - 1, largest).astype(np.int8)
        if form == "pack-quantized":
            tensors["weight_packed"] = pack(numbers, bits)
            tensors["weight_shape"] = np.array(shape, np.int64)
        else:
            tensors["weight"] = numbers
        if not scheme["symmetric"]:
            packed = form == "pack-quantized" and not flat
            tensors["weight_zero_point"] = (
                pack(zero.T, bits).T if packed else zero.reshape(tensors[scale_name].shape)
            )
    if order is not None:
        tensors["weight_g_idx"] = order
    values = (numbers.astype(np.float32) - zeros) * scales
    return {name: tensor(value) for name, value in tensors.items()}, values


def rewrite(folder, config, scheme, form, *, skip=("lm_head", "embed", "norm"), extra=None, **how):
    """Quantize the matrices of a saved model.

    Args:
        folder: A saved model, changed in place.
        config: Its new ``quantization_config``.
        scheme: Settings of the weights.
        form: How they are stored.
        skip: Parts of the names of matrices that stay.
        extra: Tensors to add beside each weight.
        **how: For `quantized`.

    Returns:
        Module path -> the matrix that its tensors stand for.
    """
    file = folder / "model.safetensors"
    state, values = {}, {}
    for seed, (key, value) in enumerate(sorted(load_file(file).items())):
        path = key.removesuffix(".weight")
        if value.ndim != 2 or not key.endswith(".weight") or any(part in key for part in skip):
            state[key] = value
            continue
        tensors, values[path] = quantized(value.float().numpy(), scheme, form, seed=seed, **how)
        state |= {f"{path}.{name}": part for name, part in {**tensors, **(extra or {})}.items()}
    state = {key: value.clone() for key, value in state.items()}
    save_file(state, file, {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": config}))
    return values
