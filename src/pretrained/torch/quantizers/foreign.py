# SPDX-License-Identifier: Apache-2.0
"""Reading weights that another library has quantized.

A weight of such a checkpoint is several tensors: integers, scales, zero points, an order. `Repacking` shows
the rest of the load one tensor in their place, of the model's own name and shape, so that key rules, missing
weights, ties, device maps and reports need to know nothing of them; when that tensor is read, it reads the
parts, and puts the weight together: as a leaf of this library where it can hold the numbers exactly, as a
plain weight otherwise.

A library is added by

1. a `pretrained.core.foreign_quantization.ForeignScheme` in a file of its own in ``core/``, which parses
   ``quantization_config`` into typed settings and refuses what is not read, and its line in
   `pretrained.core.quantization.READ_METHODS`;
2. a `ForeignFormat` in a file of its own beside this one, which says which tensors are parts, checks their
   headers and puts them together, and its line in `pretrained.torch.quantizers.formats.FORMATS`.

`pretrained.torch.quantizers.gptq` is the one to look at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.foreign_quantization import ForeignScheme
from pretrained.core.integer_form import IntegerForm
from pretrained.core.keys import match_keys
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import NotYetError, WeightsError
from pretrained.torch.nn import Conv1D
from pretrained.torch.offload_folder import Form
from pretrained.torch.quantize import dense_shape, integer_leaf, put, quantized_leaves
from pretrained.torch.quantized import IntegerLeaf, MadeWeight, QuantizedLeaf, QuantizedLinear
from pretrained.torch.quantized_ops import CHUNK, pack_nibbles, tiles
from pretrained.torch.quantizers.base import Quantizing, copy_form, let_go
from pretrained.torch.rounding import Packed
from pretrained.torch.tensors import TORCH_DTYPES, Read

Scheme = TypeVar("Scheme", bound=ForeignScheme)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The tensors of one quantized weight.

    Attributes:
        path: The module's name in the files.
        shape: (out, in) of the layer in the model.
        parts: Headers by the parts' names.
        read: Returns a part on the CPU: a view of the mapped file where there is one, which must not be
            written to.
    """

    path: str
    shape: tuple[int, int]
    parts: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]

    def check(self, name: str, shape: tuple[int, ...], *dtypes: str, why: str = "") -> None:
        """Raise where a part is absent, or not as the layer needs it.

        Args:
            name: The part.
            shape: What it must have.
            *dtypes: What it may have.
            why: What the shape follows from, for the message.

        Raises:
            WeightsError: it is not so.
        """
        info = self.parts.get(name)
        if info is None:
            raise WeightsError(
                f"A quantized weight has no {name!r}",
                where=self.path,
                found=", ".join(self.parts),
                mend="The checkpoint is not whole; take it again from where it was made.",
            )
        if info.shape != shape:
            raise WeightsError(
                f"{name!r} of a quantized weight has another shape than the layer needs{why and ' '}{why}",
                where=info.key,
                expected=list(shape),
                found=list(info.shape),
                mend="Check that config.json (sizes, bits, group_size) describes these weights.",
            )
        if info.dtype not in dtypes:
            raise WeightsError(
                f"{name!r} of a quantized weight has another dtype than the method stores",
                where=info.key,
                expected=" or ".join(dtypes),
                found=info.dtype,
            )


class ForeignFormat(Generic[Scheme]):
    """How one library stores the weight of a dense layer.

    Attributes:
        parts: Names of the tensors that make one weight; ``weight`` among them where the library uses it.
        sign: The parts that are there exactly where a layer is quantized.

    Args:
        scheme: What config.json says.
    """

    parts: ClassVar[tuple[str, ...]]
    sign: ClassVar[tuple[str, ...]]

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def split(self, key: str) -> tuple[str, str]:
        """Return the module's path in the files and the part's name.

        Args:
            key: Of any tensor in the files.
        """
        path, _, name = key.rpartition(".")
        return path, name

    def leaf(self, module: nn.Module, form: Any, dtype: torch.dtype) -> QuantizedLeaf:
        """Return an empty layer for a weight that is not plain, on the meta device.

        Args:
            module: What stands there.
            form: What `form` returned.
            dtype: What a plain weight would be loaded as.
        """
        form = dataclasses.replace(form, compute_dtype=self.scheme.compute_dtype)
        return integer_leaf(module, form, dtype)

    def form(self, weight: StoredWeight) -> Any:
        """Check a weight's headers, and return the form it gets; None for a plain weight.

        Called for every weight before any is put together. It may read small parts (an order).

        Args:
            weight: The tensors.

        Raises:
            WeightsError: the tensors do not fit together, or not the layer.
            NotYetError: they are of a kind that is not read.
        """
        raise NotImplementedError

    def put_together(self, weight: StoredWeight, form: Any) -> Packed | MadeWeight | torch.Tensor:
        """Return the weight.

        Threads call it side by side. Temporaries stay small where they can: see `packed_by_rows`. Nothing
        that is returned may look at the memory of the part `parts[0]`, whose pages are given back.

        Args:
            weight: The tensors.
            form: What `form` returned.

        Returns:
            A `Packed` of that form, or what else `leaf` made a layer for; a floating [out, in] tensor where
            it is None, which the load casts.

        Raises:
            WeightsError: numbers that cannot be.
        """
        raise NotImplementedError


class Repacking(Quantizing):
    """Loads what another library has quantized.

    Args:
        format: That library's way.
        dtype: As `Quantizer`.
        dequantize: Make plain weights of all.
        key_mapping: The user's ``{regex: replacement}`` for names in the files.
        is_mapped: As `Quantizing`.
    """

    dequantize = False

    def __init__(
        self,
        format: ForeignFormat[Any],
        dtype: str | None,
        *,
        dequantize: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        is_mapped: bool = False,
    ) -> None:
        scheme = format.scheme
        summary = QuantizationConfig(
            quant_method="int4", read_from=scheme.quant_method, compute_dtype=scheme.compute_dtype
        )
        super().__init__(summary, dtype, is_mapped=is_mapped)
        self.format, self.dequantize, self.key_mapping = format, dequantize, key_mapping
        # Key that stands for a weight -> (module's name in the files, its parts).
        self.stored: dict[str, tuple[str, dict[str, TensorInfo]]] = {}

    def view(self, model: Any, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with one tensor for each quantized weight, in place of its parts."""
        groups: dict[str, dict[str, TensorInfo]] = {}
        for key, info in checkpoint.tensors.items():
            path, name = self.format.split(key)
            if name in self.format.parts:
                groups.setdefault(path, {})[name] = info
        groups = {p: parts for p, parts in groups.items() if all(s in parts for s in self.format.sign)}
        self.stored = {f"{path}.weight": (path, parts) for path, parts in groups.items()}
        method = self.format.scheme.quant_method
        if not groups:
            raise WeightsError(
                f"The config says that the weights are quantized ({method}), and the files hold plain ones",
                where=checkpoint.files[0] if checkpoint.files else "state_dict",
                expected=f"tensors named {' and '.join(self.format.sign)}",
                mend="Take quantization_config out of config.json; as an argument it quantizes.",
            )
        found = match_keys(
            self.stored,
            (key for key, _ in model.named_parameters(remove_duplicate=False)),
            base_prefix=model.base_model_prefix,
            rules=model.key_rules,
            key_mapping=self.key_mapping,
        ).sources
        shapes = {source: tuple(model.get_parameter(key).shape) for key, source in found.items()}
        taken = {f"{path}.{name}" for path, parts in groups.items() for name in parts}
        tensors: dict[str, TensorInfo] = {}
        for key, info in checkpoint.tensors.items():
            path, name = self.format.split(key)
            if key not in taken:
                tensors[key] = info
            elif name == self.format.sign[0]:
                parts = groups[path]
                nbytes = sum(part.nbytes for part in parts.values())
                end = max(part.offset + part.nbytes for part in parts.values() if part.file == info.file)
                tensors[f"{path}.weight"] = dataclasses.replace(
                    info,
                    key=f"{path}.weight",
                    # No dtype of a file: nothing may take the span for the weight's own values.
                    dtype=method,
                    shape=shapes.get(f"{path}.weight", ()),
                    # Where the parts lie, if they lie together, as they mostly do: it is read ahead.
                    offset=max(0, end - nbytes),
                    nbytes=nbytes,
                )
        return dataclasses.replace(checkpoint, tensors=tensors)

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Put leaves in, and read their weights by their parts."""
        self._check_users(model, plan)
        # Weights -> what a copy on disk consists of.
        self._forms: dict[str, Form] = {}
        weights: dict[str, tuple[StoredWeight, IntegerForm | None, bool]] = {}
        for step in plan.steps:
            if step.source.dtype != self.format.scheme.quant_method:
                continue
            path = step.key.rpartition(".")[0]
            module = model.get_submodule(path)
            weight = self._weight(step, dense_shape(module), read)
            form = self.format.form(weight)
            weights[step.key] = (weight, form, isinstance(module, Conv1D))
            if form is None or self.dequantize:
                plain = Form("plain", {step.key: (step.dtype, tuple(module.weight.shape))})
                self._forms[step.key] = self._made_by_format(plain)
                continue
            leaf = self.format.leaf(module, form, TORCH_DTYPES[step.dtype])
            put(model, path, leaf)
            if isinstance(leaf, IntegerLeaf):
                self._forms[step.key] = self._made_by_format(copy_form(path, leaf))

        def read_parts(step: LoadStep, device: torch.device) -> Any:
            if step.key not in weights:
                return read(step, device)
            weight, form, transposed = weights[step.key]
            held: list[torch.Tensor] = []

            def read_part(name: str) -> torch.Tensor:
                part = weight.read(name)
                if name == self.format.parts[0]:
                    held.append(part)
                return part

            result = self.format.put_together(dataclasses.replace(weight, read=read_part), form)
            if self.is_mapped:
                for part in held:
                    let_go(part)
            dtype = TORCH_DTYPES[step.dtype]
            if isinstance(result, Packed) and self.dequantize and form is not None:
                result = _plain(result, weight.shape, form, dtype)
            if isinstance(result, Packed | MadeWeight):
                return result.to(device)
            matrix = result.to(dtype)
            return (matrix.t().contiguous() if transposed else matrix).to(device)

        return plan, read_parts

    def _made_by_format(self, form: Form) -> Form:
        """Tell copies apart that other settings made from the same bytes."""
        scheme = dataclasses.replace(self.format.scheme, compute_dtype=None)
        return dataclasses.replace(form, scheme=f"{form.scheme} of {scheme!r}")

    def forms(self, steps: Iterable[LoadStep]) -> dict[str, Form]:
        """Return what the weights that are put together consist of."""
        return {step.key: self._forms[step.key] for step in steps if step.key in self._forms}

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Allow the disk: what is put together goes there through the offload folder."""

    def _weight(self, step: LoadStep, shape: tuple[int, int], read: Read) -> StoredWeight:
        path, parts = self.stored[step.source.key]

        def read_part(name: str) -> torch.Tensor:
            info = parts[name]
            return read(LoadStep(info.key, info, info.dtype, None, info.shape), torch.device("cpu"))

        return StoredWeight(path, shape, parts, read_part)

    def _check_users(self, model: Any, plan: LoadPlan) -> None:
        """Raise where a quantized weight is not that of one dense layer."""
        tied = set(plan.ties.values())
        for step in plan.steps:
            path, _, name = step.key.rpartition(".")
            if step.source.dtype != self.format.scheme.quant_method:
                continue
            module = model.get_submodule(path)
            if name != "weight" or type(module) not in (nn.Linear, Conv1D) or step.key in tied:
                raise NotYetError(
                    f"{self.format.scheme.quant_method} is read for dense layers only, whose weight nothing "
                    "else shares",
                    where=self.stored[step.source.key][0],
                    found=f"{type(module).__name__}.{name}" + (", tied" if step.key in tied else ""),
                )

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds now, which is no longer that library's format."""
        # Nothing was rounded; copies on disk are noted as of an error of 0.
        self.errors.clear()
        forms = [leaf.form for leaf in quantized_leaves(model).values() if isinstance(leaf, IntegerLeaf)]
        if forms and all(form.bits == 8 for form in forms):
            self.config = dataclasses.replace(self.config, quant_method="int8")
        super().finish(model)
        if not forms:
            model.config.__dict__.pop("quantization_config", None)


def _plain(packed: Packed, shape: tuple[int, int], form: IntegerForm, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that a quantized weight stands for, computed in float32."""
    with torch.device("meta"):
        leaf = QuantizedLinear(shape[1], shape[0], form, bias=False, dtype=dtype)
    leaf.fill(packed)
    result = torch.empty(shape, dtype=dtype)
    for part in tiles(*shape):
        result[part] = leaf.rows(part, torch.float32)
    return result


def packed_by_rows(
    integers: Callable[[slice], torch.Tensor],
    shape: tuple[int, int],
    bits: int,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    *,
    align: int = 1,
) -> Packed:
    """Pack a weight, a cache-sized run of rows at a time.

    Args:
        integers: Returns rows of stored columns: contiguous, uint8 of 0..15 (4 bits) or int8 (8 bits).
        shape: (out, in).
        bits: 4 or 8.
        scale: As `Packed.scale`, in memory of its own.
        zero: As `Packed.zero`, in memory of its own.
        order: As `Packed.order`.
        align: Rows come in runs of a multiple of this.
    """
    rows, columns = shape
    data = torch.empty(rows, columns * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    step = max(1, CHUNK // columns // align) * align
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = integers(part)
        data[part] = pack_nibbles(values) if bits == 4 else values
    return Packed(data, scale, zero, 0.0, order)
