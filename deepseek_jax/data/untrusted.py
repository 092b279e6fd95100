"""Conversations of people whom nobody vouches for: no text of theirs becomes a special token.

A template writes special tokens as text, so in what it renders theirs and those that somebody typed look the same. So
what was typed is hidden from the template behind words that nobody can guess, and put back once it is known which
special tokens are the template's own.
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
        self._word = f"hidden{secrets.token_hex(12)}n"
        self._hidden: list[str] = []

    def hide(self, value: Any, *, keep: Sequence[str] = ()) -> Any:
        """A JSON value whose texts, names of fields too, hold no special token but those to ``keep``."""
        if isinstance(value, str):
            return self._special.sub(lambda found: self._of(found.group(), keep), value)
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
        if not self._hidden:
            return self._tokenizer.encode(text, allow_special=True)
        ids: list[int] = []
        for place, part in enumerate(self._special.split(text)):
            special = place % 2 == 1
            ids += [self._tokenizer.token_id(part)] if special else self._tokenizer.encode(self.shown(part))
        return ids

    def shown(self, text: str) -> str:
        """The text as it would be with nothing hidden."""
        return re.sub(rf"{self._word}(\d+)n", lambda found: self._hidden[int(found.group(1))], text)

    def _of(self, token: str, keep: Sequence[str]) -> str:
        if token in keep:
            return token
        self._hidden.append(token)
        return f"{self._word}{len(self._hidden) - 1}n"


@functools.lru_cache(maxsize=8)
def _special(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Any added token, the longest that begins at a place; but for white space, which some tokenizers add for code."""
    tokens = sorted(filter(str.strip, tokenizer.added_tokens), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, tokens)) or r"(?!)") + ")")
