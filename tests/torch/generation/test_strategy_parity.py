# SPDX-License-Identifier: Apache-2.0
"""Tokens equal transformers' for every strategy that it has, on every kind of model, batch and weights.

Contrastive search, DoLa, groups of beams and constraints have tests of their own: transformers runs them from
code on the Hub only.
"""

import pytest
import torch
import transformers

from pretrained import AutoModelForCausalLM, AutoTokenizer
from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration
from support.oracle import transformers_twin
from support.trained import next_digits, trained_t5

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
RANDOM = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **TOKENS,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=61,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
    ),
}
ENDS = [2, 7, 11, 30, 41]
# Not 0: transformers takes that for "none" in beam search, and fills with an end instead.
PADDING = {"pad_token_id": 3}


class Case:
    """Two models with the same weights, and what they are asked: one row, and a padded batch."""

    def __init__(self, ours, theirs, one, batch, settings, new_tokens):
        self.ours, self.theirs = ours, theirs
        self.inputs = {"one": one, "batch": batch}
        self.settings = settings
        self.assistants = None
        self.new_tokens = new_tokens
        self.large = ours.num_parameters() > 10**8


def random_model(name, seed):
    cls, config = RANDOM[name]
    torch.manual_seed(seed)
    model = cls(config).eval()
    for parameter in model.parameters():
        # Wide enough that the scores of random weights differ clearly.
        parameter.data.normal_(0, 0.3)
    return model


def random_case(name):
    model = random_model(name, 3)
    ids = torch.randint(4, 61, (3, 9), generator=torch.Generator().manual_seed(4))
    # Something for prompt lookup to find.
    ids[:, 5:8] = ids[:, 1:4]
    mask = torch.ones_like(ids)
    for row in (1, 2):
        at = slice(None, 2 * row) if name != "t5" else slice(9 - 2 * row, None)
        ids[row, at], mask[row, at] = PADDING["pad_token_id"], 0
    one = {"input_ids": ids[:1]}
    batch = {"input_ids": ids, "attention_mask": mask}
    case = Case(model, transformers_twin(model), one, batch, {"eos_token_id": ENDS, **PADDING}, 12)
    draft = random_model(name, 3)
    for parameter in draft.parameters():
        # Right often, not always.
        parameter.data += 0.03 * torch.randn_like(parameter)
    case.assistants = draft, transformers_twin(draft)
    return case


def trained_case():
    model = trained_t5()
    ids, _ = next_digits(4, torch.Generator().manual_seed(9))
    mask = (ids != 0).long()
    one = {"input_ids": ids[:1, : int(mask[0].sum())]}
    return Case(model, transformers_twin(model), one, {"input_ids": ids, "attention_mask": mask}, PADDING, 10)


def smollm2_case(file):
    model = AutoModelForCausalLM.from_pretrained(file)
    tokenizer = AutoTokenizer.from_pretrained(file, padding_side="left")
    config = transformers.LlamaConfig.from_dict(model.config.to_diff_dict())
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(config)
    # The same storage: one copy of the weights is enough for both.
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    texts = ["One two three four, one two three four, one two", "The capital of France is"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    one = tokenizer(texts[:1], return_tensors="pt")
    ends = {"pad_token_id": 2}
    return Case(
        model, twin.eval(), dict(one), {k: batch[k] for k in ("input_ids", "attention_mask")}, ends, 5
    )


@pytest.fixture(
    scope="module", params=[*RANDOM, "trained t5", pytest.param("smollm2", marks=pytest.mark.realweights)]
)
def case(request):
    if request.param == "smollm2":
        return smollm2_case(request.getfixturevalue("smollm2_gguf"))
    return trained_case() if request.param == "trained t5" else random_case(request.param)


STRATEGIES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "sample, filtered": {"do_sample": True, "temperature": 1.3, "top_k": 8, "top_p": 0.9},
    "sample, several": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "rules": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "watermark": {"watermarking_config": {"bias": 3.0}},
    "guidance": {"guidance_scale": 1.6},
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "beams, early": {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.2},
    "beams, never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 1.4},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "beam sample, filtered": {
        "num_beams": 3,
        "do_sample": True,
        "top_k": 0,
        "top_p": 0.8,
        "temperature": 1.2,
    },
    "beams, watermark": {"num_beams": 2, "watermarking_config": {"bias": 3.0}},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"num_assistant_tokens": 4},
}
# Enough for a large model, where each takes seconds.
LARGE = {"greedy", "sample, filtered", "rules", "guidance", "beams", "beam sample", "prompt lookup"}
# What transformers runs for one row only, gives the tokens of greedy decoding.
ALONE = {"prompt lookup", "assisted"}


def settings_of(case, name):
    settings = {"max_new_tokens": case.new_tokens, **case.settings, **STRATEGIES[name]}
    theirs = dict(settings)
    if "watermarking_config" in theirs:
        theirs["watermarking_config"] = transformers.WatermarkingConfig(**theirs["watermarking_config"])
    if name == "assisted":
        settings["assistant_model"], theirs["assistant_model"] = case.assistants
    return settings, theirs


@pytest.mark.parametrize("size", ["one", "batch"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_tokens_equal_transformers(case, name, size):
    if name == "guidance" and case.ours.config.is_encoder_decoder:
        pytest.skip("transformers has no guidance for encoder-decoders")
    if case.large and name not in LARGE:
        pytest.skip("enough on small models")
    if name == "assisted" and case.assistants is None:
        pytest.skip("there is no smaller model of the kind")
    settings, theirs = settings_of(case, name)
    if name in ALONE and size == "batch":
        for key in (*STRATEGIES[name], "assistant_model"):
            theirs.pop(key, None)
    torch.manual_seed(5)
    expected = case.theirs.generate(**case.inputs[size], **theirs)
    torch.manual_seed(5)
    found = case.ours.generate(**case.inputs[size], **settings)
    assert found.tolist() == expected.tolist()


def test_the_trained_model_has_learned_its_task():
    """Else it would be one more random model."""
    ids, labels = next_digits(50, torch.Generator().manual_seed(2))
    found = trained_t5().generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=7)[:, 1:]
    right = (found == labels[:, : found.shape[1]]) | (labels[:, : found.shape[1]] == 0)
    assert right.float().mean() > 0.8
