# SPDX-License-Identifier: Apache-2.0
"""`ModelFactsMixin`: small things that other libraries ask of a model: tags, its loss, its quantizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrained.errors import ArgumentError, NotYetError
from pretrained.torch.losses import (
    causal_lm_loss,
    question_answering_loss,
    sequence_classification_loss,
    token_loss,
)
from pretrained.torch.quantize import quantized_leaves


@dataclass(frozen=True, slots=True)
class QuantizerFacts:
    """What can be done with a quantized model, under the names that trainers look for.

    Attributes:
        quantization_config: The entry of its config.
        savable: Whether plain tensors hold all of its weights.
        is_trainable: Whether gradients pass through its layers, to adapters that are trained on top.
        is_qat_trainable: Whether its integers themselves are trained; never.
    """

    quantization_config: dict[str, Any]
    savable: bool
    is_trainable: bool = True
    is_qat_trainable: bool = False

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Tell whether `save_pretrained` writes the model.

        Args:
            safe_serialization: Accepted for compatibility: both formats hold the same tensors.
        """
        return self.savable


class ModelFactsMixin:
    """Gives a model what trainers and pushes ask for."""

    model_tags: list[str] | None = None

    def add_model_tags(self, tags: str | Sequence[str]) -> None:
        """Add tags that the model card gets when the model is pushed.

        Args:
            tags: One, or several; those that are there already are not added again.

        Raises:
            ArgumentError: one is not a text.
        """
        new = [tags] if isinstance(tags, str) else list(tags)
        if not all(isinstance(tag, str) and tag.strip() for tag in new):
            raise ArgumentError("Tags are texts", where="tags", found=repr(tags)[:200])
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *new]))

    @property
    def hf_quantizer(self) -> QuantizerFacts | None:
        """What can be done with the quantized model; None for a plain one."""
        if not self.is_quantized:  # type: ignore[attr-defined]
            return None
        leaves = quantized_leaves(self).values()  # type: ignore[arg-type]
        config = dict(getattr(self.config, "quantization_config", None) or {})  # type: ignore[attr-defined]
        return QuantizerFacts(config, all(leaf.is_savable for leaf in leaves))

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """The loss that the class computes from labels, as a function of ``(logits=, labels=, ...)``.

        Raises:
            ArgumentError: the class has no head, or one whose loss is made of several.
        """
        name = type(self).__name__
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return _of_tokens(causal_lm_loss)
        if name.endswith(("ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")):
            return _of_tokens(token_loss)
        if name.endswith("ForQuestionAnswering"):
            return question_answering_loss
        if name.endswith("ForSequenceClassification"):
            return _of_classes(self.config)  # type: ignore[attr-defined]
        raise ArgumentError(
            f"{name} has no loss of one kind",
            where="loss_function",
            mend="Compute it from the outputs.",
        )

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        raise NotYetError(
            "The loss that a forward computes cannot be replaced",
            where="loss_function",
            mend="Leave labels out and compute yours from the logits, or override forward in a subclass.",
        )


def _of_tokens(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def compute(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if vocab_size is not None and vocab_size != logits.shape[-1]:
            raise ArgumentError(
                "The logits have another width than the vocabulary",
                where="vocab_size",
                expected=logits.shape[-1],
                found=vocab_size,
            )
        return loss(logits, labels, num_items_in_batch=num_items_in_batch)

    return compute


def _of_classes(config: Any) -> Callable[..., torch.Tensor]:
    def compute(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sequence_classification_loss(logits, labels, config)

    return compute
