# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``from_pretrained``, sorted once: obeyed, refused with a reason, or passed on.

The ecosystem's calls carry about forty names. Each is either a field here (and obeyed), or in one of
the tables below that say why it is refused or harmless. What is left belongs to the config or to the
model's constructor. Nothing is swallowed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

from pretrained.core.config import PreTrainedConfig
from pretrained.core.generation_fields import FIELDS as GENERATION_FIELDS
from pretrained.core.hub import HubOptions
from pretrained.errors import ArgumentError, NotYetError, UnknownArgumentError, did_you_mean

Progress = Callable[[int, int, str], None]

# Long without effect in the ecosystem: loading through an empty shell is how every load works.
_HARMLESS = ("low_cpu_mem_usage", "offload_state_dict", "_fast_init", "_from_auto", "_commit_hash")

# Obeyed by the Auto classes, which take them out before. A class that the caller names is its own code, so
# there is nothing left to trust, whatever they say.
_FOR_AUTO_CLASSES = ("trust_remote_code", "code_revision")

_RETIRED = {
    "use_auth_token": "It is called token now.",
    "resume_download": "Downloads are always resumed; leave it out.",
    "mirror": "Set HF_ENDPOINT to the mirror's address instead.",
}

_MACHINES = "It comes with the release for several machines."
_UNPLANNED = "No release is planned to have it; leave it out."

# Known to the ecosystem and not offered yet: name -> (values that ask for nothing, when to expect it).
_LATER: dict[str, tuple[tuple[Any, ...], str]] = {
    "from_tf": ((None, False), "It comes with the release of the TensorFlow backend."),
    "from_flax": ((None, False), "It comes with the release of the Flax backend."),
    "tp_plan": ((None,), _MACHINES),
    "tp_size": ((None,), _MACHINES),
    "device_mesh": ((None,), _MACHINES),
    "distributed_config": ((None,), _MACHINES),
    "use_kernels": ((None, False), _UNPLANNED),
    "kernel_config": ((None,), _UNPLANNED),
    "allow_all_kernels": ((None, False), _UNPLANNED),
    "experts_implementation": ((None,), _UNPLANNED),
    "fusion_config": ((None,), _UNPLANNED),
    "tqdm_class": ((None,), "Pass progress= a function of (bytes, total, stage) instead."),
}

_TRUE_OR_FALSE = ((bool,), "True or False")
_TEXT = ((str,), "a text")

# What an argument that was given must be. Those that are absent here are checked where they are used.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "variant": _TEXT,
    "use_safetensors": ((bool,), "True, False or None"),
    "weights_only": _TRUE_OR_FALSE,
    "gguf_file": ((str, os.PathLike), "the name of a file"),
    "state_dict": ((Mapping,), "tensors by name"),
    "key_mapping": ((Mapping,), "a dictionary of regular expressions and replacements"),
    "ignore_mismatched_sizes": _TRUE_OR_FALSE,
    "allow_missing": _TRUE_OR_FALSE,
    "output_loading_info": _TRUE_OR_FALSE,
    "attn_implementation": ((str,), "the name of an attention implementation"),
    "disable_mmap": _TRUE_OR_FALSE,
    "load_in_8bit": _TRUE_OR_FALSE,
    "load_in_4bit": _TRUE_OR_FALSE,
    "offload_folder": ((str, os.PathLike), "the path of a folder"),
    "offload_buffers": _TRUE_OR_FALSE,
    "adapter_name": _TEXT,
    "adapter_kwargs": ((Mapping,), "hub arguments by name"),
    "progress": ((bool, Callable), "True, False, or a function of (bytes, total, stage)"),  # type: ignore[dict-item]
    "revision": ((str,), "a branch, tag or commit"),
    "subfolder": ((str, os.PathLike), "the name of a folder"),
    "token": ((str, bool), "a token, True or False"),
    "cache_dir": ((str, os.PathLike), "a path"),
    "force_download": _TRUE_OR_FALSE,
    "local_files_only": _TRUE_OR_FALSE,
    "endpoint": ((str,), "an address"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The wishes of one ``from_pretrained`` call.

    Attributes:
        hub: Where the files come from.
        config: Config object, or where to read one; None to read it beside the weights.
        dtype: Dtype in any spelling, ``"auto"``, or None for the library's default (float32).
        device_map: Where the weights go.
        max_memory: Device -> bytes or text such as "10GiB"; for the maps that are planned.
        offload_folder: Where weights on disk go that cannot stay as they lie in the checkpoint.
        offload_buffers: Let buffers follow the map onto the CPU and disk too.
        variant: Infix of the weights' file names.
        use_safetensors: None prefers safetensors, True requires it, False skips it.
        weights_only: Always true: pickles are never executed.
        gguf_file: Name or path of a GGUF file.
        state_dict: Weights by name, instead of files.
        key_mapping: ``{regex: replacement}`` on the names in the files.
        ignore_mismatched_sizes: Initialise weights whose shape differs instead of refusing.
        allow_missing: Initialise weights of the body that the files lack instead of refusing.
        output_loading_info: Return ``(model, info)``.
        attn_implementation: Name of the attention implementation.
        generation_config: Replaces the one beside the weights.
        quantization_config: How to store dense layers: a `QuantizationConfig` or its dictionary.
        load_in_8bit: Short for ``{"quant_method": "int8"}``.
        load_in_4bit: Short for ``{"quant_method": "int4"}``.
        disable_mmap: Read files into memory of their own instead of mapping them.
        progress: False for none, a function ``(bytes, total, stage)``, or None for a bar on a terminal.
        adapter_name: Name that an adapter gets where the source is an adapter's folder.
        adapter_kwargs: Further hub arguments for the adapter's files.
    """

    hub: HubOptions = field(default_factory=HubOptions)
    config: Any = None
    dtype: Any = None
    device_map: Any = None
    max_memory: Mapping[Any, Any] | None = None
    offload_folder: Any = None
    offload_buffers: bool = False
    variant: str | None = None
    use_safetensors: bool | None = None
    weights_only: bool = True
    gguf_file: str | None = None
    state_dict: Mapping[str, Any] | None = None
    key_mapping: Mapping[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    allow_missing: bool = False
    output_loading_info: bool = False
    attn_implementation: str | None = None
    generation_config: Any = None
    quantization_config: Any = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    disable_mmap: bool = False
    progress: Progress | bool | None = None
    adapter_name: str = "default"
    adapter_kwargs: Mapping[str, Any] | None = None

    @classmethod
    def take(cls, kwargs: MutableMapping[str, Any]) -> LoadOptions:
        """Take the load's arguments out of a call's keyword arguments.

        Args:
            kwargs: Changed in place; what is left belongs to the config or the constructor.

        Raises:
            UnknownArgumentError: a retired name.
            NotYetError: a name of a later release, with a value that asks for something.
            ArgumentError: a value of the wrong type, or arguments that contradict each other.
        """
        refuse(kwargs)
        hub = HubOptions.take(kwargs)
        torch_dtype = kwargs.pop("torch_dtype", None)
        if kwargs.get("dtype") is None and torch_dtype is not None:
            kwargs["dtype"] = torch_dtype
        names = [f.name for f in fields(cls) if f.name not in ("hub", "disable_mmap")]
        taken = {name: kwargs.pop(name) for name in names if name in kwargs}
        if kwargs.pop("disable_mmap", None):
            taken["disable_mmap"] = True
        options = cls(hub=hub, **{name: value for name, value in taken.items() if value is not None})
        options.check()
        return options

    def check(self) -> None:
        """Raise where arguments contradict each other."""
        if self.weights_only is False:
            raise ArgumentError(
                "weights_only=False would execute the code in a pickle, which this library never does",
                where="weights_only",
                mend="Leave it out. A file that needs it: convert it to safetensors where you trust it.",
            )
        if self.state_dict is not None and self.gguf_file is not None:
            raise ArgumentError(
                "state_dict and gguf_file both give the weights",
                where="state_dict, gguf_file",
                mend="Pass only one of them.",
            )
        check_config(self.config)
        if self.max_memory is not None and self.device_map is None:
            raise ArgumentError(
                "max_memory says how much each device may give, and no device_map asks for a plan",
                where="max_memory",
                mend="Pass device_map='auto' too.",
            )
        if isinstance(self.dtype, Mapping):
            raise ArgumentError(
                "dtype is a dictionary, which is for models made of several sub-models",
                where="dtype",
                expected="a dtype, its name, or 'auto'",
                mend="These architectures have one config each; pass a single dtype.",
            )


def check_config(config: Any) -> None:
    """Raise for a `config` argument that is neither a config nor a place to read one from.

    Args:
        config: As the user gave it; None for none.

    Raises:
        ArgumentError: it is something else.
    """
    if config is not None and not isinstance(config, PreTrainedConfig | str | os.PathLike):
        raise ArgumentError(
            "config has a value of the wrong type",
            where="config",
            expected="a config object, or a path or id to read one from",
            found=f"{type(config).__name__} {config!r}"[:200],
            mend="Make it a config first: config_class.from_dict(config)."
            if isinstance(config, Mapping)
            else None,
        )


def refuse(kwargs: MutableMapping[str, Any]) -> None:
    """Remove arguments without effect, and raise for those that cannot be obeyed.

    Args:
        kwargs: Changed in place.

    Raises:
        UnknownArgumentError: a retired name.
        NotYetError: a name of a later release, with a value that asks for something.
        ArgumentError: a known name with a value of the wrong type.
    """
    for name in (*_HARMLESS, *_FOR_AUTO_CLASSES):
        kwargs.pop(name, None)
    for name, advice in _RETIRED.items():
        if name in kwargs:
            raise UnknownArgumentError(f"{name} is no longer an argument", where=name, mend=advice)
    for name, (idle, release) in _LATER.items():
        if name not in kwargs:
            continue
        value = kwargs.pop(name)
        if not any(value is choice or value == choice for choice in idle):
            raise NotYetError(f"{name}={value!r}"[:200] + " is not offered yet", where=name, mend=release)

    _check_types(kwargs)


def _check_types(kwargs: MutableMapping[str, Any]) -> None:
    """Raise for a known argument whose value is of a type that it cannot have; None is always allowed."""
    for name, (types, expected) in _TYPES.items():
        value = kwargs.get(name)
        if value is not None and not isinstance(value, types):
            raise ArgumentError(
                f"{name} has a value of the wrong type",
                where=name,
                expected=expected,
                found=f"{type(value).__name__} {value!r}"[:200],
            )
        if isinstance(value, os.PathLike) and name in ("gguf_file", "subfolder"):
            kwargs[name] = os.fspath(value)


def unknown_argument(
    cls_name: str, names: Iterable[str], known: Iterable[str], advice: str | None = None
) -> UnknownArgumentError:
    """Return the error for arguments that nothing takes.

    Args:
        cls_name: The model class.
        names: The arguments.
        known: Names of the config and the constructor, for suggestions.
        advice: What to do about the first, where the caller knows better than a list of names.
    """
    names = list(names)
    first = names[0]
    options = [f.name for cls in (LoadOptions, HubOptions) for f in fields(cls) if f.name != "hub"]
    if advice is None and first in GENERATION_FIELDS:
        advice = "It is a generation setting: pass it to generate(), or set it on model.generation_config."
    advice = advice or did_you_mean(first, [*options, *known])
    nowhere = "It is neither an option of from_pretrained, nor in the config, nor in the constructor."
    return UnknownArgumentError(
        f"{cls_name} does not know the argument {first!r}", where=", ".join(names), mend=advice or nowhere
    )
