# SPDX-License-Identifier: Apache-2.0
"""What a load does and what it leaves alone: init, memory, threads, descriptors, ties, prefixes."""

import gc
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrained.arch.bert import BertConfig
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.torch.load import skeleton_of
from pretrained.torch.models.bert import BertForMaskedLM, BertForSequenceClassification, BertModel
from pretrained.torch.models.llama import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.checkpoints import TINY, Folder, tiny_llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

TINY_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
TINY_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}


def tiny(cls, config):
    torch.manual_seed(3)
    return cls(config).eval()


def models():
    return [
        tiny_llama(),
        tiny_llama(tie_word_embeddings=True),
        tiny(BertForMaskedLM, BertConfig(**TINY_BERT)),
        tiny(T5ForConditionalGeneration, T5Config(**TINY_T5)),
    ]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "model")


@pytest.fixture
def poisoned():
    """Let every tensor that is made without values hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# -- initialisation --------------------------------------------------------------------------------

INITIALISERS = [
    "normal_",
    "uniform_",
    "trunc_normal_",
    "zeros_",
    "ones_",
    "kaiming_uniform_",
    "xavier_uniform_",
]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_init_runs_on_a_complete_checkpoint(tmp_path, monkeypatch, number, dtype):
    model = models()[number]
    model.save_pretrained(tmp_path)
    calls = []

    def count(owner, name):
        real = getattr(owner, name)

        def counted(tensor, *args, **kwargs):
            if not tensor.is_meta:
                calls.append(name)
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in INITIALISERS:
        count(nn.init, name)
    for name in ("normal_", "uniform_", "zero_", "fill_"):
        count(torch.Tensor, name)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    monkeypatch.undo()
    assert not calls
    assert same_state(loaded, model.to(dtype or torch.float32))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_left_to_chance(tmp_path, poisoned, number, dtype):
    model = models()[number].to(dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert same_state(loaded, model)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        if not model._non_persistent_buffers_set and ours.dtype == theirs.dtype:
            assert torch.equal(ours, theirs), name
        assert not theirs.is_floating_point() or theirs.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_are_initialised_as_their_class_says(tmp_path, poisoned, dtype):
    bert = tiny(BertModel, BertConfig(**TINY_BERT))
    bert.save_pretrained(tmp_path)
    model, info = BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=50, dtype=dtype, output_loading_info=True
    )
    assert info["missing_keys"] == ["classifier.bias", "classifier.weight"]
    assert model.dtype == model.classifier.weight.dtype == dtype
    assert model.classifier.weight.isfinite().all()
    assert 0.01 < model.classifier.weight.float().std() < 0.03
    assert not model.classifier.bias.any()
    assert same_state(model.bert, bert.to(dtype))


def test_mismatched_weights_are_initialised_whole(folder, poisoned):
    folder.tensors(lm_head__weight=torch.ones(40, 16), model__norm__weight=torch.ones(3))
    for path in (folder.path, Folder(folder.path.parent / "other").path):
        if path != folder.path:
            content = load_file(folder.weights)
            save_file(content, path / "model.safetensors", {"format": "pt"})
            Folder.shards(type("F", (), {"weights": path / "model.safetensors", "path": path})())
        model = LlamaForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True)
        assert model.lm_head.weight.isfinite().all()
        assert 0.01 < model.lm_head.weight.std() < 0.03
        assert torch.equal(model.model.norm.weight, torch.ones(16))


def test_one_missing_weight_leaves_its_neighbours(tmp_path, poisoned):
    bert = tiny(BertModel, BertConfig(**TINY_BERT))
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(1)
    folder = Folder(tmp_path / "m", bert)
    gone = "encoder.layer.0.intermediate.dense.bias"
    folder.tensors(gone)
    loaded = BertModel.from_pretrained(folder.path, allow_missing=True)
    assert not loaded.get_parameter(gone).any()
    weight = gone.replace("bias", "weight")
    assert torch.equal(loaded.get_parameter(weight), bert.get_parameter(weight))


class Table(LlamaModel):
    """A model with a buffer that nothing fills after an empty build."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class FilledTable(Table):
    def init_buffers(self, device):
        self.table = torch.arange(4.0, device=device)


def test_a_buffer_that_no_one_fills_is_an_error(tmp_path):
    tiny_llama(LlamaModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say how to initialise 'table'.*init_buffers\(device\)"):
        Table.from_pretrained(tmp_path)
    assert torch.equal(FilledTable.from_pretrained(tmp_path).table, torch.arange(4.0))


class Scaled(LlamaModel):
    """A model with a parameter of its own that its class does not initialise."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(3))


def test_a_parameter_that_no_one_initialises_is_an_error(tmp_path):
    tiny_llama(LlamaModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not say how to initialise 'scale'.*_init_weights"):
        Scaled.from_pretrained(tmp_path, allow_missing=True)


def test_rope_tables_stay_float32_and_are_never_read(folder):
    folder.tensors(**{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((2,), 7.0)})
    model, info = LlamaForCausalLM.from_pretrained(
        folder.path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert info["unexpected_keys"] == []
    exact = tiny_llama().model.rotary_emb.inv_freq
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


# -- ties ------------------------------------------------------------------------------------------


def is_tied(model):
    return model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "pickle", "shards", "state_dict"])
@pytest.mark.parametrize("held", ["both", HEAD, EMBEDDING])
def test_tied_weights_share_memory_whatever_the_file_holds(tmp_path, kind, held, dtype):
    model = tiny_llama(tie_word_embeddings=True)
    folder = Folder(tmp_path / "m", model)
    content = load_file(folder.weights)
    assert HEAD not in content
    if held != EMBEDDING:
        content[HEAD] = content[EMBEDDING].clone()
    if held == HEAD:
        del content[EMBEDDING]
    save_file(content, folder.weights, {"format": "pt"})
    options = {"dtype": dtype, "output_loading_info": True}
    if kind == "state_dict":
        loaded, info = LlamaForCausalLM.from_pretrained(
            None, config=model.config, state_dict=content, **options
        )
    else:
        if kind != "safetensors":
            getattr(folder, "pickle" if kind == "pickle" else "shards")()
        loaded, info = LlamaForCausalLM.from_pretrained(folder.path, **options)
    assert not any(info.values())
    assert is_tied(loaded)
    assert loaded.config.tie_word_embeddings
    assert same_state(loaded, model.to(dtype or torch.float32))


def test_a_head_of_its_own_is_never_dropped(tmp_path):
    """The config says tied, the file holds two different tensors: both are kept, and the config says so."""
    folder = Folder(tmp_path / "m", tiny_llama()).config(tie_word_embeddings=True)
    loaded = LlamaForCausalLM.from_pretrained(folder.path)
    assert same_state(loaded, tiny_llama())
    assert not is_tied(loaded)
    assert loaded.config.tie_word_embeddings is False
    loaded.save_pretrained(tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert same_state(again, loaded)
    assert again.config.tie_word_embeddings is False


def test_a_missing_head_of_an_untied_model_is_reported(folder, poisoned, caplog):
    folder.tensors(HEAD)
    model, info = LlamaForCausalLM.from_pretrained(folder.path, output_loading_info=True)
    assert info["missing_keys"] == [HEAD]
    assert "newly initialised" in caplog.text
    assert not is_tied(model)
    assert 0.01 < model.lm_head.weight.std() < 0.03


# -- names -----------------------------------------------------------------------------------------


def test_prefixes_in_both_directions(tmp_path):
    head, base = tiny_llama(), tiny_llama().model
    head.save_pretrained(tmp_path / "head")
    base.save_pretrained(tmp_path / "base")
    loaded, info = LlamaModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert same_state(loaded, base)
    assert info["missing_keys"] == []
    assert info["unexpected_keys"] == [HEAD]
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert same_state(loaded.model, base)
    assert info["missing_keys"] == [HEAD]
    assert info["unexpected_keys"] == []
    loaded, info = LlamaForSequenceClassification.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["missing_keys"] == ["score.weight"]
    assert info["unexpected_keys"] == [HEAD]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_tensorflow_names_of_layer_norms(tmp_path, prefix):
    """Old BERT files say gamma and beta; a save writes what the file had, unless asked not to."""
    bert = tiny(BertModel, BertConfig(**TINY_BERT))
    folder = Folder(tmp_path / "m", bert)

    def old(key):
        return prefix + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    folder.rename(old)
    loaded, info = BertModel.from_pretrained(folder.path, output_loading_info=True)
    assert not any(info.values())
    assert same_state(loaded, bert)
    loaded.save_pretrained(tmp_path / "old")
    keys = set(load_file(tmp_path / "old" / "model.safetensors"))
    assert keys == {old(key).removeprefix(prefix) for key in bert.state_dict()}
    assert same_state(BertModel.from_pretrained(tmp_path / "old"), bert)
    loaded.save_pretrained(tmp_path / "new", save_original_format=False)
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(bert.state_dict())


def test_a_folder_loaded_by_key_mapping_is_saved_so_that_it_loads_without(folder):
    folder.rename(lambda key: "x." + key)
    model = LlamaForCausalLM.from_pretrained(folder.path, key_mapping={r"^x\.": ""})
    model.save_pretrained(folder.path)
    assert same_state(LlamaForCausalLM.from_pretrained(folder.path), tiny_llama())


# -- what is left alone ----------------------------------------------------------------------------


def test_many_threads_load_different_models_at_once(tmp_path):
    jobs = []
    for number, model in enumerate(models()):
        model.save_pretrained(tmp_path / str(number))
        jobs += [(model, tmp_path / str(number), dtype) for dtype in (torch.float16, torch.float32)]
    wanted = [{k: v.to(dtype) for k, v in model.state_dict().items()} for model, _, dtype in jobs]
    kept = (nn.Module.register_parameter, nn.Linear.__init__, nn.init.normal_, torch.Tensor.normal_)
    gate = threading.Barrier(len(jobs))

    def load(number):
        model, path, dtype = jobs[number]
        gate.wait()
        loaded = type(model).from_pretrained(path, dtype=dtype)
        for key, tensor in loaded.state_dict().items():
            if model._keep_in_fp32_modules and dtype == torch.float16 and ".wo." in key:
                assert tensor.dtype == torch.float32
            assert torch.equal(tensor.to(dtype), wanted[number][key]), key
        return True

    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(20):
            assert all(pool.map(load, range(len(jobs))))
            assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_device().type == "cpu"
    assert kept == (nn.Module.register_parameter, nn.Linear.__init__, nn.init.normal_, torch.Tensor.normal_)


def census():
    """Threads, sockets and files that this process has open."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    files = sorted(target for target in descriptors.values() if not target.startswith("/proc"))
    return len(os.listdir("/proc/self/task")), files


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_outlives_a_load(folder, kind, dtype):
    if kind != "safetensors":
        getattr(folder, kind)()
    LlamaForCausalLM.from_pretrained(folder.path, dtype=dtype)
    gc.collect()
    before = census()
    model = LlamaForCausalLM.from_pretrained(folder.path, dtype=dtype)
    deadline = time.monotonic() + 5  # the system may list a thread that has ended for a moment
    while census() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert census() == before
    del model


def test_a_local_path_never_touches_the_network(folder, monkeypatch):
    code = (
        f"import sys; sys.path[:0] = {sys.path}\n"
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.socket.__init__ = refuse\n"
        "from pretrained import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder.path)!r})\n"
        f"model.save_pretrained({str(folder.path)!r})\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "assert 'requests' not in sys.modules and 'httpx' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(socket.socket, "connect", None)
    LlamaForCausalLM.from_pretrained(folder.path)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"disable_mmap": True}, {"dtype": "bfloat16"}])
def test_changing_a_loaded_model_does_not_change_the_file(folder, options):
    before = folder.weights.read_bytes()
    model = LlamaForCausalLM.from_pretrained(folder.path, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert folder.weights.read_bytes() == before
    second = LlamaForCausalLM.from_pretrained(folder.path)
    assert same_state(second, tiny_llama())


@pytest.mark.parametrize("kind", ["safetensors", "shards", "pickle"])
def test_saving_onto_the_folder_that_is_mapped(folder, kind):
    if kind != "safetensors":
        getattr(folder, kind)()
    expected = tiny_llama()
    model = LlamaForCausalLM.from_pretrained(folder.path)
    with torch.no_grad():
        for each in (model, expected):
            each.model.norm.weight.add_(1)
    safe = kind != "pickle"
    model.save_pretrained(folder.path, safe_serialization=safe)
    assert same_state(model, expected)
    again = LlamaForCausalLM.from_pretrained(folder.path)
    assert same_state(again, expected)
    again.save_pretrained(folder.path, max_shard_size=3000, safe_serialization=safe)
    assert same_state(again, expected)
    assert same_state(model, expected)
    assert same_state(LlamaForCausalLM.from_pretrained(folder.path), expected)


PEAK = """
import sys
sys.path[:0] = {path}
import torch
torch.set_num_threads(1)
from pretrained.torch.models.llama import LlamaForCausalLM
def peak_mb():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1000
LlamaForCausalLM.from_pretrained(sys.argv[1])  # what imports and first calls cost
before = peak_mb()
model = LlamaForCausalLM.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
print(peak_mb() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Folders with 300 MB of bfloat16 weights, and the size."""
    path = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        **{
            **TINY,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 6,
            "vocab_size": 30000,
        }
    )
    with torch.device("meta"):
        model = LlamaForCausalLM.from_config(config)
    state = {
        key: torch.full(spec.shape, 0.5, dtype=torch.bfloat16)
        for key, spec in skeleton_of(model).params.items()
    }
    size_mb = sum(tensor.nbytes for tensor in state.values()) / 1e6
    for kind in ("safetensors", "pickle"):
        config.save_pretrained(path / kind)
    save_file(state, path / "safetensors" / "model.safetensors", {"format": "pt"})
    torch.save(state, path / "pickle" / "pytorch_model.bin")
    return {kind: (path / kind, size_mb) for kind in ("safetensors", "pickle")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 0), ("float32", 2), ("float16", 1)])
def test_peak_memory(folder, large, kind, dtype, factor):
    """As stored: next to nothing until a weight is used. Cast: the new weights and a piece of the file."""
    path, size_mb = large[kind]
    assert 290 < size_mb < 330
    out = subprocess.run(
        [sys.executable, "-c", PEAK.format(path=sys.path), folder.path, path, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = float(out.stdout)
    assert factor * size_mb * 0.9 < grown + 1 < factor * size_mb + (20 if factor == 0 else 64)
