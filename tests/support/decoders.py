# SPDX-License-Identifier: Apache-2.0
"""Small random models of four families, whose scores differ clearly, and prompts for them."""

import torch

from pretrained.arch.gpt2 import GPT2Config
from pretrained.arch.llama import LlamaConfig
from pretrained.arch.t5 import T5Config
from pretrained.torch.models.gpt2 import GPT2LMHeadModel
from pretrained.torch.models.llama import LlamaForCausalLM
from pretrained.torch.models.mistral import MistralForCausalLM
from pretrained.torch.models.t5 import T5ForConditionalGeneration

VOCAB = 61
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralForCausalLM.config_class(**LLAMA, sliding_window=5)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    ),
}
ENDS = [2, 7, 11, 30, 41, 52]


def build(name):
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def prompts(rows=3, length=8):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask


def forbid_forwards(model):
    """Let any run of the model, or of a part of it, fail."""

    def fail(*_):
        raise AssertionError("the model was run")

    for module in model.modules():
        module.register_forward_pre_hook(fail)
    return model
