# SPDX-License-Identifier: Apache-2.0
"""Where a load's weights and configs come from: files of every format, a GGUF, or a state dict."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pretrained.arch.gguf import gguf_architecture, gguf_config, gguf_key_map
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.config import PreTrainedConfig, read_json_object
from pretrained.core.files import find_weights, open_checkpoint
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.hub import Source, resolve
from pretrained.core.options import LoadOptions, unknown_argument
from pretrained.core.plan import MappedTensor
from pretrained.errors import ArgumentError, CheckpointError, NotYetError
from pretrained.torch.tensors import TORCH_DTYPES, dtype_name_of


def find_source(path: str | Path | Source | None, options: LoadOptions) -> Source | None:
    """Return where a load's files come from, or None for a state dict.

    Args:
        path: Hub id, folder, weights file, or None.
        options: The call's wishes.

    Raises:
        ArgumentError: nothing to load from, or two sources of weights.
        FileError: nothing is there.
    """
    if path is None:
        if options.state_dict is None or options.config is None:
            raise ArgumentError(
                "Nothing to load from",
                where="pretrained_model_name_or_path",
                found="None",
                mend="Pass a name or path, or both config= and state_dict=.",
            )
        return None
    if options.state_dict is not None:
        raise ArgumentError(
            "state_dict and the path both give the weights",
            where="state_dict",
            mend="To load these tensors pass None as the path and the config as config=.",
        )
    return resolve(path, options.hub)


def open_weights(source: Source | None, options: LoadOptions) -> Checkpoint:
    """Read the headers of the weights, whatever holds them.

    Args:
        source: Where the files are; None for a state dict.
        options: The call's wishes.

    Raises:
        FileError: there are no such weights.
        CheckpointError: a file is damaged, hostile or of an unknown framework.
        NotYetError: it is of a framework whose layout is not read yet.
        ArgumentError: the state dict holds something else than dense tensors with values.
    """
    if options.state_dict is not None:
        return _state_dict_checkpoint(options.state_dict)
    assert source is not None
    if source.kind == "file" and source.path is not None and source.path.name != "config.json":
        checkpoint = open_checkpoint(source.path)
    else:
        wishes: dict[str, Any] = {
            "variant": options.variant,
            "use_safetensors": options.use_safetensors,
            "gguf_file": options.gguf_file,
        }
        checkpoint = open_checkpoint(find_weights(source.weights_folder(**wishes), **wishes))
    if checkpoint.framework in ("tf", "flax"):
        raise NotYetError(
            f"These weights were written by {checkpoint.framework}, which lays tensors out differently",
            where=checkpoint.files[0],
            mend="Reading them in PyTorch comes with that backend's release.",
        )
    if checkpoint.framework not in (None, "pt", "mlx", "np"):
        raise CheckpointError(
            "The file says it was written for a framework that is not known here",
            where=checkpoint.files[0],
            expected="metadata format 'pt'",
            found=repr(checkpoint.framework),
            mend="Write the file again with its format metadata set to 'pt' if its layout is PyTorch's.",
        )
    return checkpoint


def _state_dict_checkpoint(state_dict: Mapping[str, torch.Tensor]) -> Checkpoint:
    infos = {}
    for key, tensor in state_dict.items():
        fault = _fault_of(key, tensor)
        if fault is not None:
            raise ArgumentError(
                "A value of state_dict is not a plain tensor with values",
                where=f"state_dict[{key!r}]",
                expected="texts as keys, dense torch tensors as values",
                found=fault,
            )
        nbytes = tensor.numel() * tensor.element_size()
        infos[key] = TensorInfo(
            key, dtype_name_of(tensor.dtype), tuple(tensor.shape), Path("state_dict"), 0, nbytes
        )
    return Checkpoint(infos, (), "state_dict")


def _fault_of(key: Any, tensor: Any) -> str | None:
    """Say what keeps an entry of a state dict from being a weight."""
    if not isinstance(key, str):
        return f"a key of type {type(key).__name__}"
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    if tensor.is_meta:
        return "a tensor on the device 'meta', which has no values"
    if tensor.layout != torch.strided or tensor.dtype not in TORCH_DTYPES.values():
        return f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}"
    return None


def read_model_config(
    cls: type[Any],
    source: Source | None,
    checkpoint: Checkpoint,
    options: LoadOptions,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Return the config, and the arguments that are left for the constructor.

    Args:
        cls: The model class.
        source: Where the files are; None for a state dict.
        checkpoint: What the weights' headers say.
        options: The call's wishes.
        kwargs: Overrides of the config, and constructor arguments.

    Raises:
        FileError: there is no config.
        ConfigError: it cannot be used.
    """
    config = options.config
    if "return_unused_kwargs" in kwargs:
        raise unknown_argument(cls.__name__, ["return_unused_kwargs"], (), "It belongs to configs.")
    if isinstance(config, PreTrainedConfig):
        config, rest = copy.deepcopy(config), kwargs
    elif config is not None:
        config, rest = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **kwargs)
    else:
        assert source is not None
        values = _config_values(source, checkpoint)
        values["_name_or_path"] = source.name
        config, rest = cls.config_class.from_dict(values, return_unused_kwargs=True, **kwargs)
    if options.attn_implementation is not None:
        config.update({"attn_implementation": options.attn_implementation})
    return config, rest


def _config_values(source: Source, checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.format == "gguf":
        return gguf_config(checkpoint.metadata, checkpoint.tensors)
    file = source.require("config.json")
    return read_json_object(file)


def layouts_of(checkpoint: Checkpoint) -> Mapping[str, MappedTensor] | None:
    """Return how a file's own names and layouts become the model's, or None where they are the model's.

    Args:
        checkpoint: What the weights' headers say.
    """
    if checkpoint.format != "gguf":
        return None
    metadata, tensors = checkpoint.metadata, checkpoint.tensors
    return gguf_key_map(gguf_architecture(metadata), gguf_config(metadata, tensors), tensors)


def check_generation_config(given: Any) -> None:
    """Raise for a `generation_config` argument that is none, before anything is read.

    Args:
        given: As the user gave it.

    Raises:
        ArgumentError: it is neither a config nor a dictionary.
    """
    if not isinstance(given, GenerationConfig | Mapping | None):
        raise ArgumentError(
            "generation_config has a value of the wrong type",
            where="generation_config",
            expected="a GenerationConfig or a dictionary",
            found=f"{type(given).__name__} {given!r}"[:200],
            mend="To read one use GenerationConfig.from_pretrained(...).",
        )


def read_generation_config(model: Any, source: Source | None, options: LoadOptions) -> Any:
    """Return the generation config of a model that generates: the call's, the file's or the config's own.

    Args:
        model: The model; its weights are not needed.
        source: Where the files are; None for a state dict.
        options: The call's wishes.

    Raises:
        ConfigError: the file is not JSON.
    """
    if not model.can_generate():
        return None
    given = options.generation_config
    if given is not None:
        return GenerationConfig.from_dict(given) if isinstance(given, Mapping) else copy.deepcopy(given)
    file = None if source is None else source.file("generation_config.json", required=False)
    if file is None:
        return GenerationConfig.from_model_config(model.config)
    return GenerationConfig.from_dict(read_json_object(file))
