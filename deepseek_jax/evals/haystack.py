"""Texts to find things in: sentences about nothing, and facts planted between them.

A fact says what a key's password is. All words are short and few, so that a small tokenizer has each as one token.
"""

from collections.abc import Iterator

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _words(
    "Adam Alan Anna Bart Beth Brad Carl Cora Dale Dana Dean Dora Earl Emma Eric Fay Fred Gail Gina Glen Hank Hope "
    "Hugo Iris Ivan Jack Jane Joan Joel Karl Kate Kurt Lena Liam Lisa Luke Lynn Mark Mary Mike Nell Nina Noel Nora "
    "Olga Omar Otto Owen Paul Pete Phil Rita Rosa Ross Ruth Sara Sean Tess Theo Todd Vera Walt Will Zoe"
)
VALUES = _words(
    "acid apple bank bell bird boat bone book bread bush cake cave clay coal coin corn crab crown desk drum duck egg "
    "fire fish flag fox frog gate goat gold hill honey horn ink iron jade kite knot lake lamp leaf lion milk moon moth "
    "nest oak onion owl palm pearl pipe plum rope rose salt seed ship silk snow star stone sword tent tiger"
)
SHARES = (0.05, 0.95)  # of facts among the sentences of a text to train on
FACT = "The password of {key} is {value}."

_HOW = _words("big calm cold dark deep dry fair kind late long old pale slow soft warm wide")
_WHO = _words("boy cat child cook crowd dog farmer girl guest horse king man nurse queen sailor wind")
_DOES = _words("comes eats falls goes hides looks moves rests runs sings sits sleeps speaks stays waits walks")
_WHERE = _words("by in near over past under")
_WHAT = _words("barn bridge church field garden house market river road room sea street town tree wall wood")


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """Endless sentences about nothing."""
    while True:
        how, who, does, where, what = (str(rng.choice(words)) for words in (_HOW, _WHO, _DOES, _WHERE, _WHAT))
        yield f"The {how} {who} {does}."


def document(rng: np.random.Generator, size: int) -> str:
    """A text of ``size`` / 2 to ``size`` sentences in which two to five facts are stated, mostly again and again.

    How much of the text they are is drawn anew for each: from five sentences in a hundred, far from each other, to
    nearly all, from which it is learnt soonest that what a key's password was it is again.
    """
    count, share = int(rng.integers(size // 2, size + 1)), rng.uniform(*SHARES)
    keys, values = (rng.choice(words, int(rng.integers(2, 6)), replace=False) for words in (KEYS, VALUES))
    facts = [FACT.format(key=key, value=value) for key, value in zip(keys, values, strict=False)]
    filler = sentences(rng)
    return " ".join(str(rng.choice(facts)) if rng.random() < share else next(filler) for _ in range(count))


def documents(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Endless rows for pretraining. ValueError for a size under 8."""
    if size < 8:
        raise ValueError(f"size={size}: texts with needles have at least 8 sentences")
    rng = np.random.default_rng(seed)
    while True:
        yield {"text": document(rng, size)}
