# SPDX-License-Identifier: Apache-2.0
"""What written-out decoding steps share: when one may stand for the forward, its products, its norms.

A step computes what a family's `forward` computes for one new token of each row. It calls no module, so it
stands in only where no module has anything to add: no hook, no adapter, no other class, no compiled forward,
no autocast, no mode that watches operators. Everywhere else the forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pretrained.torch.cache import Cache
from pretrained.torch.mapped_mixin import check_files
from pretrained.torch.packed_products import packed_product
from pretrained.torch.products import Form, Product, choose, make_product
from pretrained.torch.weight_copies import WeightCopies, copies_of

_OWN = "pretrained.torch."
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_STOCK = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.Dropout,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Identity,
)


class DecodeStep(Protocol):
    """One new token of each row."""

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [rows, 1, vocab].

        Args:
            tokens: [rows] the newest tokens.
            position: How many tokens the cache holds of each row, padding included.
            positions: [rows, 1] positions of the tokens where rows are padded; None for `position`.
            mask: [rows, position + 1] with 0 for padding; None where nothing is padded.
        """


class DecodeWindow(Protocol):
    """Several new tokens of each row at once."""

    def __call__(
        self, tokens: torch.Tensor, position: int, positions: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the tokens; return logits [rows, new, vocab].

        Args:
            tokens: [rows, new] the newest tokens.
            position: How many tokens the cache holds of each row, padding included.
            positions: [rows, new] positions of the tokens where rows are padded; None to count on.
            mask: [rows, position + new] with 0 for padding; None where nothing is padded.
        """


class StepOutput:
    """What a strategy reads of a step."""

    __slots__ = ("logits", "past_key_values")

    def __init__(self, logits: torch.Tensor, cache: Cache) -> None:
        self.logits, self.past_key_values = logits, cache

    def __getattr__(self, name: str) -> None:
        # Fields that nobody asked for; where they are, no step stands in.
        return None


def find_step(
    model: Any,
    rows: int,
    cache: Cache,
    weight_copies: bool | None,
    steps: int,
    encoder_mask: torch.Tensor | None = None,
) -> DecodeStep | None:
    """Return the step that stands in for a model's forward, or None where the forward must run.

    Args:
        model: The model.
        rows: Rows of each step.
        cache: Filled by the prompt.
        weight_copies: The setting of that name.
        steps: How many steps there can be.
        encoder_mask: [rows, length] with 0 for the encoder's padding; None without, or where none is padded.
    """
    step: Any = getattr(type(model), "_decode_step", None)
    if step is None or not step.fits(model, cache):
        return None
    more = {} if encoder_mask is None else {"encoder_mask": encoder_mask}
    with torch.inference_mode():
        products = Products(rows, copies_of(model, weight_copies, steps))
        made: DecodeStep = step(model, rows, cache, products, **more)
    return made


def find_window(
    model: Any, rows: int, cache: Cache, weight_copies: bool | None, steps: int
) -> DecodeWindow | None:
    """Return what stands in for a model's forward over several tokens, or None where the forward must run.

    Args:
        model: The model.
        rows: Rows of each window.
        cache: Filled by the prompt.
        weight_copies: The setting of that name.
        steps: How many tokens there can be.
    """
    window: Any = getattr(type(model), "_decode_window", None)
    if window is None or not window.fits(model, cache):
        return None
    with torch.inference_mode():
        products = Products(2, copies_of(model, weight_copies, steps), beside=rows)
        made: DecodeWindow = window(model, cache, products)
    return made


def run_step(
    model: Any,
    step: DecodeStep | DecodeWindow,
    cache: Cache,
    tokens: torch.Tensor,
    position: int,
    positions: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> StepOutput:
    """Run a step; see `DecodeStep` for its arguments."""
    check_files(model)
    with torch.inference_mode():
        logits = step(tokens, position, positions, mask)
    # Made anew outside inference mode, as rules may write into it and users keep it.
    return StepOutput(logits.clone(), cache)


def is_stock(model: nn.Module, modules: frozenset[str]) -> bool:
    """Whether a model computes what its family's files say, and nothing else looks on.

    Args:
        model: The model.
        modules: Names of the Python modules, below `pretrained.torch`, whose classes the step knows.
    """
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._len_torch_function_stack() or _get_current_dispatch_mode() is not None:
        return False
    if torch.compiler.is_compiling() or any(getattr(torch_module, name, None) for name in _GLOBAL_HOOKS):
        return False
    known = {_OWN + name for name in modules}
    dtypes = set()
    for module in model.modules():
        if not _is_plain(module, known, module is model):
            return False
        if getattr(module, "decode_product", None) is None:
            dtypes |= {p.dtype for p in module._parameters.values() if p is not None}
    return len(dtypes) == 1


def _is_plain(module: nn.Module, known: set[str], is_model: bool) -> bool:
    kind, own = type(module), vars(module)
    if any(own.get(name) for name in _HOOKS) or own.get("_compiled_call_impl") is not None:
        return False
    if "forward" in own or "_dispatch" in own:
        return False
    if getattr(kind, "decode_product", None) is not None:
        return True
    tensors = own["_parameters"].values()
    if any(t is not None and (type(t) is not nn.Parameter or t.device.type != "cpu") for t in tensors):
        return False
    if kind in _STOCK:
        return True
    forward = getattr(kind.forward, "__module__", None)
    # A user's subclass of the whole model may add methods; inner classes are taken as a whole.
    return forward in known and (is_model or kind.__module__ in known)


class Products:
    """Makes the products of a step.

    Args:
        rows: Rows of a step.
        copies: Where copies of weights are kept; None to make none.
        beside: Rows of other steps of the same model: only copies that these read too are made.
    """

    def __init__(self, rows: int, copies: WeightCopies | None, beside: int | None = None) -> None:
        self._rows, self._copies, self._beside = rows, copies, beside

    def __call__(self, *layers: Any) -> Product:
        """Return the product of layers that read the same input, their outputs side by side.

        Args:
            *layers: `nn.Linear`, or layers with a method ``decode_product(rows)``.
        """
        if not all(type(layer) is nn.Linear for layer in layers):
            joined = packed_product(layers, self._rows)
            return joined or _beside([self._own(layer) for layer in layers])
        return self.dense([layer.weight for layer in layers], [layer.bias for layer in layers])

    def _own(self, layer: Any) -> Product:
        return packed_product([layer], self._rows) or _own_product(layer, self._rows)

    def transposed(self, layer: Any) -> Product:
        """Return the product of a `Conv1D`, whose weight is stored [in, out].

        Args:
            layer: The layer, or one with a method ``decode_product(rows)``.
        """
        if getattr(layer, "decode_product", None) is not None:
            return _own_product(layer, self._rows)
        weight, bias = layer.weight, _detached(layer.bias)
        outputs = weight.shape[1]
        form = choose(weight.device, weight.dtype, self._rows, outputs, copies=True)
        if form is Form.BAGS:
            # The layout that this form would copy it to.
            return make_product(form, weight.detach(), bias)
        if form.is_copy and self._copies is not None:
            stored = self._copies.get(form, [weight], transposed=True)
            if stored is not None:
                return make_product(form, stored, bias)
        form = choose(weight.device, weight.dtype, self._rows, outputs, copies=False)
        return make_product(form, weight.detach().t(), bias)

    def _beside_form(self, weight: torch.Tensor, outputs: int) -> Form:
        return choose(weight.device, weight.dtype, self._beside or 1, outputs, copies=True)

    def dense(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> Product:
        """Return the product of weights [out_i, in] that read the same input, their outputs side by side.

        Args:
            weights: Of one dtype and device.
            biases: [out_i] or None each.
        """
        first, outputs = weights[0], sum(weight.shape[0] for weight in weights)
        form = choose(first.device, first.dtype, self._rows, outputs, copies=self._copies is not None)
        other = form if self._beside is None else self._beside_form(first, outputs)
        if (
            form is other
            and form.is_copy
            and self._copies is not None
            and len({w.dtype for w in weights}) == 1
        ):
            stored = self._copies.get(form, weights)
            if stored is not None:
                return make_product(form, stored, _joined(weights, biases))
        form = choose(first.device, first.dtype, self._rows, outputs, copies=False)
        return _beside(
            [make_product(form, w.detach(), _detached(b)) for w, b in zip(weights, biases, strict=True)]
        )


def _own_product(layer: Any, rows: int) -> Product:
    if type(layer) is nn.Linear:
        weight = layer.weight.detach()
        form = choose(weight.device, weight.dtype, rows, weight.shape[0], copies=False)
        return make_product(form, weight, _detached(layer.bias))
    product: Product = layer.decode_product(rows)
    return product


def _beside(products: list[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([product(x) for product in products], dim=-1)


def _detached(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach()


def _joined(weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> torch.Tensor | None:
    if all(bias is None for bias in biases):
        return None
    parts = [
        weight.new_zeros(len(weight)) if bias is None else bias.detach()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_once(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return the attention of one new token of each row, shaped like its queries.

    Args:
        q: [rows, key heads, queries of each, channels]: heads that share a key head stand as its queries.
        k: [rows, key heads, length, channels].
        v: The same shape.
        mask: Booleans or numbers, broadcastable to [rows, key heads, queries of each, length]; None for none.
        scale: Factor on the scores.
    """
    if q.dtype == torch.bfloat16 and q.shape[2] == 1:
        # torch's kernel takes more than twice as long for a single bfloat16 query.
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
        return wide.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def make_norm(norm: Any, rows: int, reader: Product) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a root-mean-square normalisation of [rows, hidden], repeated where its reader wants that.

    For one row the factor is a number of Python's, which saves six of eight operators. Mean square, factor
    and scale are computed in float32 or better and rounded once.

    Args:
        norm: An `RMSNorm`.
        rows: Rows of a step.
        reader: The product that takes the result.
    """
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    size = weight.shape[0]
    if rows > 1 or eps <= 0:
        return lambda x: F.rms_norm(x, (size,), weight, eps)
    zero = torch.zeros_like(weight).repeat(getattr(reader, "parts", 1), 1)
    dot, addcmul = torch.dot, torch.addcmul

    def normalise(x: torch.Tensor) -> torch.Tensor:
        flat = x.view(size).float()
        return addcmul(zero, x, weight, value=(dot(flat, flat).item() / size + eps) ** -0.5)

    return normalise
