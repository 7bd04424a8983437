# SPDX-License-Identifier: Apache-2.0
"""The cases of the fault suite: broken and hostile files, wrong arguments, saves that go wrong.

Each case changes a folder with a small Llama checkpoint, makes one call that both libraries have, and says
what a good error names: a place (a file, argument or weight) and a fact (what was found or expected there).
The words are the same for both libraries, and several will do.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
MARKER = "executed"
UP = "model.layers.0.mlp.up_proj.weight"

# What texts call a file that ends too early or says too much.
SHORT = ("truncat", "cut off", "bytes", "too small", "too short", "incomplete", "length", "beyond", "empty")


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        group: Heading of the table.
        name: What is wrong, in a few words.
        call: Makes the call: a function of the library and the folder; what it returns is judged by `right`.
        change: Breaks the folder beforehand.
        place: Words, one of which a good error holds: the file, argument or weight.
        fact: Words, one of which a good error holds: what was found or expected.
        right: Tells whether a result without an error is right; None where there can be none.
        after: A further call, in a process of its own, that tells whether the folder is as it must be.
    """

    group: str
    name: str
    call: Callable[[Any, Path], Any]
    change: Callable[[Path], Any] = lambda folder: None
    place: tuple[str, ...] = ()
    fact: tuple[str, ...] = ()
    right: Callable[[Any], bool] | None = None
    after: Callable[[Any, Path], bool] | None = None


def tensors(seed: int = 0, size: int = 24) -> dict[str, torch.Tensor]:
    """Return the weights of the checkpoint."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 16), "lm_head.weight": (64, 16)}
    shapes["model.norm.weight"] = (16,)
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (16 if n in "qo" else 8, 16) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (size, 16) for n in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (16, size)}
        shapes |= {f"{at}{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
    return {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}


def write_base(folder: Path) -> None:
    """Write the whole checkpoint that cases break, with neither of the libraries."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    save_file(tensors(), folder / WEIGHTS, {"format": "pt"})


# -- changes ---------------------------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Replace a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def config(**values: Any) -> Callable[[Path], Any]:
    """Change values of config.json; None removes one."""
    content = {key: value for key, value in {**CONFIG, **values}.items() if value is not None}
    return text("config.json", json.dumps(content))


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Change the tensors of the file."""

    def change(folder: Path) -> None:
        content = tensors()
        content = edit(content) or content
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the header of the file, the data staying as they are."""

    def change(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + size])
        edit(content)
        new = json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])

    return change


def cut(folder: Path) -> None:
    """Cut the last fifth of the file off."""
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) * 4 // 5])


def shards(edit: Callable[[dict[str, str], Path], Any], raw: str | None = None) -> Callable[[Path], Any]:
    """Replace the file by two shards and an index whose weight_map is changed."""

    def change(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        keys = sorted(content)
        names = {"a.safetensors": keys[:9], "b.safetensors": keys[9:]}
        for name, part in names.items():
            save_file({key: content[key] for key in part}, folder / name, {"format": "pt"})
        weight_map = {key: name for name, part in names.items() for key in part}
        edit(weight_map, folder)
        index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / INDEX).write_text(index if raw is None else raw)

    return change


def moved(absolute: bool) -> Callable[[dict[str, str], Path], Any]:
    """Let the index name a file beside the folder."""

    def edit(weight_map: dict[str, str], folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        os.replace(folder / "b.safetensors", outside)
        name = str(outside) if absolute else "../outside.safetensors"
        weight_map.update({key: name for key, file in weight_map.items() if file == "b.safetensors"})

    return edit


class Payload:
    """Runs a command where a pickle of it is loaded by whoever believes it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def pickled(make: Callable[[Path], bytes]) -> Callable[[Path], Any]:
    """Replace the weights by a pytorch_model.bin."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / BIN).write_bytes(make(folder))

    return change


def hostile_zip(folder: Path) -> bytes:
    """Return what torch.save writes, with a payload beside the tensors."""
    out = io.BytesIO()
    torch.save({**tensors(), "x": Payload(f"touch {folder / MARKER}")}, out)
    return out.getvalue()


def saved(content: Any) -> bytes:
    """Return what torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def bomb(folder: Path) -> bytes:
    """Return a zip of few bytes whose one record unpacks to 4 GB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as record:
            for _ in range(512):
                record.write(bytes(1 << 23))
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def remote_code(folder: Path) -> None:
    """Let the config name code of the folder."""
    content = {
        **CONFIG,
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "code.py").write_text(f"open({str(folder / MARKER)!r}, 'w')\nclass C: ...\nclass M: ...\n")


def tokenizer(template: str | None = None, **broken: str) -> Callable[[Path], Any]:
    """Add a tokenizer of few words, with a chat template."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "chat_template": template}

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(broken.get("json", json.dumps(content)))
        (folder / "tokenizer_config.json").write_text(broken.get("config", json.dumps(settings)))

    return change


def gguf(folder: Path) -> None:
    """Write a GGUF header that promises more than there can be."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)
    (folder / "model.gguf").write_bytes(head + bytes(100))


# -- calls -----------------------------------------------------------------------------------------


def load(**arguments: Any) -> Callable[[Any, Path], Any]:
    """Load a Llama model."""
    return lambda lib, folder: lib.LlamaForCausalLM.from_pretrained(folder, **arguments)


def auto(lib: Any, folder: Path) -> Any:
    """Load whatever the folder says."""
    return lib.AutoModelForCausalLM.from_pretrained(folder)


def has_values(model: Any) -> bool:
    """Tell whether a model holds the checkpoint's weights."""
    own = model.state_dict()
    return all(torch.equal(own[key], tensor) for key, tensor in tensors().items())


def chat(lib: Any, folder: Path) -> Any:
    """Render the folder's chat template."""
    loaded = lib.AutoTokenizer.from_pretrained(folder)
    return loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def other(lib: Any, folder: Path) -> Any:
    """Return a model with other values than the folder's."""
    model = lib.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 1)
    return model


def is_new(lib: Any, folder: Path) -> bool:
    """Tell whether the folder holds what `other` made, whole."""
    own = lib.LlamaForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(own[key], tensor + 1) for key, tensor in tensors().items())


def is_old(lib: Any, folder: Path) -> bool:
    """Tell whether the folder holds what it held, whole."""
    return has_values(lib.LlamaForCausalLM.from_pretrained(folder))


def save(**arguments: Any) -> Callable[[Any, Path], Any]:
    """Save another model onto the folder."""
    return lambda lib, folder: other(lib, folder).save_pretrained(folder, **arguments)


def save_on_a_full_disk(lib: Any, folder: Path) -> None:
    """Save another model where no file may grow to its size."""
    model = other(lib, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        model.save_pretrained(folder)
    finally:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def save_twice(first: str, second: str) -> Callable[[Any, Path], Any]:
    """Save one model in one number of files, then another in another number."""

    def call(lib: Any, folder: Path) -> bool:
        model = lib.LlamaForCausalLM.from_pretrained(folder)
        new = other(lib, folder)
        model.save_pretrained(folder / "to", max_shard_size=first)
        new.save_pretrained(folder / "to", max_shard_size=second)
        return is_new(lib, folder / "to")

    return call


def save_odd(edit: Callable[[Any], Any]) -> Callable[[Any, Path], Any]:
    """Save a model with odd weights, load it again and compare."""

    def call(lib: Any, folder: Path) -> bool:
        model = lib.LlamaForCausalLM.from_pretrained(folder)
        edit(model)
        model.save_pretrained(folder / "to")
        mine, again = model.state_dict(), lib.LlamaForCausalLM.from_pretrained(folder / "to").state_dict()
        return all(torch.equal(mine[key], again[key]) for key in mine)

    return call


def strided(model: Any) -> None:
    """Give the head a weight that is not contiguous, and the embedding a slice."""
    model.lm_head.weight = torch.nn.Parameter(torch.randn(16, 64).T)
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.randn(200, 16)[7:71])


def user_tied(model: Any) -> None:
    """Share a weight between two layers."""
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def meta(lib: Any, folder: Path) -> Any:
    """Save a model that has no memory."""
    with torch.device("meta"):
        model = lib.LlamaForCausalLM(lib.LlamaConfig.from_pretrained(folder))
    model.save_pretrained(folder / "to")


def save_while_mapped(lib: Any, folder: Path) -> bool:
    """Save a model onto the folder that it was loaded from, and look at it again."""
    model = lib.LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size=3000)
    model.save_pretrained(folder)
    return has_values(model) and is_old(lib, folder)


def save_with_bad_generation(lib: Any, folder: Path) -> bool:
    """Save a model whose generation config has a temperature and does not sample."""
    model = lib.LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.3
    model.save_pretrained(folder / "to")
    return is_old(lib, folder / "to")


def pickles(lib: Any, folder: Path) -> bool:
    """Ask for pytorch_model.bin and look for it."""
    lib.LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder / "to", safe_serialization=False)
    return (folder / "to" / BIN).exists()


# -- the table -------------------------------------------------------------------------------------

C, W, I, P, H, A, S = (
    "config.json",
    "weights",
    "index",
    "pickles",
    "other hostile files",
    "arguments",
    "saving",
)
MANY = 10**9

CASES = [
    Case(C, "empty", auto, text("config.json", ""), ("config.json",), ("empty", "line 1", "json")),
    Case(C, "cut off", auto, text("config.json", '{"model_type": "lla'), ("config.json",), ("json", "line 1")),
    Case(C, "an array", auto, text("config.json", "[]"), ("config.json",), ("list", "array", "object")),
    Case(C, "UTF-16", auto, text("config.json", "{}".encode("utf-16")), ("config.json",), ("utf", "valid json")),
    Case(C, "100,000 brackets", auto, text("config.json", "[" * 100_000), ("config.json",), ("json", "recursion")),
    Case(C, "absent", auto, lambda f: (f / "config.json").unlink(), ("config.json",), ("no ", "not ", "missing")),
    Case(C, "unknown model_type", auto, config(model_type="lama"), ("model_type", "model type", "architecture"), ("lama",)),
    Case(C, "no model_type", auto, config(model_type=None, architectures=None), ("config.json", "model_type"), ("model_type",)),
    Case(C, "vocab_size -1", load(), config(vocab_size=-1), ("vocab_size",), ("-1", "positive")),
    Case(C, "hidden_size 'large'", load(), config(hidden_size="large"), ("hidden_size",), ("large", "int")),
    Case(C, "5 heads for 16 units", load(), config(num_attention_heads=5), ("num_attention_heads", "attention heads"), ("16", "5")),
    Case(C, "unknown hidden_act", load(), config(hidden_act="gleu"), ("hidden_act", "activation"), ("gleu",)),
    Case(C, "unknown dtype", load(dtype="auto"), config(dtype="float99"), ("dtype",), ("float99",)),
    Case(C, "a billion layers", load(), config(num_hidden_layers=MANY), ("num_hidden_layers", "layers"), (str(MANY), "2")),
    Case(C, "generation_config.json cut off", load(), text("generation_config.json", '{"eos'), ("generation_config.json",), ("json", "line 1")),

    Case(W, "absent", load(), lambda f: (f / WEIGHTS).unlink(), (WEIGHTS,), ("no ", "not ", "found")),
    Case(W, "an empty file", load(), text(WEIGHTS, b""), (WEIGHTS,), SHORT),
    Case(W, "cut off", load(), cut, (WEIGHTS,), SHORT),
    Case(W, "a web page", load(), text(WEIGHTS, "<!DOCTYPE html><html>" + "x" * 500), (WEIGHTS,), ("html", "web page", "not a", "too large", "header")),
    Case(W, "a Git LFS pointer", load(), text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"), (WEIGHTS,), ("lfs", "pointer")),
    Case(W, "a header of 2^62 bytes", load(), text(WEIGHTS, (2**62).to_bytes(8, "little") + b"{}"), (WEIGHTS,), ("header", "bytes")),
    Case(W, "a header that is no JSON", load(), text(WEIGHTS, (8).to_bytes(8, "little") + b"{'a': 1}"), (WEIGHTS,), ("header", "json")),
    Case(W, "spans that overlap", load(), header(lambda h: h[UP].update(data_offsets=[*h["lm_head.weight"]["data_offsets"][:1], h["lm_head.weight"]["data_offsets"][0] + 1536])), (WEIGHTS, UP, "lm_head.weight"), ("overlap", "offset", "bytes", "span")),
    Case(W, "a span past the end", load(), header(lambda h: h[UP].update(data_offsets=[10**9, 10**9 + 1536])), (WEIGHTS, UP), ("offset", "beyond", "past", "bytes", "span")),
    Case(W, "a shape that is not its bytes'", load(), header(lambda h: h[UP].update(shape=[24, 17])), (WEIGHTS, UP), ("shape", "bytes", "17")),
    Case(W, "a negative shape", load(), header(lambda h: h[UP].update(shape=[-24, -16])), (WEIGHTS, UP), ("-24", "shape", "negative")),
    Case(W, "an unknown dtype", load(), header(lambda h: h[UP].update(dtype="F99")), (WEIGHTS, UP), ("f99",)),
    Case(W, "one weight missing", load(), weights(lambda t: {k: v for k, v in t.items() if k != UP}), (UP,), ("missing", "no ", "not ")),
    Case(W, "names of another model", load(), weights(lambda t: {"foo." + k: v for k, v in t.items()}), ("foo.", "lm_head"), ("missing", "no ", "not ", "unexpected")),
    Case(W, "another shape", load(), weights(lambda t: t.update({UP: torch.zeros(24, 15)})), (UP,), ("15",)),
    Case(W, "two layers of three", load(), config(num_hidden_layers=3), ("layers.2", "num_hidden_layers"), ("missing", "3", "no ")),

    Case(I, "a file outside, by ..", load(), shards(moved(False)), (INDEX, "outside.safetensors"), ("outside", "..")),
    Case(I, "a file outside, absolute", load(), shards(moved(True)), (INDEX, "outside.safetensors"), ("outside its folder", "plain", "absolute", "leaves")),
    Case(I, "a shard is absent", load(), shards(lambda m, f: (f / "b.safetensors").unlink()), ("b.safetensors",), ("no ", "not ", "missing", "absent")),
    Case(I, "no JSON", load(), shards(lambda m, f: None, "{'weight_map': {}}"), (INDEX,), ("json", "line 1")),
    Case(I, "an empty weight_map", load(), shards(lambda m, f: m.clear()), (INDEX,), ("weight_map", "empty", "no ")),
    Case(I, "a weight that no shard has", load(), shards(lambda m, f: m.update({"model.extra": "a.safetensors"})), ("model.extra",), ("a.safetensors", "not ", "no ", "missing")),

    Case(P, "a command, in a zip", load(), pickled(hostile_zip), (BIN,), ("system", "not allowed", "unsupported", "weights_only", "unsafe")),
    Case(P, "a command, plain", load(), pickled(lambda f: pickle.dumps(Payload(f"touch {f / MARKER}"), 2)), (BIN,), ("system", "not allowed", "unsupported", "weights_only", "unsafe")),
    Case(P, "a command, use_safetensors=False", load(use_safetensors=False), pickled(hostile_zip), (BIN,), ("system", "not allowed", "unsupported", "weights_only", "unsafe")),
    Case(P, "a zip bomb", load(), pickled(bomb), (BIN,), ("bytes", "compress", "large", "bomb", "truncat")),
    Case(P, "cut off", load(), pickled(lambda f: saved(tensors())[:9000]), (BIN,), (*SHORT, "zip", "archive")),
    Case(P, "plain text", load(), pickled(lambda f: b"hello world" * 20), (BIN,), ("pickle", "not a", "zip", "pytorch")),
    Case(P, "a list", load(), pickled(lambda f: saved(list(tensors().values()))), (BIN,), ("list", "dict")),

    Case(H, "code of the folder, not allowed", auto, remote_code, ("trust_remote_code", "code.py", "mine"), ("trust_remote_code", "code")),
    Case(H, "a template that reaches for classes", chat, tokenizer("{{ ().__class__.__mro__[1].__subclasses__() }}"), ("template",), ("__class__", "__mro__", "unsafe", "attribute")),
    Case(H, "a template that never ends", chat, tokenizer("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"), ("template",), ("limit", "long", "steps", "budget", "range")),
    Case(H, "a template with a syntax error", chat, tokenizer("{% for %}"), ("template",), ("line 1", "expected", "syntax")),
    Case(H, "tokenizer.json cut off", chat, tokenizer("x", json='{"version": "1.0", '), ("tokenizer.json",), ("json", "line 1", "eof", "column")),
    Case(H, "a GGUF of 2^60 tensors", load(gguf_file="model.gguf"), gguf, ("model.gguf",), ("count", "tensors", "bytes", str(2**60))),

    Case(A, "a path that is not there", lambda lib, f: lib.LlamaForCausalLM.from_pretrained("./no/such/folder"), place=("no/such/folder",), fact=("no such", "not exist", "not found", "does not")),
    Case(A, "path None", lambda lib, f: lib.LlamaForCausalLM.from_pretrained(None), place=("path", "pretrained_model_name_or_path"), fact=("none",)),
    Case(A, "dtype='float33'", load(dtype="float33"), place=("dtype",), fact=("float33", "torch.dtype")),
    Case(A, "dytpe= (a typo)", load(dytpe="float16"), place=("dytpe",), fact=("dtype", "unexpected", "unknown", "know")),
    Case(A, "device_map='nowhere'", load(device_map="nowhere"), place=("device_map", "device"), fact=("nowhere",)),
    Case(A, "a device_map with gaps", load(device_map={"model.embed_tokens": "cpu", "lm_head": "disk"}), place=("device_map", "model.layers"), fact=("model.layers", "norm")),
    Case(A, "max_memory 'lots'", load(device_map="auto", max_memory={"cpu": "lots"}), place=("max_memory", "size", "memory"), fact=("lots",)),
    Case(A, "attn_implementation='flashy'", load(attn_implementation="flashy"), place=("attn_implementation", "attention"), fact=("flashy",)),
    Case(A, "a variant that is not there", load(variant="fp16"), place=("variant", "fp16"), fact=("fp16",)),
    Case(A, "a subfolder that is not there", load(subfolder="inner"), place=("subfolder", "inner"), fact=("inner",)),
    Case(A, "subfolder '../..'", load(subfolder="../.."), place=("subfolder", ".."), fact=("leaves", "outside", "not ", "no ")),

    Case(S, "max_shard_size='5 Gigs'", save(max_shard_size="5 Gigs"), place=("max_shard_size", "size", "unit"), fact=("5 gigs", "5gb"), after=is_old),
    Case(S, "max_shard_size=0", save(max_shard_size=0), place=("max_shard_size",), fact=("0",), after=is_old),
    Case(S, "max_shard_size=-1", save(max_shard_size=-1), place=("max_shard_size",), fact=("-1",), after=is_old),
    Case(S, "max_shard= (a typo)", save(max_shard=10), place=("max_shard",), fact=("max_shard_size", "unknown", "unexpected", "know"), after=is_old),
    Case(S, "onto a file", lambda lib, f: lib.LlamaForCausalLM.from_pretrained(f).save_pretrained(f / "config.json"), place=("config.json",), fact=("file", "directory"), after=is_old),
    Case(S, "a weight without memory", meta, place=("meta", "lm_head", "model."), fact=("meta", "no values", "no data")),
    Case(S, "a full disk", save_on_a_full_disk, place=(WEIGHTS,), fact=("too large", "full", "space", "size"), after=is_old),
    Case(S, "many files, then one", save_twice("3KB", "5GB"), right=bool),
    Case(S, "one file, then many", save_twice("5GB", "3KB"), right=bool),
    Case(S, "onto the folder that is mapped", save_while_mapped, right=bool),
    Case(S, "strided and sliced weights", save_odd(strided), right=bool),
    Case(S, "a weight that a user shares", save_odd(user_tied), right=bool, place=("up_proj",), fact=("share",)),
    Case(S, "generation settings that contradict", save_with_bad_generation, right=bool, place=("temperature",), fact=("0.3", "do_sample")),
    Case(S, "safe_serialization=False", pickles, right=bool, place=("safe_serialization",), fact=("false", "safetensors")),
]  # fmt: skip
