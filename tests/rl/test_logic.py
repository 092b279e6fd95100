"""Logic puzzles: their rules by hand, by other means, and what is no answer."""

import re
from collections import Counter
from itertools import islice, permutations, product
from pathlib import Path

import pytest

from deepseek_jax.data.text import read_rows
from deepseek_jax.rl import grid, knights
from deepseek_jax.rl.logic import KINDS, stream_puzzles, write_puzzles
from deepseek_jax.rl.tasks import TaskConfig, make_task

# Ann: Ben is a knave. Ben: Ann and I are of different kinds. If Ann were a knight, Ben would be a knave and his claim
# true; so Ann is a knave, Ben a knight, and his claim is true. Cleo then lies: Ann is a knight or Ben a knave.
KNIGHTS = {
    "kind": "knights",
    "names": ["Ann", "Ben", "Cleo"],
    "rules": [
        ["Ann", ["is", "Ben", "knave"]],
        ["Ben", ["differ", "Ann", "Ben"]],
        ["Cleo", ["or", ["is", "Ann", "knight"], ["is", "Ben", "knave"]]],
    ],
    "answer": "Ann knave, Ben knight, Cleo knave",
}
# The dog is left of the cat, so 1 and 2; the tea is with the cat, in 2.
GRID = {
    "kind": "grid",
    "houses": 2,
    "groups": [["cat", "dog"], ["tea", "milk"]],
    "rules": [["left", "dog", "cat"], ["same", "cat", "tea"]],
    "answer": "1: dog, milk; 2: cat, tea",
}
SAID = [  # written down before the code
    (KNIGHTS, "#### Ann knave, Ben knight, Cleo knave", 1),
    (KNIGHTS, "#### Cleo knave, Ann knave, Ben knight", 1),
    (KNIGHTS, "\\boxed{Ann is a knave, Ben is a knight, Cleo is a knave}", 1),
    (KNIGHTS, "ann: knave; ben: knight; cleo: KNAVE", 1),
    (KNIGHTS, "<think>Ann knight</think>#### Ann knave, Ben knight, Cleo knave", 1),
    (KNIGHTS, "<think>x</think><answer>Ann knave, Ben knight, Cleo knave</answer>", 1),
    (KNIGHTS, "#### Ann knave, Ben knight, Cleo knight", 0),
    (KNIGHTS, "#### Ann knave, Ben knight", 0),
    (KNIGHTS, "#### Ann knave, Ben knight, Cleo knave, Dan knave", 0),
    (KNIGHTS, "#### Ann knave, Ann knight, Ben knight, Cleo knave", 0),
    (KNIGHTS, "#### Ann knave, Ann knave, Ben knight, Cleo knave", 0),
    (KNIGHTS, "#### knave, knight, knave", 0),
    (KNIGHTS, "#### Ann knaves, Ben knight, Cleo knave", 0),
    (KNIGHTS, "<think>#### Ann knave, Ben knight, Cleo knave</think>", 0),
    (KNIGHTS, "<think>Ann knave, Ben knight, Cleo knave", 0),
    (KNIGHTS, "", 0),
    (KNIGHTS, "Ann " * 500_000, 0),
    (GRID, "#### 1: dog, milk; 2: cat, tea", 1),
    (GRID, "#### 2: tea, cat; 1: milk, dog.", 1),
    (GRID, "House 1: dog milk; house 2: Cat Tea", 1),
    (GRID, "\\boxed{1. dog, milk; 2. cat, tea}", 1),
    (GRID, "1: dog, milk;\n2: cat, tea", 1),
    (GRID, "#### 1: dog, tea; 2: cat, milk", 0),
    (GRID, "#### 1: cat, tea; 2: dog, milk", 0),
    (GRID, "#### 1: dog, milk; 2: cat", 0),
    (GRID, "#### 1: dog, milk; 2: cat, tea, dog", 0),
    (GRID, "#### 1: dog, milk, cow; 2: cat, tea", 0),
    (GRID, "#### 1: dog, milk; 3: cat, tea", 0),
    (GRID, "#### 1: dog, milk; cat, tea", 0),
    (GRID, "#### 1: dog, milk, cat, tea", 0),
    (GRID, "", 0),
    (GRID, "1:" * 500_000, 0),
    (GRID, "#### " + "9" * 1000 + ": dog", 0),
]


@pytest.mark.parametrize(("puzzle", "completion", "score"), SAID, ids=range(len(SAID)))
def test_answers(puzzle, completion, score):
    assert make_task(TaskConfig(name="logic")).accuracy(completion, puzzle) == score


def test_the_puzzle_in_words():
    asked = make_task(TaskConfig(name="logic")).messages(KNIGHTS)[0]["content"].split("\n")
    assert asked[1:5] == [
        "You meet Ann, Ben and Cleo.",
        'Ann says: "Ben is a knave."',
        'Ben says: "Ann and Ben are of different kinds."',
        'Cleo says: "Ann is a knight or Ben is a knave, or both."',
    ]
    asked = make_task(TaskConfig(name="logic")).messages(GRID)[0]["content"].split("\n")
    assert asked[2:4] == ["Dog is somewhere to the left of cat.", "Cat and tea are in the same house."]


def knights_by_words(text: str, kinds: dict[str, bool]) -> bool:
    """The rules once more, from the words of the question: each claim as an expression of Python's."""
    for name, said in re.findall(r'^(\w+) says: "(.+)\."$', text, flags=re.MULTILINE):
        said = said[0].lower() + said[1:] if said.startswith("If ") else said
        said = re.sub(r"(\w+) and (\w+) are of the same kind", r"(\1 == \2)", said)
        said = re.sub(r"(\w+) and (\w+) are of different kinds", r"(\1 != \2)", said)
        said = re.sub(r"(\w+) is a knight", r"(\1)", said)
        said = re.sub(r"(\w+) is a knave", r"(not \1)", said).removesuffix(", or both")
        said = re.sub(r"^if (.+), then (.+)$", r"(not \1) or \2", said)
        if eval(said, {"__builtins__": {}}, kinds) != kinds[name]:
            return False
    return True


@pytest.mark.parametrize("size", [2, 3, 5])
def test_knights_have_one_solution_in_words_too(size: int):
    for puzzle in islice(stream_puzzles("knights", size, seed=size), 20):
        names, text = puzzle["names"], knights.ask(puzzle)
        worlds = [{name: bool(world >> i & 1) for i, name in enumerate(names)} for world in range(1 << size)]
        right = [kinds for kinds in worlds if knights_by_words(text, kinds)]
        assert right == [knights.read(puzzle["answer"], puzzle)] == list(knights.solutions(puzzle))


def arrangements(puzzle) -> list[dict[str, int]]:
    """All that agree with the rules."""
    found = []
    for orders in product(*(permutations(group) for group in puzzle["groups"])):
        places = {thing: house for order in orders for house, thing in enumerate(order, start=1)}
        if grid.holds(puzzle, places):
            found.append(places)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_grids_have_one_solution_and_no_rule_too_many(size: int):
    for puzzle in islice(stream_puzzles("grid", size, seed=size), 5):
        (places,) = arrangements(puzzle)
        assert grid.read(puzzle["answer"], puzzle) == places
        for rule in puzzle["rules"]:
            fewer = [other for other in puzzle["rules"] if other != rule]
            assert len(arrangements(puzzle | {"rules": fewer})) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_puzzles_are_written_read_and_solved(tmp_path: Path, kind: str):
    path, task = tmp_path / "puzzles.jsonl", make_task(TaskConfig(name="logic"))
    write_puzzles(path, stream_puzzles(kind, 3, seed=0), 30)
    rows = list(read_rows(path))
    assert len(Counter(str(row["rules"]) for row in rows)) == 30
    assert [task.accuracy(f"<think>x</think>#### {task.right(row)}", row) for row in rows] == [1] * 30
    task.check(rows)
    first = next(stream_puzzles(kind, 3, seed=0))
    assert first == dict(rows[0]) and first != next(stream_puzzles(kind, 3, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "riddle"}, "\"kind\" is 'riddle'; expected one of knights, grid"),
        ({"answer": "Ann knight, Ben knight, Cleo knave"}, "which does not solve the puzzle"),
        ({"rules": [["Ann", ["xor", 1, 2]]]}, r"\['xor', 1, 2\] is no claim"),
        ({"rules": [["Zoe", ["is", "Ann", "knave"]]]}, "no puzzle of kind knights: KeyError: 'Zoe'"),
        ({"names": None}, "no puzzle of kind knights: TypeError"),
    ],
)
def test_a_row_that_is_no_puzzle_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_task(TaskConfig(name="logic")).check([KNIGHTS | change])


def test_what_cannot_be_made_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="size=9: knights come in sizes of 2 to 8"):
        next(stream_puzzles("knights", 9, seed=0))
    with pytest.raises(ValueError, match="kind='riddle'"):
        next(stream_puzzles("riddle", 2, seed=0))
    with pytest.raises(ValueError, match="count=100000: there are about"):
        write_puzzles(tmp_path / "x.jsonl", stream_puzzles("knights", 2, seed=0), 100_000)
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(ValueError, match="task.answer='x': the task logic asks its own puzzles"):
        make_task(TaskConfig(name="logic", answer="x"))
