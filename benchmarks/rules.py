# SPDX-License-Identifier: Apache-2.0
"""Cost of each rule on scores for one step, beside transformers' class of the same name, in one process.

Both are called in turn on the same scores; the least of many rounds counts. Run:
    python benchmarks/rules.py [--vocab 50257] [--rows 1] [--length 256]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers.generation import logits_process

import pretrained


def cases(length: int) -> list[tuple[str, tuple]]:
    """Return class names, each with arguments that make the rule do its work."""
    source = torch.randint(0, 5000, (1, 512))
    words = {tuple(range(i, i + 1 + i % 3)): -2.0 for i in range(100)}
    return [
        ("TemperatureLogitsWarper", (0.7,)),
        ("TopKLogitsWarper", (50,)),
        ("TopPLogitsWarper", (0.9,)),
        ("MinPLogitsWarper", (0.05,)),
        ("MinPLogitsWarper", (0.05, -float("inf"), 3)),
        ("TypicalLogitsWarper", (0.9,)),
        ("EpsilonLogitsWarper", (0.001,)),
        ("EtaLogitsWarper", (0.001,)),
        ("TopHLogitsWarper", (0.5,)),
        ("RepetitionPenaltyLogitsProcessor", (1.2,)),
        ("EncoderRepetitionPenaltyLogitsProcessor", (1.2, source)),
        ("NoRepeatNGramLogitsProcessor", (3,)),
        ("EncoderNoRepeatNGramLogitsProcessor", (3, source)),
        ("SequenceBiasLogitsProcessor", (words,)),
        ("NoBadWordsLogitsProcessor", ([list(word) for word in words], 2)),
        ("MinLengthLogitsProcessor", (length + 5, [2, 3])),
        ("MinNewTokensLengthLogitsProcessor", (length, 5, [2, 3])),
        ("ForcedBOSTokenLogitsProcessor", (1,)),
        ("ForcedEOSTokenLogitsProcessor", (length + 1, [2])),
        ("ExponentialDecayLengthPenalty", ((5, 1.1), [2], 10)),
        ("SuppressTokensLogitsProcessor", (list(range(80)),)),
        ("SuppressTokensAtBeginLogitsProcessor", (list(range(80)), length)),
        ("PrefixConstrainedLogitsProcessor", (lambda row, ids: list(range(20)), 1)),
        ("InfNanRemoveLogitsProcessor", ()),
        ("LogitNormalization", ()),
        ("AlternatingCodebooksLogitsProcessor", (10, 1000, 1000)),
        ("BarkEosPrioritizerLogitsProcessor", (2, 0.2)),
        ("WatermarkLogitsProcessor", ("vocab", "cpu")),
        ("WatermarkLogitsProcessor", ("vocab", "cpu", 0.25, 2.0, 15485863, "selfhash", 4)),
        ("SynthIDTextWatermarkLogitsProcessor", (5, list(range(1, 31)), 2**16, 0, 1024, "cpu")),
    ]


def least(
    build: Callable[[], Callable], steps: list[tuple[torch.Tensor, torch.Tensor]], seconds: float
) -> float:
    """Return the least time of a step, in microseconds; each round has a new rule, so no list is known."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        rule = build()
        for ids, scores in steps:
            begin = time.perf_counter()
            rule(ids, scores)
            best = min(best, time.perf_counter() - begin)
    return best * 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.3)
    options = parser.parse_args()
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5000, (options.rows, options.length), generator=gen)
    steps = []
    for step in range(8):
        new = torch.cat([ids[:, step:], torch.randint(0, 5000, (options.rows, step), generator=gen)], 1)
        steps.append((new, torch.randn(options.rows, options.vocab, generator=gen) * 3))
    print(f"{options.rows} x {options.vocab}, length {options.length}; microseconds a step")
    with torch.no_grad():
        for name, args in cases(options.length):
            values = tuple(options.vocab if arg == "vocab" else arg for arg in args)
            pair = [partial(getattr(module, name), *values) for module in (pretrained, logits_process)]
            times = [least(build, steps, options.seconds) for build in pair * 2]
            ours, theirs = min(times[::2]), min(times[1::2])
            flag = "  SLOWER" if ours > 1.05 * theirs + 1 else ""
            print(f"{name:42s} {ours:9.1f} {theirs:9.1f} {theirs / ours:6.2f}x{flag}")


if __name__ == "__main__":
    main()
