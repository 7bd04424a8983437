# SPDX-License-Identifier: Apache-2.0
"""BERT (Devlin et al. 2018, arXiv:1810.04805): configuration, weights and key rules.

RoBERTa is the same stack with other positions and heads; `encoder_stack` serves both.
"""

from __future__ import annotations

from pretrained.arch.pruning import check_pruned_heads, heads_left
from pretrained.core.config import PreTrainedConfig
from pretrained.core.keys import LEGACY_NORM_RULES, Drop, KeyRule
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError, did_you_mean

# Files saved before 2023 carry the position numbers 0, 1, 2, ... as a tensor.
KEY_RULES: tuple[KeyRule, ...] = (
    *LEGACY_NORM_RULES,
    Drop("*embeddings.position_ids", "counted when they are needed"),
    Drop("*embeddings.token_type_ids", "zeros, made when they are needed"),
)
NO_SPLIT = ("BertEmbeddings", "BertLayer")
BASE_MODEL_PREFIX = "bert"

ABSOLUTE = "absolute"
RELATIVE_KEY = "relative_key"
RELATIVE_KEY_QUERY = "relative_key_query"
POSITION_EMBEDDING_TYPES = (ABSOLUTE, RELATIVE_KEY, RELATIVE_KEY_QUERY)

# Heads whose model has no pooler, in the published classes.
_WITHOUT_POOLER = ("LMHeadModel", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


class BertConfig(PreTrainedConfig):
    """Configuration of BERT; field names are those of its config.json."""

    model_type = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = ABSOLUTE
    classifier_dropout: float | None = None

    def check(self) -> None:
        """Raise `ConfigError` for sizes, positions or pruned heads that do not fit together."""
        check_sizes(self, ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings"))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                "hidden_size is not a multiple of num_attention_heads",
                where="hidden_size, num_attention_heads",
                found=f"{self.hidden_size}, {self.num_attention_heads}",
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ConfigError(
                f"Unknown kind of positions {self.position_embedding_type!r}",
                where="position_embedding_type",
                expected=", ".join(POSITION_EMBEDDING_TYPES),
                mend=did_you_mean(self.position_embedding_type, POSITION_EMBEDDING_TYPES),
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ConfigError(
                "Only a decoder looks at an encoder",
                where="add_cross_attention",
                expected="is_decoder=True with it",
                found="is_decoder=False",
                mend="Set is_decoder=True, or leave add_cross_attention out.",
            )
        check_pruned_heads(self)

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def relative_positions(self) -> bool:
        """Whether positions enter as distances inside attention, not as embeddings of the input."""
        return self.position_embedding_type != ABSOLUTE

    @property
    def head_dropout(self) -> float:
        """Dropout before a classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    def heads_left(self, layer: int) -> int:
        """Return how many attention heads a layer has, pruned ones not counted.

        Args:
            layer: Index of the block.
        """
        return heads_left(self, layer)


def check_sizes(config: PreTrainedConfig, names: tuple[str, ...]) -> None:
    """Raise `ConfigError` where a size is below 1, a count below 0, or padding is no token.

    Args:
        config: Its `num_hidden_layers` and `chunk_size_feed_forward` may be 0, too.
        names: Fields that must be at least 1.
    """
    least = {**dict.fromkeys(names, 1), "num_hidden_layers": 0, "chunk_size_feed_forward": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise ConfigError(
                f"{name} is too small",
                where=config.attribute_map.get(name, name),
                expected=f"at least {lowest}",
                found=getattr(config, name),
            )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ConfigError(
            "The padding token is not in the vocabulary",
            where="pad_token_id",
            expected=f"below vocab_size, {config.vocab_size}, or null",
            found=config.pad_token_id,
        )


def skeleton(config: BertConfig, head: str = "Model", *, add_pooling_layer: bool = True) -> Skeleton:
    """Return every weight that a BERT model promises.

    Args:
        config: Its configuration.
        head: Class name without ``Bert``: ``"Model"``, ``"ForPreTraining"``, ``"LMHeadModel"``,
            ``"ForMaskedLM"``, ``"ForNextSentencePrediction"``, ``"ForSequenceClassification"``,
            ``"ForMultipleChoice"``, ``"ForTokenClassification"``, ``"ForQuestionAnswering"``.
        add_pooling_layer: Whether the headless model has its pooler; a class with a head decides itself.
    """
    build = SkeletonBuilder("" if head == "Model" else f"{BASE_MODEL_PREFIX}.")
    pooler = add_pooling_layer if head == "Model" else head not in _WITHOUT_POOLER
    encoder_stack(build, config, pooler=pooler)
    build.prefix = ""
    if head in ("ForPreTraining", "LMHeadModel", "ForMaskedLM"):
        _predictions(build, config)
    if head in ("ForPreTraining", "ForNextSentencePrediction"):
        path = "cls.seq_relationship"
        build.linear(path, 2, config.hidden_size, bias=True)
    elif head in ("ForSequenceClassification", "ForTokenClassification"):
        build.linear("classifier", config.num_labels, config.hidden_size, bias=True)
    elif head == "ForMultipleChoice":
        build.linear("classifier", 1, config.hidden_size, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", config.num_labels, config.hidden_size, bias=True)
    return build.build()


def encoder_stack(build: SkeletonBuilder, config: BertConfig, *, pooler: bool) -> None:
    """Add embeddings, blocks and, if asked, the pooler.

    Args:
        build: Collects the weights.
        config: The configuration of a BERT or RoBERTa.
        pooler: Whether there is one.
    """
    hidden = config.hidden_size
    build.block("embeddings")
    build.weight("embeddings.word_embeddings.weight", config.vocab_size, hidden)
    build.weight("embeddings.position_embeddings.weight", config.max_position_embeddings, hidden)
    build.weight("embeddings.token_type_embeddings.weight", config.type_vocab_size, hidden)
    build.norm("embeddings.LayerNorm", hidden, bias=True)
    for index in range(config.num_hidden_layers):
        _block(build, config, index)
    build.block(None)
    if pooler:
        build.linear("pooler.dense", hidden, hidden, bias=True)


def _block(build: SkeletonBuilder, config: BertConfig, index: int) -> None:
    path, hidden = f"encoder.layer.{index}", config.hidden_size
    build.block(path)
    _attention(build, config, f"{path}.attention", config.heads_left(index), config.relative_positions)
    if config.add_cross_attention:
        # Pruning and distances concern a layer's own tokens; the encoder's are seen by every head.
        _attention(build, config, f"{path}.crossattention", config.num_attention_heads, False)
    build.linear(f"{path}.intermediate.dense", config.intermediate_size, hidden, bias=True)
    build.linear(f"{path}.output.dense", hidden, config.intermediate_size, bias=True)
    build.norm(f"{path}.output.LayerNorm", hidden, bias=True)


def _attention(build: SkeletonBuilder, config: BertConfig, path: str, heads: int, relative: bool) -> None:
    hidden, inner = config.hidden_size, heads * config.head_size
    for name in ("query", "key", "value"):
        build.linear(f"{path}.self.{name}", inner, hidden, bias=True)
    if relative:
        distances = 2 * config.max_position_embeddings - 1
        build.weight(f"{path}.self.distance_embedding.weight", distances, config.head_size)
    build.linear(f"{path}.output.dense", hidden, inner, bias=True)
    build.norm(f"{path}.output.LayerNorm", hidden, bias=True)


def _predictions(build: SkeletonBuilder, config: BertConfig) -> None:
    path, hidden = "cls.predictions", config.hidden_size
    build.weight(f"{path}.bias", config.vocab_size)
    build.linear(f"{path}.transform.dense", hidden, hidden, bias=True)
    build.norm(f"{path}.transform.LayerNorm", hidden, bias=True)
    build.linear(f"{path}.decoder", config.vocab_size, hidden, bias=True)
    for alias, owner in language_head_ties(path, BASE_MODEL_PREFIX, config.tie_word_embeddings).items():
        build.tie(alias, owner)


def language_head_ties(head: str, base: str, tie_word_embeddings: bool) -> dict[str, str]:
    """Return the ties of a language-model head with a bias of its own, as alias -> owner.

    The head's bias and its decoder's are one tensor, always. Published files hold the head's; where the
    word embedding is not tied, some hold both and only the decoder's was trained, so that one owns.

    Args:
        head: Path of the module that holds `decoder` and `bias`.
        base: Attribute that holds the headless model.
        tie_word_embeddings: Whether the decoder's weight is the word embedding.
    """
    if not tie_word_embeddings:
        return {f"{head}.bias": f"{head}.decoder.bias"}
    return {
        f"{head}.decoder.weight": f"{base}.embeddings.word_embeddings.weight",
        f"{head}.decoder.bias": f"{head}.bias",
    }
