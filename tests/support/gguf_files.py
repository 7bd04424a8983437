# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny models, laid out as llama.cpp's converter does it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

# model_type -> what GGUF calls its architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gpt2": "gpt2",
    "t5": "t5",
    "umt5": "t5",
}


def write_gguf(model: Any, file: Path, kind: str = "Q8_0") -> Path:
    """Write a model's weights, matrices whose rows divide into blocks quantized.

    Args:
        model: One of ours, of an architecture of `ARCHITECTURES`.
        file: Where.
        kind: Name of the block type.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, arch)
    for name, value in _metadata(config).items():
        key = name if name.startswith(("tokenizer.", "general.")) else f"{arch}.{name}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, 8)
    block = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[block][0]
    for key, tensor in model.state_dict().items():
        if key in model.ties():
            continue
        stem, _, suffix = key.rpartition(".")
        value = _laid_out(key, tensor.float().numpy(), config)
        name = f"{names.get_name(stem)}.{suffix}"
        # Small tables are kept in float32 by llama.cpp too.
        is_block = value.ndim == 2 and value.shape[1] % size == 0 and "position" not in name
        if is_block:
            writer.add_tensor(name, gguf.quants.quantize(value, block), raw_dtype=block)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _laid_out(key: str, value: Any, config: Any) -> Any:
    if config.model_type in ("llama", "mistral", "smollm3") and ("q_proj" in key or "k_proj" in key):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        halves = value.reshape(heads, 2, len(value) // heads // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    elif config.model_type == "gpt2" and ".c_" in key and key.endswith("weight"):
        value = value.T
    return np.ascontiguousarray(value)


def _metadata(config: Any) -> dict[str, Any]:
    ids = {"bos": config.bos_token_id, "eos": config.eos_token_id, "padding": config.pad_token_id}
    common = {
        f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items() if isinstance(value, int)
    }
    if config.model_type in ("t5", "umt5"):
        return common | {
            "context_length": config.n_positions if config.has("n_positions") else 512,
            "embedding_length": config.d_model,
            "feed_forward_length": config.d_ff,
            "block_count": config.num_layers,
            "decoder_block_count": config.num_decoder_layers,
            "attention.head_count": config.num_heads,
            "attention.key_length": config.d_kv,
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
            "decoder_start_token_id": 0,
        }
    if config.model_type == "gpt2":
        return common | {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    more = {"general.name": "mistral-tiny"} if config.model_type == "mistral" else {}
    return (
        common
        | more
        | {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "block_count": config.num_hidden_layers,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_theta),
        }
    )
