# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of GPTQ and AWQ: every number as packed, saving, placing, and what does not fit together."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrained import (
    ArgumentError,
    AutoModelForCausalLM,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaModel,
    PlacementError,
    WeightsError,
)
from pretrained.errors import NotYetError
from pretrained.torch.quantize import quantized_leaves
from pretrained.torch.quantizers.gptq import unpack_words
from support.foreign import awq_parts, foreign_checkpoint, gptq_parts, words_of

SIZES = {
    LlamaForCausalLM: {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    BertForMaskedLM: {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    },
}
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(3))
UP = "model.layers.0.mlp.up_proj"
EXACT = {"compute_dtype": "float32"}


def fresh(cls):
    torch.manual_seed(0)
    return cls(cls.config_class(**SIZES[cls])).eval()


def gptq(bits=4, group=32, *, symmetric=False, less_one=True, has_order=True, **settings):
    """Return a packer, settings for config.json, and what the numbers are drawn by."""

    def pack(path, chance):
        parts = gptq_parts(*chance[:3], bits, chance[3], less_one=less_one)
        return parts if has_order else {name: parts[name] for name in ("qweight", "qzeros", "scales")}

    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False}
    said["checkpoint_format"] = "gptq" if less_one else "gptq_v2"
    return pack, {**said, **settings}, {"bits": bits, "group": group, "symmetric": symmetric}


def awq(group=32, **settings):
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return (lambda _, chance: awq_parts(*chance[:3])), {**said, **settings}, {"bits": 4, "group": group}


def written(folder, method, cls=LlamaForCausalLM, **more):
    pack, said, drawn = method
    model = fresh(cls)
    return model, foreign_checkpoint(model, folder, pack, said, **drawn, **more)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def expected_logits(model, known):
    model.load_state_dict({**model.state_dict(), **{f"{path}.weight": w for path, w in known.items()}})
    return logits(model)


def distance(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


METHODS = {
    "gptq": gptq(),
    "gptq symmetric": gptq(symmetric=True),
    "gptq v2": gptq(less_one=False),
    "gptq one group": gptq(group=-1),
    "gptq odd groups": gptq(group=16),
    "gptq no g_idx": gptq(has_order=False),
    "gptq 8 bits": gptq(8),
    "gptq 8 bits symmetric": gptq(8, 32, symmetric=True),
    "gptq 8 bits one group": gptq(8, -1, symmetric=True),
    "gptq 3 bits": gptq(3),
    "gptq 2 bits": gptq(2, symmetric=True),
    "awq": awq(),
    "awq one group": awq(-1),
}


ENCODER = ("gptq", "gptq 8 bits one group", "awq")


@pytest.mark.parametrize(
    ("cls", "name"),
    [*((LlamaForCausalLM, name) for name in METHODS), *((BertForMaskedLM, name) for name in ENCODER)],
)
def test_every_number_is_as_packed(name, cls, tmp_path):
    model, known = written(tmp_path, METHODS[name], cls)
    method = METHODS[name][1]["quant_method"]
    ours = cls.from_pretrained(tmp_path, quantization_config={"quant_method": method, **EXACT})
    leaves = quantized_leaves(ours)
    assert set(leaves) == set(known)
    assert ours.is_quantized
    assert ours.quantization_method == ("int8" if "8 bits" in name else "int4")
    for path, leaf in leaves.items():
        assert torch.equal(leaf.dequantized(), known[path]), path
    torch.testing.assert_close(logits(ours), expected_logits(model, known), rtol=1e-5, atol=1e-6)
    plain = ours.dequantize()
    assert not plain.is_quantized
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_kernels_are_near_save_and_reload_is_equal(name, tmp_path):
    model, known = written(tmp_path / "theirs", METHODS[name])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    # bfloat16 scales are off by up to 2^-9 each, bfloat16 inputs as well.
    assert distance(logits(ours).float(), expected_logits(model, known)) < 0.02
    for path, leaf in quantized_leaves(ours).items():
        assert torch.equal(leaf.dequantized(torch.float32), known[path])
    ours.save_pretrained(tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": ours.quantization_method, "read_from": METHODS[name][1]["quant_method"]}
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert torch.equal(logits(again), logits(ours))
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("ours", "again")]
    assert files[0] == files[1]


def test_the_words_of_three_bits_run_on():
    numbers = np.random.default_rng(0).integers(0, 8, 64)
    words = torch.from_numpy(words_of(numbers, 3))[:, None]
    assert unpack_words(words, 3)[:, 0].tolist() == numbers.tolist()


# -- orders and groups ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_an_order_of_the_inputs_is_kept_in_the_leaf(bits, tmp_path):
    model, known = written(tmp_path / "theirs", gptq(bits, desc_act=True), order="even")
    method = {"quant_method": "gptq"}
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", quantization_config={**method, **EXACT})
    leaf = ours.get_submodule(UP)
    assert leaf.form.is_ordered
    assert sorted(leaf.weight_order.tolist()) == [*range(64)]
    assert torch.equal(leaf.dequantized(), known[UP])
    wanted = expected_logits(model, known)
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-6)
    quick = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", quantization_config=method)
    assert distance(logits(quick), wanted) < 0.02
    quick.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "ours")), logits(quick))
    x = torch.randn(3, 64, requires_grad=True)
    leaf(x).sum().backward()
    torch.testing.assert_close(x.grad, known[UP].sum(0).expand(3, -1), rtol=1e-4, atol=1e-5)


def test_uneven_groups_make_plain_weights(tmp_path):
    model, known = written(tmp_path / "theirs", gptq(desc_act=True), order="uneven")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "theirs")
    assert not ours.is_quantized
    assert not hasattr(ours.config, "quantization_config")
    assert torch.equal(ours.get_submodule(UP).weight, known[UP])
    assert torch.equal(logits(ours), expected_logits(model, known))
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "ours")), logits(ours))


@pytest.mark.parametrize("has_order", [True, False])
def test_a_group_cut_short_makes_a_plain_weight(has_order, tmp_path):
    # 96 inputs (down_proj) are a group of 64 and a half; 64 inputs are a whole one.
    _, known = written(tmp_path, gptq(group=64, has_order=has_order))
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    down = "model.layers.0.mlp.down_proj"
    assert type(ours.get_submodule(down)) is torch.nn.Linear
    assert torch.equal(ours.get_submodule(down).weight, known[down])
    assert set(quantized_leaves(ours)) == {path for path in known if "down_proj" not in path}


# -- which layers, and where ----------------------------------------------------------------------


@pytest.mark.parametrize("method", [gptq(lm_head=True), awq()], ids=["gptq", "awq"])
def test_a_quantized_head(method, tmp_path):
    model, known = written(tmp_path, method, head=True)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours.lm_head.dequantized(), known["lm_head"])
    assert distance(logits(ours), expected_logits(model, known)) < 0.02
    with_head = LlamaModel.from_pretrained(tmp_path)
    assert set(quantized_leaves(with_head)) == {p.removeprefix("model.") for p in known if p != "lm_head"}
    assert with_head.load_report.unexpected == ("lm_head.weight",)


def test_the_files_decide_which_layers_are_quantized(tmp_path):
    settings = awq(modules_to_not_convert=["mlp"])
    model, known = written(tmp_path, settings, picks=lambda path: "mlp" not in path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert set(quantized_leaves(ours)) == set(known)
    assert torch.equal(ours.get_submodule(UP).weight, model.get_submodule(UP).weight)


def test_settings_of_single_layers(tmp_path):
    def pack(path, chance):
        bits = 8 if "up_proj" in path else 4
        integers, zeros = chance[0] % 2**bits, chance[1] % 2**bits
        expected[path] = integers, zeros
        return gptq_parts(integers, zeros, chance[2], bits, chance[3])

    expected = {}
    dynamic = {r"+:.*\.up_proj": {"bits": 8}, r"-:.*\.down_proj": {}}
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "dynamic": dynamic}
    picks = lambda path: "down_proj" not in path  # noqa: E731
    written(tmp_path, (pack, said, {"bits": 8, "group": 32}), picks=picks)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    leaf = ours.get_submodule(UP)
    assert (leaf.form.bits, ours.model.layers[0].mlp.gate_proj.form.bits) == (8, 4)
    assert torch.equal(leaf.weight, torch.from_numpy(expected[UP][0] - 128).to(torch.int8))
    assert type(ours.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert ours.quantization_method == "int4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes_stay_what_they_are(dtype, tmp_path):
    written(tmp_path, gptq())
    tensors = load_file(tmp_path / "model.safetensors")
    for key in tensors:
        if key.endswith(".scales"):
            tensors[key] = tensors[key].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert ours.get_submodule(UP).weight_scale.dtype == dtype
    assert torch.equal(ours.get_submodule(UP).weight_scale, tensors[f"{UP}.scales"].t())


@pytest.mark.parametrize("method", [gptq(), awq()], ids=["gptq", "awq"])
def test_device_maps(method, tmp_path):
    written(tmp_path / "theirs", method)
    resident = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    for wish in ({"device_map": "cpu"}, {"device_map": "auto", "max_memory": {"cpu": "100MB"}}):
        placed = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto", **wish)
        assert torch.equal(logits(placed), logits(resident))
    resident.save_pretrained(tmp_path / "ours")
    away = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto", device_map="disk")
    assert torch.equal(logits(away), logits(resident))


@pytest.mark.parametrize("order", [None, "even", "uneven"])
@pytest.mark.parametrize("wish", [{}, {"dequantize": True}], ids=["packed", "plain"])
def test_the_disk_takes_a_copy_that_is_found_again(order, wish, tmp_path):
    written(tmp_path / "q", gptq(desc_act=True), order=order)
    said = {"dtype": "auto", "quantization_config": {"quant_method": "gptq", **wish}}
    resident = LlamaForCausalLM.from_pretrained(tmp_path / "q", **said)
    with pytest.raises(PlacementError, match=r"need a converted copy.*offload_folder"):
        LlamaForCausalLM.from_pretrained(tmp_path / "q", device_map="disk", **said)
    files = []
    for _ in range(2):
        away = LlamaForCausalLM.from_pretrained(
            tmp_path / "q", device_map="disk", offload_folder=tmp_path / "off", **said
        )
        assert torch.equal(logits(away), logits(resident))
        assert away.is_quantized == resident.is_quantized
        files.append({file: file.stat().st_mtime_ns for file in (tmp_path / "off").glob("*.safetensors")})
    assert len(files[0]) == 1
    assert files[0] == files[1]
    # The same bytes by other settings are another copy.
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    other = LlamaForCausalLM.from_pretrained(
        tmp_path / "q", device_map="disk", offload_folder=tmp_path / "off", **said
    )
    assert not torch.equal(logits(other), logits(resident))


@pytest.mark.parametrize("name", ["gptq", "gptq 8 bits", "awq"])
def test_dequantizing_while_loading(name, tmp_path):
    model, known = written(tmp_path, METHODS[name])
    wish = {"quant_method": METHODS[name][1]["quant_method"], "dequantize": True}
    ours = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=wish)
    assert not ours.is_quantized
    assert torch.equal(logits(ours), expected_logits(model, known))
    half = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=wish, dtype="bfloat16")
    assert torch.equal(half.get_submodule(UP).weight, known[UP].to(torch.bfloat16))


def test_budgets_are_held_against_the_packed_sizes(tmp_path):
    written(tmp_path, gptq())
    whole = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").get_memory_footprint()
    wish = {"device_map": "auto", "dtype": "auto"}
    LlamaForCausalLM.from_pretrained(tmp_path, max_memory={"cpu": whole + 4096}, **wish)


def test_state_dicts_and_copies(tmp_path):
    written(tmp_path, gptq())
    mapped = LlamaForCausalLM.from_pretrained(tmp_path)
    copied = LlamaForCausalLM.from_pretrained(tmp_path, disable_mmap=True)
    tensors = load_file(tmp_path / "model.safetensors")
    given = LlamaForCausalLM.from_pretrained(None, config=tmp_path / "config.json", state_dict=tensors)
    assert torch.equal(logits(copied), logits(mapped))
    assert torch.equal(logits(given), logits(mapped))


# -- what does not fit ----------------------------------------------------------------------------


def damaged(folder, change, method=None, said=None):
    """Write a checkpoint with one part of one layer changed."""
    written(folder, method or gptq())
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, file, {"format": "pt"})
    if said:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"].update(said)
        (folder / "config.json").write_text(json.dumps(config))


def drop(name):
    return lambda tensors: tensors.pop(f"{UP}.{name}")


def cast(name, dtype):
    return lambda tensors: tensors.update({f"{UP}.{name}": tensors[f"{UP}.{name}"].to(dtype)})


def cut(name):
    return lambda tensors: tensors.update({f"{UP}.{name}": tensors[f"{UP}.{name}"][:-1]})


def far(tensors):
    tensors[f"{UP}.g_idx"][5] = 2


def leave(_):
    pass


@pytest.mark.parametrize(
    ("change", "said", "text"),
    [
        (drop("qzeros"), {}, r"has no 'qzeros' \(model.layers.0.mlp.up_proj\).*not whole"),
        (drop("scales"), {}, r"has no 'scales'"),
        (cut("qweight"), {}, r"'qweight'.*another shape.*4 bits.*expected \[8, 96\], found \[7, 96\]"),
        (cut("scales"), {}, r"'scales'.*another shape.*groups of 32.*expected \[2, 96\], found \[1, 96\]"),
        (cut("g_idx"), {}, r"'g_idx'.*another shape"),
        (cast("qweight", torch.int64), {}, r"'qweight'.*another dtype.*expected int32, found int64"),
        (cast("scales", torch.float64), {}, r"'scales'.*expected float16 or bfloat16 or.*found float64"),
        (far, {}, r"g_idx names groups that are not there.*expected 0 to 1, found 0 to 2"),
        (
            leave,
            {"group_size": 64},
            r"'qzeros'.*groups of 64.*down_proj.qzeros.*expected \[2, 8\], found \[3, 8\]",
        ),
        (leave, {"bits": 8}, r"'qweight'.*8 bits.*down_proj.qweight.*expected \[24, 64\], found \[12, 64\]"),
        (leave, {"sym": True}, r"says that the weights are symmetric \(sym\), and their zero points differ"),
    ],
)
def test_parts_that_do_not_fit_together(change, said, text, tmp_path):
    damaged(tmp_path, change, said=said)
    with pytest.raises(WeightsError, match=text):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "said", "text"),
    [
        (drop("qzeros"), {}, r"has no 'qzeros'"),
        (cut("qweight"), {}, r"'qweight'.*expected \[64, 12\], found \[63, 12\]"),
        (leave, {"group_size": 64}, r"cannot be packed into words with groups of 64.*96 inputs|'qzeros'"),
        (cast("scales", torch.int32), {}, r"'scales'.*another dtype"),
    ],
)
def test_awq_parts_that_do_not_fit_together(change, said, text, tmp_path):
    damaged(tmp_path, change, awq(), said)
    with pytest.raises(WeightsError, match=text):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_configs_and_files_that_disagree(tmp_path):
    model, _ = written(tmp_path / "q", gptq())
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text((tmp_path / "q" / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"quantized \(gptq\), and the files hold plain.*named qweight"):
        LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    with pytest.raises(ArgumentError, match=r"quantized already.*expected gptq, found int8"):
        LlamaForCausalLM.from_pretrained(tmp_path / "q", load_in_8bit=True)
    with pytest.raises(ArgumentError, match=r"another bits.*expected 4, found 8.*files decide"):
        wish = {"quant_method": "gptq", "bits": 8}
        LlamaForCausalLM.from_pretrained(tmp_path / "q", quantization_config=wish)
    with pytest.raises(ArgumentError, match=r"multiply in bfloat16 or float32.*float16"):
        wish = {"quant_method": "gptq", "compute_dtype": "float16"}
        LlamaForCausalLM.from_pretrained(tmp_path / "q", quantization_config=wish)


def test_an_embedding_is_not_read(tmp_path):
    def embed(tensors):
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"model.embed_tokens.{name}"] = tensors[f"{UP}.{name}"]
        del tensors["model.embed_tokens.weight"]

    damaged(tmp_path, embed)
    with pytest.raises(NotYetError, match=r"gptq is read for dense layers only.*found Embedding.weight"):
        LlamaForCausalLM.from_pretrained(tmp_path)
