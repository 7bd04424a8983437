# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding, SmolLM2-135M in float32 and bfloat16, batch 1: tokens a second after a warm-up."""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

_PROGRAM = """
import json, time
import torch
from pretrained import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({file}, dtype="{dtype}")
{adopt}
torch.manual_seed(0)
ids = torch.randint(1000, 2000, (1, 64))
mask = torch.ones_like(ids)
model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)
start = time.perf_counter()
model.generate(ids, attention_mask=mask, max_new_tokens=128, min_new_tokens=128, do_sample=False)
print(json.dumps(dict(tokens_per_s=128 / (time.perf_counter() - start))))
"""

# The peer takes half a minute to read the file; it gets our weights, which the tests prove equal.
_ADOPT = """
import transformers
config = transformers.LlamaConfig.from_dict(model.config.to_diff_dict())
twin = transformers.LlamaForCausalLM(config).to(model.dtype).eval()
twin.load_state_dict(model.state_dict())
model = twin
"""


def run() -> list[Comparison]:
    """Compare with transformers."""
    file = repr(str(SMOLLM2))
    target = Target("no slower", "tokens_per_s", least=1.0, against=PEER)
    return [
        compare(
            f"Greedy decoding, SmolLM2-135M, {dtype}",
            {
                OURS: _PROGRAM.format(file=file, dtype=dtype, adopt=""),
                PEER: _PROGRAM.format(file=file, dtype=dtype, adopt=_ADOPT),
            },
            [target],
        )
        for dtype in ("float32", "bfloat16")
    ]
