"""Text of a completion while it is being made, token by token."""

import codecs

from deepseek_jax.data.tokenizer import Tokenizer


class TextStream:
    """Turns ids into text as they come; a character is given out with its last byte, never half of it.

    The pieces of every `push` and the one of `finish`, joined, are `tokenizer.decode(ids)` with the same
    `skip_special_tokens`. ValueError at the first id where the tokenizer is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain with this id: often a word, "" inside a character of several tokens."""
        added = self._tokenizer.token_bytes(int(token_id), skip_special_tokens=self._skip_special_tokens)
        return self._decoder.decode(added)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was begun and not ended, else "". The stream starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
