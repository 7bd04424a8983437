# SPDX-License-Identifier: Apache-2.0
"""The decoder's moves, shared by every strategy: run the prompt, then one token at a time, or several.

What is passed to the model is decided here once. A step does no more than put the new tokens, the next
slice of the mask and the next positions where the model expects them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError
from pretrained.torch.cache import Cache, EncoderDecoderCache
from pretrained.torch.generation.caches import make_cache
from pretrained.torch.generation.inputs import GenerationInputs, repeat_inputs, repeat_rows
from pretrained.torch.generation.settings import parameters
from pretrained.torch.steps.common import DecodeStep, DecodeWindow, find_step, find_window, run_step


class Sequences:
    """Token ids of all rows, in one buffer that is filled from the left.

    Args:
        prompt: [rows, length] ids to begin with.
        new_tokens: How many more there may be.
    """

    # A limit of a hundred thousand tokens is often only a bound, so the buffer starts small and doubles.
    _FIRST = 1024

    def __init__(self, prompt: torch.Tensor, new_tokens: int) -> None:
        self.length = prompt.shape[1]
        self.prompt_length = self.length
        self._buffer = prompt.new_empty((prompt.shape[0], self.length + min(new_tokens, self._FIRST)))
        self._buffer[:, : self.length] = prompt

    @property
    def ids(self) -> torch.Tensor:
        """[rows, length] ids so far; a view that later tokens leave as it is."""
        return self._buffer[:, : self.length]

    def append(self, tokens: torch.Tensor) -> None:
        """Add each row's next token.

        Args:
            tokens: [rows].
        """
        if self.length == self._buffer.shape[1]:
            old = self._buffer
            self._buffer = old.new_empty((old.shape[0], 2 * old.shape[1]))
            self._buffer[:, : self.length] = old
        self._buffer[:, self.length] = tokens
        self.length += 1

    def reorder(self, rows: torch.Tensor) -> None:
        """Let each row go on from another one.

        Args:
            rows: [rows] which row to take for each.
        """
        self._buffer = self._buffer.index_select(0, rows)

    def cut(self, new_tokens: int) -> None:
        """Keep the first new tokens.

        Args:
            new_tokens: How many.
        """
        self.length = min(self.length, self.prompt_length + new_tokens)


class Decoder:
    """Runs the model over the prompt, then over one new token of each row at a time.

    Args:
        model: The model.
        inputs: What it starts from.
        config: The settled config.
        new_tokens: How many steps there can be at most.
        margin: How many tokens may be taken back (see `DynamicCache`).
    """

    def __init__(
        self, model: Any, inputs: GenerationInputs, config: GenerationConfig, new_tokens: int, margin: int = 0
    ) -> None:
        self.model = model
        self._config = config
        self._inputs = inputs
        takes = parameters(type(model).forward)
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        self._ids_name = f"{prefix}input_ids"
        self._mask_name = f"{prefix}attention_mask"
        self._positions_name = f"{prefix}position_ids"
        self._takes_positions = self._positions_name in takes
        self._chunk = config.prefill_chunk_size
        self._config, self._new_tokens = config, new_tokens
        cached = config.use_cache and "past_key_values" in takes
        self.cache = make_cache(model, inputs, config, new_tokens, margin) if cached else None
        self._token_types: torch.Tensor | None = inputs.extra.get("token_type_ids")
        self._fixed = self._fixed_arguments()
        self._mask = self._open_mask(new_tokens)
        self._positions: torch.Tensor | None = None
        self.window: DecodeWindow | None = None
        self._fast: DecodeStep | None = None
        self._fast_rows = -1
        # Tokens that the model has seen, or would have without a cache.
        self._seen = inputs.past_length + max(inputs.input_ids.shape[1], _embeds_length(inputs))

    def prefill(self) -> Any:
        """Run the prompt; return the model's output, whose last logits are for the first new token."""
        inputs = self._inputs
        total, start = self._seen, inputs.past_length + inputs.skip
        if self._chunk is not None and self.cache is not None:
            while total - start > self._chunk:
                self._forward(start, start + self._chunk)
                start += self._chunk
        return self._forward(start, total)

    def step(self, tokens: torch.Tensor, sequences: Any) -> Any:
        """Run each row's newest token; return the model's output for the next one.

        Args:
            tokens: [rows] the newest tokens.
            sequences: All tokens, these included.
        """
        self._seen += 1
        if self.cache is None:
            return self._again(sequences.ids)
        mask = None if self._mask is None else self._mask[:, : self._seen]
        if self._positions is not None:
            self._positions = self._positions + 1
        if tokens.shape[0] != self._fast_rows:
            self._fast, self._fast_rows = self._fast_step(tokens.shape[0]), tokens.shape[0]
        if self._fast is not None:
            return run_step(self.model, self._fast, self.cache, tokens, self._seen - 1, self._positions, mask)
        arguments = dict(self._fixed)
        arguments[self._ids_name] = tokens[:, None]
        if mask is not None:
            arguments[self._mask_name] = mask
        if self._positions is not None:
            arguments[self._positions_name] = self._positions
        return self.model(**arguments)

    def spread(self, times: int) -> None:
        """Repeat each row for the beams that go on from it, its copies next to each other.

        What the decoder keeps of the encoder stays one for each prompt where the model can share it.

        Args:
            times: Beams of each prompt.
        """
        inputs, cache = self._inputs, self.cache
        # A cache of the user's may have a row for each beam already; then there is nothing to share.
        narrow = cache is None or cache.batch_size in (-1, inputs.rows)
        shared = narrow and getattr(self.model, "_beams_share_encoder", False)
        if narrow and cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) and shared else cache
            own.batch_repeat_interleave(times)
        self._inputs = repeat_inputs(inputs, times)
        if shared:
            self._inputs = replace(
                self._inputs,
                encoder_outputs=inputs.encoder_outputs,
                encoder_attention_mask=inputs.encoder_attention_mask,
            )
        self._mask = repeat_rows(self._mask, inputs.rows, times)
        self._positions = repeat_rows(self._positions, inputs.rows, times)
        self._token_types = repeat_rows(self._token_types, inputs.rows, times)
        self._fixed = self._fixed_arguments()

    def ask(self, **arguments: Any) -> None:
        """Pass further arguments to every forward.

        Args:
            **arguments: Such as ``output_hidden_states=True``.
        """
        self._fixed.update(arguments)

    def widen(self, times: int) -> None:
        """Repeat every row after the prompt has run, its copies next to each other.

        Args:
            times: How often; further steps take so many times the tokens.
        """
        batch = self._inputs.rows
        self._fixed = {
            name: value if name == "past_key_values" else repeat_rows(value, batch, times)
            for name, value in self._fixed.items()
        }
        self._mask = repeat_rows(self._mask, batch, times)
        self._positions = repeat_rows(self._positions, batch, times)
        self._token_types = repeat_rows(self._token_types, batch, times)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(times)

    def extend(self, tokens: torch.Tensor, ids: torch.Tensor) -> Any:
        """Run several tokens of each row at once; return the model's output, with logits for each of them.

        What turns out wrong of them is taken back with `take_back`.

        Args:
            tokens: [rows, new] tokens that follow those run so far.
            ids: [rows, length] all tokens, these included.
        """
        new = tokens.shape[1]
        self._seen += new
        if self.cache is None:
            return self._again(ids, keep=new)
        self.cache.keep_margin(new)
        if self.window is not None:
            return self._run_window(self.window, tokens)
        arguments = dict(self._fixed)
        arguments[self._ids_name] = tokens
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = new
        if self._mask is not None:
            arguments[self._mask_name] = self._mask[:, : self._seen]
        if self._positions is not None:
            positions = self._positions + torch.arange(1, new + 1, device=self._positions.device)
            arguments[self._positions_name], self._positions = positions, positions[..., -1:]
        if self._token_types is not None:
            arguments["token_type_ids"] = self._token_types[:, -1:].expand(-1, new)
        return self.model(**arguments)

    def reorder(self, rows: torch.Tensor) -> None:
        """Let each row go on from what another one has seen.

        Args:
            rows: [rows] which row to take for each; only rows of the same prompt may change places, as
                masks, positions and everything that comes from the encoder stay.
        """
        cache = self._own_cache()
        if cache is not None:
            cache.reorder_cache(rows)

    def copy_rows(self, rows: torch.Tensor, sources: torch.Tensor, newest: int) -> None:
        """Let some rows go on from others of the same prompt that differ in their newest tokens only.

        Args:
            rows: [changed] which rows.
            sources: [changed] which row to take for each.
            newest: How many tokens at the end may differ.
        """
        cache = self._own_cache()
        if cache is not None:
            cache.copy_rows(rows, sources, newest)

    def _own_cache(self) -> Cache | None:
        """Return the cache of the decoder's own tokens."""
        return self.cache.self_attention_cache if isinstance(self.cache, EncoderDecoderCache) else self.cache

    def take_back(self, tokens: int) -> None:
        """Forget the newest tokens: remove them from the cache, and count on from before them.

        Args:
            tokens: How many.
        """
        if not tokens:
            return
        self._seen -= tokens
        if self._positions is not None:
            self._positions = self._positions - tokens
        if self.cache is not None:
            self.cache.crop(-tokens)

    def open_windows(self) -> None:
        """Let `extend` run what stands in for the model's forward, where something may; after the prompt."""
        if self.cache is not None and self._may_stand_in():
            copies, steps = self._config.weight_copies, self._new_tokens
            self.window = find_window(self.model, self._inputs.rows, self.cache, copies, steps)

    def _run_window(self, window: DecodeWindow, tokens: torch.Tensor) -> Any:
        assert self.cache is not None
        new, positions = tokens.shape[1], None
        if self._positions is not None:
            positions = self._positions + torch.arange(1, new + 1, device=self._positions.device)
            self._positions = positions[..., -1:]
        mask = None if self._mask is None else self._mask[:, : self._seen]
        return run_step(self.model, window, self.cache, tokens, self._seen - new, positions, mask)

    def _may_stand_in(self) -> bool:
        """Whether nothing is asked of the forwards but logits."""
        ours = {"return_dict", "use_cache", "past_key_values", "logits_to_keep"}
        if self._inputs.encoder_outputs is not None:
            ours |= {"encoder_outputs", "attention_mask"}
        return ours.issuperset(self._fixed) and self._fixed.get("logits_to_keep", 1) == 1

    def _fast_step(self, rows: int) -> DecodeStep | None:
        """Return what stands in for the model's forward from now on, or None where nothing may."""
        if not self._may_stand_in():
            return None
        assert self.cache is not None
        encoder_mask = self._fixed.get("attention_mask")
        copies, steps = self._config.weight_copies, self._new_tokens
        return find_step(self.model, rows, self.cache, copies, steps, encoder_mask)

    def fork(self, model: Any, cache: Cache | None) -> Decoder:
        """Return a decoder that goes on from here with another model and cache; this one stays as it is.

        Args:
            model: Takes the same arguments.
            cache: Holds the same tokens; None where this one has none.
        """
        other = copy.copy(self)
        other.model, other.cache = model, cache
        other._fast, other._fast_rows, other.window = None, -1, None
        other._fixed = {name: value for name, value in self._fixed.items() if not name.startswith("output_")}
        if cache is not None:
            other._fixed["past_key_values"] = cache
        return other

    def follow(self, other: Decoder) -> None:
        """Count on from where the decoder is that this one was forked from; their caches share the tokens.

        Args:
            other: That decoder.
        """
        self._seen, self._positions = other._seen, other._positions

    def _forward(self, start: int, end: int) -> Any:
        """Run prompt positions `start` to `end`, counted from the first token that the cache knows."""
        inputs = self._inputs
        arguments = dict(self._fixed)
        first, last = start - inputs.past_length, end - inputs.past_length
        if inputs.inputs_embeds is not None:
            arguments["inputs_embeds"] = inputs.inputs_embeds[:, first:last]
        else:
            arguments[self._ids_name] = inputs.input_ids[:, first:last]
        if self._mask is not None:
            arguments[self._mask_name] = self._mask[:, :end]
        positions = self._prompt_positions(start, end)
        if positions is not None:
            arguments[self._positions_name] = positions
            self._positions = positions[:, -1:]
        if self._token_types is not None:
            arguments["token_type_ids"] = self._token_types[:, first:last]
        return self.model(**arguments)

    def _again(self, ids: torch.Tensor, keep: int = 1) -> Any:
        """Run everything again, for want of a cache; for the logits of the last tokens."""
        arguments = dict(self._fixed)
        inputs = self._inputs
        if "logits_to_keep" in arguments and keep > 1:
            arguments["logits_to_keep"] = keep
        if inputs.inputs_embeds is not None:
            new = self.model.get_input_embeddings()(ids[:, inputs.input_ids.shape[1] :])
            arguments["inputs_embeds"] = torch.cat(
                [inputs.inputs_embeds, new.to(inputs.inputs_embeds.dtype)], 1
            )
        else:
            arguments[self._ids_name] = ids
        if self._mask is not None:
            arguments[self._mask_name] = self._mask[:, : self._seen]
        positions = self._prompt_positions(0, self._seen)
        if positions is not None:
            arguments[self._positions_name] = positions
        if self._token_types is not None:
            types = self._token_types
            more = types[:, -1:].expand(-1, self._seen - types.shape[1])
            arguments["token_type_ids"] = torch.cat([types, more], dim=1)
        return self.model(**arguments)

    def _fixed_arguments(self) -> dict[str, Any]:
        inputs, takes = self._inputs, parameters(type(self.model).forward)
        fixed: dict[str, Any] = dict(inputs.extra)
        fixed.pop("token_type_ids", None)
        if self._token_types is not None and self.cache is not None:
            # New tokens are of the last one's type.
            fixed["token_type_ids"] = self._token_types[:, -1:]
        if "return_dict" in takes:
            fixed["return_dict"] = True
        if "use_cache" in takes:
            fixed["use_cache"] = self.cache is not None
        if self.cache is not None:
            fixed["past_key_values"] = self.cache
        if "logits_to_keep" in takes:
            fixed.setdefault("logits_to_keep", 1)
        if inputs.encoder_outputs is not None:
            fixed["encoder_outputs"] = inputs.encoder_outputs
            fixed["attention_mask"] = inputs.encoder_attention_mask
        for flag in ("output_attentions", "output_hidden_states"):
            if getattr(self._config, flag):
                fixed[flag] = True
        return fixed

    def _open_mask(self, new_tokens: int) -> torch.Tensor | None:
        """Return the prompt's mask with room for the new tokens, all visible."""
        mask = self._inputs.attention_mask
        if mask is None:
            return None
        return torch.cat([mask, mask.new_ones((mask.shape[0], new_tokens))], dim=1)

    def _prompt_positions(self, start: int, end: int) -> torch.Tensor | None:
        """Return positions, or None where the model counts right by itself."""
        given, past = self._inputs.position_ids, self._inputs.past_length
        if not self._takes_positions:
            return None
        if given is not None:
            wanted = end - past
            if given.shape[-1] < wanted:
                more = torch.arange(1, wanted - given.shape[-1] + 1, device=given.device)
                given = torch.cat([given, given[..., -1:] + more], dim=-1)
            return given[..., start - past : wanted]
        if self._mask is None:
            return None
        return (self._mask[:, :end].cumsum(-1) - 1).clamp_(min=0)[:, start:]


class HookedDecoder(Decoder):
    """A decoder whose model prepares its own inputs: its class overrides `prepare_inputs_for_generation`."""

    def prefill(self) -> Any:
        """Run the prompt, as the model prepares it."""
        return self._hooked(self._inputs.input_ids, self._inputs.past_length + self._inputs.skip)

    def step(self, tokens: torch.Tensor, sequences: Any) -> Any:
        """Run each row's newest token, as the model prepares it.

        Args:
            tokens: [rows] the newest tokens.
            sequences: All tokens, these included.
        """
        self._seen += 1
        return self._hooked(sequences.ids, 0 if self.cache is None else self._seen - 1)

    def extend(self, tokens: torch.Tensor, ids: torch.Tensor) -> Any:
        """Run several tokens of each row at once, as the model prepares them.

        Args:
            tokens: [rows, new] tokens that follow those run so far.
            ids: [rows, length] all tokens, these included.
        """
        new = tokens.shape[1]
        if self.cache is not None:
            self.cache.keep_margin(new)
        self._seen += new
        return self._hooked(ids, 0 if self.cache is None else self._seen - new, keep=new)

    def _hooked(self, ids: torch.Tensor, start: int, keep: int = 1) -> Any:
        arguments = {name: value for name, value in self._fixed.items() if name != "past_key_values"}
        if "logits_to_keep" in arguments and keep > 1:
            arguments["logits_to_keep"] = keep
        mask = None if self._mask is None else self._mask[:, : self._seen]
        if self.model.config.is_encoder_decoder:
            arguments["decoder_attention_mask"] = mask
        else:
            arguments["attention_mask"] = mask
        if self._token_types is not None:
            arguments["token_type_ids"] = self._token_types
        embeds = self._inputs.inputs_embeds
        if embeds is not None and self._seen > self._inputs.past_length + embeds.shape[1]:
            if self.cache is None:
                raise GenerationError(
                    "A model that prepares its own inputs needs a cache to go on from inputs_embeds",
                    where="use_cache",
                    mend="Leave use_cache=False out.",
                )
            embeds = None
        prepared = self.model.prepare_inputs_for_generation(
            ids,
            past_key_values=self.cache,
            inputs_embeds=embeds,
            cache_position=torch.arange(start, self._seen, device=ids.device),
            **arguments,
        )
        return self.model(**prepared)


def prepare_step(
    model: Any,
    input_ids: torch.Tensor,
    past_key_values: Cache | None,
    attention_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    cache_position: torch.Tensor | None,
    use_cache: bool,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return a forward's arguments, as `GenerationMixin.prepare_inputs_for_generation` promises.

    Args:
        model: The model.
        input_ids: [rows, length] all tokens so far, or those that are new.
        past_key_values: The cache, or None.
        attention_mask: [rows, seen] mask of the decoder, or of the encoder where there is one.
        inputs_embeds: [rows, length, hidden] a prompt as vectors, for the first forward.
        cache_position: [new] positions of the tokens to run.
        use_cache: Whether to fill the cache.
        kwargs: Passed on.
    """
    takes = parameters(type(model).forward)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
    new = max(length - past, 1) if cache_position is None else cache_position.shape[0]
    prepared: dict[str, Any] = dict(kwargs)
    encoder = model.config.is_encoder_decoder
    if inputs_embeds is not None:
        prepared["inputs_embeds"] = inputs_embeds[:, -new:]
    else:
        prepared["decoder_input_ids" if encoder else "input_ids"] = input_ids[:, -new:]
    prepared["attention_mask"] = attention_mask
    if past_key_values is not None:
        prepared["past_key_values"] = past_key_values
    if "use_cache" in takes:
        prepared["use_cache"] = use_cache
    if not encoder and attention_mask is not None and attention_mask.dim() == 2 and "position_ids" in takes:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
        prepared.setdefault("position_ids", positions[:, -new:])
    types = prepared.get("token_type_ids")
    if types is not None and types.shape[1] != new:
        prepared["token_type_ids"] = types[:, -1:].expand(-1, new)
    return prepared


def last_logits(output: Any) -> torch.Tensor:
    """Return the scores of the next token, [rows, vocab] float32.

    Args:
        output: Of the model.
    """
    logits: torch.Tensor = output.logits
    last = logits[:, -1].float()
    # Copied out of a whole prompt's logits, so that these are freed.
    return last.clone() if logits.shape[1] > 1 and logits.dtype == last.dtype else last


def _embeds_length(inputs: GenerationInputs) -> int:
    return 0 if inputs.inputs_embeds is None else inputs.inputs_embeds.shape[1]
