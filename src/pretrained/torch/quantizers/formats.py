# SPDX-License-Identifier: Apache-2.0
"""The table of other libraries' formats: name in config.json -> how its weights are put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pretrained.torch.quantizers.awq import Awq
from pretrained.torch.quantizers.bitsandbytes_int8 import BitsAndBytes8
from pretrained.torch.quantizers.foreign import ForeignFormat
from pretrained.torch.quantizers.gptq import Gptq

FORMATS: Final[Mapping[str, type[ForeignFormat[Any]]]] = {
    "awq": Awq,
    "bitsandbytes": BitsAndBytes8,
    "gptq": Gptq,
}
