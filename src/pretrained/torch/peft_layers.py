# SPDX-License-Identifier: Apache-2.0
"""What peft needs to put LoRA on a quantized layer. Imported where adapters are: it imports peft."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from pretrained.errors import NotYetError
from pretrained.torch.nn import Conv1D
from pretrained.torch.quantized import QuantizedLeaf
from pretrained.torch.quantized_ops import Dense


class QuantizedLora(LoraLinear):  # type: ignore[misc]
    """LoRA beside a layer of integers: the layer computes as it did, and the low-rank term is added.

    Args:
        base_layer: The quantized layer.
        adapter_name: The adapter's name.
        config: Its configuration.
        **kwargs: As peft gives them.

    Raises:
        NotYetError: the configuration computes with the layer's dense weight.
    """

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        start = config.init_lora_weights
        if config.use_dora or start not in (True, False, "gaussian", "orthogonal"):
            raise NotYetError(
                "This kind of LoRA computes with the dense weight, which a quantized layer does not have",
                where=f"use_dora={config.use_dora}, init_lora_weights={start!r}",
                mend="Use plain LoRA, or call dequantize() on the model first.",
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        """Return where the adapter goes, and the dtype that the layer would have without quantization."""
        dtype = getattr(base_layer, "logical_dtype", base_layer.weight.dtype)
        return base_layer.weight.device, dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the weight; integers cannot take it up.

        Args:
            safe_merge: As peft has it.
            adapter_names: As peft has it.

        Raises:
            NotYetError: the layer is still quantized.
        """
        base = self.get_base_layer()
        if isinstance(base, QuantizedLeaf):
            raise NotYetError(
                f"Adapters cannot be merged into {base.scheme} weights without rounding them again",
                where="merge",
                mend="Call dequantize() on the model first, then merge.",
            )
        self.fan_in_fan_out = isinstance(base, Conv1D)
        super().merge(safe_merge, adapter_names)


def register_quantized_layers(config: Any) -> None:
    """Tell a LoRA configuration which layer stands beside quantized ones.

    Args:
        config: Any peft configuration; others than LoRA are left alone, and peft refuses the layers then.
    """
    if isinstance(config, LoraConfig):
        layers: dict[Any, Any] = {Dense: QuantizedLora}
        config._register_custom_module(layers)
