"""Word problems: the answer that stands in a row is what the words come to."""

import re

import pytest

from deepseek_jax.rl import stories
from deepseek_jax.rl.logic import stream_puzzles
from deepseek_jax.rl.tasks import TaskConfig, make_task

# What each sentence does to the number, written down from its words alone.
SENTENCES = {
    r"finds (\d+) more|gives \w+ (\d+) more|buys (\d+) more": lambda value, number: value + number,
    r"loses (\d+) of them|gives (\d+) of them away|sells (\d+) of them": lambda value, number: value - number,
    r"until there are (\d+) times as many": lambda value, number: value * number,
    r"makes (\d+) equal heaps of them, keeps one": lambda value, number: value / number,
}


def told(prompt: str) -> float:
    first, *steps, asked = re.findall(r"[^.?]+[.?]", prompt)
    value = float(re.findall(r"has (\d+) \w+\.", first)[0])
    for sentence in steps:
        ((effect, number),) = [
            (effect, int(next(filter(None, found.groups()))))
            for pattern, effect in SENTENCES.items()
            if (found := re.search(pattern, sentence))
        ]
        value = effect(value, number)
        assert 1 <= value <= 60 and value == int(value)
    assert re.fullmatch(rf" How many \w+ does {first.split()[0]} have now\?", asked)  # of whom all sentences tell
    assert all(sentence.split().count(first.split()[0]) for sentence in steps)
    return value


@pytest.mark.parametrize("size", stories.SIZES)
def test_answers(size):
    task = make_task(TaskConfig())
    rows = [row for row, _ in zip(stream_puzzles("stories", size, seed=size), range(200), strict=False)]
    for row in rows:
        assert told(row["prompt"]) == int(row["answer"])
        assert len(row["rules"]) == size + 1
        assert task.accuracy(f"so it is {row['answer']}.", row) == 1
        assert task.accuracy(f"so it is {row['answer']}1.", row) == 0
    assert len({str(row["rules"]) for row in rows}) == len(rows) == 200


def test_refused():
    with pytest.raises(ValueError, match="size=6: stories come in sizes of 1 to 5"):
        next(stream_puzzles("stories", 6, seed=0))
    with pytest.raises(ValueError, match="operation='halve'"):
        stories.apply(4, "halve", 2)
