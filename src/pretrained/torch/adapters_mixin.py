# SPDX-License-Identifier: Apache-2.0
"""`AdapterMixin`: small trained additions to a frozen model, made, loaded and switched through peft.

peft does the mathematics; it is imported when the first adapter is asked for. Here are the doors that
models of the ecosystem have, and the reading and writing of adapter files.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrained.core.adapter_files import ADAPTER_STEM, PREFIX, read_adapter_config
from pretrained.core.files import open_checkpoint
from pretrained.core.hub import HubOptions, Source, resolve
from pretrained.core.plan import LoadStep
from pretrained.core.reader import MappedFiles
from pretrained.errors import (
    ArgumentError,
    ConfigError,
    FileError,
    MissingDependencyError,
    NotYetError,
    UnknownArgumentError,
    WeightsError,
    did_you_mean,
)
from pretrained.torch.tensors import mapped_reader

# Known to the ecosystem's load_adapter and without effect here: name -> values that ask for nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "hotswap": (None, False, "auto"),
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True, False),
    "device_map": (None, "auto", "cpu"),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_index": (None,),
    "key_mapping": (None,),
    "load_config": (None,),
}


class AdapterMixin:
    """Gives a model adapters. The model's own weights are frozen as soon as it has one."""

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """Put a new adapter into the model, use it, and make it the only thing that is trained.

        Args:
            adapter_config: A peft configuration, such as ``LoraConfig(target_modules=["q_proj"])``. Kinds
                that change the inputs (prompt and prefix tuning) need `peft.get_peft_model`.
            adapter_name: Its name; None for ``"default"``.

        Raises:
            MissingDependencyError: peft is not installed.
            ArgumentError: there is an adapter of that name, `adapter_config` is no configuration, or peft
                cannot build it (no layer is of the names that it targets, or of a kind that it knows).
            NotYetError: the model's weights live in several places or on disk.
        """
        name = adapter_name or "default"
        peft = _peft()
        if not isinstance(adapter_config, peft.PeftConfig):
            raise ArgumentError(
                "An adapter is made from a configuration of peft",
                where="adapter_config",
                expected="a PeftConfig, such as peft.LoraConfig(...)",
                found=type(adapter_config).__name__,
            )
        self._refuse_adapter_name(name)
        adapter_config.base_model_name_or_path = self.name_or_path or None  # type: ignore[attr-defined]
        self._inject(adapter_config, name)
        self.set_adapter(name)

    def load_adapter(
        self,
        peft_model_id: str | Path | Source | None = None,
        adapter_name: str | None = None,
        *,
        is_trainable: bool = False,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
        adapter_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read an adapter from a folder or the hub, put it into the model and use it.

        Args:
            peft_model_id: Folder or hub id with adapter_config.json and adapter_model.safetensors (or
                .bin, whose pickle is not executed); None with `peft_config` and `adapter_state_dict`.
            adapter_name: Its name in the model; None for ``"default"``.
            is_trainable: Whether its weights are trained.
            peft_config: A peft configuration instead of the file's.
            adapter_state_dict: Weights by name instead of the file's.
            adapter_kwargs: Further hub arguments.
            **kwargs: Hub arguments: `revision`, `subfolder`, `token`, ...

        Raises:
            MissingDependencyError: peft is not installed.
            FileError: there is no adapter there.
            ConfigError: its config cannot be used.
            WeightsError: its weights do not fit the model; the model is as it was.
            ArgumentError: there is an adapter of that name, or nothing to load from.
            NotYetError: the model's weights live in several places or on disk.
            UnknownArgumentError: an argument that nothing takes.
        """
        name = adapter_name or "default"
        _peft()
        self._refuse_adapter_name(name)
        options = _hub_options({**kwargs, **(adapter_kwargs or {})})
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ArgumentError(
                "Nothing to load an adapter from",
                where="peft_model_id",
                found=None,
                mend="Pass a folder or id, or both peft_config= and adapter_state_dict=.",
            )
        source = None if peft_model_id is None else resolve(peft_model_id, options)
        config = peft_config if peft_config is not None else _read_config(_given(source))
        tensors = adapter_state_dict if adapter_state_dict is not None else _read_weights(_given(source))
        config.inference_mode = not is_trainable
        self._inject(config, name)
        try:
            self._fill(tensors, name, source)
        except Exception:
            self.delete_adapter(name)
            raise
        self.set_adapter(name)
        if not self.training:  # type: ignore[attr-defined]
            self.eval()  # type: ignore[attr-defined]

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use an adapter, or several added up, and no other.

        Args:
            adapter_name: Its name, or a list of names.

        Raises:
            ArgumentError: there is none by that name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = self._adapter_configs()
        for name in names:
            if name not in configs:
                raise ArgumentError(
                    f"There is no adapter {name!r}",
                    where="adapter_name",
                    expected=", ".join(map(repr, configs)),
                    mend=did_you_mean(name, configs) or None,
                )
        frozen = all(configs[name].inference_mode for name in names)
        for layer in _layers(self):
            # Parts that only some adapters have, such as a head that is trained along.
            if not _is_auxiliary(layer):
                layer.set_adapter(names, inference_mode=frozen)
                continue
            held = [name for name in names if name in getattr(layer, "_adapters", names)]
            if held:
                layer.set_adapter(held[0] if len(held) == 1 else held, inference_mode=frozen)

    def enable_adapters(self) -> None:
        """Use the active adapters again after `disable_adapters`."""
        self._adapter_configs()
        for layer in _layers(self):
            layer.enable_adapters(enabled=True)

    def disable_adapters(self) -> None:
        """Compute as the base model alone; the adapters stay in the model."""
        self._adapter_configs()
        for layer in _layers(self):
            layer.enable_adapters(enabled=False)

    def active_adapters(self) -> list[str]:
        """Return the names of the adapters that are in use.

        Raises:
            ArgumentError: the model has none.
        """
        self._adapter_configs()
        for layer in _layers(self):
            if not _is_auxiliary(layer):
                active = layer.active_adapter
                return [active] if isinstance(active, str) else list(active)
        return []

    def active_adapter(self) -> str:
        """Return the name of the first adapter in use."""
        return self.active_adapters()[0]

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the weights of an adapter, by the names that peft gives them.

        Args:
            adapter_name: Its name; None for the active one.
            state_dict: The model's weights to pick them out of; None for its own.

        Raises:
            ArgumentError: there is no such adapter.
        """
        name = adapter_name or self.active_adapter()
        if name not in self._adapter_configs():
            raise ArgumentError(
                f"There is no adapter {name!r}",
                where="adapter_name",
                expected=", ".join(map(repr, self._adapter_configs())),
            )
        found: dict[str, torch.Tensor] = _peft().get_peft_model_state_dict(
            self, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
        )
        return found

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Remove adapters. With the last one the model is a plain one again, trained where it was before.

        Args:
            adapter_names: A name, or a list of names.

        Raises:
            ArgumentError: there is none by a name; nothing has changed then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        configs = self._adapter_configs()
        absent = [name for name in names if name not in configs]
        if absent:
            raise ArgumentError(
                f"There is no adapter {absent[0]!r} to delete",
                where="adapter_names",
                expected=", ".join(map(repr, configs)),
            )
        delete = import_module("peft.functional").delete_adapter
        for name in names:
            if len(configs) > 1:
                delete(self, adapter_name=name, prefix=f"{configs[name].peft_type.value.lower()}_")
            else:
                _unwrap(self)  # type: ignore[arg-type]
            del configs[name]
        if not configs:
            self._forget_adapters()

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: adapters are exchanged by `delete_adapter` and `load_adapter`.

        Raises:
            NotYetError: always.
        """
        raise NotYetError(
            "Exchanging an adapter's weights in place is not offered",
            where="enable_peft_hotswap",
            mend="Call delete_adapter(name), then load_adapter(folder, name).",
        )

    # -- inside --------------------------------------------------------------------------------

    def has_adapters(self) -> bool:
        """Tell whether the model holds adapters, made here or by peft."""
        return bool(self.__dict__.get("peft_config")) and next(_layers(self), None) is not None

    def _adapter_configs(self) -> dict[str, Any]:
        """Return the configurations of the model's adapters, by name."""
        if not self.has_adapters():
            raise ArgumentError(
                f"{type(self).__name__} has no adapters",
                where="adapters",
                mend="Call add_adapter(config) or load_adapter(folder) first.",
            )
        configs: dict[str, Any] = self.__dict__["peft_config"]
        return configs

    def _refuse_adapter_name(self, name: str) -> None:
        if not name.isidentifier() and not name.replace("-", "_").replace(" ", "_").isidentifier():
            raise ArgumentError(
                "An adapter's name becomes a part of its weights' names",
                where="adapter_name",
                expected="letters, digits, '_' and '-'",
                found=repr(name)[:100],
            )
        if self.has_adapters() and name in self._adapter_configs():
            raise ArgumentError(
                f"There is an adapter {name!r} already",
                where="adapter_name",
                mend="Use another name, or delete_adapter it first.",
            )

    def _inject(self, config: Any, name: str) -> None:
        """Put the layers of an adapter into the model."""
        devices = {str(p.device) for p in self.parameters()}  # type: ignore[attr-defined]
        if "_dispatch" in self.__dict__ or len(devices) > 1 or "meta" in devices:
            raise NotYetError(
                "Adapters need the whole model on one device",
                where="device_map",
                found=f"weights on {', '.join(sorted(devices))}, or brought there by hooks",
                mend="Load the model without device_map, or with one device.",
            )
        layers = import_module("pretrained.torch.peft_layers")
        layers.register_quantized_layers(config)
        is_first = not self.has_adapters()
        if is_first:
            trained = [key for key, value in self.named_parameters() if value.requires_grad]  # type: ignore[attr-defined]
            self.__dict__["_trained_before"] = trained
        try:
            with warnings.catch_warnings():
                # That there is an adapter already is what a second one is for.
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                _peft().inject_adapter_in_model(config, self, name)
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            if is_first:
                _unwrap(self)  # type: ignore[arg-type]
                self._forget_adapters()
            else:
                self.__dict__["peft_config"].pop(name, None)
            if isinstance(error, NotYetError | ArgumentError):
                raise
            raise ArgumentError(
                f"peft cannot build this adapter for {type(self).__name__}",
                where=f"target_modules={getattr(config, 'target_modules', None)!r}"[:200],
                found=str(error)[:400],
                mend="Name layers of this model in target_modules; named_modules() lists them.",
            ) from error

    def _forget_adapters(self) -> None:
        """Make the model, whose layers are plain ones again, what it was before its first adapter."""
        self.__dict__.pop("peft_config", None)
        trained = self.__dict__.pop("_trained_before", ())
        for key, value in self.named_parameters():  # type: ignore[attr-defined]
            if key in trained:
                value.requires_grad_(True)

    def _fill(self, tensors: Mapping[str, torch.Tensor], name: str, source: Source | None) -> None:
        """Give an adapter's layers their weights, all of them or none."""
        plain = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        promised = {key: tuple(value.shape) for key, value in self.get_adapter_state_dict(name).items()}
        missing = [key for key in promised if key not in plain]
        further = [key for key in plain if key not in promised]
        wrong = [key for key in promised if key in plain and tuple(plain[key].shape) != promised[key]]
        if missing or further or wrong:
            key = (missing or further or wrong)[0]
            raise WeightsError(
                f"The adapter does not fit {type(self).__name__}: {len(missing)} weights are missing, "
                f"{len(further)} have no place, {len(wrong)} have another shape",
                where=source or "adapter_state_dict",
                expected=f"{key} {list(promised[key])}" if key in promised else "no " + key,
                found=f"{key} {list(plain[key].shape)}" if key in plain else "none of that name",
                mend="Load it into the model that it was trained on.",
            )
        _peft().set_peft_model_state_dict(self, plain, adapter_name=name)


def adapter_to_write(
    model: Any, state_dict: Mapping[str, torch.Tensor] | None, peft_format: bool
) -> tuple[dict[str, torch.Tensor], str]:
    """Return the weights of the active adapter, and the text of its config.

    Args:
        model: A model with adapters.
        state_dict: Weights of the model to pick from; None for its own.
        peft_format: Whether names begin with peft's prefix.

    Raises:
        NotYetError: several adapters are active.
    """
    active = model.active_adapters()
    if len(active) != 1:
        raise NotYetError(
            f"{len(active)} adapters are active, and a folder holds one",
            where=", ".join(active),
            mend="Call set_adapter(name) and save each into a folder of its own.",
        )
    prefix = PREFIX if peft_format else ""
    weights = model.get_adapter_state_dict(active[0], state_dict)
    values = model.peft_config[active[0]].to_dict()
    values["inference_mode"] = True
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    return {prefix + key: tensor for key, tensor in weights.items()}, text


# -- reading ---------------------------------------------------------------------------------------


def _read_config(source: Source) -> Any:
    values, file = read_adapter_config(source)
    try:
        return _peft().PeftConfig.from_peft_type(**values)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            "This adapter's config cannot be used",
            where=file,
            found=f"{type(error).__name__}: {error}"[:300],
            mend="It may need a newer peft, or be damaged.",
        ) from error


def _read_weights(source: Source) -> dict[str, torch.Tensor]:
    names = [f"{ADAPTER_STEM}.safetensors", f"{ADAPTER_STEM}.bin"]
    for name in names:
        file = source.file(name, required=False)
        if file is not None:
            break
    else:
        raise FileError(
            "There are no weights of an adapter",
            where=source,
            expected=" or ".join(names),
            mend="Save it again.",
        )
    checkpoint = open_checkpoint(file)
    read = mapped_reader(MappedFiles(checkpoint.states), copy_all=True)
    cpu = torch.device("cpu")
    return {key: read(LoadStep(key, info, info.dtype), cpu) for key, info in checkpoint.tensors.items()}


def _given(source: Source | None) -> Source:
    if source is None:
        raise ArgumentError("Nothing to load an adapter from", where="peft_model_id", found=None)
    return source


def _hub_options(kwargs: dict[str, Any]) -> HubOptions:
    """Sort the further arguments of `load_adapter`."""
    for name, idle in _IDLE.items():
        if name in kwargs and not any(kwargs[name] is value or kwargs[name] == value for value in idle):
            raise NotYetError(f"load_adapter does not offer {name}={kwargs[name]!r}"[:200], where=name)
        kwargs.pop(name, None)
    options = HubOptions.take(kwargs)
    if kwargs:
        first = next(iter(kwargs))
        known = [*inspect.signature(AdapterMixin.load_adapter).parameters, *HubOptions.__dataclass_fields__]
        raise UnknownArgumentError(
            f"load_adapter does not know the argument {first!r}",
            where=", ".join(kwargs),
            mend=did_you_mean(first, known) or "Leave it out.",
        )
    return replace(options)


# -- peft ------------------------------------------------------------------------------------------


def _peft() -> Any:
    try:
        # Imported here: it is optional, and brings a whole framework with it.
        import peft  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            "Adapters need peft", where="peft", found=str(error), mend="pip install 'peft>=0.17'"
        ) from error
    return peft


def _is_auxiliary(layer: nn.Module) -> bool:
    return isinstance(layer, import_module("peft.utils.other").AuxiliaryTrainingWrapper)


def _layers(model: Any) -> Iterator[Any]:
    """Yield the layers that peft has put in: those beside others, and those trained in place of others."""
    if not model.__dict__.get("peft_config"):
        return
    tuner = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for module in model.modules():
        if isinstance(module, tuner) or _is_auxiliary(module):
            yield module


def _unwrap(model: nn.Module) -> None:
    """Put the layers back that peft has put its own in place of."""
    tuner = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    for path, module in list(model.named_modules()):
        if _is_auxiliary(module):
            plain: Any = module.original_module
        elif isinstance(module, tuner):
            plain = module.get_base_layer()
        else:
            continue
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        # A layer of an adapter inside one that has just been put back is gone already.
        if getattr(holder, name, None) is module:
            setattr(holder, name, plain)
