# SPDX-License-Identifier: Apache-2.0
"""Requests of continuous batching: from a prompt and its settings to a row, and what is handed out."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrained.core.batching_config import ContinuousBatchingConfig
from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.core.generation_fields import FIELDS
from pretrained.errors import GenerationError, NotYetError
from pretrained.torch.generation import warpers
from pretrained.torch.generation.checks import check_ids, vocabulary
from pretrained.torch.generation.inputs import GenerationInputs, lengths_of
from pretrained.torch.generation.logits import LogitsProcessorList
from pretrained.torch.generation.rules import build_criteria, build_processors
from pretrained.torch.generation.settings import settle
from pretrained.torch.generation.stopping import EosTokenCriteria, MaxTimeCriteria, StopStringCriteria

Prompt = str | Sequence[int] | torch.Tensor

# Settings of `generate` that have no place here, by the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "output_scores": (False,),
    "output_logits": (None, False),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "return_dict_in_generate": (False,),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (False,),
    "prefill_chunk_size": (None,),
    "compile_config": (None,),
}
_INSTEAD = {
    "num_return_sequences": "Pass the prompt as often as you want answers: its pages are shared.",
    "prefill_chunk_size": "Set max_batch_tokens of ContinuousBatchingConfig.",
}


class RequestStatus(enum.IntEnum):
    """Where a request is; from FINISHED on nothing more comes."""

    PENDING = 0
    PREFILLING = 1
    DECODING = 2
    FINISHED = 3
    FAILED = 4
    CANCELLED = 5


@dataclass
class GenerationOutput:
    """The answer to one request, or what there is of it so far.

    Attributes:
        request_id: Its name.
        prompt_ids: Tokens of the prompt.
        generated_tokens: Tokens after it.
        logprobs: Logarithm of each one's probability, with `ContinuousBatchingConfig.return_logprobs`.
        error: What went wrong, or None.
        status: Where the request is.
        created_time: ``time.perf_counter()`` when it was made.
        lifespan: The same when it began to run and when it ended; -1 before.
        timestamps: The same for each new token, where asked for.
        finish_reason: ``"stop"`` at a token or text that ends it, ``"length"``, ``"time"``, or None.
        text: The new tokens as text, without special tokens, where there is a tokenizer.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1.0, -1.0)
    timestamps: list[float] | None = None
    finish_reason: str | None = None
    text: str | None = None

    def is_finished(self) -> bool:
        """Whether nothing more comes: the answer is whole, cancelled, or failed."""
        return self.status >= RequestStatus.FINISHED


@dataclass(eq=False, slots=True)
class Row:
    """A request while it is answered.

    Attributes:
        output: What is handed out at the end.
        tokens: The prompt and the new tokens.
        prompt_length: Tokens of the prompt.
        max_length: Where it ends, prompt included.
        ends: Tokens that end it.
        max_time: Seconds that it may run, or None.
        stops: Looks for stop strings, or None.
        processors: Rules on the scores; empty for none.
        reads_tokens: Whether any of them looks at the tokens so far.
        seed: Where its chance comes from; None where the likeliest token is taken.
        streaming: Whether every new token is handed out.
        computed: Tokens whose keys and values are in pages.
        pages: Those pages.
        known: How many of them the cache knows by their content, and that of the last.
    """

    output: GenerationOutput
    tokens: list[int]
    prompt_length: int
    max_length: int
    ends: frozenset[int]
    max_time: float | None
    stops: StopStringCriteria | None
    processors: LogitsProcessorList
    reads_tokens: bool
    seed: int | None
    streaming: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    known: tuple[int, int | None] = (0, None)
    _generator: torch.Generator | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the next token is simply the likeliest one."""
        return self.seed is None and not self.processors

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the source of chance.

        Args:
            device: Where the scores are.
        """
        if self._generator is None:
            assert self.seed is not None
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def copy_of_output(self) -> GenerationOutput:
        """Return the answer so far."""
        now = self.output
        return GenerationOutput(
            request_id=now.request_id,
            prompt_ids=now.prompt_ids,
            generated_tokens=self.tokens[self.prompt_length :],
            logprobs=list(now.logprobs),
            status=now.status,
            created_time=now.created_time,
            lifespan=now.lifespan,
            timestamps=None if now.timestamps is None else list(now.timestamps),
        )


class Requests:
    """Makes rows of one model's prompts; what they have in common is settled once.

    Args:
        model: The model.
        generation_config: Settings of all, or None.
        settings: Further fields of `GenerationConfig` for all, by name.
        batching: Gives requests without a seed theirs.
        tokenizer: For prompts and stop strings that are texts; None for none.
        logits_processor: Rules on the scores of all.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig | None,
        settings: Mapping[str, Any],
        batching: ContinuousBatchingConfig,
        *,
        tokenizer: Any = None,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._batching = model, tokenizer, batching
        self._given = generation_config
        self._settings = dict(settings)
        self._rules = list(logits_processor or ())
        self._vocabulary = vocabulary(model)
        self._device = input_device(model)
        self._count = 0
        self._names: set[str] = set()
        self._settled = self._settle({})

    def row(
        self,
        prompt: Prompt,
        request_id: str | None = None,
        *,
        seed: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **settings: Any,
    ) -> Row:
        """Make a row of a prompt.

        Args:
            prompt: Token ids, [length] or [1, length] where they are a tensor; or a text.
            request_id: Its name; None for ``req_0``, ``req_1`` and so on.
            seed: Makes sampling repeatable.
            streaming: Hand out every new token.
            record_timestamps: Note when each one came.
            **settings: Fields of `GenerationConfig`, which win over those of all.

        Raises:
            GenerationError: the prompt or a setting cannot work.
            NotYetError: a setting whose feature is not offered here.
        """
        number, self._count = self._count, self._count + 1
        config, by_user = self._settle(settings) if settings else self._settled
        name = f"req_{number}" if request_id is None else str(request_id)
        ids = self._ids(prompt, name)
        if name in self._names:
            raise GenerationError("Two requests have the same name", where="request_id", found=name)
        self._names.add(name)
        inputs = GenerationInputs(input_ids=ids, encoder_input_ids=ids)
        lengths = lengths_of(self._model, config, by_user, inputs)
        processors = build_processors(config, lengths, inputs, user=self._rules, vocab_size=self._vocabulary)
        criteria = build_criteria(config, lengths, tokenizer=self._tokenizer)
        tokens: list[int] = ids[0].tolist()
        ends = [rule.eos_token_id for rule in criteria if isinstance(rule, EosTokenCriteria)]
        output = GenerationOutput(name, list(tokens), timestamps=[] if record_timestamps else None)
        return Row(
            output=output,
            tokens=tokens,
            prompt_length=len(tokens),
            max_length=lengths.max_length,
            ends=frozenset(torch.cat(ends).tolist() if ends else ()),
            max_time=next((rule.max_time for rule in criteria if isinstance(rule, MaxTimeCriteria)), None),
            stops=next((rule for rule in criteria if isinstance(rule, StopStringCriteria)), None),
            processors=processors,
            reads_tokens=any(type(rule).__module__ != warpers.__name__ for rule in processors),
            seed=self._seed(seed, number) if config.do_sample else None,
            streaming=streaming,
        )

    def finish(self, row: Row) -> GenerationOutput:
        """Return the answer of a row that has ended, and forget its name.

        Args:
            row: The row.
        """
        self._names.discard(row.output.request_id)
        output = row.output
        output.generated_tokens = row.tokens[row.prompt_length :]
        if self._tokenizer is not None:
            output.text = self._tokenizer.decode(output.generated_tokens, skip_special_tokens=True)
        return output

    def failed(self, request_id: str | None, error: Exception) -> GenerationOutput:
        """Return the answer to a request that could not begin.

        Args:
            request_id: Its name; None for the one that was made up for it.
            error: What was wrong.
        """
        name = f"req_{self._count - 1}" if request_id is None else str(request_id)
        return GenerationOutput(name, error=f"{type(error).__name__}: {error}", status=RequestStatus.FAILED)

    def _settle(self, settings: Mapping[str, Any]) -> tuple[GenerationConfig, frozenset[str]]:
        fields = {**self._settings, **settings}
        own = fields.pop("cache_implementation", None)
        unknown = [name for name in settings if name not in FIELDS]
        if unknown:
            raise GenerationError(
                f"A request has no setting {unknown[0]!r}",
                where=unknown[0],
                expected="a field of GenerationConfig, or seed",
            )
        given = self._given
        if given is not None and given.cache_implementation is not None:
            own = own or given.cache_implementation
            given = GenerationConfig(**{n: given._values[n] for n in FIELDS if given.is_set(n)})
            del given.cache_implementation
        if own not in (None, "paged"):
            raise GenerationError(
                "Continuous batching keeps keys and values in pages",
                where="cache_implementation",
                expected='"paged"',
                found=repr(own),
                mend="Leave it out.",
            )
        config, inputs, by_user = settle(self._model, given, fields)
        if inputs:
            raise GenerationError(
                f"generate_batch() does not take {next(iter(inputs))!r}",
                where=next(iter(inputs)),
                expected="prompts without padding, and fields of GenerationConfig",
            )
        for name, neutral in _REFUSED.items():
            if getattr(config, name, neutral[0]) not in neutral and name in by_user:
                raise GenerationError(
                    f"{name}={getattr(config, name)!r} cannot be obeyed in continuous batching",
                    where=name,
                    mend=_INSTEAD.get(name, "Use generate() for it."),
                )
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise NotYetError(
                f"{mode.value} cannot be run in continuous batching",
                where="generate_batch",
                mend="Use generate() for it.",
            )
        return config, by_user

    def _ids(self, prompt: Prompt, name: str) -> torch.Tensor:
        """Return a prompt as [1, length] ids."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise GenerationError(
                    "A prompt is a text, and there is no tokenizer to make tokens of it",
                    where=f"inputs, request {name}",
                    mend="Pass tokenizer=..., or token ids.",
                )
            prompt = self._tokenizer(prompt)["input_ids"]
        if not isinstance(prompt, torch.Tensor):
            prompt = _tensor(prompt, name)
        ids = prompt[None] if prompt.dim() == 1 else prompt
        if ids.dim() == 2 and ids.shape[0] != 1:
            raise GenerationError(
                "A request is one prompt",
                where=f"inputs, request {name}",
                expected="[length] token ids",
                found=list(ids.shape),
                mend="Pass the rows one by one, without padding.",
            )
        return check_ids(ids.cpu(), self._vocabulary, f"inputs, request {name}").to(self._device)

    def _seed(self, seed: int | None, number: int) -> int:
        if seed is None and self._batching.seed is not None:
            seed = self._batching.seed + number
        if seed is None:
            # From torch's own source, so that torch.manual_seed makes a whole run repeatable.
            seed = int(torch.randint(2**62, ()))
        return seed


def _tensor(prompt: Any, name: str) -> torch.Tensor:
    where = f"inputs, request {name}"
    mend = "Pass a list of numbers, a tensor, or a text with tokenizer=..."
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise GenerationError(
            "A prompt must be token ids or a text", where=where, found=type(prompt).__name__, mend=mend
        )
    ids = list(prompt)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise GenerationError(
            "A prompt must be token ids or a text", where=where, found=repr(ids[:3])[:60], mend=mend
        )
    return torch.tensor(ids, dtype=torch.int64)


def input_device(model: Any) -> torch.device:
    """Return where tokens go in; the CPU where the first weights are not there yet (offloaded).

    Args:
        model: The model.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    device = getattr(weight, "device", None) or model.device
    return torch.device("cpu") if device.type == "meta" else device
