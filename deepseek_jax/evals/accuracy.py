"""How many questions of a task a model answers right, greedily and sampled."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import gather, own_part
from deepseek_jax.rl.asking import Question, ask
from deepseek_jax.rl.conversing import converse
from deepseek_jax.rl.tasks import Row, Task, score_all


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question and what the model made of it."""

    question: Question
    completion: str
    correct: bool


def answer(
    engine: Engine,
    task: Task,
    rows: Sequence[Row],
    *,
    max_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int = 0,
) -> list[Answered]:
    """One completion per row, right where it has ended and the task's accuracy is 1.

    Several processes ask and grade a part of the rows each, and all know all that came of it.
    """
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    questions = [ask(task, engine.tokenizer, row) for row in rows]
    answered = []
    for start in range(0, len(rows), batch_size):
        part = own_part(questions[start : start + batch_size])
        key = jax.random.fold_in(jax.random.key(seed), start)
        samples = converse(engine, task.tools, part, sampling, key, filled=min(batch_size, len(rows)))
        said = [sample.answer for sample in samples]
        texts = [item.text if item.ended else "" for item in said]
        scores = score_all(task.accuracy, texts, [question.row for question in part])
        marked = [(item.text, bool(item.ended and score == 1.0)) for item, score in zip(said, scores, strict=True)]
        answered += [mark for marks in gather(marked) for mark in marks]
    return [Answered(question, *mark) for question, mark in zip(questions, answered, strict=True)]


def accuracy(answered: Sequence[Answered]) -> tuple[float, float]:
    """Share of right answers and its standard error, ``sqrt(p (1 - p) / n)``: 0 of none or all, whose uncertainty
    ``samples.wilson`` tells."""
    p = float(np.mean([item.correct for item in answered]))
    return p, float(np.sqrt(p * (1 - p) / len(answered)))


def accuracy_by(answered: Sequence[Answered], column: str) -> dict[str, float]:
    """The share for each value that the rows have in ``column``."""
    groups = defaultdict(list)
    for item in answered:
        groups[str(item.question.row[column])].append(item.correct)
    return {value: float(np.mean(right)) for value, right in groups.items()}
