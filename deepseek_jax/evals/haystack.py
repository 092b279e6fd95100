"""Texts to find things in: sentences about nothing, and facts planted between them.

All words are few, so that a small tokenizer has each as a token and a small model learns them soon.
"""

from collections.abc import Iterator

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _words("Adam Anna Beth Carl Dora Emma Fred Glen Hugo Iris Jack Kate Luke Mary Nora Otto")
VALUES = _words("apple bell cake drum egg flag gold horn iron jade kite lamp milk nest owl pearl")
FACT = "Remember {key} {value} {key}."

_HOW = _words("big calm cold dark deep dry fair kind late long old pale slow soft warm wide")
_WHO = _words("boy cat child cook crowd dog farmer girl guest horse king man nurse queen sailor wind")
_DOES = _words("comes eats falls goes hides looks moves rests runs sings sits sleeps speaks stays waits walks")


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Endless sentences about nothing."""
    while True:
        how, who, does = (str(rng.choice(words)) for words in (_HOW, _WHO, _DOES))
        yield f"The {how} {who} {does}."


def document(rng: np.random.Generator, size: int) -> str:
    """A text of ``size`` / 2 to ``size`` sentences, in which one to four facts are stated again and again.

    How many sentences state them is drawn for each text, from a few to nearly all: many, and it is soon learnt that a
    key's value comes back; few, and it comes back from afar.
    """
    count, keys = int(rng.integers(size // 2, size + 1)), int(rng.integers(1, 5))
    share = np.exp(rng.uniform(np.log(3 / count), np.log(0.95)))
    pairs = zip(*(rng.choice(words, keys, replace=False) for words in (KEYS, VALUES)), strict=True)
    facts = [FACT.format(key=key, value=value) for key, value in pairs]
    filler = sentences(rng)
    return " ".join(str(rng.choice(facts)) if rng.random() < share else next(filler) for _ in range(count))


def documents(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows for pretraining. ValueError for a size under 8."""
    if size < 8:
        raise ValueError(f"size={size}: texts with needles have at least 8 sentences")
    rng = np.random.default_rng(seed)
    while True:
        yield {"text": document(rng, size)}
