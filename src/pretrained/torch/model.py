# SPDX-License-Identifier: Apache-2.0
"""`PreTrainedModel`: what every PyTorch model of this library is, as short doors to other rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from pretrained.core.config import PreTrainedConfig
from pretrained.core.config_values import hints
from pretrained.core.generation_config import GenerationConfig
from pretrained.core.keys import KeyRule
from pretrained.core.options import refuse
from pretrained.core.own_code import AutoClassMixin
from pretrained.core.push import PushToHubMixin
from pretrained.core.registry import AUTO_CLASSES
from pretrained.errors import ArgumentError, UnknownArgumentError
from pretrained.torch import load, save
from pretrained.torch.adapters_mixin import AdapterMixin
from pretrained.torch.attention import check_attn_implementation
from pretrained.torch.checkpointing import CheckpointingMixin
from pretrained.torch.embeddings_mixin import EmbeddingAccessMixin
from pretrained.torch.facts_mixin import ModelFactsMixin
from pretrained.torch.initialise import initialise, initialise_module
from pretrained.torch.mapped_mixin import MappedModelMixin
from pretrained.torch.placed_mixin import PlacedModelMixin
from pretrained.torch.pruning import HeadPruningMixin
from pretrained.torch.quantize import all_ties
from pretrained.torch.quantized_mixin import QuantizedModelMixin
from pretrained.torch.resize_mixin import ResizeMixin
from pretrained.torch.ties import check_fits, share
from pretrained.torch.utils_mixin import ModuleUtilsMixin


class PreTrainedModel(
    AutoClassMixin,
    QuantizedModelMixin,
    MappedModelMixin,
    PlacedModelMixin,
    nn.Module,
    EmbeddingAccessMixin,
    ResizeMixin,
    ModuleUtilsMixin,
    HeadPruningMixin,
    CheckpointingMixin,
    AdapterMixin,
    ModelFactsMixin,
    PushToHubMixin,
):
    """Base of every model.

    A subclass builds its layers in ``__init__(config)``, ends it with `post_init`, and states its facts
    as class attributes; `docs/ADDING_A_MODEL.md` goes through them.

    Attributes:
        config_class: Its config class.
        base_model_prefix: Attribute that holds the headless model inside a model with a head.
        key_rules: How names in files differ from module paths, where they do.

    Args:
        config: The model's configuration; kept as it is, not copied.

    Raises:
        ArgumentError: `config` is not a config object, or lacks what this class needs.
        UnknownArgumentError: further arguments reached this base class, which takes none.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = ""
    _auto_classes = tuple(AUTO_CLASSES.values())
    main_input_name: ClassVar[str] = "input_ids"
    key_rules: ClassVar[Sequence[KeyRule]] = ()

    _no_split_modules: ClassVar[Sequence[str]] = ()
    _tied_weights_keys: ClassVar[Mapping[str, str] | Sequence[str]] = {}
    _optional_weights: ClassVar[Sequence[str]] = ()
    _keys_to_ignore_on_load_missing: ClassVar[Sequence[str]] = ()
    _keys_to_ignore_on_load_unexpected: ClassVar[Sequence[str]] = ()
    _keys_to_ignore_on_save: ClassVar[Sequence[str]] = ()
    _skip_keys_device_placement: ClassVar[str | Sequence[str]] = ()
    _keep_in_fp32_modules: ClassVar[Sequence[str]] = ()
    _keep_in_fp32_modules_strict: ClassVar[Sequence[str]] = ()

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        _check_config(type(self), config)
        if inputs or kwargs:
            # Whatever comes this far was meant for something, and nothing has taken it.
            raise UnknownArgumentError(
                f"{type(self).__name__} has no use for some arguments",
                where=", ".join([*kwargs, *map(repr, inputs)])[:200],
                mend="Leave them out, or take them in the __init__ of your class.",
            )
        check_attn_implementation(config.attn_implementation)
        self.config = config
        self.name_or_path = config.name_or_path
        self.warnings_issued: dict[str, bool] = {}
        self.generation_config = GenerationConfig.from_model_config(config) if self.can_generate() else None

    def post_init(self) -> None:
        """Initialise what is not yet initialised and tie what is tied; the end of every ``__init__``."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module is not self:
                module.__dict__["_part_of"] = type(self).__name__
        if any(parameter.is_meta for parameter in self.parameters()):
            self.tie_weights()
        else:
            self.init_weights()

    # -- facts ---------------------------------------------------------------------------------

    @property
    def base_model(self) -> nn.Module:
        """The headless model inside, or the model itself."""
        return getattr(self, self.base_model_prefix, self) if self.base_model_prefix else self

    @property
    def framework(self) -> str:
        """Name of the framework, ``"pt"``."""
        return "pt"

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Small valid inputs, 3 rows of 5 tokens."""
        return {"input_ids": torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])}

    @classmethod
    def can_generate(cls) -> bool:
        """Tell whether the class has `generate`."""
        return hasattr(cls, "generate")

    def ties(self) -> dict[str, str]:
        """Return which parameters share one tensor, as alias -> owner.

        The default reads `_tied_weights_keys` where ``config.tie_word_embeddings`` is set; a list there
        (the older form) ties each name to the input embedding.
        """
        if not self.config.tie_word_embeddings or not self._tied_weights_keys:
            return {}
        if isinstance(self._tied_weights_keys, Mapping):
            return dict(self._tied_weights_keys)
        embedding = self.get_input_embeddings()
        owner = next(name for name, module in self.named_modules() if module is embedding)
        return {alias: f"{owner}.weight" for alias in self._tied_weights_keys}

    # -- weights -------------------------------------------------------------------------------

    def tie_weights(self, missing_keys: Any = None, recompute_mapping: bool = True) -> None:
        """Make tied parameters share one tensor.

        Args:
            missing_keys: Accepted for compatibility: ties do not depend on what a file lacked.
            recompute_mapping: Accepted for compatibility: the ties follow from the config each time.

        Raises:
            ArgumentError: a layer's bias has another length than the weight it is tied to; nothing has
                changed then.
        """
        ties = all_ties(self)
        check_fits(self, {alias: self.get_parameter(owner) for alias, owner in ties.items()})
        for alias, owner in ties.items():
            share(self, alias, self.get_parameter(owner))

    def init_weights(self) -> None:
        """Initialise every module that is not yet initialised, then tie."""
        initialise(self)
        self.tie_weights()

    def initialize_weights(self) -> None:
        """Do the same as `init_weights`; the newer name."""
        self.init_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module in place; the point that architectures override.

        Args:
            module: Any module of the model.
        """
        initialise_module(module, std=getattr(self.config, "initializer_range", 0.02))

    # -- construction --------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder, a file or the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: Hub id, folder, weights file, or None with `config` and
                `state_dict`.
            *model_args: Passed to the constructor after the config.
            **kwargs: `pretrained.core.options.LoadOptions` and `pretrained.core.hub.HubOptions` list
                them: config, dtype, device_map, attn_implementation, variant, use_safetensors,
                gguf_file, state_dict, key_mapping, ignore_mismatched_sizes, allow_missing,
                output_loading_info, generation_config, progress; revision, subfolder, token, cache_dir,
                force_download, local_files_only. Others that are attributes of the config override
                it, and the rest goes to the constructor.

        Returns:
            The model, or ``(model, loading_info)`` with ``output_loading_info=True``.

        Raises:
            FileError: nothing there, or files missing.
            ConfigError: a config.json that cannot be used.
            CheckpointError: a damaged or hostile weights file.
            WeightsError: weights that do not fit the model.
            ArgumentError: arguments that cannot work (a ValueError).
            UnknownArgumentError: an argument that nothing takes (a TypeError).
        """
        return load.from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Build a model with new weights, in training mode.

        Args:
            config: Its configuration; copied.
            **kwargs: `dtype` (None for the config's own), `attn_implementation`; the rest goes to the
                constructor.

        Raises:
            ArgumentError: `config` is not a config object, or the dtype cannot be meant.
        """
        _check_config(cls, config)
        refuse(kwargs)
        return load.from_config(cls, config, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Build a model with new weights, in training mode; see `_from_config`."""
        return cls._from_config(config, **kwargs)

    # -- saving --------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config, generation config and weights into a folder.

        Args:
            save_directory: The folder; made where it is absent.
            **kwargs: See `pretrained.torch.save.save_pretrained`: is_main_process, state_dict,
                max_shard_size, safe_serialization, save_function, variant, save_original_format,
                push_to_hub and its arguments.
        """
        save.save_pretrained(self, save_directory, **kwargs)

    # -- attention -----------------------------------------------------------------------------

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Switch the attention implementation of the whole model.

        Args:
            attn_implementation: ``"eager"``, ``"sdpa"``, ``"flash_attention_2"`` or a registered name.

        Raises:
            ArgumentError: there is none by that name.
            MissingDependencyError: its package is not installed.
        """
        check_attn_implementation(attn_implementation)
        self.config.update({"attn_implementation": attn_implementation})


def _check_config(cls: type, config: Any) -> None:
    if not isinstance(config, PreTrainedConfig):
        raise ArgumentError(
            f"{cls.__name__} is built from a config object",
            where="config",
            expected="a PreTrainedConfig",
            found=type(config).__name__,
            mend=f"To load a model by name or path use {cls.__name__}.from_pretrained(...).",
        )
    wanted = getattr(cls, "config_class", PreTrainedConfig)
    if isinstance(config, wanted):
        return
    # A class of one's own may stand in, as long as it says all that the architecture asks for.
    absent = [name for name in hints(wanted) if not hasattr(config, name)]
    if absent:
        raise ArgumentError(
            f"{cls.__name__} is built from another kind of config",
            where="config",
            expected=wanted.__name__,
            found=f"{type(config).__name__}, which lacks {', '.join(absent[:5])}",
            mend="Use an Auto class, such as AutoModel.from_config(config), or the class of that config.",
        )
