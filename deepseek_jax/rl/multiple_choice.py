"""Questions with options by letter: MMLU, MMLU-Pro, GPQA and their like."""

import random
import string
from typing import Any

from deepseek_jax.rl.rewards import choice
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, fill

TEMPLATE = "{question}\n\n{options}\n\nThink it over, and give the letter of the right option alone, as #### LETTER."
_RIGHT, _WRONG = "Correct Answer", ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def make(config: TaskConfig) -> Task:
    """Columns `question` and `answer`, a letter or an index from 0, unless the configuration names others, and
    `options` or `choices`, a list; or GPQA's own, whose options come in an order that the question alone decides. The
    template's {options} are those, a line each."""

    def read(row: Row) -> tuple[str, list[Any], str]:
        gpqa = _RIGHT in row
        question = column(row, config.prompt or ("Question" if gpqa else "question"))
        if not isinstance(question, str):
            raise ValueError(f"the question is of type {type(question).__name__}; it must be text")
        if gpqa:
            options = [column(row, name) for name in (_RIGHT, *_WRONG)]
            order = random.Random(question).sample(range(4), 4)
            return question, [options[place] for place in order], string.ascii_uppercase[order.index(0)]
        options = column(row, "choices" if "choices" in row and "options" not in row else "options")
        if not isinstance(options, list) or not 2 <= len(options) <= 26:
            raise ValueError(f"the options are {options!r:.80}; they must be a list of 2 to 26")
        return question, options, _letter(column(row, config.answer or "answer"), len(options))

    def ask(row: Row) -> str:
        question, options, _ = read(row)
        lines = [f"({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
        return fill(config.template or TEMPLATE, {**row, "question": question, "options": "\n".join(lines)})

    def accuracy(completion: str, row: Row) -> float | None:
        return choice.score(completion, {"answer": read(row)[2]})

    said = lambda completion, row: choice.chosen(completion)  # noqa: E731
    return Task(ask, accuracy, lambda row: read(row)[2], system=config.system, said=said)


def _letter(answer: Any, count: int) -> str:
    letters = string.ascii_uppercase[:count]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    if type(answer) is int and 0 <= answer < count:
        return letters[answer]
    raise ValueError(
        f"the answer is {answer!r:.80}; it must be one of {letters[0]} to {letters[-1]}, or 0 to {count - 1}"
    )
