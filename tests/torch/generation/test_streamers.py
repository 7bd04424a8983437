# SPDX-License-Identifier: Apache-2.0
"""Streamers: the text that comes out, when it comes out, and what happens when generation fails."""

import asyncio
import queue
import threading

import pytest
import torch
import transformers

from pretrained import AutoTokenizer
from pretrained.errors import GenerationError
from pretrained.torch.generation.streamers import (
    AsyncTextIteratorStreamer,
    BaseStreamer,
    TextIteratorStreamer,
    TextStreamer,
)
from support.toy import Letters, Toy, fibonacci


class Collector(TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((text, stream_end))


class Utf8:
    def decode(self, ids, skip=()):
        return bytes(i for i in ids if i not in skip).decode(errors="replace")


def feed(streamer, data, prompt=b""):
    streamer.put(torch.tensor([list(prompt)], dtype=torch.int64))
    for token in data:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return streamer.pieces


def test_whole_words_come_as_they_are_finished():
    pieces = feed(Collector(Utf8()), b"two words.\nnew", prompt=b"ab c")
    assert [text for text, _ in pieces] == ["ab ", "ctwo ", "words.\n", "new"]
    assert [end for _, end in pieces] == [False, False, False, True]


def test_the_prompt_can_be_left_out_and_decoding_arguments_are_passed():
    pieces = feed(Collector(Utf8(), skip_prompt=True, skip=[ord("x")]), b"axb cx", prompt=b"prompt ")
    assert pieces == [("ab ", False), ("c", True)]


def test_characters_of_several_bytes_are_never_torn():
    data = "né 中文 字\nあ".encode()
    pieces = feed(Collector(Utf8()), data)
    assert "".join(text for text, _ in pieces) == data.decode()
    assert ("中", False) in pieces and ("あ", False) in pieces


def test_a_streamer_can_be_used_again():
    streamer = Collector(Utf8(), skip_prompt=True)
    feed(streamer, b"a b", prompt=b"p")
    streamer.pieces.clear()
    assert feed(streamer, b"c d", prompt=b"p") == [("c ", False), ("d", True)]


class LeadingSpace:
    """Like sentencepiece: a space at the very beginning of what is decoded is dropped."""

    def decode(self, ids):
        return bytes(ids).decode().removeprefix(" ")


def test_a_space_after_a_line_is_kept():
    pieces = feed(Collector(LeadingSpace()), b"a\n b")
    assert "".join(text for text, _ in pieces) == "a\n b"


class Cleaning:
    """Takes the space before a full stop back, as decoders that clean up do."""

    def decode(self, ids):
        return bytes(ids).decode().replace(" .", ".")


def test_text_that_shrinks_loses_nothing():
    pieces = feed(Collector(Cleaning()), b"one .two . three")
    assert "".join(text for text, _ in pieces) == "one .two . three"
    assert [text for text, _ in pieces] == ["one ", ".two ", ". ", "three"]


class Theirs(transformers.TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces = []

    def on_finalized_text(self, text, stream_end=False):
        self.pieces.append((text, stream_end))


TEXTS = {
    "words": "The three primary colours are red, blue and yellow. They mix.",
    "lines": "def f(x):\n    return x\n\n\nprint(f(1))\n",
    "chinese": "北京是中国的首都。 ok 上海",
    "japanese": "ひらがなとカタカナと漢字",
    "korean": "안녕하세요 세계",
    "emoji": "Well 👩\u200d💻 done 🎉🎉",
    "accents": "naïve café Ünïcödé",
    "spaces": "  a   b \t c  ",
    "nothing": "",
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf):
    return AutoTokenizer.from_pretrained(smollm2_gguf)


@pytest.mark.realweights
@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"skip_special_tokens": True}], ids=["special", "plain"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_whole_text_is_that_of_transformers(tokenizer, text, kwargs, skip_prompt):
    prompt = tokenizer("<|im_start|>user\nHello there")["input_ids"]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ours, theirs = (kind(tokenizer, skip_prompt, **kwargs) for kind in (Collector, Theirs))
    for streamer in (ours, theirs):
        streamer.put(torch.tensor([prompt]))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
    found = "".join(piece for piece, _ in ours.pieces)
    assert found == "".join(piece for piece, _ in theirs.pieces)
    assert found == tokenizer.decode(ids if skip_prompt else prompt + ids, **kwargs)
    assert [end for _, end in ours.pieces].count(True) == 1 and ours.pieces[-1][1]
    assert "\ufffd" not in found
    # Never later than there: what is out after each token is at least as much.
    assert len(ours.pieces) <= len(theirs.pieces)


def test_text_is_printed(capsys):
    Toy().generate(torch.tensor([[1, 1]]), streamer=TextStreamer(Letters()), max_new_tokens=5)
    assert capsys.readouterr().out == "aabcehm\n"


def test_more_than_one_row_is_refused():
    with pytest.raises(GenerationError, match=r"takes one row.*found batch 2"):
        Toy().generate(torch.ones(2, 2, dtype=torch.int64), streamer=TextStreamer(Letters()))


def test_any_streamer_gets_the_prompt_then_each_token():
    class Own(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    own = Own()
    Toy().generate(torch.tensor([[1, 1], [2, 3]]), streamer=own, max_new_tokens=2)
    assert own.got == [[[1, 1], [2, 3]], [2, 5], [3, 8], "end"]


def test_a_base_streamer_says_what_to_define():
    with pytest.raises(NotImplementedError, match="must define put"):
        BaseStreamer().put(torch.ones(1))
    with pytest.raises(NotImplementedError, match="must define end"):
        BaseStreamer().end()


def in_thread(model, streamer, **kwargs):
    def work():
        try:
            model.generate(torch.tensor([[1, 1]]), streamer=streamer, **kwargs)
        except GenerationError as error:
            seen.append(error)

    seen = []
    thread = threading.Thread(target=work)
    thread.start()
    return thread, seen


def text_of(*row):
    return Letters().decode(row)


def test_iteration_in_another_thread():
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=30)
    thread, seen = in_thread(Toy(), streamer, max_new_tokens=40)
    text = "".join(streamer)
    thread.join()
    assert text == text_of(*fibonacci(1, 1, 40)[2:]) and not seen


def test_iteration_raises_what_generation_raised():
    model = Toy()
    model.nan_at = (3, 0)
    streamer = TextIteratorStreamer(Letters(), timeout=30)
    thread, seen = in_thread(model, streamer, max_new_tokens=40)
    with pytest.raises(GenerationError, match=r"step 3, row 0"):
        list(streamer)
    thread.join()
    assert len(seen) == 1


def test_iteration_does_not_wait_for_ever():
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(Letters(), timeout=0.01))


def test_asynchronous_iteration():
    async def main(nan_at):
        model = Toy()
        model.nan_at = nan_at
        streamer = AsyncTextIteratorStreamer(Letters(), timeout=30)
        thread, _ = in_thread(model, streamer, max_new_tokens=12)
        try:
            return "".join([text async for text in streamer])
        finally:
            thread.join()

    assert asyncio.run(main(None)) == text_of(*fibonacci(1, 1, 12))
    with pytest.raises(GenerationError, match="step 2, row 0"):
        asyncio.run(main((2, 0)))


def test_asynchronous_iteration_does_not_wait_for_ever():
    async def main():
        await anext(AsyncTextIteratorStreamer(Letters(), timeout=0.01))

    with pytest.raises(TimeoutError):
        asyncio.run(main())
