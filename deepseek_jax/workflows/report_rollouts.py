"""Answers that a run wrote down, as far as a report has room for them."""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.files import each_json_line
from deepseek_jax.rl.words import wait_words, waits

FILE_NAME = "rollouts.jsonl"
LONGEST = 8  # answers that are shown whichever step they are of
_FIGURES = ("longest", "reflective", "wait")


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What `rollouts.jsonl` holds: how many answers, by step (steps, 3) as `Stage.points` has it their `longest` in
    tokens and the mean number of `reflective` words and of `wait` in one, and the lines that are shown."""

    count: int
    points: dict[str, np.ndarray]
    shown: list[dict[str, Any]]


def read_rollouts(folder: Path, most: int) -> Rollouts:
    """Shows at most `most` answers: groups of answers to one question, evenly over the file, the first and the last of
    them always, and the `LONGEST`. The file is read twice and never held."""
    path = folder / FILE_NAME
    if not path.exists():
        return Rollouts(0, {name: np.zeros((0, 3)) for name in _FIGURES}, [])
    keys, figures = [], dict[int, list[tuple[int, int, int]]]()
    for line in each_json_line(path):
        step, text, tokens = int(line["step"]), str(line["completion"]), int(line.get("tokens", 0))
        keys.append((step, line.get("question"), tokens))
        figures.setdefault(step, []).append((tokens, wait_words(text), waits(text)))
    chosen = _choose(keys, most)
    shown = [line for number, line in enumerate(each_json_line(path)) if number in chosen]
    values = {step: np.array(rows) for step, rows in figures.items()}
    means = {step: (rows[:, 0].max(), *rows[:, 1:].mean(axis=0)) for step, rows in values.items()}
    points = {
        name: np.array([(step, means[step][index], 0.0) for step in sorted(means)]).reshape(-1, 3)
        for index, name in enumerate(_FIGURES)
    }
    return Rollouts(len(keys), points, shown)


def _choose(keys: list[tuple[int, Any, int]], most: int) -> set[int]:
    """Of lines by (step, question, tokens), the numbers of those that are shown."""
    if len(keys) <= most:
        return set(range(len(keys)))
    longest = sorted(range(len(keys)), key=lambda number: -keys[number][2])[: min(LONGEST, most)]
    groups = [list(group) for _, group in itertools.groupby(range(len(keys)), key=lambda number: keys[number][:2])]
    room = most - len(longest)
    return {*longest, *_spread(groups, room)}


def _spread(groups: list[list[int]], room: int) -> Iterable[int]:
    """The members of as many groups as there is room for, evenly chosen; of the first the first where it has none."""
    size = max(map(len, groups))
    chosen = np.unique(np.linspace(0, len(groups) - 1, max(1, room // size)).round().astype(int))
    return [number for group in chosen for number in groups[group]][:room]
