# SPDX-License-Identifier: Apache-2.0
"""`Quantizer`: what a load asks about quantization, in the order it asks."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pretrained.core.budgets import DISK
from pretrained.core.checkpoint import Checkpoint
from pretrained.core.keys import KeyRule
from pretrained.core.plan import LoadPlan, LoadStep
from pretrained.core.quantization import QuantizationConfig
from pretrained.core.reader import release_pages
from pretrained.errors import NotYetError
from pretrained.torch.offload_folder import Form
from pretrained.torch.quantize import quantized_leaves, use_kernel_layouts
from pretrained.torch.quantized import IntegerLeaf
from pretrained.torch.quantized_blocks import GgufLinear
from pretrained.torch.tensors import TORCH_DTYPES, Read


class Quantizer:
    """What a load does about quantization; this one does nothing.

    Attributes:
        errors: Layers that the load has quantized -> relative error.
        rules: Key rules for these files, beside the architecture's; known after `prepare`.
        notes: Sentences for the load report.

    Args:
        dtype: What plain weights are loaded as; None keeps each one's own.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self.dtype = dtype
        self.errors: dict[str, float] = {}
        self.rules: tuple[KeyRule, ...] = ()
        self.notes: list[str] = []

    def view(self, model: Any, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint as the rest of the load sees it; the first question of all.

        Args:
            model: Without memory.
            checkpoint: What the files hold.
        """
        return checkpoint

    def prepare(self, model: Any, checkpoint: Checkpoint) -> None:
        """Change the empty model before the load is planned.

        Args:
            model: Without memory.
            checkpoint: What the files hold.
        """

    def wrap(self, model: Any, plan: LoadPlan, read: Read) -> tuple[LoadPlan, Read]:
        """Change the plan, and how its steps are read; put leaves into the model.

        Args:
            model: Without memory.
            plan: What to do.
            read: Reads one tensor.
        """
        return plan, read

    is_active = False

    # Whether every weight stays on the device that it is read to. A load says so before `wrap`.
    is_resident = False

    def sizes(self, model: Any, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of every weight, those of quantized layers as they are stored.

        Args:
            model: With leaves in place.
            sizes: As for plain weights.
        """
        found = dict(sizes)
        for path, leaf in quantized_leaves(model).items():
            for name, value in leaf.named_parameters():
                # Tied weights are listed once, under their owner.
                if name != "bias" and f"{path}.{name}" in found:
                    found[f"{path}.{name}"] = value.numel() * value.element_size()
        return found

    def forms(self, steps: Iterable[LoadStep]) -> dict[str, Form]:
        """Return, of weights that go to disk, those that become more than one tensor there.

        Args:
            steps: What is placed on disk.
        """
        return {}

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse a placement that the weights cannot have.

        Args:
            homes: Where they would go.
        """

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds, and make its layers ready.

        Args:
            model: Loaded.
        """


class Quantizing(Quantizer):
    """What the three ways share.

    Args:
        config: The scheme.
        dtype: As `Quantizer`.
        is_mapped: Whether weights are read from maps of files, whose pages can be given back.
    """

    def __init__(self, config: QuantizationConfig, dtype: str | None, *, is_mapped: bool = False) -> None:
        super().__init__(dtype)
        self.config, self.is_mapped = config, is_mapped

    is_active = True

    def check_homes(self, homes: Iterable[Any]) -> None:
        """Refuse the disk: what lies there are the checkpoint's own files, and this load makes others."""
        if DISK in homes:
            raise NotYetError(
                "Weights that this load repacks from another library's form cannot be placed on disk yet",
                where="quantization_config, device_map",
                mend="Load without 'disk', save_pretrained, and load that folder with the device_map.",
            )

    def finish(self, model: Any) -> None:
        """Say in the config what the model holds, and make its layers ready."""
        for leaf in quantized_leaves(model).values():
            if isinstance(leaf, GgufLinear) and self.config.compute_dtype is not None:
                leaf.computes_in = TORCH_DTYPES[self.config.compute_dtype]
        use_kernel_layouts(model)
        # A rule knows `weight` but not the scales beside it, so these keep the model's own names.
        own = {f"{path}.weight" for path in quantized_leaves(model)}
        names = getattr(model, "_checkpoint_names", {})
        model._checkpoint_names = {key: name for key, name in names.items() if key not in own}
        model.config.quantization_config = self.config.to_dict()

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype that stands for the weights in layers that are quantized."""
        return TORCH_DTYPES[self.dtype or "float32"]


def copy_form(path: str, leaf: IntegerLeaf) -> Form:
    """Return what a copy of a weight on disk consists of.

    Args:
        path: The layer's.
        leaf: The layer.
    """
    form, tensors = leaf.form, leaf.form.tensors(leaf.shape)
    facts = (form.group_size, form.zero, form.scale_dtype, form.is_ordered)
    return Form(
        # The number tells the copies of another way of rounding apart: it goes up when `quantize` changes.
        f"{form.method} {' '.join(map(str, facts))} v1",
        {f"{path}.{name}": (dtype, shape) for name, (shape, dtype) in tensors.items()},
    )


def let_go(view: torch.Tensor) -> None:
    """Give the pages of a weight back that has been read once and will not be read again.

    Args:
        view: Of a private map; nothing else may look at its bytes any more.
    """
    if sys.platform != "linux":
        return
    first = -(-view.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (view.data_ptr() + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        release_pages(first, length)
