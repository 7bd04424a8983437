# SPDX-License-Identifier: Apache-2.0
"""`GenerationMixin`: the door to generation. Its methods are short; the rooms are beside this file.

A call goes settings -> inputs -> lengths -> rules -> strategy -> output. Everything is decided before the
first forward, and nothing of it stays on the model afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.errors import NotYetError
from pretrained.torch.cache import Cache
from pretrained.torch.generation import beams, strategies
from pretrained.torch.generation.batch_mixin import BatchGenerationMixin
from pretrained.torch.generation.compiled import choose_decoder
from pretrained.torch.generation.contrastive import contrastive
from pretrained.torch.generation.custom import (
    check_custom,
    load_custom,
    run_custom,
    run_loaded,
    take_own_arguments,
)
from pretrained.torch.generation.demands import check_demands
from pretrained.torch.generation.dola import dola
from pretrained.torch.generation.drafting import Drafting, build_candidates
from pretrained.torch.generation.guidance import guide
from pretrained.torch.generation.healing import for_healing, heal, heal_by_hand
from pretrained.torch.generation.inputs import GenerationInputs, lengths_of, prepare_inputs
from pretrained.torch.generation.loop import Decoder, HookedDecoder, Sequences, prepare_step
from pretrained.torch.generation.recorder import Recorder
from pretrained.torch.generation.rules import build_criteria, build_processors
from pretrained.torch.generation.scores import transition_scores
from pretrained.torch.generation.settings import RELEASE, settle
from pretrained.torch.generation.speculative import speculative
from pretrained.torch.generation.stopping import (
    EosTokenCriteria,
    InterruptCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)
from pretrained.torch.generation.synced import SyncedModel, settle_synced
from pretrained.torch.mapped_mixin import check_files

logger = logging.getLogger("pretrained.generation")

_STRATEGIES: dict[GenerationMode, Callable[[strategies.Run], None]] = {
    GenerationMode.GREEDY_SEARCH: strategies.greedy,
    GenerationMode.SAMPLE: strategies.sample,
    GenerationMode.BEAM_SEARCH: beams.beam_search,
    GenerationMode.BEAM_SAMPLE: beams.beam_search,
    GenerationMode.GROUP_BEAM_SEARCH: beams.group_beam_search,
    GenerationMode.CONSTRAINED_BEAM_SEARCH: beams.constrained_beam_search,
    GenerationMode.CONTRASTIVE_SEARCH: contrastive,
    GenerationMode.DOLA_GENERATION: dola,
    GenerationMode.ASSISTED_GENERATION: speculative,
}


class GenerationMixin(BatchGenerationMixin):
    """Gives a model with a language-model head `generate`.

    The model brings `config`, `generation_config` and `forward`; an encoder-decoder `get_encoder` too.
    """

    generation_config: GenerationConfig | None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[Callable[..., torch.Tensor]] | None = None,
        stopping_criteria: Iterable[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], Any] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        use_model_defaults: bool | None = None,
        custom_generate: Any = None,
        *,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        assistant_tokenizer: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate token ids that follow a prompt.

        What the call says wins over `generation_config`, that over the model's own, that over defaults.
        Without any length, 20 new tokens are generated.

        Args:
            inputs: [batch, length] token ids: the prompt, or the encoder's input. Padded rows are padded on
                the left (an encoder's on either side) and come with `attention_mask`.
            generation_config: Settings; fields may also be passed by name.
            logits_processor: Rules on the scores, applied after the config's and before the sampling filters.
            stopping_criteria: Rules for stopping, beside the config's.
            prefix_allowed_tokens_fn: ``f(row, ids) -> allowed ids``.
            synced_gpus: True to run forwards until the last process of torch.distributed is finished, for a
                model that several processes hold parts of; None to look whether FSDP made it so.
            assistant_model: A smaller model that drafts tokens, which this one checks several at a time; the
                text stays the same. Fields `num_assistant_tokens` and others say how.
            streamer: Is given the tokens as they come (`TextStreamer` and others).
            negative_prompt_ids: [batch, length] or [1, length] what `guidance_scale` moves away from; None
                for the prompt's last token alone.
            negative_prompt_attention_mask: Its mask.
            use_model_defaults: False to leave out the model's own settings.
            custom_generate: A function that decodes in place of a strategy: ``f(model, input_ids,
                logits_processor=..., stopping_criteria=..., generation_config=..., **model_inputs)``, whose
                result is returned. Or a folder or hub id with custom_generate/generate.py, whose function
                `generate` is given the model and the arguments of this call; see `trust_remote_code`.
            generator: Source of chance for sampling; None for torch's global one.
            tokenizer: For `stop_strings` and `token_healing`, and beside `assistant_tokenizer`.
            assistant_tokenizer: Of an assistant with another vocabulary.
            trust_remote_code: True to let the file that `custom_generate` names run. A repository also needs
                its `revision`.
            **kwargs: Fields of `GenerationConfig` (None switches one off) and inputs of the model
                (`attention_mask`, `inputs_embeds`, `encoder_outputs`, `past_key_values`, ...).

        Returns:
            [batch * num_return_sequences, length] ids, the prompt (or the decoder's start) included and
            finished rows filled with the padding token; or with `return_dict_in_generate=True` a
            `GenerateDecoderOnlyOutput` or `GenerateEncoderDecoderOutput`.

        Raises:
            GenerationError: a setting or an input that cannot work; before the first forward, except for
                scores that are not numbers.
            NotYetError: a setting whose feature does not exist yet.
        """
        check_custom(custom_generate)
        if custom_generate is not None and not callable(custom_generate):
            # All further arguments are the function's, as they are.
            given = {
                "inputs": inputs,
                "generation_config": generation_config,
                "logits_processor": logits_processor,
                "stopping_criteria": stopping_criteria,
                "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
                "synced_gpus": synced_gpus,
                "assistant_model": assistant_model,
                "streamer": streamer,
                "negative_prompt_ids": negative_prompt_ids,
                "negative_prompt_attention_mask": negative_prompt_attention_mask,
                "generator": generator,
                "tokenizer": tokenizer,
                "assistant_tokenizer": assistant_tokenizer,
            }
            return run_loaded(self, custom_generate, trust_remote_code, given, kwargs)
        own = take_own_arguments(custom_generate, self, kwargs)
        config, model_inputs, by_user = settle(self, generation_config, kwargs, use_model_defaults)
        mode = config.get_generation_mode(assistant_model)
        check_demands(
            self,
            config,
            mode,
            model_inputs,
            streamer=streamer,
            tokenizer=tokenizer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        drafting = Drafting(assistant_model, tokenizer, assistant_tokenizer).checked(
            self, config, by_user, model_inputs
        )
        strategy: Callable[[strategies.Run], Any] | None = _STRATEGIES.get(mode)
        synced = settle_synced(self, synced_gpus, mode)
        runner: Any = SyncedModel(self) if synced else self
        if custom_generate is not None:
            more = {
                "streamer": streamer,
                "tokenizer": tokenizer,
                "generator": generator,
                "assistant_model": assistant_model,
                "synced_gpus": synced or None,
            }
            strategy = functools.partial(run_custom, custom_generate, own, more)
        if strategy is None:
            raise NotYetError(f"{mode.value} cannot be run yet", mend=RELEASE)
        check_files(self)
        prepared = for_healing(config, prepare_inputs(self, config, inputs, model_inputs))
        lengths = lengths_of(self, config, by_user, prepared)
        processors = build_processors(
            config,
            lengths,
            prepared,
            user=logits_processor,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            vocab_size=getattr(self.config, "vocab_size", None),  # type: ignore[attr-defined]
        )
        processors = guide(
            runner, config, mode, prepared, processors, negative_prompt_ids, negative_prompt_attention_mask
        )
        criteria = build_criteria(config, lengths, tokenizer=tokenizer, user=stopping_criteria)
        lengths = lengths.reaching(criteria.max_length)
        behind = _may_look_behind(prepared, criteria, streamer)
        # Contrastive search runs the last token too, to see what it would be like.
        ahead = int(strategy is contrastive)
        heal(runner, config, prepared, tokenizer)
        run = strategies.Run(
            model=runner,
            config=config,
            inputs=prepared,
            lengths=lengths,
            decoder=choose_decoder(self, prepared, config, mode, _decoder_of(self))(
                self, prepared, config, lengths.new_tokens + ahead, margin=int(behind) + ahead
            ),
            sequences=Sequences(prepared.input_ids, lengths.new_tokens),
            processors=processors,
            criteria=criteria,
            recorder=Recorder(config, own_rules=bool(logits_processor)),
            pad_token_id=_padding(config),
            streamer=streamer,
            generator=generator,
            behind=behind,
        )
        run.candidates = build_candidates(run, drafting, prepared, _decoder_of)
        run.decoder.model = runner
        with runner if synced else contextlib.nullcontext():
            result = _stream(strategy, run, ends=custom_generate is None)
        if custom_generate is not None:
            return result
        sequences = run.sequences.ids.contiguous()
        if not config.return_dict_in_generate:
            return sequences
        return run.recorder.output(sequences, prepared, run.decoder.cache)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of one forward; override it to change what a model is fed.

        `generate` calls it at every step if a class overrides it, and works them out itself otherwise.

        Args:
            input_ids: [rows, length] all tokens so far; only those at `cache_position` are run.
            past_key_values: The cache, or None.
            attention_mask: [rows, seen] mask of the decoder, or of the encoder where there is one.
            inputs_embeds: [rows, length, hidden] the prompt as vectors, at the first step only.
            cache_position: [new] positions of the tokens to run; None for all that the cache lacks.
            use_cache: Whether to fill the cache.
            **kwargs: Passed on to the forward.
        """
        return prepare_step(
            self, input_ids, past_key_values, attention_mask, inputs_embeds, cache_position, use_cache, kwargs
        )

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """Return the score of each generated token.

        Args:
            sequences: [rows, length] as `generate` returned them.
            scores: Their scores, with ``output_scores=True``.
            beam_indices: [rows, new] which row each token came from, for beam search; negative after its end.
            normalize_logits: Return logarithms of probabilities, whatever the scores are.

        Returns:
            [rows, new].
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)

    def heal_tokens(self, input_ids: torch.Tensor, tokenizer: Any = None) -> torch.Tensor:
        """Replace each prompt's last token by the likeliest one whose text begins like it.

        Args:
            input_ids: [batch, length], padded on the left with the tokenizer's padding token.
            tokenizer: The tokenizer of the prompt.

        Returns:
            [batch, length].

        Raises:
            GenerationError: no tokenizer, an encoder-decoder, or ids that are none.
        """
        return heal_by_hand(self, input_ids, tokenizer)

    def load_custom_generate(
        self,
        pretrained_model_name_or_path: str | None = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Callable[..., Any]:
        """Return the function `generate` of custom_generate/generate.py in a folder or repository.

        Args:
            pretrained_model_name_or_path: Folder or hub id; None for where the model is from.
            trust_remote_code: True to let that file run; read it first.
            **kwargs: Hub arguments; a repository needs its `revision`.

        Raises:
            ConfigError: the code was not trusted, or fails.
            ArgumentError: a repository, and no revision of it.
            FileError: there is no such file.
        """
        return load_custom(pretrained_model_name_or_path, self, trust_remote_code, dict(kwargs))


def _padding(config: GenerationConfig) -> int | None:
    """Return what finished rows are filled with."""
    pad: int | None = config.pad_token_id
    if pad is not None or config.eos_token_id is None:
        return pad
    ends = config.eos_token_id
    eos: int = ends if isinstance(ends, int) else ends[0]
    logger.info("There is no pad_token_id; finished rows are filled with eos_token_id=%d.", eos)
    return eos


def _may_look_behind(inputs: GenerationInputs, criteria: StoppingCriteriaList, streamer: Any) -> bool:
    """Whether nobody needs the tokens on the host, so that it need not wait for the device."""
    on_device = (EosTokenCriteria, InterruptCriteria, MaxLengthCriteria, MaxTimeCriteria)
    return (
        inputs.input_ids.is_cuda
        and streamer is None
        and all(isinstance(rule, on_device) for rule in criteria)
    )


def _decoder_of(model: Any) -> type[Decoder]:
    hook = getattr(model.prepare_inputs_for_generation, "__func__", None)
    is_hooked = hook is not GenerationMixin.prepare_inputs_for_generation
    return HookedDecoder if is_hooked else Decoder


def _stream(strategy: Callable[[strategies.Run], Any], run: strategies.Run, *, ends: bool = True) -> Any:
    """Run a strategy with its streamer told of the beginning and, with `ends`, of every kind of end."""
    streamer = run.streamer
    if streamer is None:
        return strategy(run)
    try:
        streamer.put(run.sequences.ids.cpu())
        result = strategy(run)
    except BaseException as error:
        # Whoever reads the stream in another thread must not wait for ever.
        getattr(streamer, "fail", lambda _: streamer.end())(error)
        raise
    if ends:
        streamer.end()
    return result
