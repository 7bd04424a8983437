# SPDX-License-Identifier: Apache-2.0
"""`ContinuousBatchingConfig`: how many requests run at once, and how much memory their pages may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from pretrained.core.budgets import parse_size
from pretrained.errors import GenerationError, NotYetError, did_you_mean

# Settings of others that concern machinery which does not exist here, by their values that ask for nothing.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "max_blocks_per_request": (None,),
    "use_async_batching": (None, False),
    "use_cuda_graph": (None, False),
    "q_padding_interval_size": (0,),
    "kv_padding_interval_size": (0,),
    "varlen_compile_config": (None,),
    "decode_compile_config": (None,),
    "default_compile_level": (0,),
    "auto_switch_to_flash": (True, False),
    "cpu_offload_space": (0, 0.0),
    "cpu_offload_space_safety_threshold": (0.8,),
    "per_request_processors": (True, False),
    "drop_unsupported_processors": (True, False),
    "use_default_compile_configs": (None, False),
    "max_cached_graphs": (0,),
    "safety_margin": (None,),
    "disable_nccl_graph_mixing": (True, False),
    "cpu_group_timeout": (300.0,),
}


@dataclass(frozen=True, kw_only=True)
class ContinuousBatchingConfig:
    """How a model answers many requests at once.

    Attributes:
        page_size: Tokens in a page of the key/value cache. Small pages waste less at the end of each row and
            are shared more often; large ones need less bookkeeping.
        num_blocks: Pages there may be at most; None to go by `max_memory`.
        max_memory: Bytes that the pages may take, or a text such as ``"2GiB"``; None for a share of what is
            free when they are first needed (`max_memory_percent`). Memory is taken as it is needed.
        max_memory_percent: That share, above 0 and up to 1; None for 0.5 on a CPU and 0.8 on other devices.
        max_requests_per_batch: Rows that run at once at most; None for 64 on a CPU and 256 elsewhere.
        max_batch_tokens: Tokens in one step at most: each running answer counts one, prompts share the rest
            and are cut where they do not fit. None for 512 on a CPU and 2048 elsewhere.
        allow_block_sharing: Whether prompts that begin alike share the pages of their beginning.
        return_logprobs: Return the logarithm of each token's probability.
        seed: Where the chance of sampled requests without a seed of their own comes from: the n-th request
            gets ``seed + n``. None to draw seeds from torch's global generator.
        max_queue_size: Requests that may wait in a manager; adding more waits. 0 for no bound.
        scheduler_type: Only ``"fifo"``: first come, first served.
    """

    page_size: int = 32
    num_blocks: int | None = None
    max_memory: int | str | None = None
    max_memory_percent: float | None = None
    max_requests_per_batch: int | None = None
    max_batch_tokens: int | None = None
    allow_block_sharing: bool = True
    return_logprobs: bool = False
    seed: int | None = None
    max_queue_size: int = 0
    scheduler_type: str = "fifo"

    def __post_init__(self) -> None:
        for name, least in (
            ("page_size", 1),
            ("num_blocks", 1),
            ("max_requests_per_batch", 1),
            ("max_batch_tokens", 1),
            ("seed", 0),
            ("max_queue_size", 0),
        ):
            value = getattr(self, name)
            wanted = value is not None or name in ("page_size", "max_queue_size")
            if wanted and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise _wrong(name, value, f"a whole number of {least} or more")
        share = self.max_memory_percent
        if share is not None and (
            not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1
        ):
            raise _wrong("max_memory_percent", share, "a share above 0 and up to 1")
        for name in ("allow_block_sharing", "return_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        if self.scheduler_type != "fifo":
            raise _wrong("scheduler_type", self.scheduler_type, '"fifo"')
        if self.max_memory is not None:
            parse_size(self.max_memory, where="ContinuousBatchingConfig.max_memory")

    @property
    def max_memory_bytes(self) -> int | None:
        """`max_memory` as a number of bytes."""
        return None if self.max_memory is None else parse_size(self.max_memory)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from settings by name, those of the ecosystem included.

        Args:
            values: Settings; ``block_size`` is an older name of ``page_size``.

        Raises:
            GenerationError: no such setting, or a wrong value.
            NotYetError: a setting of the ecosystem that cannot be obeyed.
        """
        taken = dict(values)
        if taken.get("block_size") is not None:
            taken.setdefault("page_size", taken["block_size"])
        taken.pop("block_size", None)
        known = {field.name for field in fields(cls)}
        for name in list(taken):
            if name in known:
                continue
            value = taken.pop(name)
            if name not in _ELSEWHERE:
                raise GenerationError(
                    f"ContinuousBatchingConfig has no setting {name!r}",
                    where=name,
                    mend=did_you_mean(name, known) or None,
                )
            if value is not None and value not in _ELSEWHERE[name]:
                raise NotYetError(f"{name}={value!r} cannot be obeyed", where=name, mend="Leave it out.")
        return cls(**taken)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)


def _wrong(name: str, value: Any, expected: str) -> GenerationError:
    return GenerationError(
        f"{name} cannot be {value!r}", where=f"ContinuousBatchingConfig.{name}", expected=expected
    )
