"""Knights, who say what is true, and knaves, who say what is not: who is which?

A puzzle is {"kind": "knights", "names": [name, ...], "rules": [[speaker, claim], ...], "answer": text}. A claim is

    ["is", name, "knight" | "knave"]   ["same", name, name]   ["differ", name, name]
    ["and", claim, claim]   ["or", claim, claim], one or both   ["if", claim, claim]
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hal")
ENDING = "Give the answer alone, as #### Ann knight, Ben knave, and so on for everybody."
SIZES = range(2, len(NAMES) + 1)
Kinds = dict[str, bool]  # by name, whether it is a knight

_INTRODUCTION = (
    "On an island each person is a knight, who says only what is true, or a knave, who says only what is not."
)
_PAIR = re.compile(r"([^\W\d_]+)(?: is)?(?: an?)?[ :=]+(knight|knave)\b", re.IGNORECASE)


def make(rng: np.random.Generator, size: int) -> dict[str, Any]:
    """A puzzle of `size` people, who say a thing each, with a single solution."""
    names: list[str] = list(NAMES[:size])
    while True:
        rules = [[name, _claim(rng, name, names)] for name in names]
        found = list(solutions({"names": names, "rules": rules}))
        if len(found) == 1:
            return {"kind": "knights", "names": names, "rules": rules, "answer": write(found[0])}


def _claim(rng: np.random.Generator, speaker: str, names: list[str]) -> list[Any]:
    kind = str(rng.choice(("is", "same", "differ", "and", "or", "if")))
    if kind in ("same", "differ"):
        return [kind, *map(str, rng.choice(names, 2, replace=False))]
    others = [name for name in names if name != speaker]
    if kind == "is" or len(others) < 2:
        return _simple(rng, str(rng.choice(others)))
    return [kind, *(_simple(rng, str(name)) for name in rng.choice(others, 2, replace=False))]


def _simple(rng: np.random.Generator, name: str) -> list[Any]:
    return ["is", name, str(rng.choice(("knight", "knave")))]


def solutions(puzzle: Mapping[str, Any]) -> Iterator[Kinds]:
    """All that agree with the rules, by trying."""
    for kinds in product((True, False), repeat=len(puzzle["names"])):
        found = dict(zip(puzzle["names"], kinds, strict=True))
        if holds(puzzle, found):
            yield found


def holds(puzzle: Mapping[str, Any], kinds: Kinds) -> bool:
    """Whether all of whom it is said are told of, and each says what such a one can say."""
    said = (kinds[speaker] == _is_true(claim, kinds) for speaker, claim in puzzle["rules"])
    return set(kinds) == set(puzzle["names"]) and all(said)


def _is_true(claim: list[Any], kinds: Kinds) -> bool:
    match claim:
        case ["is", name, kind]:
            return kinds[name] == (kind == "knight")
        case ["same", first, second]:
            return kinds[first] == kinds[second]
        case ["differ", first, second]:
            return kinds[first] != kinds[second]
        case ["and", first, second]:
            return _is_true(first, kinds) and _is_true(second, kinds)
        case ["or", first, second]:
            return _is_true(first, kinds) or _is_true(second, kinds)
        case ["if", first, second]:
            return not _is_true(first, kinds) or _is_true(second, kinds)
    raise ValueError(f"{claim!r} is no claim")


def ask(puzzle: Mapping[str, Any]) -> str:
    """The puzzle in words."""
    names = puzzle["names"]
    met = f"You meet {', '.join(names[:-1])} and {names[-1]}."
    said = [f'{speaker} says: "{_sentence(claim)}."' for speaker, claim in puzzle["rules"]]
    return "\n".join([_INTRODUCTION, met, *said, "Who is what?", ENDING])


def _sentence(claim: list[Any]) -> str:
    text = _words(claim)
    return text[0].upper() + text[1:]


def _words(claim: list[Any]) -> str:
    match claim:
        case ["is", name, kind]:
            return f"{name} is a {kind}"
        case ["same" | "differ" as how, first, second]:
            return f"{first} and {second} are " + ("of the same kind" if how == "same" else "of different kinds")
        case ["and", first, second]:
            return f"{_words(first)} and {_words(second)}"
        case ["or", first, second]:
            return f"{_words(first)} or {_words(second)}, or both"
        case ["if", first, second]:
            return f"if {_words(first)}, then {_words(second)}"
    raise ValueError(f"{claim!r} is no claim")


def write(kinds: Kinds) -> str:
    return ", ".join(f"{name} {'knight' if knight else 'knave'}" for name, knight in kinds.items())


def read(text: str, puzzle: Mapping[str, Any]) -> Kinds | None:
    """What an answer says of everybody; None where it says two things of one, nothing of another."""
    pairs = [(name.casefold(), kind.casefold() == "knight") for name, kind in _PAIR.findall(text)]
    names = {name.casefold(): name for name in puzzle["names"]}
    if sorted(name for name, _ in pairs) != sorted(names):
        return None
    return {names[name]: knight for name, knight in pairs}
