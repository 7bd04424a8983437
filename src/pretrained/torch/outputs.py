# SPDX-License-Identifier: Apache-2.0
"""What models return: dataclasses that also read like the dictionaries and tuples of the ecosystem.

Names and fields are those of the ecosystem. Shapes: logits [batch, length, vocab]; hidden states one
[batch, length, hidden] tensor for each layer and one for the embeddings; attentions one
[batch, heads, query, key] tensor for each layer.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils import _pytree


class ModelOutput:
    """Base of all outputs: attribute, key, index and slice access, in the order of the fields.

    Fields that are None do not exist for keys, indices and iteration, as ``return_dict=False`` tuples
    leave them out.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # So that nested outputs pass through torch.func, DDP and torch.compile's graph boundary.
        _pytree.register_pytree_node(
            cls, _flatten, lambda values, names: cls(**dict(zip(names, values, strict=True)))
        )

    def keys(self) -> tuple[str, ...]:
        """Return the names of the fields that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)  # type: ignore[arg-type]

    def values(self) -> tuple[Any, ...]:
        """Return the values of the fields that are not None."""
        return self.to_tuple()

    def items(self) -> ItemsView[str, Any]:
        """Return name-value pairs of the fields that are not None."""
        return dict(zip(self.keys(), self.to_tuple(), strict=True)).items()

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, as ``return_dict=False`` does."""
        return tuple(getattr(self, name) for name in self.keys())

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or `default` where it is None or absent.

        Args:
            name: Field name.
            default: What to return instead.
        """
        return getattr(self, name) if name in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in {f.name for f in fields(self)}:  # type: ignore[arg-type]
            raise KeyError(f"{type(self).__name__} has no field {key!r}")
        setattr(self, key, value)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


def _flatten(output: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
    return list(output.to_tuple()), output.keys()


Tensors = tuple[torch.Tensor, ...]


@dataclass
class BaseModelOutput(ModelOutput):
    """Output of an encoder."""

    last_hidden_state: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Output of a decoder."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Output of a decoder that may look at an encoder."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Output of an encoder with a pooled first token."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """Output of an encoder or decoder with a pooled first token."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    past_key_values: Any = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """Output of a language model without a cache."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """Output of a decoder language model."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """Output of a decoder language model that may look at an encoder."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None
    cross_attentions: Tensors | None = None


@dataclass
class MaskedLMOutput(CausalLMOutput):
    """Output of a masked language model."""


@dataclass
class Seq2SeqModelOutput(ModelOutput):
    """Output of an encoder-decoder without a head."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """Output of an encoder-decoder language model."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


@dataclass
class SequenceClassifierOutput(CausalLMOutput):
    """Output of a sequence classifier: logits [batch, labels]."""


@dataclass
class SequenceClassifierOutputWithPast(CausalLMOutputWithPast):
    """Output of a sequence classifier on a decoder: logits [batch, labels]."""


@dataclass
class Seq2SeqSequenceClassifierOutput(Seq2SeqLMOutput):
    """Output of a sequence classifier on an encoder-decoder: logits [batch, labels]."""


@dataclass
class TokenClassifierOutput(CausalLMOutput):
    """Output of a token classifier: logits [batch, length, labels]."""


@dataclass
class MultipleChoiceModelOutput(CausalLMOutput):
    """Output of a multiple-choice model: logits [batch, choices]."""


@dataclass
class NextSentencePredictorOutput(CausalLMOutput):
    """Output of a next-sentence predictor: logits [batch, 2]."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """Output of extractive question answering: logits [batch, length] for both ends of the span."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: Tensors | None = None
    attentions: Tensors | None = None


@dataclass
class Seq2SeqQuestionAnsweringModelOutput(ModelOutput):
    """Output of extractive question answering on an encoder-decoder."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: Tensors | None = None
    decoder_attentions: Tensors | None = None
    cross_attentions: Tensors | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: Tensors | None = None
    encoder_attentions: Tensors | None = None


def detuple(output: Any, cls: type[ModelOutput]) -> Any:
    """Return an output object for what a user passed as one: an output, a mapping or a plain tuple.

    Args:
        output: `encoder_outputs` as the user gave it, or None.
        cls: Class to build from a tuple, in field order.
    """
    if isinstance(output, (tuple, list)):
        return cls(*output)
    return output


def finish(output: ModelOutput, return_dict: bool) -> Any:
    """Return the output itself or its tuple.

    Args:
        output: What the model computed.
        return_dict: False for a plain tuple.
    """
    return output if return_dict else output.to_tuple()
