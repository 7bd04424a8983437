# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): configuration, weights and key rules, names its own."""

from __future__ import annotations

from typing import ClassVar

from pretrained.arch.bert import check_sizes
from pretrained.arch.pruning import check_pruned_heads, heads_left
from pretrained.core.config import PreTrainedConfig
from pretrained.core.keys import LEGACY_NORM_RULES, Drop, KeyRule
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError

KEY_RULES: tuple[KeyRule, ...] = (
    *LEGACY_NORM_RULES,
    Drop("*embeddings.position_ids", "counted when they are needed"),
)
NO_SPLIT = ("Embeddings", "TransformerBlock")
BASE_MODEL_PREFIX = "distilbert"

# The configuration has no field for it.
LAYER_NORM_EPS = 1e-12


class DistilBertConfig(PreTrainedConfig):
    """Configuration of DistilBERT; field names are those of its config.json."""

    model_type = "distilbert"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0

    def check(self) -> None:
        """Raise `ConfigError` for sizes or pruned heads that do not fit together."""
        check_sizes(self, ("vocab_size", "dim", "n_heads", "hidden_dim", "max_position_embeddings"))
        if self.dim % self.n_heads:
            raise ConfigError(
                "dim is not a multiple of n_heads", where="dim, n_heads", found=f"{self.dim}, {self.n_heads}"
            )
        check_pruned_heads(self)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads

    def heads_left(self, layer: int) -> int:
        """Return how many attention heads a layer has, pruned ones not counted.

        Args:
            layer: Index of the block.
        """
        return heads_left(self, layer)


def skeleton(config: DistilBertConfig, head: str = "Model") -> Skeleton:
    """Return every weight that a DistilBERT model promises.

    Args:
        config: Its configuration.
        head: Class name without ``DistilBert``: ``"Model"``, ``"ForMaskedLM"``,
            ``"ForSequenceClassification"``, ``"ForMultipleChoice"``, ``"ForTokenClassification"``,
            ``"ForQuestionAnswering"``.
    """
    dim = config.dim
    build = SkeletonBuilder("" if head == "Model" else f"{BASE_MODEL_PREFIX}.")
    build.block("embeddings")
    build.weight("embeddings.word_embeddings.weight", config.vocab_size, dim)
    build.weight("embeddings.position_embeddings.weight", config.max_position_embeddings, dim)
    build.norm("embeddings.LayerNorm", dim, bias=True)
    for index in range(config.n_layers):
        _block(build, config, index)
    build.block(None)
    build.prefix = ""
    if head == "ForMaskedLM":
        build.linear("vocab_transform", dim, dim, bias=True)
        build.norm("vocab_layer_norm", dim, bias=True)
        build.linear("vocab_projector", config.vocab_size, dim, bias=True)
        if config.tie_word_embeddings:
            build.tie("vocab_projector.weight", f"{BASE_MODEL_PREFIX}.embeddings.word_embeddings.weight")
    elif head in ("ForSequenceClassification", "ForMultipleChoice"):
        build.linear("pre_classifier", dim, dim, bias=True)
        labels = 1 if head == "ForMultipleChoice" else config.num_labels
        build.linear("classifier", labels, dim, bias=True)
    elif head == "ForTokenClassification":
        build.linear("classifier", config.num_labels, dim, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", config.num_labels, dim, bias=True)
    return build.build()


def _block(build: SkeletonBuilder, config: DistilBertConfig, index: int) -> None:
    path, dim = f"transformer.layer.{index}", config.dim
    inner = config.heads_left(index) * config.head_size
    build.block(path)
    for name in ("q_lin", "k_lin", "v_lin"):
        build.linear(f"{path}.attention.{name}", inner, dim, bias=True)
    build.linear(f"{path}.attention.out_lin", dim, inner, bias=True)
    build.norm(f"{path}.sa_layer_norm", dim, bias=True)
    build.linear(f"{path}.ffn.lin1", config.hidden_dim, dim, bias=True)
    build.linear(f"{path}.ffn.lin2", dim, config.hidden_dim, bias=True)
    build.norm(f"{path}.output_layer_norm", dim, bias=True)
