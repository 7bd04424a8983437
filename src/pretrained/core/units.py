# SPDX-License-Identifier: Apache-2.0
"""What a placement moves as one: blocks, loose modules and loose weights, tied ones joined.

`units_of` covers every parameter and buffer of a skeleton exactly once, so that a placement which gives every
unit a home has forgotten nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pretrained.core.dtypes import DTYPES
from pretrained.core.plan import LoadPolicy, target_dtype
from pretrained.core.skeleton import ParamSpec, Skeleton
from pretrained.errors import ArgumentError

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that get one home.

    Attributes:
        paths: Module paths (of loose weights beside submodules: their keys), in module order; more than one
            where a tie joins them.
        keys: Every parameter and buffer, aliases included, in module order.
        nbytes: Bytes they take, each tensor counted once.
        cache_bytes: Bytes of key-value cache that come with them where they run.
    """

    paths: tuple[str, ...]
    keys: tuple[str, ...]
    nbytes: int
    cache_bytes: int = 0

    @property
    def name(self) -> str:
        """The first path."""
        return self.paths[0]


def weight_sizes(
    skeleton: Skeleton,
    policy: LoadPolicy,
    *,
    stored: Mapping[str, str] | None = None,
    nbytes: Callable[[str, tuple[int, ...]], int | None] | None = None,
) -> dict[str, int]:
    """Return the bytes of each weight once it is loaded.

    Args:
        skeleton: What the model promises.
        policy: Its `dtype` and what it keeps in float32; with ``dtype=None`` weights keep the stored dtype.
        stored: Key -> dtype in the files; None, or a key that is absent, for float32.
        nbytes: A quantization scheme's word on a weight by key and shape: its bytes, or None where the scheme
            leaves it alone.

    Returns:
        Key -> bytes, for all of ``skeleton.params`` and ``skeleton.derived``; aliases have their owner's.
    """
    sizes: dict[str, int] = {}
    for key, spec in skeleton.params.items():
        if key in skeleton.ties:
            continue
        special = None if nbytes is None or spec.is_buffer else nbytes(key, spec.shape)
        if special is None:
            dtype = target_dtype(key, (stored or {}).get(key, "float32"), policy)
            special = spec.num_elements * DTYPES[dtype].itemsize
        sizes[key] = special
    for alias, owner in skeleton.ties.items():
        sizes[alias] = sizes[_root(owner, skeleton.ties)]
    for key, spec in skeleton.derived.items():
        sizes[key] = spec.num_elements * DTYPES["float32"].itemsize
    return sizes


def with_blocks(skeleton: Skeleton, paths: Iterable[str]) -> Skeleton:
    """Return the skeleton with blocks marked, for modules that no `SkeletonBuilder` described.

    Args:
        skeleton: Any.
        paths: Module paths that are never split; of nested ones the outermost counts.
    """
    wanted = set(paths)

    def block_of(key: str) -> str | None:
        return next((path for path in _ancestors(key) if path in wanted), None)

    def marked(specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
        return {key: replace(spec, block=block_of(key)) for key, spec in specs.items()}

    return replace(skeleton, params=marked(skeleton.params), derived=marked(skeleton.derived))


def module_order(skeleton: Skeleton) -> list[ParamSpec]:
    """Return every parameter and buffer in module order; a derived buffer ends the module that holds it.

    Args:
        skeleton: What the model promises.
    """
    order = [spec for key, spec in skeleton.params.items() if key not in skeleton.derived]
    for spec in skeleton.derived.values():
        last: dict[str, int] = {}
        for index, other in enumerate(order):
            last.update(dict.fromkeys(_ancestors(other.key), index))
        home = next(path for path in reversed([*_ancestors(spec.key)]) if path in last or path == "")
        order.insert(last.get(home, -1) + 1, spec)
    return order


def units_of(
    skeleton: Skeleton, sizes: Mapping[str, int], cache: Mapping[str, int] | None = None
) -> list[Unit]:
    """Return what a placement moves as one, in module order.

    Args:
        skeleton: What the model promises.
        sizes: Bytes by key, as from `weight_sizes`; aliases and derived buffers may be absent.
        cache: Bytes of key-value cache by block path.

    Raises:
        ArgumentError: `sizes` lacks a weight, or `cache` names a block that is not there.
    """
    specs = module_order(skeleton)
    split = {path for spec in specs for path in [*_ancestors(spec.key)][:-1]}
    path_of = {spec.key: _path(spec, split) for spec in specs}
    joined = _Joined(path_of.values())
    for alias, owner in skeleton.ties.items():
        if alias in path_of and owner in path_of:
            joined.join(path_of[owner], path_of[alias])
    groups: dict[str, list[str]] = {}
    for key, path in path_of.items():
        groups.setdefault(joined.find(path), []).append(key)
    missing = [key for key in skeleton.params if key not in sizes and key not in skeleton.ties]
    strangers = set(cache or ()) - set(path_of.values())
    if missing or strangers:
        raise ArgumentError(
            "Sizes and skeleton are not of one model",
            where="sizes" if missing else "cache",
            found=f"{len(missing)} weights without a size" if missing else "blocks that are not in the model",
            expected=f"such as {missing[0] if missing else min(strangers)}",
        )
    return [_unit(keys, path_of, skeleton, sizes, cache or {}) for keys in groups.values()]


def compact(homes: Mapping[str, Value]) -> dict[str, Value]:
    """Return the shortest map of modules that says the same: an entry covers everything under it.

    Args:
        homes: Parameter key -> its home, in module order.
    """
    first: dict[str, Value] = {}
    mixed: set[str] = set()
    for key, home in homes.items():
        for path in (*_ancestors(key), key):
            if first.setdefault(path, home) != home:
                mixed.add(path)
    short: dict[str, Value] = {}
    for key, home in homes.items():
        short[next((path for path in _ancestors(key) if path not in mixed), key)] = home
    return short


def covering(key: str, paths: Mapping[str, object]) -> str | None:
    """Return the longest of some paths that covers a key, or None.

    Args:
        key: A parameter's key or a module's path.
        paths: Module paths; ``""`` covers everything.
    """
    if key in paths:
        return key
    return next((path for path in reversed([*_ancestors(key)]) if path in paths), None)


def _ancestors(key: str) -> Iterable[str]:
    """Yield the paths of the modules around a key, from the model itself (``""``) inwards."""
    yield ""
    at = key.find(".")
    while at >= 0:
        yield key[:at]
        at = key.find(".", at + 1)


def _path(spec: ParamSpec, split: set[str]) -> str:
    """Return the block, the leaf module, or (beside submodules) the key that a weight moves with."""
    if spec.block is not None:
        return spec.block
    module = spec.key.rpartition(".")[0]
    return spec.key if module in split or module == "" else module


def _unit(
    keys: list[str],
    path_of: Mapping[str, str],
    skeleton: Skeleton,
    sizes: Mapping[str, int],
    cache: Mapping[str, int],
) -> Unit:
    paths = tuple(dict.fromkeys(path_of[key] for key in keys))
    own = [key for key in keys if key not in skeleton.ties]
    total = sum(sizes[key] if key in sizes else 4 * skeleton.derived[key].num_elements for key in own)
    return Unit(paths, tuple(keys), total, sum(cache.get(path, 0) for path in paths))


def _root(key: str, ties: Mapping[str, str]) -> str:
    while key in ties:
        key = ties[key]
    return key


class _Joined:
    """Sets that grow together (union-find with path halving)."""

    def __init__(self, items: Iterable[str]) -> None:
        self._parent = {item: item for item in items}

    def find(self, item: str) -> str:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, first: str, second: str) -> None:
        self._parent[self.find(second)] = self.find(first)
