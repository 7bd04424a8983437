# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of packed weights, SmolLM2-135M from its Q4_1 file, batch 1: tokens a second."""

from measure import OURS, SMOLLM2, Comparison, Side, Target, compare

_LLAMA = "llama.cpp"

_PROGRAM = """
import json, time
import torch
torch.manual_seed(0)
ids = torch.randint(1000, 2000, (1, 64))
{load}
def seconds(new):
    start = time.perf_counter()
    assert run(new) == new
    return time.perf_counter() - start
seconds(8)
print(json.dumps(dict(tokens_per_s=128 / min(seconds(128) for _ in range(3)))))
"""

_OURS = """
from pretrained import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({file}, dtype="bfloat16", quantization_config={how})
def run(new):
    limits = dict(max_new_tokens=new, min_new_tokens=new)
    return model.generate(ids, do_sample=False, **limits).shape[1] - 64
"""

_PEER = """
from llama_cpp import Llama
threads = torch.get_num_threads()
model = Llama({file}, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False)
def run(new):
    for count, _ in enumerate(model.generate(ids[0].tolist(), top_k=1, temp=0.0, repeat_penalty=1.0), 1):
        if count == new:
            return count
"""


def run() -> list[Comparison]:
    """Compare with llama.cpp."""
    file = repr(str(SMOLLM2))
    schemes = {OURS: "gguf", "ours, quantized to int4": "int4", "ours, quantized to int8": "int8"}
    sides: dict[str, Side | str] = {
        name: _PROGRAM.format(load=_OURS.format(file=file, how={"quant_method": method}))
        for name, method in schemes.items()
    }
    sides[_LLAMA] = Side(_PROGRAM.format(load=_PEER.format(file=file)), may_fail=True)
    return [
        compare(
            "Decoding, SmolLM2-135M from its Q4_1 file, packed",
            sides,
            [Target("no slower than llama.cpp", "tokens_per_s", least=1.0, against=_LLAMA)],
            runs=3,
            note="""Whole calls: a prompt of 64 tokens is read, too. The rows of int4 and int8 quantize the
            file's values again.""",
        )
    ]
