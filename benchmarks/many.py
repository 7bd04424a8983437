# SPDX-License-Identifier: Apache-2.0
"""32 prompts of mixed lengths with answers of mixed lengths, SmolLM2-135M: new tokens a second in all.

Both libraries batch continuously; the third side is ours without that: padded batches of eight, sorted by
length, each until its longest answer is whole.
"""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

PADDED = "ours, padded batches"

_PROGRAM = """
import json, time
import torch
from pretrained import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({file}, dtype="{dtype}")
generator = torch.Generator().manual_seed(0)
def lengths(least, most):
    return torch.randint(least, most + 1, (32,), generator=generator).tolist()
prompts = [torch.randint(1000, 2000, (n,), generator=generator).tolist() for n in lengths(16, 256)]
answers = lengths(8, 64)
{side}
answer(prompts[:2], [4, 4])
start = time.perf_counter()
answer(prompts, answers)
print(json.dumps(dict(tokens_per_s=sum(answers) / (time.perf_counter() - start))))
"""

_OURS = """
def answer(prompts, answers):
    own = [dict(max_new_tokens=n) for n in answers]
    found = model.generate_batch(prompts, per_request=own, eos_token_id=None)
    assert [len(one.generated_tokens) for one in found.values()] == answers
"""

_PADDED = """
def answer(prompts, answers):
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), 8):
        rows = order[first : first + 8]
        longest = max(len(prompts[row]) for row in rows)
        padding = [longest - len(prompts[row]) for row in rows]
        ids = torch.tensor([[0] * n + prompts[row] for n, row in zip(padding, rows)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        count = max(answers[row] for row in rows)
        model.generate(ids, attention_mask=mask, max_new_tokens=count, eos_token_id=None, pad_token_id=0)
"""

# The peer takes half a minute to read the file; it gets our weights, which the tests prove equal.
_PEER = """
import transformers
config = transformers.LlamaConfig.from_dict(model.config.to_diff_dict())
config._attn_implementation = "sdpa"
twin = transformers.LlamaForCausalLM(config).to(model.dtype).eval()
twin.load_state_dict(model.state_dict())
settings = transformers.GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)
batching = transformers.ContinuousBatchingConfig(num_blocks=256, page_size=32, max_batch_tokens=256)
def answer(prompts, answers):
    with twin.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching, warmup=False
    ) as manager:
        for prompt, count in zip(prompts, answers):
            manager.add_request(prompt, max_new_tokens=count)
        left = len(prompts)
        while left:
            one = manager.get_result(timeout=5)
            assert one is not None or manager.is_running()
            if one is not None and one.is_finished():
                assert one.error is None, one.error
                left -= 1
"""


def run(dtypes: tuple[str, ...] = ("bfloat16", "float32"), runs: int = 3) -> list[Comparison]:
    """Compare with transformers' continuous batches, and with padded ones of ours.

    Args:
        dtypes: Rows to measure.
        runs: Rounds that count.
    """
    sides = {OURS: _OURS, PEER: _PEER, PADDED: _PADDED}
    targets = [
        Target("1.5 times the tokens a second", "tokens_per_s", least=1.5, against=PEER),
        Target("ahead of padded batches", "tokens_per_s", least=1.0, against=PADDED),
    ]
    return [
        compare(
            f"32 mixed prompts together, SmolLM2-135M, {dtype}",
            {
                name: _PROGRAM.format(file=repr(str(SMOLLM2)), dtype=dtype, side=side)
                for name, side in sides.items()
            },
            targets,
            runs=runs,
            warmups=0,
        )
        for dtype in dtypes
    ]
