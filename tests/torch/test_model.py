# SPDX-License-Identifier: Apache-2.0
"""`PreTrainedModel`: construction, new weights, ties, embeddings and facts."""

import re
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import nn

from pretrained.arch.llama import LlamaConfig
from pretrained.core.config import PreTrainedConfig
from pretrained.errors import ArgumentError, UnknownArgumentError
from pretrained.testing.battery import Case
from pretrained.torch.model import PreTrainedModel
from pretrained.torch.models.bert import BertModel
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaModel,
)
from pretrained.torch.models.t5 import T5EncoderModel, T5ForConditionalGeneration, T5Model
from support.cases import TINY_LLAMA

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class OwnConfig(PreTrainedConfig):
    """A third party's config."""

    model_type = "own"
    hidden_size: int = 64
    vocab_size: int = 50
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02


class OwnModel(PreTrainedModel):
    """A third party's headless model."""

    config_class = OwnConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()


class OwnForCausalLM(PreTrainedModel):
    """A third party's model with a head."""

    config_class = OwnConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = [HEAD]

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def generate(self):
        """Stand in for a mixin."""


def tiny(cls=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    return cls(LlamaConfig(**{**TINY_LLAMA, **config}))


# -- construction --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{"vocab_size": 3}, "some/model", None, LlamaConfig])
def test_a_model_is_built_from_a_config(config):
    text = (
        rf"LlamaModel is built from a config object \(config\): expected a PreTrainedConfig, found "
        rf"{type(config).__name__}\. To load a model by name or path use LlamaModel\.from_pretrained"
    )
    for build in (LlamaModel, LlamaModel.from_config, LlamaModel._from_config):
        with pytest.raises(ArgumentError, match=text):
            build(config)


def test_what_a_new_model_knows():
    config = LlamaConfig(**TINY_LLAMA, _name_or_path="some/where")
    model = LlamaForCausalLM(config)
    assert model.config is config and model.model.config is config
    assert model.name_or_path == "some/where" and model.warnings_issued == {}
    assert model.framework == "pt" and model.main_input_name == "input_ids"
    assert model.generation_config.eos_token_id == 2 and model.model.generation_config is None
    assert model.training
    ids = model.dummy_inputs["input_ids"]
    assert ids.shape == (3, 5) and model(ids).logits.shape == (3, 5, 99)


@pytest.mark.parametrize(
    ("cls", "can"),
    [
        (LlamaForCausalLM, True),
        (GPT2LMHeadModel, True),
        (T5ForConditionalGeneration, True),
        (OwnForCausalLM, True),
        (LlamaModel, False),
        (LlamaForSequenceClassification, False),
        (BertModel, False),
        (T5Model, False),
        (T5EncoderModel, False),
        (OwnModel, False),
    ],
)
def test_what_can_generate(cls, can):
    assert cls.can_generate() is can


def test_the_base_model():
    model = tiny()
    assert model.base_model is model.model and model.model.base_model is model.model
    answering = tiny(LlamaForQuestionAnswering)
    assert answering.base_model is answering.transformer
    own = OwnModel(OwnConfig())
    assert own.base_model is own


# -- new weights ---------------------------------------------------------------------------------


def test_new_weights_are_initialised_once():
    counts = Counter()

    class Counting(LlamaForCausalLM):
        def _init_weights(self, module):
            counts[type(module)] += 1
            super()._init_weights(module)

    class CountingModel(LlamaModel):
        def _init_weights(self, module):
            counts[type(module)] += 1
            super()._init_weights(module)

    Counting._base_class = CountingModel
    config = LlamaConfig(**TINY_LLAMA)
    Counting(config)
    expected = Counter(type(module) for module in Counting(config).modules())
    assert counts == Counter({kind: 2 * count for kind, count in expected.items()})


def test_post_init_leaves_initialised_weights_alone():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(7.0)
    model.post_init()
    model.init_weights()
    model.initialize_weights()
    assert (model.lm_head.weight == 7).all()


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_new_weights_have_the_published_spread(std):
    config = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "initializer_range": std}
    model = tiny(**config, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # Of n normal numbers the standard deviation is known to std / sqrt(2 n): five of those.
            free = parameter[1:] if "embed" in name else parameter
            assert abs(free.std() - std) < 5 * std / (2 * free.numel()) ** 0.5, name
            assert abs(free.mean()) < 5 * std / free.numel() ** 0.5, name
    assert (model.model.embed_tokens.weight[0] == 0).all()  # the padding's


def test_seeds_decide_about_new_weights():
    config = LlamaConfig(**TINY_LLAMA)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM.from_config(config).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert not torch.equal(models[0][HEAD], models[2][HEAD])


@pytest.mark.parametrize("build", [OwnForCausalLM, OwnForCausalLM.from_config])
def test_a_class_may_initialise_in_its_own_way(build):
    class Sevens(OwnForCausalLM):
        def _init_weights(self, module):
            super()._init_weights(module)
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 7.0)

    model = (Sevens if build is OwnForCausalLM else Sevens.from_config)(OwnConfig())
    assert (model.lm_head.weight == 7).all() and (model.lm_head.bias == 0).all()
    assert 0.01 < model.model.embed_tokens.weight.std() < 0.03


def test_a_weight_that_nothing_initialises_is_reported():
    class Forgetful(OwnModel):
        def __init__(self, config):
            super().__init__(config)
            self.scale = nn.Parameter(torch.empty(3))

    text = (
        r"Forgetful does not say how to initialise 'scale' \(scale\)\. "
        r"Handle its module in _init_weights\(module\), or give the module that owns a derived buffer"
    )
    with pytest.raises(ArgumentError, match=text):
        Forgetful.from_config(OwnConfig())


def test_a_derived_buffer_that_nothing_computes_is_reported():
    class Forgetful(OwnModel):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    assert Forgetful(OwnConfig()).table.tolist() == [0, 1, 2]
    with pytest.raises(ArgumentError, match="Forgetful does not say how to initialise 'table'"):
        Forgetful.from_config(OwnConfig())


# -- from_config ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_config", "argument", "dtype"),
    [
        (None, None, torch.float32),
        (None, "auto", torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        (None, "float16", torch.float16),
        (None, torch.float16, torch.float16),
        (None, "torch.bfloat16", torch.bfloat16),
        ("float16", torch.bfloat16, torch.bfloat16),
        (None, "fp16", torch.float16),
    ],
)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_of_a_model_from_a_config(in_config, argument, dtype, name):
    config = LlamaConfig(**TINY_LLAMA, dtype=in_config)
    model = LlamaForCausalLM.from_config(config, **{name: argument})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert f"torch.{model.config.dtype}" == str(dtype)
    assert torch.get_default_dtype() == torch.float32


def test_a_model_from_a_config_has_a_config_of_its_own():
    config = LlamaConfig(**TINY_LLAMA)
    model = LlamaForCausalLM.from_config(config, attn_implementation="eager", dtype="bfloat16")
    assert model.config is not config and model.config is model.model.config
    assert (config.attn_implementation, config.dtype) == (None, None)
    assert (model.config.attn_implementation, model.config.dtype) == ("eager", "bfloat16")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dtype": "int8"}, ArgumentError, r"Weights cannot be loaded as int8 \(dtype\)"),
        ({"dtype": "float23"}, ArgumentError, "float23"),
        ({"attn_implementation": "egaer"}, ArgumentError, r"Did you mean 'eager'\?"),
        ({"nonsense": 3}, UnknownArgumentError, "LlamaModel does not know the argument 'nonsense'"),
    ],
)
def test_arguments_that_cannot_work(arguments, error, text):
    with pytest.raises(error, match=text):
        LlamaModel.from_config(LlamaConfig(**TINY_LLAMA), **arguments)


@pytest.mark.parametrize("build", [LlamaForCausalLM, LlamaForCausalLM.from_config])
def test_models_without_memory(build):
    config = LlamaConfig(**TINY_LLAMA, tie_word_embeddings=True)
    with torch.device("meta"):
        model = build(config)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == tiny(tie_word_embeddings=True).num_parameters()


def test_a_model_without_memory_in_a_dtype():
    with torch.device("meta"):
        model = LlamaForCausalLM.from_config(LlamaConfig(**TINY_LLAMA), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.config.dtype == "bfloat16"
    filled = model.to_empty(device="cpu")
    assert torch.equal(filled.model.rotary_emb.inv_freq, tiny().model.rotary_emb.inv_freq)


# -- ties and embeddings -------------------------------------------------------------------------


def test_ties_follow_the_config():
    tied, free = tiny(tie_word_embeddings=True), tiny()
    assert tied.ties() == {HEAD: EMBEDDING} and free.ties() == {}
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert free.lm_head.weight is not free.model.embed_tokens.weight
    assert tiny(LlamaModel, tie_word_embeddings=True).ties() == {}


def test_ties_given_as_a_list_go_to_the_embedding():
    tied = OwnForCausalLM(OwnConfig(tie_word_embeddings=True))
    assert tied.ties() == {HEAD: EMBEDDING}
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert OwnForCausalLM(OwnConfig()).ties() == {}


@pytest.mark.parametrize("cls", [LlamaForCausalLM, OwnForCausalLM])
def test_ties_survive_saving_and_moving(cls, tmp_path):
    config = LlamaConfig(**TINY_LLAMA) if cls is LlamaForCausalLM else OwnConfig()
    config.tie_word_embeddings = True
    model = cls(config).to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.float())


def test_tie_weights_ties_again():
    model = tiny(tie_word_embeddings=True)
    model.set_output_embeddings(nn.Linear(32, 99, bias=False))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_embeddings_can_be_replaced():
    model = tiny()
    embedding, head = nn.Embedding(120, 32), nn.Linear(32, 120, bias=False)
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.embed_tokens is embedding
    assert model.get_output_embeddings() is model.lm_head is head
    assert model(torch.tensor([[5, 110]])).logits.shape == (1, 2, 120)
    assert not {EMBEDDING, HEAD} - model.state_dict().keys()


def test_a_headless_model_has_no_output_embedding():
    for model in (tiny(LlamaModel), tiny(LlamaForSequenceClassification)):
        assert model.get_output_embeddings() is None
        text = rf"{type(model).__name__} has no language-model head \(lm_head\)\. If it has one elsewhere"
        with pytest.raises(ArgumentError, match=text):
            model.set_output_embeddings(nn.Linear(32, 99))


def test_a_model_says_where_its_embedding_is():
    class Elsewhere(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.wte = nn.Embedding(3, 4)
            self.post_init()

    model = Elsewhere(OwnConfig())
    text = re.escape("Elsewhere has no token embedding (embed_tokens). If it has one elsewhere, its")
    with pytest.raises(ArgumentError, match=text):
        model.get_input_embeddings()
    with pytest.raises(ArgumentError, match=text):
        model.set_input_embeddings(nn.Embedding(3, 4))
    Elsewhere._input_embedding = "wte"
    assert model.get_input_embeddings() is model.wte


# -- a third party's model goes through the same doors -------------------------------------------


def test_a_third_partys_model_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(vocab_size=7))
    model.save_pretrained(tmp_path)
    again, info = OwnForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    base = OwnModel.from_pretrained(tmp_path)
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_new_head_is_initialised_and_reported(tmp_path):
    Case(LlamaModel, TINY_LLAMA).build().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, info = LlamaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=40, initializer_range=0.5, output_loading_info=True
    )
    assert info["missing_keys"] == ["score.weight"]
    assert abs(model.score.weight.std() - 0.5) < 5 * 0.5 / (2 * 40 * 32) ** 0.5
