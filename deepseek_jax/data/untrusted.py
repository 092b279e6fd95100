"""Conversations of people whom nobody vouches for: no text of theirs becomes a special token.

A template writes special tokens as text, so in what it renders theirs and those that somebody typed look the same. So
what was typed is hidden from the template behind words that nobody can guess, and put back once it is known which
special tokens are the template's own. Likewise a beginning of one that a text ends with, and an end of one that a text
begins with: templates write some texts right behind each other.
"""

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.conversations import Message
from deepseek_jax.data.special_tokens import END_THINK, THINK
from deepseek_jax.data.tokenizer import Tokenizer


class Hiding:
    """Special tokens of one conversation that are only text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._special = tokenizer, _special(tokenizer)
        self._begins, self._ends, self._longest = _fragments(tokenizer)
        self._word = f"hidden{secrets.token_hex(12)}n"
        self._hidden: list[str] = []

    def hide(self, value: Any, *, keep: Sequence[str] = ()) -> Any:
        """A JSON value whose texts, names of fields too, hold no special token but those to ``keep``, and make none
        with what is written beside them."""
        if isinstance(value, str):
            parts = enumerate(self._special.split(value))
            return "".join(self._edges(part) if place % 2 == 0 else self._of(part, keep) for place, part in parts)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item, keep=keep) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.hide(item, keep=keep) for item in value]
        return value

    def hide_message(self, message: Message) -> Message:
        """What an assistant says may hold `<think>` and `</think>`, as its model writes them."""
        kept = {"content": self.hide(message["content"], keep=(THINK, END_THINK))}
        return self.hide(message) | (kept if message["role"] == "assistant" else {})

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered text, with what was hidden as ordinary tokens."""
        parts, shown = self._special.split(text), self.shown(text)
        if [*map(self.shown, parts)] == self._special.split(shown):  # nothing that was hidden would have been special
            return self._tokenizer.encode(shown, allow_special=True)
        ids: list[int] = []
        for place, part in enumerate(parts):
            special = place % 2 == 1
            ids += [self._tokenizer.token_id(part)] if special else self._tokenizer.encode(self.shown(part))
        return ids

    def shown(self, text: str) -> str:
        """The text as it would be with nothing hidden."""
        return re.sub(rf"{self._word}(\d+)n", lambda found: self._hidden[int(found.group(1))], text)

    def _of(self, token: str, keep: Sequence[str] = ()) -> str:
        if token in keep:
            return token
        self._hidden.append(token)
        return f"{self._word}{len(self._hidden) - 1}n"

    def _edges(self, text: str) -> str:
        """With the longest end that begins a token, and then the longest beginning that ends one, hidden; white space
        at the edges stays, which a template may strip. A name is what it is: templates read roles and fields."""
        inner = text.strip()
        if not inner or text.isidentifier():
            return text
        before, behind = text[: text.index(inner)], text[text.index(inner) + len(inner) :]
        sizes = range(min(len(inner), self._longest), 0, -1)
        if end := next((size for size in sizes if inner[-size:] in self._begins), 0):
            inner, behind = inner[:-end], self._of(inner[-end:]) + behind
        if begin := next((size for size in sizes if inner[:size] in self._ends), 0):
            before, inner = before + self._of(inner[:begin]), inner[begin:]
        return before + inner + behind


def _tokens(tokenizer: Tokenizer) -> list[str]:
    """The added tokens but for white space, which some tokenizers add for code; the longest first."""
    return sorted(filter(str.strip, tokenizer.added_tokens), key=len, reverse=True)


@functools.lru_cache(maxsize=8)
def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Any of them, the longest that begins at a place."""
    return re.compile("(" + ("|".join(map(re.escape, _tokens(tokenizer))) or r"(?!)") + ")")


@functools.lru_cache(maxsize=8)
def _fragments(tokenizer: Tokenizer) -> tuple[frozenset[str], frozenset[str], int]:
    """What they begin with and what they end with, without the whole ones, and how long such a part is at most."""
    cuts = [(token[:at], token[at:]) for token in _tokens(tokenizer) for at in range(1, len(token))]
    begins, ends = frozenset(begin for begin, _ in cuts), frozenset(end for _, end in cuts)
    return begins, ends, max(map(len, begins), default=0)
