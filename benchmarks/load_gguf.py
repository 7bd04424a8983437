# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M from its Q4_1 GGUF file: seconds to load model and tokenizer, and the peak of memory."""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

_PROGRAM = """
import json, resource, time
import torch
{imports}
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained({model})
loaded = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained({model})
done = time.perf_counter()
ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
with torch.no_grad():
    first = tokenizer.decode(model(ids).logits[0, -1].argmax())
assert first.strip() == "Paris", first
end = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(model_s=loaded - start, tokenizer_s=done - loaded, both_s=done - start,
                      first_token_s=end - done, peak_bytes=peak)))
"""


def run() -> list[Comparison]:
    """Compare with transformers."""
    names = "AutoModelForCausalLM, AutoTokenizer"
    ours = _PROGRAM.format(imports=f"from pretrained import {names}", model=repr(str(SMOLLM2)))
    folder, file = repr(str(SMOLLM2.parent)), repr(SMOLLM2.name)
    peer = _PROGRAM.format(imports=f"from transformers import {names}", model=f"{folder}, gguf_file={file}")
    target = Target("at most 1 s with the tokenizer", "both_s", most=1.0)
    return [compare("Load SmolLM2-135M from GGUF", {OURS: ours, PEER: peer}, [target])]
