# SPDX-License-Identifier: Apache-2.0
"""Feeds mutated model files to every reader and counts what comes of it; `make fuzz` runs it.

Each input is a valid small file changed in a few places by a seeded mutator: lengths, counts, offsets, types
and values that mean something to the format, and besides them flipped bytes, cuts, splices and repeats.
Right answers are a value and an error of this library's family. Anything else is a bug: another exception,
a crash, more than `SECONDS` of processor time, or memory beyond `MEMORY`.

The inputs of one seed are the same on every machine: `python tools/fuzz.py --kind gguf --only 12345` runs one
again by its number.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

SECONDS = 5.0
MEMORY = 300_000_000
# How many of each thousand inputs; the last two load whole models and tokenizers.
SHARES = {
    "safetensors": 190, "gguf": 190, "zip": 150, "legacy": 120, "index": 60, "config": 90,
    "generation": 30, "tokenizer": 60, "tokenizer_config": 30, "template": 60, "model": 20,
}  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
EDGES = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
ODD = (None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**62, 2**70, -(2**63), "", "x", "\0", "../x", "os.system", "9" * 30, [], [[]], [1], {}, {"a": 1}, ["x"] * 3)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a few places of a file: bits, bytes, numbers, cuts, splices, repeats."""
    out = bytearray(data)
    # Most of what a reader decides on lies at the start, or, in archives, at the end.
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if not out:
            break
        spot = (
            min(len(out) - 1, int(rng.expovariate(4 / len(out))))
            if rng.random() < 0.6
            else rng.randrange(len(out))
        )
        if rng.random() < 0.25:
            spot = len(out) - 1 - spot
        match rng.randrange(9):
            case 0:
                out[spot] ^= 1 << rng.randrange(8)
            case 1:
                out[spot] = rng.randrange(256)
            case 2 | 3:
                layout = rng.choice(("<B", "<H", "<I", "<Q"))
                size = struct.calcsize(layout)
                value = rng.choice(EDGES) % 256**size
                out[spot : spot + size] = struct.pack(layout, value)
            case 4:
                del out[spot : spot + rng.choice((1, 2, 4, 8, 64))]
            case 5:
                out[spot:spot] = rng.randbytes(rng.choice((1, 2, 4, 8)))
            case 6:
                del out[spot:]
            case 7:
                start = rng.randrange(len(out))
                out[spot:spot] = out[start : start + rng.choice((4, 16, 64, 256))]
            case 8:
                first = bytes(out[spot : spot + 4])
                other = rng.randrange(len(out))
                out[other : other + len(first)] = first
    return bytes(out)


def mutate_value(value: object, rng: random.Random) -> object:
    """Change one part of a JSON value: a number, a name, a type, or what is there at all."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        out = dict(value)
        key = rng.choice(list(out))
        match rng.randrange(6):
            case 0:
                del out[key]
            case 1:
                out[rng.choice(("x", "", "__class__", key + "x", "dtype", "type"))] = out[key]
            case 2:
                out[key] = out[rng.choice(list(out))]
            case _:
                out[key] = mutate_value(out[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        out = list(value)
        spot = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                del out[spot]
            case 1:
                out.insert(spot, out[spot])
            case _:
                out[spot] = mutate_value(out[spot], rng)
        return out
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 2**32, rng.choice(EDGES), float(value))
        )
    if isinstance(value, str) and rng.random() < 0.4:
        return rng.choice((value[:-1], value + value, value.upper(), value + "\0", value[::-1]))
    return rng.choice(ODD)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change the text of a JSON file, mostly as JSON."""
    if rng.random() < 0.25:
        return mutate_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = mutate_value(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.05:
        text = text.replace(":", ":" + "[" * 2000, 1)
    return text.encode()


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header as JSON, with a right or wrong length; or the bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    text = mutate_json(data[8 : 8 + length], rng)
    claimed = len(text) if rng.random() < 0.85 else rng.choice((*EDGES, len(text) - 1, len(text) + 1))
    return struct.pack("<Q", claimed % 2**64) + text + data[8 + length :]


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """Change lengths, counts and types where they stand in the header; or any bytes of it."""
    head = bytearray(data[:1600])
    if rng.random() < 0.5:
        return mutate_bytes(bytes(head), rng) + data[1600:]
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Keys begin with their length as 8 bytes: numbers below 256 that 7 zeros follow.
        spots = [i for i in range(8, len(head) - 8) if head[i] and not any(head[i + 1 : i + 4])]
        spot = rng.choice((8, 16, *spots))
        layout = rng.choice(("<I", "<Q", "<B"))
        struct.pack_into(layout, head, spot, rng.choice(EDGES) % 256 ** struct.calcsize(layout))
    return bytes(head) + data[1600:]


PIECES = (
    "{{ x }}", "{{ messages }}", "{{ ''.__class__ }}", "{% for m in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}",
    "{% set x = messages %}", "{% set ns = namespace(x=1) %}", "{% set ns.x = [ns.x, ns.x] %}", "{{ 'a' * 999999 }}",
    "{{ m | tojson }}", "{{ range(99999) | list }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(1) }}", "{{ loop.index }}",
    "{{ '%s' % m }}", "{{ '{}'.format(m) }}", "{% break %}", "{% generation %}", "{% endgeneration %}", "{{ 1 / 0 }}",
    "{{ m.content.split('a') | join(m) }}", "{{ 2 ** 99 ** 9 }}", "{% set x %}", "{% endset %}", "{%- ", " -%}", "{{", "}}",
    "{% raw %}", "{% endraw %}", "{{ strftime_now('%Y') }}", "{{ raise_exception('x') }}", "{{ m | attr('__init__') }}",
    "| string", "| sort", "| groupby('role')", "| map('upper') | list", "[::2]", "is defined", "~ messages", "{# ", " #}",
)  # fmt: skip


def mutate_template(data: bytes, rng: random.Random) -> bytes:
    """Join, cut and repeat pieces of templates."""
    text = data.decode()
    for _ in range(rng.choice((1, 2, 3, 6))):
        spot = rng.randrange(len(text) + 1)
        match rng.randrange(4):
            case 0:
                text = text[:spot] + text[spot + rng.randrange(1, 12) :]
            case 1:
                text = text[:spot] + text[rng.randrange(len(text) + 1) :][:40] + text[spot:]
            case _:
                text = text[:spot] + rng.choice(PIECES) + text[spot:]
    return text.encode()


TEMPLATE = (
    b"{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content | trim }}"
    b"{% else %}<a>{{ m['content'].upper() ~ ns.n }}{% endif %}{% set ns.n = ns.n + 1 %}\n{% endfor %}"
    b"{% if add_generation_prompt %}{{ bos_token }}{{ messages[-1] | tojson(indent=2) }}{% endif %}"
)


PAGE = """# Fuzzing

`make fuzz` changes small valid files in a few places (lengths, counts, offsets, types, flipped bits, cuts,
splices) and opens each with the reader that a user's call would reach. There are two right answers: it loads,
or it is refused with an error of `pretrained.errors`. Another exception, the end of the process, more than
{seconds} seconds of processor time or more than {megabytes} MB of memory is a bug.

The last recorded run, of {date}: {inputs} inputs, seed {seed}, {bugs} bugs.
({machine})

| kind | loaded | refused | bugs |
|---|---|---|---|
{rows}

`zip` and `legacy` are the two formats of `torch.save`; `model` loads a whole model from a folder of which one
file is changed. An input is made again from its number:
`python tools/fuzz.py --seed {seed} --kind gguf --only 12345`. The tests run a slice of it each time. h5 and
msgpack files are not read yet, so they are not fuzzed.
"""


class Kind:
    """One kind of input: the file that is mutated, how, and what then opens the folder."""

    def __init__(self, base, name, mutate, action):
        self.base, self.name, self.mutate, self.action = base, name, mutate, action


def write_seeds(top: Path) -> dict[str, list[Kind]]:
    """Write the valid folders; each kind of input has one or more."""
    import torch

    from support import hostile, opening
    from support.gguf_files import write_gguf

    good = hostile.write_base(top / "good")
    generation = json.dumps(
        {
            "max_length": 9,
            "do_sample": True,
            "temperature": 0.5,
            "eos_token_id": [1, 2],
            "bad_words_ids": [[1]],
        }
    )
    (good / "generation_config.json").write_text(generation)
    (good / "chat_template.jinja").write_bytes(TEMPLATE)
    tensors = {
        "a": torch.arange(24.0).reshape(4, 6), "b": torch.arange(6).to(torch.int8), "c": torch.ones(2, 2).bfloat16(),
        "d": torch.arange(24.0).reshape(4, 6).T, "e": torch.tensor(1.5),
    }  # fmt: skip

    def folder(name: str, drop: str = "model.safetensors") -> Path:
        path = top / name
        shutil.copytree(good, path)
        (path / drop).unlink()
        return path

    zipped, legacy, gguf, index, small = (
        folder(name) for name in ("zip", "legacy", "gguf", "index", "small")
    )
    torch.save(tensors, zipped / "pytorch_model.bin")
    torch.save(tensors, legacy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    from support.checkpoints import tiny_llama

    write_gguf(tiny_llama(hidden_size=32, intermediate_size=32), gguf / "model.gguf")
    weights = (good / "model.safetensors").read_bytes()
    (index / "a.safetensors").write_bytes(weights)
    length = int.from_bytes(weights[:8], "little")
    keys = [key for key in json.loads(weights[8 : 8 + length]) if key != "__metadata__"]
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, "a.safetensors")}
    (index / "model.safetensors.index.json").write_text(json.dumps(content))
    from safetensors.torch import save_file

    plain = {key: value.contiguous() for key, value in tensors.items()}
    save_file(plain, small / "model.safetensors", {"format": "pt"})
    weights_of, model = opening.open_weights, opening.open_model
    return {
        "safetensors": [Kind(small, "model.safetensors", mutate_safetensors, weights_of)],
        "gguf": [Kind(gguf, "model.gguf", mutate_gguf, weights_of)],
        "zip": [Kind(zipped, "pytorch_model.bin", mutate_bytes, weights_of)],
        "legacy": [Kind(legacy, "pytorch_model.bin", mutate_bytes, weights_of)],
        "index": [Kind(index, "model.safetensors.index.json", mutate_json, weights_of)],
        "config": [Kind(good, "config.json", mutate_json, opening.open_config)],
        "generation": [Kind(good, "generation_config.json", mutate_json, opening.open_generation)],
        "tokenizer": [Kind(good, "tokenizer.json", mutate_json, opening.open_tokenizer)],
        "tokenizer_config": [Kind(good, "tokenizer_config.json", mutate_json, opening.open_tokenizer)],
        "template": [Kind(good, "chat_template.jinja", mutate_template, opening.open_chat)],
        "model": [
            Kind(good, "config.json", mutate_json, model),
            Kind(good, "model.safetensors", mutate_safetensors, model),
            Kind(gguf, "model.gguf", mutate_gguf, model),
            Kind(index, "model.safetensors.index.json", mutate_json, model),
            Kind(good, "generation_config.json", mutate_json, model),
        ],
    }


def status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def outcome_of(kind: Kind) -> tuple[str, str]:
    """Open a folder and say how it went."""
    from pretrained.errors import PretrainedError

    started, before = time.process_time(), status("VmHWM")
    try:
        kind.action(kind.base)
        result = "loaded", ""
    except PretrainedError:
        result = "refused", ""
    except MemoryError:
        result = "over-allocation", traceback.format_exc(limit=-3)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = "exception", traceback.format_exc(limit=-3)
    if time.process_time() - started > SECONDS:
        result = "hang", result[1]
    elif status("VmHWM") - before > MEMORY:
        result = "over-allocation", result[1]
    return result


def run_slice(
    seed: int, name: str, numbers: range, seeds: dict[str, list[Kind]], note=None
) -> tuple[Counter, list]:
    """Run inputs of one kind by their numbers.

    Args:
        seed: Of the whole run.
        name: The kind.
        numbers: Which inputs.
        seeds: From `write_seeds`.
        note: Called with each number before its input is opened.

    Returns:
        Counts by outcome, and the bugs as (number, outcome, text).
    """
    counts: Counter = Counter()
    bugs = []
    kinds = seeds[name]
    originals = [(kind.base / kind.name).read_bytes() for kind in kinds]
    for number in numbers:
        rng = random.Random(f"{seed}/{name}/{number}")
        which = rng.randrange(len(kinds))
        kind = kinds[which]
        data = kind.mutate(originals[which], rng)
        if note is not None:
            note(number)
        # A new file each time: maps of the last one may still be there.
        (kind.base / kind.name).unlink(missing_ok=True)
        (kind.base / kind.name).write_bytes(data)
        outcome, text = outcome_of(kind)
        counts[outcome] += 1
        if outcome not in ("loaded", "refused"):
            bugs.append((number, outcome, text))
        (kind.base / kind.name).unlink()
        (kind.base / kind.name).write_bytes(originals[which])
    return counts, bugs


def in_fork(seed: int, name: str, numbers: range, seeds: dict[str, list[Kind]]) -> tuple[Counter, list]:
    """Run inputs in a process of their own, with limits; go on after one that ends it."""
    total: Counter = Counter()
    bugs: list = []
    todo = numbers
    while len(todo):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            code = 0
            try:
                size = status("VmSize") + 2 * MEMORY + (256 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (size, size))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 2)

                def note(number: int) -> None:
                    # The processor's time, whoever else uses the machine.
                    spent = int(time.process_time() + 2 * SECONDS) + 1
                    resource.setrlimit(resource.RLIMIT_CPU, (spent, resource.RLIM_INFINITY))
                    os.write(writing, f"{number}\n".encode())

                counts, found = run_slice(seed, name, todo, seeds, note)
                os.write(writing, b"=" + json.dumps([counts, found]).encode() + b"\n")
            except BaseException:
                code = 1
            os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            lines = pipe.read().split(b"\n")
        _, ended = os.waitpid(child, 0)
        answer = next((line for line in lines if line.startswith(b"=")), None)
        if answer is not None:
            counts, found = json.loads(answer[1:])
            total.update(counts)
            bugs.extend(found)
            return total, bugs
        seen = [int(line) for line in lines if line.isdigit()]
        last = seen[-1] if seen else todo[0]
        outcome = "hang" if os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == 24 else "crash"
        # Those before it went well or are found again: a run ends with the first that ends the process.
        if last > todo[0]:
            counts, found = in_fork(seed, name, range(todo[0], last), seeds)
            total.update(counts)
            bugs.extend(found)
        total[outcome] += 1
        bugs.append((last, outcome, f"status {ended}"))
        todo = range(last + 1, todo[-1] + 1)
    return total, bugs


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "tokenizers", "jinja2", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def page_of(record: dict) -> str:
    """Return the page that docs/FUZZING.md is made of."""
    rows = "\n".join(
        f"| `{name}` | {row.get('loaded', 0):,} | {row.get('refused', 0):,} |"
        f" {sum(row.values()) - row.get('loaded', 0) - row.get('refused', 0):,} |"
        for name, row in record["kinds"].items()
    )
    machine = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return PAGE.format(
        inputs=f"{record['inputs']:,}",
        seed=record["seed"],
        date=record["date"],
        machine=machine,
        seconds=f"{record['limits']['seconds']:g}",
        megabytes=record["limits"]["bytes"] // 10**6,
        rows=rows,
        bugs=record["bugs"],
    )


def prepare() -> None:
    """Make the tests' helpers importable, and this process quiet and single-threaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RUST_BACKTRACE", "0")
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--kind", choices=SHARES, help="only this kind")
    parser.add_argument("--only", type=int, help="only the input of this number, in this process")
    parser.add_argument("--batch", type=int, default=500, help="inputs that share a process")
    parser.add_argument("--record", type=Path, help="write the counts here, as JSON")
    options = parser.parse_args()
    prepare()
    kinds = [options.kind] if options.kind else list(SHARES)
    whole = sum(SHARES[name] for name in kinds)
    rows: dict[str, dict[str, int]] = {}
    all_bugs = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        seeds = write_seeds(Path(top))
        for name in kinds:
            for kind in seeds[name]:
                with contextlib.suppress(OSError):
                    kind.action(kind.base)  # imports are made once, before the forks
        for name in kinds:
            if options.only is not None:
                print(*run_slice(options.seed, name, range(options.only, options.only + 1), seeds), sep="\n")
                continue
            count = -(-options.count * SHARES[name] // whole)
            total: Counter = Counter()
            for first in range(0, count, options.batch):
                counts, bugs = in_fork(
                    options.seed, name, range(first, min(count, first + options.batch)), seeds
                )
                total.update(counts)
                all_bugs += [(name, *bug) for bug in bugs]
            rows[name] = dict(total)
            print(name, dict(total), f"{time.monotonic() - began:.0f} s", flush=True)
    for bug in all_bugs[:40]:
        print(*bug)
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "seed": options.seed,
        "inputs": sum(sum(row.values()) for row in rows.values()), "seconds": round(time.monotonic() - began),
        "limits": {"seconds": SECONDS, "bytes": MEMORY}, "versions": versions(), "kinds": rows, "bugs": len(all_bugs),
    }  # fmt: skip
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
        options.record.with_name("FUZZING.md").write_text(page_of(record))
    return bool(all_bugs)


if __name__ == "__main__":
    sys.exit(main())
