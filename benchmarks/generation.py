# SPDX-License-Identifier: Apache-2.0
"""Decoding with dense weights: tokens a second of whole calls, a prompt of 64 tokens and 128 new ones.

Both sides hold the same weights. Each process runs a short call first, which also makes what later calls
keep, and then as many measured ones as fit into a few seconds; the best of them counts. Our side also sums a
large array, as fast as this machine reads memory, and says which share of that rate a token is that reads
every weight of the decoder once.
"""

from __future__ import annotations

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

_SMOLLM2 = f"""
from pretrained import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(SMOLLM2)!r}, dtype=dtype)
"""
# One layer of the same sizes and a small vocabulary: what remains is Python and dispatch.
_ONE_LAYER = """
from pretrained import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes)).to(dtype).eval()
"""
_T5 = """
from pretrained import T5Config, T5ForConditionalGeneration
sizes = dict(d_model=512, d_ff=2048, d_kv=64, num_layers=6, num_heads=8)
torch.manual_seed(0)
config = T5Config(vocab_size=32128, decoder_start_token_id=0, **sizes)
model = T5ForConditionalGeneration(config).to(dtype).eval()
"""
# The peer gets our weights, which the tests prove equal.
_ADOPT = """
import transformers
kind = type(model).__name__
config = getattr(transformers, type(model.config).__name__).from_dict(model.config.to_diff_dict())
twin = getattr(transformers, kind)(config).to(model.dtype).eval()
twin.load_state_dict(model.state_dict(), strict=False)
model = twin
"""
_PROGRAM = """
import json, time
import torch
torch.set_num_threads(2)
dtype = torch.{dtype}
{model}
torch.manual_seed(0)
ids = torch.randint(100, min(20000, model.config.vocab_size), ({rows}, 64))
new = 128
settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, num_beams={beams}, pad_token_id=0)
settings.update({settings})
model.generate(ids, **settings, max_new_tokens=4, min_new_tokens=4)
seconds, begin = [], time.perf_counter()
while len(seconds) < 2 or time.perf_counter() - begin < 3:
    start = time.perf_counter()
    found = model.generate(ids, **settings, max_new_tokens=new, min_new_tokens=new)
    seconds.append(time.perf_counter() - start)
    assert found.shape[0] == {rows} and found.shape[1] >= new
figures = dict(tokens_per_s={rows} * new / min(seconds), token_s=min(seconds) / new)
{limit}
print(json.dumps(figures))
"""
_LIMIT = """
array, best = torch.ones(2**26), 1e9
for _ in range(6):
    start = time.perf_counter()
    array.sum()
    best = min(best, time.perf_counter() - start)
decoder = getattr(model, "decoder", model)
read = {w.data_ptr(): w.nbytes for m in (decoder, model.get_output_embeddings()) for w in m.parameters()}
figures["memory_share"] = sum(read.values()) * best / array.nbytes / figures["token_s"]
"""

ROWS: dict[str, tuple[str, str, str, int, int, float]] = {
    # name: title, model, dtype, rows, beams, least ratio to the peer
    "bf16": ("SmolLM2-135M, bfloat16, batch 1", _SMOLLM2, "bfloat16", 1, 1, 2.5),
    "fp32": ("SmolLM2-135M, float32, batch 1", _SMOLLM2, "float32", 1, 1, 2.2),
    "batch": ("SmolLM2-135M, bfloat16, batch 8", _SMOLLM2, "bfloat16", 8, 1, 2.5),
    "t5": ("T5-small's shape, float32", _T5, "float32", 1, 1, 3.0),
    "beams": ("T5-small's shape, float32, 4 beams", _T5, "float32", 1, 4, 2.5),
    "one_layer": ("one layer of SmolLM2's sizes, float32", _ONE_LAYER, "float32", 1, 1, 3.0),
}


def run(names: list[str] | None = None, *, runs: int | None = None) -> list[Comparison]:
    """Compare with transformers.

    Args:
        names: Rows; None for all.
        runs: Rounds that count.
    """
    return [_row(name, runs or 3) for name in names or ROWS]


def _row(name: str, runs: int) -> Comparison:
    title, model, dtype, rows, beams, ratio = ROWS[name]
    common = {"dtype": dtype, "rows": rows, "beams": beams}
    # One layer lies in the processor's cache.
    limit = _LIMIT if name != "one_layer" else ""
    ours = _PROGRAM.format(model=model, settings="weight_copies=True", limit=limit, **common)
    peer = _PROGRAM.format(model=model + _ADOPT, settings="", limit="", **common)
    target = Target(f"at least {ratio:g} times the peer's", "tokens_per_s", least=ratio, against=PEER)
    return compare(f"Decoding, {title}", {OURS: ours, PEER: peer}, [target], runs=runs, warmups=0)
