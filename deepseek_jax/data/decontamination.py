"""Text that shares words in a row with what a model will be evaluated on, as DeepSeekMath removes it (arXiv 2402.03300,
section 2.1): 10 words in a row, or all of an evaluation text of 3 to 9."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Case, punctuation and white space are passed over; a sign of a script without spaces is a word.
_SIGNS = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e01-\u0e4e"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


class Overlap:
    """What evaluation texts hold, to be looked for in others.

    >>> overlap = Overlap(size=10, least=3)
    >>> overlap.add("How many clips?", source="test.jsonl")
    True
    >>> overlap.find("Tell me: how many clips are there?"), overlap.find("how many apples?")
    ('test.jsonl', None)

    size: of the rows of words that are compared. least: an evaluation text of fewer words is passed over, and one of
    fewer than `size` counts where all of it occurs. Memory is that of the texts' rows of words.
    """

    def __init__(self, *, size: int = 10, least: int = 3):
        if not 1 <= least <= size:
            raise ValueError(f"least={least}, size={size}: expected 1 <= least <= size")
        self.size, self.least = size, least
        self._sources: dict[str, str] = {}
        self._lengths: set[int] = set()

    def add(self, text: str, source: str) -> bool:
        """Look for this text too; False where it has too few words."""
        words = split_words(text)
        if len(words) < self.least:
            return False
        length = min(len(words), self.size)
        self._lengths.add(length)
        for gram in _grams(words, length):
            self._sources.setdefault(gram, source)
        return True

    def find(self, text: str) -> str | None:
        """The source of a text that shares words with this one, None where there is none."""
        words = split_words(text)
        found = (self._sources.get(gram) for length in self._lengths for gram in _grams(words, length))
        return next((source for source in found if source is not None), None)


def split_words(text: str) -> list[str]:
    """Words in small letters and numbers, without what stands between them."""
    return _WORD.findall(text.lower())


def _grams(words: list[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


def texts_of(value: Any) -> Iterable[str]:
    """Every text in a row, in lists and objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(inner)
