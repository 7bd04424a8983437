# SPDX-License-Identifier: Apache-2.0
"""What each kind of cache costs: bytes held after a long prompt, and tokens a second behind it.

A Llama of SmolLM2-135M's shape with random weights in bfloat16, greedy, batch 1, on two threads:
``python benchmarks/caches.py [PROMPT_TOKENS] [NEW_TOKENS]``. Prints one line for each kind.
"""

from __future__ import annotations

import sys
import time

import torch

from pretrained import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": True,
    "eos_token_id": None,
}
WINDOW = 512
KINDS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "quantized, 8 bits": {"cache_implementation": "quantized", "cache_config": {"nbits": 8}},
    "quantized, 4 bits": {"cache_implementation": "quantized", "cache_config": {"nbits": 4}},
    "quantized, 2 bits": {"cache_implementation": "quantized", "cache_config": {"nbits": 2}},
}
WINDOWED = {
    f"window of {WINDOW}, dynamic": {},
    f"window of {WINDOW}, sliding_window": {"cache_implementation": "sliding_window"},
    f"window of {WINDOW}, dynamic_full": {"cache_implementation": "dynamic_full"},
}


def measure(
    model: torch.nn.Module, ids: torch.Tensor, new: int, settings: dict[str, object]
) -> tuple[float, float]:
    """Return mebibytes that the cache holds at the end, and new tokens a second after the first."""
    times = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    out = model.generate(
        ids,
        max_new_tokens=new,
        return_dict_in_generate=True,
        streamer=Clock(),
        weight_copies=False,
        **settings,
    )
    # The first put is the prompt, the second the first new token.
    return out.past_key_values.nbytes / 2**20, (new - 1) / (times[-1] - times[1])


def main() -> None:
    """Measure every kind and print it."""
    prompt, new = (int(value) for value in (*sys.argv[1:], "2048", "33")[:2])
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for cls, config, kinds in (
        (LlamaForCausalLM, LlamaConfig(**SHAPE), KINDS),
        (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=WINDOW), WINDOWED),
    ):
        model = cls(config).to(torch.bfloat16).eval()
        ids = torch.randint(3, 49152, (1, prompt))
        model.generate(ids[:, :64], max_new_tokens=8)
        for name, settings in kinds.items():
            size, speed = measure(model, ids, new, settings)
            print(f"{name:28} {size:8.1f} MiB {speed:7.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
