"""Which page of the key/value cache holds what: users of each page, and pages found again by what they hold.

    request A   | 7 | 2 | 5 |       page 7: 2 users, named h0 = hash(first 16 tokens)
    request B   | 7 | 2 | 9 |       page 2: 2 users, named h1 = hash(h0, next 16 tokens)
    nobody                  4       page 4: 0 users, named: kept until room is needed, the longest unused goes first

The name of a full page is a hash of its tokens and of the name of the page before it, so it stands for all tokens from
the first on, and with them for all positions. A placeholder's token says nothing about its picture: names of pages with
placeholders take in grid and pixels.

Shape letters:  T tokens   L sparse layers   K experts per token
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ernie_model.inference.request import MediaItem

START = b""
"""The name of what precedes the first page."""


def page_name(before: bytes, token_ids: Sequence[int], media: Iterable[MediaItem] = ()) -> bytes:
    """
    Args:
        before: the name of the page before, or `START`.
        media: the images and videos that have placeholders in this page, in order.
    """
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(array("q", token_ids).tobytes())
    for item in media:
        digest.update(array("q", item.grid).tobytes() + item.digest)
    return digest.digest()


class PagePool:
    """Pages 0 to `num_pages` - 1. A page has users, a name, both, or neither."""

    def __init__(self, num_pages: int, page_tokens: int):
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._users = [0] * num_pages
        self._name: list[bytes | None] = [None] * num_pages
        self._page: dict[bytes, int] = {}
        self._empty = list(range(num_pages - 1, -1, -1))  # neither users nor name
        self._unused: OrderedDict[int, None] = OrderedDict()  # a name, but no users; the longest unused first
        self._experts: dict[int, Tensor] = {}

    @property
    def num_free(self) -> int:
        """Pages that `take` can give."""
        return len(self._empty) + len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def is_used(self, page: int) -> bool:
        return self._users[page] > 0

    def take(self) -> int:
        """A page for something new, with one user. One without a name, else the one that is unused for longest."""
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._unused.popitem(last=False)
            self._unname(page)
        self._experts.pop(page, None)
        self._users[page] = 1
        return page

    def find(self, name: bytes, *, experts: bool = False) -> int | None:
        """The page of this name; with `experts`, only if it is known which experts its tokens visited."""
        page = self._page.get(name)
        return None if page is None or (experts and page not in self._experts) else page

    def share(self, page: int) -> None:
        """One more user of a page that `find` gave."""
        if not self._users[page]:
            del self._unused[page]
        self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each, of a request's pages in order: what is left without a user is forgotten from the end,
        because a page is of no use without those before it."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                if self._name[page] is None:
                    self._empty.append(page)
                else:
                    self._unused[page] = None

    def name(self, page: int, name: bytes) -> None:
        """The page is full and holds what `name` stands for. A page that has the name already keeps it, unless only
        the new one knows its experts."""
        older = self._page.get(name)
        if older is not None:
            if older == page or older in self._experts or page not in self._experts:
                return
            self.forget(older)
        self._name[page] = name
        self._page[name] = page

    def forget(self, page: int) -> None:
        """Nobody shall find this page again."""
        if self._name[page] is None:
            return
        self._unname(page)
        if page in self._unused:
            del self._unused[page]
            self._empty.append(page)

    def forget_all(self) -> None:
        for page in list(self._page.values()):
            self.forget(page)

    def _unname(self, page: int) -> None:
        name = self._name[page]
        assert name is not None
        self._name[page] = None
        del self._page[name]

    # --------------------------------------------------------------------------------------- experts beside the cache

    def write_experts(self, page: int, start: int, expert_TLK: Tensor) -> None:
        """Which experts the tokens from `start` on, counted in the page, visited."""
        if page not in self._experts:
            self._experts[page] = torch.full((self.page_tokens, *expert_TLK.shape[1:]), -1, dtype=torch.int16)
        self._experts[page][start : start + len(expert_TLK)] = expert_TLK

    def experts(self, page: int) -> Tensor:
        """int16 (page_tokens, L, K)"""
        return self._experts[page]

    # ---------------------------------------------------------------------------------------------------------- check

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless these lists of pages are all there is in use, and every page is in one place."""
        users = [0] * self.num_pages
        for pages in holders:
            assert len(set(pages)) == len(pages), "a page stands twice in one request"
            for page in pages:
                users[page] += 1
        assert users == self._users, "users are miscounted"
        free = {*self._empty, *self._unused}
        assert len(free) == len(self._empty) + len(self._unused), "a page is free twice"
        assert free == {page for page, count in enumerate(users) if not count}, "a page is lost"
        assert all(self._name[page] is None for page in self._empty)
        assert all(self._name[page] is not None for page in self._unused)
        assert self._page == {name: page for page, name in enumerate(self._name) if name is not None}
