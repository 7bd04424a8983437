# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): config, weights, keys.

Matrices are stored (in, out), the layout of the original's one-dimensional convolutions.
"""

from __future__ import annotations

from typing import Literal

from pretrained.arch.pruning import heads_left
from pretrained.core.config import PreTrainedConfig
from pretrained.core.keys import Drop, KeyRule
from pretrained.core.skeleton import Skeleton, SkeletonBuilder
from pretrained.errors import ConfigError

# Files saved before 2023 carry each layer's causal mask (bias) and the number that it masks with.
KEY_RULES: tuple[KeyRule, ...] = (
    Drop("*.attn.bias", "the causal mask, made when it is needed"),
    Drop("*.attn.masked_bias", "a constant of the causal mask"),
    Drop("*.crossattention.bias", "a mask, made when it is needed"),
    Drop("*.crossattention.masked_bias", "a constant of the mask"),
)
NO_SPLIT = ("GPT2Block",)
BASE_MODEL_PREFIX = "transformer"


class GPT2Config(PreTrainedConfig):
    """Configuration of GPT-2; field names are those of its config.json."""

    model_type = "gpt2"
    attribute_map = {  # noqa: RUF012 - a constant
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    summary_last_dropout: float = 0.0
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256

    def check(self) -> None:
        """Raise `ConfigError` for sizes or pruned heads that do not fit together."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_head"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive", where=name, found=getattr(self, name))
        for name in ("n_layer", "n_inner"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be negative", where=name, found=getattr(self, name))
        if self.n_embd % self.n_head:
            raise ConfigError(
                "n_embd is not a multiple of n_head",
                where="n_embd, n_head",
                found=f"{self.n_embd}, {self.n_head}",
            )
        for layer, heads in self.pruned_heads.items():
            fits = all(0 <= head < self.n_head for head in heads) and len(set(heads)) < self.n_head
            if not 0 <= layer < self.n_layer or not fits:
                raise ConfigError(
                    "pruned_heads names heads that the model does not have, or all of a layer",
                    where=f"pruned_heads[{layer}]",
                    expected=f"layers below {self.n_layer}, some of {self.n_head} heads",
                    found=heads,
                )

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        """Channels between the feed-forward network's two layers; four times as many where not given."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def heads_left(self, layer: int) -> int:
        """Return how many attention heads a layer has, pruned ones not counted.

        Args:
            layer: Index of the block.
        """
        return heads_left(self, layer)

    def attention_scaling(self, layer: int) -> float:
        """Return the factor on a layer's attention scores, in its own and in its cross-attention.

        Args:
            layer: Index of the block.
        """
        scaling = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scaling / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scaling

    def summary_size(self) -> int | None:
        """Return how many numbers the summary's projection has, or None where there is no projection.

        The one class with a summary scores choices one by one, so that there is one label.
        """
        if not self.summary_use_proj:
            return None
        return 1 if self.summary_proj_to_labels else self.n_embd

    def checked_summary_type(self) -> Literal["last", "first", "mean", "cls_index"]:
        """Return which token sums a text up, for the class that needs to know.

        Raises:
            ConfigError: an unknown way, or ``"attn"``, which no implementation of GPT-2 has.
        """
        if self.summary_type not in ("last", "first", "mean", "cls_index"):
            raise ConfigError(
                "summary_type is not a way to sum a text up",
                where="summary_type",
                expected="'last', 'first', 'mean' or 'cls_index'",
                found=repr(self.summary_type),
            )
        return self.summary_type  # type: ignore[return-value]


def skeleton(config: GPT2Config, head: str = "Model") -> Skeleton:
    """Return every weight that a GPT-2 model promises.

    Args:
        config: Its configuration.
        head: Class name without ``"GPT2"``: ``"Model"``, ``"LMHeadModel"``, ``"DoubleHeadsModel"``,
            ``"ForSequenceClassification"``, ``"ForTokenClassification"``, ``"ForQuestionAnswering"``.
    """
    build = SkeletonBuilder("" if head == "Model" else f"{BASE_MODEL_PREFIX}.")
    build.weight("wte.weight", config.vocab_size, config.n_embd)
    build.weight("wpe.weight", config.n_positions, config.n_embd)
    for index in range(config.n_layer):
        _block(build, config, index)
    build.norm("ln_f", config.n_embd, bias=True)
    build.prefix = ""
    if head in ("LMHeadModel", "DoubleHeadsModel"):
        build.linear("lm_head", config.vocab_size, config.n_embd)
        if config.tie_word_embeddings:
            build.tie("lm_head.weight", "transformer.wte.weight")
    if head == "DoubleHeadsModel" and (size := config.summary_size()) is not None:
        build.linear("multiple_choice_head.summary", size, config.n_embd, bias=True)
    elif head == "ForSequenceClassification":
        build.linear("score", config.num_labels, config.n_embd)
    elif head == "ForTokenClassification":
        build.linear("classifier", config.num_labels, config.n_embd, bias=True)
    elif head == "ForQuestionAnswering":
        build.linear("qa_outputs", 2, config.n_embd, bias=True)
    return build.build()


def _block(build: SkeletonBuilder, config: GPT2Config, index: int) -> None:
    path, hidden = f"h.{index}", config.n_embd
    attended = config.heads_left(index) * config.head_size
    build.block(path)
    build.norm(f"{path}.ln_1", hidden, bias=True)
    _convolution(build, f"{path}.attn.c_attn", hidden, 3 * attended)
    _convolution(build, f"{path}.attn.c_proj", attended, hidden)
    build.norm(f"{path}.ln_2", hidden, bias=True)
    if config.add_cross_attention:
        _convolution(build, f"{path}.crossattention.c_attn", hidden, 2 * hidden)
        _convolution(build, f"{path}.crossattention.q_attn", hidden, hidden)
        _convolution(build, f"{path}.crossattention.c_proj", hidden, hidden)
        build.norm(f"{path}.ln_cross_attn", hidden, bias=True)
    _convolution(build, f"{path}.mlp.c_fc", hidden, config.inner_size)
    _convolution(build, f"{path}.mlp.c_proj", config.inner_size, hidden)
    build.block(None)


def _convolution(build: SkeletonBuilder, path: str, inputs: int, outputs: int) -> None:
    """Add a dense layer's weight in the layout (in, out), and its bias."""
    build.weight(f"{path}.weight", inputs, outputs)
    build.weight(f"{path}.bias", outputs)
