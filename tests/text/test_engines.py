# SPDX-License-Identifier: Apache-2.0
"""How pairs are cut: against the tokenizers library's own truncation."""

import itertools
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pretrained.errors import MissingDependencyError, TokenizerError
from pretrained.text.engines import Truncation, lengths_kept, load_json_tokenizer, tokenizers_library


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
def test_lengths_as_the_library(strategy):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for first, second, room in itertools.product(range(1, 8), range(1, 8), range(1, 15)):
        tokenizer.enable_truncation(room, strategy=strategy)
        cut = {"only_first": first, "only_second": second}.get(strategy, 99)
        excess = first + second - room
        if cut < excess:
            with pytest.raises(TokenizerError, match="cannot make the texts fit"):
                lengths_kept(first, second, room, strategy)
        if cut <= excess:
            continue  # the library keeps at least one token of the text that it cuts
        ids = tokenizer.encode("a " * first, "b " * second).ids
        assert lengths_kept(first, second, room, strategy) == (ids.count(0), ids.count(1))


def test_truncation_is_frozen():
    with pytest.raises(AttributeError):
        Truncation(3).max_length = 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON \(t.json\).*Fetch or save it again"),
        (
            '{"version": "1.0", "model": {"type": "Nope"}}',
            r"cannot be used \(t.json\).*newer tokenizers package",
        ),
    ],
)
def test_broken_files(text, message):
    with pytest.raises(TokenizerError, match=message):
        load_json_tokenizer(text, "t.json")


def test_the_library_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pretrained\[text\]'"):
        tokenizers_library()
    with pytest.raises(MissingDependencyError):
        load_json_tokenizer("{}", "t.json")
