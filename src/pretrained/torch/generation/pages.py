# SPDX-License-Identifier: Apache-2.0
"""Which pages of a paged cache are free, who holds the others, and what is known to be in them.

PagedAttention, Kwon et al. 2023, arXiv:2309.06180. A page holds the keys and values of `page_size` tokens in
every layer. A full page is known by its tokens and the page before it, so that rows which begin alike hold
the same pages; a page that nobody holds any more keeps its content until the room is needed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

_START = 0
_FIRST_PAGES = 64


class Pages:
    """The pages of one cache, by number.

    Args:
        limit: How many there may be.
        page_size: Tokens in each.
        share: Whether content is looked up at all.
    """

    def __init__(self, limit: int, page_size: int, *, share: bool = True) -> None:
        self.limit, self.page_size, self.share = limit, page_size, share
        self.capacity = 0
        # The lowest numbers go first: the pages in use then lie close together at the front.
        self._free: list[int] = []
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Content: page -> (its key, its own number as content), key -> page.
        self._known: dict[int, tuple[tuple[int, tuple[int, ...]], int]] = {}
        self._by_key: dict[tuple[int, tuple[int, ...]], int] = {}
        self._contents = _START

    @property
    def available(self) -> int:
        """How many pages could be taken now."""
        return len(self._free) + len(self._idle) + self.limit - self.capacity

    @property
    def held(self) -> int:
        """How many pages somebody holds."""
        return len(self._holders)

    def needed(self, tokens: int) -> int:
        """Return how many pages so many tokens fill.

        Args:
            tokens: How many.
        """
        return -(-tokens // self.page_size)

    def take(self) -> int | None:
        """Take a page whose content does not matter; None where all are held."""
        if not self._free and not self._idle and self.capacity < self.limit:
            more = min(max(self.capacity, _FIRST_PAGES), self.limit - self.capacity)
            # Ascending numbers are a heap already.
            self._free = list(range(self.capacity, self.capacity + more))
            self.capacity += more
        if self._free:
            page = heapq.heappop(self._free)
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Hold a page that is known by its content.

        Args:
            page: As `find` returned it.
        """
        self._idle.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, pages: Sequence[int], *, forget: bool = False) -> list[int]:
        """Let go of a row's pages; return those that nobody holds now.

        Args:
            pages: In the order of the row.
            forget: Their content is not to be used again.
        """
        let_go = []
        # The last ones first: of what is kept, the beginnings of rows then stay longest.
        for page in reversed(pages):
            if forget:
                self._forget(page)
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            let_go.append(page)
            if page in self._known:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)
        return let_go

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Return the pages that hold the beginning of a row already, in order.

        Args:
            tokens: Of the row; a page that they fill only in part is not looked for.
        """
        found: list[int] = []
        content = _START
        for page_tokens in self._cut(tokens) if self.share else ():
            page = self._by_key.get((content, page_tokens))
            if page is None:
                break
            found.append(page)
            content = self._known[page][1]
        return found

    def learn(self, page: int, before: int | None, tokens: tuple[int, ...]) -> int | None:
        """Note what a full page holds.

        Args:
            page: The page.
            before: What this returned for the page before it; None for the first of a row.
            tokens: Its tokens.

        Returns:
            What to pass as `before` for the next page; None where nothing is noted.
        """
        if not self.share:
            return None
        key = (_START if before is None else before, tokens)
        same = self._by_key.get(key)
        if same is not None:
            # Another page holds it already: this one stays nameless, those after it follow the other.
            return self._known[same][1]
        self._contents += 1
        self._by_key[key] = page
        self._known[page] = (key, self._contents)
        return self._contents

    def content(self, page: int) -> int:
        """Return what `learn` returned for a page that `find` found.

        Args:
            page: The page.
        """
        return self._known[page][1]

    def _cut(self, tokens: Sequence[int]) -> Iterable[tuple[int, ...]]:
        size = self.page_size
        return (tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size))

    def _forget(self, page: int) -> None:
        known = self._known.pop(page, None)
        if known is not None:
            del self._by_key[known[0]]
