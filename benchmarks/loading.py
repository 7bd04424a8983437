# SPDX-License-Identifier: Apache-2.0
"""Loading at the limit: a T5 of 5.57 GB in three bfloat16 shards, beside transformers with accelerate.

Each run is a fresh process that measures from just before `from_pretrained` to the end of a first forward
(16 ids in, one step out); imports are excluded on both sides. Cold rows put the files out of the page cache
before every run of every side, and stop where pages are still there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from make_checkpoint import LAYERS, QUICK_LAYERS, checkpoint
from measure import OURS, PEER, SMOLLM2, Comparison, Round, Side, Target, compare
from memory_group import limited
from pagecache import evict, warm

_MODEL = """
import torch, inside
from {package} import T5ForConditionalGeneration
inside.measure(lambda: T5ForConditionalGeneration.from_pretrained({folder!r}, {arguments}), {measured})
"""
_READ = """
import inside
inside.read_files({files!r}, {side_by_side}, {nbytes})
"""
_FILL = """
import inside, torch
inside.fill_memory({nbytes})
"""
_FIRST_TOKEN = """
import time
start = time.perf_counter()
import json, inside, torch
from {package} import AutoModelForCausalLM, AutoTokenizer
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained({model})
tokenizer = AutoTokenizer.from_pretrained({model})
loaded = time.perf_counter()
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
with torch.no_grad():
    first = tokenizer.decode(model(ids).logits[0, -1].argmax())
assert first.strip() == "Paris", first
end = time.perf_counter()
print(json.dumps(dict(import_s=imported - start, load_s=loaded - imported, forward_s=end - loaded,
                      total_s=end - start, peak_bytes=inside.memory("VmHWM"))))
"""
_SIDE_BY_SIDE, _IN_TURN, _IN_RAM = "files side by side", "files in turn", "all in RAM"
_CAST, _DISK_PART = "cast to float32", "disk part, side by side"
_IN_GROUP, _FRESH = "disk part, side by side, in the group", "as much fresh memory filled"
_GB, _GIB = 10**9, 2**30


@dataclass(frozen=True)
class Setting:
    """What the rows are measured on: the checkpoint, and how often."""

    folder: Path
    is_quick: bool = False
    runs: int | None = None

    @property
    def files(self) -> list[Path]:
        """The weights' files."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def share(self) -> float:
        """Size relative to the checkpoint that the budgets are written for."""
        return self.nbytes / 5.568e9

    @property
    def budget(self) -> int:
        """Main memory for weights in the rows with a disk part: 1.5 GB of 5.57."""
        return int(1.5 * _GB * self.share)

    @property
    def size(self) -> str:
        """The checkpoint's size in words."""
        return f"{self.nbytes / _GB:.1f} GB"

    def model(self, package: str, arguments: str, measured: str = "") -> str:
        """Return a program that loads the model and runs it.

        Args:
            package: Whose.
            arguments: Of `from_pretrained`.
            measured: Arguments of `inside.measure`.
        """
        return _MODEL.format(package=package, folder=str(self.folder), arguments=arguments, measured=measured)

    def reading(self, side_by_side: bool, nbytes: int | None = None) -> str:
        """Return a program that only reads the files.

        Args:
            side_by_side: Whether all at once.
            nbytes: How much, from the files' beginnings; None for everything.
        """
        files = [str(file) for file in self.files]
        return _READ.format(files=files, side_by_side=side_by_side, nbytes=nbytes or self.nbytes)

    def evict(self) -> None:
        """Make the files cold."""
        evict(self.files)

    def warm(self) -> None:
        """Make the files warm."""
        warm(self.files)

    @property
    def often(self) -> dict[str, int]:
        """Counted rounds, and one before them that is not."""
        return {"runs": self.runs or (3 if self.is_quick else 5), "warmups": 1}


def load_warm(at: Setting) -> Comparison:
    """Same dtype, files in the page cache."""
    arguments = "dtype='bfloat16'"
    sides = {
        OURS: Side(at.model("pretrained", arguments), at.warm),
        PEER: Side(at.model("transformers", arguments), at.warm),
    }
    targets = [
        Target("load and first forward no slower than the peer", "total_s", most=1.0, against=PEER),
        Target("the load itself under 0.1 s", "load_s", most=0.1),
    ]
    return compare(f"Load {at.size}, bfloat16 as stored, warm", sides, targets, **at.often)


def load_cold(at: Setting) -> Comparison:
    """Same dtype, files on the disk only."""
    arguments = "dtype='bfloat16'"
    sides = {
        OURS: Side(at.model("pretrained", arguments), at.evict),
        PEER: Side(at.model("transformers", arguments), at.evict),
        _SIDE_BY_SIDE: Side(at.reading(True), at.evict),
        _IN_TURN: Side(at.reading(False), at.evict),
    }
    targets = [
        Target(
            "load and first forward within 1.25x of reading the files side by side",
            "total_s",
            most=1.25,
            against=_SIDE_BY_SIDE,
        ),
        Target("at most half the peer's time", "total_s", most=0.5, against=PEER),
    ]
    return compare(f"Load {at.size}, bfloat16 as stored, cold", sides, targets, **at.often)


def cast(at: Setting, *, is_cold: bool) -> Comparison:
    """bfloat16 file to float32."""
    before = at.evict if is_cold else at.warm
    sides = {
        OURS: Side(at.model("pretrained", "dtype='float32'"), before),
        PEER: Side(at.model("transformers", "dtype='float32'"), before),
        # What the system needs to hand out the memory of the result, whoever computes it.
        _FRESH: Side(_FILL.format(nbytes=2 * at.nbytes), before),
    }
    targets = [
        Target("at most a third of the peer's time", "total_s", most=1 / 3, against=PEER),
        Target("peak at most the weights and 0.25 GiB", "above_model_bytes", most=_GIB / 4),
    ]
    state = "cold" if is_cold else "warm"
    return compare(f"Load {at.size}, bfloat16 to float32, {state}", sides, targets, **at.often)


def load_int4(at: Setting) -> Comparison:
    """Quantized while loading, beside our own cast."""
    sides = {
        OURS: Side(at.model("pretrained", "dtype='bfloat16', load_in_4bit=True"), at.warm),
        _CAST: Side(at.model("pretrained", "dtype='float32'"), at.warm),
    }
    targets = [
        Target("within 2x of our cast to float32", "total_s", most=2.0, against=_CAST),
        Target("peak at most the quantized weights and 0.5 GB", "above_model_bytes", most=_GB / 2),
    ]
    return compare(f"Load {at.size}, int4 on the way, warm", sides, targets, **at.often)


def _placed(at: Setting) -> str:
    return f"dtype='bfloat16', device_map='auto', max_memory={{'cpu': {at.budget}}}"


def disk_offload(at: Setting) -> Comparison:
    """Most of the model on disk, files warm: forwards after a first one."""
    sides = {
        OURS: Side(at.model("pretrained", _placed(at), "again=5"), at.warm),
        _IN_RAM: Side(at.model("pretrained", "dtype='bfloat16'", "again=5"), at.warm),
        PEER: Side(at.model("transformers", _placed(at), "again=5"), at.warm, may_fail=True),
    }
    targets = [
        Target("a forward at most 1.5x of all in RAM", "again_s", most=1.5, against=_IN_RAM),
        Target("memory inside the budget", "again_memory_bytes", most=at.budget),
    ]
    claim = f"Forward of {at.size}, {at.budget / _GB:.2g} GB in RAM and the rest on disk, warm"
    return compare(claim, sides, targets, **at.often)


def limited_memory(at: Setting) -> Comparison:
    """The same in a group of processes whose memory is limited, files cold."""
    limit = int(0.4 * _GB + 2.1 * _GB * at.share)
    budgets = f"{at.budget / _GB:.2g} GB in RAM, in a memory group of {limit / _GB:.2g} GB"
    claim = f"Forward of {at.size}, {budgets}, cold"
    within = limited(limit)
    if within is None:
        return Comparison(claim, note="Not measured: no memory group can be made on this machine.")
    files = [str(file) for file in at.files]
    measured = f"again=3, cold={files!r}"

    def side(package: str) -> Side:
        return Side(at.model(package, _placed(at), measured), at.evict, within, may_fail=True)

    def disk_part(found: Round) -> str:
        return at.reading(True, int(found[OURS]["disk_bytes"]))

    sides = {
        OURS: side("pretrained"),
        PEER: side("transformers"),
        _DISK_PART: Side(disk_part, at.evict),
        _IN_GROUP: Side(disk_part, at.evict, within),
        _SIDE_BY_SIDE: Side(at.reading(True), at.evict),
    }
    targets = [
        Target(
            "a forward within 1.3x of reading the disk part once",
            "again_s",
            most=1.3,
            against=_DISK_PART,
            of="total_s",
        ),
        Target(
            "load and first forward within 1.3x of reading the files",
            "total_s",
            most=1.3,
            against=_SIDE_BY_SIDE,
        ),
    ]
    return compare(claim, sides, targets, **at.often)


def first_token(at: Setting) -> Comparison:
    """From import to the first token of SmolLM2's GGUF file."""
    ours = _FIRST_TOKEN.format(package="pretrained", model=repr(str(SMOLLM2)))
    folder, file = repr(str(SMOLLM2.parent)), repr(SMOLLM2.name)
    peer = _FIRST_TOKEN.format(package="transformers", model=f"{folder}, gguf_file={file}")
    target = Target("import, load and first token under 2.5 s", "total_s", most=2.5)
    return compare(
        "Import to first token, SmolLM2-135M from GGUF", {OURS: ours, PEER: peer}, [target], **at.often
    )


CASES: dict[str, Callable[[Setting], Comparison]] = {
    "warm": load_warm,
    "cold": load_cold,
    "cast": functools.partial(cast, is_cold=False),
    "cast_cold": functools.partial(cast, is_cold=True),
    "int4": load_int4,
    "disk": disk_offload,
    "limited": limited_memory,
    "first_token": first_token,
}


def run(
    only: list[str] | None = None, *, is_quick: bool = False, runs: int | None = None
) -> list[Comparison]:
    """Measure rows.

    Args:
        only: Names out of `CASES`; None or none for all.
        is_quick: With a checkpoint of 1 GB and fewer rounds.
        runs: Rounds that count; None for 5, or 3 where quick.
    """
    unknown = sorted(set(only or ()) - set(CASES))
    if unknown:
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(CASES)}")
    at = Setting(checkpoint(QUICK_LAYERS if is_quick else LAYERS), is_quick, runs)
    return [CASES[name](at) for name in only or CASES]
