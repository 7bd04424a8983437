# SPDX-License-Identifier: Apache-2.0
"""Loading what another library has quantized (compressed-tensors, fp8), kept as it lies or decoded."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pretrained.core.budgets import DISK
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.dtypes import DTYPES
from pretrained.core.keys import Drop, match_keys
from pretrained.core.plan import LoadPlan, LoadPolicy, LoadStep, target_dtype
from pretrained.core.report import fold_keys
from pretrained.core.stored_config import ReadWish, StoredConfig
from pretrained.core.stored_layers import (
    ACTIVATION_RULES,
    DATA_NAMES,
    ORDER_NAME,
    SCALE_NAMES,
    SHAPE_NAME,
    TENSOR_NAMES,
    ZERO_NAME,
    LayerForm,
    check_order,
    check_said_shape,
    form_of,
)
from pretrained.errors import NotYetError, WeightsError
from pretrained.torch.quantize import all_ties, dense_shape, module_ties, packed_keys, put
from pretrained.torch.quantizers.base import Quantizer, let_go
from pretrained.torch.stored_leaf import StoredLeaf, StoredLinear, stored_leaf
from pretrained.torch.tensors import TORCH_DTYPES, Read

logger = logging.getLogger(__name__)


class Stored(Quantizer):
    """Puts leaves where the files hold quantized weights; each keeps the file's tensors, or is decoded.

    Args:
        config: What config.json says.
        wish: What the call asks.
        dtype: As `Quantizer`.
        key_mapping: The user's ``{regex: replacement}``.
        is_mapped: Whether weights are read from maps of files, whose pages can be given back.
    """

    is_active = True

    def __init__(
        self,
        config: StoredConfig,
        wish: ReadWish,
        dtype: str | None,
        *,
        key_mapping: Mapping[str, str] | None = None,
        is_mapped: bool = False,
    ) -> None:
        super().__init__(dtype)
        self.config, self.wish, self.key_mapping, self.is_mapped = config, wish, key_mapping, is_mapped
        # What stood where leaves are, by path, for decoding.
        self._plain: dict[str, nn.Module] = {}
        # Leaves whose integers are still views of a file.
        self._views: set[str] = set()

    # -- before the plan -----------------------------------------------------------------------

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Put leaves where the files hold quantized weights; the files decide, not the class."""
        modules = {
            path: module
            for path, module in model.named_modules(remove_duplicate=False)
            if type(module) in (nn.Linear, nn.Embedding)
        }
        found = self._tensors(model, modules, checkpoint)
        forms, plain = {}, []
        for path, module in modules.items():
            tensors = found.get(path, {})
            names, classes = _names(path, tensors), _classes(module)
            if not _is_quantized(tensors):
                if tensors and isinstance(module, nn.Linear) and not self.config.is_plain(names, classes):
                    plain.append(path)
                continue
            forms[path] = self._form(dense_shape(module), names, classes, tensors)
        if not forms:
            raise WeightsError(
                f"The config says that the weights are quantized ({self.config.method}), and the files "
                "hold plain ones",
                where=checkpoint.files[0] if checkpoint.files else "state_dict",
                mend="Take quantization_config out of config.json; as an argument it quantizes.",
            )
        self._settle_ties(model, modules, forms, found)
        policy = self._policy(model)
        for path, form in forms.items():
            dtype = TORCH_DTYPES[
                target_dtype(f"{path}.weight", "float32", policy) if self.dtype else "float32"
            ]
            self._plain[path] = modules[path]
            put(model, path, stored_leaf(modules[path], form, dtype, self.wish.compute_dtype))
        idle = {
            info.key: "is no part of how 8-bit floats are read"
            for path, form in forms.items()
            for name, info in found.get(path, {}).items()
            if name not in form.tensors
        }
        self.rules = (*ACTIVATION_RULES, *(Drop(key, why) for key, why in idle.items()))
        self._note(forms, plain)

    def _tensors(
        self, model: Any, modules: Iterable[str], checkpoint: Checkpoint
    ) -> dict[str, dict[str, TensorInfo]]:
        """Return path -> name -> tensor of what the files hold of each module's weight."""
        sources = match_keys(
            checkpoint.tensors,
            [f"{path}.{name}" for path in modules for name in TENSOR_NAMES],
            base_prefix=model.base_model_prefix,
            rules=model.key_rules,
            key_mapping=self.key_mapping,
        ).sources
        found: dict[str, dict[str, TensorInfo]] = {}
        for key, source in sources.items():
            path, _, name = key.rpartition(".")
            found.setdefault(path, {})[name] = checkpoint.tensors[source]
        return found

    def _form(
        self,
        shape: tuple[int, int],
        names: tuple[str, ...],
        classes: tuple[str, ...],
        tensors: Mapping[str, TensorInfo],
    ) -> LayerForm:
        scheme = self.config.scheme_for(names, classes)
        if scheme is None:
            raise WeightsError(
                "The files hold a quantized weight of which the config does not speak",
                where=names[0],
                expected="a group in quantization_config whose targets name it, and no entry in ignore",
                found=", ".join(sorted(tensors)),
                mend="config.json is not that of these weights, or has been changed.",
            )
        if not any(name in tensors for name in DATA_NAMES):
            raise WeightsError(
                "The files hold scales of a weight, and not the weight",
                where=names[0],
                found=", ".join(sorted(tensors)),
                mend="Take a checkpoint that is whole.",
            )
        return form_of(shape, scheme, tensors)

    def _settle_ties(
        self,
        model: Any,
        modules: Mapping[str, nn.Module],
        forms: dict[str, LayerForm],
        found: Mapping[str, Mapping[str, TensorInfo]],
    ) -> None:
        """Give the other end of a tied weight the same form, or note that it is not tied after all."""
        for alias, owner in module_ties(model).items():
            if alias in forms and owner in found:
                logger.info("%s is quantized on its own and not tied to %s", alias, owner)
                model.config.tie_word_embeddings = False
                continue
            for here, there in ((alias, owner), (owner, alias)):
                if there in forms and here not in found and here in modules:
                    forms[here] = forms[there]

    def _policy(self, model: Any) -> LoadPolicy:
        return LoadPolicy(
            dtype=self.dtype,
            keep_fp32=tuple(model._keep_in_fp32_modules or ()),
            keep_fp32_strict=tuple(model._keep_in_fp32_modules_strict or ()),
        )

    def _note(self, forms: Mapping[str, LayerForm], plain: list[str]) -> None:
        counts: dict[str, int] = {}
        for form in forms.values():
            counts[form.name] = counts.get(form.name, 0) + 1
        listed = ", ".join(f"{count} as {name}" for name, count in sorted(counts.items()))
        verb = "decoded" if self.wish.dequantize else "kept"
        self.notes.append(f"{len(forms)} quantized layers of {self.config.method} {verb}: {listed}")
        if self.config.rounds_activations:
            self.notes.append(
                "the config has activations or the cache quantized too; here they are not, only weights are"
            )
        if plain:
            self.notes.append(
                "stored plain, although the config counts them as quantized: " + ", ".join(fold_keys(plain))
            )

    # -- the plan ------------------------------------------------------------------------------

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Check small tensors as they are read; with ``dequantize=True`` read whole layers instead."""
        leaves = {path: model.get_submodule(path) for path in self._plain}

        def read_checked(step: LoadStep, device: torch.device) -> torch.Tensor:
            tensor = read(step, device)
            path, _, name = step.key.rpartition(".")
            if path in leaves:
                _check_values(name, step.source.key, tensor, leaves[path].form)
                if (
                    self.is_mapped
                    and name == leaves[path].form.data
                    and step.is_view
                    and device.type == "cpu"
                ):
                    self._views.add(path)
            return tensor

        absent = [key for key in plan.initialise if key in packed_keys(model) and key not in plan.ties]
        if absent:
            raise WeightsError(
                "Parts of quantized weights are not in the checkpoint", where=", ".join(absent[:5])
            )
        if not self.wish.dequantize:
            return plan, read_checked
        return self._decoding(model, plan, read_checked, leaves)

    def _decoding(
        self, model: Any, plan: LoadPlan, read: Read, leaves: Mapping[str, StoredLeaf]
    ) -> tuple[LoadPlan, Read]:
        parts: dict[str, dict[str, LoadStep]] = {}
        steps = []
        for step in plan.steps:
            path, _, name = step.key.rpartition(".")
            if path in leaves and name in leaves[path].form.tensors:
                parts.setdefault(path, {})[name] = step
            else:
                steps.append(step)
        policy = self._policy(model)
        for path, tensors in parts.items():
            form, key = leaves[path].form, f"{path}.weight"
            dtype = target_dtype(key, "float32", policy) if self.dtype else _scale_dtype(form)
            source = tensors[form.data].source
            # `apply` marks a step that is no view, whatever its dtype.
            steps.append(LoadStep(key, source, dtype, _decoded, form.shape))
        for path, module in self._plain.items():
            put(model, path, module)
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        ties = {alias: owner for alias, owner in all_ties(model).items() if alias in names}
        steps.sort(key=lambda step: (str(step.source.file), step.source.offset))
        whole = {f"{path}.weight": path for path in parts}

        def read_whole(step: LoadStep, device: torch.device) -> torch.Tensor:
            if step.key not in whole:
                return read(step, device)
            path = whole[step.key]
            form = leaves[path].form
            with torch.device("meta"):
                leaf = StoredLinear(form, torch.float32)
            cpu = torch.device("cpu")
            views = {name: read(part, cpu) for name, part in parts[path].items()}
            for name, tensor in views.items():
                leaf._parameters[name] = nn.Parameter(tensor, requires_grad=False)
            target = torch.empty(form.shape, dtype=TORCH_DTYPES[step.dtype])
            leaf.decode_into(target)
            if path in self._views:
                let_go(views[form.data])
            return target.to(device)

        return dataclasses.replace(plan, steps=tuple(steps), ties=ties), read_whole

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Allow the disk: kept tensors are used as they lie, decoded ones as converted copies are."""
        if self.wish.dequantize:
            _refuse_disk(homes)

    # -- after the bytes -----------------------------------------------------------------------

    def finish(self, model: Any) -> None:
        """Make layers ready, and leave the config as the files have it, or without the entry."""
        if self.wish.dequantize:
            model.config.__dict__.pop("quantization_config", None)
            return
        ties = all_ties(model)
        tied = {key.rpartition(".")[0] for key in (*ties, *ties.values())}
        for path in self._plain:
            leaf = model.get_submodule(path)
            if path in tied or leaf.weight.is_meta:
                continue
            if leaf._forward_pre_hooks:
                leaf.lay_out_at_call()
                continue
            before = leaf.weight.detach()
            if (
                leaf.use_kernel_layout()
                and path in self._views
                and leaf.weight.data_ptr() != before.data_ptr()
            ):
                let_go(before)
        model.config.quantization_config = copy.deepcopy(dict(self.config.stored))


def _is_quantized(tensors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether a module's tensors are more than a plain weight."""
    if any(name != "weight" for name in tensors):
        return True
    weight = tensors.get("weight")
    return weight is not None and (weight.dtype not in DTYPES or not DTYPES[weight.dtype].is_loadable)


def _names(path: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Return what a layer is called: in the file, where that differs, and in the model."""
    keys = [tensors[name].key for name in (*DATA_NAMES, *SCALE_NAMES, ZERO_NAME) if name in tensors]
    return tuple(dict.fromkeys([*(key.rpartition(".")[0] for key in keys[:1]), path]))


def _classes(module: nn.Module) -> tuple[str, ...]:
    return tuple(cls.__name__ for cls in type(module).__mro__ if issubclass(cls, nn.Module))


def _check_values(name: str, key: str, tensor: torch.Tensor, form: LayerForm) -> None:
    if name == SHAPE_NAME:
        check_said_shape(key, tuple(int(size) for size in tensor), form.shape)
    elif name == ORDER_NAME and tensor.numel():
        check_order(key, int(tensor.min()), int(tensor.max()), form.grid[1])


def _scale_dtype(form: LayerForm) -> str:
    """Return what to decode into where nothing asks for a dtype: half precision where the scales have it."""
    return form.tensors[form.scale][0]


def _decoded(values: Any) -> Any:
    raise NotImplementedError("whole layers are read together")


def _refuse_disk(homes: Iterable[Any]) -> None:
    if DISK in homes:
        raise NotYetError(
            "Weights that this load decodes cannot be placed on disk yet",
            where="quantization_config.dequantize, device_map",
            mend="Leave dequantize out: quantized weights are used on disk as they lie.",
        )
