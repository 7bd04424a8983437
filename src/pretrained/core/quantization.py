# SPDX-License-Identifier: Apache-2.0
"""Quantization schemes as data: their settings, their spellings and their sizes.

Nothing here touches a weight.

Stored forms, all of them plain tensors of a module that was a dense layer or an embedding:

========  ============================  ==============================================================
scheme    tensors                       value of weight [o, i]
========  ============================  ==============================================================
int8      ``weight`` int8 [out, in],    ``weight * weight_scale[o]``
          ``weight_scale`` bf16 [out]
int4      ``weight`` uint8 [out,        ``(q - 8) * weight_scale[o, i // group] + weight_zero[...]``;
          in / 2], ``weight_scale``     q is the low half of byte i // 2 for even i, else the high half;
          bf16 [out, in / group]        ``weight_zero`` (bf16, as the scale) only if not symmetric
gguf      ``weight`` uint8 [out,        GGML's own blocks, row by row; the type of each layer is in
          bytes of a row]               ``block_types``
========  ============================  ==============================================================

A load can also find forms that only other libraries make; `pretrained.core.integer_form` has them all.

Scales are rounded to bfloat16 before the integers are, so that the packed kernels, which take bfloat16
scales, and the reference path compute from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Final

from pretrained.core.awq import AwqScheme
from pretrained.core.dtypes import floating_dtype_name
from pretrained.core.foreign_quantization import ForeignScheme
from pretrained.core.gptq import GptqScheme
from pretrained.core.integer_form import IntegerForm
from pretrained.core.library_quantization import BitsAndBytesScheme, TorchAoScheme, asks_for_bitsandbytes
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.errors import ArgumentError, NotYetError, did_you_mean

METHODS: Final = ("int8", "int4", "gguf")
GROUP_SIZES: Final = (32, 64, 128)
# Groups of 32 cost 4.5 bits a weight instead of 4.25 (64), for about a tenth less error.
DEFAULT_GROUP_SIZE: Final = 32
SCALE_BYTES: Final = 2

# Methods of other libraries whose checkpoints are read: one line for each.
READ_METHODS: Final[Mapping[str, type[ForeignScheme]]] = {
    "awq": AwqScheme,
    "bitsandbytes": BitsAndBytesScheme,
    "gptq": GptqScheme,
    "torchao": TorchAoScheme,
}

# Methods that the ecosystem's checkpoints name and that are not read yet.
_FOREIGN: Final = (
    "aqlm", "auto-round", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8",
    "fp8", "fp_quant", "higgs", "hqq", "mxfp4", "mxfp8", "nvfp4", "quanto", "quark", "spqr",
    "torchao", "vptq",
)  # fmt: skip

# Fields of BitsAndBytesConfig whose defaults ask for nothing, and those that only that library can obey.
_BNB_IDLE: Final[Mapping[str, tuple[Any, ...]]] = {
    "llm_int8_threshold": (6.0,),
    "llm_int8_enable_fp32_cpu_offload": (False, True),
    "llm_int8_has_fp16_weight": (False,),
    "bnb_4bit_quant_type": ("fp4",),
    "bnb_4bit_use_double_quant": (False,),
    "bnb_4bit_quant_storage": (None, "uint8", "torch.uint8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How the dense layers of a model are stored.

    Attributes:
        quant_method: ``"int8"`` (a scale for each output channel), ``"int4"`` (a scale for each group of
            input channels) or ``"gguf"`` (GGML's blocks as they lie in a GGUF file).
        group_size: int4: input channels that share a scale, 32, 64 or 128; None for 32.
        symmetric: int4: zero is one of the 16 values. False stores an offset with each scale, which
            costs half a bit a weight in groups of 32 and lowers the error by about a sixth.
        skip_modules: Names or patterns of modules that stay as they are. A name stands for a whole
            dotted part of a path: ``"lm_head"``, ``"decoder.layers.0"``, ``"*.o_proj"``.
        quantize_embeddings: Store the token embedding as int8, a scale for each row; int8 and int4.
        quantize_head: Quantize the output head and other layers outside the body. A language-model
            head is stored as int8; one that is tied to the embedding takes the embedding with it.
        compute_dtype: ``"bfloat16"`` (and None) multiplies in bfloat16 on a CPU, where the packed
            kernels are, whatever the activations' dtype; ``"float32"`` multiplies in float32.
        block_types: gguf: GGML type of each packed module; written by a save.
        read_from: int8 and int4: the library whose integers these are; written by a save. Their groups
            and scales are what the files say, for each layer by itself.

    Raises:
        ArgumentError: a value that cannot be, or that the method does not use.
    """

    quant_method: str
    group_size: int | None = None
    symmetric: bool = True
    skip_modules: tuple[str, ...] = ()
    quantize_embeddings: bool = False
    quantize_head: bool = False
    compute_dtype: str | None = None
    block_types: Mapping[str, str] = field(default_factory=dict)
    read_from: str | None = None

    def __post_init__(self) -> None:
        if self.quant_method not in METHODS:
            raise _unknown_method(self.quant_method)
        object.__setattr__(self, "skip_modules", _names(self.skip_modules))
        if self.compute_dtype is not None:
            name = floating_dtype_name(str(self.compute_dtype))
            object.__setattr__(self, "compute_dtype", name)
            if name not in ("float32", "bfloat16"):
                raise ArgumentError(
                    "Quantized layers multiply in bfloat16 or float32",
                    where="quantization_config.compute_dtype",
                    expected="'bfloat16', 'float32' or None",
                    found=repr(name),
                )
        for name in ("symmetric", "quantize_embeddings", "quantize_head"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(
                    f"{name} is a yes or a no",
                    where=f"quantization_config.{name}",
                    expected="True or False",
                    found=repr(getattr(self, name)),
                )
        self._check_group()
        self._check_unused()

    def _check_group(self) -> None:
        if self.read_from is not None and self.group_size is None:
            return
        if self.quant_method == "int4" and self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        if self.quant_method == "int4" and self.group_size not in GROUP_SIZES:
            raise ArgumentError(
                "There is no int4 with groups of this size",
                where="quantization_config.group_size",
                expected="32, 64 or 128",
                found=repr(self.group_size),
            )

    def _check_unused(self) -> None:
        """Raise for a field that the method would not look at."""
        idle: dict[str, Any] = {"block_types": {}}
        if self.read_from is not None or self.quant_method != "int4":
            idle |= {"group_size": None, "symmetric": True}
        if self.quant_method == "gguf":
            idle |= {"quantize_embeddings": False, "quantize_head": False, "skip_modules": ()}
            idle["read_from"] = None
            del idle["block_types"]
        for name, value in idle.items():
            if getattr(self, name) != value:
                raise ArgumentError(
                    f"{name} means nothing for {self.quant_method!r}",
                    where=f"quantization_config.{name}",
                    found=repr(getattr(self, name)),
                    mend="Leave it out.",
                )

    @property
    def form(self) -> IntegerForm:
        """The form of every weight that this scheme makes; int8 and int4."""
        return IntegerForm(
            bits=self.bits,
            group_size=self.group_size,
            zero=None if self.symmetric else "offset",
            compute_dtype=self.compute_dtype,
        )

    @property
    def bits(self) -> int:
        """Bits of a stored integer; 0 where the file decides (gguf)."""
        return {"int8": 8, "int4": 4}.get(self.quant_method, 0)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a dense layer's weight in this scheme, scales included.

        Args:
            shape: (out, in).

        Raises:
            ArgumentError: gguf, whose sizes are the file's.
        """
        out, count = shape[0], prod(shape)
        if self.quant_method == "int8":
            return count + out * SCALE_BYTES
        if self.quant_method == "int4":
            assert self.group_size is not None
            per_group = SCALE_BYTES if self.symmetric else 2 * SCALE_BYTES
            return count // 2 + count // self.group_size * per_group
        raise ArgumentError(
            "The size of packed blocks is the file's", where="gguf", mend="Use TensorInfo.nbytes."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds: the method, and what differs from its defaults."""
        plain = QuantizationConfig(quant_method=self.quant_method)
        values: dict[str, Any] = {"quant_method": self.quant_method}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "group_size":
                values |= {} if value is None else {item.name: value}
            elif value != getattr(plain, item.name):
                values[item.name] = list(value) if isinstance(value, tuple) else value
        if self.block_types:
            values["block_types"] = dict(self.block_types)
        return values


def requested_quantization(
    value: Any, *, load_in_8bit: bool = False, load_in_4bit: bool = False
) -> QuantizationConfig | ForeignScheme | None:
    """Return what the arguments of a call ask for.

    Args:
        value: `quantization_config`: a `QuantizationConfig`, a dictionary with ``quant_method``, or an
            object with ``to_dict()``. A BitsAndBytesConfig's two modes mean our int8 and int4, unless it asks
            for what only that library has (nf4, double quantization); a TorchAoConfig, or a config object of
            torchao itself, is for that library. None asks for nothing.
        load_in_8bit: The old spelling of int8.
        load_in_4bit: The old spelling of int4.

    Raises:
        ArgumentError: contradictions, unknown methods or fields.
        NotYetError: a method of another library, which this version does not offer.
    """
    config = _requested(value, load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit)
    if isinstance(config, QuantizationConfig) and config.read_from is not None:
        raise ArgumentError(
            "read_from is written by a save, and means nothing in a call",
            where="quantization_config.read_from",
            found=repr(config.read_from),
            mend="Leave it out.",
        )
    return config


def _requested(
    value: Any, *, load_in_8bit: bool, load_in_4bit: bool
) -> QuantizationConfig | ForeignScheme | None:
    if load_in_8bit and load_in_4bit:
        raise ArgumentError("A weight has 8 bits or 4", where="load_in_8bit, load_in_4bit")
    short = "int8" if load_in_8bit else "int4" if load_in_4bit else None
    if value is None:
        return None if short is None else QuantizationConfig(quant_method=short)
    config = _parsed(value)
    if short is not None and (config is None or config.quant_method != short):
        raise ArgumentError(
            f"load_in_{short[3]}bit=True and quantization_config ask for different things",
            where="quantization_config",
            found="no quantization" if config is None else config.quant_method,
            mend="Pass quantization_config alone.",
        )
    return config


def stored_quantization(
    value: Any, *, where: str = "config.json"
) -> QuantizationConfig | ForeignScheme | None:
    """Return the scheme that a checkpoint was saved in, from its config.json.

    Args:
        value: ``quantization_config`` of the config; None means plain weights.
        where: What to name in errors.

    Returns:
        This library's scheme, or another's that is read.

    Raises:
        NotYetError: the checkpoint was quantized by another library, in a way that is not read.
        ArgumentError: what is there makes no sense.
        ConfigError: the same, of another library's settings.
    """
    if not value:
        return None
    values = dict(value) if isinstance(value, Mapping) else _as_dict(value)
    method = values.get("quant_method")
    if method is None and (values.get("load_in_8bit") or values.get("load_in_4bit")):
        method = "bitsandbytes"
    if isinstance(method, str) and method in READ_METHODS:
        return READ_METHODS[method].parse(values, where=where)
    if method in _FOREIGN:
        raise NotYetError(
            f"The config says that the weights are quantized ({method}), which is not read yet",
            where=f"quantization_config, {where}",
            mend="Take the unquantized checkpoint and pass quantization_config={'quant_method': 'int4'} (or "
            "'int8').",
        )
    return _from_fields(values)


def _parsed(value: Any) -> QuantizationConfig | ForeignScheme | None:
    if isinstance(value, QuantizationConfig):
        return value
    if type(value).__module__.partition(".")[0] == "torchao":
        value = {"quant_method": "torchao", "quant_type": value}
    values = dict(value) if isinstance(value, Mapping) else _as_dict(value)
    values = {name: item for name, item in values.items() if not name.startswith("_")}
    bits8, bits4 = values.pop("load_in_8bit", False), values.pop("load_in_4bit", False)
    if bits8 or bits4:
        if bits8 and bits4:
            raise ArgumentError("A weight has 8 bits or 4", where="quantization_config")
        if asks_for_bitsandbytes({"load_in_4bit": bits4, **values}):
            return BitsAndBytesScheme.requested({"load_in_4bit": True, **values})
        return _from_bitsandbytes("int8" if bits8 else "int4", values)
    if values.get("quant_method") == "torchao":
        return TorchAoScheme.requested(values)
    if values.get("quant_method") == "gguf" and values.pop("dequantize", False):
        return None
    return _from_fields(values)


def _from_bitsandbytes(method: str, values: dict[str, Any]) -> QuantizationConfig:
    """Translate the fields of BitsAndBytesConfig that mean something for ours, and refuse the others."""
    values.pop("quant_method", None)
    found: dict[str, Any] = {"quant_method": method}
    skip = values.pop("llm_int8_skip_modules", None)
    if skip:
        found["skip_modules"] = skip
    compute = values.pop("bnb_4bit_compute_dtype", None)
    if compute is not None and method == "int4" and str(compute).endswith("bfloat16"):
        # float32 is that library's default and says nothing; the reference path is slow.
        found["compute_dtype"] = "bfloat16"
    for name, idle in _BNB_IDLE.items():
        given = values.pop(name, idle[0])
        if not any(given == choice or str(given) == choice for choice in idle):
            raise NotYetError(
                f"{name}={given!r} belongs to bitsandbytes, and is not passed on to it",
                where="quantization_config",
                mend="Leave it out for this library's int8 or int4.",
            )
    return _from_fields(found | values)


def _from_fields(values: Mapping[str, Any]) -> QuantizationConfig:
    method = values.get("quant_method")
    if method not in METHODS:
        raise _unknown_method(method)
    known = [item.name for item in fields(QuantizationConfig)]
    for name in values:
        if name not in known:
            raise ArgumentError(
                f"{name!r} is no setting of {method!r}",
                where="quantization_config",
                expected=", ".join(known),
                mend=did_you_mean(str(name), known) or None,
            )
    return QuantizationConfig(**values)


def _unknown_method(method: Any) -> ArgumentError | NotYetError:
    text = getattr(method, "value", method)
    if isinstance(text, str) and text in READ_METHODS:
        return NotYetError(
            f"Quantizing with {text} is not offered yet",
            where="quantization_config.quant_method",
            mend="Use 'int8' or 'int4'. A checkpoint that is stored so is read without the argument.",
        )
    if text in _FOREIGN:
        return NotYetError(
            f"Quantizing with {text} is not offered yet",
            where="quantization_config.quant_method",
            mend="Use 'int8' or 'int4'.",
        )
    return ArgumentError(
        "Unknown quantization method" if method is not None else "No quantization method is named",
        where="quantization_config.quant_method",
        expected=" or ".join(repr(name) for name in METHODS),
        found=repr(method),
        mend=did_you_mean(str(method), (*METHODS, *READ_METHODS, *_FOREIGN)) or None,
    )


def _as_dict(value: Any) -> dict[str, Any]:
    convert = getattr(value, "to_dict", None)
    if not callable(convert):
        raise ArgumentError(
            "This does not describe a quantization",
            where="quantization_config",
            expected="a QuantizationConfig, or a dictionary with quant_method",
            found=type(value).__name__,
        )
    values = dict(convert())
    values["quant_method"] = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    return values


def _names(value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise ArgumentError(
            "skip_modules is a list of module names",
            where="quantization_config.skip_modules",
            found=repr(value),
        )
    return names


# -- which weights, from a skeleton alone ---------------------------------------------------------


def names_module(patterns: tuple[str, ...], path: str) -> str | None:
    """Return the first pattern that names a module or one that it lies in, or None.

    Args:
        patterns: As `QuantizationConfig.skip_modules`.
        path: Module path.
    """
    dotted = f".{path}."
    for pattern in patterns:
        if f".{pattern}." in dotted or fnmatchcase(path, pattern):
            return pattern
    return None


def planned_nbytes(
    skeleton: Skeleton,
    config: QuantizationConfig,
    plain: Callable[[ParamSpec], int],
) -> dict[str, int]:
    """Return the bytes of each weight after quantization, from shapes alone; for a planner.

    Quantized are the matrices inside blocks: dense layers lie there, embeddings and heads do not.
    T5's table of relative positions is the one embedding that does. Layers whose input does not divide
    into groups are counted as they are; a load refuses them.

    Args:
        skeleton: What the model promises.
        config: int8 or int4; for gguf the sizes are the file's.
        plain: Bytes of a weight that is not quantized.
    """
    sizes = {}
    for key, spec in skeleton.params.items():
        path = key.rpartition(".")[0]
        dense = (
            spec.block is not None
            and len(spec.shape) == 2
            and not spec.is_buffer
            and not path.endswith("relative_attention_bias")
            and names_module(config.skip_modules, path) is None
        )
        sizes[key] = config.nbytes(spec.shape) if dense else plain(spec)
    return sizes
