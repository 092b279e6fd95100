"""Accuracy on the rows of a task, beside training and at the end of a stage, with samples to look at."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.data.text import read_rows
from deepseek_jax.evals.accuracy import Answered, accuracy, accuracy_by, answer
from deepseek_jax.files import read_json_lines, write_whole
from deepseek_jax.inference.engine import Engine
from deepseek_jax.rl.tasks import Row, Task, TaskConfig, column, make_task, where
from deepseek_jax.saying import doing
from deepseek_jax.typed import check_least, check_types

MODES = {"greedy": 0.0, "sampled": 1.0}  # by name, the temperature


@dataclasses.dataclass(frozen=True)
class TaskEval:
    """Questions of a task to a model; none without ``task.path``."""

    task: TaskConfig = TaskConfig()
    count: int = 0
    """The first so many rows (0: all)."""
    max_tokens: int = 256
    """Of an answer."""
    batch_size: int = 64
    """Questions answered at a time."""
    keep_samples: int = 24
    """Completions of each mode to write down."""
    by: str = ""
    """A column whose values the accuracy is split by."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "max_tokens", "batch_size")


class Exam:
    """A ``TaskEval`` whose rows have been read: each can be asked and has an answer to compare with, or ValueError."""

    def __init__(self, config: TaskEval, *, seed: int):
        self.config, self.seed, self.task = config, seed, make_task(config.task)
        self.rows = list(islice(read_rows(config.task.path), config.count or None))
        check_answerable(self.task, self.rows, config.task.path)
        for row in self.rows if config.by else ():
            try:
                column(row, config.by)
            except ValueError as error:
                raise ValueError(f"{where(row)}: {error}") from error

    def answers(self, engine: Engine, mode: str) -> list[Answered]:
        """What the engine's model says to each row, ``greedy`` or ``sampled`` at temperature 1."""
        config = self.config
        options = {"max_tokens": config.max_tokens, "batch_size": config.batch_size, "seed": self.seed}
        return answer(engine, self.task, self.rows, temperature=MODES[mode], **options)

    def metrics(self, model: Model) -> dict[str, float]:
        """``eval/accuracy_greedy`` and ``eval/accuracy_sampled``, each with its standard error."""
        engine, found = Engine(model), {}
        for mode in MODES:
            name = f"eval/accuracy_{mode}"
            found[name], found[f"{name}_stderr"] = accuracy(self.answers(engine, mode))
        return found

    def result(self, model: Model, run_dir: Path, *, stage: str) -> dict[str, Any]:
        """The accuracies at the end of a stage, and by ``config.by``; samples go to ``samples.jsonl``."""
        found: dict[str, Any] = {"problems": len(self.rows)}
        engine = Engine(model)
        for mode in MODES:
            with doing(f"asking {len(self.rows)} questions, {mode}"):
                answered = self.answers(engine, mode)
            found[f"accuracy_{mode}"], found[f"accuracy_{mode}_stderr"] = accuracy(answered)
            if self.config.by:
                by_kind = found.setdefault("by_kind", {})
                for value, share in accuracy_by(answered, self.config.by).items():
                    by_kind.setdefault(value, {})[mode] = share
            kept = answered[: self.config.keep_samples]
            samples = [self._sample(item) | {"stage": stage, "when": "after", "mode": mode} for item in kept]
            write_samples(run_dir / "samples.jsonl", samples)
        return found

    def _sample(self, item: Answered) -> dict[str, Any]:
        right = self.task.right(item.question.row)
        return {"prompt": item.question.text, "completion": item.completion, "answer": right, "correct": item.correct}


def check_answerable(task: Task, rows: Sequence[Row], path: Sequence[str], *, unanswered: bool = False) -> None:
    """ValueError for no rows, and for the first that cannot be asked or, unless ``unanswered``, has no answer to
    compare with."""
    if not rows:
        raise ValueError(f"{', '.join(path)}: no rows to ask")
    task.check(rows)
    for row in rows:
        try:
            if task.accuracy("", row) is None and not unanswered:
                raise ValueError("it has no answer to compare with")
        except ValueError as error:
            raise ValueError(f"{where(row)}: {error}") from error


def open_exam(config: TaskEval, *, seed: int) -> Exam | None:
    return Exam(config, seed=seed) if config.task.path else None


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Append completions to ``samples.jsonl``, once: what an earlier try wrote of the same kind is replaced. Of several
    processes the first alone writes."""
    if jax.process_index():
        return
    samples = list(samples)
    kinds = {(sample["when"], sample["mode"]) for sample in samples}
    earlier = read_json_lines(path) if path.exists() else []
    kept = [sample for sample in earlier if (sample["when"], sample["mode"]) not in kinds]
    write_whole(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in [*kept, *samples]))
