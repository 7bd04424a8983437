# SPDX-License-Identifier: Apache-2.0
"""Compiled steps, SmolLM2-135M in float32, batch 1: seconds to compile, and tokens a second afterwards."""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

# The first call compiles; what it takes beyond the second is compiling (and, the second time, looking it up).
_PROGRAM = """
import json, os, shutil, tempfile, time
folder = os.path.join(tempfile.gettempdir(), "pretrained-benchmark-{name}")
if {is_cold}:
    shutil.rmtree(folder, ignore_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
import torch
from pretrained import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({file}, dtype="float32")
settings = dict(max_new_tokens=128, min_new_tokens=128, do_sample=False)
{prepare}
torch.manual_seed(0)
ids = torch.randint(1000, 2000, (1, 64))
settings["attention_mask"] = torch.ones_like(ids)
seconds = []
for _ in range(3):
    start = time.perf_counter()
    model.generate(ids, **settings)
    seconds.append(time.perf_counter() - start)
best = min(seconds[1:])
print(json.dumps(dict(compile_s=seconds[0] - best, tokens_per_s=128 / best)))
"""

_OURS = "settings['compile'] = True"
# The peer takes half a minute to read the file; it gets our weights, which the tests prove equal. On a CPU it
# compiles only where it is told to.
_PEER = """
import transformers
config = transformers.LlamaConfig.from_dict(model.config.to_diff_dict())
twin = transformers.LlamaForCausalLM(config).to(model.dtype).eval()
twin.load_state_dict(model.state_dict())
model = twin
how = transformers.CompileConfig()
how._compile_all_devices = True
settings.update(cache_implementation="static", compile_config=how)
"""
_AGAIN = "ours, in the next process"


def run() -> list[Comparison]:
    """Compare with transformers' static cache and compiling."""

    def program(name: str, prepare: str, *, is_cold: bool) -> str:
        return _PROGRAM.format(file=repr(str(SMOLLM2)), name=name, prepare=prepare, is_cold=is_cold)

    return [
        compare(
            "Compiled steps, SmolLM2-135M, float32",
            {
                OURS: program("ours", _OURS, is_cold=True),
                _AGAIN: program("ours", _OURS, is_cold=False),
                PEER: program("peer", _PEER, is_cold=True),
            },
            [
                Target("under 15 s", "compile_s", most=15.0),
                Target("no slower", "tokens_per_s", least=1.0, against=PEER),
            ],
            # A round takes more than a minute.
            runs=1,
            warmups=0,
        )
    ]
