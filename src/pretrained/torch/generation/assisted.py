# SPDX-License-Identifier: Apache-2.0
"""Drafts that a model writes: a smaller one, or the first layers of the one that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.cache import Cache, EncoderDecoderCache, layer_windows
from pretrained.torch.generation.candidates import NO_TOKEN, Draft
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.logits import LogitsProcessorList
from pretrained.torch.generation.loop import Decoder, Sequences, last_logits
from pretrained.torch.generation.strategies import draw

MakeDecoder = Callable[..., Decoder]


@dataclass
class DraftLength:
    """How many tokens to draft next.

    Attributes:
        tokens: So many.
        schedule: "constant", or "heuristic" and "heuristic_transient": two more after a draft that was right
            as a whole, one less after another.
    """

    tokens: int
    schedule: str = "constant"

    def update(self, drafted: int, matched: int) -> None:
        """Learn how good the last draft was.

        Args:
            drafted: How many tokens it had.
            matched: How many of them were taken.
        """
        if self.schedule != "constant":
            self.tokens = self.tokens + 2 if matched >= drafted else max(1, self.tokens - 1)


@dataclass(frozen=True)
class DraftRules:
    """How a drafting model picks its tokens.

    Attributes:
        do_sample: Draw them; else take the best.
        threshold: A row's draft ends with a token whose probability is below this; 0 for never.
        eos_token_id: Tokens that end a row's draft.
        processors: Rules on the scores, the same as those of the model that checks.
        generator: Source of chance; None for torch's global one.
    """

    do_sample: bool = False
    threshold: float = 0.0
    eos_token_id: Sequence[int] = ()
    processors: LogitsProcessorList | None = None
    generator: torch.Generator | None = None


class AssistedCandidateGenerator:
    """Guesses what a smaller model of the same vocabulary writes.

    The smaller model keeps a cache of its own, which goes back to where its tokens were taken.

    Args:
        assistant_model: The smaller model.
        inputs: What it starts from; its `input_ids` are replaced by those of the first call.
        config: Settings for its decoder.
        length: How many tokens to draft.
        rules: How to pick them.
        make_decoder: Makes the decoder of a model.
        max_length: How long sequences can become.
        positions: How many positions the smaller model has; None where there is no end.
    """

    def __init__(
        self,
        assistant_model: Any,
        inputs: GenerationInputs,
        config: GenerationConfig,
        length: DraftLength,
        rules: DraftRules,
        *,
        make_decoder: MakeDecoder = Decoder,
        max_length: int,
        positions: int | None = None,
    ) -> None:
        self.assistant_model = assistant_model
        self.length = length
        self.rules = rules
        self._inputs, self._config, self._make = inputs, config, make_decoder
        self._max_length, self._positions = max_length, positions
        self._decoder: Decoder | None = None
        # What the decoder has run, and one token more where the last draft ended.
        self._sequences: Sequences | None = None
        self._fed = 0

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return what the smaller model writes next.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not.
            limit: How many tokens a guess may have at most.
            is_open: For each row whether it is not finished yet.
        """
        count = min(self.length.tokens, limit)
        if self._positions is not None:
            # The last drafted token is not fed back.
            count = min(count, self._positions - input_ids.shape[1] + 1)
        if count < 1:
            return Draft.empty(input_ids)
        logits = self._catch_up(input_ids, is_open, count)
        assert self._decoder is not None and self._sequences is not None
        draft = write_draft(self._decoder, self._sequences, logits, known, count, is_open, self.rules)
        self._fed = self._sequences.length - 1
        return draft

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Draft more or fewer tokens next time, as the schedule has it.

        Args:
            drafted: How many tokens the last draft had.
            matched: How many of them were taken.
        """
        self.length.update(drafted, matched)

    def _catch_up(self, ids: torch.Tensor, is_open: Sequence[bool], count: int) -> torch.Tensor:
        """Run what the smaller model has not seen of these tokens; return its scores of the next."""
        new_tokens = self._max_length - ids.shape[1]
        if self._decoder is None or self._sequences is None:
            mask = self._inputs.attention_mask
            if mask is not None:
                more = mask.new_ones((ids.shape[0], ids.shape[1] - mask.shape[1]))
                mask = torch.cat([mask, more], dim=1)
            inputs = replace(self._inputs, input_ids=ids, attention_mask=mask)
            self._decoder = self._make(self.assistant_model, inputs, self._config, new_tokens, margin=count)
            self._sequences = Sequences(ids, new_tokens)
            return last_logits(self._decoder.prefill())
        right = self._agreed(ids, is_open)
        self._decoder.take_back(self._fed - right)
        self._sequences.cut(right - self._sequences.prompt_length)
        for column in ids[:, right:].unbind(1):
            self._sequences.append(column)
        if self._decoder.cache is not None:
            self._decoder.cache.keep_margin(count + 1)
        if ids.shape[1] - right == 1:
            return last_logits(self._decoder.step(ids[:, -1], self._sequences))
        return last_logits(self._decoder.extend(ids[:, right:], ids))

    def _agreed(self, ids: torch.Tensor, is_open: Sequence[bool]) -> int:
        """Return how many of the tokens that were run are still right; the newest is always run again."""
        assert self._sequences is not None
        most = min(self._fed, ids.shape[1] - 1)
        begin = self._sequences.prompt_length
        wrong = self._sequences.ids[:, begin:most] != ids[:, begin:most]
        wrong = wrong[torch.tensor(is_open, device=wrong.device)].any(0)
        places = wrong.nonzero()
        return begin + int(places[0]) if places.numel() else most


class EarlyExitCandidateGenerator:
    """Guesses what a model's own first layers say, sent through its last norm and its head.

    They share the model's cache, so that nothing is computed twice, and no memory is taken. Neither the
    model nor its config is changed: the shorter model is a view with the same layers.

    Args:
        decoder: Of the model; at each call it has run all tokens but the newest.
        layers: How many layers to run.
        length: How many tokens to draft.
        rules: How to pick them.

    Raises:
        GenerationError: the model does not have more layers than that.
        NotYetError: its layers are not to be found.
    """

    def __init__(self, decoder: Decoder, layers: int, length: DraftLength, rules: DraftRules) -> None:
        self.assistant_model = first_layers(decoder.model, layers)
        self.length = length
        self.rules = rules
        self._decoder, self._layers = decoder, layers
        self._fork: Decoder | None = None

    def get_candidates(
        self, input_ids: torch.Tensor, known: torch.Tensor, limit: int, is_open: Sequence[bool]
    ) -> Draft:
        """Return what the first layers write next.

        Args:
            input_ids: [rows, length] tokens of which every row is sure.
            known: [rows, ahead] further tokens that some rows are sure of already, -1 where not.
            limit: How many tokens a guess may have at most.
            is_open: For each row whether it is not finished yet.
        """
        count = min(self.length.tokens, limit)
        whole = self._decoder.cache
        if self._fork is None:
            cache = None if whole is None else _first_caches(whole, self._layers)
            self._fork = self._decoder.fork(self.assistant_model, cache)
        if whole is not None:
            whole.keep_margin(count + 1)
        decoder, sequences = self._fork, Sequences(input_ids, count)
        decoder.follow(self._decoder)
        logits = last_logits(decoder.step(input_ids[:, -1], sequences))
        draft = write_draft(decoder, sequences, logits, known, count, is_open, self.rules)
        decoder.take_back(draft.tokens.shape[1])
        return draft

    def update_candidate_strategy(self, drafted: int, matched: int) -> None:
        """Draft more or fewer tokens next time, as the schedule has it.

        Args:
            drafted: How many tokens the last draft had.
            matched: How many of them were taken.
        """
        self.length.update(drafted, matched)


def write_draft(
    decoder: Decoder,
    sequences: Sequences,
    logits: torch.Tensor,
    known: torch.Tensor,
    count: int,
    is_open: Sequence[bool],
    rules: DraftRules,
) -> Draft:
    """Let a model write the next tokens, one after the other.

    Args:
        decoder: Of the drafting model.
        sequences: All tokens so far; the drafted ones are added. All but the last of them are run.
        logits: [rows, vocab] scores of the next token.
        known: [rows, ahead] tokens that are decided already, -1 where not: these are fed.
        count: How many tokens to write, 1 or more.
        is_open: For each row whether it needs a draft.
        rules: How to pick the tokens.
    """
    going_on = torch.tensor(is_open, device=logits.device)
    ends = torch.tensor(list(rules.eos_token_id), dtype=torch.int64, device=logits.device)
    columns, drawn_from = [], []
    for column in range(count):
        scores = rules.processors(sequences.ids, logits) if rules.processors else logits
        probs = scores.softmax(-1) if rules.do_sample or rules.threshold > 0 else None
        if rules.do_sample and probs is not None:
            _, tokens = draw(probs, rules.generator)
            drawn_from.append(probs)
        else:
            tokens = scores.argmax(-1)
        # A decided token is fed whatever this model thinks of it.
        decided = known[:, column] if column < known.shape[1] else torch.full_like(tokens, NO_TOKEN)
        tokens = torch.where(decided >= 0, decided, tokens)
        columns.append(torch.where(going_on | (decided >= 0), tokens, NO_TOKEN))
        sequences.append(tokens)
        if column == count - 1:
            break
        if probs is not None and rules.threshold > 0:
            sure = probs.gather(1, tokens[:, None])[:, 0] >= rules.threshold
            going_on = going_on & (sure | (decided >= 0))
        if rules.eos_token_id:
            going_on = going_on & ~(tokens[:, None] == ends).any(-1)
        if not bool(going_on.any()):
            break
        logits = last_logits(decoder.step(tokens, sequences))
    return Draft(torch.stack(columns, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None)


# -- the first layers of a model -----------------------------------------------------------------


def first_layers(model: Any, layers: int) -> Any:
    """Return a view of a model that runs only its decoder's first layers, then its norm and head.

    Every module but those on the way to the list of layers is the model's own. The view has no hooks of
    the whole model, and is of use for forwards only.

    Args:
        model: The model; nothing of it is changed.
        layers: How many layers to run.

    Raises:
        GenerationError: the model does not have more layers than that.
        NotYetError: its layers are not to be found.
    """
    count = len(layer_windows(model.config))
    if layers >= count:
        raise GenerationError(
            f"assistant_early_exit={layers} leaves no layer out",
            where="assistant_early_exit",
            expected=f"1 to {count - 1}: the model has {count} layers" if count > 1 else "a deeper model",
            mend="A third to a half of the layers is a good beginning.",
        )
    body = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is body), None)
    lists = [
        name
        for name, module in body.named_children()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if path is None or len(lists) != 1:
        raise NotYetError(
            f"The layers of {type(model).__name__} are not to be found, so it cannot leave early",
            where="assistant_early_exit",
            mend="Pass a smaller model as assistant_model.",
        )
    view = inner = _shallow(model)
    for name in path.split(".") if path else ():
        inner._modules[name] = _shallow(inner._modules[name])
        inner = inner._modules[name]
    inner._modules[lists[0]] = inner._modules[lists[0]][:layers]
    for name, value in vars(inner).items():
        # What a model keeps for each layer beside the list, such as Llama's windows.
        if isinstance(value, tuple) and len(value) == count:
            vars(inner)[name] = value[:layers]
    return view


def _shallow(module: Any) -> Any:
    """Return another module object with the same submodules, parameters and attributes."""
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_modules"] = dict(module._modules)
    # Set on one object, it would run the whole model.
    other.__dict__.pop("forward", None)
    return other


def _first_caches(cache: Cache, layers: int) -> Cache:
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(Cache(cache.layers[:layers]), cache.cross_attention_cache)
    return Cache(cache.layers[:layers])
