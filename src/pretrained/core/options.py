# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``from_pretrained``, sorted once: obeyed, refused with a reason, or passed on.

The ecosystem's calls carry about forty names. Each is either a field here (and obeyed), or in one of
the tables below that say why it is refused or harmless. What is left belongs to the config or to the
model's constructor. Nothing is swallowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

from pretrained.core.hub import HubOptions
from pretrained.errors import ArgumentError, NotYetError, UnknownArgumentError

Progress = Callable[[int, int, str], None]

# Long without effect in the ecosystem: loading through an empty shell is how every load works.
_HARMLESS = ("low_cpu_mem_usage", "offload_state_dict", "_fast_init", "_from_auto", "_commit_hash")

_RETIRED = {
    "use_auth_token": "It is called token now.",
    "resume_download": "Downloads are always resumed; leave it out.",
    "mirror": "Set HF_ENDPOINT to the mirror's address instead.",
}

# Known to the ecosystem, built in a later release: name -> (value that asks for nothing, release).
_LATER: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None,), "the release of quantized loading"),
    "load_in_8bit": ((None, False), "the release of quantized loading"),
    "load_in_4bit": ((None, False), "the release of quantized loading"),
    "from_tf": ((None, False), "the release with the TensorFlow backend"),
    "from_flax": ((None, False), "the release with the Flax backend"),
    "tp_plan": ((None,), "the release for several machines"),
    "tp_size": ((None,), "the release for several machines"),
    "device_mesh": ((None,), "the release for several machines"),
    "distributed_config": ((None,), "the release for several machines"),
    "adapter_kwargs": ((None,), "the release of adapters"),
    "adapter_name": ((None, "default"), "the release of adapters"),
    "trust_remote_code": ((None, False), "the release of sharing; register your class in Python instead"),
    "code_revision": ((None,), "the release of sharing"),
    "use_kernels": ((None, False), "no release so far"),
    "kernel_config": ((None,), "no release so far"),
    "allow_all_kernels": ((None, False), "no release so far"),
    "experts_implementation": ((None,), "no release so far"),
    "fusion_config": ((None,), "no release so far"),
    "tqdm_class": ((None,), "no release; pass progress= a function of (bytes, total, stage)"),
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
        disable_mmap: Read files into memory of their own instead of mapping them.
        progress: False for none, a function ``(bytes, total, stage)``, or None for a bar on a terminal.
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
    disable_mmap: bool = False
    progress: Progress | bool | None = None

    @classmethod
    def take(cls, kwargs: MutableMapping[str, Any]) -> LoadOptions:
        """Take the load's arguments out of a call's keyword arguments.

        Args:
            kwargs: Changed in place; what is left belongs to the config or the constructor.

        Raises:
            UnknownArgumentError: a retired name.
            NotYetError: a name of a later release, with a value that asks for something.
            ArgumentError: two arguments contradict each other.
        """
        refuse(kwargs)
        hub = HubOptions.take(kwargs)
        torch_dtype = kwargs.pop("torch_dtype", None)
        if kwargs.get("dtype") is None and torch_dtype is not None:
            kwargs["dtype"] = torch_dtype
        names = [f.name for f in fields(cls) if f.name not in ("hub", "disable_mmap")]
        taken = {name: kwargs.pop(name) for name in names if name in kwargs}
        taken["disable_mmap"] = bool(kwargs.pop("disable_mmap", False))
        options = cls(hub=hub, **{name: value for name, value in taken.items() if value is not None})
        options.check()
        return options

    def check(self) -> None:
        """Raise where arguments contradict each other."""
        if self.weights_only is False:
            raise ArgumentError(
                "weights_only=False would execute the code in a pickle, which this library never does",
                where="weights_only",
                mend="Leave it out; to keep a file that needs it, convert it to safetensors where you trust it.",
            )
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


def refuse(kwargs: MutableMapping[str, Any]) -> None:
    """Remove arguments without effect, and raise for those that cannot be obeyed.

    Args:
        kwargs: Changed in place.

    Raises:
        UnknownArgumentError: a retired name.
        NotYetError: a name of a later release, with a value that asks for something.
    """
    for name in _HARMLESS:
        kwargs.pop(name, None)
    for name, advice in _RETIRED.items():
        if name in kwargs:
            raise UnknownArgumentError(f"{name} is no longer an argument", where=name, mend=advice)
    for name, (idle, release) in _LATER.items():
        if name not in kwargs:
            continue
        value = kwargs.pop(name)
        if not any(value is choice or value == choice for choice in idle):
            raise NotYetError(
                f"{name}={value!r} is not offered yet", where=name, mend=f"It comes with {release}."
            )
