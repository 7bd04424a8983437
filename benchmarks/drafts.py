# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of SmolLM2-135M, batch 1: tokens a second after a warm-up, with drafts and without.

One row repeats a text and looks in it; the other has a small model draft. As there is no trained one beside
this model, it is made of the model's first layers, and the later ones are damped in the model, so that the
two agree as often as with a good draft: four of five or so.
"""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

PLAIN = "ours, without drafts"

_PROGRAM = """
import copy, json, time
import torch
from pretrained import AutoModelForCausalLM, AutoTokenizer
file = {file}
model = AutoModelForCausalLM.from_pretrained(file, dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained(file)
ids = tokenizer("The quick brown fox jumps over the lazy dog near the river bank. " * 4, return_tensors="pt")
ids = ids["input_ids"]
drafts = dict()
{draft}
{adopt}
mask = torch.ones_like(ids)
def run(count):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, **drafts
    )
run(40)
start = time.perf_counter()
run(96)
print(json.dumps(dict(tokens_per_s=96 / (time.perf_counter() - start))))
"""

_LOOKUP = """
drafts = dict(prompt_lookup_num_tokens=10)
"""

_DAMP = """
with torch.no_grad():
    for layer in model.model.layers[4:]:
        layer.self_attn.o_proj.weight.mul_(0.005)
        layer.mlp.down_proj.weight.mul_(0.005)
"""

_SMALL = (
    _DAMP
    + """
from pretrained import LlamaForCausalLM
config = copy.deepcopy(model.config)
config.num_hidden_layers = 4
small = LlamaForCausalLM(config).to(model.dtype).eval()
small.load_state_dict(model.state_dict(), strict=False)
drafts = dict(assistant_model=small)
for one in (model, small):
    one.generation_config.num_assistant_tokens = 5
    one.generation_config.assistant_confidence_threshold = 0.0
"""
)

# The peer takes half a minute to read the file; it gets our weights, which the tests prove equal.
_ADOPT = """
import transformers
def adopt(ours):
    config = transformers.LlamaConfig.from_dict(ours.config.to_diff_dict())
    twin = transformers.LlamaForCausalLM(config).to(ours.dtype).eval()
    twin.load_state_dict(ours.state_dict())
    twin.generation_config.num_assistant_tokens = 5
    twin.generation_config.assistant_confidence_threshold = 0.0
    return twin
model = adopt(model)
if "assistant_model" in drafts:
    drafts["assistant_model"] = adopt(drafts["assistant_model"])
"""

_ROWS = {
    "Prompt lookup on a repetitive text, SmolLM2-135M": (_LOOKUP, ""),
    "Assisted by 4 of its 30 layers, SmolLM2-135M with the others damped": (_SMALL, _DAMP),
}


def run() -> list[Comparison]:
    """Compare with transformers, and with decoding without drafts."""
    targets = [
        Target("ahead of transformers", "tokens_per_s", least=1.0, against=PEER),
        Target("ahead of decoding without drafts", "tokens_per_s", least=1.0, against=PLAIN),
    ]
    return [
        compare(f"{claim}, {dtype}", _sides(dtype, draft, plain), targets, runs=3)
        for claim, (draft, plain) in _ROWS.items()
        for dtype in ("float32", "bfloat16")
    ]


def _sides(dtype: str, draft: str, plain: str) -> dict[str, str]:
    common = {"file": repr(str(SMOLLM2)), "dtype": dtype}
    return {
        OURS: _PROGRAM.format(**common, draft=draft, adopt=""),
        PLAIN: _PROGRAM.format(**common, draft=plain, adopt=""),
        PEER: _PROGRAM.format(**common, draft=draft, adopt=_ADOPT),
    }
