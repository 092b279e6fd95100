"""Word problems with small numbers: somebody has some things, and in each step gets, loses or shares some.

A row is {"kind": "stories", "steps": size, "prompt": question, "answer": number, "rules": [start, [operation, number],
...]} for the task rows: the last number that is said is the answer.
"""

from typing import Any

import numpy as np

SIZES = range(1, 6)  # steps
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gwen", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "sweets")
_WORDS = {
    "add": ("{name} finds {number} more.", "A friend gives {name} {number} more.", "{name} buys {number} more."),
    "take": ("{name} loses {number} of them.", "{name} gives {number} of them away.", "{name} sells {number} of them."),
    "times": ("Then {name} gets more, until there are {number} times as many.",),
    "share": ("{name} makes {number} equal heaps of them, keeps one and gives the others away.",),
}
_MOST = 60


def make(rng: np.random.Generator, size: int) -> dict[str, Any]:
    """A story of `size` steps, whose numbers stay from 1 to 60."""
    name, things = str(rng.choice(_NAMES)), str(rng.choice(_THINGS))
    value = start = int(rng.integers(2, 21))
    sentences, steps = [f"{name} has {start} {things}."], []
    for _ in range(size):
        operation, number = _step(rng, value)
        value = apply(value, operation, number)
        steps.append([operation, number])
        sentences.append(str(rng.choice(_WORDS[operation])).format(name=name, number=number))
    prompt = " ".join([*sentences, f"How many {things} does {name} have now?"])
    return {"kind": "stories", "steps": size, "prompt": prompt, "answer": str(value), "rules": [start, *steps]}


def _step(rng: np.random.Generator, value: int) -> tuple[str, int]:
    """A step that leaves from 1 to 60."""
    divisors = [number for number in range(2, 6) if value % number == 0]
    factors = [number for number in (2, 3) if value * number <= _MOST]
    numbers = {
        "add": range(2, min(12, _MOST - value) + 1),
        "take": range(2, min(12, value - 1) + 1),
        "times": factors,
        "share": divisors,
    }
    operation = str(rng.choice([name for name, choices in numbers.items() if choices]))
    return operation, int(rng.choice(list(numbers[operation])))


def apply(value: int, operation: str, number: int) -> int:
    match operation:
        case "add":
            return value + number
        case "take":
            return value - number
        case "times":
            return value * number
        case "share":
            return value // number
    raise ValueError(f"operation={operation!r}: expected add, take, times or share")
