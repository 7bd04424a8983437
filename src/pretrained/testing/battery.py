# SPDX-License-Identifier: Apache-2.0
"""The battery that every PyTorch architecture passes: one row of a table buys all of these checks.

A `Case` names a class and a small config. Each ``check_*`` function is a test of its own; those that
compare with another implementation take an `oracle`, a function from our model to a callable with the
same weights that returns an object or mapping with the ecosystem's field names. Nothing here imports
that other implementation, so third parties use the battery with theirs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pretrained.core.skeleton import Skeleton
from pretrained.torch.load import skeleton_of

Oracle = Callable[[Any], Callable[..., Any]]
Kind = Literal["decoder", "encoder", "seq2seq"]
Padding = Literal["none", "left", "right"]

# Largest difference, relative to the largest number of the oracle's tensor: room for another order of
# summation, and no more.
TOLERANCE = 1e-5
# In bfloat16 two right answers differ by their roundings, so both are held against the oracle in float32:
# ours may err by this much more than the oracle does, or by this much where the oracle errs by less.
BF16_FACTOR, BF16_FLOOR = 1.5, 2.0**-8

LENGTH, BATCH = 11, 3


@dataclass(frozen=True)
class Case:
    """One row of an architecture's table.

    Attributes:
        model_class: The class to test.
        config: Its config's values; small, so that each check takes well under a second.
        kind: How it reads: a causal ``"decoder"``, an ``"encoder"``, or ``"seq2seq"``.
        name: Shown by the test runner; the class name where it is empty.
        labels: What the head learns from: ``"tokens"``, ``"classes"``, ``"token_classes"``, ``"span"``,
            ``"choices"``, ``"none"`` or the empty string to tell by the class name.
        extra_inputs: Further inputs of every call, made from the config.
        cached: Whether the class keeps a cache.
        compiled: Whether its forward is one graph.
        embeds: Whether it can do without ids where it has their embeddings.
    """

    model_class: type[Any]
    config: Mapping[str, Any]
    kind: Kind = "decoder"
    name: str = ""
    labels: str = ""
    extra_inputs: Callable[[Any], dict[str, torch.Tensor]] | None = None
    cached: bool | None = None
    compiled: bool = True
    embeds: bool = True
    init: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or self.model_class.__name__

    @property
    def keeps_cache(self) -> bool:
        """Whether the class keeps a cache, told by its kind where the row does not say."""
        if self.cached is not None:
            return self.cached
        return self.kind == "decoder" and not _ends(
            self.model_class, "QuestionAnswering", "TokenClassification"
        )

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """Return the model with seeded random weights, in evaluation mode.

        Args:
            dtype: Of the weights.
        """
        torch.manual_seed(0)
        config = self.model_class.config_class(**self.config)
        model = self.model_class(config, **self.init).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm scales of 1 and biases of 0 would hide a missing multiplication or addition.
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.to(dtype)

    def inputs(self, config: Any, padding: Padding = "none") -> dict[str, torch.Tensor]:
        """Return seeded inputs.

        Args:
            config: The model's config.
            padding: Which side of the first row is padded.
        """
        generator = torch.Generator().manual_seed(1)
        low = 3
        shape: tuple[int, ...] = (BATCH, LENGTH)
        if _ends(self.model_class, "MultipleChoice"):
            shape = (2, BATCH, LENGTH)
        ids = torch.randint(low, config.vocab_size, shape, generator=generator)
        inputs = {"input_ids": ids}
        if padding != "none":
            mask = torch.ones_like(ids)
            where = slice(0, 4) if padding == "left" else slice(-4, None)
            mask[..., 0, where] = 0
            pad = config.pad_token_id if config.pad_token_id is not None else 0
            inputs = {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
        if self.kind == "seq2seq" and not _ends(
            self.model_class,
            "EncoderModel",
            "SequenceClassification",
            "TokenClassification",
            "QuestionAnswering",
        ):
            inputs["decoder_input_ids"] = torch.randint(
                low, config.vocab_size, (BATCH, 7), generator=generator
            )
        if self.extra_inputs is not None:
            inputs |= self.extra_inputs(config)
        return inputs

    def with_labels(self, inputs: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor] | None:
        """Return the inputs with labels, or None for a class that computes no loss.

        Args:
            inputs: From `inputs`.
            config: The model's config.
        """
        generator = torch.Generator().manual_seed(2)
        rows, length = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
        kind = self.labels or _label_kind(self.model_class)
        if kind == "none":
            return None
        if kind == "tokens":
            ids = inputs.get("decoder_input_ids", inputs["input_ids"])
            labels = torch.randint(3, config.vocab_size, ids.shape, generator=generator)
            labels[0, :2] = -100
            rest = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
            return {**rest, "labels": labels}
        if kind == "span":
            ends = torch.randint(0, length, (2, rows), generator=generator)
            return {**inputs, "start_positions": ends[0], "end_positions": ends[1]}
        if kind == "choices":
            return {
                **inputs,
                "labels": torch.randint(0, inputs["input_ids"].shape[1], (rows,), generator=generator),
            }
        shape = (rows, length) if kind == "token_classes" else (rows,)
        return {**inputs, "labels": torch.randint(0, config.num_labels, shape, generator=generator)}


def _ends(cls: type, *suffixes: str) -> bool:
    return cls.__name__.endswith(suffixes)


def _label_kind(cls: type) -> str:
    if _ends(cls, "LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"):
        return "tokens"
    if _ends(cls, "ForSequenceClassification"):
        return "classes"
    if _ends(cls, "ForTokenClassification"):
        return "token_classes"
    if _ends(cls, "ForQuestionAnswering"):
        return "span"
    return "choices" if _ends(cls, "ForMultipleChoice") else "none"


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number of the second tensor.

    Args:
        ours: Any tensor.
        theirs: One of the same shape.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if not theirs.numel():
        return 0.0
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.double().abs().max().clamp(min=1e-6)
    return float((ours.double() - theirs.double()).abs().max() / scale)


def _rms_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the root mean square of the differences, relative to that of the second tensor."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-6))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Fail where two tensors differ by more than their dtype's tolerance.

    Args:
        ours: The tensor under test.
        theirs: The oracle's.
        what: Shown on failure.
    """
    error = relative_error(ours, theirs)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


def _named_tensors(output: Any) -> Iterable[tuple[str, torch.Tensor]]:
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, tuple) and name != "past_key_values":
            yield from ((f"{name}[{i}]", part) for i, part in enumerate(value) if part is not None)


def _paired(
    ours: Any, theirs: Any, mask: torch.Tensor | None, what: str
) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield every tensor of two outputs, without the rows of padding tokens."""
    expected = dict(_named_tensors(theirs))
    found = dict(_named_tensors(ours))
    assert set(found) == set(expected), f"{what}: fields {sorted(found)} against {sorted(expected)}"
    for name, whole in found.items():
        tensor, other = whole, expected[name]
        if mask is not None and tensor.dim() >= 2 and "attentions" not in name and "decoder" not in name:
            flat = mask.reshape(-1, mask.shape[-1])
            if tensor.shape[:2] == flat.shape:
                tensor, other = tensor[flat.bool()], other[flat.bool()]
        if mask is not None and "attentions" in name:
            continue
        yield name, tensor, other


def compare_outputs(ours: Any, theirs: Any, mask: torch.Tensor | None, *, what: str) -> None:
    """Compare every tensor of two outputs, leaving out the rows of padding tokens.

    Args:
        ours: Our output object.
        theirs: The oracle's.
        mask: [batch, length] with 0 for padding, or None.
        what: Shown on failure.
    """
    for name, tensor, other in _paired(ours, theirs, mask, what):
        assert_close(tensor, other, f"{what}: {name}")


def check_parity(case: Case, oracle: Oracle, *, padding: Padding) -> None:
    """Outputs, hidden states included, equal the oracle's.

    Args:
        case: A row.
        oracle: See the module.
        padding: Which side of the first row is padded.
    """
    model = case.build()
    inputs = case.inputs(model.config, padding)
    with torch.no_grad():
        ours = model(**inputs, output_hidden_states=True)
        theirs = oracle(model)(**inputs, output_hidden_states=True)
    compare_outputs(ours, theirs, inputs.get("attention_mask"), what=f"{case}, {padding} padding")


def check_bfloat16(case: Case, oracle: Oracle) -> None:
    """In bfloat16 the outputs are as near to the truth as the oracle's are.

    Args:
        case: A row.
        oracle: See the module; with the same attention kernels, which round in their own way.
    """
    model = case.build(torch.bfloat16)
    inputs = case.inputs(model.config)
    rounded = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs.items()}
    with torch.no_grad():
        ours = model(**rounded, output_hidden_states=True)
        theirs = oracle(model)(**rounded, output_hidden_states=True)
        truth = oracle(model.float())(**inputs, output_hidden_states=True)
    errors = {name: _rms_error(other, true) for name, other, true in _paired(theirs, truth, None, str(case))}
    for name, tensor, true in _paired(ours, truth, None, str(case)):
        assert tensor.dtype == dict(_named_tensors(theirs))[name].dtype, name
        error = _rms_error(tensor, true)
        allowed = max(BF16_FACTOR * errors[name], BF16_FLOOR)
        assert error <= allowed, f"{case}: {name} errs by {error:.2e}, the oracle by {errors[name]:.2e}"


def check_submodules(case: Case, oracle: Oracle) -> None:
    """Every part gives what the oracle's part of the same path gives, so that two errors cannot cancel.

    Args:
        case: A row.
        oracle: See the module.
    """
    model = case.build()
    other: Any = oracle(model)
    inputs = case.inputs(model.config)
    with torch.no_grad(), _recorded(model) as ours, _recorded(other) as theirs:
        model(**inputs)
        other(**inputs)
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    compared = 0
    for name, tensor in ours.items():
        if name in theirs and theirs[name].shape == tensor.shape:
            assert_close(tensor, theirs[name], f"{case}: {name}")
            compared += name in leaves
    # Some leaves have no twin: activations are functions here, tables of positions have other shapes.
    assert compared >= 0.8 * len(leaves & set(ours)), (
        f"{case}: only {compared} of {len(leaves)} leaves have twins"
    )


@contextmanager
def _recorded(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what each module returned first, by path, filled while the model runs."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor):
                outputs.setdefault(name, value)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def check_attentions(case: Case, oracle: Oracle) -> None:
    """Attention weights equal the oracle's, and asking for them changes nothing else."""
    model = case.build()
    inputs = case.inputs(model.config)
    with torch.no_grad():
        ours = model(**inputs, output_attentions=True)
        theirs = oracle(model)(**inputs, output_attentions=True)
        plain = model(**inputs)
    assert any("attentions" in name for name, _ in _named_tensors(ours))
    compare_outputs(ours, theirs, None, what=str(case))
    for name, tensor in _named_tensors(plain):
        assert_close(tensor, ours[name], f"{case}: {name} with and without attentions")


def check_loss_and_gradients(case: Case, oracle: Oracle) -> None:
    """Loss and every gradient equal the oracle's."""
    model = case.build()
    inputs = case.with_labels(case.inputs(model.config), model.config)
    if inputs is None:
        return
    other = oracle(model)
    ours, theirs = model(**inputs), other(**inputs)
    assert_close(ours.loss, theirs.loss, f"{case}: loss")
    ours.loss.backward()
    theirs.loss.backward()
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected), f"{case}: gradients of {set(found) ^ set(expected)}"
    for name, gradient in found.items():
        # Relative to the largest gradient of all: some of a tensor's may be rounding noise alone.
        scale = max(float(g.abs().max()) for g in expected.values())
        worst = float((gradient - expected[name]).abs().max()) / scale
        assert worst <= TOLERANCE, f"{case}: gradient of {name} {worst:.2e}"


def check_tuple(case: Case) -> None:
    """``return_dict=False`` gives the values that the object has, in its order, as a plain tuple."""
    model = case.build()
    inputs = case.inputs(model.config)
    with torch.no_grad():
        full = model(**inputs, output_hidden_states=True)
        plain = model(**inputs, output_hidden_states=True, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(full), f"{case}: {type(plain).__name__} of {len(plain)}"
    for name, one, other in zip(full.keys(), full.to_tuple(), plain, strict=True):
        assert type(one) is type(other), f"{case}: {name} is a {type(other).__name__}"
        pairs = zip(_tensors(one), _tensors(other), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs), f"{case}: {name}"


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return a tensor, or the tensors of a tuple; nothing of what else an output holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple) else []


def check_inputs_embeds(case: Case) -> None:
    """Embeddings in place of ids give the same output."""
    if not case.embeds:
        return
    model = case.build()
    inputs = case.inputs(model.config)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        from_ids = model(input_ids=ids, **inputs)
        from_embeds = model(inputs_embeds=embeds, **inputs)
    if _pools_last_token(model):
        ids_only = model(input_ids=ids[:1], **{k: v[:1] for k, v in inputs.items()})
        embeds_only = model(inputs_embeds=embeds[:1], **{k: v[:1] for k, v in inputs.items()})
        from_ids, from_embeds = ids_only, embeds_only
    for name, tensor in _named_tensors(from_ids):
        assert_close(from_embeds[name].detach(), tensor.detach(), f"{case}: {name}")


def _pools_last_token(model: Any) -> bool:
    return hasattr(model, "score") and _ends(type(model), "SequenceClassification")


def check_cache(case: Case, *, static: bool) -> None:
    """Tokens fed one by one through a cache give what one forward gives.

    Args:
        case: A row.
        static: Use a cache of fixed size, written by position tensors as a compiled step does.
    """
    # Imported here so that the battery's other checks do not need a cache to exist.
    from pretrained.torch.cache import DynamicCache, StaticCache  # noqa: PLC0415

    model = case.build()
    for padding in ("none",) if static else ("none", "left"):
        inputs = case.inputs(model.config, padding)  # type: ignore[arg-type]
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
        cache = StaticCache(model.config, LENGTH + 3) if static else DynamicCache(config=model.config)
        # Positions as given: some families count them from the ids they see, which a piece lacks.
        positions = torch.arange(LENGTH)[None]
        parts = []
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **inputs)[0]
            for start, stop in ((0, 5), (5, 6), (6, 9), *((i, i + 1) for i in range(9, LENGTH))):
                more: dict[str, Any] = {"attention_mask": None if mask is None else mask[:, :stop]}
                if static:
                    more["cache_position"] = torch.arange(start, stop)
                more |= {"past_key_values": cache, "position_ids": positions[:, start:stop]}
                parts.append(model(ids[:, start:stop], use_cache=True, **inputs, **more)[0])
                if static:
                    cache.advance(stop - start)
        # A head that pools its last token has said nothing comparable before the end.
        found = torch.cat(parts, dim=1) if parts[0].shape[1] == 5 else parts[-1]
        if mask is not None and found.shape[1] == LENGTH:
            found, whole = found[mask.bool()], whole[mask.bool()]
        assert_close(found, whole, f"{case}: cached against uncached, {padding} padding")


def check_round_trip(case: Case, folder: Path) -> None:
    """Saved and loaded again, every weight and the config are the same, and the file too, byte by byte."""
    model = case.build()
    first, second = folder / "first", folder / "second"
    model.save_pretrained(first)
    loaded, info = type(model).from_pretrained(first, output_loading_info=True)
    assert not any(info.values()), info
    _assert_same_state(model, loaded)
    assert loaded.config.to_dict() == model.config.to_dict()
    assert not loaded.training
    loaded.save_pretrained(second)
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def _assert_same_state(first: Any, second: Any) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    for (name, one), (_, other) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def check_pickle(case: Case) -> None:
    """A pickled model, as `torch.save` and worker processes make it, comes back whole."""
    model = case.build()
    again = pickle.loads(pickle.dumps(model))
    _assert_same_state(model, again)
    inputs = case.inputs(model.config)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], again(**inputs)[0])


def check_compiled(case: Case) -> None:
    """The forward is one graph and gives the same output."""
    if not case.compiled:
        return
    model = case.build()
    inputs = case.inputs(model.config, "right")
    options: dict[str, Any] = {"use_cache": False} if case.keeps_cache else {}
    with torch.no_grad():
        eager = model(**inputs, **options)
        # The eager backend traces without generating code: it shows graph breaks in a tenth of the time.
        graph = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **options)
    torch._dynamo.reset()
    for name, tensor in _named_tensors(eager):
        assert_close(graph[name], tensor, f"{case}: {name} compiled")


def check_skeleton(case: Case, skeleton: Callable[[Any, str], Skeleton], family: str) -> None:
    """The architecture's skeleton promises exactly what the module holds.

    Args:
        case: A row.
        skeleton: The architecture's function.
        family: The family's name, which the class name begins with.
    """
    config = case.model_class.config_class(**case.config)
    with torch.device("meta"):
        model = case.model_class(config, **case.init)
    promised = skeleton(config, case.model_class.__name__.removeprefix(family))
    held = skeleton_of(model)
    ours = {key: spec.shape for key, spec in promised.params.items()}
    theirs = {key: spec.shape for key, spec in held.params.items()}
    assert ours == theirs, f"{case}: {set(ours) ^ set(theirs) or 'shapes differ'}"
    assert dict(promised.ties) == dict(held.ties), (
        f"{case}: ties {dict(promised.ties)}, not {dict(held.ties)}"
    )
    blocks = [
        name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules
    ]
    for key, spec in promised.params.items():
        block = next((name for name in blocks if key.startswith(f"{name}.")), None)
        assert spec.block == block, f"{case}: {key} is in block {spec.block}, not {block}"
