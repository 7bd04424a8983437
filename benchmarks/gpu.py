# SPDX-License-Identifier: Apache-2.0
"""Loading onto a CUDA device and running from main memory, beside what its bus and disk could do.

It needs a CUDA device: ``python benchmarks/gpu.py`` (``--layers 4`` for a small checkpoint), or ``python
benchmarks/run.py gpu``. Without one it says so and measures nothing; ``make bench`` leaves it out.
fastsafetensors and runai-model-streamer take part where they are installed.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from make_checkpoint import LAYERS, checkpoint
from measure import OURS, PEER, Comparison, Round, Side, Target, compare
from pagecache import evict, warm

_LOAD = """
import json, time, torch
from {package} import T5ForConditionalGeneration
torch.empty(1, device=0); torch.cuda.synchronize()
start = time.perf_counter()
model = T5ForConditionalGeneration.from_pretrained({folder!r}, dtype="auto", device_map={{"": 0}})
torch.cuda.synchronize()
print(json.dumps(dict(load_s=time.perf_counter() - start)))
"""
_FASTSAFETENSORS = """
import json, time, torch
from fastsafetensors import SafeTensorsFileLoader, SingleGroup
torch.empty(1, device=0); torch.cuda.synchronize()
start = time.perf_counter()
loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0")
loader.add_filenames({{0: {files!r}}})
held = loader.copy_files_to_device()
tensors = {{name: held.get_tensor(name) for name in loader.get_keys()}}
torch.cuda.synchronize()
print(json.dumps(dict(load_s=time.perf_counter() - start)))
"""
_RUNAI = """
import json, time, torch
from runai_model_streamer import SafetensorsStreamer
torch.empty(1, device=0); torch.cuda.synchronize()
start = time.perf_counter()
with SafetensorsStreamer() as streamer:
    streamer.stream_files({files!r})
    tensors = {{name: tensor.to("cuda:0") for name, tensor in streamer.get_tensors()}}
torch.cuda.synchronize()
print(json.dumps(dict(load_s=time.perf_counter() - start)))
"""
_BUS = """
import json, time, torch
host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
device = torch.empty_like(host, device=0)
device.copy_(host); torch.cuda.synchronize()
start = time.perf_counter()
for _ in range(16):
    device.copy_(host, non_blocking=True)
torch.cuda.synchronize()
rate = 16 * len(host) / (time.perf_counter() - start)
seconds = {nbytes} / rate
"""
_PINNED = _BUS + "print(json.dumps(dict(load_s=seconds, rate=rate)))"
_READ = """
import json, inside
inside.read_files({files!r}, True, {nbytes})
"""
_FORWARD = """
import json, time, torch
from {package} import T5ForConditionalGeneration
model = T5ForConditionalGeneration.from_pretrained({folder!r}, dtype="auto", device_map={device_map})
ids = torch.arange(100, 100 + {length}, device=0).repeat({batch}, 1)
times = []
with torch.no_grad():
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, decoder_input_ids=ids[:, :1])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
seconds = sorted(times[1:])[2]
"""
_PRINT = "print(json.dumps(dict(forward_s=seconds)))"
_PLACED = {"shared": 0, "encoder": "cpu", "decoder": "cpu", "lm_head": 0}
_PINNED_COPY, _FILES, _SLOWER = "pinned copy", "files side by side", "the slower of disk and bus"
_LIMIT = "the larger of compute and bus"
# Tokens: one where the bus is the limit, one nearer to where computing is.
_WORK = {"1 x 16 ids": (1, 16), "16 x 512 ids": (16, 512)}


def run(layers: int = LAYERS) -> list[Comparison]:
    """Measure and return what was found.

    Args:
        layers: Of the checkpoint's encoder, and of its decoder.

    Raises:
        SystemExit: there is no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; here is none, and nothing was measured")
    folder = checkpoint(layers)
    files = sorted(folder.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    name = torch.cuda.get_device_name(0)
    return [*_loads(folder, files, nbytes, name), *_forwards(folder, nbytes, name)]


def _loads(folder: Path, files: list[Path], nbytes: int, name: str) -> list[Comparison]:
    facts = {"folder": str(folder), "files": [str(file) for file in files], "nbytes": nbytes}
    programs = {OURS: _LOAD.format(package="pretrained", **facts)}
    programs[PEER] = _LOAD.format(package="transformers", **facts)
    for module, program in (("fastsafetensors", _FASTSAFETENSORS), ("runai_model_streamer", _RUNAI)):
        if find_spec(module) is not None:
            programs[module] = program.format(**facts)
    found = []
    for state, before in (("warm", warm), ("cold", evict)):

        def prepare(before=before) -> None:
            before(files)

        sides = {side: Side(program, prepare, may_fail=side != OURS) for side, program in programs.items()}
        sides[_PINNED_COPY] = Side(_PINNED.format(**facts))
        limit = _PINNED_COPY
        if state == "cold":
            sides[_FILES] = Side(_READ.format(**facts), prepare)
            sides[_SLOWER] = Side(_slower)
            limit = _SLOWER
        # Times are compared, so 0.8 of the rate is 1.25 of the time.
        targets = [Target("at 0.8 or more of the rate of disk and bus", "load_s", most=1.25, against=limit)]
        claim = f"{nbytes / 1e9:.2f} GB of bfloat16 onto {name}, {state}"
        found.append(compare(claim, sides, targets, note=f"Imports and the start of CUDA excluded; {name}."))
    return found


def _slower(found: Round) -> str:
    """Return a program that says again what the slower of disk and bus took in this round."""
    seconds = max(found[_PINNED_COPY]["load_s"], found[_FILES]["total_s"])
    return f"import json; print(json.dumps(dict(load_s={seconds})))"


def _forwards(folder: Path, nbytes: int, name: str) -> list[Comparison]:
    found = []
    for work, (batch, length) in _WORK.items():
        facts = {"folder": str(folder), "batch": batch, "length": length}
        placed = {
            side: _FORWARD.format(package=side, device_map=_PLACED, **facts) + _PRINT
            for side in ("pretrained", PEER)
        }
        resident = _FORWARD.format(package="pretrained", device_map={"": 0}, **facts)
        # The table of ids stays on the device, and is not copied.
        limit = (
            resident
            + "compute = seconds\n"
            + _BUS.replace(
                "{nbytes}", "sum(p.nbytes for n, p in model.named_parameters() if n != 'shared.weight')"
            )
            + "print(json.dumps(dict(forward_s=max(compute, seconds), compute_s=compute, bus_s=seconds)))"
        )
        sides = {
            OURS: Side(placed["pretrained"]),
            PEER: Side(placed[PEER], may_fail=True),
            _LIMIT: Side(limit),
        }
        targets = [
            Target("within 1.15x of max(compute, bytes / bus)", "forward_s", most=1.15, against=_LIMIT)
        ]
        claim = f"{nbytes / 1e9:.2f} GB from main memory, a forward of {work} on {name}"
        found.append(
            compare(claim, sides, targets, runs=3, note=f"Medians of five forwards a process; {name}.")
        )
    return found


def main() -> None:
    """Measure, and print what was found."""
    from run import show

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the checkpoint (default: %(default)s)")
    for result in run(parser.parse_args().layers):
        show(result)


if __name__ == "__main__":
    main()
