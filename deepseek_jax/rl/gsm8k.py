"""GSM8K (arXiv 2110.14168): word problems whose answers end in a line `#### NUMBER`."""

from deepseek_jax.rl.tasks import Task, TaskConfig, make_rows_task

TEMPLATE = "{prompt}\nGive the final answer alone, as #### NUMBER."


def make(config: TaskConfig) -> Task:
    """Columns `question` and `answer` unless the configuration names others; right is the same number."""
    return make_rows_task(config, prompt="question", template=TEMPLATE, answer=right_number)


def right_number(answer: str) -> str:
    """What stands behind the last `####` of a worked answer. ValueError where nothing does."""
    _, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise ValueError(f"no #### with a number at the end of the answer {answer[-40:]!r}")
    return number.strip()
