# SPDX-License-Identifier: Apache-2.0
"""Layers that other libraries have quantized: which tensors of a file make one, and whether they fit.

One layer's weight is up to five tensors beside each other. `form_of` checks their dtypes and shapes
against the layer and says how they are read:

    weight[o, i] = (q[o, i] - zero[o // rows, g]) * scale[o // rows, g]

where ``g`` is ``i // columns``, or ``weight_g_idx[i]`` where the file has an order of its own, and
``(rows, columns)`` is the block of numbers that share a scale. Packed integers lie in int32 words, the first
in the lowest bits, stored plus ``2 ** (bits - 1)``; packed zeros likewise, but along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final

from pretrained.core.checkpoint import TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.keys import Drop
from pretrained.errors import WeightsError

SCALE_DTYPES: Final = ("float32", "bfloat16", "float16")
FLOAT8: Final = ("float8_e4m3fn", "float8_e5m2")

DATA_NAMES: Final = ("weight_packed", "weight")
SCALE_NAMES: Final = ("weight_scale", "weight_scale_inv")
ZERO_NAME: Final = "weight_zero_point"
ORDER_NAME: Final = "weight_g_idx"
SHAPE_NAME: Final = "weight_shape"
TENSOR_NAMES: Final = (*DATA_NAMES, *SCALE_NAMES, ZERO_NAME, ORDER_NAME, SHAPE_NAME)
"""Names of the tensors beside each other that may make a weight."""

_NOT_USED: Final = "belongs to rounding activations or the cache, which stay as they are here"
ACTIVATION_RULES: Final = tuple(
    Drop(f"*.{name}", _NOT_USED)
    for name in (
        "input_scale", "input_zero_point", "input_g_idx", "output_scale", "output_zero_point",
        "activation_scale", "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point",
        "q_zero_point",
    )
)  # fmt: skip
"""Keys that files of these libraries hold beside weights and that nothing here needs."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How a library says that the weights of some layers are stored.

    Attributes:
        kind: ``"int"`` or ``"float"``.
        bits: 4 or 8.
        strategy: What shares a scale: ``"tensor"``, ``"channel"`` (an output), ``"group"`` (of inputs of
            one output), ``"block"``, or None for tensor or channel, as the file has it.
        group_size: Inputs that share a scale; group only.
        block: (rows, columns) that share a scale; block only.
        symmetric: Whether the zeros may be left out.
        packed: Whether the integers are packed in int32 words.
        has_order: Whether each input names its group.
    """

    kind: str
    bits: int
    strategy: str | None
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    packed: bool = False
    has_order: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """How the tensors of one layer are read.

    Attributes:
        shape: (out, in) of the weight.
        kind: ``"int"`` or ``"float"``.
        bits: Bits of a stored number.
        packed: Whether integers are packed in int32 words.
        block: (rows, columns) that share a scale.
        data: Name of the tensor of integers or 8-bit floats.
        scale: Name of the scales.
        zero: Name of the zeros, or None.
        order: Name of the groups of the inputs, or None.
        tensors: Name -> (dtype, shape) of every tensor that the layer keeps, as the file has them.
    """

    shape: tuple[int, int]
    kind: str
    bits: int
    packed: bool
    block: tuple[int, int]
    data: str
    scale: str
    zero: str | None
    order: str | None
    tensors: Mapping[str, tuple[str, Shape]]

    @property
    def grid(self) -> tuple[int, int]:
        """How many scales there are, down and across."""
        return _cells(self.shape, self.block)

    @property
    def zero_is_packed(self) -> bool:
        """Whether the zeros are packed in int32 words."""
        return self.zero is not None and self.tensors[self.zero][0] == "int32"

    @property
    def name(self) -> str:
        """A short name: ``"int4-g128"``, ``"int8"``, ``"fp8-128x128"``."""
        rows, columns = self.block
        plain = f"{'int' if self.kind == 'int' else 'fp'}{self.bits}"
        if rows == 1:
            return plain if columns >= self.shape[1] else f"{plain}-g{columns}"
        return f"{plain}-tensor" if self.grid == (1, 1) else f"{plain}-{rows}x{columns}"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in self.tensors.values())


def form_of(shape: tuple[int, int], scheme: WeightScheme, found: Mapping[str, TensorInfo]) -> LayerForm:
    """Check the tensors of a layer against it and its scheme.

    Args:
        shape: (out, in) of the weight that the model has there.
        scheme: What the config says of the layer.
        found: Name, one of `TENSOR_NAMES` -> the tensor in the file; the integers or floats among them.

    Raises:
        WeightsError: a tensor is missing, or has another dtype or shape than the layer and scheme ask for.
    """
    data_name = next(name for name in DATA_NAMES if name in found)
    data = found[data_name]
    scale_name = next((name for name in SCALE_NAMES if name in found), None)
    if scale_name is None:
        raise _absent(data, "scale", SCALE_NAMES[0])
    block = _block(shape, scheme, found[scale_name])
    _check_data(data, shape, scheme)
    kept = {data_name: data, scale_name: found[scale_name]}
    zero = ZERO_NAME if ZERO_NAME in found and scheme.kind == "int" else None
    if zero is None and not scheme.symmetric:
        raise _absent(data, "zero points, which a scheme that is not symmetric needs", ZERO_NAME)
    if scheme.has_order and ORDER_NAME not in found:
        raise _absent(data, "groups of its inputs, which this actorder needs", ORDER_NAME)
    order = ORDER_NAME if ORDER_NAME in found else None
    if order is not None and scheme.strategy != "group":
        raise WeightsError(
            "Inputs name their groups in a scheme without groups",
            where=found[order].key,
            found=f"strategy {scheme.strategy!r}",
        )
    for name in (zero, order, SHAPE_NAME if SHAPE_NAME in found else None):
        if name is not None:
            kept[name] = found[name]
    form = LayerForm(
        shape=shape,
        kind=scheme.kind,
        bits=scheme.bits,
        packed=scheme.packed,
        block=block,
        data=data_name,
        scale=scale_name,
        zero=zero,
        order=order,
        tensors={name: (info.dtype, info.shape) for name, info in kept.items()},
    )
    _check_parts(form, kept)
    return form


def _block(shape: tuple[int, int], scheme: WeightScheme, scale: TensorInfo) -> tuple[int, int]:
    rows, columns = shape
    strategy = scheme.strategy or ("tensor" if scale.num_elements == 1 else "channel")
    if strategy == "tensor":
        return rows, columns
    if strategy == "channel":
        return 1, columns
    if strategy == "block":
        assert scheme.block is not None
        return scheme.block
    assert scheme.group_size is not None
    if columns % scheme.group_size:
        raise WeightsError(
            f"The layer's inputs do not divide into groups of {scheme.group_size}",
            where=scale.key,
            found=f"{columns} inputs",
            mend="config.json does not describe these weights.",
        )
    return 1, scheme.group_size


def _check_data(info: TensorInfo, shape: tuple[int, int], scheme: WeightScheme) -> None:
    rows, columns = shape
    dtypes: tuple[str, ...]
    if scheme.packed:
        dtypes, wanted = ("int32",), (rows, -(-columns * scheme.bits // 32))
    else:
        dtypes, wanted = (FLOAT8 if scheme.kind == "float" else ("int8",)), shape
    if info.dtype not in dtypes or info.shape != wanted:
        raise _unfit(info, dtypes, [wanted], f"a layer of {rows} outputs and {columns} inputs")


def _check_parts(form: LayerForm, found: Mapping[str, TensorInfo]) -> None:
    """Raise unless scales, zeros and the rest have the shapes that the integers call for."""
    down, across = form.grid
    grids: list[Shape] = [(down, across)]
    if down == across == 1:
        grids += [(1,), ()]
    elif across == 1:
        grids.append((down,))
    why = f"{down} x {across} blocks of {form.block[0]} x {form.block[1]}"
    scale = found[form.scale]
    if scale.dtype not in SCALE_DTYPES or scale.shape not in grids:
        raise _unfit(scale, SCALE_DTYPES, grids, why)
    if form.zero is not None:
        zero = found[form.zero]
        packed = (-(-down * form.bits // 32), across)
        if (zero.dtype, zero.shape) != ("int32", packed) and (
            zero.dtype != "int8" or zero.shape not in grids
        ):
            raise _unfit(zero, ("int8",), grids, f"{why}, or int32 {list(packed)}")
    if form.order is not None:
        order = found[form.order]
        if order.dtype not in ("int32", "int64") or order.shape != (form.shape[1],):
            raise _unfit(order, ("int32",), [(form.shape[1],)], "a group for each input")
    said = found.get(SHAPE_NAME)
    if said is not None and (said.dtype not in ("int32", "int64") or said.shape != (2,)):
        raise _unfit(said, ("int64",), [(2,)], "the two sizes of the weight")


def check_said_shape(key: str, said: tuple[int, ...], shape: tuple[int, int]) -> None:
    """Raise unless a file's ``weight_shape`` is the layer's.

    Args:
        key: Its name.
        said: Its values.
        shape: (out, in) of the layer.

    Raises:
        WeightsError: they differ.
    """
    if said != shape:
        raise WeightsError(
            "The file says another shape of a packed weight than the model has",
            where=key,
            expected=list(shape),
            found=list(said),
            mend="Check that config.json describes these weights.",
        )


def check_order(key: str, least: int, most: int, groups: int) -> None:
    """Raise unless the groups that a layer's inputs name are there.

    Args:
        key: Name of the tensor.
        least: Its smallest value; -1 stands for inputs in their usual order.
        most: Its largest.
        groups: How many groups there are.

    Raises:
        WeightsError: a group is named that has no scale.
    """
    if least < -1 or most >= groups:
        raise WeightsError(
            "An input names a group that is not there",
            where=key,
            expected=f"numbers from 0 to {groups - 1}",
            found=most if most >= groups else least,
            mend="The checkpoint is damaged, or config.json does not describe it.",
        )


def _cells(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _absent(data: TensorInfo, what: str, name: str) -> WeightsError:
    path = data.key.rpartition(".")[0]
    return WeightsError(
        f"A quantized weight has no {what}",
        where=data.key,
        expected=f"{path}.{name}",
        mend="Without it the numbers mean nothing; take a checkpoint that is whole.",
    )


def _unfit(info: TensorInfo, dtypes: tuple[str, ...], shapes: list[Shape], why: str) -> WeightsError:
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    return WeightsError(
        "A tensor of a quantized weight does not fit its layer",
        where=info.key,
        expected=f"{' or '.join(dtypes)} {wanted} ({why})",
        found=f"{info.dtype} {list(info.shape)}",
        mend="Check that config.json, and quantization_config in it, describe these weights.",
    )
