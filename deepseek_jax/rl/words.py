"""How often an answer turns back on itself, by the words that R1's paper counts over R1-Zero's training."""

import re

# The ten of DeepSeek-R1 (Nature 645, 2025), Extended Data Fig. 1a; 1b is "wait" alone. "but" and "however" stand in
# any prose, so what says something is the growth from a base, not the count. ASCII's idea of a word: a
# model that mixes languages writes them without spaces.
REFLECTIVE = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
_REFLECTIVE, _WAIT = (re.compile(rf"\b(?:{'|'.join(words)})\b", re.I | re.A) for words in (REFLECTIVE, REFLECTIVE[:1]))


def wait_words(text: str) -> int:
    """How many of `text`'s words are `REFLECTIVE`: whole words as they stand, so "Wait" but not "waiting"."""
    return len(_REFLECTIVE.findall(text))


def waits(text: str) -> int:
    """How many of `text`'s words are "wait"."""
    return len(_WAIT.findall(text))
