# SPDX-License-Identifier: Apache-2.0
"""Train the small T5 that the tests read: it spells out numbers, "42" -> "forty-two".

Run ``python tools/train_spelling_t5.py`` with the package installed. It trains with this library alone, on a
CPU, and writes a model folder with a README. The same seed, machine and versions give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pretrained.arch.t5 import T5Config
from pretrained.torch.models.t5 import T5ForConditionalGeneration

HIGHEST = 9999
HELD_OUT = 1000
SPLIT_SEED = 0
# ByT5's ids: a byte plus 3, after padding, end and unknown; 384 leaves room for its sentinels.
BYTE_OFFSET, PAD, END, VOCABULARY = 3, 0, 1, 384

ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number: int) -> str:
    """Return a number from 0 to 9999 in English words: 1042 is "one thousand forty-two".

    Args:
        number: The number.
    """
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    return f"{spell(count)} {name}" + (f" {spell(rest)}" if rest else "")


def split(seed: int = SPLIT_SEED) -> tuple[list[int], list[int]]:
    """Return the numbers to train on and those held out, which no step ever sees.

    Numbers below 100 are all trained on: there are too few of them to learn some from the others.

    Args:
        seed: Of the choice.
    """
    held_out = set(random.Random(seed).sample(range(100, HIGHEST + 1), HELD_OUT))
    return [n for n in range(HIGHEST + 1) if n not in held_out], sorted(held_out)


def encode(texts: Sequence[str]) -> torch.Tensor:
    """Return [texts, longest + 1] byte ids, each text followed by the end token and padding.

    Args:
        texts: What to encode.
    """
    rows = [[byte + BYTE_OFFSET for byte in text.encode()] + [END] for text in texts]
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def decode(ids: torch.Tensor) -> list[str]:
    """Return the texts of [texts, length] byte ids, special tokens left out.

    Args:
        ids: As `generate` returns them.
    """
    rows = [[i - BYTE_OFFSET for i in row if BYTE_OFFSET <= i < BYTE_OFFSET + 256] for row in ids.tolist()]
    return [bytes(row).decode(errors="replace") for row in rows]


def batches(numbers: Sequence[int], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of input ids and labels for ever, reshuffled each time round.

    Args:
        numbers: What to draw from.
        size: Rows of a batch.
        seed: Of the order.
    """
    order, numbers = random.Random(seed), list(numbers)
    while True:
        order.shuffle(numbers)
        for first in range(0, len(numbers) - size + 1, size):
            chosen = numbers[first : first + size]
            labels = encode([spell(n) for n in chosen])
            yield encode([str(n) for n in chosen]), labels.masked_fill(labels == PAD, -100)


def accuracy(model: T5ForConditionalGeneration, numbers: Sequence[int], size: int = 250) -> float:
    """Return the share of numbers whose greedy spelling is exactly right.

    Args:
        model: The model.
        numbers: What to spell.
        size: Rows of a batch.
    """
    model.eval()
    right = 0
    for first in range(0, len(numbers), size):
        chosen = numbers[first : first + size]
        ids = encode([str(n) for n in chosen])
        texts = decode(model.generate(ids, attention_mask=(ids != PAD).long(), do_sample=False))
        right += sum(text == spell(n) for text, n in zip(texts, chosen, strict=True))
    model.train()
    return right / len(numbers)


def build(seed: int) -> T5ForConditionalGeneration:
    """Return the untrained model: a byT5 in small, with a gate and a head of its own.

    Args:
        seed: Of its weights.
    """
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=PAD,
        tokenizer_class="ByT5Tokenizer",
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 48
    return model


def train(
    model: T5ForConditionalGeneration, numbers: Sequence[int], steps: int, size: int, rate: float, seed: int
) -> None:
    """Train in place, with a short warm-up and a cosine down to nothing.

    Args:
        model: The model.
        numbers: What to train on.
        steps: How many batches.
        size: Rows of a batch.
        rate: Highest learning rate.
        seed: Of the order of the numbers.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup, started = max(steps // 20, 1), time.perf_counter()

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step, (ids, labels) in zip(range(steps), batches(numbers, size, seed), strict=False):
        loss = model(ids, attention_mask=(ids != PAD).long(), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 500 == 0:
            print(
                f"step {step + 1}: loss {loss.item():.5f}, {time.perf_counter() - started:.0f} s", flush=True
            )


README = """# spelling-t5

A very small T5 that spells out the numbers from 0 to {highest}: `42` -> `forty-two`. It reads and writes
bytes, with ByT5's ids (byte + 3; 0 padding, 1 end), and has {parameters:,} parameters ({layers} layers in
each stack, stored as {dtype}).

Made by `tools/train_spelling_t5.py` of this project: {steps} steps of {batch} numbers on one CPU core, on
{trained} numbers. {held_out} others, drawn from 100 on with seed {seed}, were held out; greedy spelling is
exactly right for {right:.1%} of them.
"""


def save(model: T5ForConditionalGeneration, folder: Path, facts: dict[str, object]) -> None:
    """Write the model folder: config, weights, tokenizer's config, README.

    Args:
        model: The model.
        folder: Where to.
        facts: What the README says.
    """
    model.save_pretrained(folder)
    tokenizer = {
        "tokenizer_class": "ByT5Tokenizer",
        "extra_ids": VOCABULARY - 256 - BYTE_OFFSET,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(README.format(**facts), encoding="utf-8")


def main() -> None:
    """Train, measure on what was held out, and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tests/data/spelling-t5"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    # Few and small matrices: more threads would only wait for each other.
    torch.set_num_threads(1)
    numbers, held_out = split()
    model = build(arguments.seed)
    train(model, numbers, arguments.steps, arguments.batch, arguments.rate, arguments.seed)
    stored = model.to(getattr(torch, arguments.dtype))
    # What counts is the model as it will be read back: stored narrow, computed in float32.
    right = accuracy(stored.float(), held_out)
    print(f"held-out accuracy {right:.2%}")
    facts = {
        "highest": HIGHEST,
        "parameters": model.num_parameters(),
        "layers": model.config.num_layers,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "trained": len(numbers),
        "held_out": len(held_out),
        "seed": SPLIT_SEED,
        "right": right,
    }
    save(stored.to(getattr(torch, arguments.dtype)), arguments.out, facts)


if __name__ == "__main__":
    main()
