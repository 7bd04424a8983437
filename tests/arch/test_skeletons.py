# SPDX-License-Identifier: Apache-2.0
"""Skeletons, policies and working memory by the registry, from configs alone."""

import pytest

from pretrained.arch.skeletons import (
    activation_bytes,
    architecture_of,
    config_of,
    kv_cache_bytes,
    policy_for,
    skeleton_for,
    workload_for,
)
from pretrained.core.registry import FAMILIES
from pretrained.errors import ArgumentError, ConfigError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
T5 = {
    "model_type": "t5",
    "d_model": 8,
    "d_ff": 16,
    "d_kv": 4,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 32,
}
CLASSES = [
    (model_type, name)
    for model_type, row in FAMILIES.items()
    for name in row.models["torch"].classes
    if not name.endswith("PreTrainedModel")
]


@pytest.mark.parametrize(("model_type", "name"), CLASSES)
def test_every_class_has_a_skeleton_with_whole_blocks(model_type, name):
    skeleton = skeleton_for(config_of({"model_type": model_type}), name)
    blocks = {spec.block for spec in skeleton.params.values()} - {None}
    assert blocks, "nothing is kept whole"
    for key, spec in skeleton.params.items():
        around = [block for block in blocks if key.startswith(f"{block}.")]
        assert around == ([spec.block] if spec.block else [])


def test_the_class_is_the_configs_or_automodels():
    config = config_of(LLAMA)
    assert architecture_of(config) == "LlamaModel"
    config.architectures = ["LlamaForCausalLM"]
    assert architecture_of(config) == "LlamaForCausalLM"
    assert "lm_head.weight" in skeleton_for(config).params
    assert "lm_head.weight" not in skeleton_for(config, "LlamaModel").params
    t5 = config_of({**T5, "architectures": ["T5WithLMHeadModel"]})
    assert architecture_of(t5) == "T5ForConditionalGeneration"
    assert architecture_of(t5, "TFT5EncoderModel") == "T5EncoderModel"


def test_a_class_of_another_family_is_refused():
    with pytest.raises(ArgumentError, match=r"no LlamaForCausal for .*Did you mean 'LlamaForCausalLM'\?"):
        skeleton_for(config_of(LLAMA), "LlamaForCausal")
    with pytest.raises(ConfigError, match="The architecture 'lama' is not known"):
        config_of({"model_type": "lama"})


def test_policies_say_what_stays_in_float32():
    torch_stacks = pytest.importorskip("pretrained.torch.models.t5_stacks")
    policy = policy_for(config_of(T5), "float16")
    assert policy.keep_fp32 == tuple(torch_stacks.T5PreTrainedModel._keep_in_fp32_modules)
    assert policy.base_prefix == "transformer"
    assert policy_for(config_of(LLAMA), None).keep_fp32 == ()


def test_cache_of_a_decoder():
    # 2 tensors, 3 rows, 2 heads of 4 channels, 10 tokens, 2 bytes
    assert kv_cache_bytes(config_of(LLAMA), 3, 10, "float16") == (2 * 3 * 2 * 4 * 10 * 2,) * 3


def test_cache_ends_with_the_window():
    config = config_of({**LLAMA, "model_type": "mistral", "sliding_window": 5})
    assert kv_cache_bytes(config, 1, 10, "float32") == kv_cache_bytes(config, 1, 5, "float32")


def test_cache_of_an_encoder_decoder_holds_both_attentions():
    # 2 tensors, 2 heads of 4 channels, 10 tokens, 4 bytes, twice
    assert kv_cache_bytes(config_of(T5), 1, 10, "float32") == (2 * 2 * 4 * 10 * 4 * 2,) * 2


def test_encoders_keep_nothing():
    tiny = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
    assert kv_cache_bytes(config_of({"model_type": "bert", **tiny}), 1, 10, "float32") == ()
    decoder = config_of({"model_type": "bert", **tiny, "is_decoder": True})
    assert kv_cache_bytes(decoder, 1, 10, "float32") == (2 * 8 * 10 * 4,) * 2


def test_cache_is_what_a_cache_holds():
    torch = pytest.importorskip("torch")
    from pretrained import LlamaForCausalLM, T5ForConditionalGeneration

    ids = torch.ones(2, 7, dtype=torch.long)
    llama = LlamaForCausalLM(config_of(LLAMA)).eval()
    cache = llama(input_ids=ids, use_cache=True).past_key_values
    held = [sum(t.numel() * 4 for t in cache[layer]) for layer in range(3)]
    assert tuple(held) == kv_cache_bytes(llama.config, 2, 7, "float32")
    t5 = T5ForConditionalGeneration(config_of(T5)).eval()
    cache = t5(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    held = [
        sum(
            t.numel() * 4
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
            for t in part[layer]
        )
        for layer in range(2)
    ]
    assert tuple(held) == kv_cache_bytes(t5.config, 2, 7, "float32")


@pytest.mark.parametrize(("batch", "context"), [(0, 1), (1, 0), (-1, 5)])
def test_workloads_are_positive(batch, context):
    with pytest.raises(ArgumentError, match="must be positive"):
        kv_cache_bytes(config_of(LLAMA), batch, context, "float32")
    with pytest.raises(ArgumentError, match="must be positive"):
        activation_bytes(config_of(LLAMA), batch, context, "float32")


def test_cache_goes_to_the_decoders_blocks():
    config = config_of(T5)
    full = workload_for(config, skeleton_for(config), batch=1, context=8, dtype="float32")
    assert list(full.cache) == ["decoder.block.0", "decoder.block.1"]
    encoder = skeleton_for(config, "T5EncoderModel")
    assert workload_for(config, encoder, batch=1, context=8, dtype="float32").cache == {}
    llama = config_of(LLAMA)
    found = workload_for(llama, skeleton_for(llama, "LlamaForCausalLM"), batch=1, context=8, dtype="float32")
    assert list(found.cache) == [f"model.layers.{index}" for index in range(3)]


def test_activations_grow_with_the_batch():
    config = config_of(LLAMA)
    one, two = (activation_bytes(config, batch, 10, "float32") for batch in (1, 2))
    assert two == 2 * one
    # 10 tokens of 6 hidden and 2 inner tensors, and the last position's scores
    assert one == 10 * (6 * 16 + 2 * 24) * 4 + 32 * 4


def test_skeletons_list_modules_in_the_order_of_the_module():
    pytest.importorskip("torch")
    from pretrained import LlamaForCausalLM
    from pretrained.core.units import module_order

    config = config_of(LLAMA)
    model = LlamaForCausalLM(config)
    order = [spec.key.rpartition(".")[0] for spec in module_order(skeleton_for(config, "LlamaForCausalLM"))]
    theirs = [name for name, module in model.named_modules() if name in set(order)]
    tops = [name for name in theirs if name.count(".") == 1]
    assert [name for name in dict.fromkeys(order) if name.count(".") == 1] == tops
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers == set(skeleton_for(config, "LlamaForCausalLM").derived)
