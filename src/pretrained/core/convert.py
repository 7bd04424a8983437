# SPDX-License-Identifier: Apache-2.0
"""Converts checkpoints: one tensor at a time, checked after writing, in place only when all of it is right.

`plan_conversion` decides what each tensor of the new files is. `write_parts` writes the files into a work
folder, and `finish` puts them where they are wanted, by renames. A work folder stands beside the place that
it will take, under a name that nothing loads from. A conversion that was killed leaves it; the next one
compares what lies there with what should, keeps the files that are right, and writes the others again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pretrained.core.atomic_files import errors_with_mend, new_file, removed_on_error, temporary_name
from pretrained.core.checkpoint import Checkpoint, TensorInfo
from pretrained.core.disk_space import check_room
from pretrained.core.dtypes import DTYPES
from pretrained.core.ggml import is_block_type
from pretrained.core.options import Progress
from pretrained.core.plan import LoadPolicy, LoadStep, MappedTensor, target_dtype
from pretrained.core.reader import MappedFiles
from pretrained.core.writer import ShardPlan, TensorSource, safetensors_layout, write_checkpoint, write_tensor
from pretrained.errors import ArgumentError, CheckpointError, FileError, PretrainedError, WeightsError

# Elements that are cast at a time: the float32 between takes 16 MiB.
_PIECE: Final = 1 << 22
_COMPARED: Final = 1 << 24
# What infinity is without its sign, in types of two bytes.
_INFINITY_BITS: Final = {"float16": 0x7C00, "bfloat16": 0x7F80}


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What a conversion will do, decided from headers.

    Attributes:
        steps: One for each tensor of the new files, in the order of the old ones.
        aliases: Keys that are left out, for they name a tensor that is written under another name.
        dropped: Keys that are left out -> why.
    """

    steps: tuple[LoadStep, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each new tensor, by key."""
        return {step.key: step.source.num_elements * DTYPES[step.dtype].itemsize for step in self.steps}


def plan_conversion(
    checkpoint: Checkpoint,
    policy: LoadPolicy,
    *,
    layouts: Mapping[str, MappedTensor] | None = None,
    dropped: Mapping[str, str] | None = None,
    ties: Mapping[str, str] | None = None,
) -> ConversionPlan:
    """Decide what the new files hold.

    Args:
        checkpoint: What the old files hold.
        policy: Its `dtype` and the patterns of what stays float32; None as dtype keeps each tensor's own,
            float32 for blocks of GGML.
        layouts: For GGUF files: key in the file -> what it becomes.
        dropped: Keys of the file that are left out -> why.
        ties: Alias -> owner. An alias is left out where the file has one tensor under both names.
    """
    dropped = dict(dropped or {})
    steps: list[LoadStep] = []
    found: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name in dropped:
            continue
        mapped = (layouts or {}).get(name, MappedTensor(name))
        dtype = target_dtype(mapped.key, info.dtype, policy)
        found[mapped.key] = info
        steps.append(LoadStep(mapped.key, info, dtype, mapped.apply, mapped.shape))
    aliases = {
        alias: owner
        for alias, owner in (ties or {}).items()
        if alias in found and owner in found and _same_span(found[alias], found[owner])
    }
    kept = tuple(step for step in steps if step.key not in aliases)
    if not kept:
        raise WeightsError("The checkpoint holds no tensors", where=", ".join(map(str, checkpoint.files)))
    return ConversionPlan(kept, aliases, dropped)


def _same_span(first: TensorInfo, second: TensorInfo) -> bool:
    facts = [(i.file, i.offset, i.nbytes, i.shape, i.dtype, i.strides) for i in (first, second)]
    return facts[0] == facts[1]


# One tensor


class Reading:
    """Reads tensors of the old files in turn, and lets go of each when the next is asked for.

    Args:
        checkpoint: The old files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.files = MappedFiles(checkpoint.states)
        self._last: TensorInfo | None = None

    def enter(self, info: TensorInfo) -> None:
        """Say that a tensor is read now, and the one before is done with.

        Args:
            info: The tensor.
        """
        self.leave()
        self._last = info

    def leave(self) -> None:
        """Say that the last tensor is done with."""
        if self._last is not None:
            self.files.release(self._last)
        self._last = None


class ConvertedTensor:
    """A tensor of the new files: made from the old one's bytes when its turn comes.

    Args:
        step: What it is made from, and what it becomes.
        reading: The old files.
    """

    def __init__(self, step: LoadStep, reading: Reading) -> None:
        self.step, self._reading = step, reading
        self.dtype = step.dtype
        self.shape = step.source.shape if step.shape is None else step.shape

    def array(self) -> npt.NDArray[Any]:
        """Return its values; they may be pages of the old file, which must not be written to.

        Raises:
            WeightsError: values are too large for the new dtype.
        """
        self._reading.enter(self.step.source)
        array = self._reading.files.array(self.step.source)
        if self.step.apply is not None:
            array = self.step.apply(array)
        return cast(array, self.dtype, key=self.step.key)

    def read(self) -> memoryview:
        """Return its bytes, row-major."""
        array = np.ascontiguousarray(self.array())
        return memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")


def cast(array: npt.NDArray[Any], dtype: str, *, key: str) -> npt.NDArray[Any]:
    """Return an array in another dtype, rounded to the nearest, by way of float32 as frameworks do it.

    Args:
        array: Any numbers.
        dtype: A name of `DTYPES`.
        key: The tensor's name, for the error.

    Returns:
        The array itself where it has the dtype already.

    Raises:
        WeightsError: a finite value is too large for the dtype.
    """
    target = DTYPES[dtype].numpy
    if array.dtype == target:
        return array
    if dtype in ("float32", "float64") and array.dtype.itemsize <= 4:
        return array.astype(target)  # exact
    result = np.empty(array.shape, target)
    flat, source = result.reshape(-1), np.ascontiguousarray(array).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _PIECE):
            piece, part = source[start : start + _PIECE], flat[start : start + _PIECE]
            part[...] = piece.astype(np.float32, copy=False).astype(target, copy=False)
            if _has_infinities(part):
                _check_infinities(part, piece, dtype, key)
    return result


def _has_infinities(array: npt.NDArray[Any]) -> bool:
    """Tell whether infinities are among numbers; by their bits where numpy's own question is slow."""
    bits = _INFINITY_BITS.get(array.dtype.name)
    if bits is None:
        return bool(np.isinf(array).any())
    return bool(((array.view(np.uint16) & np.uint16(0x7FFF)) == np.uint16(bits)).any())


def _check_infinities(new: npt.NDArray[Any], old: npt.NDArray[Any], dtype: str, key: str) -> None:
    lost = np.isinf(new.astype(np.float32)) & np.isfinite(old)
    if lost.any():
        raise WeightsError(
            f"Values of {key!r} are too large for {dtype}, and would become infinite",
            where=key,
            found=f"{float(np.abs(old[lost].astype(np.float64)).max()):g}",
            mend="Convert to a dtype with a larger range, such as float32.",
        )


# Writing, and reading back

WriteFile = Callable[[Path, Sequence[str]], None]


def safetensors_writer(metadata: Mapping[str, str], tensors: Mapping[str, TensorSource]) -> WriteFile:
    """Return what writes one safetensors file.

    Args:
        metadata: String pairs of the header.
        tensors: All tensors.
    """

    def write(file: Path, keys: Sequence[str]) -> None:
        part = {key: tensors[key] for key in keys}
        head, order = safetensors_layout(part, metadata)
        with new_file(file) as opened:
            opened.write(head)
            for key in order:
                write_tensor(opened, key, part[key])

    return write


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Make or take up the folder in which something is prepared that will stand at a path.

    It is left behind by a crash and by errors of the system, so that another run goes on from there, and
    removed otherwise.

    Args:
        target: The path; its parent is made where it is absent.

    Raises:
        FileError: another process is at it, or it cannot be made.
    """
    folder = work_path(target)
    with errors_with_mend(folder, what="The folder to work in cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_symlink():
            raise FileError("The folder to work in is a link", where=folder, mend="Remove it.")
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(lock, target)
        try:
            yield folder
        except PretrainedError as error:
            if not isinstance(error, OSError) or not any((folder / "parts").glob("[!.]*")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, target: Path) -> None:
    """Hold a lock that ends with the process; where there are none, two at once are not told."""
    try:
        # Imported here: not every system has it.
        import fcntl  # noqa: PLC0415

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(
            "Another process is converting to this place",
            where=target,
            mend="Wait for it, or convert to another place.",
        ) from None
    except (ImportError, OSError):
        return


def work_path(target: Path) -> Path:
    """Return where something is prepared that will stand at a path.

    Args:
        target: The path.
    """
    target = Path(os.path.abspath(target))  # "." has no name of its own
    return target.parent / f".{target.name}.converting"


def write_parts(
    work: Path,
    plan: ShardPlan,
    tensors: Mapping[str, TensorSource],
    writer: Callable[[Mapping[str, TensorSource]], WriteFile],
    read: Callable[[Path], Checkpoint],
    *,
    nbytes: Mapping[str, int],
    progress: Progress,
) -> tuple[str, ...]:
    """Write the new files into a work folder, and read each back; keep what an earlier run has finished.

    Args:
        work: From `work_folder`.
        plan: Which tensor goes to which file.
        tensors: All tensors.
        writer: Makes of tensors what writes one file with some of them.
        read: Reads the header of one.
        nbytes: Bytes of each tensor in its file.
        progress: Told of the bytes that are written and compared.

    Returns:
        The names of the files that were there already.

    Raises:
        FileError: the disk has no room, which is asked first, or cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    parts = work / "parts"
    with errors_with_mend(parts):
        parts.mkdir(exist_ok=True)
        for name in os.listdir(parts):
            if name not in plan.files:
                (parts / name).unlink()
    total, kept = sum(nbytes.values()), []
    count = _Counter(progress, 2 * total)
    tensors = {key: _Counted(tensor, nbytes[key], count) for key, tensor in tensors.items()}
    write_file, done = writer(tensors), 0
    there = sum((parts / name).stat().st_size for name in plan.files if (parts / name).exists())
    check_room(parts, max(total - there, 0))
    for name, keys in plan.files.items():
        file = parts / name
        size = sum(nbytes[key] for key in keys)
        if file.exists():
            with suppress(CheckpointError):
                verify(read(file), {key: tensors[key] for key in keys})
                kept.append(name)
        if name not in kept:
            fresh = parts / temporary_name(name, "00000000")
            with errors_with_mend(file, needed=size), removed_on_error(parts, [fresh.name]):
                write_file(fresh, keys)
                verify(read(fresh), {key: tensors[key] for key in keys})
                os.replace(fresh, file)
        done += 2 * size
        count.done = done
    return tuple(kept)


class _Counter:
    """Bytes that were read for writing and again for comparing."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.done = 0
        self._progress, self._total = progress, total

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self._progress(self.done // 2, self._total // 2, "convert")


class _Counted:
    """A tensor whose reads are counted."""

    def __init__(self, tensor: TensorSource, nbytes: int, counter: _Counter) -> None:
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        self._tensor, self._nbytes, self._counter = tensor, nbytes, counter

    def read(self) -> bytes | bytearray | memoryview:
        result = self._tensor.read()
        self._counter.add(self._nbytes)
        return result


def verify(found: Checkpoint, tensors: Mapping[str, TensorSource]) -> None:
    """Compare a file with what it should hold: keys, dtypes, shapes, and every byte, converted once more.

    Args:
        found: The file's header.
        tensors: What it should hold, by key.

    Raises:
        CheckpointError: they differ.
    """
    where = found.files[0]
    if set(found.tensors) != set(tensors):
        odd = sorted(set(found.tensors) ^ set(tensors))
        raise differs(f"its keys differ: {', '.join(odd[:3])}", where)
    reading = Reading(found)
    for key, info in found.tensors.items():
        expected = tensors[key]
        if (info.dtype, info.shape) != (expected.dtype, tuple(expected.shape)):
            raise differs(f"{key!r} is {info.dtype} {info.shape}", where)
        reading.enter(info)
        if not _equal(expected.read(), _stored(reading, info)):
            raise differs(f"the bytes of {key!r} differ", where)
    reading.leave()


def same_bytes(first: TensorInfo, second: TensorInfo, checkpoint: Checkpoint) -> bool:
    """Tell whether two tensors are one span or hold equal bytes.

    Args:
        first: A tensor of the checkpoint.
        second: Another.
        checkpoint: The files.
    """
    if _same_span(first, second):
        return True
    if (first.dtype, first.shape, first.nbytes) != (second.dtype, second.shape, second.nbytes):
        return False
    readings = Reading(checkpoint), Reading(checkpoint)
    return _equal(*(_stored(reading, info) for reading, info in zip(readings, (first, second), strict=True)))


def _stored(reading: Reading, info: TensorInfo) -> memoryview:
    if info.strides is None or is_block_type(info.dtype) or not info.nbytes:
        return reading.files.buffer(info)
    array = np.ascontiguousarray(reading.files.array(info))
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _equal(first: memoryview | bytes | bytearray, second: memoryview) -> bool:
    left, right = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    return left.size == right.size and all(
        np.array_equal(left[at : at + _COMPARED], right[at : at + _COMPARED])
        for at in range(0, left.size, _COMPARED)
    )


def differs(what: str, where: Path) -> CheckpointError:
    """Return the error for a file that does not hold what was written.

    Args:
        what: In what it differs.
        where: The file.
    """
    return CheckpointError(
        f"What was written is not what was meant: {what}",
        where=where,
        mend="Check the disk, and convert again; what was there before is intact.",
    )


# Into place


def finish(
    work: Path,
    target: Path,
    plan: ShardPlan,
    tensors: Mapping[str, TensorSource],
    add_files: Callable[[Path], None],
) -> None:
    """Put the finished files where they are wanted, with what goes with them.

    Where nothing stands yet, a whole folder appears by one rename. In a folder that exists, the weights are
    replaced as a save does it.

    Args:
        work: From `work_folder`, after `write_parts`.
        target: The folder that is wanted.
        plan: As given to `write_parts`.
        tensors: As given to `write_parts`.
        add_files: Writes the other files into a folder.

    Raises:
        FileError: the folder cannot be written.
    """
    parts = work / "parts"
    names = {keys: name for name, keys in plan.files.items()}

    def move(file: Path, keys: Sequence[str]) -> None:
        os.replace(parts / names[tuple(keys)], file)

    fresh = not target.exists() or not any(target.iterdir())
    folder = work / "whole" if fresh else target
    with errors_with_mend(folder):
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
    write_checkpoint(
        folder, plan, tensors, file_stem=plan.file_stem, variant=plan.variant, write_file=move, needed=0
    )
    add_files(folder)
    if fresh:
        with errors_with_mend(target):
            os.rename(folder, target)


def carry(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder, each whole or not at all.

    Args:
        files: Path by the name it gets.
        folder: Where.

    Raises:
        FileError: one cannot be read or written.
    """
    for name, file in files.items():
        place = folder / name
        with errors_with_mend(place):
            place.parent.mkdir(exist_ok=True)
            fresh = place.with_name(temporary_name(place.name, "00000000"))
            with removed_on_error(place.parent, [fresh.name]):
                shutil.copyfile(file, fresh)
                os.replace(fresh, place)


def check_target(target: Path, source: Path | None, *, force: bool) -> None:
    """Raise where a conversion must not write.

    Args:
        target: Where to.
        source: The local folder or file that is converted; None for a repository.
        force: Whether what is there may be replaced.

    Raises:
        ArgumentError: the two lie in each other, or are the same.
        FileError: something is there.
    """
    if source is not None:
        ours, theirs = target.resolve(), source.resolve()
        if ours == theirs or (source.is_file() and ours == theirs.parent):
            raise ArgumentError(
                "A checkpoint is not converted in place", where=target, mend="Name another place as DST."
            )
        if theirs in ours.parents:
            raise ArgumentError(
                "DST lies inside SRC", where=target, mend="Name a place outside the folder that is converted."
            )
    if force:
        return
    occupied = target.is_file() or target.is_symlink() or (target.is_dir() and any(target.iterdir()))
    if occupied:
        raise FileError(
            "DST exists already",
            where=target,
            found="a file" if target.is_file() else "a folder that is not empty",
            mend="Name another place, or pass --force to replace the weights in it.",
        )
