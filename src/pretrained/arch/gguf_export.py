# SPDX-License-Identifier: Apache-2.0
"""From the Hub to GGUF: the metadata that a config means, and what each weight is called and laid out as.

The way back of `pretrained.arch.gguf`, for the Llama family. What GGUF cannot say is refused: a file that
runs and computes something else is worse than none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pretrained.arch.gguf import ARCHITECTURES
from pretrained.arch.rope import rope_table
from pretrained.core.gguf_writer import GgufValue
from pretrained.errors import ConfigError, NotYetError

Array = npt.NDArray[Any]

NAMES: Final = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
"""model_type -> ``general.architecture``."""

FACTORS: Final = "rope_freqs.weight"
_LAYER: Final = re.compile(r"\.(\d+)\.")
# general.file_type: enum llama_ftype in llama.cpp's include/llama.h.
_FILE_TYPES: Final = {"float32": 0, "float16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "bfloat16": 32}


@dataclass(frozen=True, slots=True)
class RowPermute:
    """Puts the rows of a query or key projection into GGML's order; see `pretrained.arch.gguf.RowUnpermute`.

    Attributes:
        num_heads: Heads among the rows.
    """

    num_heads: int

    def __call__(self, array: Array) -> Array:
        """Return the reordered array.

        Args:
            array: ``(num_heads * head_dim, ...)``.
        """
        halves = array.reshape(self.num_heads, 2, array.shape[0] // self.num_heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)


def gguf_name(key: str, config: Any) -> tuple[str, RowPermute | None]:
    """Return what a weight is called in a GGUF file, and how its rows are reordered.

    Args:
        key: Its name on the Hub, of a causal language model.
        config: The model's config.

    Raises:
        NotYetError: GGUF has no name for it.
    """
    facts = ARCHITECTURES[NAMES[config.model_type]]
    stem, _, kind = key.rpartition(".")
    layer = _LAYER.search(stem + ".")
    template = stem if layer is None else stem.replace(layer[0].rstrip("."), ".{i}", 1)
    name = next((name for name, hub in facts.names.items() if hub == template), None)
    if name is None or kind not in ("weight", "bias"):
        raise NotYetError("GGUF has no name for a weight of this model", where=key)
    apply = None
    if name in facts.permuted:
        apply = RowPermute(int(getattr(config, facts.permuted[name])))
    return f"{name}.{kind}".replace("{i}", "" if layer is None else layer[1]), apply


def check_expressible(config: Any, architecture: str) -> None:
    """Raise where a GGUF file would mean another model than a config does.

    Args:
        config: A typed config.
        architecture: The class it names.

    Raises:
        NotYetError: the family, class or a setting cannot be written.
    """
    if config.model_type not in NAMES:
        raise NotYetError(
            "Models of this family cannot be converted to GGUF yet",
            where=config.model_type,
            expected=f"one of {', '.join(NAMES)}",
            mend="Use llama.cpp's convert_hf_to_gguf.py.",
        )
    faults: list[tuple[str, object]] = []
    if not architecture.endswith(("ForCausalLM", "Model")):
        faults.append(("architectures", architecture))
    if config.hidden_act not in ("silu", "swish"):
        faults.append(("hidden_act", config.hidden_act))
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "dynamic" or (kind == "longrope" and not _is_one_set_of_factors(scaling)):
        faults.append(("rope_scaling", kind))
    odd = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if scaling.get(name) is not None]
    if kind == "yarn" and (odd or scaling.get("truncate") is False):
        faults.append(("rope_scaling", ", ".join(odd) or "truncate"))
    if config.pruned_heads:
        faults.append(("pruned_heads", config.pruned_heads))
    layers = range(config.num_hidden_layers)
    if config.model_type != "mistral" and any(config.window(layer) is not None for layer in layers):
        faults.append(("use_sliding_window", True))
    turning = [(layer + 1) % 4 != 0 if config.model_type == "smollm3" else True for layer in layers]
    if [config.rotates(layer) for layer in layers] != turning:
        faults.append(("no_rope_layers", "not every fourth layer"))
    if faults:
        name, value = faults[0]
        raise NotYetError(
            "A GGUF file cannot say this of a model, or not in a way that is written yet",
            where=name,
            found=value,
            mend="Convert to safetensors instead.",
        )


def _is_one_set_of_factors(scaling: dict[str, Any]) -> bool:
    """Tell whether LongRoPE divides frequencies alike at every length, and does nothing else."""
    return scaling["short_factor"] == scaling["long_factor"] and scaling.get("attention_factor") == 1.0


def gguf_metadata(config: Any, *, name: str, file_type: str) -> dict[str, GgufValue]:
    """Return the metadata of a model, its tokenizer's left out.

    Args:
        config: A typed config that `check_expressible` has passed.
        name: What to call the model.
        file_type: The type that most weights have.
    """
    arch = NAMES[config.model_type]
    found = {
        "general.architecture": GgufValue("str", arch),
        "general.type": GgufValue("str", "model"),
        "general.name": GgufValue("str", name),
        "general.file_type": GgufValue("u32", _FILE_TYPES[file_type]),
    }
    if config.model_type == "mistral":
        found["general.basename"] = GgufValue("str", "Mistral")
    if file_type.startswith("q"):
        found["general.quantization_version"] = GgufValue("u32", 2)
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "rope.dimension_count": config.head_size,
    }
    if config.model_type == "mistral" and config.sliding_window is not None:
        numbers["attention.sliding_window"] = config.sliding_window
    found |= {f"{arch}.{key}": GgufValue("u32", value) for key, value in numbers.items()}
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta}
    found |= {f"{arch}.{key}": GgufValue("f32", value) for key, value in floats.items()}
    return found | _scaling(config, arch)


def _scaling(config: Any, arch: str) -> dict[str, GgufValue]:
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind not in ("linear", "yarn"):
        return {}
    found = {
        "type": GgufValue("str", kind),
        "factor": GgufValue("f32", scaling["factor"]),
    }
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        found["original_context_length"] = GgufValue("u32", original)
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name) is not None:
                found[f"yarn_{name}"] = GgufValue("f32", scaling[name])
    return {f"{arch}.rope.scaling.{name}": value for name, value in found.items()}


def rope_factors(config: Any) -> npt.NDArray[np.float32] | None:
    """Return what `FACTORS` holds: by how much each frequency is divided; None where nothing is.

    Args:
        config: A typed config. Llama 3.1's scaling is said this way, and any fixed set of factors.
    """
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "longrope":
        return np.asarray(scaling["short_factor"], np.float32)
    if scaling.get("rope_type") != "llama3":
        return None
    plain = rope_table(
        {"rope_theta": config.rope_theta},
        head_size=config.head_size,
        max_position_embeddings=config.max_position_embeddings,
    )
    factors: npt.NDArray[np.float32] = plain.inv_freq / config.rope_table().inv_freq
    return factors


def token_ids(config: Any) -> dict[str, GgufValue]:
    """Return the metadata of a config's special tokens; of several ends the first two can be said.

    Args:
        config: A typed config.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id}
    ids |= dict(zip(("eos", "eot"), ends, strict=False))
    return {
        f"tokenizer.ggml.{name}_token_id": GgufValue("u32", index)
        for name, index in ids.items()
        if isinstance(index, int) and index >= 0
    }


def check_same_model(wanted: Any, found: Any) -> None:
    """Raise where the config that a written file means is another model's.

    Args:
        wanted: The config that was converted.
        found: What the file says.

    Raises:
        ConfigError: they differ in something that changes results.
    """
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "kv_heads", "head_size", "max_position_embeddings", "rms_norm_eps", "qkv_bias", "output_bias",
        "query_key_norm",
    )  # fmt: skip
    pairs: list[tuple[str, Any, Any]] = [
        (name, getattr(wanted, name), getattr(found, name)) for name in names
    ]
    layers = range(wanted.num_hidden_layers)
    for name in ("window", "rotates"):
        one, other = ([getattr(each, name)(layer) for layer in layers] for each in (wanted, found))
        pairs.append((name, one, other))
    ours, theirs = wanted.rope_table(), found.rope_table()
    pairs.append(("rope scaling", ours.attention_scaling, theirs.attention_scaling))
    close = ours.inv_freq.shape == theirs.inv_freq.shape and np.allclose(
        ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0
    )
    pairs.append(("rope frequencies equal", True, close))
    for name, one, other in pairs:
        if one != other:
            raise ConfigError(
                "The GGUF file would mean another model than config.json",
                where=name,
                expected=one,
                found=other,
            )
