# SPDX-License-Identifier: Apache-2.0
"""`ModuleUtilsMixin`: facts about a model's parameters, and the mask helpers of the ecosystem."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from pretrained.errors import ArgumentError

logger = logging.getLogger(__name__)


class ModuleUtilsMixin:
    """What any `nn.Module` with a config can say about itself."""

    @property
    def device(self) -> torch.device:
        """Device of the first parameter (or buffer, where there are no parameters)."""
        return next(_tensors(self)).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating parameter (or buffer); of the first at all where none floats."""
        floating = (tensor for tensor in _tensors(self) if tensor.is_floating_point())
        return next(floating, next(_tensors(self))).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters, tied ones once.

        Args:
            only_trainable: Leave out those that need no gradient.
            exclude_embeddings: Leave out the weights of `nn.Embedding` layers.
        """
        excluded = set()
        if exclude_embeddings:
            modules = self.modules()  # type: ignore[attr-defined]
            excluded = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()  # type: ignore[attr-defined]
            if id(parameter) not in excluded and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters, tied ones counted once.

        Args:
            return_buffers: Count buffers too.
        """
        tensors = list(self.parameters())  # type: ignore[attr-defined]
        if return_buffers:
            tensors += list(self.buffers())  # type: ignore[attr-defined]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Return how many numbers the main input holds; of embeddings in its place, how many vectors.

        Args:
            input_dict: Model inputs by name. With neither the answer is 0, and a warning says so once:
                training loops ask at every step.
        """
        name = getattr(self, "main_input_name", "input_ids")
        if input_dict.get(name) is not None:
            return int(input_dict[name].numel())
        embeds = input_dict.get("inputs_embeds")
        if embeds is not None:
            return int(embeds.shape[:-1].numel())
        said = self.__dict__.setdefault("warnings_issued", {})
        if not said.get("estimate_tokens"):
            said["estimate_tokens"] = True
            found = ", ".join(sorted(input_dict)) or "nothing"
            logger.warning("Tokens and operations are not counted: no %s among the inputs (%s).", name, found)
        return 0

    def floating_point_ops(self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True) -> int:
        """Estimate the operations of a forward and backward pass: 6 for each token and parameter.

        The estimate of Kaplan et al. 2020, arXiv:2001.08361, section 2.1; it leaves attention out.

        Args:
            input_dict: Model inputs by name.
            exclude_embeddings: Leave the embeddings' parameters out.
        """
        parameters = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * self.estimate_tokens(input_dict) * parameters

    def invert_attention_mask(self, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask of ones and zeros into one to add to scores.

        Args:
            encoder_attention_mask: [batch, key] or [batch, query, key], 1 to look at and 0 not to.

        Returns:
            [batch, 1, 1 or query, key] in the model's dtype: 0, or its most negative number.

        Raises:
            ArgumentError: another rank.
        """
        if encoder_attention_mask.dim() not in (2, 3):
            raise _wrong_rank(encoder_attention_mask)
        mask = encoder_attention_mask
        mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_extended_attention_mask(
        self,
        attention_mask: torch.Tensor,
        input_shape: tuple[int, ...],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Turn a mask of ones and zeros into one to add to scores, causal in a decoder.

        Args:
            attention_mask: [batch, key] or [batch, query, key].
            input_shape: (batch, query length) of the input.
            device: Where the result lives; None for the mask's device.
            dtype: Floating dtype of the result; None for the model's.

        Returns:
            [batch, 1, 1 or query, key]: 0, or the dtype's most negative number.

        Raises:
            ArgumentError: another rank.
        """
        dtype = dtype or self.dtype
        if attention_mask.dim() == 3:
            mask = attention_mask[:, None]
        elif attention_mask.dim() == 2 and self.config.is_decoder:  # type: ignore[attr-defined]
            mask = self.create_extended_attention_mask_for_decoder(input_shape, attention_mask)
        elif attention_mask.dim() == 2:
            mask = attention_mask[:, None, None]
        else:
            raise _wrong_rank(attention_mask)
        return ((1.0 - mask.to(dtype)) * torch.finfo(dtype).min).to(device or attention_mask.device)

    @staticmethod
    def create_extended_attention_mask_for_decoder(
        input_shape: tuple[int, ...], attention_mask: torch.Tensor, device: torch.device | None = None
    ) -> torch.Tensor:
        """Combine a padding mask with causality; keys before the input (a prefix) are visible to all.

        Args:
            input_shape: (batch, query length) of the input.
            attention_mask: [batch, key], 1 to look at.
            device: Where the result lives; None for the mask's device.

        Returns:
            [batch, 1, query, key] of ones and zeros, not inverted.

        Raises:
            ArgumentError: the mask is shorter than the input.
        """
        length, total = input_shape[1], attention_mask.shape[1]
        if length > total:
            raise ArgumentError(
                "The mask is shorter than the input",
                where="attention_mask",
                expected=f"[batch, {length}] or longer, by what comes before the input",
                found=list(attention_mask.shape),
            )
        causal = torch.ones(length, total, dtype=attention_mask.dtype, device=attention_mask.device)
        mask = causal.tril(total - length)[None, None] * attention_mask[:, None, None]
        return mask if device is None else mask.to(device)

    def get_head_mask(
        self, head_mask: torch.Tensor | None, num_hidden_layers: int, is_attention_chunked: bool = False
    ) -> torch.Tensor | list[None]:
        """Broadcast a mask over heads to every layer.

        Args:
            head_mask: [heads] or [layers, heads], 1 to keep a head; None for no mask.
            num_hidden_layers: Layers of the model.
            is_attention_chunked: Add a last axis for chunked attention.

        Returns:
            [layers, batch, heads, query, key], or a None for each layer.

        Raises:
            ArgumentError: another rank.
        """
        if head_mask is None:
            return [None] * num_hidden_layers
        if head_mask.dim() == 1:
            head_mask = head_mask.expand(num_hidden_layers, -1)
        if head_mask.dim() != 2:
            raise _wrong_rank(head_mask, "head_mask", "[heads] or [layers, heads]")
        mask = head_mask[:, None, :, None, None].to(self.dtype)
        return mask[..., None] if is_attention_chunked else mask


def _wrong_rank(
    mask: torch.Tensor,
    name: str = "attention_mask",
    expected: str = "[batch, key] or [batch, query, key]",
) -> ArgumentError:
    return ArgumentError(f"{name} has the wrong rank", where=name, expected=expected, found=list(mask.shape))


def _tensors(module: Any) -> Iterator[torch.Tensor]:
    """Return the parameters and then the buffers of a module that has any."""
    tensors = chain(module.parameters(), module.buffers())
    first = next(tensors, None)
    if first is None:
        raise ArgumentError(f"{type(module).__name__} has no parameters", where="model")
    return chain((first,), tensors)
