# SPDX-License-Identifier: Apache-2.0
"""The Llama family: Llama 1 to 3.3, Mistral, Qwen2/2.5, Qwen3, SmolLM2/3.

One block (RMSNorm, rotary grouped-query attention, gated MLP) with a handful of facts that differ:
which projections have biases, whether queries and keys are normalised, which layers look through a
sliding window and which do not rotate. A config answers those as properties, so that a backend writes
the block once.
"""

from __future__ import annotations

from pretrained.arch.pruning import check_pruned_heads, heads_left
from pretrained.arch.rope import RopeConfig
from pretrained.core.keys import Drop, KeyRule
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError

# Files converted before mid-2023 carry the rotary frequencies, which are derived from the config.
KEY_RULES: tuple[KeyRule, ...] = (Drop("*.rotary_emb.inv_freq", "derived from the config"),)
NO_SPLIT = ("LlamaDecoderLayer",)
BASE_MODEL_PREFIX = "model"


class LlamaConfig(RopeConfig):
    """Configuration of a Llama-family decoder; field names are those of its config.json."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    mlp_bias: bool = False

    def derive(self) -> None:
        """Without a number of key-value heads every query head has its own; heads share the hidden size."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if (
            self.head_dim is None
            and self.num_attention_heads
            and self.hidden_size % self.num_attention_heads == 0
        ):
            self.head_dim = self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Raise `ConfigError` for head counts that do not fit together."""
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            if getattr(self, name) < (0 if name == "num_hidden_layers" else 1):
                raise ConfigError(f"{name} must be positive", where=name, found=getattr(self, name))
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "hidden_size is not a multiple of num_attention_heads and head_dim is not given",
                where="hidden_size, num_attention_heads",
                found=f"{self.hidden_size}, {self.num_attention_heads}",
                mend="Set head_dim.",
            )
        if self.kv_heads < 1 or self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                "num_attention_heads is not a multiple of num_key_value_heads",
                where="num_key_value_heads",
                found=f"{self.num_attention_heads} and {self.kv_heads}",
            )
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            # -1 is what early Llama files say for "none"; torch takes it for the last row.
            raise ConfigError(
                "The padding token is not in the vocabulary",
                where="pad_token_id",
                expected=f"below vocab_size, {self.vocab_size}, or null",
                found=self.pad_token_id,
                mend="Pass pad_token_id=None, or the id of a token that the model has.",
            )
        check_pruned_heads(self, self.group_size)
        super().check()

    # -- the facts in which the family differs ---------------------------------------------------

    @property
    def question_answering_prefix(self) -> str:
        """Name of the headless model inside the question-answering class, in published files."""
        return "transformer"

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads, each shared by a group of query heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_attention_heads // self.kv_heads

    def heads_left(self, layer: int) -> int:
        """Return how many query heads a layer has, pruned ones not counted.

        Args:
            layer: Index of the block.
        """
        return heads_left(self, layer)

    def kv_heads_left(self, layer: int) -> int:
        """Return how many key-value heads a layer has: each goes with its group of query heads.

        Args:
            layer: Index of the block.
        """
        return self.heads_left(layer) // self.group_size

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias."""
        return self.attention_bias

    @property
    def query_key_norm(self) -> bool:
        """Whether queries and keys are normalised for each head before they rotate."""
        return False

    def window(self, layer: int) -> int | None:
        """Return how many tokens back layer `layer` sees, or None for all of them.

        Args:
            layer: Index of the block.
        """
        return None

    def rotates(self, layer: int) -> bool:
        """Tell whether layer `layer` applies rotary positions.

        Args:
            layer: Index of the block.
        """
        return True


class MistralConfig(LlamaConfig):
    """Configuration of Mistral: every layer looks through one sliding window."""

    model_type = "mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096

    @property
    def question_answering_prefix(self) -> str:
        """Name of the headless model inside the question-answering class, in published files."""
        return "model"

    def window(self, layer: int) -> int | None:
        """Return the sliding window, the same for every layer.

        Args:
            layer: Index of the block.
        """
        return self.sliding_window


class _LayerTypesConfig(LlamaConfig):
    """A config whose `layer_types` may say, layer by layer, what it sees."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer that has one.

        Args:
            layer: Index of the block.
        """
        if not self.use_sliding_window or self.sliding_window is None:
            return None
        if self.layer_types is not None:
            slides = self.layer_types[layer] == "sliding_attention"
        else:
            slides = self.slides_by_default(layer)
        return self.sliding_window if slides else None

    def slides_by_default(self, layer: int) -> bool:
        """Tell whether a layer slides where the file gives no `layer_types`.

        Args:
            layer: Index of the block.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raise `ConfigError` where `layer_types` does not describe every layer."""
        super().check()
        if self.layer_types is None:
            return
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                "layer_types does not describe every layer",
                where="layer_types",
                expected=f"{self.num_hidden_layers} of full_attention or sliding_attention",
                found=f"{len(self.layer_types)} with {sorted(set(self.layer_types))}",
            )


class Qwen2Config(_LayerTypesConfig):
    """Configuration of Qwen2 and Qwen2.5: biased queries, keys and values."""

    model_type = "qwen2"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    max_window_layers: int = 28
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def qkv_bias(self) -> bool:
        """Always true in Qwen2, whatever the file says."""
        return True

    @property
    def output_bias(self) -> bool:
        """Always false in Qwen2."""
        return False

    def slides_by_default(self, layer: int) -> bool:
        """Layers from `max_window_layers` on slide.

        Args:
            layer: Index of the block.
        """
        return layer >= self.max_window_layers


class Qwen3Config(Qwen2Config):
    """Configuration of Qwen3: normalised queries and keys, head size of its own."""

    model_type = "qwen3"

    head_dim: int | None = 128

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether the attention output projection has a bias."""
        return self.attention_bias

    @property
    def query_key_norm(self) -> bool:
        """Queries and keys are normalised for each head."""
        return True


class SmolLM3Config(_LayerTypesConfig):
    """Configuration of SmolLM3: every fourth layer does without rotary positions."""

    model_type = "smollm3"
    default_rope_theta = 2000000.0

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    pad_token_id: int | None = 128004
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: int = 4

    def rotates(self, layer: int) -> bool:
        """Tell whether a layer rotates: `no_rope_layers` holds 1 where it does.

        Args:
            layer: Index of the block.
        """
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def slides_by_default(self, layer: int) -> bool:
        """Layers that do not rotate slide.

        Args:
            layer: Index of the block.
        """
        return not self.rotates(layer)

    def check(self) -> None:
        """Raise `ConfigError` where `no_rope_layers` does not describe every layer."""
        super().check()
        if self.no_rope_layer_interval < 1:
            raise ConfigError(
                "no_rope_layer_interval must be positive",
                where="no_rope_layer_interval",
                found=self.no_rope_layer_interval,
            )
        if self.no_rope_layers is not None and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ConfigError(
                "no_rope_layers does not describe every layer",
                where="no_rope_layers",
                expected=f"{self.num_hidden_layers} numbers",
                found=len(self.no_rope_layers),
            )


def skeleton(config: LlamaConfig, head: str = "Model") -> Skeleton:
    """Return every weight that a Llama-family model promises.

    Args:
        config: Its configuration.
        head: Class name without the family's name: ``"Model"``, ``"ForCausalLM"``,
            ``"ForSequenceClassification"``, ``"ForTokenClassification"``, ``"ForQuestionAnswering"``.
    """
    prefix = "" if head == "Model" else "model."
    if head == "ForQuestionAnswering":
        prefix = f"{config.question_answering_prefix}."
    build = SkeletonBuilder(prefix)
    build.weight("embed_tokens.weight", config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        _block(build, config, index)
    build.norm("norm", config.hidden_size)
    table = config.rope_table()
    build.buffer("rotary_emb.inv_freq", len(table.inv_freq))
    if table.long_inv_freq is not None:
        build.buffer("rotary_emb.long_inv_freq", len(table.inv_freq))
    build.prefix = ""
    if head == "ForCausalLM":
        build.linear("lm_head", config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            build.tie("lm_head.weight", "model.embed_tokens.weight")
    elif head == "ForSequenceClassification":
        build.linear("score", config.num_labels, config.hidden_size)
    elif head == "ForTokenClassification":
        build.linear("score", config.num_labels, config.hidden_size, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", 2, config.hidden_size, bias=True)
    return build.build()


def _block(build: SkeletonBuilder, config: LlamaConfig, index: int) -> None:
    path, hidden = f"layers.{index}", config.hidden_size
    queries, keys = (
        heads * config.head_size for heads in (config.heads_left(index), config.kv_heads_left(index))
    )
    build.block(path)
    build.linear(f"{path}.self_attn.q_proj", queries, hidden, bias=config.qkv_bias)
    build.linear(f"{path}.self_attn.k_proj", keys, hidden, bias=config.qkv_bias)
    build.linear(f"{path}.self_attn.v_proj", keys, hidden, bias=config.qkv_bias)
    build.linear(f"{path}.self_attn.o_proj", hidden, queries, bias=config.output_bias)
    if config.query_key_norm:
        build.norm(f"{path}.self_attn.q_norm", config.head_size)
        build.norm(f"{path}.self_attn.k_norm", config.head_size)
    for name in ("gate_proj", "up_proj"):
        build.linear(f"{path}.mlp.{name}", config.intermediate_size, hidden, bias=config.mlp_bias)
    build.linear(f"{path}.mlp.down_proj", hidden, config.intermediate_size, bias=config.mlp_bias)
    build.norm(f"{path}.input_layernorm", hidden)
    build.norm(f"{path}.post_attention_layernorm", hidden)
    build.block(None)
