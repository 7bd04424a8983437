# SPDX-License-Identifier: Apache-2.0
"""The closed world of the pickle machine: everything that a pickle from torch may name, as plain data.

`GLOBALS` is the whole list of names that a file may use. None of them is looked up anywhere: each stands for
a placeholder of this module. Names and forms: `torch/_utils.py`, `torch/storage.py` and
`torch/serialization.py`, PyTorch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from pretrained.core.dtypes import DTYPES


@dataclass(frozen=True, slots=True)
class TorchDType:
    """A ``torch.dtype`` by name; `name` may be one that `core.dtypes` has no row for.

    Attributes:
        name: As in torch (``"bfloat16"``).
        itemsize: Bytes an element takes.
    """

    name: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class StorageType:
    """A storage class: the dtype of its elements (bytes for untyped storages)."""

    dtype: TorchDType


@dataclass(frozen=True, slots=True)
class StorageRef:
    """Bytes that lie elsewhere in the file.

    Attributes:
        key: Their name there.
        dtype: Of the elements that `count` counts.
        count: Elements of the whole storage.
        offset: First element of the part meant, for the views that torch wrote before version 0.4.
    """

    key: str
    dtype: TorchDType
    count: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the pickle describes it; checked against the storage's bytes by the caller.

    Attributes:
        storage: Where its bytes are.
        dtype: Element type.
        offset: First element, from the start of the storage.
        shape: Logical shape.
        strides: In elements, as long as `shape`.
    """

    storage: StorageRef
    dtype: TorchDType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDictValue(dict[Any, Any]):
    """An OrderedDict: unlike a plain dict, it may carry attributes (the ``_metadata`` of state dicts)."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A harmless value that no weight needs, such as a ``torch.device``."""

    name: str


class Rebuild(Enum):
    """What REDUCE may be applied to. The machine does the work itself; nothing is ever called."""

    ORDERED_DICT = "collections.OrderedDict"
    SIZE = "torch.Size"
    DEVICE = "torch.device"
    TENSOR = "torch._utils._rebuild_tensor"
    TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
    TENSOR_V3 = "torch._utils._rebuild_tensor_v3"
    PARAMETER = "torch._utils._rebuild_parameter"
    PARAMETER_WITH_STATE = "torch._utils._rebuild_parameter_with_state"


_DTYPES: Final[Mapping[str, TorchDType]] = {
    **{name: TorchDType(name, dtype.itemsize) for name, dtype in DTYPES.items()},
    **{
        name: TorchDType(name, itemsize)
        for name, itemsize in {
            "complex32": 4,
            "complex128": 16,
            "float8_e4m3fnuz": 1,
            "float8_e5m2fnuz": 1,
            "float8_e8m0fnu": 1,
        }.items()
    },
}
_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
GLOBALS: Final[Mapping[str, object]] = {
    **{known.value: known for known in Rebuild},
    **{f"torch.{name}": StorageType(_DTYPES[dtype]) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(_DTYPES["uint8"]),
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
