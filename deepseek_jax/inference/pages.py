"""Which page of the cache holds what: counted holders, and prefixes that are found again. No jax here.

vLLM finds a prefix by a chain of hashes, SGLang by a radix tree of tokens. Here a page is named by the prefix before it
and by its very tokens, which is such a tree in one dictionary, cut at pages: nothing can collide and lend one prompt
another's past, and no edge is ever split.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

Name = tuple[int, bytes]  # (the prefix before it, tokens); fewer than a page has: the first so many of them


class Found(NamedTuple):
    """What the cache has of a prompt: whole pages, the number of the prefix that they are, and a page that begins with
    the rest. ``soon``: a request is about to compute what comes next."""

    pages: list[int]
    prefix: int
    rest: int | None
    soon: bool


class Pages:
    """P pages of N tokens. A page is free, or held by requests, or idle: named, held by nobody, there to be found until
    its room is needed; who was idle longest goes first.

    Requests that share a page only read it: each writes to pages that it alone holds, or behind the tokens that a
    page's name speaks of.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * count
        self._prefix = [0] * count  # which ends with the page, where that is named whole
        self._named: dict[Name, int] = {}
        self._names: list[list[Name]] = [[] for _ in range(count)]
        self._promised: set[Name] = set()
        self._prefixes = itertools.count()
        self.root = next(self._prefixes)  # of prefixes by these weights

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def find(self, ids_T: Int[np.ndarray, "T"]) -> Found:
        """What there is of all tokens but the last, which is run in any case: its successor is wanted."""
        pages, prefix, size = list[int](), self.root, self.size
        whole, rest = divmod(len(ids_T) - 1, size)
        for j in range(whole):
            name = prefix, ids_T[j * size : (j + 1) * size].tobytes()
            if (page := self._named.get(name)) is None or name in self._promised:
                return Found(pages, prefix, None, page is not None)
            pages.append(page)
            prefix = self._prefix[page]
        name = prefix, ids_T[whole * size : whole * size + rest].tobytes()
        page = self._named.get(name) if rest else None
        soon = name in self._promised
        return Found(pages, prefix, None if soon else page, soon)

    def take(self, count: int) -> list[int]:
        """So many pages for a holder, of those ``available``."""
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page, self._names[page])
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more of pages that were found."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less. Those at the end of a prefix become idle first: nothing finds them without the others."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self._forget(page, [name for name in self._names[page] if name in self._promised])
            if self._names[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, prefix: int, ids: Int[np.ndarray, "N"], *, promised: bool = False) -> int:
        """Let the page be found by the prefix before it and its first tokens -> the number of the prefix with them, for
        a whole page: another page's, where one has this name already. promised: the tokens are yet to be computed, and
        who looks for them waits until they are ``ready``, or until nobody holds the page."""
        name = prefix, ids.tobytes()
        if (other := self._named.get(name)) is not None:
            return self._prefix[other]
        self._named[name] = page
        self._names[page].append(name)
        if promised:
            self._promised.add(name)
        if len(ids) == self.size:
            self._prefix[page] = next(self._prefixes)
        return self._prefix[page]

    def ready(self, page: int) -> None:
        """What its names speak of has been handed to the device, which works in this order."""
        self._promised.difference_update(self._names[page])

    def forget(self) -> None:
        """Let nothing be found: the weights are others now. Holders keep their pages, and may name none any more."""
        for names in self._names:
            names.clear()
        self._named.clear()
        self._promised.clear()
        self._free += self._idle
        self._idle.clear()
        self.root = next(self._prefixes)

    def _forget(self, page: int, names: Iterable[Name]) -> None:
        for name in list(names):
            del self._named[name]
            self._names[page].remove(name)
            self._promised.discard(name)

    def check(self, held: Iterable[Sequence[int]] = (), written: Iterable[int] = ()) -> None:
        """AssertionError for a page that is lost, or in two places, or has other holders than these; for one of those
        that are ``written`` which several hold; for a name that leads elsewhere."""
        holders = Counter(page for pages in held for page in pages)
        assert [holders[page] for page in range(self.count)] == self._holders, "holders"
        places = [*self._free, *self._idle, *holders]
        assert sorted(places) == list(range(self.count)), "a page is lost, or in two places"
        assert all(self._holders[page] == 1 for page in written), "a page is written that others read"
        assert all(name in self._names[page] for name, page in self._named.items()), "a name leads elsewhere"
        assert sum(map(len, self._names)) == len(self._named), "a page has a name that leads elsewhere"
        assert all(self._names[page] for page in self._idle), "an idle page that nobody can find"
        assert not any(self._names[page] for page in self._free), "a free page that can be found"
        assert self._promised <= self._named.keys(), "a promise without a name"
