"""Problems of programming contests, as LiveCodeBench and Codeforces publish them: several columns make the question,
and public and hidden tests are one."""

import functools
from collections.abc import Sequence
from typing import Any

from deepseek_jax.rl.code_reward import CodeReward
from deepseek_jax.rl.contest_tests import read_contest_tests
from deepseek_jax.rl.rating import rating
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, fill

ASKED = "\n\nAnswer with the whole program in one ```python block."
# Columns that add to the question where a row has them, and what is said before each.
_SECTIONS = {"input_format": "Input", "output_format": "Output", "note": "Note"}
_RATINGS = ("rating", "cf_rating")


def make(config: TaskConfig) -> Task:
    """Column `prompt` asks, with `input_format`, `output_format`, `note`, `examples` and `starter_code` where a row
    has them, or a template of one's own. `task.answer`, by default `tests`, names the columns with tests, several as
    A+B, see ``read_contest_tests``. Rows with a `rating` (or `cf_rating`) give the figures ``rating``."""
    names = (config.answer or "tests").split("+")

    def ask(row: Row) -> str:
        return fill(config.template, row) if config.template else _question(row, config.prompt or "prompt")

    accuracy = CodeReward(functools.partial(read_contest_tests, names=names))
    return Task(ask, accuracy, lambda row: None, ("accuracy",), config.system, figures=rated)


def _question(row: Row, prompt: str) -> str:
    text = column(row, prompt)
    if not isinstance(text, str):
        raise ValueError(f'"{prompt}" is of type {type(text).__name__}; it must be text')
    parts = [text, *(f"{said}\n{row[name]}" for name, said in _SECTIONS.items() if row.get(name))]
    for pair in row.get("examples") or ():
        parts.append(f"Example input\n{pair['input'].strip()}\n\nExample output\n{pair['output'].strip()}")
    if row.get("starter_code"):
        parts.append(f"Begin with this code.\n```python\n{row['starter_code'].rstrip()}\n```")
    return "\n\n".join(parts) + ASKED


def rated(answers: Sequence[tuple[Row, str, bool]]) -> dict[str, float]:
    """``rating`` and ``rating_stderr`` from the answers to rows of known difficulty; nothing where none is. Several
    answers to a problem are the share of right ones: they are no independent draws, so the error is one answer's."""
    solved: dict[int, tuple[float, list[bool]]] = {}
    for row, _, correct in answers:
        if difficulty := _rating(row):
            solved.setdefault(id(row), (difficulty, []))[1].append(correct)
    if not solved:
        return {}
    shares = [(difficulty, sum(right) / len(right)) for difficulty, right in solved.values()]
    estimate, stderr = rating(*zip(*shares, strict=True))
    return {"rating": estimate, "rating_stderr": stderr}


def _rating(row: Row) -> float:
    value: Any = next((row[name] for name in _RATINGS if row.get(name)), 0)
    if not isinstance(value, int | float) or value < 0:
        raise ValueError(f"the rating is {value!r}; it must be a number")
    return float(value)
