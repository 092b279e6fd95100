"""HumanEval (arXiv 2107.03374): Python functions to complete, graded by unit tests in the sandbox."""

import dataclasses
from typing import Any

from deepseek_jax.rl.code_reward import CodeReward, UnitTests
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, make_rows_task

TEMPLATE = "Complete this Python function. Give all of it in one ```python block.\n\n```python\n{prompt}\n```"


def make(config: TaskConfig) -> Task:
    """Columns `prompt`, `entry_point`, `test` and `canonical_solution`, as in openai/human-eval."""
    if config.prompt or config.answer:
        raise ValueError(
            f"task.prompt={config.prompt!r}, task.answer={config.answer!r}: humaneval's columns have names of their own"
        )
    asking = make_rows_task(config, prompt="prompt", template=TEMPLATE)
    return dataclasses.replace(asking, accuracy=CodeReward(_tests), right=_right, rewards=("accuracy",), said=None)


def _tests(row: Row) -> UnitTests:
    """What the prompt imports and defines is there for the code, which may leave it out, and for the tests."""
    return UnitTests(asserts=f"{_text(row, 'test')}\ncheck({_text(row, 'entry_point')})", before=_text(row, "prompt"))


def _right(row: Row) -> str:
    return _text(row, "prompt") + _text(row, "canonical_solution")


def _text(row: Row, name: str) -> Any:
    value = column(row, name)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {value!r:.100}; it must be text')
    return value
