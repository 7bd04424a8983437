# SPDX-License-Identifier: Apache-2.0
"""The T5 family: T5 v1.0, v1.1 (FLAN, T0, byT5), mT5 and UMT5.

Encoder and decoder stacks of one block (RMSNorm, attention with relative position biases and unscaled
scores, a plain or gated feed-forward network). Three facts differ, and a config answers them: whether
the feed-forward network has a gate, whether every block has position biases of its own (UMT5) or all
share the first one's, and whether the decoder's output is scaled before the language-model head.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pretrained.arch.pruning import check_pruned_heads, heads_left
from pretrained.core.config import PreTrainedConfig
from pretrained.core.keys import Drop, KeyRule
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError

# T5's first files carry a table that cross-attention never had a use for.
KEY_RULES: tuple[KeyRule, ...] = (
    Drop("*EncDecAttention.relative_attention_bias.weight", "cross-attention has no relative positions"),
)
NO_SPLIT = ("T5Block",)
# Trained in bfloat16: the products of these pass float16's range.
KEEP_IN_FP32 = ("wo",)
BASE_MODEL_PREFIX = "transformer"

_POSITIVE = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_heads",
    "relative_attention_max_distance",
)  # fmt: skip


class T5Config(PreTrainedConfig):
    """Configuration of a T5 encoder-decoder; field names are those of its config.json."""

    model_type = "t5"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    is_encoder_decoder: bool = True
    classifier_dropout: float = 0.0
    scale_decoder_outputs: bool | None = None
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = None

    def normalise(self, values: dict[str, Any]) -> dict[str, Any]:
        """Forget what follows from `feed_forward_proj` where that is set anew.

        Args:
            values: As given to the constructor, to `update` or read from a file.
        """
        if "feed_forward_proj" in values:
            values.setdefault("dense_act_fn", None)
            values.setdefault("is_gated_act", None)
        return values

    def derive(self) -> None:
        """Fill in what files leave out: a symmetric decoder, the activation, the start token, the scaling."""
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        gate, _, name = self.feed_forward_proj.rpartition("-")
        if self.is_gated_act is None:
            self.is_gated_act = gate == "gated"
        if self.dense_act_fn is None:
            # "gated-gelu" has always meant GELU's tanh approximation, which "gelu" alone does not.
            self.dense_act_fn = "gelu_new" if self.feed_forward_proj == "gated-gelu" else name
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.scales_by_default()

    def check(self) -> None:
        """Raise `ConfigError` for sizes and names that cannot make a model."""
        for name in (*_POSITIVE, "num_layers", "num_decoder_layers"):
            least = 0 if name.endswith("layers") else 1
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be {least} or more", where=name, found=getattr(self, name))
        gate, dash, name = self.feed_forward_proj.partition("-")
        if not (name if dash else gate) or (dash and gate != "gated") or "-" in name:
            raise ConfigError(
                "feed_forward_proj does not name a feed-forward network",
                where="feed_forward_proj",
                expected="an activation, or gated-<activation>, such as 'relu' or 'gated-gelu'",
                found=repr(self.feed_forward_proj),
            )
        if self.relative_attention_num_buckets < 4:
            raise ConfigError(
                "Relative positions need 4 buckets or more: near and far, before and after",
                where="relative_attention_num_buckets",
                found=self.relative_attention_num_buckets,
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ConfigError(
                "The distances that have a bucket of their own reach past relative_attention_max_distance",
                where="relative_attention_max_distance",
                expected=f"more than {self.relative_attention_num_buckets // 2} "
                "(half of relative_attention_num_buckets)",
                found=self.relative_attention_max_distance,
            )
        check_pruned_heads(self)

    def encoder_heads_left(self, layer: int) -> int:
        """Return how many heads a block of the encoder has; `pruned_heads` is about no other attention.

        Args:
            layer: Index of the block in the encoder.
        """
        return heads_left(self, layer)

    # -- the facts in which the family differs ---------------------------------------------------

    def scales_by_default(self) -> bool:
        """Tell whether the decoder's output is multiplied by ``d_model ** -0.5`` before the head.

        For a file that does not say `scale_decoder_outputs`. T5 v1.0 scales, for its head is the
        embedding; v1.1 has a head of its own, says so by ``tie_word_embeddings: false`` and does not.
        """
        return self.tie_word_embeddings

    def has_position_bias(self, layer: int) -> bool:
        """Tell whether a block has a table of relative position biases: the first has, for all.

        Args:
            layer: Index of the block in its stack.
        """
        return layer == 0


class MT5Config(T5Config):
    """Configuration of mT5: T5 v1.1 with a multilingual vocabulary."""

    model_type = "mt5"

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"

    def scales_by_default(self) -> bool:
        """Do not scale, whatever `tie_word_embeddings` says: it is true in files saved by transformers 5."""
        return False


class UMT5Config(MT5Config):
    """Configuration of UMT5: relative position biases in every block."""

    model_type = "umt5"

    def scales_by_default(self) -> bool:
        """Scale, whatever `tie_word_embeddings` says, as transformers 5 does.

        The published files say ``tie_word_embeddings: false``, by which transformers 4 did not scale;
        ``scale_decoder_outputs=False`` gives those logits. Greedy decoding is the same either way.
        """
        return True

    def has_position_bias(self, layer: int) -> bool:
        """Tell whether a block has a table of relative position biases: each has its own.

        Args:
            layer: Index of the block in its stack.
        """
        return True


def skeleton(config: T5Config, head: str = "Model") -> Skeleton:
    """Return every weight that a T5-family model promises.

    Args:
        config: Its configuration.
        head: Class name without the family's name: ``"Model"``, ``"ForConditionalGeneration"``,
            ``"EncoderModel"``, ``"ForSequenceClassification"``, ``"ForTokenClassification"``,
            ``"ForQuestionAnswering"``.
    """
    inside = head in ("ForSequenceClassification", "ForTokenClassification")
    build = SkeletonBuilder(f"{BASE_MODEL_PREFIX}." if inside else "")
    shared = f"{build.prefix}shared.weight"
    build.weight("shared.weight", config.vocab_size, config.d_model)
    stacks = {"encoder": config.num_layers}
    if head not in ("EncoderModel", "ForTokenClassification"):
        stacks["decoder"] = config.num_decoder_layers or 0
    for stack, num_layers in stacks.items():
        build.weight(f"{stack}.embed_tokens.weight", config.vocab_size, config.d_model)
        build.tie(f"{build.prefix}{stack}.embed_tokens.weight", shared)
        for index in range(num_layers):
            _block(build, config, stack, index)
        build.norm(f"{stack}.final_layer_norm", config.d_model)
    build.prefix = ""
    if head == "ForConditionalGeneration":
        build.linear("lm_head", config.vocab_size, config.d_model)
        if config.tie_word_embeddings:
            build.tie("lm_head.weight", shared)
    elif head == "ForSequenceClassification":
        build.linear("classification_head.dense", config.d_model, config.d_model, bias=True)
        build.linear("classification_head.out_proj", config.num_labels, config.d_model, bias=True)
    elif head == "ForTokenClassification":
        build.linear("classifier", config.num_labels, config.d_model, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", config.num_labels, config.d_model, bias=True)
    return build.build()


def _block(build: SkeletonBuilder, config: T5Config, stack: str, index: int) -> None:
    path = f"{stack}.block.{index}"
    heads = config.encoder_heads_left(index) if stack == "encoder" else config.num_heads
    build.block(path)
    attentions = ["SelfAttention", "EncDecAttention"][: 1 if stack == "encoder" else 2]
    for part, name in enumerate(attentions):
        attention = f"{path}.layer.{part}.{name}"
        for letter in "qkv":
            build.linear(f"{attention}.{letter}", heads * config.d_kv, config.d_model)
        build.linear(f"{attention}.o", config.d_model, heads * config.d_kv)
        if name == "SelfAttention" and config.has_position_bias(index):
            build.weight(
                f"{attention}.relative_attention_bias.weight",
                config.relative_attention_num_buckets,
                config.num_heads,
            )
        build.norm(f"{path}.layer.{part}.layer_norm", config.d_model)
    last = f"{path}.layer.{len(attentions)}"
    for name in ("wi_0", "wi_1") if config.is_gated_act else ("wi",):
        build.linear(f"{last}.DenseReluDense.{name}", config.d_ff, config.d_model)
    build.linear(f"{last}.DenseReluDense.wo", config.d_model, config.d_ff)
    build.norm(f"{last}.layer_norm", config.d_model)
    build.block(None)
