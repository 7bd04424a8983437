# SPDX-License-Identifier: Apache-2.0
"""From GGUF to the Hub: which config a GGUF file's metadata means, and which weight each tensor is.

llama.cpp's converter (convert_hf_to_gguf.py in https://github.com/ggml-org/llama.cpp) renames tensors,
reorders the rows of Llama's query and key projections, transposes GPT-2's matrices and folds Llama 3's
rotary scaling into a tensor of factors. The tables here are the way back, as data; everything after
them sees a config.json and a state dict like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from pretrained.arch.gguf_rope import rope_fields
from pretrained.arch.gguf_values import Values
from pretrained.core.checkpoint import TensorInfo
from pretrained.core.plan import MappedTensor
from pretrained.errors import ArgumentError, ConfigError, did_you_mean

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class RowUnpermute:
    """Puts the rows of a query or key projection back into the Hub's order.

    GGML rotates neighbouring channels (2i, 2i + 1); the Hub's Llama rotates i with i + head_dim / 2. The
    converter therefore interleaves the two halves of each head's rows; this takes them apart.

    Attributes:
        num_heads: Heads among the rows: all of them for queries, key-value heads for keys.
    """

    num_heads: int

    def __call__(self, array: Array) -> Array:
        """Return the reordered array.

        Args:
            array: ``(num_heads * head_dim, ...)``: a weight, a bias, or a quantized weight's raw rows.
        """
        rows = array.shape[0]
        if rows % (2 * self.num_heads):
            raise ArgumentError(
                "The rows do not divide into heads of even size",
                where="array",
                expected=f"a multiple of {2 * self.num_heads} rows",
                found=rows,
            )
        pairs = array.reshape(self.num_heads, rows // self.num_heads // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


@dataclass(frozen=True, slots=True)
class Transpose:
    """Swaps a matrix's axes: GPT-2's Hub weights are ``(in, out)``, GGUF's are ``(out, in)``."""

    def __call__(self, array: Array) -> Array:
        """Return the transposed matrix, a view.

        Args:
            array: ``(out, in)``.
        """
        return array.T


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How one ``general.architecture`` reads.

    Attributes:
        config: Metadata and tensors -> config.json.
        names: Tensor name without ``.weight``/``.bias`` -> Hub name; ``{i}`` is the layer.
        permuted: Tensor name -> config field with its heads, for projections whose rows are reordered.
        transposed: Tensor names whose weights (not biases) are transposed.
    """

    config: Callable[[Values, str], dict[str, Any]]
    names: Mapping[str, str]
    permuted: Mapping[str, str]
    transposed: tuple[str, ...] = ()


def gguf_config(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the config.json that a GGUF file stands for, with the Hub's field names.

    What the metadata does not say is read off the tensors: the vocabulary's size, biases, a gated
    feed-forward, an output head of its own (``tie_word_embeddings`` is false exactly then).

    Args:
        metadata: The file's key-value section.
        tensors: Its tensors; ``rope_freqs.weight``, where there is one, is read from the file.

    Raises:
        ConfigError: the architecture is not one of `ARCHITECTURES`, a key is missing or of a wrong
            type, or the file describes something that the architecture does not do.
    """
    arch = gguf_architecture(metadata)
    return ARCHITECTURES[arch].config(Values(metadata, tensors, arch), arch)


def gguf_architecture(metadata: Mapping[str, Any]) -> str:
    """Return ``general.architecture`` if it is one of `ARCHITECTURES`.

    Raises:
        ConfigError: it is absent, or another one.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise ConfigError(
            "GGUF files of this architecture cannot be loaded",
            where="general.architecture",
            expected="one of " + ", ".join(ARCHITECTURES),
            found="nothing" if arch is None else repr(arch),
            mend=did_you_mean(arch, ARCHITECTURES) or None if isinstance(arch, str) else None,
        )
    return arch


def gguf_key_map(
    arch: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, MappedTensor]:
    """Return what each tensor of a GGUF file is on the Hub.

    Args:
        arch: ``general.architecture``.
        config: From `gguf_config`.
        tensors: The file's tensors.

    Returns:
        Tensor name -> Hub key, with the change of layout, if any, to apply to the dequantized array and
        the shape it leaves. Tensors that nobody needs are left out (`gguf_dropped` says why); a tensor
        that this table does not know keeps its own name, so that a load reports it as unexpected.

    Raises:
        ConfigError: the architecture is not one of `ARCHITECTURES`.
    """
    facts = ARCHITECTURES[gguf_architecture({"general.architecture": arch})]
    dropped = gguf_dropped(tensors)
    return {name: _mapped(info, facts, config) for name, info in tensors.items() if name not in dropped}


def gguf_dropped(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the tensors that a load leaves out on purpose -> why.

    Args:
        tensors: The file's tensors.
    """
    return {name: why for name in tensors for pattern, why in _DROPPED if pattern.fullmatch(name)}


def _mapped(info: TensorInfo, facts: _Architecture, config: Mapping[str, Any]) -> MappedTensor:
    stem, _, kind = info.key.rpartition(".")
    layer = _LAYER.search(stem)
    template = stem if layer is None else stem.replace(layer[0], ".{i}.", 1)
    name = facts.names.get(template)
    if kind not in {"weight", "bias"} or name is None:
        return MappedTensor(info.key)
    if template in {"enc.blk.{i}.ffn_up", "dec.blk.{i}.ffn_up"}:
        name += "_1" if str(config.get("feed_forward_proj", "")).startswith("gated") else ""
    key = f"{name}.{kind}".replace("{i}", "" if layer is None else layer[1])
    if template in facts.permuted:
        return MappedTensor(key, RowUnpermute(int(config[facts.permuted[template]])))
    if template in facts.transposed and kind == "weight":
        return MappedTensor(key, Transpose(), info.shape[::-1])
    return MappedTensor(key)


_LAYER = re.compile(r"\.(\d+)\.")
_DROPPED = (
    (re.compile(r"rope_freqs\.weight"), "the config's rope_scaling says the same"),
    (re.compile(r"blk\.\d+\.attn_rot_embd\.weight"), "derived from the config"),
    (
        re.compile(r"dec\.blk\.\d+\.cross_attn_rel_b\.weight"),
        "T5's cross-attention has no relative positions",
    ),
)


# -- Llama, Mistral, Qwen2, Qwen3, SmolLM3 --------------------------------------------------------

_DECODER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_INTERLEAVED = {"blk.{i}.attn_q": "num_attention_heads", "blk.{i}.attn_k": "num_key_value_heads"}
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}


def _decoder_config(values: Values, arch: str) -> dict[str, Any]:
    if values.integer("expert_count", default=0, least=0):
        raise ConfigError(
            "GGUF files of mixture-of-experts models cannot be loaded",
            where=f"{arch}.expert_count",
            expected="no experts",
            found=values.integer("expert_count"),
            mend="Take a dense model.",
        )
    heads = values.integer("attention.head_count")
    hidden = values.integer("embedding_length")
    # Only Llama's converter writes the rotary size, which is the whole head there.
    head_dim = values.integer("attention.key_length", default=0) or (
        values.integer("rope.dimension_count", default=0) or hidden // heads
    )
    model_type = "mistral" if arch == "llama" and _is_mistral(values) else arch
    context = values.integer("context_length")
    window = values.integer("attention.sliding_window", default=0, least=0) or None
    config = {
        "architectures": [f"{_CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": values.vocab_size(),
        "hidden_size": hidden,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.layers("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        **rope_fields(values, head_dim=head_dim, context=context),
        "tie_word_embeddings": not values.has_tensor("output.weight"),
        **values.token_ids(),
    }
    if model_type in {"llama", "qwen3", "smollm3"}:
        config["attention_bias"] = values.has_tensor("blk.0.attn_q.bias")
    if model_type in {"llama", "smollm3"}:
        config["mlp_bias"] = values.has_tensor("blk.0.ffn_up.bias")
    if model_type == "mistral":
        config["sliding_window"] = window
    if model_type in {"qwen2", "qwen3", "smollm3"}:
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
    if model_type == "smollm3":
        # Fixed in llama.cpp: every fourth layer does without rotary positions.
        config["no_rope_layer_interval"] = 4
    return config


def _is_mistral(values: Values) -> bool:
    """Whether a file of architecture "llama" is a Mistral: it slides, or its name says so."""
    names = (values.text("general.basename"), values.text("general.name"))
    return bool(values.integer("attention.sliding_window", default=0, least=0)) or any(
        name.lower().startswith("mistral") for name in names
    )


# -- GPT-2 ----------------------------------------------------------------------------------------

_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "blk.{i}.attn_qkv": "transformer.h.{i}.attn.c_attn",
    "blk.{i}.attn_output": "transformer.h.{i}.attn.c_proj",
    "blk.{i}.ffn_norm": "transformer.h.{i}.ln_2",
    "blk.{i}.ffn_up": "transformer.h.{i}.mlp.c_fc",
    "blk.{i}.ffn_down": "transformer.h.{i}.mlp.c_proj",
}
_GPT2_TRANSPOSED = ("blk.{i}.attn_qkv", "blk.{i}.attn_output", "blk.{i}.ffn_up", "blk.{i}.ffn_down")


def _gpt2_config(values: Values, _: str) -> dict[str, Any]:
    hidden = values.integer("embedding_length")
    inner = values.integer("feed_forward_length", default=4 * hidden)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": values.vocab_size(),
        "n_positions": values.integer("context_length"),
        "n_ctx": values.integer("context_length"),
        "n_embd": hidden,
        "n_layer": values.layers("block_count"),
        "n_head": values.integer("attention.head_count"),
        "n_inner": None if inner == 4 * hidden else inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": values.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": not values.has_tensor("output.weight"),
        **values.token_ids(),
    }


# -- T5, mT5, UMT5 and their encoders -------------------------------------------------------------


def _t5_names() -> dict[str, str]:
    names = {
        "token_embd": "shared",
        "output": "lm_head",
        "enc.output_norm": "encoder.final_layer_norm",
        "dec.output_norm": "decoder.final_layer_norm",
    }
    for short, stack in (("enc", "encoder"), ("dec", "decoder")):
        parts = [("attn", "SelfAttention"), ("cross_attn", "EncDecAttention")][: 1 if short == "enc" else 2]
        block = f"{stack}.block.{{i}}.layer"
        for index, (part, module) in enumerate(parts):
            names[f"{short}.blk.{{i}}.{part}_norm"] = f"{block}.{index}.layer_norm"
            for letter in "qkvo":
                names[f"{short}.blk.{{i}}.{part}_{letter}"] = f"{block}.{index}.{module}.{letter}"
        names[f"{short}.blk.{{i}}.attn_rel_b"] = f"{block}.0.SelfAttention.relative_attention_bias"
        last = f"{block}.{len(parts)}"
        names[f"{short}.blk.{{i}}.ffn_norm"] = f"{last}.layer_norm"
        names[f"{short}.blk.{{i}}.ffn_gate"] = f"{last}.DenseReluDense.wi_0"
        # "wi", or "wi_1" beside a gate: the config says which.
        names[f"{short}.blk.{{i}}.ffn_up"] = f"{last}.DenseReluDense.wi"
        names[f"{short}.blk.{{i}}.ffn_down"] = f"{last}.DenseReluDense.wo"
    return names


def _t5_config(values: Values, arch: str) -> dict[str, Any]:
    layers = values.layers("block_count")
    # Only UMT5 has relative positions of its own in every layer.
    model_type = "umt5" if values.has_tensor("enc.blk.1.attn_rel_b.weight") else "t5"
    prefix = "UMT5" if model_type == "umt5" else "T5"
    encoder_only = arch == "t5encoder"
    ids = values.token_ids()
    if ids["bos_token_id"] is None:
        del ids["bos_token_id"]  # T5 has none, and no field for it
    start = values.integer("decoder_start_token_id", default=0, least=0)
    return {
        "architectures": [f"{prefix}EncoderModel" if encoder_only else f"{prefix}ForConditionalGeneration"],
        "model_type": model_type,
        "is_encoder_decoder": True,
        "vocab_size": values.vocab_size(),
        "d_model": values.integer("embedding_length"),
        "d_kv": values.integer("attention.key_length"),
        "d_ff": values.integer("feed_forward_length"),
        "num_layers": layers,
        "num_decoder_layers": values.layers("decoder_block_count", default=layers),
        "num_heads": values.integer("attention.head_count"),
        "n_positions": values.integer("context_length"),
        "relative_attention_num_buckets": values.integer("attention.relative_buckets_count"),
        "relative_attention_max_distance": 128,  # fixed in llama.cpp
        "layer_norm_epsilon": values.number("attention.layer_norm_rms_epsilon"),
        "feed_forward_proj": "gated-gelu" if values.has_tensor("enc.blk.0.ffn_gate.weight") else "relu",
        "tie_word_embeddings": not values.has_tensor("output.weight"),
        **ids,
        "decoder_start_token_id": start,
    }


_T5 = _Architecture(_t5_config, _t5_names(), {})
ARCHITECTURES: dict[str, _Architecture] = {
    "llama": _Architecture(_decoder_config, _DECODER_NAMES, _INTERLEAVED),
    "qwen2": _Architecture(_decoder_config, _DECODER_NAMES, {}),
    "qwen3": _Architecture(_decoder_config, _DECODER_NAMES, {}),
    "smollm3": _Architecture(_decoder_config, _DECODER_NAMES, _INTERLEAVED),
    "gpt2": _Architecture(_gpt2_config, _GPT2_NAMES, {}, _GPT2_TRANSPOSED),
    "t5": _T5,
    "t5encoder": _T5,
}
