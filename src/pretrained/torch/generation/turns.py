# SPDX-License-Identifier: Apache-2.0
"""`TurnCache`: a conversation whose cache is taken up again at every turn."""

from __future__ import annotations

import logging
from typing import Any

import torch

from pretrained.errors import GenerationError
from pretrained.torch.cache import Cache, DynamicCache

logger = logging.getLogger("pretrained.generation")


class TurnCache:
    """Generates turn after turn, and runs of each prompt only what the turns before have not run.

    Pass the whole conversation each time. As far as it begins with the tokens that the cache holds, they are
    not run again; where it departs from them (a chat template may spell an old answer differently), the cache
    is cropped to what they share.

    Args:
        model: A decoder with `generate`.
        cache: An empty cache of another kind than the growing one, such as a `QuantizedCache`.
        strict: Raise where a prompt does not extend the cache, instead of running the rest again.

    Attributes:
        reused: How many tokens of each row of the last prompt were not run again.
        cache: The cache, between turns.

    Raises:
        GenerationError: an encoder-decoder, or a cache that is not empty.
    """

    def __init__(self, model: Any, cache: Cache | None = None, *, strict: bool = False) -> None:
        refuse_encoder(model, "A TurnCache")
        self._model = model
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        if self.cache.get_seq_length():
            raise GenerationError(
                "A conversation begins with an empty cache",
                where="cache",
                found=f"{self.cache.get_seq_length()} tokens, of which only the cache knows",
                mend="Leave it out, or pass a new one.",
            )
        self.strict = strict
        self.reused = 0
        self._ids: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many tokens of each row the cache holds."""
        return 0 if self._ids is None else self._ids.shape[1]

    def shared(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Return how many tokens a prompt and the cache have in common, counted from the beginning.

        A prompt extends the cache where these are all of `tokens`.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, length] with 0 for padding; None for none.
        """
        if self._ids is None or self._ids.shape[0] != input_ids.shape[0]:
            return 0
        length = min(self._ids.shape[1], input_ids.shape[1])
        same = self._ids[:, :length] == input_ids[:, :length].to(self._ids.device)
        masks = [mask for mask in (self._mask, attention_mask) if mask is not None]
        if masks:
            ones = torch.ones_like(self._ids[:, :length])
            sides = (self._mask, attention_mask)
            first, second = (ones if m is None else m[:, :length].to(ones) for m in sides)
            same = same & (first == second)
        return int(same.all(dim=0).long().cumprod(0).sum())

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as `model.generate` does, going on from the turns before.

        A turn that fails, and one whose rows are no continuation of its prompts (beams, several sequences
        of a prompt), leaves the cache empty.

        Args:
            inputs: [batch, length] the whole conversation.
            **kwargs: Arguments of `model.generate`, except `past_key_values` and `cache_implementation`.

        Raises:
            GenerationError: `strict`, and the prompt does not extend the cache; or as `model.generate`.
        """
        ids = prompt_of(inputs, kwargs, "A TurnCache")
        mask = kwargs.get("attention_mask")
        self._go_back(ids, mask)
        try:
            output = self._model.generate(ids, past_key_values=self.cache, **kwargs)
        except BaseException:
            # Layers may have run unequally far.
            self.reset()
            raise
        self._remember(output if isinstance(output, torch.Tensor) else output.sequences, ids, mask)
        return output

    def reset(self) -> None:
        """Forget the conversation."""
        self.cache.reset()
        self._ids = self._mask = None

    def _go_back(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Crop the cache to what the prompt begins with, less its last token, which must be run."""
        held, shared = self.tokens, self.shared(ids, mask)
        if held and shared < held:
            if self.strict:
                raise GenerationError(
                    "The prompt does not extend the cache",
                    where=f"input_ids, position {shared}",
                    expected=f"the {held} tokens that the cache holds, then new ones",
                    found=f"{shared} of them",
                    mend="Pass the whole conversation as it was generated, or call reset().",
                )
            logger.info("The prompt shares %d of %d cached tokens; the rest is run again.", shared, held)
        keep = min(shared, ids.shape[1] - 1)
        if keep < held:
            if keep > 0 and self.cache.can_crop(keep):
                self.cache.crop(keep)
            else:
                self.reset()
                keep = 0
        self.reused = keep

    def _remember(self, sequences: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        length = self.cache.get_seq_length()
        if sequences.shape[0] != ids.shape[0] or self.cache.batch_size != ids.shape[0]:
            self.reset()
            return
        begun = sequences[:, : ids.shape[1]]
        if sequences.shape[1] < length or not torch.equal(begun, ids.to(begun.device)):
            # Healed tokens, for example: what was run is not what was returned.
            self.reset()
            return
        self._ids = sequences[:, :length].clone()
        if mask is None:
            self._mask = None
        else:
            more = mask.new_ones((mask.shape[0], max(length - mask.shape[1], 0)))
            self._mask = torch.cat([mask, more], dim=1)[:, :length]


def refuse_encoder(model: Any, what: str) -> None:
    """Raise where a model is an encoder-decoder, whose prompts are the encoder's.

    Args:
        model: The model.
        what: Who asks, for the message.

    Raises:
        GenerationError: it is.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise GenerationError(
            f"{what} is for decoders",
            where="model",
            found=f"{type(model).__name__}, an encoder-decoder",
            mend="Pass encoder_outputs to generate(), so that the encoder runs once.",
        )


def prompt_of(inputs: Any, kwargs: dict[str, Any], what: str) -> torch.Tensor:
    """Return the ids of a call, taken out of its arguments, or raise where it has no others to go on from.

    Args:
        inputs: The prompt, or None.
        kwargs: The arguments; `input_ids` is taken out.
        what: Who asks, for the message.

    Raises:
        GenerationError: no ids, or arguments that clash with a cache that goes on.
    """
    for name in ("past_key_values", "cache_implementation", "inputs_embeds"):
        if kwargs.get(name) is not None:
            raise GenerationError(f"{what} has a cache of its own kind, found by tokens", where=name,
                                  mend=f"Leave {name} out, or call model.generate().")  # fmt: skip
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise GenerationError(
            "The prompt is given twice", where="inputs, input_ids", mend="Pass one of them."
        )
    named = kwargs.pop("input_ids", None)
    ids = named if inputs is None else inputs
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise GenerationError(
            "The prompt must be a tensor of token ids",
            where="input_ids",
            expected="[batch, length]",
            found=list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__,
            mend="Pass what the tokenizer returned: generate(**inputs).",
        )
    return ids
