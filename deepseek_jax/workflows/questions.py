"""Questions of tasks put to a model several times, each answer kept, and the figures that come of it."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Hashable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from deepseek_jax.checkpoint.model import Model
from deepseek_jax.compute import ComputeConfig
from deepseek_jax.data.chat import own_template
from deepseek_jax.data.text import Record, read_rows
from deepseek_jax.evals.samples import cons_at_k, pass_at_1, pass_at_k, wilson
from deepseek_jax.files import read_json_lines, read_json_object, write_json, write_whole
from deepseek_jax.inference.engine import Engine
from deepseek_jax.inference.sampling import SamplingParams
from deepseek_jax.parallel.processes import gather, meet, own_part
from deepseek_jax.rl.asking import Answer, Question, ask
from deepseek_jax.rl.conversing import converse
from deepseek_jax.rl.tasks import PRESETS, Row, TaskConfig, make_task, score_all, where
from deepseek_jax.saying import doing
from deepseek_jax.train.reference import fingerprint
from deepseek_jax.typed import check_least, check_types
from deepseek_jax.workflows.task_eval import check_answerable

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are asked: by default as DeepSeek evaluates R1 (arXiv 2501.12948, section 3)."""

    samples: int = 4
    """Answers to each question; pass@1 is the mean of them."""
    temperature: float = 0.6
    """Of the answers; 0: greedy, with one sample."""
    top_p: float = 0.95
    """The most likely tokens that together have this probability."""
    max_tokens: int = 32768
    """Of an answer; less where the model's positions do not hold prompt and answer."""
    count: int = 0
    """The first so many questions of each task; 0: all."""
    seed: int = 0
    """Of the draws."""
    batching: Literal["together", "continuous"] = "together"
    """Whether an answer that has ended waits for the others of its batch, or the next begins in its place. The last
    digits may differ, and so now and then a word; tasks with tools take turns together in either."""
    skip_unusable: bool = False
    """Leave out rows that the task cannot ask or grade, and count them, where the first is an error else."""

    def __post_init__(self) -> None:
        check_types(self)
        check_least(self, 1, "samples", "max_tokens")
        SamplingParams(temperature=self.temperature, top_p=self.top_p)
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples}, temperature=0: greedy answers are all the same, so ask once")

    def engine(self, model: Model, batch_size: int) -> Engine:
        """What answers."""
        return Engine(model, at_once=batch_size if self.batching == "continuous" else 0)


_BATCHES = 16  # that are asked at a time, and kept together, where answers do not wait for each other
_OF_QUESTIONS = ("samples", "count", "skip_unusable")  # what is asked; an answer depends on none of them


class Answers:
    """The answers of one task in ``NAME.jsonl`` of a folder, a line each, as they come: a run that was cut off goes on.

    An answer is a function of model, question, ``seed`` and its number alone, not of what is answered beside it.
    """

    def __init__(self, config: TaskConfig, asking: Asking, *, unanswered: bool = False):
        """ValueError for no rows, and unless they are skipped for rows that cannot be asked or, unless ``unanswered``,
        have no answer."""
        self.name = f"{config.name}={','.join(config.path)}"
        self.asking, self.task = asking, make_task(config)
        self.skipped = 0
        self.rows = list(islice(self._usable(config, unanswered), asking.count or None))
        check_answerable(self.task, self.rows, config.path, unanswered=unanswered)
        what = dataclasses.asdict(dataclasses.replace(config, path=()))  # the same rows, wherever they lie
        asked = json.dumps([what, *map(dict, self.rows)], default=str)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
        self.file = f"{Path(config.name.partition(':')[0]).stem}-{digest}.jsonl"

    def _usable(self, config: TaskConfig, unanswered: bool) -> Iterator[Row]:
        for row in read_rows(config.path):
            if unanswered:
                row = _with_answer(row, config)
            if self.asking.skip_unusable:
                try:
                    check_answerable(self.task, [row], config.path, unanswered=unanswered)
                except ValueError as error:
                    logger.log(logging.DEBUG if self.skipped else logging.WARNING, "%s; skipped, as all such", error)
                    self.skipped += 1
                    continue
            yield row

    def complete(self, engine: Engine, folder: Path, batch_size: int) -> list[dict[str, Any]]:
        """Ask what has not been answered yet; all answers, ordered by question and sample. Several processes ask and
        grade a part each; the first writes."""
        path = folder / self.file
        known = read_json_lines(path) if path.exists() else []
        done = {(line["question"], line["sample"]): line for line in known}
        wanted = [(row, sample) for row in range(len(self.rows)) for sample in range(self.asking.samples)]
        missing = [key for key in wanted if key not in done]
        meet()  # all have read them
        first = jax.process_index() == 0
        if first:
            write_whole(path, "".join(map(_line, known)))  # without the half line that a kill may have left
        file = (path if first else Path(os.devnull)).open("a", encoding="utf-8")
        with doing(f"{self.name}: {len(missing):,} answers") as tell, file:
            size = batch_size * (_BATCHES if self.asking.batching == "continuous" else 1)
            for start in range(0, len(missing), size):
                tell(f"{start:,} of {len(missing):,}")
                part = missing[start : start + size]
                for key, line in zip(part, self._asked(engine, part, batch_size), strict=True):
                    done[key] = line
                    file.write(_line(line))
                file.flush()
        return [done[key] for key in wanted]

    def _asked(self, engine: Engine, part: Sequence[tuple[int, int]], batch_size: int) -> Iterator[dict[str, Any]]:
        """The answers to ``part``, as they come."""
        if jax.process_count() == 1:
            yield from self._ask(engine, part, batch_size)
        else:
            for lines in gather(list(self._ask(engine, own_part(part), batch_size))):
                yield from lines

    def further_figures(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        """What the task itself has to say of all answers, see ``Task``."""
        said = [line["completion"] if line["ended"] else "" for line in lines]
        answered = [
            (self.rows[line["question"]], text, line["correct"]) for line, text in zip(lines, said, strict=True)
        ]
        return dict(self.task.figures(answered)) if self.task.figures else {}

    def _ask(self, engine: Engine, part: Sequence[tuple[int, int]], batch_size: int) -> Iterator[dict[str, Any]]:
        questions = [ask(self.task, engine.tokenizer, self.rows[row]) for row, _ in part]
        sampling = [self._sampling(engine, question, *key) for question, key in zip(questions, part, strict=True)]
        samples = converse(engine, self.task.tools, questions, sampling, filled=batch_size)
        said = [sample.answer for sample in samples]
        texts = [answer.text if answer.ended else "" for answer in said]
        scores = score_all(self.task.accuracy, texts, [question.row for question in questions])
        for number, ((row, sample), question, answer) in enumerate(zip(part, questions, said, strict=True)):
            yield {
                **self._about(row, sample, question),
                "completion": answer.text,
                **({"turns": list(answer.turns)} if answer.turns else {}),
                "tokens": samples[number].length,
                "ended": answer.ended,
                "said": self._said(texts[number], question),
                "correct": None if scores[number] is None else answer.ended and scores[number] == 1.0,
            }

    def _about(self, row: int, sample: int, question: Question) -> dict[str, Any]:
        """What every line begins with."""
        return {
            "question": row,
            "row": where(question.row),
            "sample": sample,
            "prompt": question.text,
            "answer": self.task.right(question.row),
        }

    def _said(self, text: str, question: Question) -> str | None:
        return as_vote(self.task.said(text, question.row) if self.task.said else None)

    def _sampling(self, engine: Engine, question: Question, row: int, sample: int) -> SamplingParams:
        room = engine.config.max_position_embeddings - len(question.prompt)
        if room < 1:
            raise ValueError(
                f"{self.name}, question {row + 1}: a prompt of {len(question.prompt)} tokens leaves no room for an "
                f"answer in max_position_embeddings={engine.config.max_position_embeddings}"
            )
        return SamplingParams(
            temperature=self.asking.temperature,
            top_p=self.asking.top_p,
            max_tokens=min(self.asking.max_tokens, room),
            seed=self.seed(row, sample),
        )

    def seed(self, row: int, sample: int, *part: int) -> int:
        """Of an answer's draws, or of a part of it."""
        return int(np.random.SeedSequence((self.asking.seed, row, sample, *part)).generate_state(1)[0] >> 1)


def ask_questions(
    model: Model, tasks: Sequence[Answers], asking: Asking, folder: Path | str = "", *, batch_size: int
) -> tuple[dict[str, dict[str, float]], Path]:
    """The figures of each task, see ``figures``, and the folder in which answers and ``result.json`` lie: by default
    one in runs/eval for this model and this way of asking.

    Raises:
      ValueError: a folder with answers of another model, or to other asking.
    """
    settings = asked_how(model, asking)
    folder = Path(folder or f"runs/eval/{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}")
    claim(folder, settings, "--out")
    engine, found = asking.engine(model, batch_size), {}
    for answers in tasks:
        lines = answers.complete(engine, folder, batch_size)
        found[answers.name] = figures(lines, asking.samples, votes=answers.task.said is not None)
        found[answers.name] |= answers.further_figures(lines)
        if asking.skip_unusable:
            found[answers.name]["skipped"] = answers.skipped
        if jax.process_index() == 0:
            write_json(folder / "result.json", read_json_object(folder / "result.json") | found)
    return found, folder


def asked_how(model: Model, asking: Asking) -> dict[str, Any]:
    """All that an answer is a function of, beside the question and its number."""
    template, how = own_template(model.text), dataclasses.asdict(asking)
    by = {} if template is None else {"chat_template": hashlib.sha256(template.source.encode()).hexdigest()[:12]}
    how = {name: value for name, value in how.items() if name not in _OF_QUESTIONS}
    if asking.batching == "together":  # as of folders that are older than the choice
        del how["batching"]
    return {"model": identity(model), **by, "compute": _arithmetic(model.compute), **how}


def claim(folder: Path, settings: dict[str, Any], option: str) -> None:
    """Make a folder for answers by these settings. ValueError, which names ``option``: it has such by others."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json_object(folder / "settings.json")
    earlier = {name: value for name, value in earlier.items() if name not in _OF_QUESTIONS}
    names = {**earlier, **settings} if earlier else ()
    if differs := {name: earlier.get(name) for name in names if earlier.get(name) != settings.get(name)}:
        raise ValueError(f"{folder} holds answers by other settings, {differs}: give another {option}")
    if jax.process_index() == 0:
        write_json(folder / "settings.json", settings)


def identity(model: Model) -> str:
    """A name for the model's numbers and vocabulary, wherever they lie."""
    return f"{fingerprint((model.params, model.router_bias))}-{model.text.fingerprint[:8]}"


def _arithmetic(compute: ComputeConfig) -> dict[str, str]:
    """What of it decides an answer's last digits, and so now and then its words."""
    return {name: value for name, value in dataclasses.asdict(compute).items() if isinstance(value, str)}


def figures(lines: Sequence[dict[str, Any]], samples: int, *, votes: bool) -> dict[str, float]:
    """``pass@1`` with ``stderr`` and, since that is 0 where all questions went alike, Wilson's interval of 95 %,
    ``low`` to ``high``; ``pass@k`` and, with votes, ``cons@k`` for k = 2, 4, … up to the samples, and these
    themselves; the share that was cut off, and the mean length in tokens."""
    groups = [lines[start : start + samples] for start in range(0, len(lines), samples)]
    correct = [[line["correct"] for line in group] for group in groups]
    said = [[line["said"] for line in group] for group in groups]
    mean, stderr = pass_at_1(correct)
    found = {"questions": len(groups), "samples": samples, "pass@1": mean, "stderr": stderr}
    found["low"], found["high"] = wilson(mean, len(groups))
    for k in powers(samples)[1:]:
        found[f"pass@{k}"] = pass_at_k(correct, k)
        if votes:
            found[f"cons@{k}"] = cons_at_k(said, correct, k)
    cut = 1 - float(np.mean([line["ended"] for line in lines]))
    return found | {"cut_off": cut, "tokens": float(np.mean([line["tokens"] for line in lines]))}


def as_vote(said: Hashable | None) -> str | None:
    """What an answer says, see ``Task``, as text: the same text for what is equal, as 17 and 17.0 are."""
    if not isinstance(said, Decimal):
        return None if said is None else str(said)
    whole, point, rest = f"{said or Decimal():f}".partition(".")  # normalize() would round a long one
    return whole + (point + rest).rstrip("0").rstrip(".")


def powers(samples: int) -> list[int]:
    """1, 2, 4, … up to the samples, and these themselves."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()))})


def all_turns(line: dict[str, Any]) -> str:
    """What was said in an answer that is kept, see ``Answer``."""
    return Answer(line["completion"], line["ended"], tuple(line.get("turns", ()))).all_turns


def _with_answer(row: Record, config: TaskConfig) -> Record:
    """The row, with null for a right answer where it has no column for that; of "A|B" one will do."""
    preset = PRESETS.get(str(row.get("task")) if config.name == "mixed" else config.name, TaskConfig())
    names = (config.answer or preset.answer or "answer").split("|")
    return row if any(one in row for one in names) else Record({**row, names[0]: None}, where(row))


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
