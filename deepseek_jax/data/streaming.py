"""Text of a completion while it is being made, token by token."""

from collections.abc import Sequence

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

    def push(self, token_id: int) -> str:
        """The text that is certain with this id: often a word, "" inside a character of several tokens."""
        self._window.append(int(token_id))
        text, certain = self._decode(self._window), len(self._window)
        if text.endswith("\ufffd"):  # the rest of the character may come
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
