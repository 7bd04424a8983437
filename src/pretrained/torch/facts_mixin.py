# SPDX-License-Identifier: Apache-2.0
"""`ModelFactsMixin`: small things that other libraries ask of a model: tags, its loss, its quantizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrained.errors import ArgumentError
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
    _own_loss: Callable[..., torch.Tensor] | None = None

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

        Set it to compute another (None for the class's own again): ``f(logits, labels, ...)``, or of the
        four tensors that question answering has.

        Raises:
            ArgumentError: the class has no head, or one whose loss is made of several; or what is set is no
                function.
        """
        own = self._loss_set()
        if own is not None:
            return own
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
    def loss_function(self, value: Callable[..., torch.Tensor] | None) -> None:
        self.loss_function  # noqa: B018 - a class without a loss of one kind says so
        if value is not None and not callable(value):
            raise ArgumentError(
                "A loss is a function of (logits, labels)", where="loss_function", found=repr(value)[:200]
            )
        self._own_loss = value

    def loss_by(self, default: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return what a forward computes its loss with: `default`, or the function that was set instead.

        A function that was set is called by keywords, as the ecosystem calls it: those of `default`, and
        `vocab_size`, `config` and `num_items_in_batch` where it takes them.

        Args:
            default: A function of `pretrained.torch.losses`.
        """
        own = self._loss_set()
        if own is None:
            return default
        taken = inspect.signature(own.forward if isinstance(own, torch.nn.Module) else own).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        config = self.config  # type: ignore[attr-defined]
        facts = {"vocab_size": getattr(config, "vocab_size", None), "config": config}

        def compute(*tensors: torch.Tensor, **more: Any) -> torch.Tensor:
            named = dict(zip(inspect.signature(default).parameters, tensors, strict=False))
            extra = {name: value for name, value in {**facts, **more}.items() if takes_all or name in taken}
            return own(**{**extra, **named})

        return compute

    def _loss_set(self) -> Callable[..., torch.Tensor] | None:
        # Torch keeps an attribute that is a module among the modules, past the property.
        module: torch.nn.Module | None = self._modules.get("loss_function")  # type: ignore[attr-defined]
        return self._own_loss if module is None else module


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
