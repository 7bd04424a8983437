# SPDX-License-Identifier: Apache-2.0
"""What the command line's verbs share: figures, and how a failure reads."""

from __future__ import annotations

import resource
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from pretrained.core.report import format_bytes


@dataclass
class Figures:
    """What a person wants to see after an answer.

    Attributes:
        load_s: Seconds to load model and tokenizer.
        first_token_s: Seconds from the prompt to the first new token.
        num_tokens: New tokens.
        decode_s: Seconds from the first new token to the last.
    """

    load_s: float = 0.0
    first_token_s: float = 0.0
    num_tokens: int = 0
    decode_s: float = 0.0

    def __str__(self) -> str:
        parts = [f"loaded in {self.load_s:.2f} s", f"first token after {self.first_token_s:.2f} s"]
        if self.num_tokens > 1 and self.decode_s > 0:
            rate = (self.num_tokens - 1) / self.decode_s
            parts.append(f"{self.num_tokens} tokens at {rate:.1f} a second")
        parts.append(f"{format_bytes(peak_memory_bytes())} of memory at most")
        return ", ".join(parts)


def peak_memory_bytes() -> int:
    """Return the largest resident memory this program has had."""
    try:
        # Unlike getrusage's figure, this one does not begin with the peak of the process that started us.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def paragraph(error: BaseException) -> str:
    """Return an error as one readable paragraph.

    Args:
        error: What was raised.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.fill(f"error: {text}", width=100, break_long_words=False, break_on_hyphens=False)
