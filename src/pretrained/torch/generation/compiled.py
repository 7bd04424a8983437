# SPDX-License-Identifier: Apache-2.0
"""Compiled steps: a decoder over a static cache, whose length is one of a few buckets.

On a CPU the layers are compiled, once for each bucket of lengths; on CUDA the step is captured as a graph,
which needs no compiler. Prompts run through the model as ever.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrained.core.compiling import as_compile_config
from pretrained.core.generation_checks import wants_compile
from pretrained.core.generation_config import GenerationConfig, GenerationMode
from pretrained.errors import GenerationError, MissingDependencyError, NotYetError
from pretrained.torch.cache import Cache, StaticCache
from pretrained.torch.generation.inputs import GenerationInputs
from pretrained.torch.generation.loop import Decoder, Sequences
from pretrained.torch.generation.settings import parameters
from pretrained.torch.outputs import CausalLMOutputWithPast
from pretrained.torch.regional import has_layers, hooked, stand_in

_LEAST_BUCKET = 128


def bucket(length: int) -> int:
    """Return the length of the static cache for a sequence: the next of 128, 256, 512, ...

    Args:
        length: Of the whole sequence.
    """
    return max(_LEAST_BUCKET, 1 << (length - 1).bit_length())


class _StaticDecoder(Decoder):
    """A decoder over a static cache of a bucket's length.

    Args:
        model: The model.
        inputs: What it starts from.
        config: The settled config.
        new_tokens: How many steps there can be at most.
        margin: How many tokens may be taken back.
    """

    def __init__(
        self, model: Any, inputs: GenerationInputs, config: GenerationConfig, new_tokens: int, margin: int = 0
    ) -> None:
        length = inputs.past_length + max(inputs.input_ids.shape[1], inputs.embeds_length) + new_tokens
        static = config.merged(GenerationConfig())
        static.cache_implementation = "static"
        static.max_cache_len = bucket(max(length, config.max_cache_len or 1))
        super().__init__(model, inputs, static, new_tokens, margin)

    def _next_arguments(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a step, mask left out."""
        assert self.cache is not None
        self._seen += 1
        arguments = dict(self._fixed)
        arguments[self._ids_name] = tokens[:, None]
        arguments["cache_position"] = torch.tensor([self.cache.get_seq_length()], device=tokens.device)
        if self._positions is not None:
            self._positions = self._positions + 1
            arguments[self._positions_name] = self._positions
        return arguments


class CompiledDecoder(_StaticDecoder):
    """Runs prompts through the model, and new tokens through its compiled layers."""

    _compiled: Any = None

    def step(self, tokens: torch.Tensor, sequences: Sequences) -> Any:
        """Run each row's newest token; return the model's output for the next one.

        Args:
            tokens: [rows] the newest tokens.
            sequences: All tokens, these included.
        """
        assert self.cache is not None
        if self._compiled is None:
            shape = (tokens.shape[0], self.cache.max_cache_len, self.model.dtype, str(tokens.device))
            self._compiled = stand_in(self.model, as_compile_config(self._settled.compile_config), shape)
        arguments = self._next_arguments(tokens)
        if self._mask is not None:
            arguments[self._mask_name] = self._mask[:, : self._seen]
        output = self._compiled(**arguments)
        self.cache.advance(1)
        return output

    def __init__(
        self, model: Any, inputs: GenerationInputs, config: GenerationConfig, new_tokens: int, margin: int = 0
    ) -> None:
        super().__init__(model, inputs, config, new_tokens, margin)
        self._settled = config


class CapturedDecoder(_StaticDecoder):
    """Runs prompts through the model, and new tokens through a graph that is captured at the first of them.

    The graph reads ids, positions and mask where they lay when it was captured, and writes its logits there.
    """

    _replay: Callable[[], None] | None = None
    _held: dict[str, Any]
    _logits: torch.Tensor

    def step(self, tokens: torch.Tensor, sequences: Sequences) -> Any:
        """Run each row's newest token; return logits and the cache.

        Args:
            tokens: [rows] the newest tokens.
            sequences: All tokens, these included.
        """
        assert self.cache is not None
        if self._replay is None:
            self._held = self._next_arguments(tokens)
            self._held[self._ids_name] = tokens[:, None].clone()
            if self._mask is not None:
                # Slots that are still empty are hidden by their positions.
                length = self.cache.max_cache_len
                more = self._mask.new_ones(self._mask.shape[0], max(0, length - self._mask.shape[1]))
                self._held[self._mask_name] = torch.cat([self._mask, more], dim=1)[:, :length]
            self._replay = capture(self._run)
        else:
            self._seen += 1
            self._held[self._ids_name].copy_(tokens[:, None])
            self._held["cache_position"].add_(1)
            if self._positions is not None:
                # The tensor that the graph reads.
                self._positions.add_(1)
        self._replay()
        self.cache.advance(1)
        return CausalLMOutputWithPast(logits=self._logits.clone(), past_key_values=self.cache)

    def _run(self) -> None:
        self._logits = self.model(**self._held).logits


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function does on the current CUDA device; return what does it again.

    The function runs twice before that, as libraries set themselves up at their first call; it must leave
    behind the same however often it runs.

    Args:
        run: Works on tensors that stay where they are, and never waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay  # type: ignore[no-any-return]


def choose_decoder(
    model: Any, inputs: GenerationInputs, config: GenerationConfig, mode: GenerationMode, plain: type[Decoder]
) -> type[Decoder]:
    """Return the decoder that a config's compiling asks for; the plain one where it asks for none.

    Args:
        model: The model that generates.
        inputs: What it starts from.
        config: The settled config.
        mode: The strategy.
        plain: The decoder of steps that are not compiled.

    Raises:
        GenerationError: something of the call does not go with a compiled step.
        NotYetError: the same, but might one day.
        MissingDependencyError: there is no C++ compiler.
    """
    if not wants_compile(config):
        return plain
    _check_call(config, inputs.cache, mode)
    _check_model(model)
    if plain is not Decoder:
        raise GenerationError(
            f"{type(model).__name__} prepares its own inputs, which compiled steps do not do",
            where="compile",
            mend="Leave compile out.",
        )
    device = inputs.input_ids.device
    if device.type == "cuda":
        return CapturedDecoder
    check_compiler(as_compile_config(config.compile_config).backend)
    return CompiledDecoder


def _check_call(config: GenerationConfig, cache: Cache | None, mode: GenerationMode) -> None:
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise NotYetError(
            f"{mode.value} has no compiled steps so far", where="compile", mend="Leave compile out."
        )
    for flag in ("output_attentions", "output_hidden_states"):
        if getattr(config, flag):
            raise GenerationError(
                f"A compiled step returns logits only, so {flag} cannot be obeyed",
                where=flag,
                mend=f"Leave {flag} out, or compile.",
            )
    if cache is not None and type(cache) is not StaticCache:
        raise GenerationError(
            "A compiled step needs a static cache",
            where="past_key_values",
            expected="a StaticCache with room for the whole sequence",
            found=type(cache).__name__,
            mend="Pass StaticCache(model.config, max_cache_len), or leave compile out.",
        )


def _check_model(model: Any) -> None:
    name = type(model).__name__
    takes = parameters(type(model).forward)
    if model.config.is_encoder_decoder or getattr(model.config, "add_cross_attention", False):
        raise NotYetError(
            f"{name} looks at an encoder, and has no compiled steps so far",
            where="compile",
            mend="Leave compile out.",
        )
    if getattr(model, "is_quantized", False):
        raise NotYetError(
            "Quantized layers have no compiled steps so far",
            where="compile",
            mend="Leave compile out: packed weights have fast steps of their own. Or call "
            "model.dequantize() first.",
        )
    if "cache_position" not in takes or not has_layers(model):
        raise GenerationError(
            f"{name} has no layers that can be compiled one by one",
            where="compile",
            expected="a forward that takes cache_position, and layers with a layer_idx",
            mend="Leave compile out.",
        )
    first = next(hooked(model), None)
    if first is not None:
        raise GenerationError(
            "A compiled step does not run the hooks of modules",
            where=f"compile, {first}",
            mend="Leave compile out; remove the hooks; or load the whole model onto one device, if it is "
            "split over several or partly on disk.",
        )


def check_compiler(backend: str = "inductor") -> None:
    """Raise where torch's compiler cannot make code for a CPU.

    Args:
        backend: Torch's compiler; only inductor writes C++.

    Raises:
        MissingDependencyError: no C++ compiler, or Python's headers are not there.
    """
    if backend != "inductor":
        return
    # Imported here: it takes a second, and only compiling needs it.
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    instead = "Or leave compile out: the steps that are not compiled need none."
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            "compile=True needs a C++ compiler, and there is none",
            where="compile",
            mend="Install g++ (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: "
            f"xcode-select --install), or name yours in the environment variable CXX. {instead}",
        ) from error
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise MissingDependencyError(
            "compile=True needs the headers of Python, and Python.h is not there",
            where="compile",
            expected=sysconfig.get_path("include"),
            mend=f"Install them (Debian, Ubuntu: apt-get install python3-dev). {instead}",
        )
