# SPDX-License-Identifier: Apache-2.0
"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's stack, positions that skip padding, other heads.

XLM-RoBERTa and CamemBERT are RoBERTa with other vocabularies.
"""

from __future__ import annotations

from pretrained.arch import bert
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError

KEY_RULES = bert.KEY_RULES
NO_SPLIT = ("RobertaEmbeddings", "RobertaLayer")
BASE_MODEL_PREFIX = "roberta"


class RobertaConfig(bert.BertConfig):
    """Configuration of RoBERTa; field names are those of its config.json."""

    model_type = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def check(self) -> None:
        """Raise `ConfigError` as BERT's does, or where positions have no padding token to count from."""
        super().check()
        if self.pad_token_id is None or not 0 <= self.pad_token_id < self.max_position_embeddings:
            raise ConfigError(
                "RoBERTa counts positions from its padding token's id",
                where="pad_token_id",
                expected=f"a number from 0 to {self.max_position_embeddings - 1}",
                found=self.pad_token_id,
                mend="Set pad_token_id; published checkpoints have 1.",
            )


class XLMRobertaConfig(RobertaConfig):
    """Configuration of XLM-RoBERTa (Conneau et al. 2019, arXiv:1911.02116)."""

    model_type = "xlm-roberta"

    vocab_size: int = 30522


class CamembertConfig(RobertaConfig):
    """Configuration of CamemBERT (Martin et al. 2019, arXiv:1911.03894)."""

    model_type = "camembert"

    vocab_size: int = 30522


def skeleton(config: RobertaConfig, head: str = "Model", *, add_pooling_layer: bool = True) -> Skeleton:
    """Return every weight that a RoBERTa model promises.

    Args:
        config: Its configuration.
        head: Class name without ``Roberta``: ``"Model"``, ``"ForCausalLM"``, ``"ForMaskedLM"``,
            ``"ForSequenceClassification"``, ``"ForMultipleChoice"``, ``"ForTokenClassification"``,
            ``"ForQuestionAnswering"``.
        add_pooling_layer: Whether the headless model has its pooler; of the heads only multiple choice
            has one.
    """
    hidden = config.hidden_size
    build = SkeletonBuilder("" if head == "Model" else f"{BASE_MODEL_PREFIX}.")
    pooler = add_pooling_layer if head == "Model" else head == "ForMultipleChoice"
    bert.encoder_stack(build, config, pooler=pooler)
    build.prefix = ""
    if head in ("ForCausalLM", "ForMaskedLM"):
        _language_head(build, config)
    elif head == "ForSequenceClassification":
        build.linear("classifier.dense", hidden, hidden, bias=True)
        build.linear("classifier.out_proj", config.num_labels, hidden, bias=True)
    elif head == "ForTokenClassification":
        build.linear("classifier", config.num_labels, hidden, bias=True)
    elif head == "ForMultipleChoice":
        build.linear("classifier", 1, hidden, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", config.num_labels, hidden, bias=True)
    return build.build()


def _language_head(build: SkeletonBuilder, config: RobertaConfig) -> None:
    hidden = config.hidden_size
    build.weight("lm_head.bias", config.vocab_size)
    build.linear("lm_head.dense", hidden, hidden, bias=True)
    build.norm("lm_head.layer_norm", hidden, bias=True)
    build.linear("lm_head.decoder", config.vocab_size, hidden, bias=True)
    ties = bert.language_head_ties("lm_head", BASE_MODEL_PREFIX, config.tie_word_embeddings)
    for alias, owner in ties.items():
        build.tie(alias, owner)
