"""Rows of several tasks in one run: each is asked and graded as its own task does."""

import pytest

from deepseek_jax.rl.grader import Grader
from deepseek_jax.rl.tasks import TaskConfig, make_task

ROWS = [
    {"task": "gsm8k", "question": "How many?", "answer": "#### 1,072"},
    {"task": "choice", "question": "Which?", "options": ["a", "b"], "answer": "B"},
    {"task": "countdown", "numbers": [3, 4], "target": 12, "nums": [3, 4]},
    {"task": "rows", "prompt": "Hello!", "answer": None},
]
RIGHT = ["1072", "#### B", r"\boxed{3 * 4}", "Hi"]


def test_each_row_is_of_its_own_task():
    task = make_task(TaskConfig(name="mixed", system="Think."))
    task.check(ROWS)
    for row, text in zip(ROWS, RIGHT, strict=True):
        own = make_task(TaskConfig(name=row["task"], system="Think."))
        assert task.messages(row) == own.messages(row) and task.right(row) == own.right(row)
        assert task.accuracy(text, row) == own.accuracy(text, row)
        assert task.accuracy("", row) == own.accuracy("", row)
    with Grader(("accuracy",), task=task) as grader:
        grades = grader.grade([*RIGHT, *[""] * 3], [*ROWS, *ROWS[:3]])
    assert grades.total_N.tolist() == [1, 1, 1, 0, 0, 0, 0] and grades.metrics()["reward_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, 'no column "task"'),
        ({"task": "mixed"}, "\"task\" is 'mixed'; expected the name of another task"),
        ({"task": ["gsm8k"]}, "expected the name of another task"),
        ({"task": "gsmk"}, "task.name='gsmk': expected rows.*did you mean gsm8k"),
        ({"task": "gsm8k", "q": 1}, 'no column "question"'),
    ],
)
def test_what_is_no_row_of_a_task_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        make_task(TaskConfig(name="mixed")).check([row])


def test_columns_are_the_tasks_own():
    with pytest.raises(ValueError, match="each row's own task has columns and wording; task.answer is not used"):
        make_task(TaskConfig(name="mixed", answer="a"))
