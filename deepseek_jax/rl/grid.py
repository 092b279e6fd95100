"""Houses in a row and what is in each: a small logic grid.

A puzzle is {"kind": "grid", "houses": n, "groups": [[n things], ...], "rules": [rule, ...], "answer": text}. In each
house is one thing of each group. A rule is

    ["at", thing, house]   ["same", thing, thing]   ["left", thing, thing], somewhere   ["next", thing, thing]
"""

import re
from collections.abc import Iterator, Mapping
from itertools import combinations, permutations, product
from typing import Any

import numpy as np

GROUPS = (("cat", "dog", "fox", "owl"), ("tea", "milk", "juice", "water"), ("red", "blue", "green", "white"))
ENDING = "Give the answer alone, as #### 1: cat, tea, red; 2: dog, and so on for each house."
SIZES = range(2, len(GROUPS[0]) + 1)
Places = dict[str, int]  # by thing, the house

_HOUSE = re.compile(r"\s*(?:house )?(\d{1,3})\s*[:.)]\s*(.*)", re.IGNORECASE | re.DOTALL)
_SENTENCES = {
    "at": "{0} is in house {1}.",
    "same": "{0} and {1} are in the same house.",
    "left": "{0} is somewhere to the left of {1}.",
    "next": "{0} is in a house next to that of {1}.",
}


def make(rng: np.random.Generator, size: int) -> dict[str, Any]:
    """A puzzle of `size` houses with a single solution, which is lost with any of its rules left out."""
    groups = [[str(thing) for thing in rng.permutation(group)[:size]] for group in GROUPS]
    orders = np.array(list(product(permutations(range(1, size + 1)), repeat=len(groups))))
    every = {thing: orders[:, g, i] for g, group in enumerate(groups) for i, thing in enumerate(group)}
    chosen = int(rng.integers(len(orders)))
    rules, solution = list(_rules(groups, size)), {thing: int(houses[chosen]) for thing, houses in every.items()}
    rules = [rules[index] for index in rng.permutation(len(rules)) if _agrees(rules[index], solution)]
    agrees = np.array([_agrees(rule, every) for rule in rules])
    kept = list(range(len(rules)))
    for index in range(len(rules)):
        fewer = [other for other in kept if other != index]
        if np.sum(np.all(agrees[fewer], axis=0)) == 1:
            kept = fewer
    puzzle = {"kind": "grid", "houses": size, "groups": groups, "rules": [rules[index] for index in kept]}
    return puzzle | {"answer": write(puzzle, solution)}


def _rules(groups: list[list[str]], size: int) -> Iterator[list[Any]]:
    things = [thing for group in groups for thing in group]
    yield from (["at", thing, house] for thing in things for house in range(1, size + 1))
    for first, second in combinations(things, 2):
        yield from (["same", first, second], ["next", first, second], ["left", first, second], ["left", second, first])


def holds(puzzle: Mapping[str, Any], places: Places) -> bool:
    """Whether each group is spread over all houses, and every rule is kept."""
    houses = list(range(1, puzzle["houses"] + 1))
    spread = all(sorted(places.get(thing, 0) for thing in group) == houses for group in puzzle["groups"])
    return spread and all(_agrees(rule, places) for rule in puzzle["rules"])


def _agrees(rule: list[Any], places: Mapping[str, Any]) -> Any:
    """Whether a rule is kept; of many arrangements at once where the places are arrays."""
    match rule:
        case ["at", thing, house]:
            return places[thing] == house
        case ["same", first, second]:
            return places[first] == places[second]
        case ["left", first, second]:
            return places[first] < places[second]
        case ["next", first, second]:
            return abs(places[first] - places[second]) == 1
    raise ValueError(f"{rule!r} is no rule")


def ask(puzzle: Mapping[str, Any]) -> str:
    """The puzzle in words."""
    groups = [f"one of {', '.join(group)}" for group in puzzle["groups"]]
    first = f"{puzzle['houses']} houses stand in a row; house 1 is the leftmost. In each is {'; '.join(groups)}."
    rules = [_SENTENCES[kind].format(*things).capitalize() for kind, *things in puzzle["rules"]]
    return "\n".join([first, "No two houses have the same.", *rules, "What is in each house?", ENDING])


def write(puzzle: Mapping[str, Any], places: Places) -> str:
    houses = range(1, puzzle["houses"] + 1)
    inside = ([thing for group in puzzle["groups"] for thing in group if places[thing] == house] for house in houses)
    return "; ".join(f"{house}: {', '.join(things)}" for house, things in zip(houses, inside, strict=True))


def read(text: str, puzzle: Mapping[str, Any]) -> Places | None:
    """Where an answer puts everything; None where it puts a thing twice, or what is in no group."""
    places: Places = {}
    things = {thing for group in puzzle["groups"] for thing in group}
    for part in text.strip().rstrip(".;").split(";"):
        found = _HOUSE.fullmatch(part)
        if found is None:
            return None
        for thing in re.split(r"[\s,]+", found.group(2).strip().casefold()):
            if thing not in things or thing in places:
                return None
            places[thing] = int(found.group(1))
    return places
