"""Text of a completion while it is being made, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.data.tokenizer import Tokenizer

_CHARACTER = 4  # bytes, and so tokens, at most


class TextStream:
    """Turns ids into text as they come; a character is given out with its last byte, never half of it.

    For tokenizers of any kind: what is decoded is a window of tokens, those given out last before the new ones, so
    that a decoder that strips the first space, say, strips it from what is left out. The pieces of every `push` and
    the one of `finish`, joined, are `tokenizer.decode(ids)` with the same `skip_special_tokens`; where single bytes
    are tokens and some together are no UTF-8, a decoder may take back what it has given before, which cannot be.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._given = 0  # how many ids of the window have been given out

    def push(self, *ids: int) -> str:
        """The text that is certain with these ids: often a word each, "" inside a character of several tokens."""
        self._window += ids
        text, certain = self._decode(self._window), len(self._window)
        if text.endswith("\ufffd"):  # the rest of the character may come
            if len(ids) > 1:  # with which of them it begins is found one by one
                del self._window[-len(ids) :]
                return "".join(map(self.push, ids))
            certain -= _CHARACTER - 1
            if certain <= self._given:
                return ""
            told = self._decode(self._window[:certain])
            if not text.startswith(told):
                return ""
            text = told  # what so many others have not changed stays as it is: bytes of no character
        new = text[len(self._decode(self._window[: self._given])) :]
        if new:
            self._window, self._given = self._window[self._given :], certain - self._given
        return new

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was begun and not ended, else "". The stream starts anew."""
        rest = self._decode(self._window)[len(self._decode(self._window[: self._given])) :]
        self._window, self._given = [], 0
        return rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


class StopStrings:
    """Lets text that comes in pieces through, up to the first of some strings, which is left out.

    What may be the beginning of one is held back until it is certain. Of several the one that ends first counts, of
    those the longest: the text is the same in whatever pieces it comes.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """(What is certain with this piece, whether a string was found, behind which there is no more to push)."""
        text, self._held = self._held + text, ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        begins = lambda at: any(stop.startswith(text[at:]) for stop in self._stops)  # noqa: E731
        certain = next(filter(begins, range(len(text))), len(text))
        self._held = text[certain:]
        return text[:certain], False

    def finish(self) -> str:
        """What was held back and has become none."""
        held, self._held = self._held, ""
        return held


class Said(NamedTuple):
    """What ids bring. text: what is certain of it. offsets: of each id, up to the one that completes a string, where
    its text begins in the whole. found: whether a string has ended it."""

    text: str
    offsets: list[int]
    found: bool


class EndingText:
    """Text of ids as they come, which ends before the first of some strings: `TextStream` and `StopStrings`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._stream, self._stops, self._ends = TextStream(tokenizer), StopStrings(stops), bool(stops)
        self._length = 0  # characters, with those that are held back

    def push(self, ids: Sequence[int], *, ended: bool, each: bool = True) -> Said:
        """ended: no more ids come. each: tell the offsets; without them, and where no string can end the text, all ids
        are decoded together. Nothing is pushed behind the end."""
        if not (each or self._ends):
            return Said(self._stream.push(*ids) + (self._stream.finish() if ended else ""), [], False)
        text, offsets = "", list[int]()
        for token_id in ids:
            offsets.append(self._length)
            new = self._stream.push(token_id)
            self._length += len(new)
            certain, found = self._stops.push(new)
            text += certain
            if found:
                return Said(text, offsets, True)
        if not ended:
            return Said(text, offsets, False)
        certain, found = self._stops.push(self._stream.finish())
        return Said(text + certain + self._stops.finish(), offsets, found)
