"""Logic puzzles, generated, and graded by their rules: knights and knaves, and things in houses.

Rows are what ``write_puzzles`` (``deepseek-jax puzzles``) wrote, see `knights` and `grid`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from deepseek_jax.rl import grid, knights, stories
from deepseek_jax.rl.answers import final_answer, last_reply
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column

KINDS: dict[str, ModuleType] = {"knights": knights, "grid": grid}
WRITTEN = KINDS | {"stories": stories}  # what is asked by the task rows among them
_LONGEST = 2000  # characters of an answer


def make(config: TaskConfig) -> Task:
    """The task: right is whatever agrees with all of a puzzle's rules."""
    for name in ("prompt", "answer", "template"):
        if getattr(config, name):
            raise ValueError(f"task.{name}={getattr(config, name)!r}: the task logic asks its own puzzles")

    def accuracy(completion: str, row: Row) -> float:
        puzzles = _checked(row)
        said = final_answer(last_reply(completion))[0]
        found = puzzles.read(said, row) if len(said) <= _LONGEST else None
        return float(found is not None and puzzles.holds(row, found))

    return Task(lambda row: _checked(row).ask(row), accuracy, lambda row: column(row, "answer"), system=config.system)


def _checked(row: Row) -> ModuleType:
    """The module of the puzzle's kind. ValueError where the answer that the row has does not solve it."""
    puzzles = KINDS.get(column(row, "kind"))
    if puzzles is None:
        raise ValueError(f'"kind" is {row["kind"]!r}; expected one of {", ".join(KINDS)}')
    try:
        found = puzzles.read(row["answer"], row)
        right = found is not None and puzzles.holds(row, found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no puzzle of kind {row['kind']}: {type(error).__name__}: {error}") from error
    if not right:
        raise ValueError(f'"answer" is {row["answer"]!r}, which does not solve the puzzle')
    return puzzles


def stream_puzzles(kind: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Different puzzles of a kind, as long as there are more. ValueError for a kind or size that there is not."""
    if kind not in WRITTEN:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(WRITTEN)}")
    sizes = WRITTEN[kind].SIZES
    if size not in sizes:
        raise ValueError(f"size={size}: {kind} come in sizes of {sizes[0]} to {sizes[-1]}")
    rng, seen, repeated = np.random.default_rng(seed), set[str](), 0
    while repeated < 1000:
        puzzle = WRITTEN[kind].make(rng, size)
        if (text := json.dumps(puzzle["rules"])) in seen:
            repeated += 1
            continue
        seen.add(text)
        repeated = 0
        yield puzzle


def write_puzzles(path: str | Path, puzzles: Iterator[Mapping[str, Any]], count: int) -> None:
    """Write so many, one JSON object a line. ValueError where there are not as many; the file is not written then."""
    lines = [json.dumps(puzzle) + "\n" for puzzle, _ in zip(puzzles, range(count), strict=False)]
    if len(lines) < count:
        raise ValueError(f"count={count}: there are about {len(lines)} of this size")
    Path(path).write_text("".join(lines), encoding="utf-8")
