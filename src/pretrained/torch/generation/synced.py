# SPDX-License-Identifier: Apache-2.0
"""Generation on several processes whose model is one: a forward of one waits for those of all others.

Where each process holds a part of every layer (FSDP, ZeRO-3), a process that is finished must go on running
forwards until the last one is, or the others wait for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from pretrained.core.generation_config import GenerationMode
from pretrained.errors import GenerationError


def settle_synced(model: Any, synced_gpus: bool | None, mode: GenerationMode) -> bool:
    """Return whether the processes have to run the same number of forwards.

    Args:
        model: The model that generates.
        synced_gpus: Of the call; None to look whether FSDP spreads the model.
        mode: The strategy.

    Raises:
        GenerationError: there are no other processes, or a draft model would run out of step.
    """
    if synced_gpus is not None and not isinstance(synced_gpus, bool):
        raise GenerationError(
            "synced_gpus has a value of the wrong type",
            where="synced_gpus",
            expected="True, False or None",
            found=synced_gpus,
        )
    ready = distributed.is_available() and distributed.is_initialized()
    if synced_gpus and not ready:
        raise GenerationError(
            "synced_gpus=True keeps processes in step, and this one is alone",
            where="synced_gpus",
            mend="Call torch.distributed.init_process_group() first, or leave synced_gpus out.",
        )
    if not ready or distributed.get_world_size() == 1 or synced_gpus is False:
        return False
    if synced_gpus is None and not _is_spread(model):
        return False
    if mode is GenerationMode.ASSISTED_GENERATION:
        raise GenerationError(
            "Drafts take another number of forwards on each process",
            where="synced_gpus",
            mend="Leave the drafting out where one model is spread over several processes.",
        )
    return True


def _is_spread(model: Any) -> bool:
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    names = {base.__name__ for module in modules for base in type(module).__mro__}
    return not names.isdisjoint({"FullyShardedDataParallel", "FSDPModule"})


class SyncedModel:
    """A model that tells the other processes before each forward that it still runs.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        self.unsynced = model
        self._arguments: dict[str, Any] = {}
        nccl = distributed.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def __call__(self, **arguments: Any) -> Any:
        """Run the model; every other process runs it too, or a forward of no use."""
        self._arguments = arguments
        self._tell(1)
        return self.unsynced(**arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["unsynced"], name)

    def __enter__(self) -> SyncedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Run forwards of no use until every process is finished."""
        if not self._arguments:
            # It failed before its first forward, so there is nothing to run again.
            return
        while self._tell(0):
            self.unsynced(**self._small())

    def _tell(self, running: int) -> bool:
        count = torch.tensor([running], device=self._device)
        distributed.all_reduce(count)
        # Who still runs need not look, so that the host does not wait for the device.
        return bool(running) or bool(count.item())

    def _small(self) -> dict[str, Any]:
        """Return the arguments of a forward over one token, without a cache."""
        left_out = ("past_key_values", "position_ids", "token_type_ids", "decoder_position_ids")
        small = {name: value for name, value in self._arguments.items() if name not in left_out}
        own_mask = "attention_mask" if "input_ids" in small else "decoder_attention_mask"
        small.pop(own_mask, None)
        for name in ("input_ids", "decoder_input_ids", "inputs_embeds"):
            if name in small:
                small[name] = small[name][:, -1:]
        return small | ({"use_cache": False} if "use_cache" in small else {})
