# SPDX-License-Identifier: Apache-2.0
"""`pretrained convert` to GGUF: read by the gguf package, and loaded back with equal logits."""

import contextlib
import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from pretrained import AutoModelForCausalLM, AutoTokenizer
from pretrained.cli.main import main
from pretrained.core.gguf import read_gguf
from pretrained.torch.models import llama, mistral, qwen2, qwen3, smollm3
from support.cases import LLAMA3, LONGROPE, TINY_LLAMA, YARN
from support.dying import Killed, dying
from support.tokenizers import byte_alphabet, write_json_tokenizer

SIZES = TINY_LLAMA | {"hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": (llama.LlamaForCausalLM, {}),
    "tied": (llama.LlamaForCausalLM, {"tie_word_embeddings": True}),
    "biases": (llama.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "head_dim": (llama.LlamaForCausalLM, {"head_dim": 32}),
    "mqa": (llama.LlamaForCausalLM, {"num_key_value_heads": 1}),
    "linear": (llama.LlamaForCausalLM, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "yarn": (llama.LlamaForCausalLM, {"rope_scaling": YARN}),
    "llama3": (llama.LlamaForCausalLM, {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    # The same frequencies follow from other numbers, which is what comes back.
    "llama3 from 2": (llama.LlamaForCausalLM, {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}),
    "two ends": (llama.LlamaForCausalLM, {"eos_token_id": [2, 3]}),
    "mistral": (mistral.MistralForCausalLM, {"sliding_window": 4}),
    "mistral without a window": (mistral.MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (qwen2.Qwen2ForCausalLM, {}),
    "qwen3": (qwen3.Qwen3ForCausalLM, {"head_dim": 32}),
    "smollm3": (smollm3.SmolLM3ForCausalLM, {"num_hidden_layers": 4}),
}


def save(folder, cls, **values):
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES | values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model


def run(*words):
    return main(["convert", *map(str, words)])


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.arange(3, 19)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_with_equal_logits(tmp_path, family):
    cls, values = FAMILIES[family]
    model = save(tmp_path / "src", cls, **values)
    file = tmp_path / "model.gguf"
    assert run(tmp_path / "src", file) == 0
    again = AutoModelForCausalLM.from_pretrained(file)
    assert type(again) is type(model)
    state, found = model.state_dict(), again.state_dict()
    assert state.keys() == found.keys() and all(torch.equal(state[key], found[key]) for key in state)
    torch.testing.assert_close(logits(file), logits(tmp_path / "src"), rtol=1e-5, atol=1e-5)
    assert again.config.eos_token_id == model.config.eos_token_id
    assert again.config.max_position_embeddings == model.config.max_position_embeddings


@pytest.mark.parametrize(
    ("words", "kind"), [((), "F32"), (("--dtype", "fp16"), "F16"), (("--dtype", "bf16"), "BF16")]
)
def test_the_reference_reads_what_was_written(tmp_path, words, kind):
    model = save(tmp_path / "src", llama.LlamaForCausalLM)
    file = tmp_path / "model.gguf"
    assert run(tmp_path / "src", file, *words) == 0
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(model.state_dict())
    for tensor in tensors.values():
        matrix = len(tensor.shape) == 2
        assert tensor.tensor_type.name == (kind if matrix else "F32")
        assert tensor.data_offset % 32 == 0
    up = gguf.quants.dequantize(
        tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type
    )
    expected = model.model.layers[1].mlp.up_proj.weight.to(
        getattr(torch, {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16"))
    )
    np.testing.assert_array_equal(up, expected.float().detach().numpy())
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.context_length"] == 64
    assert fields["llama.rope.freq_base"] == 10000.0
    assert gguf.LlamaFileType(fields["general.file_type"]).name.endswith(kind)


@pytest.mark.parametrize("method", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_the_references_own(tmp_path, method):
    model = save(tmp_path / "src", llama.LlamaForCausalLM)
    file = tmp_path / "model.gguf"
    assert run(tmp_path / "src", file, "--quantize", method) == 0
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, key, heads in (
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", None),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("token_embd.weight", "model.embed_tokens.weight", None),
    ):
        weight = model.state_dict()[key].numpy()
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = "q8_0" if name.startswith("token") else method
        kind = gguf.GGMLQuantizationType[kind.upper()]
        assert tensors[name].tensor_type == kind
        np.testing.assert_array_equal(tensors[name].data, gguf.quants.quantize(weight, kind))
    assert (
        gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name == f"MOSTLY_{method.upper()}"
    )
    difference = (logits(file) - logits(tmp_path / "src")).abs().max()
    assert difference < {"q8_0": 0.02, "q4_0": 0.6, "q4_1": 0.6}[method]


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3"])
def test_transformers_computes_the_same_from_the_file(tmp_path, family):
    cls, values = FAMILIES[family]
    if family == "qwen3":
        values = values | {"head_dim": 128}  # transformers takes this one, whatever the file says
    save(tmp_path / "src", cls, vocab_size=280, **values)
    write_byte_level(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.no_grad():
        found = theirs(torch.arange(3, 19)[None]).logits
    torch.testing.assert_close(found, logits(tmp_path / "src"), rtol=1e-5, atol=1e-5)


def test_rows_that_are_no_blocks_stay_half(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM, intermediate_size=48)
    assert run(tmp_path / "src", tmp_path / "model.gguf", "--quantize", "q8_0") == 0
    assert "2 matrices have rows that are no multiple of 32, and stay float16" in capsys.readouterr().out
    kinds = {key: info.dtype for key, info in read_gguf(tmp_path / "model.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "float16" and kinds["blk.0.ffn_up.weight"] == "q8_0"


def test_there_and_back(tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM, rope_scaling=LLAMA3)
    assert run(tmp_path / "src", tmp_path / "a.gguf", "--quantize", "q8_0") == 0
    assert run(tmp_path / "a.gguf", tmp_path / "folder") == 0
    assert run(tmp_path / "folder", tmp_path / "b.gguf", "--quantize", "q8_0") == 0
    a, b = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
    assert {t.name for t in a} == {t.name for t in b}
    theirs = {tensor.name: tensor for tensor in b}
    for tensor in a:
        np.testing.assert_array_equal(tensor.data, theirs[tensor.name].data)


# Tokenizers


def write_byte_level(folder, *, regex=None, **config):
    """Write a tokenizer.json of byte-level BPE into a folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = byte_alphabet()
    vocab = {token: i + 3 for i, token in enumerate([*alphabet, "he", "ll", "hell", "Ġt"])}
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | vocab
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if regex is not None:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), plain])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_byte_level_tokenizer_goes_into_the_file(tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM, vocab_size=280)
    write_byte_level(tmp_path / "src", chat_template="{{ messages[0].content }}")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 0
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model.gguf", "src"))
    for text in ("hello there<|end|>", "<tool> 12 über", "<s>x</s>"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 280
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:3] == [3, 3, 3] and types[-1] == 5 and 4 in types


def test_a_tokenizer_that_gguf_has_no_name_for(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM, vocab_size=280)
    write_byte_level(tmp_path / "src", regex=r"\w+")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "it splits text in a way that GGUF has no name for" in err and "--without-tokenizer" in err
    assert not (tmp_path / "model.gguf").exists()
    assert run(tmp_path / "src", tmp_path / "model.gguf", "--without-tokenizer") == 0
    assert "note: there is no tokenizer in the GGUF file" in capsys.readouterr().out


def test_a_tokenizer_of_words(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM)
    write_json_tokenizer(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    assert "it is no byte-level BPE" in " ".join(capsys.readouterr().err.split())


def test_a_tokenizer_with_more_tokens_than_the_model(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM, vocab_size=99)
    write_byte_level(tmp_path / "src")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    assert "The tokenizer has more tokens than the model" in " ".join(capsys.readouterr().err.split())


# What is refused


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "(hidden_act): found gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "(rope_scaling): found dynamic"),
        ({"rope_scaling": LONGROPE, "hidden_size": 32}, "(rope_scaling): found longrope"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "(rope_scaling): found attention_factor"),
        ({"pruned_heads": {0: [0, 1]}}, "(pruned_heads): found {0: [0, 1]}"),
    ],
)
def test_what_gguf_cannot_say(capsys, tmp_path, values, said):
    save(tmp_path / "src", llama.LlamaForCausalLM, **values)
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "model.gguf").exists()


def test_classes_and_families_that_gguf_has_not(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForSequenceClassification, num_labels=3)
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    assert "(architectures): found LlamaForSequenceClassification" in " ".join(
        capsys.readouterr().err.split()
    )
    save(
        tmp_path / "qwen",
        qwen2.Qwen2ForCausalLM,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    assert run(tmp_path / "qwen", tmp_path / "model.gguf") == 1
    assert "use_sliding_window" in capsys.readouterr().err
    config = json.loads((tmp_path / "src" / "config.json").read_text()) | {"model_type": "gpt2"}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 1
    assert "Models of this family cannot be converted to GGUF yet" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "--to", "gguf"], "A GGUF model is one file"),
        (["model.gguf", "--to", "safetensors"], "A GGUF model is one file"),
        (["model.gguf", "--quantize", "int8"], "gguf files are not quantized to 'int8'"),
        (["model", "--quantize", "q8_0"], "safetensors files are not quantized to 'q8_0'"),
        (["model.gguf", "--quantize", "q8_0", "--dtype", "fp16"], "A matrix is quantized or has a dtype"),
        (["model.gguf", "--max-shard-size", "1MB"], "GGUF models in several files are not written yet"),
    ],
)
def test_words_that_contradict_each_other(capsys, tmp_path, words, said):
    save(tmp_path / "src", llama.LlamaForCausalLM)
    assert run(tmp_path / "src", tmp_path / words[0], *words[1:]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_there_is_replaced_only_by_force(capsys, tmp_path):
    save(tmp_path / "src", llama.LlamaForCausalLM)
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    assert run(tmp_path / "src", file) == 1
    assert "DST exists already" in capsys.readouterr().err and file.read_text() == "mine"
    assert run(tmp_path / "src", file, "--force") == 0
    assert torch.equal(logits(file), logits(tmp_path / "src"))
    assert {path.name for path in tmp_path.iterdir()} == {"src", "model.gguf"}


def test_killed_anywhere_there_is_the_old_file_or_the_new(tmp_path, monkeypatch):
    model = save(tmp_path / "src", llama.LlamaForCausalLM, num_hidden_layers=1)
    file = tmp_path / "model.gguf"
    words = [tmp_path / "src", file, "--dtype", "bf16", "--force"]
    for after in range(50):
        file.write_bytes(b"old")
        with monkeypatch.context() as patched:
            calls = dying(patched, after)
            with contextlib.suppress(Killed):
                assert run(*words) == 0
        if file.read_bytes() != b"old":
            assert len(read_gguf(file).tensors) == len(model.state_dict())
        if len(calls) <= after:
            break
        assert run(*words) == 0
    assert 5 < after < 49
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(file).lm_head.weight, model.lm_head.weight.bfloat16().float()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"src", "model.gguf"}


def test_head_and_embedding_that_the_config_ties_and_the_files_do_not(tmp_path):
    model = save(tmp_path / "src", llama.LlamaForCausalLM)
    config = json.loads((tmp_path / "src" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    assert "lm_head.weight" in load_file(tmp_path / "src" / "model.safetensors")
    assert run(tmp_path / "src", tmp_path / "model.gguf") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model.gguf")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.realweights
@pytest.mark.slow
def test_a_published_tokenizer_survives_the_way_there_and_back(smollm2_gguf, tmp_path):
    from pretrained.text.gguf_export import tokenizer_metadata

    metadata = read_gguf(smollm2_gguf).metadata
    found = tokenizer_metadata(AutoTokenizer.from_pretrained(smollm2_gguf), 49152)
    for name in ("tokens", "merges", "pre", "model", "bos_token_id", "eos_token_id"):
        key = f"tokenizer.ggml.{name}"
        assert found[key][1] == metadata[key], key
    assert list(found["tokenizer.ggml.token_type"][1]) == list(metadata["tokenizer.ggml.token_type"])
