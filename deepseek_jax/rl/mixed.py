"""Rows of several tasks in one run, as R1's reinforcement learning has mathematics, code, science, logic and general
questions side by side (arXiv 2501.12948): each says in a column `task` which it is of, "rows" of a general one."""

import contextlib
import threading
from collections.abc import Callable

from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, make_task


def make(config: TaskConfig) -> Task:
    """Each row is asked and graded as its own task does; columns and wording are those tasks' own."""
    given = [name for name in ("prompt", "answer", "template") if getattr(config, name)]
    if given:
        raise ValueError(f"task.name='mixed': each row's own task has columns and wording; task.{given[0]} is not used")
    tasks: dict[str, Task] = {}

    def of(row: Row) -> Task:
        name = column(row, "task")
        if not isinstance(name, str) or name == "mixed":
            raise ValueError(f'"task" is {name!r:.60}; expected the name of another task')
        if name not in tasks:
            tasks[name] = make_task(TaskConfig(name=name))
        return tasks[name]

    return Task(
        lambda row: of(row).ask(row),
        _Accuracy(of, tasks),
        lambda row: of(row).right(row),
        system=config.system,
    )


class _Accuracy:
    def __init__(self, of: Callable[[Row], Task], tasks: dict[str, Task]):
        self._of, self._tasks, self._alone = of, tasks, threading.Lock()

    @property
    def threads(self) -> int:
        """How many calls at a time are worth making: of what takes several; the others are called one by one."""
        return max((getattr(task.accuracy, "threads", 1) for task in self._tasks.values()), default=1)

    def __call__(self, completion: str, row: Row) -> float | None:
        accuracy = self._of(row).accuracy
        with contextlib.nullcontext() if hasattr(accuracy, "threads") else self._alone:
            return accuracy(completion, row)
