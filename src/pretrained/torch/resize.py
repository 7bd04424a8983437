# SPDX-License-Identifier: Apache-2.0
"""Resizing what has a row for each token: embeddings, language-model head, its bias, and the configs.

`resize_vocabulary` finds all of it, makes every new tensor, and then puts them in as one transaction
(`pretrained.torch.row_edits`). Tensors that are one stay one; those that are not stay apart.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from pretrained.core.config import PreTrainedConfig
from pretrained.core.quantization import QuantizationConfig
from pretrained.errors import ArgumentError, ConfigError
from pretrained.torch.devices import check_memory
from pretrained.torch.mapped_mixin import check_files
from pretrained.torch.new_rows import Rows, rows_as_initialised, rows_near_mean
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized import IntegerLeaf, QuantizedLeaf
from pretrained.torch.rounding import quantize
from pretrained.torch.row_edits import (
    Undo,
    check_editable,
    check_whole,
    rehome,
    replace_parameters,
    transaction,
    with_rows,
)

logger = logging.getLogger(__name__)

# Where layers say how many rows they have.
_COUNTS: Final = ("num_embeddings", "out_features", "nf")
# Parameters of a layer that have a row for each of its weight's.
_PARTS: Final = ("weight", "weight_scale", "bias")
# Settings of a generation config that list tokens, or sequences of them.
_TOKEN_LISTS: Final = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES: Final = ("bad_words_ids", "sequence_bias")


@dataclass(slots=True)
class Table:
    """A layer with a row for each token, or a parameter that stands alone beside one.

    Attributes:
        path: Of the module.
        module: The layer, or what holds the parameter.
        alone: Name of a parameter [rows] of which nothing else in the module depends; None for a layer.
    """

    path: str
    module: Any
    alone: str | None = None

    @property
    def axis(self) -> int:
        """Which axis of the weight counts rows."""
        return 1 if isinstance(self.module, Conv1D) else 0

    @property
    def rows(self) -> int:
        """Rows that it has now."""
        if self.alone is not None:
            return int(self.module._parameters[self.alone].shape[0])
        return int(self.module.weight.shape[self.axis])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is resized, by name in the module."""
        held = self.module._parameters
        names = _PARTS if self.alone is None else (self.alone,)
        return {name: held[name] for name in names if held.get(name) is not None}

    def read(self) -> Rows:
        """Return what reads rows of the weight as numbers."""
        if isinstance(self.module, QuantizedLeaf):
            return lambda part: self.module.rows(part, torch.float32)
        whole = _whole(self.module.weight)
        matrix = whole.t() if self.axis else whole
        return lambda part: matrix[part]


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return all values of a parameter that may be sharded over several processes."""
    values: Any = parameter.detach()
    return values.full_tensor() if hasattr(values, "full_tensor") else values  # type: ignore[no-any-return]


# -- arguments -----------------------------------------------------------------------------------


def wanted_size(rows: int, size: Any, multiple: Any) -> int:
    """Return how many rows a call asks for.

    Args:
        rows: Rows that are there.
        size: `new_num_tokens`; None for those that are there.
        multiple: `pad_to_multiple_of`; None for 1.

    Raises:
        ArgumentError: either is no whole number above 0.
    """
    size = rows if size is None else positive(size, "new_num_tokens", "Pass len(tokenizer), for example.")
    if multiple is None:
        return size
    multiple = positive(multiple, "pad_to_multiple_of", "Pass 64 or 128, for example, or leave it out.")
    return -(-size // multiple) * multiple


def positive(value: Any, name: str, mend: str) -> int:
    """Return a whole number above 0: an int, or what stands for one, such as numpy's.

    Args:
        value: What a user gave.
        name: The argument.
        mend: What to pass instead.

    Raises:
        ArgumentError: it is something else, booleans and floats among it.
    """
    try:
        # True is an int in Python, and here always a mistake.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1 or getattr(value, "dtype", None) in (torch.bool,):
        raise ArgumentError(
            f"{name} counts rows",
            where=name,
            expected="a whole number above 0",
            found=repr(value)[:100],
            mend=mend,
        )
    return number


# -- what there is -------------------------------------------------------------------------------


def vocabulary_tables(model: Any) -> list[Table]:
    """Return every layer with a row for each token, the input embedding first.

    Args:
        model: A `PreTrainedModel`.

    Raises:
        ArgumentError: one of them is of a kind that cannot be resized, or its rows are not all here.
        NotYetError: the model is sharded by FSDP.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    tables = [Table(paths[id(embedding)], embedding)]
    if head is not None and head is not embedding:
        tables.append(Table(paths[id(head)], head))
    for table in tables:
        _check(model, table)
    held = {id(p) for table in tables for p in table.parameters().values()}
    # Weights that the class ties to these and that came apart since must still fit them.
    for alias, owner in model.ties().items():
        pair = (_parameter(model, alias), _parameter(model, owner))
        if any(p is None for p in pair) or sum(id(p) in held for p in pair) != 1:
            continue
        path, _, name = (alias if id(pair[1]) in held else owner).rpartition(".")
        table = Table(path, model.get_submodule(path), None if name == "weight" else name)
        _check(model, table)
        held |= {id(p) for p in table.parameters().values()}
        tables.append(table)
    return tables


def _parameter(model: nn.Module, key: str) -> nn.Parameter | None:
    path, _, name = key.rpartition(".")
    try:
        return model.get_submodule(path)._parameters.get(name)
    except AttributeError:
        return None


def _check(model: nn.Module, table: Table) -> None:
    if table.alone is None:
        _check_kind(table.module, f"{table.path}.weight")
    for name, parameter in table.parameters().items():
        where = f"{table.path}.{name}"
        check_editable(model, parameter, where)
        if name in ("weight", "bias", table.alone):
            check_whole(table.module, parameter, where, 2 if name == "weight" else 1)


def _check_kind(module: Any, where: str) -> None:
    """Raise for a layer that rows cannot be added to or taken from."""
    if isinstance(module, QuantizedLeaf):
        plain_int8 = (
            isinstance(module, IntegerLeaf)
            and module.form.bits == 8
            and module.weight_scale.dim() == 1
            and module.weight_zero is None
            and module.weight_order is None
        )
        if not plain_int8:
            raise ArgumentError(
                "A table that is quantized in this way cannot be resized",
                where=where,
                expected="a plain one, or int8 with a scale for each row",
                found=f"{type(module).__name__}, {module.scheme}",
                mend="Call dequantize() first, or resize the plain model and quantize it then.",
            )
    elif not isinstance(module, nn.Embedding | nn.Linear | Conv1D) or "weight" not in module._parameters:
        raise ArgumentError(
            "This layer is of a kind that cannot be resized",
            where=where,
            expected="torch's Embedding or Linear, or a Conv1D",
            found=f"{type(module).__module__}.{type(module).__qualname__}",
            mend="Merge or unload adapters and remove parametrizations first, or replace the layer with "
            "set_input_embeddings or set_output_embeddings.",
        )


# -- new values ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Edit:
    """New parameters by the identity of the old ones."""

    new: dict[int, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    def resize(self, model: Any, table: Table, size: int, *, near_mean: bool) -> None:
        """Make the new tensors of one table; those that it shares with an earlier one are there already."""
        missing = {name: old for name, old in table.parameters().items() if id(old) not in self.new}
        count = size - table.rows
        fresh: dict[str, torch.Tensor] = {}
        if count > 0 and missing and not any(old.is_meta for old in missing.values()):
            fresh = _near_mean(table, missing, count) if near_mean else _as_initialised(model, table, count)
        for name, old in missing.items():
            self.put(old, size, fresh.get(name), axis=table.axis if name == "weight" else 0)

    def put(self, old: nn.Parameter, size: int, fresh: torch.Tensor | None, *, axis: int = 0) -> None:
        """Make one new tensor."""
        self.new[id(old)] = with_rows(old, size, fresh, axis=axis)


def _near_mean(table: Table, names: Container[str], count: int) -> dict[str, torch.Tensor]:
    """Return new rows by the name of the parameter."""
    made: dict[str, torch.Tensor] = {}
    if table.alone is None and "weight" in names:
        rows = rows_near_mean(table.read(), table.rows, count, where=f"{table.path}.weight")
        made = _stored(table, rows)
    name = table.alone or "bias"
    if name in names:
        values = _whole(table.parameters()[name])[:, None]
        drawn = rows_near_mean(lambda part: values[part], len(values), count, where=f"{table.path}.{name}")
        made[name] = drawn[:, 0]
    return made


def _as_initialised(model: Any, table: Table, count: int) -> dict[str, torch.Tensor]:
    """Return new rows by the name of the parameter."""
    if table.alone is not None:
        # It belongs to no layer that `_init_weights` knows alone; in every family it begins with zeros.
        return {table.alone: torch.zeros(count)}
    module = table.module
    if not isinstance(module, IntegerLeaf):
        return rows_as_initialised(model, module, count, axis=table.axis, where=f"{table.path}.weight")
    # The layer that stood here, as far as `_init_weights` asks.
    is_dense = hasattr(module, "out_features")
    plain = nn.Linear(module.shape[1], 1) if is_dense else nn.Embedding(1, module.shape[1])
    made = rows_as_initialised(model, plain, count, axis=0, where=f"{table.path}.weight")
    return {**made, **_stored(table, made["weight"])}


def _stored(table: Table, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return rows in the form that the layer keeps them in."""
    if isinstance(table.module, IntegerLeaf):
        packed = quantize(rows, QuantizationConfig(quant_method="int8"), key=f"{table.path}.weight")
        return {"weight": packed.weight, "weight_scale": packed.scale}
    return {"weight": rows.t() if table.axis else rows}


# -- settings ------------------------------------------------------------------------------------


def _configs(model: Any, rows: int) -> list[PreTrainedConfig]:
    """Return the configs that speak of this vocabulary, each once."""
    text = model.config.get_text_config()
    found = {id(text): text}
    for module in (model, *model.modules()):
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and getattr(config, "vocab_size", None) == rows:
            found.setdefault(id(config), config)
    return list(found.values())


def _cut(values: Mapping[str, Any], size: int, rows: int) -> dict[str, Any]:
    """Return the settings that name tokens which are cut off, without those."""
    changed: dict[str, Any] = {}
    gone = range(size, rows)
    for name, value in values.items():
        if name.endswith("_token_id") and isinstance(value, int):
            left: Any = None if value in gone else value
        elif name in _TOKEN_LISTS or (name.endswith("_token_id") and isinstance(value, list)):
            left = [token for token in value or () if token not in gone] or None
        elif name in _SEQUENCES and value is not None:
            left = _sequences_left(value, gone)
        else:
            continue
        if left != value and value is not None:
            changed[name] = left
    return changed


def _sequences_left(value: Any, gone: range) -> Any:
    if isinstance(value, Mapping):
        return {ids: bias for ids, bias in value.items() if not any(i in gone for i in ids)} or None
    tokens = [entry[0] if isinstance(entry[0], list | tuple) else entry for entry in value]
    return [
        entry for entry, ids in zip(value, tokens, strict=True) if not any(i in gone for i in ids)
    ] or None


def _check_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    """Raise where a config would contradict itself, before anything is changed."""
    try:
        copy.deepcopy(config).update(changes)
    except ConfigError as error:
        raise ArgumentError(
            f"The config does not allow this size: {error.what[0].lower()}{error.what[1:]}",
            where=error.where,
            expected=error.expected,
            found=error.found,
            mend=error.mend or "Keep the tokens that the config names, or change it first.",
        ) from error


# -- the edits -----------------------------------------------------------------------------------


def resize_vocabulary(model: Any, size: int, *, near_mean: bool) -> None:
    """Give a model as many rows for tokens as asked, everywhere; or leave it as it was and raise.

    Args:
        model: A `PreTrainedModel`.
        size: Rows.
        near_mean: New rows lie near the mean of the old ones; False initialises them as the class does.

    Raises:
        ArgumentError: a layer or a config that does not allow it.
        NotYetError: the model is sharded by FSDP.
        PlacementError: the new tensors do not fit into memory.
        CheckpointError: a file that weights are views of was changed.
    """
    check_files(model)
    if model.__dict__.get("_part_of"):
        logger.warning(
            "%s was built as a part of %s. Where that is still in use, resize it instead: what it has beside "
            "this part keeps the old size.",
            type(model).__name__,
            model.__dict__["_part_of"],
        )
    tables = vocabulary_tables(model)
    rows = tables[0].rows
    changing = [table for table in tables if table.rows != size]
    configs = {id(config): config for config in _configs(model, rows)}
    changes = {
        key: {"vocab_size": size, **_cut(config.__dict__, size, rows)} for key, config in configs.items()
    }
    for key, config in configs.items():
        _check_config(config, changes[key])
    generation: Any = getattr(model, "generation_config", None)
    unset = {} if generation is None else _cut(generation._values, size, rows)
    _check_room(changing, size)
    edit = _Edit()
    # Tensors that are made in inference mode could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        for table in changing:
            edit.resize(model, table, size, near_mean=near_mean)
    with transaction() as undo:
        touched = replace_parameters(model, edit.new, undo)
        for module in touched:
            _count_rows(module, size, undo)
        for module in model.modules():
            if type(module.__dict__.get("vocab_size")) is int and module.__dict__["vocab_size"] == rows:
                undo.set_item(module.__dict__, "vocab_size", size)
        for key, config in configs.items():
            undo.keep(config.__dict__)
            config.update(changes[key])
        if unset:
            undo.keep(generation._values)
            generation._values.update(unset)
    _warn_of_cut([*changes.values(), unset], size)


def resize_positions(model: Any, path: str, size: int) -> None:
    """Give a table of learned positions as many rows as asked; or leave the model as it was and raise.

    Args:
        model: A `PreTrainedModel`.
        path: Of the table in the model.
        size: Rows.

    Raises:
        ArgumentError: the padding's row would be cut off, or the table is of a kind that cannot be resized.
        NotYetError: the model is sharded by FSDP.
        PlacementError: the new tensors do not fit into memory.
        CheckpointError: a file that weights are views of was changed.
    """
    check_files(model)
    table = Table(path, model.get_submodule(path))
    _check(model, table)
    rows, padding = table.rows, getattr(table.module, "padding_idx", None)
    if padding is not None and size <= padding + 1:
        raise ArgumentError(
            "No position would be left for text",
            where="new_num_position_embeddings",
            expected=f"more than {padding + 1}: positions begin after that of the padding, {padding}",
            found=size,
            mend="Pass the tokens of the longest text plus that number.",
        )
    changes = {"max_position_embeddings": size}
    _check_config(model.config, changes)
    _check_room([table] if size != rows else [], size)
    edit = _Edit()
    if size != rows:
        with torch.inference_mode(False), torch.no_grad():
            fresh = None
            if size > rows and not table.module.weight.is_meta:
                fresh = model._new_positions(rows, size)
                if fresh is None:
                    made = rows_as_initialised(model, table.module, size - rows, axis=0, where=path)
                    fresh = made["weight"]
            edit.put(table.module._parameters["weight"], size, fresh)
    with transaction() as undo:
        for module in replace_parameters(model, edit.new, undo):
            _count_rows(module, size, undo)
        _resize_numbers(model.get_submodule(path.rpartition(".")[0]), rows, size, undo)
        undo.keep(model.config.__dict__)
        model.config.update(changes)


def _check_room(tables: Sequence[Table], size: int) -> None:
    sizes = {}
    for table in tables:
        for name, old in table.parameters().items():
            if old.device.type == "cpu":
                sizes[f"{table.path}.{name}"] = old.nbytes // max(table.rows, 1) * size
    check_memory(sizes)


def _count_rows(module: Any, size: int, undo: Undo) -> None:
    """Set what a layer says about its rows."""
    for name in _COUNTS:
        if name in module.__dict__:
            undo.set_item(module.__dict__, name, size)
    padding = module.__dict__.get("padding_idx")
    if isinstance(module, nn.Embedding) and padding is not None and padding >= size:
        undo.set_item(module.__dict__, "padding_idx", None)
    if isinstance(module, QuantizedLeaf):
        undo.set_item(module.__dict__, "shape", (size, module.shape[1]))
        if padding is not None and padding >= size:
            undo.set_item(module.__dict__, "padding_idx", None)


def _resize_numbers(module: nn.Module, rows: int, size: int, undo: Undo) -> None:
    """Resize buffers that number the positions, where a class of one's own has them."""
    for name, make in (("position_ids", torch.arange), ("token_type_ids", torch.zeros)):
        old = module._buffers.get(name)
        if old is not None and old.shape[-1] == rows:
            shape = (*old.shape[:-1], size)
            new = make(size, dtype=old.dtype, device=old.device).expand(shape).clone()  # type: ignore[operator]
            undo.set_item(module._buffers, name, new)


def _warn_of_cut(changes: Sequence[Mapping[str, Any]], size: int) -> None:
    names = {name for values in changes for name in values if name != "vocab_size"}
    if names:
        logger.warning(
            "The configs named tokens that are cut off, from %d on; they no longer do in %s. Set these again "
            "to tokens that are left.",
            size,
            ", ".join(sorted(names)),
        )


# -- ties ----------------------------------------------------------------------------------------


def untie(model: Any, alias: str, owner: str) -> None:
    """Give a tied layer memory of its own, with the values it has, and say so in the config.

    Args:
        model: A `PreTrainedModel` whose config decides about this tie.
        alias: Key of the weight that gets it.
        owner: Key of the weight that it shares now.

    Raises:
        PlacementError: the copy does not fit into memory.
    """
    check_files(model)
    path = alias.rpartition(".")[0]
    head, embedding = model.get_submodule(path), model.get_submodule(owner.rpartition(".")[0])
    shared = {
        name: parameter
        for name, parameter in head._parameters.items()
        if parameter is not None and any(parameter is other for other in embedding._parameters.values())
    }
    sizes = {f"{path}.{name}": p.nbytes for name, p in shared.items() if p.device.type == "cpu"}
    check_memory(sizes)
    own = {id(parameter): (parameter, _copy(parameter)) for parameter in shared.values()}
    with transaction() as undo, rehome(model, own, undo, only=path):
        for name, parameter in shared.items():
            undo.set_item(head._parameters, name, own[id(parameter)][1])
        undo.keep(model.config.__dict__)
        model.config.update({"tie_word_embeddings": False})


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    with torch.inference_mode(False):
        made = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made
