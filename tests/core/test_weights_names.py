# SPDX-License-Identifier: Apache-2.0
"""The choice of weights among names."""

import pytest

from pretrained.core.weights_names import choose_weights
from pretrained.errors import FileError

BOTH = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "q.gguf")


@pytest.mark.parametrize(
    ("names", "choice", "expected"),
    [
        (BOTH, {}, "model.safetensors"),
        (BOTH, {"use_safetensors": False}, "pytorch_model.bin"),
        (BOTH, {"variant": "fp16"}, "model.fp16.safetensors"),
        (BOTH, {"gguf_file": "q.gguf"}, "q.gguf"),
        (("pytorch_model.bin",), {}, "pytorch_model.bin"),
        (("model.safetensors.index.fp16.json",), {"variant": "fp16"}, "model.safetensors.index.fp16.json"),
        (("pytorch_model.bin.index.json",), {}, "pytorch_model.bin.index.json"),
    ],
)
def test_choose_weights(names, choice, expected):
    assert choose_weights(names, **choice) == expected


@pytest.mark.parametrize(
    ("names", "choice", "text"),
    [
        ((), {}, "expected model.safetensors or .*pytorch_model.bin.index.json, found no files"),
        (("x.gguf",), {}, "Pass gguf_file='x.gguf'"),
        (("model.fp16.safetensors",), {}, "Pass variant='fp16'"),
        (("model.safetensors",), {"variant": "fp16"}, "Drop variant"),
        (("pytorch_model.bin",), {"use_safetensors": True}, "Drop use_safetensors"),
        (("a.gguf",), {"gguf_file": "b.gguf"}, "no GGUF file 'b.gguf'.*Did you mean 'a.gguf'"),
        (("config.json",), {"gguf_file": "b.gguf"}, "found no GGUF file"),
    ],
)
def test_choose_weights_errors(names, choice, text):
    with pytest.raises(FileError, match=text):
        choose_weights(names, **choice)
