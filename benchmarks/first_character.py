# SPDX-License-Identifier: Apache-2.0
"""From the start of the process to the first character of the answer, SmolLM2-135M from its GGUF file.

Ours is the command, ``pretrained run``; the peer's side is the script that its pages show: model and
tokenizer from the file, the chat template, a streamer.
"""

from measure import OURS, PEER, SMOLLM2, Comparison, Target, compare

_PROGRAM = """
import json, subprocess, sys, time
start = time.perf_counter()
program = subprocess.Popen({command}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
first = program.stdout.read(1)
seconds = time.perf_counter() - start
rest = program.communicate()[0]
assert first and program.returncode == 0
print(json.dumps(dict(first_token_s=seconds)))
"""

_QUESTION = "What is the capital of France?"

_PEER = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
folder, name = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
messages = [dict(role="user", content={_QUESTION!r})]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
sys.stdout.flush()
"""


def run(runs: int = 3) -> list[Comparison]:
    """Compare the command with transformers' script.

    Args:
        runs: Rounds that count.
    """
    ours = ["-m", "pretrained.cli.main", "run", str(SMOLLM2), _QUESTION, "--max-new-tokens", "8", "--quiet"]
    peer = ["-c", _PEER, str(SMOLLM2.parent), SMOLLM2.name]
    return [
        compare(
            "From the start of the command to the first character, SmolLM2-135M from its GGUF file",
            {
                name: _PROGRAM.format(command=f"[sys.executable, *{words!r}]")
                for name, words in ((OURS, ours), (PEER, peer))
            },
            [Target("under 2.5 s", "first_token_s", most=2.5)],
            runs=runs,
            warmups=1,
        )
    ]
