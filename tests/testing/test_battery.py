# SPDX-License-Identifier: Apache-2.0
"""The battery fails where a model is wrong: each check against models broken on purpose, and a whole one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrained.arch.llama import skeleton
from pretrained.testing import battery
from pretrained.testing.battery import Case
from pretrained.torch.models.llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
)
from support.cases import TINY_LLAMA

CONFIG = {**TINY_LLAMA, "attention_bias": True, "tie_word_embeddings": True}


def oracle(model):
    """The whole model with the weights of a broken one."""
    cls = next(cls for cls in type(model).__mro__ if cls.__module__.startswith("pretrained."))
    twin = cls(model.config).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.to(model.dtype)


def case(cls=LlamaForCausalLM, **config):
    return Case(cls, {**CONFIG, **config}, name=cls.__name__)


def broken(change, base=LlamaForCausalLM):
    """A class whose instances are changed once they are built."""

    class BrokenForCausalLM(base):
        def __init__(self, config):
            super().__init__(config)
            change(self)

    return case(BrokenForCausalLM)


def wrapped(before=None, after=None, base=LlamaForCausalLM):
    """A class whose forward sees changed arguments or returns a changed output."""

    class WrappedForCausalLM(base):
        def forward(self, input_ids=None, **kwargs):
            if before is not None:
                input_ids, kwargs = before(self, input_ids, kwargs)
            out = super().forward(input_ids, **kwargs)
            return out if after is None else after(self, out)

    return case(WrappedForCausalLM)


def attentions(model):
    return [module for module in model.modules() if isinstance(module, LlamaAttention)]


def wrong_scale(model):
    for module in attentions(model):
        module.scaling *= 1.001


def swapped_biases(model):
    def swap(module, *_):
        q, o = module.q_proj.bias.data, module.o_proj.bias.data
        module.q_proj.bias.data, module.o_proj.bias.data = o, q

    for module in attentions(model):
        module.register_forward_pre_hook(swap)
        module.register_forward_hook(swap)


def unrotated(model):
    attentions(model)[1].rotates = False


def wrong_epsilon(model):
    model.model.norm.variance_epsilon = 1e-2


def blind_to_masks(model, ids, kwargs):
    return ids, {**kwargs, "attention_mask": None}


def with_field(name, change):
    def after(model, out):
        if isinstance(out, tuple):
            return out
        return dataclasses.replace(out, **{name: change(getattr(out, name))}) if name in out else out

    return after


WRONG_VALUES = {
    "scale": broken(wrong_scale),
    "biases": broken(swapped_biases),
    "unrotated": broken(unrotated),
    "epsilon": broken(wrong_epsilon),
    "nan": wrapped(after=with_field("logits", lambda logits: logits * float("nan"))),
}


def test_a_whole_model_passes_everything(tmp_path):
    good = case()
    for padding in ("none", "left", "right"):
        battery.check_parity(good, oracle, padding=padding)
    for check in (
        battery.check_bfloat16,
        battery.check_submodules,
        battery.check_attentions,
        battery.check_loss_and_gradients,
    ):
        check(good, oracle)
    for check in (
        battery.check_tuple,
        battery.check_inputs_embeds,
        battery.check_pickle,
        battery.check_compiled,
    ):
        check(good)
    battery.check_cache(good, static=False)
    battery.check_cache(good, static=True)
    battery.check_round_trip(good, tmp_path)
    battery.check_skeleton(good, skeleton, "Llama")


# -- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRONG_VALUES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_parity_fails(name, padding):
    with pytest.raises(AssertionError, match="relative error"):
        battery.check_parity(WRONG_VALUES[name], oracle, padding=padding)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_parity_fails_where_masks_are_ignored(padding):
    ignoring = wrapped(before=blind_to_masks)
    battery.check_parity(ignoring, oracle, padding="none")
    if padding == "right":
        # What comes after a token cannot reach it: a decoder that ignores such a mask is right.
        battery.check_parity(ignoring, oracle, padding=padding)
        return
    with pytest.raises(AssertionError, match=f"{padding} padding: .*relative error"):
        battery.check_parity(ignoring, oracle, padding=padding)


def test_parity_fails_where_a_hidden_state_is_missing_or_wrong():
    without = wrapped(after=with_field("hidden_states", lambda states: states[:-1]))
    with pytest.raises(AssertionError, match="fields"):
        battery.check_parity(without, oracle, padding="none")
    shifted = wrapped(after=with_field("hidden_states", lambda states: (states[0] + 1e-3, *states[1:])))
    with pytest.raises(AssertionError, match=r"hidden_states\[0\]: relative error"):
        battery.check_parity(shifted, oracle, padding="none")


def test_bfloat16_fails_where_roundings_pile_up():
    def rounded_norm(model):
        def narrow(module, args, out):
            return (out.float() * 16).round().div(16).to(out.dtype) if out.dtype == torch.bfloat16 else out

        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(narrow)

    with pytest.raises(AssertionError, match=r"errs by .*, the oracle by"):
        battery.check_bfloat16(broken(rounded_norm), oracle)


def test_bfloat16_fails_where_the_dtype_is_another():
    wide = wrapped(after=with_field("logits", lambda logits: logits.float()))
    with pytest.raises(AssertionError, match="logits"):
        battery.check_bfloat16(wide, oracle)


def test_submodules_fail_where_errors_cancel():
    def cancelling(model):
        def double(module, args, out):
            return 2 * out

        def halve(module, args):
            return (args[0] / 2,)

        model.model.layers[0].mlp.up_proj.register_forward_hook(double)
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(halve)

    wrong = broken(cancelling)
    battery.check_parity(wrong, oracle, padding="none")
    with pytest.raises(AssertionError, match=r"layers\.0\.mlp\.up_proj: relative error"):
        battery.check_submodules(wrong, oracle)


def test_submodules_fail_where_nothing_is_compared():
    class Nothing(nn.Module):
        def forward(self, **kwargs):
            return None

    with pytest.raises(AssertionError, match="only 0 of"):
        battery.check_submodules(case(), lambda model: Nothing())


def test_attentions_fail_where_weights_are_wrong_absent_or_change_the_output():
    def turned(weights):
        return tuple(weight.transpose(1, 2) for weight in weights)

    with pytest.raises(AssertionError):
        battery.check_attentions(wrapped(after=with_field("attentions", lambda weights: None)), oracle)
    with pytest.raises(AssertionError, match=r"attentions\[0\]"):
        shifted = with_field("attentions", lambda weights: tuple(weight + 1e-3 for weight in weights))
        battery.check_attentions(wrapped(after=shifted), oracle)
    with pytest.raises(AssertionError):
        battery.check_attentions(wrapped(after=with_field("attentions", turned)), oracle)

    def other_without(model, out):
        return out if out.attentions else dataclasses.replace(out, logits=out.logits * 1.001)

    with pytest.raises(AssertionError, match="with and without attentions"):
        battery.check_attentions(wrapped(after=other_without), oracle)


def test_losses_fail_where_a_label_or_a_gradient_is_lost():
    def unshifted(model, ids, kwargs):
        if "labels" in kwargs:
            kwargs = {**kwargs, "labels": kwargs["labels"].roll(1, -1)}
        return ids, kwargs

    with pytest.raises(AssertionError, match="loss: relative error"):
        battery.check_loss_and_gradients(wrapped(before=unshifted), oracle)

    def cut(model):
        model.model.layers[0].register_forward_hook(lambda module, args, out: (out[0].detach(), out[1]))

    with pytest.raises(AssertionError, match=r"gradient.* of "):
        battery.check_loss_and_gradients(broken(cut), oracle)

    def scaled(model):
        model.model.layers[1].mlp.down_proj.weight.register_hook(lambda gradient: gradient * 1.01)

    with pytest.raises(AssertionError, match=r"gradient of model\.layers\.1\.mlp\.down_proj"):
        battery.check_loss_and_gradients(broken(scaled), oracle)


# -- against itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        list,
        lambda plain: plain[:-1],
        lambda plain: (plain[0] + 1e-3, *plain[1:]),
        lambda plain: (*plain[:-1], plain[-1][::-1]),
        lambda plain: (plain[-1], *plain[:-1]),
    ],
    ids=["list", "short", "values", "late values", "order"],
)
def test_tuples_fail(spoil):
    wrong = wrapped(after=lambda model, out: spoil(out) if isinstance(out, tuple) else out)
    with pytest.raises(AssertionError):
        battery.check_tuple(wrong)


def test_embeddings_fail_where_ids_do_more():
    def scale(model, ids, kwargs):
        if ids is None:
            return None, kwargs
        return None, {**kwargs, "inputs_embeds": model.get_input_embeddings()(ids) * 1.01}

    with pytest.raises(AssertionError, match="relative error"):
        battery.check_inputs_embeds(wrapped(before=scale))


def positions_from_zero(model, ids, kwargs):
    if kwargs.get("past_key_values") is not None:
        kwargs = {**kwargs, "position_ids": torch.arange(ids.shape[1])[None]}
    return ids, kwargs


def forgetting(model, ids, kwargs):
    return ids, {**kwargs, "past_key_values": None, "cache_position": None}


def blind_to_cached_padding(model, ids, kwargs):
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] > ids.shape[1]:
        mask = mask.clone()
        mask[:, : -ids.shape[1]] = 1
    return ids, {**kwargs, "attention_mask": mask}


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("before", [positions_from_zero, forgetting])
@pytest.mark.parametrize("base", [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification])
def test_caches_fail(before, base, static):
    with pytest.raises(AssertionError, match="cached against uncached"):
        battery.check_cache(wrapped(before=before, base=base), static=static)


def test_caches_fail_where_cached_padding_is_forgotten():
    wrong = wrapped(before=blind_to_cached_padding)
    with pytest.raises(AssertionError, match="cached against uncached, left padding"):
        battery.check_cache(wrong, static=False)


def test_saving_fails_where_a_weight_is_lost(tmp_path):
    class LosingForCausalLM(LlamaForCausalLM):
        _keys_to_ignore_on_save = ("model.norm.weight",)

    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        battery.check_round_trip(case(LosingForCausalLM), tmp_path / "reported")

    class HidingForCausalLM(LosingForCausalLM):
        _keys_to_ignore_on_load_missing = ("model.norm.weight",)

    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        battery.check_round_trip(case(HidingForCausalLM), tmp_path / "hidden")


def test_saving_fails_where_the_config_loses_a_key(tmp_path):
    class ForgettingForCausalLM(LlamaForCausalLM):
        def save_pretrained(self, folder, **kwargs):
            super().save_pretrained(folder, **kwargs)
            file = Path(folder) / "config.json"
            values = json.loads(file.read_text())
            del values["rope_theta"]
            file.write_text(json.dumps(values))

    with pytest.raises(AssertionError):
        battery.check_round_trip(case(ForgettingForCausalLM, rope_theta=123.0), tmp_path)


def test_saving_fails_where_the_files_differ(tmp_path):
    class ChattyForCausalLM(LlamaForCausalLM):
        saves = 0

        def save_pretrained(self, folder, **kwargs):
            super().save_pretrained(folder, **kwargs)
            type(self).saves += 1
            (Path(folder) / "note.txt").write_text(str(self.saves))

    with pytest.raises(AssertionError, match=r"note\.txt"):
        battery.check_round_trip(case(ChattyForCausalLM), tmp_path)


def test_pickles_fail():
    def local(model):
        model.model.layers[0].mlp.act_fn = lambda x: x * torch.sigmoid(x)

    with pytest.raises(Exception, match="pickle"):
        battery.check_pickle(broken(local))


def read_a_value(model, out):
    if out.logits.sum().item() > 1e9:
        raise ValueError("never")
    return out


def break_on_purpose(model, out):
    torch._dynamo.graph_break()
    return out


@pytest.mark.parametrize("after", [read_a_value, break_on_purpose])
def test_compiling_fails_at_a_graph_break(after):
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        battery.check_compiled(wrapped(after=after))
    torch._dynamo.reset()


def test_compiling_fails_where_the_graph_computes_something_else():
    def other(model, out):
        if torch.compiler.is_compiling():
            return dataclasses.replace(out, logits=out.logits * 1.001)
        return out

    with pytest.raises(AssertionError, match="logits compiled"):
        battery.check_compiled(wrapped(after=other))
    torch._dynamo.reset()


# -- the skeleton --------------------------------------------------------------------------------


def changed(**kwargs):
    return lambda config, head: dataclasses.replace(skeleton(config, head), **kwargs)


def with_params(change):
    def promise(config, head):
        promised = skeleton(config, head)
        params = dict(promised.params)
        change(params)
        return dataclasses.replace(promised, params=params)

    return promise


NORM = "model.layers.1.input_layernorm.weight"
WRONG_SKELETONS = {
    "a weight less": (with_params(lambda params: params.pop(NORM)), NORM),
    "a weight more": (
        with_params(lambda params: params.update(extra=dataclasses.replace(params[NORM], key="extra"))),
        "extra",
    ),
    "another shape": (
        with_params(lambda params: params.update({NORM: dataclasses.replace(params[NORM], shape=(33,))})),
        "shapes differ",
    ),
    "no tie": (changed(ties={}), "ties"),
    "another block": (
        with_params(lambda params: params.update({NORM: dataclasses.replace(params[NORM], block=None)})),
        "is in block None, not model.layers.1",
    ),
}


@pytest.mark.parametrize("name", WRONG_SKELETONS)
def test_skeletons_fail(name):
    promise, text = WRONG_SKELETONS[name]
    with pytest.raises(AssertionError, match=text):
        battery.check_skeleton(case(), promise, "Llama")


# -- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (LlamaForCausalLM, {"input_ids", "labels"}),
        (LlamaForSequenceClassification, {"input_ids", "labels"}),
        (LlamaForQuestionAnswering, {"input_ids", "start_positions", "end_positions"}),
    ],
)
def test_labels_of_a_case(cls, keys):
    row = case(cls)
    model = row.build()
    assert row.with_labels(row.inputs(model.config), model.config).keys() == keys
    assert model(**row.with_labels(row.inputs(model.config), model.config)).loss is not None


def test_a_headless_class_has_no_labels():
    row = case(LlamaModel)
    config = row.build().config
    assert row.with_labels(row.inputs(config), config) is None


def test_cases_are_seeded_and_hide_no_multiplication():
    row = case()
    first, second = row.build(), row.build()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.std() > 0.01, name
    padded = row.inputs(first.config, "left")
    assert padded["attention_mask"][0].tolist() == [0] * 4 + [1] * 7
    assert (padded["input_ids"][0, :4] == 0).all() and (padded["attention_mask"][1:] == 1).all()
