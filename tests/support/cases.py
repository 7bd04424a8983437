# SPDX-License-Identifier: Apache-2.0
"""The table of the battery: every class of every family, and every config fact that changes the maths."""

from pretrained.testing.battery import Case
from pretrained.torch.models import llama, mistral, qwen2, qwen3, smollm3
from support.cases_bert import BERT_CASES
from support.cases_gpt2 import GPT2_CASES
from support.cases_t5 import T5_CASES

TINY_LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.1, 2.2, 4.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}


def llama_case(cls, name="", **config):
    return Case(cls, {**TINY_LLAMA, **config}, name=f"{cls.__name__}{'-' + name if name else ''}")


LLAMA_CASES = [
    llama_case(llama.LlamaModel),
    llama_case(llama.LlamaForCausalLM),
    llama_case(llama.LlamaForCausalLM, "tied", tie_word_embeddings=True),
    llama_case(llama.LlamaForCausalLM, "mha", num_key_value_heads=None),
    llama_case(llama.LlamaForCausalLM, "mqa", num_key_value_heads=1),
    llama_case(llama.LlamaForCausalLM, "biases", attention_bias=True, mlp_bias=True),
    llama_case(llama.LlamaForCausalLM, "head_dim", head_dim=16, hidden_size=36),
    llama_case(llama.LlamaForCausalLM, "gelu", hidden_act="gelu"),
    llama_case(llama.LlamaForCausalLM, "linear", rope_scaling={"type": "linear", "factor": 2.0}),
    llama_case(llama.LlamaForCausalLM, "dynamic", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    llama_case(llama.LlamaForCausalLM, "yarn", rope_scaling=YARN),
    llama_case(llama.LlamaForCausalLM, "llama3", rope_scaling=LLAMA3, rope_theta=500000.0),
    llama_case(llama.LlamaForCausalLM, "longrope", rope_scaling=LONGROPE),
    llama_case(llama.LlamaForSequenceClassification, num_labels=3),
    llama_case(llama.LlamaForTokenClassification, num_labels=3),
    llama_case(llama.LlamaForQuestionAnswering),
    llama_case(mistral.MistralModel, sliding_window=4),
    llama_case(mistral.MistralForCausalLM, sliding_window=4),
    llama_case(mistral.MistralForCausalLM, "no-window", sliding_window=None),
    llama_case(mistral.MistralForSequenceClassification, num_labels=3),
    llama_case(mistral.MistralForTokenClassification, num_labels=3),
    llama_case(mistral.MistralForQuestionAnswering),
    llama_case(qwen2.Qwen2Model),
    llama_case(qwen2.Qwen2ForCausalLM),
    llama_case(
        qwen2.Qwen2ForCausalLM, "window", use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    llama_case(qwen2.Qwen2ForSequenceClassification, num_labels=3),
    llama_case(qwen2.Qwen2ForTokenClassification, num_labels=3),
    llama_case(qwen2.Qwen2ForQuestionAnswering),
    llama_case(qwen3.Qwen3Model, head_dim=16),
    llama_case(qwen3.Qwen3ForCausalLM, head_dim=16),
    llama_case(
        qwen3.Qwen3ForCausalLM, "tied-biases", head_dim=8, tie_word_embeddings=True, attention_bias=True
    ),
    llama_case(qwen3.Qwen3ForSequenceClassification, head_dim=16, num_labels=3),
    llama_case(qwen3.Qwen3ForTokenClassification, head_dim=16, num_labels=3),
    llama_case(qwen3.Qwen3ForQuestionAnswering, head_dim=16),
    llama_case(smollm3.SmolLM3Model, num_hidden_layers=4),
    llama_case(smollm3.SmolLM3ForCausalLM, num_hidden_layers=4),
    llama_case(
        smollm3.SmolLM3ForCausalLM, "window", num_hidden_layers=4, use_sliding_window=True, sliding_window=5
    ),
    llama_case(smollm3.SmolLM3ForCausalLM, "nope-list", no_rope_layers=[0, 1], tie_word_embeddings=False),
    llama_case(smollm3.SmolLM3ForSequenceClassification, num_labels=3),
    llama_case(smollm3.SmolLM3ForTokenClassification, num_labels=3),
    llama_case(smollm3.SmolLM3ForQuestionAnswering),
]

# Each architecture adds its rows here: (cases, arch module's skeleton, names of its families).
CASES = [*LLAMA_CASES, *T5_CASES, *BERT_CASES, *GPT2_CASES]
