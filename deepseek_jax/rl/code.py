"""Programming problems with tests: Codeforces, LiveCodeBench, MBPP and the like, from rows of one's own."""

import dataclasses

from deepseek_jax.rl.code_reward import code_reward
from deepseek_jax.rl.tasks import Task, TaskConfig, make_rows_task

TEMPLATE = "{prompt}\n\nAnswer with the whole program in one ```python block."


def make(config: TaskConfig) -> Task:
    """Column `prompt` asks; `tests` (task.answer) holds the tests, see ``read_tests``; right is code that passes."""
    asking = make_rows_task(config, prompt="prompt", template=TEMPLATE)
    accuracy = code_reward(config.answer or "tests")
    return dataclasses.replace(asking, accuracy=accuracy, right=lambda row: None, rewards=("accuracy",), said=None)
