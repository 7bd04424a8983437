# SPDX-License-Identifier: Apache-2.0
"""Wrong files through from_pretrained: each gets one error that names the fault and the mend.

What a reader alone finds has its tests beside the reader; here the whole way counts, and that no memory is
spent before the error.
"""

import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrained.arch.bert import BertConfig
from pretrained.arch.llama import LlamaConfig
from pretrained.auto import AutoConfig, AutoModelForCausalLM
from pretrained.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    FileError,
    NotYetError,
    PlacementError,
    PretrainedError,
    WeightsError,
)
from pretrained.torch.models.bert import BertModel
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaModel
from support.checkpoints import TINY, Folder, tiny_llama

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


def load(path, cls=LlamaForCausalLM, **arguments):
    return cls.from_pretrained(path, **arguments)


def fails(error, pattern, path, cls=LlamaForCausalLM, **arguments):
    """Assert one error of ours, with this text, that is also the built-in users catch."""
    with pytest.raises(error, match=pattern) as caught:
        load(path, cls, **arguments)
    assert isinstance(caught.value, PretrainedError)
    return str(caught.value)


# -- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM, LlamaConfig, AutoConfig])
def test_paths_that_lead_nowhere(tmp_path, cls):
    (tmp_path / "modell").mkdir()
    text = fails(FileError, "No such file or folder", tmp_path / "model", cls)
    assert str(tmp_path / "model") in text
    assert "Did you mean 'modell'?" in text
    (tmp_path / "empty").mkdir()
    text = fails(FileError, "The folder is empty", tmp_path / "empty", cls)
    assert "save_pretrained" in text
    fails(FileError, "cannot be a path.*too long", "/" + "x" * 5000, cls)
    for nonsense in ("", 5, [], b"model"):
        fails(ArgumentError, "must be a non-empty string or path", nonsense, cls)


def test_a_path_that_is_an_oserror_and_nothing_else(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"hello world", b"", b"<html>", b"import torch\n"])
def test_a_file_that_is_no_model(tmp_path, content):
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    fails(FileError, "This is not a weights file .*expected safetensors, PyTorch or GGUF", file)


def test_a_folder_without_weights(folder):
    folder.weights.unlink()
    text = fails(FileError, "There are no weights", folder.path)
    assert "expected model.safetensors or model.safetensors.index.json or pytorch_model.bin" in text
    assert "found config.json, generation_config.json" in text


def test_weights_a_level_below(folder):
    text = fails(FileError, "There are no weights", folder.path.parent)
    assert "subfolder='model'" in text
    assert load(folder.path.parent, subfolder="model").config.hidden_size == 16
    fails(FileError, "no subfolder 'modle'.*Did you mean 'model'", folder.path.parent, subfolder="modle")
    fails(ArgumentError, "subfolder leaves the model's folder", folder.path, subfolder="../model")


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_a_folder_without_config(folder, cls):
    (folder.path / "config.json").unlink()
    text = fails(FileError, r"There is no config\.json", folder.path, cls)
    assert "found generation_config.json, model.safetensors" in text
    assert load(folder.path, cls, config=LlamaConfig(**TINY)).config.vocab_size == 32


# -- config.json -----------------------------------------------------------------------------------

NOT_CONFIGS = {
    "empty": (b"", "not valid JSON .*found an empty file"),
    "blank": (b" \n", "not valid JSON .*found an empty file"),
    "cut off": (b'{"model_type": "llama', "not valid JSON .*line 1"),
    "python": (b"{'model_type': 'llama'}", "not valid JSON .*line 1 column 2"),
    "two": (b"{}{}", "not valid JSON .*Extra data"),
    "deep": (b"[" * 100_000, "not valid JSON .*recursion"),
    "array": (b"[]", "does not hold a JSON object .*expected {...}, found list"),
    "null": (b"null", "does not hold a JSON object .*found NoneType"),
    "number": (b"3", "does not hold a JSON object .*found int"),
    "utf-16": ("{}".encode("utf-16"), "not UTF-8 text .*Save it as UTF-8"),
    "binary": (bytes(range(128, 256)), "not UTF-8 text"),
    "long number": (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "not valid JSON .*limit"),
}


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("name", NOT_CONFIGS)
def test_files_that_are_no_config(folder, name, cls):
    content, message = NOT_CONFIGS[name]
    (folder.path / "config.json").write_bytes(content)
    text = fails(ConfigError, message, folder.path, cls)
    assert "config.json" in text


def test_a_config_of_a_hundred_gigabytes(folder):
    with open(folder.path / "config.json", "r+b") as opened:
        opened.truncate(10**11)
    fails(ConfigError, r"too large to be a config .*at most 20000000 bytes, found 100000000000", folder.path)


def test_a_byte_order_mark_is_no_fault(folder):
    file = folder.path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load(folder.path).config.vocab_size == 32


WRONG_VALUES = [
    ("vocab_size", -1, "vocab_size must be positive"),
    ("vocab_size", 0, "vocab_size must be positive"),
    ("vocab_size", "32", "vocab_size has a value of the wrong type .*expected int, found str '32'"),
    ("vocab_size", None, "vocab_size has a value of the wrong type .*found NoneType"),
    ("vocab_size", 10**30, "vocab_size has a value that no model can have .*at most 63 bits"),
    ("hidden_size", 0, "hidden_size must be positive"),
    ("hidden_size", 2**62, "cannot be built with the sizes in its config .*overflowed"),
    ("num_attention_heads", 0, "num_attention_heads must be positive"),
    ("num_attention_heads", 3, "num_attention_heads is not a multiple of num_key_value_heads.* 3 and 2"),
    ("num_key_value_heads", 3, "num_attention_heads is not a multiple of num_key_value_heads.* 4 and 3"),
    ("num_key_value_heads", -2, "num_attention_heads is not a multiple of num_key_value_heads"),
    ("num_hidden_layers", 2.5, "num_hidden_layers has a value of the wrong type .*float 2.5"),
    ("num_hidden_layers", True, "num_hidden_layers has a value of the wrong type .*bool True"),
    ("num_hidden_layers", -1, "num_hidden_layers must be positive"),
    ("intermediate_size", -3, "intermediate_size has a value that no model can have .*0 or more, found -3"),
    ("head_dim", -2, "head size"),
    ("head_dim", 3, "an even head size .*head_dim from 2 to 65536"),
    ("head_dim", 10**15, "head_dim from 2 to 65536"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps has a value that no model can have .*a finite number"),
    ("rms_norm_eps", float("inf"), "rms_norm_eps has a value that no model can have .*a finite number"),
    ("rms_norm_eps", -1.0, "rms_norm_eps has a value that no model can have .*0 or more"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps has a value of the wrong type .*expected float"),
    ("attention_dropout", 2.0, "attention_dropout has a value .*a share from 0 to 1, found 2.0"),
    ("initializer_range", -1, "initializer_range has a value .*0 or more"),
    ("max_position_embeddings", 0, "max_position_embeddings must be positive"),
    ("rope_theta", 0, "rope_theta is not a positive number"),
    ("rope_theta", "x", "rope_theta is not a positive number .*found 'x'"),
    ("rope_theta", float("nan"), "rope_theta is not a positive number"),
    ("rope_theta", True, "rope_theta is not a positive number"),
    ("rope_scaling", "linear", "rope_scaling is not an object .*found 'linear'"),
    ("rope_scaling", [], "rope_scaling is not an object"),
    ("rope_scaling", {"type": "linaer", "factor": 2}, "Unknown RoPE scaling .*Did you mean 'linear'"),
    ("rope_scaling", {"type": ["linear"], "factor": 2}, "Unknown RoPE scaling"),
    ("rope_scaling", {"type": "linear"}, "RoPE scaling 'linear' lacks factor"),
    ("rope_scaling", {"type": "linear", "factor": "x"}, "factor is not a positive number"),
    ("rope_scaling", {"type": "linear", "factor": 0}, "factor is not a positive number"),
    (
        "rope_scaling",
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
        "low_freq_factor is not below high_freq_factor .*4 and 1",
    ),
    (
        "rope_scaling",
        {"type": "longrope", "short_factor": ["a"], "long_factor": [1.0]},
        "short_factor is not a list of positive numbers",
    ),
    (
        "rope_scaling",
        {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
        "short_factor has the wrong length .*2 numbers",
    ),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "rope_parameters differ by kind of layer"),
    ("hidden_act", "sliu", "Unknown activation 'sliu'"),
    ("hidden_act", None, "hidden_act has a value of the wrong type"),
    ("pad_token_id", 32, "padding token is not in the vocabulary .*below vocab_size, 32"),
    ("pad_token_id", -100, "padding token is not in the vocabulary"),
    ("pad_token_id", "x", "pad_token_id has a value of the wrong type"),
    ("eos_token_id", [1, "a"], "eos_token_id has a value of the wrong type"),
    ("tie_word_embeddings", "yes", "tie_word_embeddings has a value of the wrong type"),
    ("use_cache", "x", "use_cache has a value of the wrong type"),
    ("dtype", "floot32", "Unknown dtype 'floot32' .*Did you mean 'float32'"),
    ("dtype", 5, "Unknown dtype '5'"),
    ("architectures", "LlamaForCausalLM", r"architectures has a value of the wrong type .*list\[str\]"),
    ("id2label", {"a": "b"}, "A key of id2label is not a whole number .*'a'"),
    ("id2label", {"0": [1]}, r"A label of id2label is not a name .*found \[1\]"),
    ("num_attention_heads", 10**18, "cannot be built with the sizes in its config .*verflow"),
    ("id2label", ["a"], "id2label has a value of the wrong type"),
    ("num_labels", -1, "num_labels cannot be a number of labels .*from 0 to 1000000, found -1"),
    ("num_labels", "3", "num_labels cannot be a number of labels"),
    ("num_labels", 10**10, "num_labels cannot be a number of labels"),
    ("pruned_heads", {"x": [0]}, "A key of pruned_heads is not a whole number"),
    ("pruned_heads", {"0": 3}, r"pruned_heads does not list heads \(pruned_heads\[0\]"),
    ("problem_type", "regresion", "Unknown problem_type .*Did you mean 'regression'"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_VALUES)
def test_wrong_values_in_a_config(folder, key, value, message):
    drop = ["rope_theta"] if key == "rope_parameters" else []
    folder.config(*drop, **{key: value})
    text = fails(ConfigError, message, folder.path)
    assert str(folder.path) in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types does not describe every layer .*2 of .*found 1"),
        ({"layer_types": ["full", "full"]}, "layer_types does not describe every layer"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval must be positive"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers does not describe every layer"),
        ({"max_window_layers": -1, "num_hidden_layers": "2"}, "num_hidden_layers has a value of the wrong"),
    ],
)
def test_layers_that_contradict_each_other(folder, values, message):
    folder.config(**{"model_type": "qwen2", **values})
    fails(ConfigError, message, folder.path, AutoModelForCausalLM)


def test_a_call_can_mend_a_wrong_config(folder):
    folder.config(pad_token_id=99, rms_norm_eps="1e-5")
    assert load(folder.path, pad_token_id=None, rms_norm_eps=1e-5).config.pad_token_id is None


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("lama", "architecture 'lama' is not known here .*expected 'model_type' to be one of bert.*llama"),
        ("Llama", "Did you mean 'llama'"),
        (5, "architecture 5 is not known here"),
        (None, "does not say which architecture"),
    ],
)
def test_model_types_that_no_one_knows(folder, model_type, message):
    folder.config("architectures", model_type=model_type)
    text = fails(ConfigError, message, folder.path, AutoModelForCausalLM)
    assert str(folder.path / "config.json") in text


def test_a_model_of_another_family(folder):
    text = fails(ConfigError, "not a BertConfig .*expected 'bert', found 'llama'", folder.path, BertModel)
    assert "AutoConfig" in text
    fails(
        ArgumentError,
        "built from another kind of config .*expected LlamaConfig, found BertConfig, which lacks",
        folder.path,
        config=BertConfig(),
    )


def test_keys_that_look_like_code_are_only_carried(folder):
    odd = {
        "__class__": "os.system",
        "to_dict": "x",
        "from_pretrained": 1,
        "_given": [1],
        "rope_table": 3,
        "name_or_path": "elsewhere",
        "use_return_dict": False,
        "auto_map": {"AutoModel": "evil--model.Evil"},
        "": 1,
    }
    folder.config(**odd)
    model = load(folder.path)
    model.save_pretrained(folder.path)
    saved = json.loads((folder.path / "config.json").read_text())
    assert odd.items() <= saved.items()


# -- sizes that are lies ---------------------------------------------------------------------------

LIES = [
    ({"vocab_size": 10**12}, WeightsError, r"2 weights have another shape.*model \[1000000000000, 16\]"),
    ({"hidden_size": 10**9}, WeightsError, r"another shape.*model \[32, 1000000000\]"),
    ({"intermediate_size": 10**12}, WeightsError, r"another shape.*layers\.\{0\.\.1\}\.mlp\.gate_proj"),
    ({"num_hidden_layers": 10**7}, WeightsError, "asks for 10000000 layers; the files hold 21 tensors"),
    ({"num_hidden_layers": 500}, WeightsError, r"layers\.\{2\.\.499\}\.self_attn\.q_proj\.weight"),
]


@pytest.mark.parametrize(("values", "error", "message"), LIES)
def test_sizes_that_the_files_do_not_hold(folder, values, error, message):
    folder.config(**values)
    fails(error, message, folder.path)


def test_new_weights_that_no_machine_holds(folder):
    folder.config(vocab_size=10**12)
    message = "do not fit into this machine's memory .*alone takes 64.00 TB"
    fails(PlacementError, message, folder.path, ignore_mismatched_sizes=True)
    with pytest.raises(PlacementError, match=message):
        LlamaForCausalLM.from_config(LlamaConfig(**{**TINY, "vocab_size": 10**12}))


HUGE = """
import resource, sys
sys.path[:0] = {path}
from pretrained.errors import PretrainedError
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.load import from_pretrained
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        LlamaForCausalLM.from_pretrained(folder)
    except PretrainedError as error:
        print(type(error).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_no_memory_is_spent_on_lies(tmp_path):
    paths = []
    for number, (values, _, _) in enumerate(LIES):
        paths.append(Folder(tmp_path / str(number)).config(**values).path)
    sparse = Folder(tmp_path / "sparse")
    text = json.dumps({NORM: {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    with open(sparse.weights, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + 4 * 10**10)
    fails(WeightsError, r"model\.norm\.weight: file \[10000000000\], model \[16\]", sparse.path)
    script = HUGE.format(path=sys.path)
    out = subprocess.run(
        [sys.executable, "-c", script, *map(str, [*paths, sparse.path])],
        capture_output=True,
        text=True,
        check=False,
    )
    *errors, grown_mb = out.stdout.split()
    assert errors == ["WeightsError"] * (len(LIES) + 1), out.stderr
    assert int(grown_mb) < 60


# -- safetensors -----------------------------------------------------------------------------------


def set_norm(**values):
    return lambda header: header[NORM].update(values)


HEADERS = {
    "dtype of another width": (set_norm(dtype="BF16"), "wrong byte span .*32 bytes for BF16"),
    "unknown dtype": (set_norm(dtype="F33"), "wrong dtype .*found 'F33'"),
    "shape against bytes": (set_norm(shape=[17]), "wrong byte span .*68 bytes"),
    "negative shape": (set_norm(shape=[-16]), "wrong shape"),
    "overlap": (set_norm(data_offsets=[0, 64]), "overlap"),
    "past the end": (lambda h: h.update(zz={**h[NORM], "data_offsets": [10**12, 10**12 + 64]}), "hole"),
    "no shape": (lambda h: h[NORM].pop("shape"), "wrong entry"),
    "metadata": (lambda h: h.update(__metadata__=[]), "__metadata__ is malformed"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers_that_lie(folder, name):
    change, message = HEADERS[name]
    text = fails(CheckpointError, message, folder.header(change).path)
    assert str(folder.weights) in text
    assert "Fetch the file again" in text


CUTS = {
    "empty": (lambda raw: b"", "too short to hold a header .*found 0 bytes"),
    "header": (lambda raw: raw[:500], "truncated within its header"),
    "data": (lambda raw: raw[:-1], "is truncated"),
    "one more": (lambda raw: raw + b"\0", "has bytes after its last tensor"),
    "length": (lambda raw: b"\xff" * 8 + raw[8:], "lies about the length of its header"),
    "zeros": (lambda raw: bytes(len(raw)), "not valid JSON|begins with zeros"),
    "pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "page": (lambda raw: b"<!DOCTYPE html><html>", "HTML or XML page"),
}


@pytest.mark.parametrize("name", CUTS)
def test_safetensors_files_that_are_damaged(folder, name):
    change, message = CUTS[name]
    folder.weights.write_bytes(change(folder.weights.read_bytes()))
    text = fails(CheckpointError, message, folder.path)
    assert str(folder.weights) in text


@pytest.mark.parametrize("framework", ["tf", "flax"])
def test_weights_of_other_frameworks(folder, framework):
    folder.tensors(metadata={"format": framework})
    fails(NotYetError, f"written by {framework}.*comes with that backend", folder.path)


def test_an_unknown_framework(folder):
    folder.tensors(metadata={"format": "caffe"})
    fails(CheckpointError, "a framework that is not known here .*expected metadata format 'pt'", folder.path)


INDEXES = {
    "missing shard": (lambda m: m.update({NORM: "c.safetensors"}), "'c.safetensors', which does not exist"),
    "wrong shard": (lambda m: m.update({NORM: "a.safetensors"}), f"{NORM}' is in 'a.*not there"),
    "no such tensor": (lambda m: m.update(zz="a.safetensors"), "'zz' is in .*the tensor in no file"),
    "outside": (lambda m: m.update({NORM: "../a.safetensors"}), "a file outside its folder"),
    "absolute": (lambda m: m.update({NORM: "/etc/passwd"}), "a file outside its folder"),
    "empty": (lambda m: m.clear(), "index is malformed"),
    "not names": (lambda m: m.update({NORM: ["a"]}), "index is malformed"),
    "not weights": (lambda m: m.update({NORM: "config.json"}), "index is malformed .*safetensors"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_that_lie(folder, name):
    change, message = INDEXES[name]
    text = fails(CheckpointError, message, folder.shards(change).path)
    assert str(folder.path / "model.safetensors.index.json") in text


def test_a_good_index_loads(folder):
    assert torch.equal(load(folder.shards().path).model.norm.weight, tiny_llama().model.norm.weight)


# -- pickles ---------------------------------------------------------------------------------------


class Evil:
    """Runs a command when an ordinary reader unpickles it."""

    def __init__(self, file: Path):
        self.command = f"touch {file}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_is_not_executed(folder, tmp_path, kind):
    trace = tmp_path / "executed"
    content = {"x": Evil(trace), "w": torch.ones(2)}
    if kind == "plain":
        folder.pickle(pickle.dumps(content))
    else:
        folder.pickle(content, _use_new_zipfile_serialization=kind == "zip")
    text = fails(CheckpointError, r"asks for the global '(posix|nt)\.system'", folder.path)
    assert "Nothing in the file was executed" in text
    assert str(folder.path / "pytorch_model.bin") in text
    assert not trace.exists()
    if kind != "plain":  # the test would see it if something had executed it
        torch.load(folder.path / "pytorch_model.bin", weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a PyTorch weights file .*an empty file"),
        (b"PK\x03\x04" + bytes(100), "damaged or forged"),
        ([torch.ones(2)], "does not hold a state dict .*found a list"),
    ],
)
def test_other_broken_pickles(folder, content, message):
    fails(CheckpointError, message, folder.pickle(content).path)


def test_pickles_are_never_executed_on_request_either(folder):
    path = folder.pickle().path
    assert load(path).config.vocab_size == 32
    fails(ArgumentError, "weights_only=False would execute the code in a pickle", path, weights_only=False)
    text = fails(FileError, "There are no weights", path, use_safetensors=True)
    assert "found pytorch_model.bin" in text
    assert "Drop use_safetensors" in text


# -- weights that do not fit -----------------------------------------------------------------------


def test_a_missing_body_weight(folder):
    folder.tensors(NORM)
    text = fails(WeightsError, "1 of 21 weights of the model is not in the checkpoint", folder.path)
    assert f"expected {NORM}" in text
    assert "allow_missing=True" in text
    _, info = load(folder.path, allow_missing=True, output_loading_info=True)
    assert info["missing_keys"] == [NORM]


def test_a_misspelt_weight_is_suggested(folder):
    folder.rename(lambda key: key.replace("model.norm", "model.nrom"))
    fails(WeightsError, "Did you mean 'model.nrom.weight'", folder.path)


def test_many_missing_weights_are_folded(folder):
    folder.config(attention_bias=True)
    text = fails(WeightsError, "8 of 29 weights of the model are not in the checkpoint", folder.path)
    assert "model.layers.{0..1}.self_attn.q_proj.bias" in text


def test_mismatched_weights_are_all_named(folder):
    folder.tensors(model__norm__weight=torch.ones(3), lm_head__weight=torch.ones(32, 3))
    text = fails(WeightsError, "2 weights have another shape in the file than in the model", folder.path)
    assert f"{NORM}: file [3], model [16]" in text
    assert "lm_head.weight: file [32, 3], model [32, 16]" in text
    assert "ignore_mismatched_sizes=True" in text
    assert str(folder.path) in text


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_whole_numbers_are_no_weights(folder, dtype):
    folder.tensors(model__norm__weight=torch.ones(16, dtype=dtype))
    text = fails(WeightsError, "1 weight is stored as no floating numbers", folder.path)
    assert f"{NORM} ({str(dtype).removeprefix('torch.')})" in text


QUANTIZED = {
    "gptq": ("qweight", torch.int32, True),
    "int8": ("SCB", torch.float32, False),
    "fp8": ("weight_scale_inv", torch.float32, False),
    "nf4": ("weight.quant_state.bitsandbytes__nf4", torch.uint8, False),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_do_not_load_as_if_they_were_plain(folder, kind):
    name, dtype, replaces = QUANTIZED[kind]
    layer = "model.layers.0.self_attn.q_proj"
    folder.tensors(*([f"{layer}.weight"] if replaces else []), **{f"{layer}.{name}": torch.ones(2).to(dtype)})
    fails(
        WeightsError, f"The weights are quantized.*{re.escape(layer)}.*config.json must say how", folder.path
    )


def test_a_config_that_says_quantized(folder):
    folder.config(quantization_config={"quant_method": "hqq", "bits": 4})
    text = fails(NotYetError, r"weights are quantized \(hqq\)", folder.path)
    assert str(folder.path) in text
    assert "quant_method" in text


def test_two_names_for_one_weight(folder):
    folder.tensors(norm__weight=torch.ones(16))
    text = fails(WeightsError, f"Two keys of the file would fill '{NORM}'", folder.path)
    assert "'norm.weight'" in text


def test_a_checkpoint_of_something_else(folder):
    folder.rename(lambda key: f"other.{key}.x")
    text = fails(WeightsError, "20 of 21 weights of the model are not in the checkpoint", folder.path)
    assert "found 0 matching and 21 other keys" in text
    assert "keys that nothing uses, such as 'other." in text
    fails(WeightsError, "19 of 20|20 of 20", folder.path, LlamaModel)


# -- anything at all -------------------------------------------------------------------------------

ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    1e300,
    float("nan"),
    10**18,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    {"0": [1]},
    "bert",
]
MORE_KEYS = [
    *("rope_scaling", "rope_parameters", "layer_types", "id2label", "num_labels", "quantization_config"),
    *("torch_dtype", "pruned_heads", "max_length", "decoder", "text_config", "architectures", "problem_type"),
]


@pytest.mark.parametrize("cls", [LlamaForCausalLM, AutoModelForCausalLM])
def test_any_config_loads_or_fails_with_an_error_of_ours(folder, cls):
    chance = random.Random(7)
    file = folder.path / "config.json"
    content = json.loads(file.read_text())
    raw = file.read_bytes()
    outcomes = set()
    for _ in range(150):
        changed = dict(content)
        for _ in range(chance.randint(1, 3)):
            changed[chance.choice([*content, *MORE_KEYS])] = chance.choice(ODD)
        damaged = bytearray(raw)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        for data in (json.dumps(changed).encode(), bytes(damaged)):
            file.write_bytes(data)
            try:
                outcomes.add(type(load(folder.path, cls)))
            except PretrainedError as error:
                outcomes.add(type(error))
    assert {LlamaForCausalLM, ConfigError, WeightsError} <= outcomes
