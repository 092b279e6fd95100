"""An answer that comes in pieces, told apart into thinking and the rest."""

import re

from deepseek_jax.data.special_tokens import END_THINK, THINK

_TAG = re.compile(rf"\s*({THINK}|{END_THINK})\s*")
_BEGUN = "|".join(re.escape(tag[:length]) for tag in (THINK, END_THINK) for length in range(len(tag) - 1, 0, -1))
_UNSURE = re.compile(rf"\s*(?:{_BEGUN})?\Z")  # may yet be a tag with the white space before it


class Thinking:
    """Parts ``(is it thinking, text)`` out of pieces of an answer, without the tags and the white space beside them; a
    line ends between two kinds. What could become a tag is held back until the next piece."""

    def __init__(self) -> None:
        self._thinking, self._fresh, self._held = False, True, ""

    def push(self, piece: str) -> list[tuple[bool, str]]:
        *before, rest = _TAG.split(self._held + piece)
        parts: list[tuple[bool, str]] = []
        for text, tag in zip(before[::2], before[1::2], strict=True):
            parts += self._part(text)
            if not self._fresh and self._thinking != (tag == THINK):
                parts.append((self._thinking, "\n"))
                self._fresh = True
            self._thinking = tag == THINK
        unsure = _UNSURE.search(rest)
        assert unsure is not None
        self._held = unsure.group()
        return parts + self._part(rest[: unsure.start()])

    def finish(self) -> list[tuple[bool, str]]:
        """What was held back."""
        held, self._held = self._held.rstrip(), ""
        return self._part(held)

    def _part(self, text: str) -> list[tuple[bool, str]]:
        text = text.lstrip() if self._fresh else text
        self._fresh = self._fresh and not text
        return [(self._thinking, text)] if text else []
