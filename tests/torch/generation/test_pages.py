# SPDX-License-Identifier: Apache-2.0
"""Pages are held, shared by content, kept while there is room, and never handed out twice."""

import random

from pretrained.torch.generation.pages import Pages


def row(pages, tokens):
    """Hold the pages of a whole row, and say what is in them."""
    held = pages.find(tokens)
    for page in held:
        pages.hold(page)
    shared = len(held)
    before = pages.content(held[-1]) if held else None
    while len(held) < pages.needed(len(tokens)):
        page = pages.take()
        if page is None:
            pages.release(held)
            return None, 0
        start = len(held) * pages.page_size
        held.append(page)
        if start + pages.page_size <= len(tokens):
            before = pages.learn(page, before, tuple(tokens[start : start + pages.page_size]))
    return held, shared


def test_the_lowest_pages_go_first():
    pages = Pages(10, 4)
    assert [pages.take() for _ in range(3)] == [0, 1, 2]
    pages.release([1])
    assert pages.take() == 1


def test_no_page_beyond_the_limit():
    pages = Pages(3, 4)
    assert [pages.take() for _ in range(4)] == [0, 1, 2, None]
    assert pages.available == 0
    pages.release([0, 1, 2])
    assert pages.available == 3


def test_rows_that_begin_alike_share_full_pages():
    pages = Pages(100, 4)
    first, _ = row(pages, list(range(10)))
    second, shared = row(pages, [*range(8), 50, 51, 52])
    assert shared == 2
    assert second[:2] == first[:2] and second[2] != first[2]
    _, shared = row(pages, [9, *range(1, 8)])
    assert shared == 0, "the same second page after another first one is another page"


def test_content_stays_until_the_room_is_needed():
    pages = Pages(4, 2)
    first, _ = row(pages, [1, 2, 3, 4])
    pages.release(first)
    assert pages.find([1, 2, 3, 4]) == first
    taken = [pages.take() for _ in range(3)]
    assert None not in taken
    assert pages.find([1, 2, 3, 4]) == first[:1], "the end of a row goes first"
    assert pages.take() is not None
    assert pages.find([1, 2]) == []


def test_forgotten_pages_are_not_found():
    pages = Pages(4, 2)
    first, _ = row(pages, [1, 2, 3, 4])
    assert sorted(pages.release(first, forget=True)) == sorted(first)
    assert pages.find([1, 2, 3, 4]) == []


def test_nothing_is_shared_where_it_is_not_wanted():
    pages = Pages(9, 2, share=False)
    row(pages, [1, 2, 3, 4])
    assert row(pages, [1, 2, 3, 4])[1] == 0


def test_random_rows_never_hold_what_another_writes():
    chance = random.Random(0)
    pages = Pages(24, 3)
    rows = []
    for _ in range(3000):
        if rows and chance.random() < 0.5:
            tokens, held = rows.pop(chance.randrange(len(rows)))
            pages.release(held, forget=chance.random() < 0.1)
        else:
            tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 20))]
            held, _ = row(pages, tokens)
            if held is None:
                continue
            rows.append((tokens, held))
        content = {}
        for tokens, held in rows:
            for index, page in enumerate(held):
                # All that came before decides what is in a page.
                mine = tuple(tokens[: (index + 1) * 3]) if (index + 1) * 3 <= len(tokens) else object()
                assert content.setdefault(page, mine) == mine
        assert pages.held == len(content)
        assert pages.available == 24 - pages.held
