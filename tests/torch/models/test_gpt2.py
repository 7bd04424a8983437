# SPDX-License-Identifier: Apache-2.0
"""What is GPT-2's own, beyond the battery: choices, cross-attention's cache, positions, old files."""

import pytest
import torch
from torch import nn

from pretrained.arch.gpt2 import GPT2Config
from pretrained.errors import ArgumentError, ConfigError
from pretrained.testing.battery import assert_close
from pretrained.torch.cache import DynamicCache, EncoderDecoderCache
from pretrained.torch.models import gpt2
from pretrained.torch.nn import Conv1D
from support.cases_gpt2 import TINY_GPT2, gpt2_case
from support.oracle import transformers_twin


def build(cls, **config):
    return gpt2_case(cls, **config).build()


def ids(*shape, seed=1):
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


# -- two heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"summary_proj_to_labels": False}, {"summary_use_proj": False}], ids=str
)
def test_double_heads_over_choices_equal_the_oracles(config):
    model = build(gpt2.GPT2DoubleHeadsModel, **config)
    inputs = {
        "input_ids": ids(2, 3, 7),
        "attention_mask": torch.ones(2, 3, 7, dtype=torch.int64),
        "token_type_ids": ids(2, 3, 7, seed=2),
        "mc_token_ids": torch.tensor([[1, 6, 3], [0, 2, 5]]),
        "labels": ids(2, 3, 7, seed=3),
    }
    inputs["attention_mask"][0, 0, 5:] = 0
    if not config:
        inputs["mc_labels"] = torch.tensor([2, 0])
    ours, theirs = model(**inputs), transformers_twin(model)(**inputs)
    assert set(ours.keys()) == set(theirs.keys())
    assert ours.logits.shape == (2, 3, 7, 99)
    keep = inputs["attention_mask"].bool()
    assert_close(ours.logits[keep], theirs.logits[keep], "logits")
    for name in ("loss", "mc_loss", "mc_logits"):
        if name in theirs:
            assert_close(ours[name], theirs[name], name)
    (ours.loss + (ours.mc_logits.sum() if config else ours.mc_loss)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["first", "last", "mean"])
def test_other_summaries_equal_the_oracles_on_single_texts(kind):
    # Over choices the oracle takes the first (last, mean) choice, not token, so rows are compared.
    model = build(gpt2.GPT2DoubleHeadsModel, summary_type=kind, summary_activation="tanh")
    choices = ids(2, 3, 7)
    with torch.no_grad():
        found = model(choices).mc_logits
        theirs = transformers_twin(model)(choices.flatten(0, 1)).mc_logits
    assert_close(found.flatten(), theirs, kind)


def test_double_heads_from_embeddings():
    model = build(gpt2.GPT2DoubleHeadsModel)
    choices = ids(2, 3, 7)
    with torch.no_grad():
        expected = model(choices)
        found = model(inputs_embeds=model.transformer.wte(choices))
    assert_close(found.mc_logits, expected.mc_logits, "mc_logits")
    assert found.logits.shape == expected.logits.shape


def test_building_two_heads_leaves_the_config_alone():
    config = GPT2Config(**TINY_GPT2, num_labels=5)
    model = gpt2.GPT2DoubleHeadsModel(config)
    assert config.num_labels == 5
    assert model.multiple_choice_head.summary.out_features == 1


def test_summary_that_no_class_can_make():
    with pytest.raises(ConfigError, match="summary_type is not a way to sum a text up"):
        gpt2.GPT2DoubleHeadsModel(GPT2Config(**TINY_GPT2, summary_type="attn"))


# -- cross-attention -----------------------------------------------------------------------------


def test_cross_attention_computes_the_encoders_keys_once():
    model = build(gpt2.GPT2LMHeadModel, add_cross_attention=True)
    states, tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)), ids(2, 6)
    calls = []
    for block in model.transformer.h:
        block.crossattention.c_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        whole = model(tokens, encoder_hidden_states=states, use_cache=False).logits
        calls.clear()
        out = model(tokens[:, :4], encoder_hidden_states=states)
        cache = out.past_key_values
        parts = [out.logits]
        for i in (4, 5):
            step = model(tokens[:, i : i + 1], past_key_values=cache, encoder_hidden_states=states)
            parts.append(step.logits)
    assert isinstance(cache, EncoderDecoderCache)
    assert cache.get_seq_length() == 6 and cache.cross_attention_cache.get_seq_length() == 5
    assert len(calls) == model.config.n_layer
    assert_close(torch.cat(parts, dim=1), whole, "cached against uncached")


def test_cross_attention_weights_equal_the_oracles():
    model = build(gpt2.GPT2LMHeadModel, add_cross_attention=True)
    states, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "output_attentions": True}
    with torch.no_grad():
        ours, theirs = model(ids(2, 6), **inputs), transformers_twin(model)(ids(2, 6), **inputs)
    assert len(ours.cross_attentions) == 2
    for first, second in zip(ours.cross_attentions, theirs.cross_attentions, strict=True):
        assert_close(first, second, "cross-attention weights")
    assert (ours.cross_attentions[0][1, ..., 3:] == 0).all()


def test_a_plain_cache_gets_a_part_for_the_encoder():
    model = build(gpt2.GPT2Model, add_cross_attention=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        out = model(ids(1, 3), past_key_values=cache, encoder_hidden_states=torch.randn(1, 4, 32))
    assert out.past_key_values.self_attention_cache is cache
    assert cache.get_seq_length() == 3


def test_encoder_states_without_layers_that_look_at_them():
    model = build(gpt2.GPT2Model)
    with pytest.raises(ArgumentError, match=r"no layers that look at.*add_cross_attention=True"):
        model(ids(1, 3), encoder_hidden_states=torch.randn(1, 4, 32))
    with pytest.raises(ArgumentError, match="masks encoder_hidden_states, which are not given"):
        model(ids(1, 3), encoder_attention_mask=torch.ones(1, 4))


# -- positions -----------------------------------------------------------------------------------


def test_more_tokens_than_positions():
    model = build(gpt2.GPT2LMHeadModel)
    with torch.no_grad():
        assert model(ids(1, 32)).logits.shape == (1, 32, 99)
        with pytest.raises(ArgumentError, match=r"longer than the model has pos.*at most 32.*found 33"):
            model(ids(1, 33))
        cache = model(ids(1, 31)).past_key_values
        model(ids(1, 1), past_key_values=cache)
        with pytest.raises(ArgumentError, match="found 33"):
            model(ids(1, 1), past_key_values=cache)
        with pytest.raises(ArgumentError, match="found 41"):
            model(ids(1, 2), position_ids=torch.tensor([[3, 40]]))
        # Padding on the left takes no positions.
        assert model(ids(1, 40), position_ids=(torch.arange(40) - 8).clamp(min=0)[None]).logits.shape[1] == 40


def test_padding_on_the_left_changes_nothing_where_positions_are_given():
    model = build(gpt2.GPT2LMHeadModel)
    text = ids(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), text], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(text).logits
        shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert_close(shifted, plain, "left padding")


def test_generation_of_a_padded_batch_equals_that_of_single_rows():
    model = build(gpt2.GPT2LMHeadModel)
    long, short = ids(1, 6), ids(1, 3, seed=2)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.int64), short], dim=1)])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **settings)
    assert together[0].tolist() == model.generate(long, **settings)[0].tolist()
    assert together[1, 3:].tolist() == model.generate(short, **settings)[0].tolist()


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upcast_scores_are_float32_and_outputs_are_not(dtype):
    model = build(gpt2.GPT2Model, reorder_and_upcast_attn=True).to(dtype)
    with torch.no_grad():
        exact = model.float()(ids(2, 9), output_attentions=True)
        out = model.to(dtype)(ids(2, 9), output_attentions=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.float()(ids(2, 9), output_attentions=True)
    for result in (out, mixed):
        assert float((result.attentions[-1].float() - exact.attentions[-1]).abs().max()) < 0.05
    assert out.last_hidden_state.dtype == out.attentions[0].dtype == dtype


def test_pruned_heads_equal_heads_without_effect():
    model = build(gpt2.GPT2Model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    keep = torch.arange(8, 32)  # head 0 of layer 1 has channels 0 to 7
    model.h[1].attn.c_proj.weight.data[:8] = 0
    for name in ("weight", "bias"):
        whole = state[f"h.1.attn.c_attn.{name}"]
        state[f"h.1.attn.c_attn.{name}"] = torch.cat(
            [part[..., keep] for part in whole.split(32, dim=-1)], dim=-1
        )
    state["h.1.attn.c_proj.weight"] = state["h.1.attn.c_proj.weight"][keep]
    pruned = gpt2.GPT2Model(GPT2Config(**TINY_GPT2, pruned_heads={1: [0]})).eval()
    pruned.load_state_dict(state)
    with torch.no_grad():
        assert_close(pruned(ids(2, 7))[0], model(ids(2, 7))[0], "pruned")


def test_new_layers_into_the_residual_stream_start_smaller():
    torch.manual_seed(0)
    model = gpt2.GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=128, n_layer=8, n_head=4, initializer_range=0.1)
    )
    block = model.transformer.h[3]
    for layer in (block.attn.c_proj, block.mlp.c_proj):
        assert layer.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)
        assert not layer.bias.any()
    for layer in (block.attn.c_attn, block.mlp.c_fc, model.transformer.wte):
        assert layer.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert isinstance(block.attn.c_proj, Conv1D) and isinstance(block.ln_1, nn.LayerNorm)


# -- files ---------------------------------------------------------------------------------------


def test_old_file_without_prefix_and_with_masks(tmp_path):
    from safetensors.torch import save_file

    model = build(gpt2.GPT2LMHeadModel)
    model.config.save_pretrained(tmp_path)
    state = {
        key.removeprefix("transformer."): tensor.clone()
        for key, tensor in model.state_dict().items()
        if key != "lm_head.weight"
    }
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = gpt2.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_new_head_on_a_published_body_is_reported_and_initialised(tmp_path):
    build(gpt2.GPT2LMHeadModel).save_pretrained(tmp_path)
    model, info = gpt2.GPT2DoubleHeadsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == [
        "multiple_choice_head.summary.bias",
        "multiple_choice_head.summary.weight",
    ]
    assert not model.multiple_choice_head.summary.bias.any()
    assert model.multiple_choice_head.summary.weight.std() > 0
